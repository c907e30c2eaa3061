"""The page and the Markdown tables of an experiment, from its `summary.json`.

Like the page of a run, this one loads nothing from the network, and the same summary gives the same bytes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfm_ray.errors import DataError
from loopfm_ray.report import words
from loopfm_ray.report.page import plotly_base64, render_template, yaml_text
from loopfm_ray.report.parts import bars, css_colour, figure, markdown_row, variant_line
from loopfm_ray.report.stream import stream_figures, stream_tables
from loopfm_ray.store.tables import write_text

__all__ = ["build_grid_report", "render_grid", "render_markdown"]

# Any: JSON of the summary.
Json = dict[str, Any]
_NEEDED = ("name", "roles", "seeds", "cells", "fm", "headline_variant", "code_versions", "config")
_ARM_COLOURS = {
    "none": "vm",
    "kd": "vm-kd",
    "loopfm": "vm-loopfm",
    "kd_loopfm": "vm-kd-loopfm",
    "raw": "vm-raw",
}
_OTHER_COLOURS = (
    "#65a30d",
    "#db2777",
    "#0d9488",
    "#9333ea",
    "#ca8a04",
    "#dc2626",
    "#2563eb",
    "#78716c",
)
_COLUMNS = ("NE", "AUC", "AUC gain", "over KD", "p", "Transfer ratio")
_SLICES = ("first", "short", "long")


@dataclass(frozen=True)
class Line:
    """One cell of an experiment as texts, in the order of the columns."""

    model: str
    arm: str
    colour: str
    texts: tuple[str, ...]
    spreads: tuple[str, ...]


def build_grid_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and `results.md` for `summary` into `folder`; return the page's path.

    Raises:
        DataError: the summary lacks a key.
    """
    page, text = render_grid(summary), render_markdown(summary)
    write_text(folder / "results.md", text)
    target = folder / "report.html"
    write_text(target, page)
    return target


