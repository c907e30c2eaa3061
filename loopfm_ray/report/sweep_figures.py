"""The figures of the page of a sweep, as plotly JSON. Colours are names of CSS variables; every text is escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from loopfm_ray.report import words
from loopfm_ray.report.parts import figure
from loopfm_ray.report.trials import (
    KINDS,
    cut,
    finite,
    goal,
    hover,
    kind_of,
    metric_name,
    objective_of,
    of_kind,
    parameter_definition,
    short_names,
    show_value,
)

__all__ = [
    "curve_figures",
    "fit_text",
    "front_figures",
    "history_figures",
    "scaling_figures",
    "slice_figures",
]

Json = dict[str, Any]  # Any: JSON of the summary, and of plotly
Point = tuple[Json, Any, float]
"""A trial, its x (Any: a number or the name of a category) and its y."""

_ORDER = ("pruned", "failed", "infeasible", "complete", "best")
_SYMBOLS = {
    "best": "circle",
    "complete": "circle",
    "infeasible": "x",
    "pruned": "circle",
    "failed": "x",
}
_SIZES = {"best": 11, "pruned": 6}
_CUT = " {count} point{s} lie{v} outside of the frame; double-click to see {them}."


def history_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return the value of each trial by number, one figure for each objective."""
    figures = []
    for place, objective in enumerate(summary["objectives"]):
        points: list[Point] = [
            (trial, trial["number"], value)
            for trial in summary["trials"]
            if (value := _last_value(trial, place)) is not None
        ]
        if not points:
            continue
        data = [_best_so_far(points, summary, objective), *_markers(points, summary)]
        axis, note = _frame([value for _, _, value in points], objective)
        layout = {
            "xaxis": {"title": {"text": "trial"}, "tickformat": "d"},
            "yaxis": {"title": {"text": _named(objective)}, **axis},
        }
        caption = f"The line is the best so far that meets every constraint; {goal(objective)}."
        if place == 0 and of_kind(summary, "pruned"):
            caption += " A pruned trial stands at its value when it was stopped."
        title = f"{metric_name(objective['metric'])} by trial"
        figures.append(figure(f"history-{place}", title, caption + note, data, layout))
    return figures


def front_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return the trials over the first two objectives, with their Pareto front; none with a single objective."""
    objectives = summary["objectives"]
    if len(objectives) < 2:
        return []
    points: list[Point] = [
        (trial, first, second)
        for trial in summary["trials"]
        if trial["state"] == "complete"
        and (first := objective_of(trial, 0)) is not None
        and (second := objective_of(trial, 1)) is not None
    ]
    if not points:
        return []
    x_axis, x_note = _frame([x for _, x, _ in points], objectives[0])
    y_axis, y_note = _frame([y for _, _, y in points], objectives[1])
    layout = {
        "xaxis": {"title": {"text": _named(objectives[0])}, **x_axis},
        "yaxis": {"title": {"text": _named(objectives[1])}, **y_axis},
    }
    data = _markers(points, summary)
    front = sorted((x, y) for trial, x, y in points if trial["number"] in summary["best"])
    names = " and ".join(f"{metric_name(item['metric'])} ({goal(item)})" for item in objectives)
    caption = f"Complete trials. No trial that meets the constraints is better than one on the front in all of {names}."
    if len(objectives) == 2:
        data.insert(0, _line([x for x, _ in front], [y for _, y in front]))
    else:
        caption += " The front is that of all objectives, seen from two of them."
    if x_note or y_note:
        caption += " Trials far worse than most lie outside of the frame; double-click to see them."
    return [figure("front", "Pareto front", caption, data, layout)]


def slice_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return each parameter against the first objective; none for a parameter that had one value only."""
    objective, figures = summary["objectives"][0], []
    names = short_names(list(summary["parameters"]))
    for number, (path, space) in enumerate(summary["parameters"].items()):
        points: list[Point] = [
            (trial, x, value)
            for trial in summary["trials"]
            if path in trial["params"]
            and (x := _place(trial["params"][path], space)) is not None
            and (value := _last_value(trial, 0)) is not None
        ]
        if len({x for _, x, _ in points}) < 2:
            continue
        axis, note = _frame([value for _, _, value in points], objective)
        found = [x for _, x, _ in points]
        if space["kind"] == "choice":
            x_axis = _categories(space["values"], found)
        else:
            x_axis = _log_axis(found, "~g") if space.get("log") else {}
        layout = {
            "xaxis": x_axis,
            "yaxis": {"title": {"text": _named(objective)}, **axis},
        }
        caption = parameter_definition(path, space) + "."
        data = _markers(points, summary)
        figures.append(figure(f"slice-{number}", names[path], caption + note, data, layout))
    return figures


