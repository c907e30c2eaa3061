import json
import re

import pytest

from loopfm_ray.analysis.cells import Cell, Compared, assemble_cells
from loopfm_ray.analysis.cells import headline as numbers
from loopfm_ray.errors import DataError
from loopfm_ray.report.grid import build_grid_report, headline, render_grid, render_markdown
from tests.report.test_browser import load

ROLES = Compared("none", "kd", "kd_loopfm")
AUC = {"fm": 0.8, "none": 0.60, "kd": 0.61, "kd_loopfm": 0.70, "own|arm": 0.65}


def grid_summary(variants=("main", "<b>short</b>"), models=("deepfm", "din")):
    def records(name, shift):
        return tuple(
            {
                "name": name,
                "seed": seed,
                "test": {"auc": AUC[name] + shift + seed / 500, "ne": 1.4 - AUC[name] - shift},
                "valid": {"ne": 0.9},
                "slices": {"first": {"auc": 0.55, "share": 0.5}},
                "num_parameters": 1000,
                "train_rows_per_s": 10.0,
            }
            for seed in (0, 1)
        )

    cells = assemble_cells(
        [
            Cell(variant, model, arm, records(arm, place / 100), records("fm", 0.0))
            for place, variant in enumerate(variants)
            for model in models
            for arm in AUC
            if arm != "fm"
        ],
        ROLES,
    )
    fm = {"num_parameters": 5000, "per_seed": {"0": {"ne": 0.75, "auc": 0.8}}}
    return {
        "name": "grid",
        **numbers(cells, "main", ROLES),
        "headline_variant": "main",
        "roles": {"baseline": "none", "kd": "kd", "best": "kd_loopfm"},
        "seeds": [0, 1],
        "num_unfinished_variants": 1,
        "code_versions": ["abc"],
        "cells": cells,
        "fm": dict.fromkeys(variants, fm),
        "channel": {name: {"probe_logloss": {"latent": 0.561}} for name in variants},
        "config": {"data": {"kind": "synthetic"}},
    }


def test_the_headline_is_a_sentence_with_its_p():
    text = headline(grid_summary())
    assert text.startswith("VM + KD + LoopFM over VM + KD: +14.7 % AUC, mean of 2 VMs, largest p ")
    assert headline(grid_summary(models=("din",))).split(",")[1] == " mean of 1 VM"


def test_the_tables_hold_every_cell_and_their_rows_are_as_wide_as_their_heads():
    text = render_markdown(grid_summary())
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 4
    for lines in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1
    assert len(tables[0]) == 2 + 2 * 4
    row = next(line for line in tables[0] if line.startswith("| din | VM + KD + LoopFM "))
    assert row.split(" | ")[2:6] == ["0.7000 ± 0.0000", "0.7010 ± 0.0014", "+0.1000", "+14.7 %"]


def test_the_page_holds_the_numbers_and_runs_no_name_as_html():
    page = render_grid(grid_summary())
    assert "<b>short</b>" not in page
    assert page.count("0.7010") >= 2
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    assert set(figures) == {"auc", "variants-0", "variants-1"}
    bars = {trace["name"]: trace["y"] for trace in figures["auc"]["data"]}
    assert bars["VM + KD + LoopFM"] == pytest.approx([0.701, 0.701])
    assert render_grid(grid_summary()) == page


def test_an_arm_of_ones_own_keeps_its_name_and_has_a_colour_of_its_own():
    figures = json.loads(
        re.search(r'id="figures">(.*?)</script>', render_grid(grid_summary()), re.DOTALL)[1]
    )
    colours = {t["name"]: t["marker"]["color"] for t in figures["auc"]["data"]}
    assert colours["own|arm"].startswith("#")
    assert colours["VM"] == "--model-vm"
    assert len(set(colours.values())) == 4


