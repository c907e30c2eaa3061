"""What the page, the Markdown and the terminal say of the trials of a sweep: their kinds, names, words and numbers."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loopfm_ray.errors import DataError
from loopfm_ray.report import words

__all__ = [
    "DEFINITIONS",
    "KINDS",
    "best_trials",
    "check_sweep",
    "cut",
    "finite",
    "goal",
    "headline",
    "hover",
    "kind_of",
    "limit",
    "metric_definition",
    "metric_name",
    "objective_of",
    "of_kind",
    "parameter_definition",
    "short_names",
    "show_metric",
    "show_value",
    "tally",
]

Json = dict[str, Any]  # Any: JSON of the summary

KINDS = {
    "best": "--accent",
    "complete": "--model-vm-loopfm",
    "infeasible": "--model-vm-kd",
    "pruned": "--model-vm",
    "failed": "--bad",
}
"""Every kind of trial and its colour. A trial that did its whole budget is best, complete or infeasible."""

DEFINITIONS = {
    "Trial": "One training with its own values of the parameters.",
    "Complete": "Trials that trained to the end.",
    "Pruned": "Trials that were stopped early, since others were better at the same rung.",
    "Failed": "Trials that ended in an error, which is below.",
    "Best": "The complete trial that meets every constraint and has the best value of the objective.",
    "Pareto front": "Complete trials that meet every constraint and that no other such trial equals or beats in every objective.",
    "Infeasible": "Complete trials that miss a constraint.",
    "Wall time": "From the start of the sweep to its end.",
    "Trial time": "Wall-clock time of the trial.",
    "Importance": "How much of the variation of the objective over the trials goes with this parameter. Few trials make it unsure.",
    "Rung": "A step of the training at which trials are compared and the worse ones stopped.",
    "Gain": "AUC over that of the base config, both means over the seeds, on the same rows, relative. Positive is better.",
    "p": "Paired t test against the base config over the seeds: chance of a difference as large, were there none.",
    "Law": "y = offset + scale × x^(−exponent), fitted by least squares of y. Pure: offset 0. Saturating: y comes near to the offset.",
}
"""What every word on the page of a sweep means."""

_METRICS = {"ne": "NE", "auc": "AUC", "gauc": "gAUC", "calibration": "Calibration", "transfer_ratio": "Transfer ratio"}  # fmt: skip
_NEEDED = ("name", "objectives", "parameters", "num_trials", "trials", "best", "seconds", "code_versions", "config")  # fmt: skip
_NUM_BEST = 10
_MAX_TEXT = 28


def check_sweep(summary: Mapping[str, Any]) -> None:
    """Refuse a tree that is not the summary of a sweep.

    Raises:
        DataError: a key is missing, or there is no objective.
    """
    missing = [name for name in _NEEDED if name not in summary]
    if missing:
        raise DataError(
            f"the summary of a sweep lacks {missing}; run `loopfm sweep` with its config to write it again"
        )
    if not summary["objectives"]:
        raise DataError("the summary of a sweep names no objective, expected one or more")


# Any: a JSON value
def finite(value: Any) -> float | None:
    """Return a number as it is, and None for what is not one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def objective_of(trial: Json, place: int) -> float | None:
    """Return the value of one objective, None where it was not measured."""
    values = trial["values"]
    return None if values is None else finite(values[place])


def kind_of(trial: Json, best: Sequence[int]) -> str:
    """Return a key of `KINDS`."""
    if trial["state"] != "complete":
        return str(trial["state"])
    if trial["number"] in best:
        return "best"
    return "complete" if trial["is_feasible"] else "infeasible"


def of_kind(summary: Mapping[str, Any], kind: str) -> list[Json]:
    """Return the trials of one kind, in order."""
    return [trial for trial in summary["trials"] if kind_of(trial, summary["best"]) == kind]


def best_trials(summary: Mapping[str, Any]) -> list[Json]:
    """Return the trials to look at: the Pareto front, or with a single objective the ten best, the best first."""
    objectives = summary["objectives"]
    shown = of_kind(summary, "best")
    if len(objectives) == 1:
        shown += of_kind(summary, "complete")
    sign = 1 if objectives[0]["direction"] == "minimize" else -1
    known = [(value, trial) for trial in shown if (value := objective_of(trial, 0)) is not None]
    known.sort(key=lambda pair: (sign * pair[0], pair[1]["number"]))
    ordered = [trial for _, trial in known]
    return ordered[:_NUM_BEST] if len(objectives) == 1 else ordered


def headline(summary: Mapping[str, Any]) -> str:
    """Return what the sweep found, in one sentence."""
    num_complete = summary["num_trials"]["complete"]
    objectives, best = summary["objectives"], best_trials(summary)
    if not num_complete:
        return f"No trial is complete: {tally(summary)}"
    if not best:
        return f"None of {_counted(num_complete)} meets the constraints"
    if len(objectives) > 1:
        names = " and ".join(metric_name(item["metric"]) for item in objectives)
        verb = "is" if len(best) == 1 else "are"
        return (
            f"{len(best)} of {_counted(num_complete)} {verb} on the Pareto front of {names}"
            f"{_confirmed(summary, None)}"
        )
    metric = objectives[0]["metric"]
    value = show_metric(metric, objective_of(best[0], 0))
    number = best[0]["number"]
    return (
        f"Trial {number} is the best of {_counted(num_complete)}: {metric_name(metric)} {value}"
        f"{_confirmed(summary, number)}"
    )


