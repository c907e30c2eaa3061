"""The page and the Markdown of a sweep, from its `summary.json`.

Like the page of a run, this one loads nothing from the network, and the same summary gives the same bytes.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfm_ray.report import words
from loopfm_ray.report.page import Bar, Cell, plotly_base64, render_template, yaml_text
from loopfm_ray.report.parts import css_colour, markdown_row
from loopfm_ray.report.sweep_figures import (
    curve_figures,
    fit_text,
    front_figures,
    history_figures,
    scaling_figures,
    slice_figures,
)
from loopfm_ray.report.trials import (
    DEFINITIONS,
    KINDS,
    best_trials,
    check_sweep,
    cut,
    finite,
    headline,
    limit,
    metric_definition,
    metric_name,
    of_kind,
    parameter_definition,
    short_names,
    show_metric,
    show_value,
    tally,
)
from loopfm_ray.store.tables import write_text

__all__ = [
    "best_columns",
    "best_rows",
    "build_sweep_report",
    "headline",
    "render_markdown",
    "render_sweep",
]

Json = dict[str, Any]  # Any: JSON of the summary


@dataclass(frozen=True)
class Column:
    """The head of a column and what it means."""

    name: str
    title: str


def build_sweep_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and `results.md` for `summary` into `folder`; return the page's path.

    Raises:
        DataError: the summary lacks a key.
    """
    page, text = render_sweep(summary), render_markdown(summary)
    write_text(folder / "results.md", text)
    target = folder / "report.html"
    write_text(target, page)
    return target


def render_sweep(summary: Mapping[str, Any]) -> str:
    """Return the page of a sweep as HTML.

    Raises:
        DataError: the summary lacks a key.
    """
    check_sweep(summary)
    figures = {
        "glance": [*front_figures(summary), *history_figures(summary)],
        "slices": slice_figures(summary),
        "curves": curve_figures(summary),
        "scaling": scaling_figures(summary),
    }
    specs = {item["id"]: item["spec"] for group in figures.values() for item in group}
    return render_template(
        "sweep.html.j2",
        summary=summary,
        definitions=DEFINITIONS,
        headline=headline(summary),
        tiles=_tiles(summary),
        legend=_legend(specs),
        figures=figures,
        limits=[limit(item) for item in summary.get("constraints", [])],
        best_columns=best_columns(summary),
        best_rows=best_rows(summary),
        importance=_importance_bars(summary),
        confirmed=_confirmed(summary),
        failures=_failures(summary),
        all_rows=_all_rows(summary),
        figure_specs=specs,
        plotly=plotly_base64() if specs else "",
        config=yaml_text(summary["config"]),
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Return the tables of a sweep as Markdown.

    Raises:
        DataError: the summary lacks a key.
    """
    check_sweep(summary)
    time = words.format_seconds(finite(summary["seconds"]))
    parts = [f"**{_inline(headline(summary))}**", "", f"{tally(summary)}, in {time}."]
    for item in summary.get("constraints", []):
        parts += ["", f"Constraint: {_inline(limit(item))}."]
    rows = best_rows(summary)
    if rows:
        head = [column.name for column in best_columns(summary)]
        texts = [[cell.text for cell in row] for row in rows]
        parts += ["", "Best trials:", "", *_table(head, texts)]
    confirmed = _confirmed(summary)
    if confirmed:
        head = [column.name for column in confirmed["columns"]]
        texts = [
            [row["name"], *(f"{c.text} ± {c.spread}" if c.spread else c.text for c in row["cells"])]
            for row in confirmed["rows"]
        ]
        parts += ["", f"Confirmation. {_inline(confirmed['note'])}:", "", *_table(head, texts)]
    for entry in summary.get("scaling") or []:
        name = f"{metric_name(entry['y'])} by {metric_name(entry['x'])}"
        parts += ["", f"{_inline(name)}: {_inline(fit_text(entry))}"]
    failures = _failures(summary)
    if failures:
        texts = [[str(number), reason] for number, reason, _ in failures]
        parts += ["", "Failures:", "", *_table(["trial", "reason"], texts)]
    return "\n".join(parts) + "\n"


def best_columns(summary: Mapping[str, Any]) -> list[Column]:
    """Return the heads of the table of the best trials: number, metrics, parameters, time."""
    names = short_names(list(summary["parameters"]))
    return [
        Column("Trial", DEFINITIONS["Trial"]),
        *(
            Column(metric_name(metric), metric_definition(metric, summary))
            for metric in _shown_metrics(summary)
        ),
        *(
            Column(names[path], parameter_definition(path, space))
            for path, space in summary["parameters"].items()
        ),
        Column("Time", DEFINITIONS["Trial time"]),
    ]


def best_rows(summary: Mapping[str, Any]) -> list[list[Cell]]:
    """Return the rows under `best_columns`, the best trial first; a parameter that a trial does not have is a dash."""
    return [
        [
            Cell(trial["number"], str(trial["number"])),
            *(
                Cell(finite(value := _metric(trial, metric, summary)), show_metric(metric, value))
                for metric in _shown_metrics(summary)
            ),
            *(_parameter(trial, path) for path in summary["parameters"]),
            Cell(finite(trial["seconds"]), words.format_seconds(finite(trial["seconds"]))),
        ]
        for trial in best_trials(summary)
    ]


def _shown_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return the objectives, then what the constraints bound."""
    items = [*summary["objectives"], *summary.get("constraints", [])]
    return list(dict.fromkeys(item["metric"] for item in items))


# Any: a JSON value
def _metric(trial: Json, metric: str, summary: Mapping[str, Any]) -> Any:
    """Return a metric of a trial; an objective as the search was told it."""
    for place, item in enumerate(summary["objectives"]):
        if item["metric"] == metric and trial["values"] is not None:
            return trial["values"][place]
    return trial["metrics"].get(metric)


def _parameter(trial: Json, path: str) -> Cell:
    if path not in trial["params"]:
        return Cell(None, words.MISSING)
    value = trial["params"][path]
    return Cell(finite(value), cut(show_value(value)))


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, Cell]]:
    """Return the numbers at the top: label, word to define it, number."""
    tiles: list[tuple[str, str, Cell]] = []
    best, objectives = best_trials(summary), summary["objectives"]
    if best:
        metric = objectives[0]["metric"]
        value = _metric(best[0], metric, summary)
        label = f"best {metric_name(metric)}, trial {best[0]['number']}"
        word = "Best" if len(objectives) == 1 else "Pareto front"
        tiles.append((label, word, Cell(finite(value), show_metric(metric, value))))
    if len(objectives) > 1:
        tiles.append(("trials on the Pareto front", "Pareto front", _count(len(summary["best"]))))
    for state in ("complete", "pruned", "failed"):
        count = summary["num_trials"][state]
        tiles.append((f"trials {state}", state.capitalize(), _count(count)))
    seconds = finite(summary["seconds"])
    tiles.append(("wall time", "Wall time", Cell(seconds, words.format_seconds(seconds))))
    return tiles