def curve_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return the learning curves; none when no trial was measured at two rungs."""
    objective = summary["objectives"][0]
    curves = {
        trial["number"]: [(rung, value) for rung, value in trial["curve"] if finite(value) is not None]
        for trial in summary["trials"]
    }  # fmt: skip
    if max((len(curve) for curve in curves.values()), default=0) < 2:
        return []
    data = []
    for kind in ("complete", "infeasible", "failed", "pruned", "best"):
        mine = [trial for trial in of_kind(summary, kind) if curves[trial["number"]]]
        if mine:
            data.append(_curves(kind, mine, curves))
    axis, note = _frame([value for curve in curves.values() for _, value in curve], objective)
    layout = {
        "xaxis": {"title": {"text": "rung"}, "tickformat": "d"},
        "yaxis": {"title": {"text": _named(objective)}, **axis},
    }
    caption = f"One line for each trial, faint where it was stopped; {goal(objective)}."
    return [figure("curves", "Value by rung", caption + note, data, layout)]


def scaling_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return one figure for each size and metric: the points, the fit and the interval of its value."""
    figures = []
    for number, entry in enumerate(summary.get("scaling") or []):
        x_name, y_name = metric_name(entry["x"]), metric_name(entry["y"])
        data = _fit_traces(entry["fit"]) if entry["fit"] else []
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x for x, _ in entry["points"]],
                "y": [y for _, y in entry["points"]],
                "marker": {"color": KINDS["complete"], "size": 8},
                "hovertemplate": "%{x:,.4~g}: %{y:.4f}<extra></extra>",
            }
        )
        values = [y for _, y in entry["points"]]
        values += [row[1] for row in entry["fit"]["curve"]] if entry["fit"] else []
        x_axis = _log_axis([x for x, _ in entry["points"]], "~s")
        layout: Json = {
            "xaxis": {**x_axis, "title": {"text": html.escape(x_name)}},
            "yaxis": {"title": {"text": html.escape(y_name)}},
        }
        if values:
            pad = 0.15 * (max(values) - min(values)) or 0.01
            layout["yaxis"]["range"] = [min(values) - pad, max(values) + pad]
        caption = fit_text(entry)
        figures.append(figure(f"scaling-{number}", f"{y_name} by {x_name}", caption, data, layout))
    return figures


def fit_text(entry: Mapping[str, Any]) -> str:
    """Return what a fit found, or why there is none."""
    fit = entry["fit"]
    if not fit:
        return f"No fit: {entry['reason']}."
    low, high = (words.format_number(end, 3) for end in fit["exponent_interval"])
    scale = fit["scale"]
    sign = "−" if scale < 0 else "+" if fit["offset"] else ""
    offset = f"{words.format_number(fit['offset'])} " if fit["offset"] else ""
    exponent = words.format_number(-fit["exponent"], 3)
    text = f"{offset}{sign}{' ' if offset else ''}{_digits(abs(scale))} × x^({exponent})"
    text += f"; exponent {words.format_number(fit['exponent'], 3)}, {100 * fit['level']:g} % interval {low} to {high}"
    text += f"; R² {words.format_number(fit['r2'], 3)}; {fit['num_points']} points at {fit['num_sizes']} sizes."
    errors = [
        f"{form} {_digits(fit[f'{form}_error'])}"
        for form in ("pure", "saturating")
        if fit[f"{form}_error"] is not None
    ]
    text += f" The {fit['form']} law. Error on sizes left out: {', '.join(errors)}."
    if fit["is_at_limit"]:
        text += " The exponent stands at the limit of the search: these sizes do not tell it."
    return text


def _digits(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else words.format_small(value)


def _fit_traces(fit: Json) -> list[Json]:
    x, y, low, high = (list(column) for column in zip(*fit["curve"], strict=True))
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": x + x[::-1],
        "y": high + low[::-1],
        "fill": "toself",
        "line": {"color": "--accent", "width": 0},
        "opacity": 0.3,
        "hoverinfo": "skip",
    }
    return [band, {**_line(x, y), "hovertemplate": "fit at %{x:,.4~g}: %{y:.4f}<extra></extra>"}]


def _line(x: Sequence[float], y: Sequence[float]) -> Json:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "line": {"color": KINDS["best"], "width": 2},
        "hoverinfo": "skip",
    }


