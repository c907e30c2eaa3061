from pathlib import Path

import pytest
import yaml

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError
from loopfm_ray.sweep.config import Constraint, Objective, SweepConfig, load_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"


def sweep(**changed):
    tree = {
        "name": "s",
        "base": {
            "data": {
                "kind": "synthetic",
                "split": {"fm_stop": "2024-01-08", "vm_stop": "2024-02-12"},
            }
        },
        "space": {"vm.kd_weight": {"kind": "float", "low": 0.0, "high": 2.0}},
    }
    return validate(SweepConfig, {**tree, **changed}, "the test")


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_that_ships_loads(path):
    config = load_sweep(path)

    assert config.name == path.stem
    assert config.objectives


def test_params_reach_the_tuned_vm_alone():
    pipeline = sweep().pipeline({"vm.kd_weight": 0.5})

    assert pipeline.vms["vm_kd_loopfm"].kd_weight == 0.5
    assert pipeline.vms["vm_kd"].kd_weight == 1.0
    assert pipeline.vms["vm"].kd_weight == 0.0
    assert set(pipeline.vms) == {"vm", "vm_kd", "vm_kd_loopfm"}
    assert pipeline.online.model == "vm_kd_loopfm"


def test_params_reach_every_other_part():
    space = {
        "fm.bits": {"kind": "choice", "values": [4, 8]},
        "history.max_len": {"kind": "int", "low": 5, "high": 50},
    }

    pipeline = sweep(space=space).pipeline({"fm.bits": 8, "history.max_len": 7})

    assert pipeline.fm.bits == 8
    assert pipeline.history.max_len == 7


def test_set_comes_before_the_params():
    config = sweep(set={"vm.kd_weight": 3.0, "vm.learning.batch_rows": 64})

    assert config.pipeline({}).vms["vm_kd_loopfm"].kd_weight == 3.0
    assert config.pipeline({"vm.kd_weight": 0.5}).vms["vm_kd_loopfm"].kd_weight == 0.5
    assert config.pipeline({}).vms["vm_kd_loopfm"].learning.batch_rows == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {"vm.kd_wait": {"kind": "float", "low": 0, "high": 1}}}, "kd_wait"),
        (
            {"space": {"fm.bits": {"kind": "int", "low": 4, "high": 99}}},
            r"space\.fm\.bits does not fit at 99",
        ),
        ({"space": {}}, "space is empty"),
        ({"vm": "nobody"}, "which is not among vms"),
        ({"objectives": [{"metric": "nE"}]}, "there is no metric 'nE'"),
        ({"objectives": [{"metric": "ne"}, {"metric": "ne"}]}, "objectives must differ"),
        ({"record": ["mrr"]}, "there is no metric 'mrr'"),
        ({"first": [{"vm.lr": 1}]}, r"first names \['vm.lr'\]"),
        ({"scaling": [{"x": "size", "y": "ne"}]}, r"scaling names \['size'\]"),
        ({"sampler": {"kind": "grid"}}, "a grid takes choices"),
        ({"budget": {"num_trials": 0}}, "budget.num_trials"),
        ({"set": {"vm.learning.num_workers": 2}}, "a trial trains its VM on one core"),
        ({"base": {"kind": "kge"}, "confirm": {}}, "confirm and several seeds are of a pipeline"),
    ],
)
def test_a_sweep_that_can_not_run_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**changed)


def test_a_missing_base_is_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": "gone.yaml", "space": {}}))

    with pytest.raises(ConfigError, match=r"gone\.yaml can not be read"):
        load_sweep(path)


def test_a_base_may_be_a_config_of_the_package(tmp_path):
    path = tmp_path / "s.yaml"
    space = {"vm.kd_weight": {"kind": "float", "low": 0.0, "high": 2.0}}
    path.write_text(yaml.safe_dump({"name": "s", "base": "synthetic", "space": space}))

    assert load_sweep(path).pipeline({}).data.kind == "synthetic"


def test_overrides_reach_into_a_sweep(tmp_path):
    path = tmp_path / "s.yaml"
    space = {"vm.kd_weight": {"kind": "float", "low": 0.0, "high": 2.0}}
    path.write_text(yaml.safe_dump({"name": "s", "base": "synthetic", "space": space}))

    config = load_sweep(path, ["budget.num_trials=3", "set={data.num_rows: 5000}"])

    assert config.budget.num_trials == 3
    assert config.pipeline({}).data.num_rows == 5000


@pytest.mark.parametrize(
    ("metric", "direction", "is_maximized"),
    [
        ("ne", None, False),
        ("auc", None, True),
        ("transfer_ratio", None, True),
        ("auc", "minimize", False),
        ("num_parameters", "maximize", True),
    ],
)
def test_a_metric_knows_what_is_better(metric, direction, is_maximized):
    assert Objective(metric=metric, direction=direction).is_maximized == is_maximized


def test_a_constraint_tells_by_how_much_it_is_broken():
    limit = Constraint(metric="m", at_least=1.0, at_most=3.0)

    assert limit.excess(2.0) <= 0
    assert limit.excess(3.0) == 0
    assert limit.excess(3.5) == 0.5
    assert limit.excess(0.25) == 0.75


@pytest.mark.parametrize(
    ("changed", "message"),
    [({}, "needs at_most, at_least or both"), ({"at_least": 2, "at_most": 1}, "can not be kept")],
)
def test_a_constraint_that_says_nothing_or_can_not_be_kept_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Constraint(metric="m", **changed)
