"""The charts of the page as plotly JSON.

Colours are names of CSS variables such as `--model-fm`, so that one figure serves the light and the dark page; the
page's script puts in their values. Every text from the summary is escaped, because plotly reads a part of HTML.
"""

import html
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from loopfm_ray.report.summary import CurvePoint, Summary
from loopfm_ray.report.words import colour_key, format_share, model_order, pretty_name

__all__ = ["Figure", "build_figures"]

# Any: a plotly figure is a tree of JSON values.
Json = dict[str, Any]

_MAX_POINTS = 400
_SPLITS = {"train": "Training rows", "valid": "Validation rows"}
_METRICS = {"ne": "NE", "logloss": "logloss"}


@dataclass(frozen=True)
class Figure:
    """One chart: its id on the page, title, what to see in it, and its plotly data and layout."""

    id: str
    title: str
    caption: str
    spec: Json


def build_figures(summary: Summary) -> list[Figure]:
    """Return the charts that the summary has numbers for."""
    figures = [_ratio_figure(summary), _calibration_figure(summary)]
    figures += [_curve_figure(summary, split) for split in _SPLITS]
    return [figure for figure in figures if figure is not None]


def _ratio_figure(summary: Summary) -> Figure | None:
    ratios = {
        key: ratio
        for key in model_order(list(summary.transfer_ratio))
        if key != "fm"
        and (ratio := summary.transfer_ratio[key]) is not None
        and math.isfinite(ratio)
    }
    if not ratios:
        return None
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [_label(key) for key in ratios],
        "x": list(ratios.values()),
        "marker": {"color": [_colour(key) for key in ratios]},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }
    seeds = _seed_ratios(summary, ratios)
    dots = [ratio for _, _, ratio in seeds]
    low, high = min(0.0, *ratios.values(), *dots), max(1.0, *ratios.values(), *dots)
    pad = 0.14 * (high - low)
    layout = {
        "xaxis": {
            "tickformat": ".0%",
            "range": [low - pad if low < 0 else 0, high + pad],
        },
        "yaxis": {"autorange": "reversed", "showgrid": False, "ticks": ""},
        "shapes": [_line(1, 0, 1, 1, yref="paper")],
        "annotations": [_note(1, "FM")]
        + [
            _value(key, max([ratio, *(dot for _, name, dot in seeds if name == key)]), ratio)
            for key, ratio in ratios.items()
        ],
        "margin": {"t": 26},
        "bargap": 0.35,
    }
    data = [bars, _seed_dots(seeds)] if seeds else [bars]
    kind = summary.transfer_ratio_kind or "baseline VM"
    caption = f"Measured as: {kind}. 0 % is the plain VM, 100 % the FM itself, same test rows." + (
        " Dots are single seeds." if len(data) > 1 else ""
    )
    return Figure("ratio", "Transfer ratio", caption, {"data": data, "layout": layout})


def _seed_ratios(summary: Summary, keys: Container[str]) -> list[tuple[str, str, float]]:
    """Return seed, model and transfer ratio of every seed; none when there is a single seed."""
    if len(summary.per_seed) < 2:
        return []
    return [
        (seed, key, ratio)
        for seed, record in summary.per_seed.items()
        for key, ratio in record.transfer_ratio.items()
        if key in keys and ratio is not None and math.isfinite(ratio)
    ]


def _seed_dots(seeds: list[tuple[str, str, float]]) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "y": [_label(key) for _, key, _ in seeds],
        "x": [ratio for _, _, ratio in seeds],
        "text": [html.escape(f"seed {seed}") for seed, _, _ in seeds],
        "marker": {"color": "--ink", "size": 6, "opacity": 0.65},
        "hovertemplate": "%{y}, %{text}: %{x:.3f}<extra></extra>",
    }


