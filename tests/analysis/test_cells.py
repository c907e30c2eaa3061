import pytest
from scipy.stats import ttest_1samp

from loopfm_ray.analysis.cells import (
    Cell,
    Compared,
    assemble_cells,
    headline,
    join_seeds,
    read_cells,
    stream_gains,
    stream_headline,
)
from loopfm_ray.errors import MetricError

ROLES = Compared("none", "kd", "best")
NE = {"fm": [0.70, 0.72], "none": [0.90, 0.92], "kd": [0.88, 0.91], "best": [0.80, 0.81]}
AUC = {"fm": [0.8, 0.79], "none": [0.60, 0.59], "kd": [0.61, 0.60], "best": [0.70, 0.71]}


def records(name):
    return tuple(
        {
            "name": name,
            "seed": seed,
            "test": {"ne": NE[name][seed], "auc": AUC[name][seed]},
            "valid": {"ne": NE[name][seed] - 0.01},
            "slices": {"first": {"auc": AUC[name][seed] - 0.1, "ne": 1.0, "share": 0.5}},
            "num_parameters": 10,
            "train_rows_per_s": 100.0,
        }
        for seed in (0, 1)
    )


def trees():
    cells = [
        Cell("main", "deep", arm, records(arm), records("fm")) for arm in ("none", "kd", "best")
    ]
    return assemble_cells(cells, ROLES)


def test_cells_hold_means_and_paired_comparisons():
    none, kd, best = trees()
    assert best["mean"] == pytest.approx({"ne": 0.805, "auc": 0.705})
    assert best["sd"]["auc"] == pytest.approx(0.01 / 2**0.5)
    assert best["per_seed"]["1"] == {"ne": 0.81, "auc": 0.71}
    assert best["vs_kd"]["auc"]["mean"] == pytest.approx(0.10)
    assert best["vs_kd"]["ne"]["mean"] == pytest.approx(0.09)  # lower is better: a gain is positive
    assert best["vs_kd"]["auc_relative"] == pytest.approx((0.09 / 0.61 + 0.11 / 0.60) / 2)
    assert best["valid"] == pytest.approx({"ne": 0.795})
    assert best["slices"]["first"]["auc"] == pytest.approx(0.605)
    assert "vs_none" not in none
    assert "vs_kd" not in kd


def test_transfer_ratios_are_those_of_each_seed():
    none, kd, best = trees()
    assert best["transfer_ratio_per_seed"] == pytest.approx({"0": 0.10 / 0.20, "1": 0.11 / 0.20})
    assert none["transfer_ratio"] == 0.0
    assert kd["transfer_ratio"] == pytest.approx((0.02 / 0.2 + 0.01 / 0.2) / 2)


def test_the_headline_is_over_all_models_of_a_variant():
    found = headline(trees(), "main", ROLES)
    assert found["relative_auc_gain_over_kd"] == pytest.approx((0.09 / 0.61 + 0.11 / 0.60) / 2)
    assert found["transfer_ratio"] == pytest.approx(0.525)
    assert found["transfer_ratio_over_kd"] == pytest.approx(0.525 / 0.075)
    assert 0 < found["max_p_over_kd"] < 1


def test_there_is_no_quotient_by_a_kd_arm_that_transfers_nothing():
    none, kd, best = trees()
    worse = {**kd, "transfer_ratio": -0.02}
    found = headline([none, worse, best], "main", ROLES)
    assert found["transfer_ratio_kd"] == -0.02
    assert found["transfer_ratio_over_kd"] is None


def test_an_fm_that_is_no_better_leaves_the_ratio_out():
    cells = [
        Cell("main", "deep", arm, records(arm), records("none")) for arm in ("none", "kd", "best")
    ]
    _, _, best = assemble_cells(cells, ROLES)
    assert best["transfer_ratio"] is None
    assert headline([best], "main", ROLES)["transfer_ratio_over_kd"] is None


def seed_part(seed):
    return [
        Cell("main", "deep", arm, (records(arm)[seed],), (records("fm")[seed],))
        for arm in ("none", "kd", "best")
    ]


def summary_of(cells):
    per_seed = {str(fm["seed"]): fm["test"] for fm in cells[0].fm}
    return {"cells": assemble_cells(cells, ROLES), "fm": {"main": {"per_seed": per_seed}}}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_seeds_from_two_summaries_are_those_of_one_experiment(order):
    parts = [read_cells(summary_of(seed_part(seed))) for seed in order]
    assert assemble_cells(join_seeds(parts), ROLES) == trees()


def test_a_summary_read_back_gives_itself():
    assert (
        assemble_cells(read_cells(summary_of(join_seeds([seed_part(0), seed_part(1)]))), ROLES)
        == trees()
    )


