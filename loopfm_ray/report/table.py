"""The summary of a run as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from loopfm_ray.report.kge import COLUMNS, kge_lines
from loopfm_ray.report.kge import headline as kge_headline
from loopfm_ray.report.summary import Summary, read_summary
from loopfm_ray.report.sweep import best_columns, best_rows
from loopfm_ray.report.trials import check_sweep, limit, tally
from loopfm_ray.report.trials import headline as sweep_headline
from loopfm_ray.report.words import (
    format_count,
    format_number,
    format_seconds,
    format_share,
    format_small,
    headline,
    model_order,
    pretty_name,
)

__all__ = [
    "write_analysis",
    "write_cells",
    "write_drift",
    "write_ladder",
    "write_stream",
    "write_sweep",
    "write_table",
]

_PLAIN_WIDTH = 140
_SERVED = "vm_kd_loopfm"
_TERMS = {
    "temporal": "what the raw history tells: I(H; y | x)",
    "cross": "what the FM adds to the raw history: I(S; y | x, H)",
    "residual": "what the channel lost of the raw history: I(H; y | x, S)",
    "loopfm": "what the FM's history tells: temporal + cross - residual",
}

_STEPS = {
    "representation": "what the FM's embeddings do not tell of the raw history",
    "autoencoder": "what the latents lose of the embeddings",
    "quantisation": "what the codes lose of the latents",
    "total": "their sum: bounds the loss of the whole channel",
    "residual": "what the channel lost of the raw history: I(H; y | x, S)",
}
_DRIFTS = ("centroid", "centroid_cosine", "covariance", "displacement", "cka")
_WAYS = {
    "own": "its own histories",
    "own_later_events": "its own, only events the new snapshot has",
    "none": "the new histories as they are",
    "orthogonal": "the new, turned (Procrustes)",
    "linear": "the new, linear map",
    "retrained": "retrained on the new",
}


def write_table(summary: Mapping[str, Any], stream: TextIO) -> None:
    """Write headline, models and checks of `summary` to `stream`: in colour on a terminal, plain text elsewhere.

    Raises:
        DataError: a demanded key of the summary is missing or a value has the wrong type.
    """
    record = read_summary(summary)
    _console(stream).print(_layout(record, is_terminal=stream.isatty()))


def write_stream(result: Mapping[str, Any], stream: TextIO) -> None:
    """Write what `loopfm stream` found to `stream`: the progressive metrics of every VM of every vertical, and the FM's."""
    table = _table(("seed", "vertical", "model"), stream.isatty())
    for name in ("NE", "AUC", "calibration", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for seed, verticals in result.items():
        for vertical, models in verticals.items():
            fm = next(iter(models.values()))["fm"]
            lines = {**{name: record["test"] for name, record in models.items()}, "FM": fm}
            for name, test in lines.items():
                names = (seed.removeprefix("seed="), _clean(vertical), _clean(name))
                numbers = (format_number(test[key]) for key in ("ne", "auc"))
                calibration = format_number(test["calibration"], 3)
                row = (*names, *numbers, calibration, format_count(test["num_rows"]))
                table.add_row(*(Text(value) for value in row))
    _console(stream).print(table)


def write_cells(summary: Mapping[str, Any], stream: TextIO) -> None:
    """Write the cells of an experiment's summary to `stream`, one line each."""
    table = _table(("variant", "model", "arm"), stream.isatty())
    for name in ("AUC", "sd", "NE", "AUC over KD", "p", "transfer ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in summary["cells"]:
        versus = cell.get(f"vs_{summary['roles']['kd']}")
        names = (_clean(cell[key]) for key in ("variant", "model", "arm"))
        values = (
            format_number(cell["mean"]["auc"]),
            format_number(cell["sd"].get("auc")),
            format_number(cell["mean"]["ne"]),
            "" if versus is None else format_share(versus["auc_relative"]),
            "" if versus is None else format_small(versus["auc"]["p"]),
            format_share(cell["transfer_ratio"]),
        )
        table.add_row(*(Text(value) for value in (*names, *values)))
    console = _console(stream)
    console.print(table)
    for name in ("relative_auc_gain_over_kd", "transfer_ratio", "transfer_ratio_over_kd"):
        value = summary[name]
        shown = format_number(value, 2) if name == "transfer_ratio_over_kd" else format_share(value)
        console.print(Text(f"{name.replace('_', ' ')}: {shown}"))


def write_kge_cells(summary: Mapping[str, Any], stream: TextIO) -> None:
    """Write the cells of an experiment on graphs to `stream`, one line each, and what was found."""
    table = _table(("model", "arm"), stream.isatty())
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for model, arm, texts in kge_lines(summary):
        table.add_row(*(Text(value) for value in (_clean(model), _clean(arm), *texts)))
    console = _console(stream)
    console.print(table)
    console.print(Text(kge_headline(summary)))


def write_sweep(summary: Mapping[str, Any], stream: TextIO) -> None:
    """Write what a sweep found to `stream`: the best trials with their parameters, and how many ended how.

    Raises:
        DataError: the summary lacks a key.
    """
    check_sweep(summary)
    console = _console(stream)
    console.print(Text(_clean(f"{summary['name']}: {sweep_headline(summary)}."), style="bold"))
    rows = best_rows(summary)
    if rows:
        first, *others = best_columns(summary)
        table = _table((first.name.lower(),), stream.isatty())
        for column in others:
            table.add_column(_clean(column.name), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(_clean(cell.text)) for cell in row))
        console.print(table)
    console.print(Text(f"{tally(summary)}, in {format_seconds(summary['seconds'])}"))
    for item in summary.get("constraints", []):
        console.print(Text(_clean(f"constraint: {limit(item)}")))


def write_analysis(result: Mapping[str, Any], stream: TextIO) -> None:
    """Write a gain decomposition to `stream`: its terms in nats, with their intervals."""
    mean = result["mean"]
    table = _table(("term",), stream.isatty())
    for name in ("nats", "95 % interval", "what it is"):
        table.add_column(name, no_wrap=True)
    for name, text in _TERMS.items():
        term = mean[name]
        low, high = (format_number(term[key], 5, signed=True) for key in ("low", "high"))
        value = format_number(term["value"], 5, signed=True)
        table.add_row(*(Text(cell) for cell in (f"I_{name}", value, f"{low} to {high}", text)))
    console = _console(stream)
    console.print(table)
    lines = (
        ("the FM's lead over the plain VM, nats", format_number(mean["teacher_gain"], 5)),
        ("share of it that the history carries over", _interval(mean["transfer_ratio"])),
        ("share of the raw history that the channel lost", format_share(mean["tau"])),
        ("rows; users", f"{format_count(mean['num_rows'])}; {format_count(mean['num_users'])}"),
    )
    for name, value in lines:
        console.print(Text(f"{name}: {value}"))


def write_ladder(result: Mapping[str, Any], stream: TextIO) -> None:
    """Write to `stream` what each step of the channel loses, in nats, with the intervals."""
    table, mean = _table(("lost by",), stream.isatty()), result["mean"]
    for name in ("nats", "95 % interval", "what it is"):
        table.add_column(name, no_wrap=True)
    for name, text in _STEPS.items():
        low, high = (format_number(mean[name][key], 5, signed=True) for key in ("low", "high"))
        value = format_number(mean[name]["value"], 5, signed=True)
        table.add_row(*(Text(cell) for cell in (name, value, f"{low} to {high}", text)))
    _console(stream).print(table)


def write_drift(result: Mapping[str, Any], stream: TextIO) -> None:
    """Write to `stream` how far two snapshots are apart, and what that does to each VM."""
    console = _console(stream)
    old, new = result["old"], result["new"]
    console.print(
        Text(
            _clean(
                f"{new['name']} ({new['snapshot_id']}) against {old['name']} ({old['snapshot_id']})"
            )
        )
    )
    table = _table(("lengths in spreads of the old latents",), stream.isatty())
    for name in _DRIFTS:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for title, drift in (
        ("new snapshot against old, same events", result["space"]),
        ("old snapshot, later half against earlier", result["over_time"]),
    ):
        values = [format_number(drift[name] if drift else None, 4) for name in _DRIFTS]
        table.add_row(*(Text(value) for value in (title, *values)))
    console.print(table)
    shares = "; ".join(f"{kind} {format_number(x, 3)}" for kind, x in result["explained"].items())
    console.print(
        Text(f"variance of the old latents that a map of the new ones explains: {shares}")
    )
    if not result["vms"]:
        console.print(Text("the new run is not joined: what it does to the VMs was not measured"))
        return
    table = _table(("VM", "reads"), stream.isatty())
    for name in ("NE", "AUC", "logloss against own", "95 % interval", "events"):
        table.add_column(name, justify="right", no_wrap=True)
    for vm, ways in result["vms"].items():
        for way, found in ways.items():
            gap = found["loss_against_own"]
            low, high = (format_number(gap[key], 4, signed=True) for key in ("low", "high"))
            cells = (
                _clean(vm),
                _WAYS[way],
                format_number(found["ne"]),
                format_number(found["auc"]),
                format_number(gap["value"], 4, signed=True),
                f"{low} to {high}",
                format_number(found["mean_history_len"], 1),
            )
            table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return format_share(None)
    value, low, high = (format_share(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _console(stream: TextIO) -> Console:
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=is_terminal,
        no_color=None if is_terminal else True,
        width=None if is_terminal else _PLAIN_WIDTH,
        highlight=False,
        emoji=False,
        markup=False,
    )


def _table(columns: Sequence[str], is_terminal: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _layout(summary: Summary, *, is_terminal: bool) -> RenderableType:
    parts: list[RenderableType] = [
        Text(_clean(f"{summary.name}: {headline(summary)}."), style="bold"),
        Text(""),
        _models(summary, is_terminal=is_terminal),
    ]
    checks = _checks(summary)
    if checks:
        parts += [Text(""), *(Text(line) for line in checks)]
    return Group(*parts)


def _models(summary: Summary, *, is_terminal: bool) -> Table:
    table = _table(("model",), is_terminal)
    for name in ("NE", "AUC", "gAUC", "calibration", "transfer ratio", "parameters", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in model_order(list(summary.models)):
        model = summary.models[key]
        values = (
            _clean(pretty_name(key)),
            format_number(model.test.ne),
            format_number(model.test.auc),
            format_number(model.test.gauc),
            format_number(model.test.calibration, 3),
            format_share(summary.transfer_ratio.get(key)),
            format_count(model.num_parameters),
            format_seconds(model.seconds),
        )
        table.add_row(*(Text(value) for value in values), style="bold" if key == _SERVED else "")
    return table


def _checks(summary: Summary) -> list[str]:
    lines = []
    if summary.transfer_ratio:
        lines.append(_clean(f"transfer ratio: {summary.transfer_ratio_kind or 'baseline VM'}"))
    if summary.audit is not None:
        leaks, checked = summary.audit.num_leaks, summary.audit.num_checked
        line = f"audit: {format_count(leaks)} leaks in {format_count(checked)} rows"
        if "min" in summary.audit.margin_s and "p50" in summary.audit.margin_s:
            least, median = (format_seconds(summary.audit.margin_s[key]) for key in ("min", "p50"))
            line += (
                f"; entries were readable {least} (least) and {median} (median) before the request"
            )
        lines.append(line)
    if summary.parity is not None:
        largest = format_small(summary.parity.max_abs_diff)
        lines.append(f"parity: served and offline scores differ by at most {largest}")
    if summary.history is not None and summary.history.coverage is not None:
        lines.append(f"history: {format_share(summary.history.coverage)} of the requests have one")
        lines += [_clean(f"freshness: {alarm}") for alarm in summary.history.alarms]
    return lines


def _clean(text: str) -> str:
    """Return `text` without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)