def _markers(points: Sequence[Point], summary: Mapping[str, Any]) -> list[Json]:
    """Return one trace for each kind of trial, the best on top."""
    names = short_names(list(summary["parameters"]))
    traces = []
    for kind in _ORDER:
        mine = [point for point in points if kind_of(point[0], summary["best"]) == kind]
        if mine:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": kind,
                    "x": [x for _, x, _ in mine],
                    "y": [y for _, _, y in mine],
                    "text": [hover(trial, names) for trial, _, _ in mine],
                    "marker": {
                        "color": KINDS[kind],
                        "size": _SIZES.get(kind, 8),
                        "symbol": _SYMBOLS[kind],
                    },
                    "hovertemplate": f"%{{text}}<br>{kind}: %{{y:.5~g}}<extra></extra>",
                }
            )
    return traces


def _best_so_far(points: Sequence[Point], summary: Mapping[str, Any], objective: Json) -> Json:
    choose = min if objective["direction"] == "minimize" else max
    x: list[int] = []
    y: list[float] = []
    for trial, number, value in sorted(points, key=lambda point: point[1]):
        if kind_of(trial, summary["best"]) in ("best", "complete"):
            x.append(number)
            y.append(choose([value, *y[-1:]]))
    last = max(trial["number"] for trial in summary["trials"])
    if x and x[-1] < last:
        x, y = [*x, last], [*y, y[-1]]
    trace = _line(x, y)
    trace["line"]["shape"] = "hv"
    return trace


def _curves(
    kind: str, trials: Sequence[Json], curves: Mapping[int, list[tuple[int, float]]]
) -> Json:
    """Return the curves of one kind as a single trace with gaps between the trials."""
    x: list[int | None] = []
    y: list[float | None] = []
    text = []
    for trial in trials:
        curve = curves[trial["number"]]
        x += [*(rung for rung, _ in curve), None]
        y += [*(value for _, value in curve), None]
        text += [f"trial {trial['number']}"] * (len(curve) + 1)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": kind,
        "x": x,
        "y": y,
        "text": text,
        "opacity": 0.7 if kind in ("pruned", "failed") else 1.0,
        "line": {"color": KINDS[kind], "width": 2.5 if kind == "best" else 1.3},
        "marker": {"color": KINDS[kind], "size": 5},
        "hovertemplate": f"%{{text}}, {kind}<br>rung %{{x}}: %{{y:.5~g}}<extra></extra>",
    }


def _last_value(trial: Json, place: int) -> float | None:
    """Return the value of an objective; of a trial that was stopped, the last one of its curve."""
    value = objective_of(trial, place)
    if value is None and place == 0 and trial["state"] == "pruned" and trial["curve"]:
        return finite(trial["curve"][-1][1])
    return value


# Any: a JSON value, and what plotly takes as x
def _place(value: Any, space: Json) -> Any:
    """Return where a value stands on the axis of its parameter."""
    return html.escape(show_value(value)) if space["kind"] == "choice" else finite(value)


# Any: JSON values
def _categories(values: Sequence[Any], found: Sequence[str]) -> Json:
    known = [html.escape(show_value(value)) for value in values]
    order = list(dict.fromkeys([*known, *sorted(found)]))
    shown = [html.escape(cut(html.unescape(name))) for name in order]
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": order,
        "tickvals": order,
        "ticktext": shown,
        "range": [-0.5, len(order) - 0.5],
    }


def _log_axis(values: Sequence[float], number_format: str) -> Json:
    """Return an axis with a tick for each power of ten, or for 1, 2 and 5 where there are few powers."""
    is_wide = bool(values) and max(values) >= 100 * min(values)
    return {"type": "log", "dtick": 1 if is_wide else "D2", "tickformat": number_format}


def _named(objective: Json) -> str:
    return html.escape(metric_name(objective["metric"]))


def _frame(values: Sequence[float], objective: Json) -> tuple[Json, str]:
    """Return the range of an axis that leaves out trials far worse than most, and the words that say so."""
    sign = 1 if objective["direction"] == "minimize" else -1
    ordered = sorted(sign * value for value in values)
    best, worse = ordered[0], ordered[int(0.75 * (len(ordered) - 1))]
    end = worse + 2.0 * (worse - best)
    count = sum(value > end for value in ordered)
    if not count or worse <= best:
        return {}, ""
    shown = ordered[-count - 1]
    pad = 0.07 * (shown - best)
    limits = sorted([sign * (best - pad), sign * (shown + pad)])
    s, v, them = ("", "s", "it") if count == 1 else ("s", "", "them")
    return {"range": limits}, _CUT.format(count=count, s=s, v=v, them=them)
