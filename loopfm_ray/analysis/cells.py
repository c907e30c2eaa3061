"""Put the evaluation records of an experiment together: a cell for each model, arm and variant, and what is compared."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loopfm_ray.analysis.significance import paired_test
from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.transfer import relative_gain, transfer_ratio_first_launch

__all__ = [
    "Cell",
    "Compared",
    "assemble_cells",
    "headline",
    "join_seeds",
    "read_cells",
    "stream_gains",
    "stream_headline",
]

# Any below: JSON.
Record = Mapping[str, Any]
_COMPARED = ("auc", "ne")
_SLICE_METRICS = ("auc", "ne", "gauc", "share")


@dataclass(frozen=True)
class Compared:
    """The arms that others are measured against."""

    baseline: str
    kd: str
    best: str


@dataclass(frozen=True)
class Cell:
    """One model in one arm of one variant: its evaluation record and the FM's of every seed, in the order of the seeds."""

    variant: str
    model: str
    arm: str
    records: tuple[Record, ...]
    fm: tuple[Record, ...]
    has_own_fm: bool = False
    """Whether the FM was measured on rows of this cell's own, a vertical's."""


def assemble_cells(cells: Sequence[Cell], roles: Compared) -> list[dict[str, Any]]:
    """Return the tree of every cell.

    Keys: variant, model, arm, seeds, per_seed (test metrics), mean, sd, valid (means on the validation window), slices (means), num_parameters, train_rows_per_s,
    transfer_ratio (mean over seeds, None where an FM does not beat the plain VM), transfer_ratio_per_seed, and
    `vs_<arm>` for the arms of `roles.baseline` and `roles.kd`: for auc and ne the paired test over seeds of the
    improvement (positive is better), and for auc the mean relative gain.
    """
    by_place = {(cell.variant, cell.model, cell.arm): cell for cell in cells}
    return [_tree(cell, by_place, roles) for cell in cells]