def test_both_files_are_written_and_a_summary_of_something_else_is_refused(tmp_path):
    page = build_grid_report(grid_summary(), tmp_path)
    assert page.read_text().startswith("<!doctype html>")
    assert (tmp_path / "results.md").read_text().startswith("**VM + KD + LoopFM over VM + KD")
    with pytest.raises(DataError, match="lacks"):
        build_grid_report({"name": "run"}, tmp_path)


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_charts_are_drawn_without_console_messages(chromium, tmp_path):
    page = build_grid_report(grid_summary(), tmp_path)
    dom, console = load(chromium, page, tmp_path, "--dump-dom")
    assert console == []
    for figure in ("auc", "variants-0", "variants-1"):
        part = dom.split(f'id="plot-{figure}"')[1].split("</figure>")[0]
        assert part.count('class="point') >= 8


def stream_summary():
    summary = grid_summary()
    arms = {"none": 0.0, "kd": 0.004, "kd_loopfm": 0.05, "own|arm": 0.01}
    return {
        **summary,
        "ne_gain_kd_loopfm_over_kd": 0.0461,
        "p_ne_gain_kd_loopfm_over_kd": 0.012,
        "max_p_ne_kd_loopfm_over_kd": 0.0004,
        "ne_gain_by_method": arms,
        "calibration_by_method": {arm: {"deepfm": 1.01, "din": 0.98} for arm in (*arms, "fm")},
        "ne_by_variant": {
            variant: {
                arm: {
                    "gain": times * gain,
                    "sd": 0.001,
                    "best_over": 0.05 - gain,
                    "p_best_over": 0.02,
                }
                for arm, gain in arms.items()
            }
            for times, variant in enumerate(
                dict.fromkeys(cell["variant"] for cell in summary["cells"]), 1
            )
        },
    }


def test_parts_of_the_test_window_that_nobody_measured_have_no_column():
    summary = grid_summary()
    assert "| Transfer ratio | first |\n" in render_markdown(summary)
    for cell in summary["cells"]:
        cell["slices"] = {}
    text = render_markdown(summary)
    assert "| p | Transfer ratio |\n" in text
    rows = [line for line in text.splitlines() if line.startswith(("| model", "| deepfm"))]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "short and long" not in render_grid(summary)


def test_a_stream_in_one_variant_has_no_table_of_variants():
    summary = stream_summary()
    summary["cells"] = [cell for cell in summary["cells"] if cell["variant"] == "main"]
    summary["ne_by_variant"] = {"main": summary["ne_by_variant"]["main"]}
    assert "over VM + KD (p)" not in render_markdown(summary)
    assert "gain-variants" not in render_grid(summary)


def test_a_stream_shows_its_gains_and_its_calibration():
    summary = stream_summary()
    assert headline(summary) == (
        "VM + KD + LoopFM over VM + KD: +4.61 % progressive NE, mean of 2 verticals (p 0.012 over the seeds), largest p of a"
        " vertical 4.0 × 10⁻⁴"
    )
    page = render_grid(summary)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    assert set(figures) == {"auc", "variants-0", "variants-1", "ne-gain", "calibration", "ne-variants", "gain-variants"}  # fmt: skip
    assert figures["ne-gain"]["data"][0]["x"] == pytest.approx([0.4, 5.0, 1.0])
    assert figures["ne-gain"]["data"][0]["text"] == ["+0.40 %", "+5.00 %", "+1.00 %"]
    assert [trace["name"] for trace in figures["calibration"]["data"]][-1] == "FM"
    assert "+4.61 %" in page
    text = render_markdown(summary)
    assert "| VM + KD + LoopFM | +5.00 % | 1.010 | 0.980 |" in text
    assert "| FM |  | 1.010 | 0.980 |" in text
    small = "0.02"
    assert f"| main | +0.40 % | +5.00 % | +1.00 % | +4.60 % ({small}) | +4.00 % ({small}) |" in text
    assert "| <b>short</b> | +0.80 % | +10.00 % | +2.00 % |" in text
    traces = {trace["name"]: trace for trace in figures["gain-variants"]["data"]}
    assert "VM" not in traces
    assert traces["VM + KD"]["y"] == pytest.approx([0.4, 0.8])
    assert traces["VM + KD"]["error_y"]["array"] == pytest.approx([0.1, 0.1])
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
