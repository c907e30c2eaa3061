"""The page, the Markdown tables and the lines on a terminal of an experiment on knowledge graph embedding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopfm_ray.errors import DataError
from loopfm_ray.report import words
from loopfm_ray.report.page import plotly_base64, render_template, yaml_text
from loopfm_ray.report.parts import bars, css_colour, figure, markdown_row
from loopfm_ray.store.tables import write_text

__all__ = ["COLUMNS", "build_kge_report", "headline", "kge_lines", "render_kge", "render_markdown"]

Json = dict[str, Any]  # Any: JSON of the summary
COLUMNS = (
    "MRR",
    "gain",
    "p",
    "gap",
    "Hits@1",
    "Hits@3",
    "Hits@10",
    "adj. mean rank",
    "best epoch",
    "train time",
)
_NEEDED = ("name", "roles", "cells", "config", "num_unfinished_cells")
_COLOURS = (
    "--model-vm",
    "--model-vm-kd-loopfm",
    "--model-vm-kd",
    "--model-vm-loopfm",
    "--model-vm-raw",
    "--model-fm",
    "#65a30d",
    "#db2777",
)


def build_kge_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and `results.md` for `summary` into `folder`; return the page's path.

    Raises:
        DataError: the summary lacks a key.
    """
    page, text = render_kge(summary), render_markdown(summary)
    write_text(folder / "results.md", text)
    target = folder / "report.html"
    write_text(target, page)
    return target


def render_kge(summary: Mapping[str, Any]) -> str:
    """Return the page of an experiment as HTML; it loads nothing from the network.

    Raises:
        DataError: the summary lacks a key.
    """
    _check(summary)
    colours = _colours(summary)
    figures = [_mrr_figure(summary, colours)]
    return render_template(
        "kge.html.j2",
        summary=summary,
        headline=headline(summary),
        tiles=_tiles(summary),
        columns=COLUMNS,
        lines=[
            (model, arm, css_colour(colours[arm]), texts)
            for model, arm, texts in kge_lines(summary)
        ],
        figures=figures,
        figure_specs={item["id"]: item["spec"] for item in figures},
        plotly=plotly_base64(),
        config=yaml_text(summary["config"]),
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table of an experiment as Markdown.

    Raises:
        DataError: the summary lacks a key.
    """
    _check(summary)
    parts = [f"**{headline(summary)}**", "", markdown_row(("model", "arm", *COLUMNS))]
    parts.append(markdown_row(("---", "---", *("---:" for _ in COLUMNS))))
    parts += [markdown_row((model, arm, *texts)) for model, arm, texts in kge_lines(summary)]
    return "\n".join(parts) + "\n"


def headline(summary: Mapping[str, Any]) -> str:
    """Return what the experiment found, in one sentence."""
    best, plain = summary["roles"]["best"], summary["roles"]["plain"]
    gain, share = summary.get("mean_relative_mrr_gain"), summary.get("share_of_cells_better")
    if gain is None or share is None:
        return f"{best} and {plain} are compared"
    gained = words.format_share(gain, 1, signed=True)
    clear = words.format_share(summary.get("share_of_cells_significantly_better"), 0)
    return f"{best} over {plain}: {gained} MRR, better in {words.format_share(share, 0)} of the models, p < 0.05 in {clear}"


def kge_lines(summary: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (model, arm, texts in order of `COLUMNS`) of every cell."""
    return [(cell["model"], cell["arm"], _texts(cell)) for cell in summary["cells"]]


def _texts(cell: Json) -> tuple[str, ...]:
    mean, versus = cell["mean"], cell.get("vs_plain")
    spread = cell["sd"]["mrr"]
    mrr = words.format_number(mean["mrr"])
    return (
        mrr if spread is None else f"{mrr} ± {words.format_number(spread)}",
        "" if versus is None else words.format_share(versus["mrr_relative"], 1, signed=True),
        "" if versus is None else words.format_small(versus["mrr"]["p"]),
        "" if versus is None else words.format_share(versus["gap_recovered"], 0),
        *(words.format_number(mean[f"hits_at_{k}"]) for k in (1, 3, 10)),
        words.format_number(mean["adjusted_mean_rank"]),
        words.format_number(cell["best_epoch"], 0),
        words.format_seconds(cell["train_s"] + cell["teacher_train_s"]),
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    best, plain = summary["roles"]["best"], summary["roles"]["plain"]
    return [
        (
            words.format_share(summary.get("mean_relative_mrr_gain"), 1, signed=True),
            f"MRR of {best} over {plain}, mean of the models",
        ),
        (
            words.format_share(summary.get("share_of_cells_better"), 0),
            f"of the models are better with {best}",
        ),
        (
            words.format_share(summary.get("gap_recovered"), 0),
            f"of the lead of a large dimension is recovered by {best}",
        ),
    ]


def _check(summary: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED if name not in summary]
    if missing:
        raise DataError(
            f"the summary of an experiment lacks {missing}; run `loopfm experiment` with its config to write it again"
        )


def _colours(summary: Mapping[str, Any]) -> dict[str, str]:
    arms = dict.fromkeys(cell["arm"] for cell in summary["cells"])
    return {arm: _COLOURS[number % len(_COLOURS)] for number, arm in enumerate(arms)}


def _mrr_figure(summary: Mapping[str, Any], colours: Mapping[str, str]) -> Json:
    data, (low, high) = bars(summary["cells"], "mrr", colours, str)
    layout = {"barmode": "group", "yaxis": {"range": [max(0.0, low), high]}}
    caption = (
        "Mean filtered test MRR over seeds, ± one standard deviation. The axis need not begin at 0."
    )
    return figure("mrr", "MRR by model and arm", caption, data, layout)
