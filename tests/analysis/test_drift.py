import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from loopfm_ray.analysis.alignment import explained, fit_alignment
from loopfm_ray.analysis.drift import fit_alignments, linear_cka, measure_drift
from loopfm_ray.errors import ShapeError


def latents(num=400, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.0, (num, dim)) @ np.diag(np.linspace(0.2, 1.0, dim))


def turn(dim=5, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_a_turn_and_a_shift_are_undone_by_both_maps(seed, dim):
    old = latents(dim=dim, seed=seed)
    new = (old - 0.7) @ turn(dim, seed + 1).T
    for kind in ("orthogonal", "linear"):
        mapped = fit_alignment(kind, new, old)(new)
        assert explained(mapped, old) > 0.9999
    np.testing.assert_allclose(fit_alignment("orthogonal", new, old)(new), old, atol=1e-5)


def test_the_orthogonal_map_is_that_of_scipy_and_keeps_distances():
    old, new = latents(), latents(seed=3)
    found = fit_alignment("orthogonal", new, old)
    expected, _ = orthogonal_procrustes(new - new.mean(0), old - old.mean(0))
    np.testing.assert_allclose(found.weight, expected, atol=1e-12)
    np.testing.assert_allclose(found.weight @ found.weight.T, np.eye(5), atol=1e-12)


def test_a_stretch_is_undone_by_the_linear_map_alone():
    old = latents()
    new = old @ np.diag([0.1, 4.0, 1.0, 2.0, 0.5])
    assert explained(fit_alignment("linear", new, old)(new), old) > 0.999
    assert explained(fit_alignment("orthogonal", new, old)(new), old) < 0.9


def test_another_width_is_mapped_too():
    old = latents(dim=5)
    narrow = old[:, :3] @ turn(3)
    assert fit_alignment("none", narrow, old).weight.tolist() == np.eye(3, 5).tolist()
    mapped = fit_alignment("orthogonal", narrow, old)(narrow)
    np.testing.assert_allclose(mapped[:, :3], old[:, :3], atol=0.05)
    with pytest.raises(ShapeError, match=r"latents \[N, 3\], found \[400, 5\]"):
        fit_alignment("linear", narrow, old)(old)


def test_drift_of_a_space_to_itself_is_nothing():
    old = latents()
    drift = measure_drift(old, old)
    assert (drift.centroid, drift.covariance, drift.displacement) == (0, 0, 0)
    assert drift.centroid_cosine == pytest.approx(0, abs=1e-12)
    assert drift.cka == pytest.approx(1)


def test_drift_is_measured_in_spreads():
    old = latents() * 7.0
    spread = np.sqrt(np.square(old - old.mean(0)).sum(1).mean())
    shift = np.zeros(5)
    shift[2] = 0.5 * spread
    drift = measure_drift(old + shift, old)
    assert drift.centroid == pytest.approx(0.5)
    assert drift.displacement == pytest.approx(0.5)
    assert drift.covariance == pytest.approx(0, abs=1e-9)
    assert drift.cka == pytest.approx(1)


def test_a_turn_moves_every_event_and_leaves_the_alignment():
    old = latents()
    old = old - old.mean(0)
    drift = measure_drift(old @ turn(), old)
    assert drift.centroid == pytest.approx(0, abs=1e-9)
    assert drift.displacement > 0.5
    assert drift.cka == pytest.approx(1)
    assert linear_cka(latents(seed=5), old) < 0.1


def test_other_events_are_compared_by_their_centroids_alone():
    drift = measure_drift(latents(300), latents(500, seed=2), same_events=False)
    assert drift.centroid < 0.2
    assert (drift.displacement, drift.cka) == (None, None)
    with pytest.raises(ShapeError, match="as many rows"):
        measure_drift(latents(300), latents(500))


def test_what_a_map_explains_is_measured_on_events_it_was_not_fitted_on():
    """With as many dimensions as events any map fits what it saw."""
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(60, 25)), rng.normal(size=(60, 25))
    is_held_out = np.arange(60) >= 30
    found = fit_alignments(new, old, is_held_out)
    kept = found["linear"][0](new[~is_held_out])
    assert explained(kept, old[~is_held_out]) > 0.6
    assert found["linear"][1] < 0
