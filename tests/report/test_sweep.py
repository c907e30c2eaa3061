import html
import io
import json
import re

import pytest

from loopfm_ray.errors import DataError
from loopfm_ray.report.sweep import build_sweep_report, render_markdown, render_sweep
from loopfm_ray.report.table import write_sweep
from tests.browser import browsing
from tests.report.sweep_example import LR, example_sweep
from tests.report.test_page import HOSTILE, Page, figures_of

SECTIONS = ["glance", "best", "confirmed", "importance", "slices", "curves", "scaling", "failures", "all"]  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2], ids=["one objective", "two objectives"])
def summary(request):
    return example_sweep(request.param)


@pytest.fixture(scope="module")
def text(summary):
    return render_sweep(summary)


def test_the_page_has_every_section_and_figure(summary, text):
    assert Page(text).sections == SECTIONS
    shown = set(figures_of(text))
    slices = {f"slice-{number}" for number in range(6)}
    front = {"history-1", "front"} if len(summary["objectives"]) == 2 else set()
    assert shown == {"history-0", "curves", *slices, *front, "scaling-0", "scaling-1", "scaling-2"}
    for name in shown:
        assert text.count(f'id="plot-{name}"') == 1


def test_the_page_holds_the_numbers_of_the_summary(summary, text):
    values = Page(text).values
    expected = [
        *summary["num_trials"].values(),
        summary["seconds"],
        *(value for number in summary["best"] for value in summary["trials"][number]["values"]),
        *summary["importance"]["ne"].values(),
        *(config["mean"]["auc"] for config in summary["confirmed"]["configs"]),
        *(config["p"] for config in summary["confirmed"]["configs"] if config["p"]),
    ]
    for value in expected:
        assert value in values
    assert "best/trial-" in text
    assert "found [256, 128, 64]; see the log" in text


def test_best_trials_stand_in_order_with_their_parameters(summary, text):
    rows = re.findall(r'<tr data-trial="(\d+)".*?</tr>', text)
    assert set(summary["best"]) <= {int(number) for number in rows}
    assert int(rows[0]) == min(summary["best"], key=lambda n: summary["trials"][n]["values"][0])
    row = re.search(rf'<tr data-trial="{rows[0]}".*?</tr>', text)[0]
    assert f'value="{summary["trials"][int(rows[0])]["params"][LR]}"' in row
    assert ('class="served"' in text) == (len(summary["objectives"]) == 1)


def test_every_number_has_its_meaning_on_hover(text):
    heads = re.findall(r'<th scope="col"><abbr title="([^"]+)">([^<]+)</abbr>', text)
    titles = {name: title for title, name in heads}
    assert titles["optim.lr"] == f"{LR}, from 0.0001 to 0.01, log scale"
    assert titles["NE"].endswith("Objective: lower is better.")
    assert "Constraint: serving_p99_ms at most 2.00 ms." in titles["serving_p99_ms"]
    assert all(Page(text).titles)
    labels = re.findall(r'<span class="label">(.*?)</span>', text)
    assert len(labels) >= 5
    assert all(label.startswith("<abbr title=") for label in labels)


