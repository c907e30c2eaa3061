"""Run an experiment on knowledge graph embedding: its trainings side by side, teachers first, and the comparison of all cells.

A training that asks for workers has them to itself.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopfm_ray.config import dump_yaml
from loopfm_ray.errors import ConfigError
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.kge_workers import RayRunner
from loopfm_ray.jobs.mapping import Progress, RayMapper, silent
from loopfm_ray.kge.compare import summarise_kge
from loopfm_ray.kge.experiment import (
    KgeCell,
    KgeExperimentConfig,
    plan_cells,
    read_cell_record,
    run_cell,
    waves,
    write_cell_record,
)
from loopfm_ray.kge.training import check_workers
from loopfm_ray.report.kge import build_kge_report
from loopfm_ray.store.tables import write_text

__all__ = ["run_kge_experiment"]


def run_kge_experiment(
    config: KgeExperimentConfig, *, merge: Sequence[Path] = (), progress: Progress = silent
) -> dict[str, Any]:  # Any: JSON
    """Run every cell that is not finished and write `summary.json`, `report.html` and `results.md`; return the summary.

    Args:
        config: The experiment.
        merge: Summaries of this or other experiments: what they have of this one's cells is not run again.
        progress: Is told of each training.

    Raises:
        ConfigError: a file to merge is no summary of such an experiment.
        DataError, SchemaError: a graph can not be read.
        ConfigError: a training asks for workers that its backbone can not use, or that the cluster has not.
        LoopFMError: a training failed; running the same config again goes on there.
    """
    config.root.mkdir(parents=True, exist_ok=True)
    write_text(config.root / "config.yaml", dump_yaml(config))
    started = time.perf_counter()
    cells = plan_cells(config)
    for path in merge:
        _take_records(path, cells)
    todo = [cell for cell in cells if read_cell_record(cell) is None]
    for cell in todo:
        check_workers(cell.backbone, cell.train)
    if todo:
        with connect(config.ray):
            for number, wave in enumerate(waves(todo)):
                stage = "train" if number == 0 else f"train, taught by {number}"
                _run_wave(config, wave, stage, progress)
    summary = {**summarise_kge(config), "seconds_of_this_run": time.perf_counter() - started}
    write_text(config.root / "summary.json", json.dumps(summary, indent=1))
    build_kge_report(summary, config.root)
    return summary


def _run_wave(
    config: KgeExperimentConfig, wave: Sequence[KgeCell], stage: str, progress: Progress
) -> None:
    """Run cells of one process side by side, then those that ask for workers one after another."""
    # each writes on the disk of this machine
    mapper = RayMapper(config.ray.parallel_tasks, stage, progress, is_here=True)
    list(mapper(run_cell, [cell for cell in wave if not cell.is_spread]))
    for cell in wave:
        if cell.is_spread:
            name = f"{stage}: {cell.model}, {cell.arm}, seed {cell.seed}"
            run_cell(cell, runner=RayRunner(name, progress))


def _take_records(path: Path, cells: Sequence[KgeCell]) -> None:
    """Write the records that a summary has of these cells and that are not there."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        found = [(cell, records[cell.key]) for cell in cells if cell.key in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a summary of an experiment on knowledge graph embedding: {error!r}; expected the summary.json of one"
        ) from error
    for cell, record in found:
        if read_cell_record(cell) is None:
            write_cell_record(cell, record)
