import io

import pytest

from loopfm_ray.errors import DataError
from loopfm_ray.report import write_table
from loopfm_ray.report.table import write_stream
from tests.report.example import example_summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def text_of(summary, stream=None) -> str:
    stream = stream or io.StringIO()
    write_table(summary, stream)
    return stream.getvalue()


def test_rows_hold_the_numbers_of_the_summary():
    lines = [line.split() for line in text_of(example_summary()).splitlines()]
    assert ["VM", "0.9012", "0.7043", "0.6833", "0.993", "–", "1,198,465", "31.2", "s"] in lines
    served = next(line for line in lines if line[:5] == ["VM", "+", "KD", "+", "LoopFM"])
    assert served[5:8] == ["0.8723", "0.7374", "0.7164"]


def test_text_outside_a_terminal_has_no_control_characters():
    text = text_of(example_summary())
    assert "\x1b" not in text
    assert "audit: 0 leaks in 20,000 rows" in text
    assert "baseline vm" in text


def test_terminal_gets_colour_and_the_same_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = text_of(example_summary(), Terminal())
    assert "\x1b[1m" in text
    assert "0.8723" in text


def test_markup_and_escape_codes_in_names_are_shown_as_text():
    summary = example_summary()
    summary["name"] = "[red]x[/red]\x1b[31m"
    text = text_of(summary)
    assert text.startswith("[red]x[/red]?[31m: ")


def test_missing_parts_are_left_out():
    summary = {
        "name": "small",
        "data": {"kind": "events"},
        "models": {"vm": {"test": {"ne": 0.9, "auc": 0.7}}},
    }
    text = text_of(summary)
    assert "0.9000" in text
    assert "audit" not in text


def test_wrong_summary_names_the_missing_key():
    with pytest.raises(DataError, match="name: missing"):
        text_of({"data": {"kind": "x"}, "models": {}})


def test_a_stream_shows_every_vm_of_every_vertical_and_the_fm():
    record = {
        "test": {"ne": 0.91234, "auc": 0.7, "calibration": 1.0201, "num_rows": 12345},
        "fm": {"ne": 0.8, "auc": 0.81, "calibration": 1.1, "num_rows": 12345},
    }
    result = {"seed=3": {"deli": {"vm": record, "vm_ah": record}, "[red]meat": {"vm": record}}}
    out = io.StringIO()
    write_stream(result, out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["3", "deli", "vm_ah", "0.9123", "0.7000", "1.020", "12,345"] in lines
    assert ["3", "[red]meat", "FM", "0.8000", "0.8100", "1.100", "12,345"] in lines
    assert sum(line[:1] == ["3"] for line in lines) == 5
