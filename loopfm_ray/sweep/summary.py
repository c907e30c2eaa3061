"""What a sweep found, as one tree of JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopfm_ray.analysis.scaling import scaling_record
from loopfm_ray.config import dump_yaml
from loopfm_ray.store.tables import write_text
from loopfm_ray.sweep.config import ScalingConfig, SweepConfig
from loopfm_ray.sweep.space import ChoiceParameter, Parameter
from loopfm_ray.sweep.study import SweepStudy, TrialRow

__all__ = ["scaling_points", "summarise_sweep", "write_trial_config"]

Json = dict[str, Any]  # Any: JSON


def summarise_sweep(config: SweepConfig, study: SweepStudy, confirmed: Json | None) -> Json:
    """Return the summary of a sweep: trials, the best, what mattered, scaling laws, and the confirmation."""
    rows = study.rows()
    counts = Counter(row.state for row in rows)
    return {
        "name": config.name,
        "kind": "sweep",
        "objectives": [
            {"metric": one.metric, "direction": "maximize" if one.is_maximized else "minimize"}
            for one in config.objectives
        ],
        "constraints": [one.model_dump(mode="json") for one in config.constraints],
        "parameters": {name: _shown(item) for name, item in config.space.items()},
        "num_trials": {state: counts.get(state, 0) for state in ("complete", "pruned", "failed")},
        "trials": [asdict(row) for row in rows],
        "best": study.best(),
        "importance": study.importance(),
        "scaling": [_scaling(one, rows, config) for one in config.scaling],
        "confirmed": confirmed,
        "seconds": study.used_s,
        "trial_seconds": sum(row.seconds for row in rows),
        "config": config.model_dump(mode="json"),
    }


def write_trial_config(config: SweepConfig, row: TrialRow) -> Path:
    """Write the config of a trial as a file that runs as it is, and return its path."""
    changed = {"name": f"{config.name}-trial-{row.number}", "run_dir": config.run_dir}
    path = config.root / "best" / f"trial-{row.number}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_yaml(config.resolve(row.params).model_copy(update=changed)))
    return path


def _shown(item: Parameter) -> Json:
    if isinstance(item, ChoiceParameter):
        return {"kind": "choice", "values": list(item.labels)}
    return {"kind": item.kind, "low": item.low, "high": item.high, "log": item.log}


def scaling_points(
    asked: ScalingConfig, rows: Sequence[TrialRow], *, is_rising: bool
) -> list[tuple[float, float]]:
    """Return the points of a scaling law by rising x: the best y of each x, or all.

    Args:
        asked: which metrics.
        rows: of the trials that have ended.
        is_rising: whether a larger y is better.
    """
    points = []
    for row in rows:
        found = {**row.metrics, **row.params}
        pair = _number(found, asked.x), _number(found, asked.y)
        if row.state == "complete" and None not in pair:
            points.append(pair)
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not asked.best_per_x:
        return sorted(known)
    pick = max if is_rising else min
    xs = sorted({x for x, _ in known})
    return [(x, pick(y for other, y in known if other == x)) for x in xs]


def _number(found: Mapping[str, Any], name: str) -> float | None:
    value = found.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _scaling(asked: ScalingConfig, rows: Sequence[TrialRow], config: SweepConfig) -> Json:
    points = scaling_points(asked, rows, is_rising=config.is_rising(asked.y))
    return scaling_record(asked.x, asked.y, points)