def test_all_trials_can_be_copied_unrounded(summary, text):
    table = re.search(r'<table class="copy">(.*?)</table>', text, re.DOTALL)[1]
    rows = [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    assert len(rows) == 25
    assert len({len(row) for row in rows}) == 1
    head = rows[0]
    for trial, row in zip(summary["trials"], rows[1:], strict=True):
        found = dict(zip(head, row, strict=True))
        assert found["state"] == trial["state"]
        assert found["seconds"] == json.dumps(trial["seconds"])
        for path in summary["parameters"]:
            value = trial["params"].get(path)
            plain = "" if value is None else value if isinstance(value, str) else json.dumps(value)
            assert found[path] == plain
        for metric, value in trial["metrics"].items():
            assert found[metric] == json.dumps(value)


def test_the_page_loads_nothing_and_is_the_same_each_time(summary, text):
    for tag, attributes in Page(text).tags:
        assert tag not in ("iframe", "object", "embed", "form", "base", "img")
        assert "src" not in attributes
    assert "default-src 'none'" in text
    assert render_sweep(json.loads(json.dumps(summary))) == text


@pytest.mark.parametrize("num_objectives", [1, 2])
def test_hostile_text_is_escaped(num_objectives):
    summary = hostile(num_objectives)
    text = render_sweep(summary)
    assert "<img" not in text
    assert text.count("<b>") == 1
    for figure in figures_of(text).values():
        assert "<img" not in json.dumps(figure)
    assert "<img" not in render_markdown(summary)


def hostile(num_objectives):
    summary = json.loads(json.dumps(example_sweep(num_objectives)).replace("ShapeError", "@"))
    summary.update(name=HOSTILE, code_versions=[HOSTILE], config={HOSTILE: HOSTILE})
    summary["parameters"][HOSTILE] = {"kind": "choice", "values": [HOSTILE, {HOSTILE: 1}]}
    for number, trial in enumerate(summary["trials"]):
        trial["params"][HOSTILE] = HOSTILE if number % 2 else {HOSTILE: 1}
        trial["metrics"][HOSTILE] = 0.1
        trial["reason"] = HOSTILE
    summary["objectives"][0]["metric"] = HOSTILE
    summary["constraints"][0]["metric"] = HOSTILE
    summary["importance"] = {HOSTILE: {HOSTILE: 1.0}}
    summary["scaling"][0].update(x=HOSTILE, y=HOSTILE)
    summary["scaling"][2]["reason"] = HOSTILE
    summary["confirmed"].update(split=HOSTILE, seeds=[HOSTILE])
    summary["confirmed"]["configs"][1].update(
        name=HOSTILE, file=HOSTILE, mean={HOSTILE: 1.0}, sd={HOSTILE: 1.0}
    )
    return summary


@pytest.mark.parametrize(
    ("name", "empty", "section"),
    [
        ("importance", {}, "importance"),
        ("scaling", [], "scaling"),
        ("confirmed", None, "confirmed"),
        ("best", [], None),
    ],
)
def test_missing_parts_leave_their_section_out(name, empty, section):
    summary = {**example_sweep(), name: empty}
    text = render_sweep(summary)
    assert Page(text).sections == [other for other in SECTIONS if other != section]
    assert ("the confirmation below" in text) == (name != "confirmed")
    assert ("Confirmation." in render_markdown(summary)) == (name != "confirmed")


def test_a_sweep_in_which_everything_failed_has_a_page():
    summary = example_sweep()
    summary["trials"] = [trial for trial in summary["trials"] if trial["state"] == "failed"]
    summary.update(best=[], importance={}, scaling=[], confirmed=None)
    summary["num_trials"] = {"complete": 0, "pruned": 0, "failed": 1}
    text = render_sweep(summary)
    assert Page(text).sections == ["failures", "all"]
    assert "No trial is complete: 0 complete, 0 pruned, 1 failed." in text
    assert figures_of(text) == {}
    assert len(text) < 20_000
    assert "| 13 | ShapeError" in render_markdown(summary)


def test_markdown_has_the_same_numbers_in_even_tables(summary):
    text = render_markdown(summary)
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 3
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert tables[0][2].startswith("| 19 | 0.8716 | 0.96 ms | 0.003057 | dcnv2 | 14 | [256, 128, 64] ")  # fmt: skip
    assert tables[1][2].startswith("| base | 0.8891 ± 0.0011 | 0.7168 ± 9.0 × 10⁻⁴ |  |  |")
    assert "18 complete, 5 pruned, 1 failed, in 1.5 h." in text
    assert "NE by fm_num_parameters: " in text
    assert "found [256, 128, 64]; see the log |" in text


def test_both_files_are_written_and_a_summary_of_something_else_is_refused(summary, tmp_path):
    page = build_sweep_report(summary, tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == render_markdown(summary)
    with pytest.raises(DataError, match="lacks"):
        build_sweep_report({"name": "run"}, tmp_path)


def test_the_terminal_shows_the_best_trials_and_the_counts(summary):
    out = io.StringIO()
    write_sweep({**summary, "name": "[red]x\x1b[31m"}, out)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("[red]x?[31m: ")
    rows = [line.split() for line in lines]
    row = next(row for row in rows if row[:1] == ["19"])
    assert row[:7] == ["19", "0.8716", "0.96", "ms", "0.003057", "dcnv2", "14"]
    assert "18 complete, 5 pruned, 1 failed, in 1.5 h" in lines
    assert "constraint: serving_p99_ms at most 2.00 ms" in lines
    with pytest.raises(DataError, match="lacks"):
        write_sweep({"name": "run"}, out)


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    with browsing(chromium, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.browser
@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, summary, tmp_path, scheme, width):
    page = build_sweep_report(summary, tmp_path)
    browser.console.clear()
    browser.look(width=width, scheme=scheme)
    browser.open(page.as_uri())
    num_figures = len(figures_of(page.read_text(encoding="utf-8")))
    browser.wait(f"document.querySelectorAll('.plot .xy').length >= {num_figures}")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    shown = browser.run("document.body.innerText")
    for number in ("0.8716", "18", "1.5 h", "62.0 %", "trial 19"):
        assert number in shown
    for figure in ("history-0", "slice-1", "scaling-0"):
        assert browser.run(f"document.querySelectorAll('#plot-{figure} .point').length") >= 12
    assert browser.run("document.querySelectorAll('#plot-curves .js-line').length") >= 4
    ink = {"light": "rgb(22, 32, 44)", "dark": "rgb(232, 237, 243)"}[scheme]
    assert browser.run("document.querySelector('#plot-history-0 .xtick text').style.fill") == ink
    assert browser.console == []


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_hostile_text_runs_nothing(browser, tmp_path):
    page = build_sweep_report(hostile(2), tmp_path)
    browser.console.clear()
    browser.look(width=360)
    browser.open(page.as_uri())
    browser.wait("document.querySelectorAll('.plot .xy').length >= 12")
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.console == []
