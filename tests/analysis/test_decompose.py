import numpy as np
import pytest

from loopfm_ray.analysis.decompose import INPUTS, LADDER, decompose, ladder, row_logloss
from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import logloss


def known_world(num_rows=60_000, seed=0):
    """Rows with binary x, H, S, of which the exact conditional probabilities are known.

    H is a fair coin. S copies H with probability 0.8 and carries a coin E of its own, which the label reads too.
    """
    rng = np.random.default_rng(seed)
    x, h, e = (rng.integers(0, 2, num_rows) for _ in range(3))
    copied = np.where(rng.random(num_rows) < 0.8, h, 1 - h)
    table = 1 / (1 + np.exp(-(np.add.outer(np.add.outer([-0.5, 0.5], [-1.2, 1.2]), [-0.8, 0.8]))))
    label = (rng.random(num_rows) < table[x, h, e]).astype(float)
    # p(y|x) etc. by summing out what is not seen; H given its copy is 0.8 likely to be equal
    given_copy = np.array([[0.8, 0.2], [0.2, 0.8]])
    probs = {
        "x": table.mean((1, 2))[x],
        "xh": table.mean(2)[x, h],
        "xs": np.einsum("xhe,ch->xce", table, given_copy)[x, copied, e],
        "xhs": table[x, h, e],
    }
    user = rng.integers(0, 3000, num_rows)
    exact = {
        "x": _entropy(table.mean((1, 2)), [0.5, 0.5]),
        "xh": _entropy(table.mean(2), np.full((2, 2), 0.25)),
        "xs": _entropy(np.einsum("xhe,ch->xce", table, given_copy), np.full((2, 2, 2), 0.125)),
        "xhs": _entropy(table, np.full((2, 2, 2), 0.125)),
    }
    return label, probs, user, exact


def exact_terms(exact):
    return {
        "temporal": exact["x"] - exact["xh"],
        "cross": exact["xh"] - exact["xhs"],
        "residual": exact["xs"] - exact["xhs"],
        "loopfm": exact["x"] - exact["xs"],
    }


def _entropy(prob, weight):
    return float(
        np.sum(np.asarray(weight) * -(prob * np.log(prob) + (1 - prob) * np.log(1 - prob)))
    )


def test_terms_are_the_exact_values_where_they_are_known():
    label, probs, user, exact = known_world()
    found = decompose({name: row_logloss(label, p) for name, p in probs.items()}, user)
    want = exact_terms(exact)
    for name, value in want.items():
        term = getattr(found, name)
        assert term.value == pytest.approx(value, abs=4e-3), name
        assert term.low < value < term.high, name
        assert term.low < term.value < term.high
        assert value > 0.01
    assert found.tau == pytest.approx(want["residual"] / want["temporal"], rel=0.1)
    assert (found.num_rows, found.num_users) == (60_000, 3000)


def test_the_chain_rule_holds_for_any_loglosses():
    rng = np.random.default_rng(1)
    losses = {name: rng.exponential(size=500) for name in INPUTS}
    found = decompose(losses, rng.integers(0, 50, 500))
    assert found.loopfm.value == pytest.approx(
        found.temporal.value + found.cross.value - found.residual.value, abs=1e-12
    )


def test_the_transfer_ratio_is_what_the_history_gives_of_the_lead_of_the_fm():
    label, probs, user, exact = known_world()
    losses = {name: row_logloss(label, p) for name, p in probs.items()}
    assert decompose(losses, user).transfer_ratio is None
    found = decompose({**losses, "fm": losses["xhs"]}, user)
    want = (exact["x"] - exact["xs"]) / (exact["x"] - exact["xhs"])
    ratio = found.transfer_ratio
    assert ratio.value == pytest.approx(want, rel=0.05)
    assert ratio.low < want < ratio.high
    # the bound of theorem 2, with tau as estimated, is the same number
    lead = losses["x"].mean() - losses["xhs"].mean()
    bound = ((1 - found.tau) * found.temporal.value + found.cross.value) / lead
    assert bound == pytest.approx(ratio.value)
    assert decompose({**losses, "fm": losses["x"]}, user).transfer_ratio is None


def test_intervals_count_users_not_rows():
    """A row repeated by its user tells nothing new."""
    label, probs, _, _ = known_world(2000)
    losses = {name: row_logloss(label, p) for name, p in probs.items()}
    once = decompose(losses, np.arange(2000))
    often = decompose(
        {name: np.repeat(loss, 20) for name, loss in losses.items()}, np.repeat(np.arange(2000), 20)
    )
    width = [d.loopfm.high - d.loopfm.low for d in (once, often)]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_row_logloss_is_that_of_the_metrics():
    label, probs, _, _ = known_world(500)
    assert row_logloss(label, probs["xh"]).mean() == pytest.approx(
        logloss(label, probs["xh"]), abs=1e-8
    )


def test_missing_models_and_rows_are_errors():
    with pytest.raises(MetricError, match="xhs"):
        decompose({name: np.zeros(3) for name in INPUTS[:3]}, np.zeros(3, dtype=int))
    with pytest.raises(MetricError, match="lengths"):
        decompose({name: np.zeros(3) for name in INPUTS}, np.zeros(4, dtype=int))


def test_each_step_of_a_ladder_is_the_exact_loss_where_it_is_known():
    """The raw history H is copied with errors, step by step: embedding, latent, code."""
    rng = np.random.default_rng(5)
    num_rows, kept = 80_000, {"embedding": 0.95, "latent": 0.9, "code": 0.8}
    h = rng.integers(0, 2, num_rows)
    table = np.array([0.15, 0.85])
    label = (rng.random(num_rows) < table[h]).astype(float)
    losses, exact, seen, so_far = {}, {}, h, 1.0
    for step, share in kept.items():
        # as many more flips as bring the share of true copies from `so_far` to `share`
        flip = (so_far - share) / (2 * so_far - 1)
        seen, so_far = np.where(rng.random(num_rows) < flip, 1 - seen, seen), share
        given = np.array([[share, 1 - share], [1 - share, share]]) @ table
        losses[step] = row_logloss(label, given[seen])
        exact[step] = _entropy(given, [0.5, 0.5])
    whole = _entropy(table, [0.5, 0.5])
    losses |= dict.fromkeys(("code_raw", "embedding_raw"), row_logloss(label, table[h]))
    found = ladder(losses, rng.integers(0, 4000, num_rows))
    want = {
        "representation": exact["embedding"] - whole,
        "autoencoder": exact["latent"] - exact["embedding"],
        "quantisation": exact["code"] - exact["latent"],
        "total": exact["code"] - whole,
        "residual": exact["code"] - whole,
    }
    for name, value in want.items():
        term = getattr(found, name)
        assert term.value == pytest.approx(value, abs=5e-3), name
        assert term.low < value < term.high, name
        assert value > 0.02
    assert found.num_users == 4000


def test_the_steps_of_a_ladder_add_up_for_any_loglosses():
    rng = np.random.default_rng(2)
    found = ladder({name: rng.exponential(size=300) for name in LADDER}, np.arange(300) // 5)
    steps = [
        getattr(found, name).value for name in ("representation", "autoencoder", "quantisation")
    ]
    assert sum(steps) == pytest.approx(found.total.value, abs=1e-12)
    with pytest.raises(MetricError, match="'code_raw'"):
        ladder({name: np.ones(300) for name in LADDER[:-1]}, np.arange(300))
