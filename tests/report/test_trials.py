import pytest

from loopfm_ray.errors import DataError
from loopfm_ray.report import trials, words
from tests.report.sweep_example import LR, example_sweep


def test_short_names_are_two_parts_or_as_many_as_tell_them_apart():
    paths = ["vm.learning.optim.lr", "fm.learning.optim.lr", "vm.model.kind", "seed", "b.model.kind"]  # fmt: skip
    assert list(trials.short_names(paths).values()) == [
        "vm.learning.optim.lr",
        "fm.learning.optim.lr",
        "vm.model.kind",
        "seed",
        "b.model.kind",
    ]
    assert trials.short_names([LR, "optim.lr", "xoptim.lr"]) == {
        LR: "learning.optim.lr",
        "optim.lr": "optim.lr",
        "xoptim.lr": "xoptim.lr",
    }


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("ne", 0.87214, "0.8721"),
        ("ne", 0, "0.0000"),
        ("loss", 2.4e-7, "2.4 × 10⁻⁷"),
        ("fm_num_parameters", 1_280_000, "1,280,000"),
        ("num_rows", 12345.0, "12,345"),
        ("train_rows_per_s", 51_000.4, "51,000"),
        ("serving_p99_ms", 1.456, "1.46 ms"),
        ("train_s", 90, "1.5 min"),
        ("model_bytes", 2_500_000, "2.5 MB"),
        ("transfer_ratio", 0.462, "46.2 %"),
        ("transfer_ratio", None, words.MISSING),
        ("ne", float("nan"), words.MISSING),
        ("ne", True, words.MISSING),
    ],
)
def test_metrics_are_shown_with_the_unit_that_closes_their_name(metric, value, text):
    assert trials.show_metric(metric, value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("dnn", "dnn"),
        (0.00103051, "0.001031"),
        (64, "64"),
        (True, "true"),
        (None, "null"),
        ([128, 64], "[128, 64]"),
        ({"kind": "sum", "a": 1}, '{"a": 1, "kind": "sum"}'),
    ],
)
def test_any_value_of_a_parameter_has_a_text(value, text):
    assert trials.show_value(value) == text


def test_long_texts_are_cut():
    assert trials.cut("x" * 28) == "x" * 28
    assert trials.cut("x" * 29) == "x" * 27 + "…"


def test_the_best_of_a_single_objective_come_first_and_meet_the_constraints():
    summary = example_sweep()
    found = trials.best_trials(summary)
    values = [trial["values"][0] for trial in found]
    assert len(found) == 10
    assert values == sorted(values)
    assert found[0]["number"] == summary["best"][0]
    assert all(trial["is_feasible"] and trial["state"] == "complete" for trial in found)


def test_a_maximised_objective_turns_the_order():
    summary = example_sweep()
    summary["objectives"] = [{"metric": "auc", "direction": "maximize"}]
    for trial in summary["trials"]:
        trial["values"] = trial["values"] and [trial["metrics"]["auc"]]
    values = [trial["values"][0] for trial in trials.best_trials(summary)]
    assert values == sorted(values, reverse=True)
    assert "Objective: higher is better." in trials.metric_definition("auc", summary)


def test_the_front_is_shown_whole_and_alone():
    summary = example_sweep(2)
    assert sorted(trial["number"] for trial in trials.best_trials(summary)) == sorted(summary["best"])  # fmt: skip


def test_kinds_are_told_apart():
    summary = example_sweep()
    kinds = {kind: [t["number"] for t in trials.of_kind(summary, kind)] for kind in trials.KINDS}
    assert kinds["best"] == summary["best"] == [19]
    assert kinds["infeasible"] == [9, 16]
    assert kinds["pruned"] == [4, 7, 11, 18, 20]
    assert kinds["failed"] == [13]
    assert sum(len(numbers) for numbers in kinds.values()) == 24


def test_headline_of_one_objective_holds_its_value_and_what_confirms_it():
    summary = example_sweep()
    assert trials.headline(summary) == (
        "Trial 19 is the best of 18 complete trials: NE 0.8716; +1.23 % AUC over base (3 seeds, test split, p 0.004)"
    )
    summary["confirmed"]["configs"] = summary["confirmed"]["configs"][:1]
    assert trials.headline(summary).endswith("NE 0.8716")
    summary["confirmed"] = None
    assert trials.headline(summary).endswith("NE 0.8716")


def test_headline_of_two_objectives_counts_the_front():
    assert trials.headline(example_sweep(2)) == (
        "5 of 18 complete trials are on the Pareto front of NE and serving_p99_ms; "
        "1 of 2 that were confirmed beats base in AUC (3 seeds, test split)"
    )


def test_headline_admits_that_nothing_was_found():
    summary = example_sweep()
    summary["best"] = []
    for trial in summary["trials"]:
        trial["is_feasible"] = False
    assert trials.headline(summary) == "None of 18 complete trials meets the constraints"
    summary["num_trials"] = {"complete": 0, "pruned": 2, "failed": 1}
    assert trials.headline(summary) == "No trial is complete: 0 complete, 2 pruned, 1 failed"


def test_a_bound_is_shown_with_its_unit():
    bound = {"metric": "transfer_ratio", "at_least": 0.2, "at_most": 1}
    assert trials.limit(bound) == "Transfer ratio at least 20.0 % and at most 100.0 %"
    summary = example_sweep()
    assert trials.metric_definition("serving_p99_ms", summary).endswith(
        "Constraint: serving_p99_ms at most 2.00 ms."
    )


@pytest.mark.parametrize("name", ["name", "objectives", "trials", "best", "code_versions"])
def test_a_summary_of_something_else_is_refused(name):
    summary = example_sweep()
    del summary[name]
    with pytest.raises(DataError, match=rf"lacks \['{name}'\]"):
        trials.check_sweep(summary)


def test_a_sweep_without_an_objective_is_refused():
    with pytest.raises(DataError, match="no objective"):
        trials.check_sweep({**example_sweep(), "objectives": []})
