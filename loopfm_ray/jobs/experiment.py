"""Run an experiment: every variant's pipeline up to its evaluation, and the comparison of all cells.

What is finished is kept: versions in a pool that the variants share, evaluation records cell by cell. The same command
goes on where a killed one stopped.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopfm_ray.analysis.cells import (
    Cell,
    Compared,
    assemble_cells,
    headline,
    join_seeds,
    read_cells,
    stream_gains,
    stream_headline,
)
from loopfm_ray.config import config_hash, dump_yaml, validate
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiment_grid import ExperimentConfig, cell_name
from loopfm_ray.experiments import MODEL_FM, PipelineConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.evaluate import read_record
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.stages import STAGES, evaluation_path
from loopfm_ray.jobs.streaming import run_stream_stage, stream_cells, stream_fm
from loopfm_ray.report.grid import build_grid_report
from loopfm_ray.store.filesystem import remove_tree
from loopfm_ray.store.manifest import code_version, read_manifest
from loopfm_ray.store.pool import Pool
from loopfm_ray.store.tables import write_text

__all__ = ["run_experiment"]

_LOGGER = logging.getLogger(__name__)
_SHARED = ("prepare", "train-fm", "compress", "materialize", "join", "audit")
_BATCH = ("train-vm", "evaluate")
_DONE = "done.json"

Json = dict[str, Any]  # Any: JSON
_HOW_IT_RUNS = {"name", "run_dir", "seeds", "any_code", "keep_data", "pool", "audit", "ray"}


def run_experiment(
    config: ExperimentConfig, *, merge: Sequence[Path] = (), progress: Progress = silent
) -> dict[str, Any]:
    """Run every variant that is not finished and write `summary.json`, `report.html` and `results.md`; return the summary.

    Args:
        config: The experiment.
        merge: Summaries of the same experiment with other seeds, made elsewhere: the summary is over all of them.
        progress: Is told what is done.

    Raises:
        ConfigError: a summary is of another experiment.
        MetricError: a summary has a seed that the config or another summary has as well.
        LoopFMError: a stage failed; running the same config again goes on there.
    """
    others = [_read_summary(path, config) for path in merge]
    config.root.mkdir(parents=True, exist_ok=True)
    write_text(config.root / "config.yaml", dump_yaml(config))
    waiting = [name for name in config.variants if not _is_done(config, name)]
    if waiting:
        with connect(config.ray):
            for number, variant in enumerate(waiting, 1):
                progress(f"variant {variant}", 0, 1)
                _run_variant(config, variant, progress)
                _LOGGER.info("variant %s done, %d of %d", variant, number, len(waiting))
                progress(f"variant {variant}", 1, 1)
                summary = summarise(config, others if number == len(waiting) else ())
        return summary
    return summarise(config, others)


def summarise(config: ExperimentConfig, others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Write the summary of the variants that are finished, with its page and its tables, and return it.

    Args:
        config: The experiment.
        others: Whole summaries of the same experiment with other seeds.

    Raises:
        StoreError: none is finished.
        MetricError: two of them have a seed in common.
    """
    finished = [name for name in config.variants if _is_done(config, name)]
    if not finished:
        raise StoreError(
            f"no variant of {config.root} is finished; run `loopfm experiment` with this config"
        )
    roles = Compared(**config.roles.model_dump())
    own = [cell for name in finished for cell in _cells(config, name)]
    cells = assemble_cells(join_seeds([*map(read_cells, others), own]), roles)
    done = {name: _done(config, name) for name in finished}
    summary = {
        "name": config.name,
        **headline(cells, finished[0], roles),
        **(_of_stream(cells, finished[0], roles) if config.stream is not None else {}),
        "headline_variant": finished[0],
        "roles": asdict(roles),
        "seeds": cells[0]["seeds"],
        "num_unfinished_variants": len(config.variants) - len(finished),
        "code_versions": sorted(
            {item["code_version"] for item in done.values()}.union(
                *(other["code_versions"] for other in others)
            )
        ),
        "cells": cells,
        "fm": {
            name: _with_seeds(_fm_records(config, name), [other["fm"][name] for other in others])
            for name in finished
        },
        "channel": {name: item["channel"] for name, item in done.items()},
        "seconds": {name: item["seconds"] for name, item in done.items()},
        "config": {**config.model_dump(mode="json"), "seeds": cells[0]["seeds"]},
    }
    write_text(config.root / "summary.json", json.dumps(summary, indent=1))
    build_grid_report(summary, config.root)
    return summary


def _of_stream(cells: Sequence[Json], variant: str, roles: Compared) -> Json:
    return {**stream_headline(cells, variant, roles), "ne_by_variant": stream_gains(cells, roles)}