def render_grid(summary: Mapping[str, Any]) -> str:
    """Return the page of an experiment as HTML.

    Raises:
        DataError: the summary lacks a key.
    """
    _check(summary)
    figures = [
        *stream_figures(summary, _colours(summary), pretty_arm),
        _auc_figure(summary),
        *_variant_figures(summary),
    ]
    return render_template(
        "grid.html.j2",
        summary=summary,
        words=words,
        headline=headline(summary),
        tiles=_tiles(summary),
        columns=(*_COLUMNS, *_slices(summary)),
        variants={name: _lines(summary, name) for name in _variants(summary)},
        fm=_fm_lines(summary),
        probes=_probe_lines(summary),
        figures=figures,
        figure_specs={figure["id"]: figure["spec"] for figure in figures},
        plotly=plotly_base64(),
        config=yaml_text(summary["config"]),
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Return the tables of an experiment as Markdown.

    Raises:
        DataError: the summary lacks a key.
    """
    _check(summary)
    parts = [f"**{headline(summary)}**", "", *stream_tables(summary, pretty_arm)]
    for name in _variants(summary):
        columns = (*_COLUMNS, *_slices(summary))
        head = ("model", "arm", *columns)
        parts += [f"Variant `{name}`, mean of {len(summary['seeds'])} seeds (± sd):", ""]
        parts += [markdown_row(head), markdown_row(["---"] * 2 + ["---:"] * len(columns))]
        for line in _lines(summary, name):
            cells = [
                f"{text} ± {spread}" if spread else text
                for text, spread in zip(line.texts, line.spreads, strict=True)
            ]
            parts.append(markdown_row((line.model, line.arm, *cells)))
        parts.append("")
    parts += [
        markdown_row(("variant", "FM: test NE", "AUC", "parameters")),
        markdown_row(["---"] + ["---:"] * 3),
    ]
    parts += [markdown_row(line) for line in _fm_lines(summary)]
    probes = _probe_lines(summary)
    if probes:
        parts += [
            "",
            markdown_row(("variant", "logloss of a probe, in nats")),
            markdown_row(["---", "---"]),
        ]
        parts += [markdown_row(line) for line in probes]
    return "\n".join(parts) + "\n"


def headline(summary: Mapping[str, Any]) -> str:
    """Return what the experiment found, in one sentence."""
    roles = summary["roles"]
    best, kd = (pretty_arm(roles[name]) for name in ("best", "kd"))
    by_ne = summary.get(f"ne_gain_{roles['best']}_over_kd")
    if by_ne is not None:
        verticals = len({cell["model"] for cell in summary["cells"]})
        largest = words.format_small(summary.get(f"max_p_ne_{roles['best']}_over_kd"))
        over_seeds = words.format_small(summary.get(f"p_ne_gain_{roles['best']}_over_kd"))
        gained = words.format_share(by_ne, 2, signed=True)
        return (
            f"{best} over {kd}: {gained} progressive NE, mean of {verticals} verticals (p {over_seeds} over the seeds),"
            f" largest p of a vertical {largest}"
        )
    gain = summary.get("relative_auc_gain_over_kd")
    if gain is None:
        return f"{best} and {kd} are compared"
    worst = summary.get("max_p_over_kd")
    models = len({cell["model"] for cell in summary["cells"]})
    text = f"{best} over {kd}: {words.format_share(gain, 1, signed=True)} AUC, mean of {models} VM"
    text += "" if models == 1 else "s"
    return text if worst is None else f"{text}, largest p {words.format_small(worst)}"


def pretty_arm(arm: str) -> str:
    """Return the shown name of an arm: `kd_loopfm` gives "VM + KD + LoopFM", `none` "VM"; others stay as they are."""
    if arm == "none":
        return "VM"
    return words.pretty_name(f"vm_{arm}") if words.is_known(arm) else arm


def _check(summary: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED if name not in summary]
    if missing:
        raise DataError(
            f"the summary of an experiment lacks {missing}; run `loopfm experiment` with its config to write it again"
        )


def _variants(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["variant"] for cell in summary["cells"]))


def _slices(summary: Mapping[str, Any]) -> list[str]:
    """Return the parts of the test window that were measured; a stream measures none."""
    return [
        one for one in _SLICES if any(one in cell.get("slices", {}) for cell in summary["cells"])
    ]


def _lines(summary: Mapping[str, Any], variant: str) -> list[Line]:
    colours = _colours(summary)
    return [
        _line(cell, summary, css_colour(colours[cell["arm"]]))
        for cell in summary["cells"]
        if cell["variant"] == variant
    ]


def _line(cell: Json, summary: Mapping[str, Any], colour: str) -> Line:
    mean, sd = cell["mean"], cell["sd"]
    plain, kd = (cell.get(f"vs_{summary['roles'][name]}") for name in ("baseline", "kd"))
    slices = cell.get("slices", {})
    texts = (
        words.format_number(mean["ne"]),
        words.format_number(mean["auc"]),
        "" if plain is None else words.format_number(plain["auc"]["mean"], signed=True),
        "" if kd is None else words.format_share(kd["auc_relative"], 1, signed=True),
        "" if kd is None else words.format_small(kd["auc"]["p"]),
        words.format_share(cell["transfer_ratio"]),
        *(words.format_number(slices[s]["auc"]) if s in slices else "" for s in _slices(summary)),
    )
    spreads = tuple(
        words.format_number(sd[name]) if name in sd else "" for name in ("ne", "auc")
    ) + ("",) * (len(texts) - 2)
    return Line(cell["model"], pretty_arm(cell["arm"]), colour, texts, spreads)


def _fm_lines(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    lines = []
    for name, record in summary["fm"].items():
        tests = list(record["per_seed"].values())
        ne, auc = (sum(test[key] for test in tests) / len(tests) for key in ("ne", "auc"))
        count = words.format_count(record["num_parameters"])
        lines.append((name, words.format_number(ne), words.format_number(auc), count))
    return lines


def _probe_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, channel in summary.get("channel", {}).items():
        probes = channel.get("probe_logloss", {})
        if probes:
            text = ", ".join(f"{step} {words.format_number(v)}" for step, v in probes.items())
            lines.append((name, text))
    return lines


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    gain = summary.get("relative_auc_gain_over_kd")
    ratio, over_kd = summary.get("transfer_ratio"), summary.get("transfer_ratio_over_kd")
    best, kd = (pretty_arm(summary["roles"][name]) for name in ("best", "kd"))
    tiles = [(words.format_share(gain, 1, signed=True), f"AUC of {best} over {kd}, relative")]
    tiles.append((words.format_share(ratio), f"transfer ratio of {best}"))
    if over_kd is not None:
        tiles.append((f"{words.format_number(over_kd, 1)} ×", f"that of {kd}"))
    else:
        of_kd = words.format_share(summary.get("transfer_ratio_kd"), 1, signed=True)
        tiles.append((of_kd, f"transfer ratio of {kd}"))
    tiles.append((words.format_small(summary.get("max_p_over_kd")), "largest p of a VM, paired"))
    by_ne = summary.get(f"ne_gain_{summary['roles']['best']}_over_kd")
    if by_ne is not None:
        shown = words.format_share(by_ne, 2, signed=True)
        tiles.insert(0, (shown, f"progressive NE of {best} over {kd}, relative"))
    return tiles


def _colours(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the colour of each arm: a CSS variable for the usual ones, else one of its own as long as there are any."""
    arms = dict.fromkeys(cell["arm"] for cell in summary["cells"])
    others = itertools.cycle(_OTHER_COLOURS)
    return {
        arm: f"--model-{_ARM_COLOURS[arm]}" if arm in _ARM_COLOURS else next(others) for arm in arms
    }


def _auc_figure(summary: Mapping[str, Any]) -> Json:
    """Return bars of the mean test AUC by model and arm, of the variant at the top."""
    cells = [cell for cell in summary["cells"] if cell["variant"] == summary["headline_variant"]]
    data, (low, high) = bars(cells, "auc", _colours(summary), pretty_arm)
    layout = {"barmode": "group", "yaxis": {"range": [low, high]}, "bargap": 0.2}
    caption = "Mean test AUC over seeds, ± one standard deviation. The axis does not begin at 0."
    return figure("auc", "AUC by VM and arm", caption, data, layout)


def _variant_figures(summary: Mapping[str, Any]) -> list[Json]:
    """Return, for each model, the mean AUC of every arm over the variants; none with a single variant."""
    variants = _variants(summary)
    if len(variants) < 2:
        return []
    figures, colours = [], _colours(summary)
    for number, model in enumerate(dict.fromkeys(cell["model"] for cell in summary["cells"])):
        mine = [cell for cell in summary["cells"] if cell["model"] == model]
        data = [
            _variant_trace([cell for cell in mine if cell["arm"] == arm], arm, colours[arm])
            for arm in dict.fromkeys(cell["arm"] for cell in mine)
        ]
        title = f"AUC by variant, {model}"
        caption = "Mean test AUC over seeds, ± one standard deviation, in the order of the file."
        layout: Json = {"xaxis": {"type": "category"}}
        figures.append(figure(f"variants-{number}", title, caption, data, layout))
    return figures


def _variant_trace(cells: Sequence[Json], arm: str, colour: str) -> Json:
    points = {cell["variant"]: cell["mean"]["auc"] for cell in cells}
    spreads = [cell["sd"].get("auc", 0.0) for cell in cells]
    return variant_line(pretty_arm(arm), points, colour, spreads=spreads)