def read_cells(summary: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of an experiment's `summary.json`, the other way round from `assemble_cells`.

    Test metrics are those of each seed. Of the rest a summary has means alone, which stand for every seed, so that all that
    `assemble_cells` makes of these cells is what the summary says.
    """
    return [
        Cell(
            tree["variant"],
            tree["model"],
            tree["arm"],
            tuple(
                {**tree, "seed": seed, "test": tree["per_seed"][str(seed)]}
                for seed in tree["seeds"]
            ),
            tuple(
                {"seed": seed, "test": _fm_per_seed(tree, summary)[str(seed)]}
                for seed in tree["seeds"]
            ),
            "fm_per_seed" in tree,
        )
        for tree in summary["cells"]
    ]


def _fm_per_seed(tree: Record, summary: Mapping[str, Any]) -> Record:
    """Return the FM's test metrics by seed: of the cell's own rows, or where it has all rows those of the variant."""
    of_cell: Record | None = tree.get("fm_per_seed")
    of_variant: Record = summary["fm"][tree["variant"]]["per_seed"]
    return of_variant if of_cell is None else of_cell


def join_seeds(parts: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Return cells of the seeds of all parts, each part having the same cells of other seeds; seeds in rising order.

    Raises:
        MetricError: two parts have a seed in common, or not the same cells.
    """
    by_place: dict[tuple[str, str, str], list[Cell]] = {}
    for part in parts:
        for cell in part:
            by_place.setdefault((cell.variant, cell.model, cell.arm), []).append(cell)
    joined = []
    for place, cells in by_place.items():
        if len(cells) != len(parts):
            raise MetricError(
                f"cell {'/'.join(place)} is in {len(cells)} of {len(parts)} summaries; expected the same cells in all"
            )
        pairs = sorted(
            (
                (record, fm)
                for cell in cells
                for record, fm in zip(cell.records, cell.fm, strict=True)
            ),
            key=lambda pair: pair[0]["seed"],
        )
        seeds = [record["seed"] for record, _ in pairs]
        if len(set(seeds)) != len(seeds):
            raise MetricError(
                f"cell {'/'.join(place)} has seeds {seeds}; expected each in one summary alone"
            )
        records, fms = (tuple(side) for side in zip(*pairs, strict=True))
        joined.append(Cell(*place, records, fms, cells[0].has_own_fm))
    return joined


def headline(
    trees: Sequence[Mapping[str, Any]], variant: str, roles: Compared
) -> dict[str, float | None]:
    """Return the figures that stand at the top of the summary, over all models of one variant.

    `relative_auc_gain_over_kd`: mean over models and seeds of the best arm's relative AUC gain over the KD arm;
    `max_p_over_kd`: the largest p of that comparison among the models; `transfer_ratio` of the best arm,
    `transfer_ratio_kd`, both means over models, and `transfer_ratio_over_kd`, their quotient, unless the KD arm
    transfers nothing: a quotient by what is not above 0 says nothing.
    """
    mine = [tree for tree in trees if tree["variant"] == variant]
    best = [tree for tree in mine if tree["arm"] == roles.best]
    kd = [tree for tree in mine if tree["arm"] == roles.kd]
    versus = [tree.get(f"vs_{roles.kd}") for tree in best]
    gains = [item["auc_relative"] for item in versus if item is not None]
    ps = [item["auc"]["p"] for item in versus if item is not None]
    ratio, of_kd = _mean_known(best, "transfer_ratio"), _mean_known(kd, "transfer_ratio")
    quotient = ratio / of_kd if ratio is not None and of_kd is not None and of_kd > 0 else None
    return {
        "relative_auc_gain_over_kd": statistics.fmean(gains) if gains else None,
        "max_p_over_kd": _largest(ps),
        "transfer_ratio": ratio,
        "transfer_ratio_kd": of_kd,
        "transfer_ratio_over_kd": quotient,
    }


def stream_headline(
    trees: Sequence[Mapping[str, Any]], variant: str, roles: Compared
) -> dict[str, Any]:
    """Return the figures of progressive metrics that stand at the top of a stream's summary.

    `ne_gain_by_method`: by arm, the mean over verticals and seeds of `1 - NE / NE of the baseline arm`;
    `ne_gain_<best>_over_kd`: the same of the best arm over the KD arm, `p_ne_gain_<best>_over_kd` the p of its mean over the verticals,
    one number a seed, and `max_p_ne_<best>_over_kd` the largest p of a vertical;
    `calibration_by_method`: by arm and vertical, the mean prediction over the mean label (mean over seeds), `fm` being the FM's
    own.
    """
    mine = [tree for tree in trees if tree["variant"] == variant]
    by_place = {(tree["model"], tree["arm"]): tree for tree in mine}
    models = list(dict.fromkeys(tree["model"] for tree in mine))
    arms = list(dict.fromkeys(tree["arm"] for tree in mine))
    best, kd = roles.best, roles.kd
    over_kd = _ne_gains(mine, best, kd)
    versus = [by_place[model, best].get(f"vs_{kd}") for model in models]
    ps = [item["ne"]["p"] for item in versus if item is not None]
    calibration: dict[str, dict[str, float]] = {
        arm: {model: by_place[model, arm]["mean"]["calibration"] for model in models}
        for arm in arms
    }
    first = [by_place[model, arms[0]] for model in models]
    calibration["fm"] = {
        tree["model"]: statistics.fmean(
            test["calibration"] for test in tree["fm_per_seed"].values()
        )
        for tree in first
    }
    return {
        f"ne_gain_{best}_over_kd": statistics.fmean(over_kd),
        f"p_ne_gain_{best}_over_kd": paired_test(over_kd, [0.0] * len(over_kd)).p,
        f"max_p_ne_{best}_over_kd": _largest(ps),
        "ne_gain_by_method": {
            arm: statistics.fmean(_ne_gains(mine, arm, roles.baseline)) for arm in arms
        },
        "calibration_by_method": calibration,
    }


def stream_gains(
    trees: Sequence[Mapping[str, Any]], roles: Compared
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return by variant and arm what progressive NE gains, each a mean over the verticals and then over the seeds.

    `gain` over the baseline arm with its `sd` over the seeds (None with one), `best_over` of the best arm over this one, and
    `p_best_over` of that mean over the seeds.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for variant in dict.fromkeys(tree["variant"] for tree in trees):
        mine = [tree for tree in trees if tree["variant"] == variant]
        for arm in dict.fromkeys(tree["arm"] for tree in mine):
            gain = _ne_gains(mine, arm, roles.baseline)
            over = _ne_gains(mine, roles.best, arm)
            found.setdefault(variant, {})[arm] = {
                "gain": statistics.fmean(gain),
                "sd": statistics.stdev(gain) if len(gain) > 1 else None,
                "best_over": statistics.fmean(over),
                "p_best_over": paired_test(over, [0.0] * len(over)).p,
            }
    return found


def _ne_gains(trees: Sequence[Mapping[str, Any]], arm: str, over: str) -> list[float]:
    """Return by seed the mean over verticals of the relative NE gain of one arm over another; `trees` are of one variant."""
    by_place = {(tree["model"], tree["arm"]): tree for tree in trees}
    by_seed: dict[str, list[float]] = {}
    for model in dict.fromkeys(tree["model"] for tree in trees):
        for seed, test in by_place[model, arm]["per_seed"].items():
            before = by_place[model, over]["per_seed"][seed]["ne"]
            gain = relative_gain(before, test["ne"], is_lower_better=True)
            by_seed.setdefault(seed, []).append(gain)
    return [statistics.fmean(found) for found in by_seed.values()]


def _tree(
    cell: Cell, by_place: Mapping[tuple[str, str, str], Cell], roles: Compared
) -> dict[str, Any]:
    tests = [record["test"] for record in cell.records]
    seeds = [record["seed"] for record in cell.records]
    baseline = by_place[cell.variant, cell.model, roles.baseline]
    ratios = [
        _transfer_ratio(mine, plain, fm)
        for mine, plain, fm in zip(cell.records, baseline.records, cell.fm, strict=True)
    ]
    tree: dict[str, Any] = {
        "variant": cell.variant,
        "model": cell.model,
        "arm": cell.arm,
        "seeds": seeds,
        "per_seed": {str(seed): dict(test) for seed, test in zip(seeds, tests, strict=True)},
        "mean": _means(tests),
        "sd": _spreads(tests),
        "valid": _means([record["valid"] or {} for record in cell.records]),
        "slices": _slices(cell.records),
        "num_parameters": cell.records[0]["num_parameters"],
        "train_rows_per_s": statistics.fmean(r["train_rows_per_s"] for r in cell.records),
        "transfer_ratio": None
        if None in ratios
        else statistics.fmean(r for r in ratios if r is not None),
        "transfer_ratio_per_seed": dict(zip(map(str, seeds), ratios, strict=True)),
    }
    if cell.has_own_fm:
        tree["fm_per_seed"] = {str(fm["seed"]): dict(fm["test"]) for fm in cell.fm}
    for arm in (roles.baseline, roles.kd):
        other = by_place.get((cell.variant, cell.model, arm))
        if other is not None and arm != cell.arm:
            tree[f"vs_{arm}"] = _versus(tests, [record["test"] for record in other.records])
    return tree


def _versus(mine: Sequence[Record], other: Sequence[Record]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _COMPARED:
        sign = -1.0 if name == "ne" else 1.0
        value, base = ([sign * test[name] for test in tests] for tests in (mine, other))
        found[name] = asdict(paired_test(value, base))
    relative = [
        relative_gain(base["auc"], test["auc"], is_lower_better=False)
        for test, base in zip(mine, other, strict=True)
    ]
    return {**found, "auc_relative": statistics.fmean(relative)}


def _transfer_ratio(record: Record, plain: Record, fm: Record) -> float | None:
    if record is plain:
        return 0.0
    try:
        return transfer_ratio_first_launch(
            ne_vm=plain["test"]["ne"], ne_vm_transfer=record["test"]["ne"], ne_fm=fm["test"]["ne"]
        )
    except MetricError:
        return None  # the FM is no better than the plain VM: there is nothing to transfer


def _slices(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    shared = [
        name
        for name in records[0].get("slices", {})
        if all(name in record["slices"] for record in records)
    ]
    return {
        name: {
            metric: statistics.fmean(record["slices"][name][metric] for record in records)
            for metric in _SLICE_METRICS
            if all(metric in record["slices"][name] for record in records)
        }
        for name in shared
    }


def _means(tests: Sequence[Record]) -> dict[str, float]:
    return {name: statistics.fmean(test[name] for test in tests) for name in _shared(tests)}


def _spreads(tests: Sequence[Record]) -> dict[str, float]:
    if len(tests) < 2:
        return {}
    return {name: statistics.stdev(test[name] for test in tests) for name in _shared(tests)}


def _shared(tests: Sequence[Record]) -> list[str]:
    return [name for name in tests[0] if all(name in test for test in tests)]


def _mean_known(trees: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = [tree[name] for tree in trees]
    return statistics.fmean(values) if values and None not in values else None


def _largest(values: Sequence[float | None]) -> float | None:
    """Return the largest value; None without any, or where one is not known."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