def _read_summary(path: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Return the summary at `path`, which has to be a whole one of the same experiment."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        theirs = validate(ExperimentConfig, summary["config"], f"the config in {path}")
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a summary of an experiment: {error!r}; expected the summary.json of one"
        ) from error
    if summary["num_unfinished_variants"]:
        raise ConfigError(
            f"{path} lacks {summary['num_unfinished_variants']} variants; expected a finished experiment"
        )
    mine, other = (_measured(item) for item in (config, theirs))
    if mine != other:
        differs = sorted(name for name in mine if mine[name] != other[name])
        raise ConfigError(
            f"{path} is of another experiment: {', '.join(differs)} differ; expected other seeds of the same config"
        )
    return summary


def _measured(config: ExperimentConfig) -> dict[str, Any]:
    """What an experiment measures, without where, how and for which seeds it runs."""
    return config.model_dump(mode="json", exclude=_HOW_IT_RUNS)


def _with_seeds(record: dict[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    per_seed = {seed: test for each in (*others, record) for seed, test in each["per_seed"].items()}
    return {**record, "per_seed": dict(sorted(per_seed.items(), key=lambda item: int(item[0])))}


def _run_variant(config: ExperimentConfig, variant: str, progress: Progress) -> None:
    pipeline = config.pipeline(variant)
    pipeline.paths.records.mkdir(parents=True, exist_ok=True)
    write_text(pipeline.paths.config, dump_yaml(pipeline))
    context = Context(pipeline, progress, pool=Pool(config.pool_dir), any_code=config.any_code)
    seconds = {}
    stages = {**STAGES, "stream": run_stream_stage}
    for name in (*_SHARED, *(_BATCH if config.stream is None else ("stream",))):
        started = time.perf_counter()
        stages[name](context)
        seconds[name] = time.perf_counter() - started
    channel = read_manifest(pipeline.paths.snapshot(config.seeds[0])).meta["record"]["channel"]
    done = {
        "key": _key(config, pipeline),
        "code_version": code_version(),
        "seconds": seconds,
        "channel": channel,
    }
    write_text(pipeline.paths.root / _DONE, json.dumps(done, indent=1))
    if not config.keep_data:
        for seed in config.seeds:
            for folder in (pipeline.paths.latents(seed), pipeline.paths.joined(seed)):
                remove_tree(folder)
        if config.pool is None:
            _drop_unshared(config.pool_dir)


def _drop_unshared(pool: Path) -> None:
    """Remove joined sets from the pool whose only name is there: no unfinished variant has linked them."""
    for folder in pool.glob("joined-*"):
        if all(file.stat().st_nlink == 1 for file in folder.rglob("*.parquet")):
            shutil.rmtree(folder)


def _key(config: ExperimentConfig, pipeline: PipelineConfig) -> str:
    return config_hash(pipeline, "" if config.any_code else code_version())


def _done(config: ExperimentConfig, variant: str) -> dict[str, Any]:
    text = (config.pipeline(variant).paths.root / _DONE).read_text(encoding="utf-8")
    tree: dict[str, Any] = json.loads(text)
    return tree


def _is_done(config: ExperimentConfig, variant: str) -> bool:
    pipeline = config.pipeline(variant)
    if not (pipeline.paths.root / _DONE).is_file():
        return False
    return bool(_done(config, variant)["key"] == _key(config, pipeline))


def _cells(config: ExperimentConfig, variant: str) -> list[Cell]:
    pipeline = config.pipeline(variant)
    if config.stream is not None:
        return stream_cells(pipeline, variant, list(config.models), list(config.arms))
    fm = tuple(_records(pipeline, config.seeds, MODEL_FM))
    return [
        Cell(
            variant,
            model,
            arm,
            tuple(_records(pipeline, config.seeds, cell_name(model, arm))),
            fm,
        )
        for model in config.models
        for arm in config.arms
    ]


def _records(pipeline: PipelineConfig, seeds: Sequence[int], name: str) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        path = evaluation_path(pipeline, seed, name)
        record = read_record(path)
        if record is None:
            raise StoreError(f"{path} is not there; run `loopfm experiment` with this config again")
        found.append(asdict(record))
    return found


def _fm_records(config: ExperimentConfig, variant: str) -> dict[str, Any]:
    if config.stream is not None:
        return stream_fm(config.pipeline(variant))
    records = _records(config.pipeline(variant), config.seeds, MODEL_FM)
    return {
        "num_parameters": records[0]["num_parameters"],
        "per_seed": {str(record["seed"]): record["test"] for record in records},
        "train_rows_per_s": records[0]["train_rows_per_s"],
        "train_s": records[0]["seconds"],
    }
