"""The confirmation of a sweep, with stages that train nothing."""

import pytest

from loopfm_ray.config import load_config, validate
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs import sweep_confirm
from loopfm_ray.jobs.evaluate import EvaluationRecord, write_record
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.jobs.stages import evaluation_path
from loopfm_ray.jobs.sweep_confirm import confirm
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
        "space": {"vm.kd_weight": {"kind": "float", "low": 0.0, "high": 2.0}},
        "first": [{"vm.kd_weight": weight} for weight in (0.1, 0.2, 0.3, 0.4)],
        "budget": {"num_trials": 4},
        "confirm": {"top": 2, "seeds": [5, 6, 7]},
    }
    return validate(SweepConfig, {**tree, **changed}, "the test")


@pytest.fixture
def seen(monkeypatch):
    """Stages that do nothing but for an evaluation whose AUC follows from weight and seed; the pipelines they saw."""
    pipelines = []

    def evaluate(context):
        config = context.config
        pipelines.append(config)
        (name,) = config.vms
        for seed in config.seeds:
            auc = (
                0.6
                + 0.1 * config.vms[name].kd_weight
                + 0.001 * seed * (1 + config.vms[name].kd_weight)
            )
            test = {"ne": 1.5 - auc, "auc": auc}
            record = EvaluationRecord(name, seed, test, test, [], 1, 1, 1.0, 1.0)
            path = evaluation_path(config, seed, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_record(record, path)

    stages = {name: lambda context: None for name in sweep_confirm._STAGES}
    monkeypatch.setattr(sweep_confirm, "STAGES", {**stages, "evaluate": evaluate})
    return pipelines


def searched(config):
    study = open_study(config)
    while (asked := study.ask()) is not None:
        study.tell(
            asked.number, Outcome("complete", {"ne": 1 - asked.params["vm.kd_weight"], "auc": 0.5})
        )
    return study


def test_the_best_and_the_base_are_compared_under_fresh_seeds(tmp_path, seen):
    config = sweep(tmp_path)

    found = confirm(config, searched(config), silent)

    assert [one["name"] for one in found["configs"]] == ["base", "trial 3", "trial 2"]
    assert [pipeline.seeds for pipeline in seen] == [(5, 6, 7)] * 3
    weights = [pipeline.vms["vm_kd_loopfm"].kd_weight for pipeline in seen]
    assert weights == [1.0, 0.4, 0.3]
    base, first, _ = found["configs"]
    assert base["p"] is None
    assert base["gain"] is None
    assert base["mean"]["auc"] == pytest.approx(0.6 + 0.1 + 0.006 * 2)
    assert first["mean"]["auc"] == pytest.approx(0.6 + 0.04 + 0.006 * 1.4)
    assert first["gain"] == pytest.approx(first["mean"]["auc"] / base["mean"]["auc"] - 1)
    assert 0 < first["p"] < 0.05
    assert first["file"] == "best/trial-3.yaml"
    runs = load_config(PipelineConfig, config.root / first["file"])
    assert runs.vms["vm_kd_loopfm"].kd_weight == 0.4


def test_the_test_window_is_looked_at_once(tmp_path, seen):
    config = sweep(tmp_path)
    found = confirm(config, searched(config), silent)
    more = sweep(tmp_path, budget={"num_trials": 6})

    again = confirm(more, searched(more), silent)

    assert again == found
    assert found["after_trials"] == 4
    assert len(seen) == 3


def test_nothing_is_looked_at_unless_it_is_asked_for(tmp_path, seen):
    config = sweep(tmp_path, confirm=None)

    assert confirm(config, searched(config), silent) is None
    assert seen == []


def test_of_a_front_the_best_first_objective_comes_first(tmp_path, seen):
    config = sweep(tmp_path, objectives=[{"metric": "ne"}, {"metric": "num_parameters"}])
    study = open_study(config)
    for ne, size in [(0.9, 1.0), (0.5, 3.0), (0.6, 4.0), (0.7, 2.0)]:
        metrics = {"ne": ne, "num_parameters": size}
        study.tell(study.ask().number, Outcome("complete", metrics))

    found = confirm(config, study, silent)

    assert [one["trial"] for one in found["configs"]] == [None, 1, 3]
