"""An experiment on graphs: each training once, teachers first, what is finished kept, and figures that are those of the records."""

import json
import statistics

import pytest
from safetensors.torch import load_file

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, DataError, StoreError
from loopfm_ray.jobs import kge_experiment as job
from loopfm_ray.jobs.kge_experiment import run_kge_experiment
from loopfm_ray.kge import experiment, runner
from loopfm_ray.kge.compare import compare_cells, summarise_kge
from loopfm_ray.kge.experiment import (
    KgeExperimentConfig,
    plan_cells,
    read_cell_record,
    run_cell,
    teacher_of,
    waves,
)
from loopfm_ray.report.kge import build_kge_report, headline, render_kge, render_markdown
from tests.kge.test_training import ring
from tests.report.test_browser import load

TAUGHT = {"distillation": {"memory": {"kind": "teacher"}, "begin_epoch": 0, "ramp_epochs": 1}}
ARMS = {
    "plain": {},
    "csd": {"train": {"distillation": {"begin_epoch": 1}}},
    "kd": {"teachers": [16], "train": TAUGHT},
    "chain": {"teachers": [16, 8], "train": TAUGHT},
    "wide": {"dimension": 16},
}


@pytest.fixture
def graph(tmp_path):
    """The ring, in files."""
    found, folder = ring(), tmp_path / "ring"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        lines = [
            f"{found.entities[h]}\t{found.relations[r]}\t{found.entities[t]}\n"
            for h, r, t in found.split(split)
        ]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def config_of(graph, arms=None, **changes):
    model = {
        "graph": str(graph),
        "seeds": [0, 1],
        "backbone": {"kind": "complex", "dimension": 4},
        "train": {"batch_size": 32, "epochs": 4, "eval_every": 2},
    }
    tree = {
        "name": "small",
        "run_dir": str(graph.parent / "runs"),
        "models": {"ring": model},
        "arms": arms or ARMS,
        "roles": {"plain": "plain", "best": "csd", "wide": "wide"},
        **changes,
    }
    return validate(KgeExperimentConfig, tree, "test")


def test_every_training_comes_once_and_after_its_teacher(graph):
    done, keys = set(), []
    for wave in waves(plan_cells(config_of(graph))):
        for cell in wave:
            source = teacher_of(cell)
            assert source is None or source.key in done
            keys.append(cell.key)
        done.update(cell.key for cell in wave)
    assert len(keys) == len(set(keys))
    # plain, csd, wide (which teaches), kd, the chain's second teacher, chain: six for each of two seeds
    assert len(keys) == 12


def test_cells_of_a_chain_have_the_dimensions_of_the_config(graph):
    cell = next(cell for cell in plan_cells(config_of(graph)) if cell.arm == "chain")
    second = teacher_of(cell)
    first = teacher_of(second)
    assert [one.backbone.dimension for one in (first, second, cell)] == [16, 8, 4]
    assert first.train.distillation is None
    assert second.train.distillation.memory.kind == "teacher"
    assert teacher_of(first) is None
    wide = next(cell for cell in plan_cells(config_of(graph)) if cell.arm == "wide")
    assert first.key == wide.key


def test_a_key_follows_the_graphs_content_and_the_config(graph):
    def keys(**changes):
        experiment._digest.cache_clear()
        return [cell.key for cell in plan_cells(config_of(graph, **changes))]

    before = keys()
    assert keys() == before
    lines = (graph / "train.txt").read_text().splitlines(keepends=True)
    (graph / "train.txt").write_text("".join(reversed(lines)))
    assert keys() == before  # the same triples
    (graph / "train.txt").write_text("".join(lines[1:]))
    assert not set(keys()) & set(before)
    experiment._digest.cache_clear()


def test_a_finished_cell_is_not_trained_again_and_a_lost_teacher_is(graph, monkeypatch):
    cell = next(cell for cell in plan_cells(config_of(graph)) if cell.arm == "kd")
    record = run_cell(cell)
    weights = load_file(teacher_of(cell).weights_path)
    assert record["teacher_train_s"] > 0
    trainings = []
    real = runner.train_kge

    def train(*args, **kwargs):
        trainings.append(args[1].dimension)
        return real(*args, **kwargs)

    monkeypatch.setattr(runner, "train_kge", train)
    assert run_cell(cell) == record
    assert trainings == []
    cell.record_path.unlink()
    teacher_of(cell).weights_path.unlink()
    again = run_cell(cell)
    assert trainings == [16, 4]
    assert again["test"] == record["test"]
    found = load_file(teacher_of(cell).weights_path)
    assert all((found[name] == value).all() for name, value in weights.items())
    assert not list((cell.root / "checkpoints").iterdir())


def test_a_killed_cell_goes_on_from_its_checkpoint(graph, monkeypatch):
    cell = next(cell for cell in plan_cells(config_of(graph)) if cell.arm == "csd")
    whole = run_cell(cell)
    cell.record_path.unlink()
    real, epochs = runner.train_kge, []

    def cut(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "train_kge", lambda *a, **k: real(*a, **{**k, "on_epoch": cut}))
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell)
    assert read_cell_record(cell) is None
    hook = {"on_epoch": lambda epoch, loss: epochs.append(epoch)}
    monkeypatch.setattr(runner, "train_kge", lambda *a, **k: real(*a, **{**k, **hook}))
    again = run_cell(cell)
    assert epochs == [3, 4]
    assert {**again, "curve": 0, "train_s": 0, "train_s_to_best": 0} == {
        **whole,
        "curve": 0,
        "train_s": 0,
        "train_s_to_best": 0,
    }


