"""What the page of an experiment on a stream has more: gains of progressive NE, calibration by vertical, NE by variant."""

import html
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loopfm_ray.report import words
from loopfm_ray.report.parts import figure, markdown_row, variant_line

__all__ = ["stream_figures", "stream_tables"]

Json = dict[str, Any]  # Any: JSON of the summary
Shown = Callable[[str], str]
"""From the name of an arm to what is shown."""


def stream_figures(
    summary: Mapping[str, Any], colours: Mapping[str, str], shown: Shown
) -> list[Json]:
    """Return the figures of a summary with `ne_gain_by_method`; none for one that was not measured on a stream."""
    if "ne_gain_by_method" not in summary:
        return []
    return [
        _gains(summary, colours, shown),
        _calibration(summary, colours, shown),
        *_ne_by_variant(summary, colours, shown),
        *_gains_by_variant(summary, colours, shown),
    ]


def stream_tables(summary: Mapping[str, Any], shown: Shown) -> list[str]:
    """Return the lines of the same in Markdown."""
    if "ne_gain_by_method" not in summary:
        return []
    calibration = summary["calibration_by_method"]
    verticals = list(next(iter(calibration.values())))
    head = ("method", "NE gain over none", *(f"calibration of {name}" for name in verticals))
    rows = [head, ("---", *("---:" for _ in head[1:]))]
    for arm, of_vertical in calibration.items():
        gain = summary["ne_gain_by_method"].get(arm)
        text = "" if gain is None else words.format_share(gain, 2, signed=True)
        values = (words.format_number(of_vertical[name], 3) for name in verticals)
        rows.append(("FM" if arm == "fm" else shown(arm), text, *values))
    return [*map(markdown_row, rows), "", *_variant_table(summary, shown)]


def _variant_table(summary: Mapping[str, Any], shown: Shown) -> list[str]:
    """Return a line for each variant: what each arm gains, and the best arm over each; nothing with a single variant."""
    by_variant = _by_variant(summary)
    if not by_variant:
        return []
    base, best = summary["roles"]["baseline"], summary["roles"]["best"]
    arms = [arm for arm in next(iter(by_variant.values())) if arm != base]
    rivals = [arm for arm in arms if arm != best]
    head = (
        "variant",
        *(f"NE gain of {shown(arm)}" for arm in arms),
        *(f"{shown(best)} over {shown(arm)} (p)" for arm in rivals),
    )
    rows = [head, ("---", *("---:" for _ in head[1:]))]
    for variant, of_arm in by_variant.items():
        gains = (words.format_share(of_arm[arm]["gain"], 2, signed=True) for arm in arms)
        over = (
            f"{words.format_share(of_arm[arm]['best_over'], 2, signed=True)}"
            f" ({words.format_small(of_arm[arm]['p_best_over'])})"
            for arm in rivals
        )
        rows.append((variant, *gains, *over))
    return [*map(markdown_row, rows), ""]


def _by_variant(summary: Mapping[str, Any]) -> dict[str, dict[str, Json]]:
    """Return `ne_by_variant`, or nothing where there is a single variant, or a summary from before it was kept."""
    found: dict[str, dict[str, Json]] = summary.get("ne_by_variant", {})
    return found if len(found) > 1 else {}


def _gains(summary: Mapping[str, Any], colours: Mapping[str, str], shown: Shown) -> Json:
    base = summary["roles"]["baseline"]
    gains = {arm: value for arm, value in summary["ne_gain_by_method"].items() if arm != base}
    percent = [100 * value for value in gains.values()]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [html.escape(shown(arm)) for arm in gains],
            "x": percent,
            "text": [words.format_share(value, 2, signed=True) for value in gains.values()],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {"color": [colours[arm] for arm in gains]},
            "hovertemplate": "%{y}: %{x:.2f} %",
        }
    ]
    low, high = min(0.0, *percent), max(0.0, *percent)
    pad = 0.14 * (high - low)
    layout = {
        "showlegend": False,
        "xaxis": {"range": [low - pad if low < 0 else 0, high + pad]},
        "yaxis": {"autorange": "reversed", "showgrid": False},
    }
    caption = f"Mean over verticals and seeds of the progressive NE's gain over {html.escape(shown(base))}, in percent."
    return figure("ne-gain", "NE gain by method", caption, data, layout)


def _calibration(summary: Mapping[str, Any], colours: Mapping[str, str], shown: Shown) -> Json:
    data = []
    for arm, of_vertical in summary["calibration_by_method"].items():
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "FM" if arm == "fm" else html.escape(shown(arm)),
                "x": [html.escape(name) for name in of_vertical],
                "y": list(of_vertical.values()),
                "marker": {
                    "color": "--model-fm" if arm == "fm" else colours[arm],
                    "size": 10,
                    "symbol": "diamond" if arm == "fm" else "circle",
                },
                "hovertemplate": "%{x}: %{y:.4f}",
            }
        )
    layout = {"xaxis": {"type": "category"}}
    caption = "Mean prediction over mean label of each vertical, progressive, mean over seeds; 1 is right. Nothing is calibrated afterwards."
    return figure("calibration", "Calibration by vertical and method", caption, data, layout)


def _ne_by_variant(
    summary: Mapping[str, Any], colours: Mapping[str, str], shown: Shown
) -> list[Json]:
    """Return the mean NE over verticals of every arm over the variants; none with a single variant."""
    cells: Sequence[Json] = summary["cells"]
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    if len(variants) < 2:
        return []
    data = []
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        points = {
            variant: statistics.fmean(
                cell["mean"]["ne"]
                for cell in cells
                if cell["arm"] == arm and cell["variant"] == variant
            )
            for variant in variants
        }
        data.append(variant_line(shown(arm), points, colours[arm]))
    caption = "Mean progressive NE over verticals and seeds; lower is better."
    return [figure("ne-variants", "NE by variant", caption, data, {"xaxis": {"type": "category"}})]


def _gains_by_variant(
    summary: Mapping[str, Any], colours: Mapping[str, str], shown: Shown
) -> list[Json]:
    """Return what every arm gains over the baseline in each variant; none with a single variant."""
    by_variant, base = _by_variant(summary), summary["roles"]["baseline"]
    if not by_variant:
        return []
    data = []
    for arm in (arm for arm in next(iter(by_variant.values())) if arm != base):
        of_arm = {variant: found[arm] for variant, found in by_variant.items()}
        points = {variant: 100 * found["gain"] for variant, found in of_arm.items()}
        spreads = [100 * (found["sd"] or 0.0) for found in of_arm.values()]
        line = variant_line(
            shown(arm), points, colours[arm], spreads=spreads, hover="%{x}: %{y:.2f} %"
        )
        data.append(line)
    caption = (
        f"Gain of the progressive NE over {html.escape(shown(base))} in percent: mean over verticals and seeds, ± one standard"
        " deviation over the seeds."
    )
    layout = {"xaxis": {"type": "category"}}
    return [figure("gain-variants", "NE gain by variant", caption, data, layout)]