def _counted(number: int) -> str:
    return f"{number} complete trial{'' if number == 1 else 's'}"


def _confirmed(summary: Mapping[str, Any], number: int | None) -> str:
    """Return what the confirmation says of trial `number`, or with None of how many on the front beat the base."""
    confirmed = summary.get("confirmed")
    if not confirmed:
        return ""
    seeds, split = len(confirmed["seeds"]), confirmed["split"]
    how = f"{seeds} seed{'' if seeds == 1 else 's'}, {split} split"
    gains = {
        config["trial"]: config
        for config in confirmed["configs"]
        if config["trial"] is not None and finite(config["gain"]) is not None
    }
    if number is None:
        better = sum(config["gain"] > 0 for config in gains.values())
        verb = "beats" if better == 1 else "beat"
        text = f"; {better} of {len(gains)} that were confirmed {verb} base in AUC ({how})"
        return text if gains else ""
    if number not in gains:
        return ""
    p = finite(gains[number]["p"])
    chance = "" if p is None else f", p {words.format_small(p)}"
    gain = words.format_share(gains[number]["gain"], 2, signed=True)
    return f"; {gain} AUC over base ({how}{chance})"


def tally(summary: Mapping[str, Any]) -> str:
    """Return the counts of trials: "10 complete, 4 pruned, 1 failed"."""
    counts = summary["num_trials"]
    return ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "failed"))


def metric_name(metric: str) -> str:
    """Return the shown name of a metric."""
    return _METRICS.get(metric, metric)


def metric_definition(metric: str, summary: Mapping[str, Any]) -> str:
    """Return what a metric is, whether it is an objective, and its constraint."""
    parts = [words.DEFINITIONS.get(metric_name(metric), f"{metric}, as the run reports it.")]
    objectives = (item for item in summary["objectives"] if item["metric"] == metric)
    parts += [f"Objective: {goal(item)}." for item in objectives]
    bounds = (item for item in summary.get("constraints", []) if item["metric"] == metric)
    parts += [f"Constraint: {limit(item)}." for item in bounds]
    return " ".join(parts)


def goal(objective: Mapping[str, Any]) -> str:
    """Return "lower is better" or "higher is better"."""
    return f"{'lower' if objective['direction'] == 'minimize' else 'higher'} is better"


def limit(constraint: Mapping[str, Any]) -> str:
    """Return the bounds of a constraint: "serving_p99_ms at most 2.00 ms"."""
    metric = constraint["metric"]
    bounds = [
        f"{name.replace('_', ' ')} {show_metric(metric, constraint[name])}"
        for name in ("at_least", "at_most")
        if constraint.get(name) is not None
    ]
    return f"{metric_name(metric)} {' and '.join(bounds)}"


# Any: a JSON value
def show_metric(metric: str, value: Any) -> str:
    """Return a number with the unit that closes the name of its metric."""
    number = finite(value)
    if number is None:
        return words.MISSING
    if metric.startswith("num_") or "_num_" in metric or metric.endswith("_per_s"):
        return words.format_count(number)
    if metric.endswith("_ms"):
        return f"{words.format_number(number, 2)} ms"
    if metric.endswith("_s"):
        return words.format_seconds(number)
    if metric.endswith("_bytes"):
        return words.format_bytes(number)
    if metric.endswith(("_ratio", "_share")):
        return words.format_share(number)
    is_plain = number == 0 or 1e-3 <= abs(number) < 1e4
    return words.format_number(number) if is_plain else words.format_small(number)


# Any: a JSON value
def show_value(value: Any) -> str:
    """Return the value of a parameter: four digits of a number, texts as they are, else JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def cut(text: str) -> str:
    """Return a text, shortened where it would not fit."""
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the last parts of each dotted path: two, or as many as tell it from the others."""
    short = {}
    for path in paths:
        parts = path.split(".")
        for count in range(min(2, len(parts)), len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other == name or other.endswith(f".{name}") for other in paths) == 1:
                break
        short[path] = name
    return short


def parameter_definition(path: str, space: Mapping[str, Any]) -> str:
    """Return where a parameter stands and what it may be: "vm.learning.optim.lr, from 0.0001 to 0.01, log scale"."""
    if space["kind"] == "choice":
        return f"{path}, one of {', '.join(show_value(value) for value in space['values'])}"
    log = ", log scale" if space.get("log") else ""
    return f"{path}, from {show_value(space['low'])} to {show_value(space['high'])}{log}"


def hover(trial: Json, names: Mapping[str, str]) -> str:
    """Return the number and the parameters of a trial, escaped, as plotly shows them beside the mouse."""
    lines = [f"trial {trial['number']}"]
    lines += [
        f"{names[path]} = {cut(show_value(value))}" for path, value in trial["params"].items()
    ]
    return "<br>".join(html.escape(line) for line in lines)
