import numpy as np
import pytest

from loopfm_ray.analysis.run import analyze_predictions, choose_models
from loopfm_ray.errors import MetricError
from tests.analysis.test_decompose import exact_terms, known_world

HISTORIES = {"vm": "none", "vm_raw": "raw", "vm_loopfm": "latent", "vm_both": "both"}
MODELS = {"x": "vm", "xh": "vm_raw", "xs": "vm_loopfm", "xhs": "vm_both"}


def reader(num_rows=60_000, fm="xhs"):
    """Return predictions of models that know the exact probabilities, and of a second seed that is a bit off."""
    label, probs, user, exact = known_world(num_rows)

    def read(seed, name):
        place = fm if name == "fm" else next(p for p, model in MODELS.items() if model == name)
        prob = np.clip(probs[place] + 0.01 * seed, 0.01, 0.99)
        return {
            "example_id": np.arange(num_rows),
            "user": user,
            "label": label,
            "logit": np.log(prob / (1 - prob)),
        }

    return read, exact


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
        for name, value in exact_terms(exact).items():
            assert tree[name]["value"] == pytest.approx(value, abs=5e-3)
        sums = [tree[name]["value"] for name in ("temporal", "cross", "residual", "loopfm")]
        assert sums[0] + sums[1] - sums[2] == pytest.approx(sums[3], abs=1e-12)
        # the FM here knows everything
        ratio = (exact["x"] - exact["xs"]) / (exact["x"] - exact["xhs"])
        assert tree["transfer_ratio"]["value"] == pytest.approx(ratio, rel=0.1)
    means = [tree["loopfm"]["value"] for tree in found["per_seed"].values()]
    assert found["mean"]["loopfm"]["value"] == pytest.approx(np.mean(means))


def test_an_fm_that_is_no_better_gives_no_ratio():
    read, _ = reader(2000, fm="x")
    assert analyze_predictions(MODELS, (0,), read)["mean"]["transfer_ratio"] is None


@pytest.mark.parametrize("column", ["example_id", "user", "label"])
@pytest.mark.parametrize("place", [(0, "vm_raw"), (1, "vm"), (1, "fm")])
def test_other_rows_are_refused_in_any_model_of_any_seed(column, place):
    read, _ = reader(2000)

    def mixed(seed, name):
        rows = read(seed, name)
        return {**rows, column: 1 - rows[column]} if (seed, name) == place else rows

    message = rf"{place[1]} of seed {place[0]} .* \['{column}'\] differ"
    with pytest.raises(MetricError, match=message):
        analyze_predictions(MODELS, (0, 1), mixed)
