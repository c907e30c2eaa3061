"""Put the records of one run together: the tree of `summary.json`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.transfer import relative_gain, transfer_ratio_first_launch

__all__ = ["assemble_models", "seed_models"]

# Any below: JSON.
Record = Mapping[str, Any]
_FIRST_LAUNCH = "first launch, baseline {}"


def seed_models(records: Sequence[Record], baseline: str) -> dict[str, Any]:
    """Return the metrics and transfer ratios of one seed's models; records come with the FM among them."""
    by_name = {record["name"]: record for record in records}
    ratios: dict[str, float | None] = {}
    for name, record in by_name.items():
        if name not in ("fm", baseline):
            try:
                ratios[name] = transfer_ratio_first_launch(
                    ne_vm=by_name[baseline]["test"]["ne"],
                    ne_vm_transfer=record["test"]["ne"],
                    ne_fm=by_name["fm"]["test"]["ne"],
                )
            except MetricError:
                ratios[name] = (
                    None  # the FM is no better than the baseline: there is nothing to transfer
                )
    models = {
        name: {"test": record["test"], "valid": record["valid"]} for name, record in by_name.items()
    }
    return {"models": models, "transfer_ratio": ratios}


def assemble_models(
    records: Mapping[int, Sequence[Record]], baseline: str, kd: str, best: str
) -> dict[str, Any]:
    """Return models, gains and transfer ratios over all seeds.

    Args:
        records: evaluation records by seed.
        baseline: the plain VM.
        kd: the VM with distillation alone.
        best: the VM whose AUC is compared with that of `kd`.

    Returns:
        The keys models, per_seed, gain, transfer_ratio, transfer_ratio_kind, relative_auc_gain_over_kd.
    """
    per_seed = {str(seed): seed_models(items, baseline) for seed, items in records.items()}
    names = [record["name"] for record in next(iter(records.values()))]
    models: dict[str, Any] = {}
    for name in names:
        mine = [record for items in records.values() for record in items if record["name"] == name]
        models[name] = {
            "test": _mean([record["test"] for record in mine]),
            "test_sd": _spread([record["test"] for record in mine]),
            "valid": _mean([record["valid"] for record in mine]),
            "num_parameters": mine[0]["num_parameters"],
            "num_bytes": mine[0]["num_bytes"],
            "train_rows_per_s": statistics.fmean(record["train_rows_per_s"] for record in mine),
            "seconds": statistics.fmean(record["seconds"] for record in mine),
        }
    base = models[baseline]["test"]
    gain = {
        name: {
            "ne": base["ne"] - model["test"]["ne"],
            "auc": model["test"]["auc"] - base["auc"],
            "auc_relative": _relative_auc(base["auc"], model["test"]["auc"]),
        }
        for name, model in models.items()
        if name != baseline
    }
    return {
        "models": models,
        "per_seed": per_seed,
        "gain": gain,
        "transfer_ratio": _ratios(per_seed),
        "transfer_ratio_kind": _FIRST_LAUNCH.format(baseline),
        "relative_auc_gain_over_kd": _relative_auc(
            models[kd]["test"]["auc"], models[best]["test"]["auc"]
        ),
    }


def _relative_auc(base: float, value: float) -> float:
    return relative_gain(base, value, is_lower_better=False)


def _ratios(per_seed: Mapping[str, Any]) -> dict[str, float | None]:
    first = next(iter(per_seed.values()))["transfer_ratio"]
    found = {name: [seed["transfer_ratio"][name] for seed in per_seed.values()] for name in first}
    return {
        name: None if None in values else statistics.fmean(values) for name, values in found.items()
    }


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(item[name] for item in metrics) for name in _shared(metrics)}


def _spread(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if len(metrics) < 2:
        return {}
    return {name: statistics.stdev(item[name] for item in metrics) for name in _shared(metrics)}


def _shared(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the metrics that every seed has, and that are numbers."""
    return [
        name
        for name in metrics[0]
        if all(name in item and math.isfinite(item[name]) for item in metrics)
    ]