def record_of(seed, mrr, train_s=10.0):
    names = ("hits_at_1", "hits_at_3", "hits_at_10", "adjusted_mean_rank")
    return {
        "seed": seed,
        "test": {"mrr": mrr, **dict.fromkeys(names, mrr)},
        "valid_mrr": mrr,
        "best_epoch": 5,
        "num_parameters": 100,
        "train_s": train_s,
        "train_s_to_best": train_s / 2,
        "teacher_train_s": 0.0,
    }


def records_of(shifts):
    return {
        arm: [record_of(seed, 0.3 + seed / 100 + shift, 10.0 + shift) for seed in (0, 1, 2)]
        for arm, shift in shifts.items()
    }


def test_the_comparison_is_that_of_the_records():
    records = records_of({"plain": 0.0, "csd": 0.02, "wide": 0.08})
    records["csd"][0]["test"]["mrr"] += 0.001
    cells = {cell["arm"]: cell for cell in compare_cells("m", records, "plain", "wide")}
    assert "vs_plain" not in cells["plain"]
    found = cells["csd"]["vs_plain"]
    gain = statistics.fmean([0.021, 0.02, 0.02])
    assert found["mrr"]["mean"] == pytest.approx(gain)
    assert found["mrr_relative"] == pytest.approx(gain / 0.31)
    assert found["gap_recovered"] == pytest.approx(gain / 0.08)
    assert found["train_s_ratio"] == pytest.approx(1.002)
    assert found["mrr"]["p"] < 0.01
    behind = compare_cells(
        "m", records_of({"plain": 0.0, "csd": 0.02, "wide": -0.01}), "plain", "wide"
    )
    assert behind[1]["vs_plain"]["gap_recovered"] is None


def small_summary():
    shifts = {"plain": 0.0, "csd": 0.02, "wide": 0.08}
    cells = [
        cell
        for name in ("complex", "<b>rote</b>")
        for cell in compare_cells(name, records_of(shifts), "plain", "wide")
    ]
    return {
        "name": "graphs",
        "share_of_cells_better": 1.0,
        "share_of_cells_significantly_better": 0.5,
        "mean_relative_mrr_gain": 0.0645,
        "gap_recovered": 0.25,
        "roles": {"plain": "plain", "best": "csd", "wide": "wide"},
        "num_unfinished_cells": 3,
        "cells": cells,
        "config": {"models": {}},
    }


def test_the_page_and_the_table_tell_the_same(tmp_path):
    summary = small_summary()
    assert headline(summary) == (
        "csd over plain: +6.5 % MRR, better in 100 % of the models, p < 0.05 in 50 %"
    )
    text = render_markdown(summary)
    assert "| complex | csd | 0.3300 ± 0.0100 | +6.5 % |" in text
    page = render_kge(summary)
    assert "<b>rote</b>" not in page
    assert "3 trainings not finished" in page
    assert build_kge_report(summary, tmp_path).read_text() == page
    with pytest.raises(DataError, match="lacks \\['cells'\\]"):
        render_kge({name: value for name, value in summary.items() if name != "cells"})


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_a_browser_draws_the_page_without_a_complaint(chromium, tmp_path):
    page = build_kge_report(small_summary(), tmp_path)
    dom, console = load(chromium, page, tmp_path, "--dump-dom")
    assert console == []
    assert "+6.5 % MRR" in dom
    assert dom.split('id="plot-mrr"')[1].split("</figure>")[0].count('class="point') >= 6


def test_what_does_not_go_together_is_refused(graph):
    with pytest.raises(ConfigError, match=r"roles\.best is 'csd'"):
        config_of(graph, arms={"plain": {}, "wide": {"dimension": 16}})
    with pytest.raises(ConfigError, match="a chain of teachers"):
        config_of(graph, arms={**ARMS, "kd": {"teachers": [16]}})
    with pytest.raises(ConfigError, match="a chain of teachers"):
        config_of(graph, arms={**ARMS, "kd": {"train": TAUGHT}})
    with pytest.raises(ConfigError, match="model ring, arm plain"):
        config_of(graph, arms={**ARMS, "plain": {"train": {"lr": -1}}})
    with pytest.raises(StoreError, match="no model of"):
        summarise_kge(config_of(graph))


def test_finished_cells_of_a_summary_are_taken_over(graph, monkeypatch, tmp_path):
    """A summary that was made elsewhere stands for its cells; nothing is trained, and Ray is not started."""
    config = config_of(graph)
    for cell in plan_cells(config):
        run_cell(cell)
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(summarise_kge(config)))
    elsewhere = config_of(graph, run_dir=str(tmp_path / "elsewhere"))
    monkeypatch.setattr(job, "connect", lambda _: pytest.fail("Ray was started"))
    found = run_kge_experiment(elsewhere, merge=[summary])
    assert found["cells"] == json.loads(summary.read_text())["cells"]
    assert (elsewhere.root / "report.html").is_file()
    summary.write_text("{}")
    with pytest.raises(ConfigError, match="not a summary of an experiment on knowledge graph"):
        run_kge_experiment(elsewhere, merge=[summary])
