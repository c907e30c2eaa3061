import numpy as np
import pytest

from loopfm_ray.analysis.run import analyze_predictions, choose_models
from loopfm_ray.errors import MetricError
from tests.analysis.test_decompose import known_world

HISTORIES = {"vm": "none", "vm_raw": "raw", "vm_loopfm": "latent", "vm_both": "both"}
MODELS = {"x": "vm", "xh": "vm_raw", "xs": "vm_loopfm", "xhs": "vm_both"}


def reader(num_rows=60_000, fm="xhs"):
    """Return predictions of models that know the exact probabilities; each seed's rows are another draw of the world."""
    worlds = {seed: known_world(num_rows, seed) for seed in (0, 1)}

    def read(seed, name):
        label, probs, user, _ = worlds[seed]
        place = fm if name == "fm" else next(p for p, model in MODELS.items() if model == name)
        prob = probs[place]
        return {
            "example_id": np.arange(num_rows),
            "user": user,
            "label": label,
            "logit": np.log(prob / (1 - prob)),
        }

    return read, worlds[0][3]


def test_each_input_takes_the_one_model_that_fits():
    assert choose_models(HISTORIES, {}) == MODELS
    two = {**HISTORIES, "other": "latent"}
    assert choose_models(two, {"xs": "other"})["xs"] == "other"
    with pytest.raises(MetricError, match=r"\['other', 'vm_loopfm'\]; name one"):
        choose_models(two, {})
    with pytest.raises(MetricError, match="'both', the run has none; add one to vms"):
        choose_models({name: kind for name, kind in HISTORIES.items() if kind != "both"}, {})
    with pytest.raises(MetricError, match="'vm' does not"):
        choose_models(HISTORIES, {"xhs": "vm"})


def test_the_terms_of_a_run_are_the_exact_ones_and_the_chain_rule_holds():
    read, exact = reader()
    found = analyze_predictions(MODELS, (0, 1), read)
    assert set(found["per_seed"]) == {"0", "1"}
    for tree in (found["mean"], *found["per_seed"].values()):
        want = {
            "temporal": exact["x"] - exact["xh"],
            "cross": exact["xh"] - exact["xhs"],
            "residual": exact["xs"] - exact["xhs"],
            "loopfm": exact["x"] - exact["xs"],
        }
        for name, value in want.items():
            assert tree[name]["value"] == pytest.approx(value, abs=5e-3)
        sums = [tree[name]["value"] for name in ("temporal", "cross", "residual", "loopfm")]
        assert sums[0] + sums[1] - sums[2] == pytest.approx(sums[3], abs=1e-12)
        # the FM here knows everything, so the bound is what the history gives of that
        bound = (exact["x"] - exact["xs"]) / (exact["x"] - exact["xhs"])
        assert tree["transfer_ratio_bound"] == pytest.approx(bound, rel=0.1)
    means = [tree["loopfm"]["value"] for tree in found["per_seed"].values()]
    assert found["mean"]["loopfm"]["value"] == pytest.approx(np.mean(means))


def test_an_fm_that_is_no_better_has_no_bound_and_other_rows_are_refused():
    read, _ = reader(2000, fm="x")
    assert analyze_predictions(MODELS, (0,), read)["mean"]["transfer_ratio_bound"] is None

    def mixed(seed, name):
        rows = read(seed, name)
        return {**rows, "example_id": rows["example_id"] + 1} if name == "vm_raw" else rows

    with pytest.raises(MetricError, match=r"\['xh'\] are of other test rows"):
        analyze_predictions(MODELS, (0,), mixed)