def _calibration_figure(summary: Summary) -> Figure | None:
    finite = {
        key: [row for row in rows if math.isfinite(row.mean_prediction + row.mean_label)]
        for key, rows in summary.calibration_bins.items()
    }
    bins = {key: rows for key, rows in finite.items() if rows}
    if not bins:
        return None
    largest = max(row.count for rows in bins.values() for row in rows) or 1.0
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": _label(key),
            "x": [row.mean_prediction for row in bins[key]],
            "y": [row.mean_label for row in bins[key]],
            "customdata": [row.count for row in bins[key]],
            "line": {"color": _colour(key), "width": 1.5},
            "marker": {
                "color": _colour(key),
                "size": [4 + 7 * math.sqrt(row.count / largest) for row in bins[key]],
                "opacity": 0.85,
                "line": {"width": 0},
            },
            "hovertemplate": "predicted %{x:.3f}, seen %{y:.3f}, %{customdata:,.0f} rows",
        }
        for key in model_order(list(bins))
    ]
    top = max(max(row.mean_prediction, row.mean_label) for rows in bins.values() for row in rows)
    layout = {
        "xaxis": {"title": {"text": "mean prediction"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "mean label"}, "rangemode": "tozero"},
        "shapes": [_line(0, 0, top, top)],
    }
    caption = "On the dashed line, what was predicted is what happened. Larger dots hold more rows."
    return Figure("calibration", "Calibration", caption, {"data": traces, "layout": layout})


def _curve_figure(summary: Summary, split: str) -> Figure | None:
    points = [
        point
        for point in summary.curves
        if point.split == split and point.value is not None and math.isfinite(point.value)
    ]
    metric = next((name for name in _METRICS if any(p.name == name for p in points)), None)
    if metric is None:
        return None
    runs: dict[tuple[str, int], list[CurvePoint]] = {}
    for point in points:
        if point.name == metric:
            runs.setdefault((point.run, point.seed), []).append(point)
    order = model_order(list(dict.fromkeys(run for run, _ in runs)))
    is_single = len(runs) == len(order)
    traces = [
        _curve(runs[key], width=2.0 if is_single else 1.2)
        for run in order
        for key in sorted(key for key in runs if key[0] == run)
    ]
    shown = [value for trace in traces for value in trace["y"]]
    layout: Json = {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": _METRICS[metric]}},
    }
    caption = "Lower is better." + ("" if is_single else " One line per seed.")
    limits = _frame(shown)
    if limits is not None:
        layout["yaxis"]["range"] = limits
        caption += " The first steps reach above the frame; double-click to see them."
    title = f"{_SPLITS[split]}: {_METRICS[metric]} while training"
    return Figure(f"curve-{split}", title, caption, {"data": traces, "layout": layout})


def _curve(points: Sequence[CurvePoint], *, width: float) -> Json:
    run, seed = points[0].run, points[0].seed
    ordered = sorted(points, key=lambda point: point.step)
    stride = -(-len(ordered) // _MAX_POINTS)
    kept = ordered[::-1][::stride][::-1]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(kept) <= 12 else "lines",
        "name": f"{_label(run)}, seed {seed}",
        "x": [point.step for point in kept],
        "y": [point.value for point in kept],
        "line": {"color": _colour(run), "width": width},
        "marker": {"color": _colour(run), "size": 4},
        "hovertemplate": "step %{x}: %{y:.4f}",
    }


def _frame(values: Sequence[float]) -> list[float] | None:
    """Return y limits that cut a few very high first values, or None when nothing stands out."""
    ordered = sorted(values)
    low, high, top = ordered[0], ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]
    if top - low <= 1.6 * (high - low) or high <= low:
        return None
    return [low - 0.06 * (high - low), high + 0.12 * (high - low)]


def _label(key: str) -> str:
    return html.escape(pretty_name(key))


def _colour(key: str) -> str:
    return f"--model-{colour_key(key)}"


def _line(x0: float, y0: float, x1: float, y1: float, *, yref: str = "y") -> Json:
    line = {"color": "--muted", "width": 1.2, "dash": "dash"}
    ends = {"x0": x0, "x1": x1, "y0": y0, "y1": y1, "yref": yref}
    return {"type": "line", **ends, "line": line, "layer": "below"}


def _note(x: float, text: str) -> Json:
    font = {"color": "--muted", "size": 12}
    place = {"x": x, "y": 1, "yref": "paper", "xanchor": "center", "yanchor": "bottom"}
    return {**place, "text": text, "showarrow": False, "font": font}


def _value(key: str, end: float, ratio: float) -> Json:
    """Return the number that stands right of a bar which, with its dots, ends at `end`."""
    place = {"x": max(end, 0.0), "y": _label(key), "xanchor": "left", "xshift": 8}
    text, font = format_share(ratio), {"color": "--ink", "size": 13}
    return {**place, "text": text, "showarrow": False, "font": font}
