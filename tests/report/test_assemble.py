import pytest

from loopfm_ray.report.assemble import assemble_models, seed_models


def record(name, ne, auc, seed=0, **more):
    test = {
        "ne": ne,
        "auc": auc,
        "gauc": auc,
        "gauc_share": 1.0,
        "logloss": ne / 2,
        "calibration": 1.0,
    }
    return {
        "name": name,
        "seed": seed,
        "test": {**test, **more},
        "valid": test,
        "num_parameters": 10,
        "num_bytes": 40,
        "train_rows_per_s": 100.0,
        "seconds": 2.0,
    }


def models(seed=0, shift=0.0):
    return [
        record("fm", 0.75 + shift, 0.80, seed),
        record("vm", 0.95 + shift, 0.60, seed),
        record("vm_kd", 0.94 + shift, 0.61, seed),
        record("vm_kd_loopfm", 0.90 + shift, 0.66, seed),
    ]


def test_transfer_ratio_is_the_share_of_the_fms_lead():
    ratios = seed_models(models(), "vm")["transfer_ratio"]
    assert ratios == pytest.approx({"vm_kd": 0.05, "vm_kd_loopfm": 0.25})


def test_a_ratio_without_a_lead_is_undefined_and_not_zero():
    rows = [record("fm", 0.96, 0.5), *models()[1:]]
    assert seed_models(rows, "vm")["transfer_ratio"] == {"vm_kd": None, "vm_kd_loopfm": None}


def test_figures_are_means_over_seeds_with_their_spread():
    summary = assemble_models({0: models(0), 1: models(1, 0.02)}, "vm", "vm_kd", "vm_kd_loopfm")
    assert summary["models"]["vm"]["test"]["ne"] == pytest.approx(0.96)
    assert summary["models"]["vm"]["test_sd"]["ne"] == pytest.approx(0.02 / 2**0.5)
    assert summary["gain"]["vm_kd_loopfm"]["ne"] == pytest.approx(0.05)
    assert summary["gain"]["vm_kd_loopfm"]["auc_relative"] == pytest.approx(0.1)
    assert summary["relative_auc_gain_over_kd"] == pytest.approx(0.66 / 0.61 - 1)
    assert summary["transfer_ratio"]["vm_kd_loopfm"] == pytest.approx(0.25)
    assert summary["per_seed"]["1"]["models"]["vm"]["test"]["ne"] == pytest.approx(0.97)
    assert "vm" not in summary["gain"]


def test_one_seed_has_no_spread():
    summary = assemble_models({0: models()}, "vm", "vm_kd", "vm_kd_loopfm")
    assert summary["models"]["vm"]["test_sd"] == {}
    assert summary["transfer_ratio_kind"] == "first launch, baseline vm"


def test_a_metric_that_one_seed_lacks_is_left_out():
    second = models(1)
    del second[1]["test"]["gauc"]
    summary = assemble_models({0: models(0), 1: second}, "vm", "vm_kd", "vm_kd_loopfm")
    assert "gauc" not in summary["models"]["vm"]["test"]
    assert "gauc" in summary["models"]["fm"]["test"]