def test_a_seed_in_two_summaries_is_refused():
    with pytest.raises(MetricError, match=r"has seeds \[0, 0\]"):
        join_seeds([seed_part(0), seed_part(0)])


def test_summaries_of_other_cells_are_refused():
    with pytest.raises(MetricError, match="main/deep/best is in 1 of 2"):
        join_seeds([seed_part(0), seed_part(1)[:2]])


CALIBRATION = {"fm": 1.2, "none": 1.0, "kd": 1.1, "best": 1.05}


def stream_trees():
    """Two verticals; the second one is worse by 0.1 NE everywhere."""

    def moved(name, shift):
        return tuple(
            {
                **record,
                "test": {
                    **record["test"],
                    "ne": record["test"]["ne"] + shift,
                    "calibration": CALIBRATION[name] + shift,
                },
            }
            for record in records(name)
        )

    cells = [
        Cell("main", vertical, arm, moved(arm, shift), moved("fm", shift), has_own_fm=True)
        for vertical, shift in (("a", 0.0), ("b", 0.1))
        for arm in ("none", "kd", "best")
    ]
    return assemble_cells(cells, ROLES), cells


def test_a_stream_is_summed_up_by_method_and_vertical():
    trees, _ = stream_trees()
    found = stream_headline(trees, "main", ROLES)
    of_kd = [0.02 / 0.90, 0.01 / 0.92, 0.02 / 1.00, 0.01 / 1.02]
    assert found["ne_gain_by_method"]["kd"] == pytest.approx(sum(of_kd) / 4)
    assert found["ne_gain_by_method"]["none"] == 0
    over_kd = [0.08 / 0.88, 0.10 / 0.91, 0.08 / 0.98, 0.10 / 1.01]
    assert found["ne_gain_best_over_kd"] == pytest.approx(sum(over_kd) / 4)
    assert 0 < found["max_p_ne_best_over_kd"] < 1
    of_seeds = [(over_kd[0] + over_kd[2]) / 2, (over_kd[1] + over_kd[3]) / 2]
    assert found["p_ne_gain_best_over_kd"] == pytest.approx(ttest_1samp(of_seeds, 0).pvalue)
    assert found["calibration_by_method"]["best"] == pytest.approx({"a": 1.05, "b": 1.15})
    assert found["calibration_by_method"]["fm"] == pytest.approx({"a": 1.2, "b": 1.3})
    # the transfer ratio of a vertical is of the FM on its own rows
    assert trees[-1]["transfer_ratio_per_seed"]["0"] == pytest.approx(0.10 / 0.20)
    assert trees[-1]["fm_per_seed"]["0"]["ne"] == pytest.approx(0.80)


def test_a_stream_tells_what_each_arm_gains_in_each_variant():
    trees, _ = stream_trees()
    better = [
        {
            **tree,
            "variant": "other",
            "per_seed": {
                seed: {**test, "ne": test["ne"] - 0.3 * (tree["arm"] == "kd")}
                for seed, test in tree["per_seed"].items()
            },
        }
        for tree in trees
    ]
    found = stream_gains([*trees, *better], ROLES)
    assert list(found) == ["main", "other"]
    told = stream_headline(trees, "main", ROLES)
    for arm, gain in told["ne_gain_by_method"].items():
        assert found["main"][arm]["gain"] == pytest.approx(gain)
    of_kd = found["main"]["kd"]
    by_seed = [(0.02 / 0.90 + 0.02 / 1.00) / 2, (0.01 / 0.92 + 0.01 / 1.02) / 2]
    assert of_kd["sd"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    assert of_kd["best_over"] == pytest.approx(told["ne_gain_best_over_kd"])
    assert of_kd["p_best_over"] == pytest.approx(told["p_ne_gain_best_over_kd"])
    assert found["main"]["best"]["best_over"] == 0
    assert found["other"]["best"] == found["main"]["best"]
    assert found["other"]["kd"]["gain"] == pytest.approx(
        sum([0.32 / 0.90, 0.31 / 0.92, 0.32 / 1.00, 0.31 / 1.02]) / 4
    )
    assert found["other"]["kd"]["best_over"] < 0


def test_one_seed_has_no_spread():
    trees, _ = stream_trees()
    one = [{**tree, "per_seed": {"0": tree["per_seed"]["0"]}} for tree in trees]
    found = stream_gains(one, ROLES)["main"]["kd"]
    assert found["sd"] is None
    assert found["p_best_over"] is None


def test_a_summary_of_a_stream_read_back_gives_itself():
    trees, cells = stream_trees()
    summary = {"cells": trees, "fm": {"main": {"per_seed": {"0": {"ne": 9.0}, "1": {"ne": 9.0}}}}}
    assert assemble_cells(read_cells(summary), ROLES) == trees
    assert assemble_cells(join_seeds([cells]), ROLES) == trees
