import json
import multiprocessing
import os
import signal
import time

import pytest

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.study import Outcome, open_study


def sweep(run_dir, **changed):
    tree = {
        "name": "s",
        "run_dir": str(run_dir),
        "base": {
            "data": {
                "kind": "synthetic",
                "split": {"fm_stop": "2024-01-08", "vm_stop": "2024-02-12"},
            }
        },
        "space": {
            "vm.kd_weight": {"kind": "float", "low": 0.0, "high": 2.0},
            "fm.bits": {"kind": "choice", "values": [4, 8]},
        },
        "budget": {"num_trials": 6},
        "sampler": {"kind": "random"},
    }
    return validate(SweepConfig, {**tree, **changed}, "the test")


def run(study, number=None):
    """Run trials to their end with NE = |kd_weight - 1| + bits / 100; return their numbers."""
    found = []
    while (number is None or len(found) < number) and (asked := study.ask()) is not None:
        ne = abs(asked.params["vm.kd_weight"] - 1) + asked.params["fm.bits"] / 100
        study.tell(asked.number, Outcome("complete", {"ne": ne, "auc": 1 - ne}, 0.5))
        found.append(asked.number)
    return found


def test_the_budget_ends_the_study(tmp_path):
    study = open_study(sweep(tmp_path))

    assert len(run(study)) == 6
    assert study.is_over
    assert [row.state for row in study.rows()] == ["complete"] * 6


def test_a_study_goes_on_where_it_stopped(tmp_path):
    first = open_study(sweep(tmp_path))
    run(first, 4)
    first.close()

    second = open_study(sweep(tmp_path))
    before = second.rows()
    run(second)

    assert len(before) == 4
    assert second.rows()[:4] == before
    assert len(second.rows()) == 6


def test_a_larger_budget_goes_on(tmp_path):
    study = open_study(sweep(tmp_path))
    run(study)
    study.close()

    more = open_study(sweep(tmp_path, budget={"num_trials": 8}))

    assert len(run(more)) == 2


def test_the_best_is_the_lowest_ne_and_every_params_counts_once(tmp_path):
    study = open_study(sweep(tmp_path, sampler={"kind": "grid"}, space=GRID))
    run_grid(study)

    rows = {row.number: row for row in study.rows()}
    ranked = study.ranked()

    assert study.best() == ranked[:1]
    assert [rows[number].values[0] for number in ranked] == sorted(
        rows[number].values[0] for number in ranked
    )


GRID = {
    "fm.bits": {"kind": "choice", "values": [2, 4, 8]},
    "history.max_len": {"kind": "int", "low": 5, "high": 6},
}


def run_grid(study):
    seen = []
    while (asked := study.ask()) is not None:
        seen.append(tuple(sorted(asked.params.items())))
        ne = asked.params["fm.bits"] / asked.params["history.max_len"]
        study.tell(asked.number, Outcome("complete", {"ne": ne}))
    return seen


def test_a_grid_meets_every_combination_once_and_ends(tmp_path):
    study = open_study(
        sweep(tmp_path, sampler={"kind": "grid"}, space=GRID, budget={"num_trials": 50})
    )

    seen = run_grid(study)

    assert len(seen) == len(set(seen)) == 6


def test_first_params_are_tried_first(tmp_path):
    config = sweep(tmp_path, first=[{"vm.kd_weight": 1.0, "fm.bits": 8}, {"vm.kd_weight": 0.25}])
    study = open_study(config)

    one, two = study.ask(), study.ask()

    assert one.params == {"vm.kd_weight": 1.0, "fm.bits": 8}
    assert two.params["vm.kd_weight"] == 0.25


def test_a_trial_beyond_a_constraint_is_never_the_best(tmp_path):
    config = sweep(tmp_path, constraints=[{"metric": "auc", "at_most": 0.5}])
    study = open_study(config)
    for ne, auc in [(0.1, 0.9), (0.4, 0.5), (0.2, 0.6), (0.6, 0.1)]:
        study.tell(study.ask().number, Outcome("complete", {"ne": ne, "auc": auc}))

    assert [row.is_feasible for row in study.rows()] == [False, True, False, True]
    assert study.best() == [1]


def test_a_constraint_that_was_not_measured_is_broken(tmp_path):
    study = open_study(sweep(tmp_path, constraints=[{"metric": "auc", "at_least": 0.5}]))
    study.tell(study.ask().number, Outcome("complete", {"ne": 0.1, "auc": None}))

    assert not study.rows()[0].is_feasible
    assert study.best() == []


def test_the_best_of_two_objectives_are_the_pareto_front(tmp_path):
    config = sweep(tmp_path, objectives=[{"metric": "ne"}, {"metric": "auc"}])
    study = open_study(config)
    points = [(0.1, 0.5), (0.2, 0.9), (0.3, 0.8), (0.1, 0.4), (0.05, 0.1)]
    for ne, auc in points:
        study.tell(study.ask().number, Outcome("complete", {"ne": ne, "auc": auc}))

    slow = [
        number
        for number, (ne, auc) in enumerate(points)
        if not any(other != (ne, auc) and other[0] <= ne and other[1] >= auc for other in points)
    ]
    assert sorted(study.best()) == slow == [0, 1, 4]


def test_a_pruned_trial_has_a_curve_and_no_values(tmp_path):
    study = open_study(sweep(tmp_path))
    number = study.ask().number
    study.report(number, 1, 0.9)
    study.report(number, 2, 0.8)
    study.tell(number, Outcome("pruned", seconds=1.5))

    (row,) = study.rows()

    assert (row.state, row.values, row.curve) == ("pruned", None, ((1, 0.9), (2, 0.8)))
    assert study.best() == []