def _legend(specs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the kinds of trials that the figures show, and their colours."""
    shown = {trace.get("name") for spec in specs.values() for trace in spec["data"]}
    return [(kind, css_colour(colour)) for kind, colour in KINDS.items() if kind in shown]


def _count(number: int) -> Cell:
    return Cell(number, words.format_count(number))


def _importance_bars(summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Bar]]]]:
    """Return, for each objective, the parameters with their shares, the largest first."""
    names = short_names(list(summary["parameters"]))
    groups = []
    for metric, shares in (summary.get("importance") or {}).items():
        ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
        bars = [
            (
                path,
                Bar(
                    names.get(path, path),
                    Cell(share, words.format_share(share)),
                    100 * min(max(share, 0.0), 1.0),
                ),
            )
            for path, share in ordered
        ]
        groups.append((metric_name(metric), bars))
    return groups


def _confirmed(summary: Mapping[str, Any]) -> Json | None:
    """Return columns, rows and the note of the confirmation runs; None when there were none."""
    confirmed = summary.get("confirmed")
    if not confirmed:
        return None
    configs = confirmed["configs"]
    metrics = list(dict.fromkeys(metric for config in configs for metric in config["mean"]))
    columns = [Column("Config", "The base config, or that config with the parameters of a trial.")]
    columns += [Column(metric_name(m), metric_definition(m, summary)) for m in metrics]
    columns += [
        Column("AUC gain", DEFINITIONS["Gain"]),
        Column("p", DEFINITIONS["p"]),
        Column("File", "The whole config, to run it again."),
    ]
    seeds = ", ".join(str(seed) for seed in confirmed["seeds"])
    return {
        "columns": columns,
        "rows": [_confirmed_row(config, metrics) for config in configs],
        "note": f"Mean ± standard deviation over the seeds {seeds}, {confirmed['split']} split",
    }


def _confirmed_row(config: Json, metrics: Sequence[str]) -> Json:
    cells = []
    for metric in metrics:
        value, spread = finite(config["mean"].get(metric)), finite(config["sd"].get(metric))
        shown = "" if spread is None else show_metric(metric, spread)
        cells.append(Cell(value, show_metric(metric, value), shown))
    gain, p = finite(config["gain"]), finite(config["p"])
    cells.append(Cell(gain, "" if gain is None else words.format_share(gain, 2, signed=True)))
    cells.append(Cell(p, "" if p is None else words.format_small(p)))
    cells.append(Cell(None, config["file"] or ""))
    return {"name": config["name"], "cells": cells}


def _failures(summary: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """Return number, reason and parameters of every failed trial."""
    names = short_names(list(summary["parameters"]))
    return [
        (
            trial["number"],
            trial["reason"] or "no reason was recorded",
            ", ".join(f"{names[path]} = {show_value(v)}" for path, v in trial["params"].items()),
        )
        for trial in of_kind(summary, "failed")
    ]


def _all_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return every trial with plain, unrounded values, the heads first: made to be copied into another program."""
    objectives = [item["metric"] for item in summary["objectives"]]
    found = dict.fromkeys(name for trial in summary["trials"] for name in trial["metrics"])
    metrics = [*objectives, *(name for name in found if name not in objectives)]
    paths = list(summary["parameters"])
    rows = [["number", "state", "is_feasible", *metrics, *paths, "seconds", "reason"]]
    rows += [
        [
            str(trial["number"]),
            trial["state"],
            _plain(trial["is_feasible"]),
            *(_plain(_metric(trial, metric, summary)) for metric in metrics),
            *(_plain(trial["params"].get(path)) for path in paths),
            _plain(trial["seconds"]),
            " ".join((trial["reason"] or "").split()),
        ]
        for trial in summary["trials"]
    ]
    return rows


# Any: a JSON value
def _plain(value: Any) -> str:
    if value is None:
        return ""
    return (
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [markdown_row([_inline(name) for name in head])]
    lines.append(markdown_row(["---", *("---:" for _ in head[1:])]))
    return lines + [markdown_row([_inline(cell) for cell in row]) for row in rows]


def _inline(text: str) -> str:
    """Return a text as one line that Markdown does not take for HTML."""
    return html.escape(" ".join(text.split()), quote=False)
