"""Build one self-contained HTML page from the summary of a run.

The page loads nothing: style, script, data and the chart library (gzip, base64) are inside, and its content security
policy forbids every request. The same summary gives the same bytes.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from loopfm_ray.report import words
from loopfm_ray.report.figures import build_figures
from loopfm_ray.report.summary import Channel, ModelRecord, Summary, read_summary
from loopfm_ray.store.tables import write_text

__all__ = ["build_report", "plotly_base64", "render_report", "render_template", "yaml_text"]


@dataclass(frozen=True)
class Cell:
    """One number: the raw value for machines, the shown text, and its spread over seeds."""

    value: float | None
    text: str
    spread: str = ""


@dataclass(frozen=True)
class ModelRow:
    """One line of the table of models."""

    key: str
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Bar:
    """A name, a number and the width of its bar in percent."""

    name: str
    cell: Cell
    width: float


_COLUMNS = ("NE", "NE gain", "AUC", "gAUC", "Calibration", "Transfer ratio", "Parameters", "Time")


def build_report(summary: Mapping[str, Any], out: Path) -> Path:
    """Write the page for `summary` (the tree of `summary.json`) to `out` and return `out`.

    Raises:
        DataError: a demanded key of the summary is missing or a value has the wrong type.
    """
    write_text(out, render_report(summary))
    return out


def render_report(summary: Mapping[str, Any]) -> str:
    """Return the page for `summary` as HTML text.

    Raises:
        DataError: a demanded key of the summary is missing or a value has the wrong type.
    """
    record = read_summary(summary)
    figures = build_figures(record)
    return render_template(
        "page.html.j2",
        summary=record,
        words=words,
        definitions=words.DEFINITIONS,
        columns=_COLUMNS,
        rows=_model_rows(record),
        tiles=_tiles(record),
        figures=figures,
        figure_specs={figure.id: figure.spec for figure in figures},
        plotly=plotly_base64() if figures else "",
        channel_bars=_channel_bars(record.channel),
        stage_bars=_stage_bars(record),
        size_rows=_size_rows(record),
        seed_rows=_seed_rows(record),
        data_notes=words.data_notes(record),
        scored=_scored(record),
        config=yaml_text(record.config),
    )


def render_template(name: str, **values: object) -> str:
    """Return a page of this package: every value is escaped, and none may be missing."""
    environment = Environment(
        loader=PackageLoader("loopfm_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def _model_rows(summary: Summary) -> list[ModelRow]:
    return [
        ModelRow(key, words.pretty_name(key), _cells(summary, key, summary.models[key]))
        for key in words.model_order(list(summary.models))
    ]


def _cells(summary: Summary, key: str, model: ModelRecord) -> tuple[Cell, ...]:
    test, spread, gain = model.test, model.test_sd, summary.gain.get(key)
    ne_gain = gain.ne if gain is not None else None
    ratio = summary.transfer_ratio.get(key)
    return (
        _metric(test.ne, spread.ne),
        Cell(ne_gain, words.format_number(ne_gain, signed=True)),
        _metric(test.auc, spread.auc),
        _metric(test.gauc, spread.gauc),
        _metric(test.calibration, spread.calibration, digits=3),
        Cell(ratio, words.format_share(ratio)),
        Cell(model.num_parameters, words.format_count(model.num_parameters)),
        Cell(model.seconds, words.format_seconds(model.seconds)),
    )


def _metric(value: float | None, spread: float | None, digits: int = 4) -> Cell:
    text = words.format_number(spread, digits) if spread else ""
    return Cell(value, words.format_number(value, digits), text)


def _tiles(summary: Summary) -> list[tuple[str, str, Cell]]:
    """Return the numbers at the top: label, word to define it, number."""
    best = next((key for key in ("vm_kd_loopfm", "vm_loopfm") if key in summary.models), "")
    name = words.pretty_name(best)
    tiles: list[tuple[str, str, Cell]] = []
    gain = summary.gain.get(best)
    if gain is not None:
        text = words.format_number(gain.ne, signed=True)
        tiles.append((f"NE gain of {name} over VM", "NE gain", Cell(gain.ne, text)))
    over_kd = summary.relative_auc_gain_over_kd
    if over_kd is not None:
        text = words.format_share(over_kd, 2, signed=True)
        tiles.append(("AUC of VM + KD + LoopFM over VM + KD, relative", "AUC", Cell(over_kd, text)))
    if summary.audit is not None:
        leaks = summary.audit.num_leaks
        checked = words.format_count(summary.audit.num_checked)
        cell = Cell(leaks, words.format_count(leaks))
        tiles.append((f"leaks in {checked} audited rows", "Audit", cell))
    if summary.parity is not None:
        diff = summary.parity.max_abs_diff
        tiles.append(
            ("largest served − offline difference", "Parity", Cell(diff, words.format_small(diff)))
        )
    return tiles


def _channel_bars(channel: Channel | None) -> list[tuple[str, Bar]]:
    """Return the stations of the channel: what is held there, and how much of the variance it keeps."""
    if channel is None:
        return []
    bars: list[tuple[str, Bar]] = []
    if channel.embedding_dim is not None:
        cell = Cell(1.0, "100 %")
        bars.append((f"{channel.embedding_dim} values", Bar("FM embedding", cell, 100.0)))
    held = {"latent": "", "code": ""}
    if channel.latent_dim is not None:
        held["latent"] = f"{channel.latent_dim} values"
        if channel.bits is not None:
            size = -(-channel.latent_dim * channel.bits // 8)
            held["code"] = f"{channel.latent_dim} × {channel.bits} bits = {size} bytes"
    for key, text in held.items():
        share = channel.variance_explained.get(key)
        if text or share is not None:
            width = 100 * min(max(share or 0.0, 0.0), 1.0)
            bars.append((text, Bar(key, Cell(share, words.format_share(share)), width)))
    return bars


def _stage_bars(summary: Summary) -> list[Bar]:
    known = {name: value for name, value in summary.seconds.items() if value is not None}
    longest = max(known.values(), default=0.0) or 1.0
    return [
        Bar(name.replace("_", " "), Cell(value, words.format_seconds(value)), 100 * value / longest)
        for name, value in known.items()
    ]


def _size_rows(summary: Summary) -> list[tuple[str, Cell]]:
    sizes = summary.sizes
    if sizes is None:
        return []
    rows = (
        ("latents, offline", sizes.latents_bytes),
        ("per event", sizes.bytes_per_event),
        ("joined set", sizes.joined_bytes),
        ("online store", sizes.online_bytes),
    )
    return [
        (name, Cell(value, words.format_bytes(value))) for name, value in rows if value is not None
    ]


def _seed_rows(summary: Summary) -> list[tuple[str, str, Cell, Cell, Cell]]:
    """Return seed, model, NE, AUC and transfer ratio, one line each; none when there is a single seed."""
    if len(summary.per_seed) < 2:
        return []
    rows = []
    for seed, record in summary.per_seed.items():
        for key in words.model_order(list(record.models)):
            test, ratio = record.models[key].test, record.transfer_ratio.get(key)
            cells = (_metric(test.ne, None), _metric(test.auc, None))
            rows.append(
                (seed, words.pretty_name(key), *cells, Cell(ratio, words.format_share(ratio)))
            )
    return rows


def _scored(summary: Summary) -> tuple[str, str] | None:
    if summary.scored_request is None:
        return None
    return _json(summary.scored_request.request), _json(summary.scored_request.response)


# Any: JSON of the run, shown as it is.
def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def yaml_text(tree: dict[str, Any]) -> str:
    """Return a config as it is shown on a page."""
    plain = json.loads(json.dumps(tree, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else ""


@cache
def plotly_base64() -> str:
    """Return the chart library as a page carries it: gzip, base64."""
    packed = gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode()