def test_a_failed_trial_keeps_its_reason(tmp_path):
    study = open_study(sweep(tmp_path))
    study.tell(study.ask().number, Outcome("failed", reason="no memory"))

    assert [(row.state, row.reason) for row in study.rows()] == [("failed", "no memory")]


def test_an_objective_that_could_not_be_measured_is_a_failure(tmp_path):
    study = open_study(sweep(tmp_path))
    study.tell(study.ask().number, Outcome("complete", {"auc": 0.5}))

    assert study.rows()[0].reason == "['ne'] could not be measured"


def test_another_scheduler_is_told_the_curves_of_trials_before(tmp_path):
    first = open_study(sweep(tmp_path))
    number = first.ask().number
    first.report(number, 1, 0.9)
    first.tell(number, Outcome("complete", {"ne": 0.8}))
    first.close()

    assert open_study(sweep(tmp_path)).curves() == [(number, [(1, 0.9)])]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"space": {"fm.bits": {"kind": "choice", "values": [4, 8]}}}, "space"),
        ({"objectives": [{"metric": "auc"}]}, "objectives"),
        ({"objectives": [{"metric": "ne"}, {"metric": "auc"}]}, "objectives"),
        ({"seeds": [1]}, "seeds"),
        ({"set": {"vm.learning.epochs": 1}}, "set"),
    ],
)
def test_a_study_whose_settings_changed_is_refused_and_kept(tmp_path, changed, what):
    study = open_study(sweep(tmp_path))
    run(study)
    rows = study.rows()
    study.close()

    with pytest.raises(ConfigError, match=f"other {what}.*another `name`"):
        open_study(sweep(tmp_path, **changed))

    assert open_study(sweep(tmp_path)).rows() == rows


def test_what_runs_the_trials_may_change(tmp_path):
    study = open_study(sweep(tmp_path))
    run(study)
    study.close()

    changed = {"sampler": {"kind": "tpe"}, "scheduler": {}, "budget": {"num_trials": 7}}
    assert len(run(open_study(sweep(tmp_path, **changed)))) == 1


def test_storage_that_can_not_be_opened_is_one_error_without_its_password(tmp_path):
    config = sweep(tmp_path, storage="postgresql://me:secret@127.0.0.1:1/none")

    with pytest.raises(StoreError, match="can not be opened") as caught:
        open_study(config)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("storage", ["journal.log", "sqlite:///{}/study.db"])
def test_a_study_may_lie_elsewhere(tmp_path, storage):
    address = storage.format(tmp_path) if "://" in storage else str(tmp_path / storage)
    study = open_study(sweep(tmp_path / "runs", storage=address))
    run(study, 3)
    study.close()

    assert len(open_study(sweep(tmp_path / "runs", storage=address)).rows()) == 3


def _work(run_dir, ready):
    study = open_study(sweep(run_dir, budget={"num_trials": 40}))
    run(study, 3)
    for _ in range(2):
        asked = study.ask()
        study.report(asked.number, 1, 0.5)
    ready.set()
    time.sleep(60)


def test_trials_of_a_driver_that_was_killed_are_tried_again(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    driver = context.Process(target=_work, args=(tmp_path, ready))
    driver.start()
    assert ready.wait(30)
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()

    study = open_study(sweep(tmp_path, budget={"num_trials": 40}))
    lost = [trial for trial in study._study.trials if trial.user_attrs.get("is_counted") is False]
    again = [study.ask(), study.ask()]

    assert len(study.rows()) == 3  # what was lost does not count against the budget
    assert len(lost) == 2
    assert [one.params for one in again] == [trial.params for trial in lost]


def test_trials_of_a_driver_that_lives_are_left_alone(tmp_path):
    first = open_study(sweep(tmp_path))
    held = first.ask()

    second = open_study(sweep(tmp_path))
    run(second)

    assert not second.is_alone
    assert held.number not in [row.number for row in second.rows()]
    assert len(second.rows()) == 5  # the sixth is the other driver's
    first.tell(held.number, Outcome("complete", {"ne": 0.5}))
    assert len(second.rows()) == 6
    first.close()
    assert second.is_alone


def test_params_that_are_lost_again_and_again_are_given_up(tmp_path):
    asked = []
    for _ in range(5):
        study = open_study(sweep(tmp_path))
        asked.append(study.ask())
        study._lock.close()  # as if its process had died

    study = open_study(sweep(tmp_path))

    assert asked[0].params == asked[1].params == asked[2].params == asked[3].params
    assert asked[4].params != asked[0].params
    (row,) = study.rows()
    assert row.state == "failed"
    assert "stopped 4 times" in row.reason


def test_time_of_all_commands_counts(tmp_path):
    config = sweep(tmp_path, budget={"num_trials": 50, "time_s": 0.4})
    first = open_study(config)
    time.sleep(0.25)
    assert not first.is_over
    first.close()

    second = open_study(config)
    time.sleep(0.2)

    assert second.used_s >= 0.4
    assert second.is_over
    assert second.ask() is None


def test_importance_finds_what_matters(tmp_path):
    study = open_study(sweep(tmp_path, budget={"num_trials": 60}))
    run(study)

    shares = study.importance()["ne"]

    assert shares["vm.kd_weight"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)


def test_rows_are_json(tmp_path):
    study = open_study(sweep(tmp_path))
    run(study, 1)

    assert json.loads(json.dumps(study.rows()[0].metrics)) == study.rows()[0].metrics
