"""What an experiment on knowledge graph embedding found: means over seeds, paired tests, and the gap that was closed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loopfm_ray.analysis.significance import paired_test
from loopfm_ray.errors import StoreError
from loopfm_ray.kge.experiment import KgeExperimentConfig, plan_cells, read_cell_record

__all__ = ["compare_cells", "summarise_kge"]

Json = dict[str, Any]  # Any: JSON
METRICS = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10", "adjusted_mean_rank")
_SIGNIFICANT = 0.05


def summarise_kge(config: KgeExperimentConfig) -> Json:
    """Return the summary of the cells that are finished.

    Raises:
        StoreError: no model is finished in all arms, or a record is damaged.
    """
    records: dict[tuple[str, str], list[Json]] = {}
    by_key, num_unfinished = {}, 0
    for cell in plan_cells(config):
        record = read_cell_record(cell)
        if record is None:
            num_unfinished += 1
            continue
        by_key[cell.key] = record
        records.setdefault((cell.model, cell.arm), []).append(record)
    finished = {
        key: found
        for key, found in records.items()
        if len(found) == len(config.models[key[0]].seeds)
    }
    whole = [name for name in config.models if all((name, arm) in finished for arm in config.arms)]
    if not whole:
        raise StoreError(
            f"no model of {config.root} is finished in all arms; run `loopfm experiment` with this config"
        )
    cells = [
        cell
        for name in whole
        for cell in compare_cells(
            name,
            {arm: finished[name, arm] for arm in config.arms},
            config.roles.plain,
            config.roles.wide,
        )
    ]
    return {
        "name": config.name,
        **_headline(cells, config.roles.best),
        "roles": config.roles.model_dump(),
        "num_unfinished_cells": num_unfinished,
        "cells": cells,
        "records": by_key,
        "config": config.model_dump(mode="json"),
    }


def compare_cells(
    model: str, records: Mapping[str, Sequence[Json]], plain: str, wide: str | None
) -> list[Json]:
    """Return one entry for each arm of a model.

    Args:
        model: its name.
        records: by arm, those of all seeds in one order.
        plain: the arm that others are compared with.
        wide: the arm of the large dimension, if there is one.

    Returns:
        Means, deviations and single values of the test metrics; of arms but `plain` the paired difference of the MRR, its relative
        gain, and the share of the lead of `wide` that it closes (None where `wide` does not lead); training seconds.
    """
    base = records[plain]
    base_mrr = _values(base, "mrr")
    lead = None if wide is None else statistics.fmean(_values(records[wide], "mrr"))
    cells = []
    for arm, found in records.items():
        mrr = _values(found, "mrr")
        cell: Json = {
            "model": model,
            "arm": arm,
            "seeds": [record["seed"] for record in found],
            "mean": {name: statistics.fmean(_values(found, name)) for name in METRICS},
            "sd": {name: _deviation(_values(found, name)) for name in METRICS},
            "per_seed": {str(record["seed"]): record["test"] for record in found},
            "valid_mrr": statistics.fmean(record["valid_mrr"] for record in found),
            "best_epoch": statistics.fmean(record["best_epoch"] for record in found),
            "num_parameters": found[0]["num_parameters"],
            **{
                name: statistics.fmean(record[name] for record in found)
                for name in ("train_s", "train_s_to_best", "teacher_train_s")
            },
        }
        if arm != plain:
            test = paired_test(mrr, base_mrr)
            ahead = None if lead is None else lead - statistics.fmean(base_mrr)
            cell["vs_plain"] = {
                "mrr": asdict(test),
                "mrr_relative": test.mean / statistics.fmean(base_mrr),
                "gap_recovered": test.mean / ahead if ahead is not None and ahead > 0 else None,
                "train_s_ratio": cell["train_s"]
                / statistics.fmean(record["train_s"] for record in base),
            }
        cells.append(cell)
    return cells


def _headline(cells: Sequence[Json], best: str) -> Json:
    of_best = [cell["vs_plain"] for cell in cells if cell["arm"] == best and "vs_plain" in cell]
    gaps = [found["gap_recovered"] for found in of_best if found["gap_recovered"] is not None]
    tests = [found["mrr"] for found in of_best]
    better = [test for test in tests if test["mean"] > 0]
    clear = [test for test in better if test["p"] is not None and test["p"] < _SIGNIFICANT]
    return {
        "share_of_cells_better": len(better) / len(tests) if tests else None,
        "share_of_cells_significantly_better": len(clear) / len(tests) if tests else None,
        "mean_relative_mrr_gain": statistics.fmean(found["mrr_relative"] for found in of_best)
        if of_best
        else None,
        "gap_recovered": statistics.fmean(gaps) if gaps else None,
    }


def _values(records: Sequence[Json], name: str) -> list[float]:
    return [record["test"][name] for record in records]


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
