"""What Tune tells the study, without a cluster."""

import json
from types import SimpleNamespace

import pytest

from loopfm_ray.config import validate
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.jobs.sweep import StudySearch, make_scheduler
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.study import Outcome, open_study


def sweep(run_dir, **changed):
    tree = {
        "name": "s",
        "run_dir": str(run_dir),
        "base": {"kind": "kge", "name": "g", "graph": {"kind": "splits", "path": "."}},
        "space": {"train.lr": {"kind": "float", "low": 0.1, "high": 0.5}},
        "objectives": [{"metric": "mrr"}],
        "sampler": {"kind": "random"},
        "budget": {"num_trials": 40},
    }
    return validate(SweepConfig, {**tree, **changed}, "the test")


def ended(mrr, state="complete"):
    return {
        "ended": json.dumps(
            {"state": state, "metrics": {"mrr": mrr}, "seconds": 2.0, "reason": None}
        )
    }


def test_a_trial_goes_from_the_study_to_tune_and_back(tmp_path):
    study = open_study(sweep(tmp_path))
    search = StudySearch(study, silent)

    asked = search.suggest("a")
    search.on_trial_result("a", {"rung": 1, "value": 0.2})
    search.on_trial_result("a", {"rung": 2, "value": 0.3})
    search.on_trial_complete("a", ended(0.4))

    (row,) = study.rows()
    assert row.params == asked["params"]
    assert (row.state, row.values, row.seconds) == ("complete", (0.4,), 2.0)
    assert row.curve == ((1, 0.2), (2, 0.3))


def test_a_trial_whose_process_died_is_a_failure_that_says_so(tmp_path):
    study = open_study(sweep(tmp_path))
    search = StudySearch(study, silent)
    search.suggest("a")

    search.on_trial_complete("a", {"rung": 1, "value": 0.2}, error=True)

    (row,) = study.rows()
    assert row.state == "failed"
    assert "its process died" in row.reason


def test_no_further_trial_is_tried_when_the_first_ones_all_fail(tmp_path):
    search = StudySearch(open_study(sweep(tmp_path)), silent)
    names = iter("abcdefgh")
    for name in (next(names) for _ in range(5)):
        assert search.suggest(name) != "FINISHED"
        search.on_trial_complete(name, {}, error=True)

    assert search.suggest(next(names)) == "FINISHED"


def test_failures_after_a_success_end_nothing(tmp_path):
    search = StudySearch(open_study(sweep(tmp_path)), silent)
    search.suggest("a")
    search.on_trial_complete("a", ended(0.4))
    for name in "bcdefgh":
        search.suggest(name)
        search.on_trial_complete(name, {}, error=True)

    assert search.suggest("i") != "FINISHED"


def halve(config, values):
    """Run trials that report each of their values as a rung; return the number of rungs of each."""
    study = open_study(config)
    search = StudySearch(study, silent)
    scheduler = make_scheduler(config, study, search)
    lengths = []
    for place, curve in enumerate(values):
        trial = SimpleNamespace(trial_id=f"t{place}-{len(study.rows())}")
        search.suggest(trial.trial_id)
        scheduler.on_trial_add(None, trial)
        length = 0
        for rung, value in enumerate(curve, 1):
            length, result = rung, {"rung": rung, "value": value}
            search.on_trial_result(trial.trial_id, result)
            if scheduler.on_trial_result(None, trial, result) == "STOP":
                search.on_trial_complete(trial.trial_id, result)
                break
        else:
            search.on_trial_complete(trial.trial_id, ended(curve[-1]))
        lengths.append(length)
    rows = study.rows()
    study.close()
    return lengths, rows


@pytest.mark.parametrize("objectives", [["mrr"], ["mrr", "train_s"]])
def test_halving_ends_what_is_worse_than_half_at_a_rung(tmp_path, objectives):
    config = sweep(
        tmp_path,
        scheduler={"grace": 1, "reduction_factor": 2},
        objectives=[{"metric": name} for name in objectives],
    )
    values = [[0.5] * 6, [0.6] * 6, [0.1] * 6, [0.7] * 6, [0.2] * 6]

    lengths, rows = halve(config, values)

    assert lengths == [6, 6, 1, 6, 1]
    assert [row.state for row in rows if len(row.curve) == 1] == ["pruned", "pruned"]


def test_halving_knows_the_trials_of_drivers_before(tmp_path):
    config = sweep(tmp_path, scheduler={"grace": 1, "reduction_factor": 2})
    halve(config, [[0.5] * 4, [0.6] * 4])

    lengths, _ = halve(config, [[0.1] * 4])

    assert lengths == [1]


def test_a_lower_value_is_better_where_the_objective_is_minimized(tmp_path):
    config = sweep(tmp_path, scheduler={}, objectives=[{"metric": "train_s"}])

    lengths, _ = halve(config, [[0.5] * 4, [0.6] * 4, [0.1] * 4])

    assert lengths[1] == 1


def test_outcomes_survive_the_way_through_tune():
    outcome = Outcome("failed", {"ne": None}, 1.5, "why")

    assert Outcome(**json.loads(json.dumps(vars(outcome)))) == outcome
