"""Drift against the training reference: exact counts, planted shifts, and none."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import BundleError
from loopfm_ray.serving.reference import (
    Binned,
    DriftWindow,
    Reference,
    history_edges,
    make_reference,
    psi,
    score_edges,
)

RNG = np.random.default_rng(0)
MAX_LEN = 20


def slow_psi(reference, found):
    """The definition, bin by bin."""
    total = 0.0
    for n, m in zip(reference, found, strict=True):
        p = (n + 0.5) / (sum(reference) + 0.5 * len(reference))
        q = (m + 0.5) / (sum(found) + 0.5 * len(found))
        total += (q - p) * math.log(q / p)
    return total


def slow_bins(values, edges):
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[sum(value >= edge for edge in edges)] += 1
    return counts


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=2, max_size=30))
def test_psi_is_its_definition_and_symmetric(pairs):
    left, right = zip(*pairs, strict=True)
    found = psi(left, right)
    assert found == pytest.approx(slow_psi(left, right), abs=1e-9)
    assert found == pytest.approx(psi(right, left), abs=1e-9)
    assert found >= 0
    assert psi(left, left) == 0


def test_psi_worked_by_hand():
    # shares (9.5, 0.5) / 10 against (0.5, 9.5) / 10
    assert psi([9, 0], [0, 9]) == pytest.approx(2 * 0.9 * math.log(19))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.1, 0.1 + 1e-8, 0.3, 0.5, 0.7, 0.71, 0.9]), min_size=1, max_size=300
    ),
    st.integers(2, 12),
)
def test_no_edge_parts_scores_that_a_served_one_may_mix_up(scores, num_bins):
    scores = np.asarray(scores)
    edges = score_edges(scores, num_bins)
    assert list(edges) == sorted(set(edges))
    assert len(edges) < num_bins
    for edge in edges:
        assert np.abs(scores - edge).min() > 4e-7


def test_edges_of_many_distinct_scores_are_near_the_quantiles():
    scores = RNG.beta(2, 20, 20_000)
    edges = score_edges(scores)
    assert len(edges) == 9
    shares = np.diff([0, *(np.mean(scores < edge) for edge in edges), 1])
    assert shares.min() > 0.055
    assert shares.max() < 0.145


def test_one_score_for_all_rows_is_one_bin():
    assert score_edges(np.full(100, 0.25)) == ()
    assert score_edges(np.asarray([0.25])) == ()


def test_history_edges_by_hand():
    assert history_edges(1) == (1,)
    assert history_edges(2) == (1, 2)
    assert history_edges(20) == (1, 2, 3, 5, 9, 17)
    assert history_edges(16) == (1, 2, 3, 5, 9)


def sample(num_requests, rng, shift=0.0, share=0.7, num_rows=10):
    """Requests of some rows each: (scores, length, is unknown user, unknown items)."""
    return [
        (
            1 / (1 + np.exp(-(rng.normal(-2 + shift, 1, num_rows)))),
            int(rng.integers(1, MAX_LEN + 1)) if rng.random() < share else 0,
            bool(rng.random() < 0.1),
            int(rng.integers(0, 3)),
        )
        for _ in range(num_requests)
    ]


def reference_of(requests):
    scores = np.concatenate([one[0] for one in requests])
    sizes = [len(one[0]) for one in requests]
    lengths = np.repeat([one[1] for one in requests], sizes)
    users = np.repeat([one[2] for one in requests], sizes).mean()
    items = sum(one[3] for one in requests) / len(scores)
    return make_reference((1, 2), scores, (lengths, MAX_LEN), float(users), float(items))


@pytest.fixture(scope="module")
def reference():
    return reference_of(sample(1000, np.random.default_rng(1)))


def test_a_window_counts_what_a_loop_counts(reference):
    requests = sample(333, np.random.default_rng(2), shift=0.4, share=0.5, num_rows=7)
    window = DriftWindow(reference)
    assert window.drift() is None
    for one in requests:
        window.add(*one)
    found = window.drift()
    scores = [score for one in requests for score in one[0]]
    lengths = [one[1] for one in requests for _ in one[0]]
    assert found.num_rows == len(scores) == 333 * 7
    want = slow_psi(reference.scores.counts, slow_bins(scores, reference.scores.edges))
    assert found.psi_scores == pytest.approx(want)
    want = slow_psi(reference.history_len.counts, slow_bins(lengths, reference.history_len.edges))
    assert found.psi_history_len == pytest.approx(want)
    covered = np.mean([length > 0 for length in lengths])
    assert found.coverage_difference == pytest.approx(covered - reference.coverage)
    strange = np.mean([one[2] for one in requests])
    assert found.unknown_users_difference == pytest.approx(strange - reference.unknown_users)
    items = sum(one[3] for one in requests) / len(scores)
    assert found.unknown_items_difference == pytest.approx(items - reference.unknown_items)


def drift_of(reference, **planted):
    window = DriftWindow(reference)
    for one in sample(1000, np.random.default_rng(3), **planted):
        window.add(*one)
    return window.drift()


def test_without_a_shift_the_index_is_what_chance_gives(reference):
    found = drift_of(reference)
    assert found.psi_scores < 4 * found.expected_psi < 0.01
    assert found.psi_history_len < 0.02
    assert abs(found.coverage_difference) < 0.05


def test_a_shift_of_the_scores_is_seen_there_and_only_there(reference):
    found = drift_of(reference, shift=0.8)
    assert found.psi_scores > 0.25
    assert found.psi_history_len < 0.02


def test_lost_histories_are_seen_there_and_only_there(reference):
    found = drift_of(reference, share=0.2)
    assert found.psi_history_len > 0.25
    assert found.coverage_difference == pytest.approx(-0.5, abs=0.05)
    assert found.psi_scores < 0.01


def test_what_is_long_ago_does_not_count(reference):
    window = DriftWindow(reference, max_rows=2000)
    shifted = sample(400, np.random.default_rng(4), shift=3.0)
    for one in shifted:
        window.add(*one)
    assert window.drift().psi_scores > 1
    assert 1000 <= window.drift().num_rows <= 2000 + 64 * 10
    for one in sample(400, np.random.default_rng(5)):
        window.add(*one)
        assert window.drift().num_rows <= 2000 + 64 * 10
    assert window.drift().psi_scores < 0.02


def test_a_vm_without_history_has_no_drift_of_histories():
    scores = RNG.random(500)
    window = DriftWindow(make_reference((1, 2), scores, None, 0.0, 0.0))
    window.add(scores, 0, False, 0)
    found = window.drift()
    assert (found.psi_history_len, found.coverage_difference) == (None, None)
    assert found.psi_scores == pytest.approx(0, abs=1e-12)


def test_a_reference_survives_its_file(reference):
    assert Reference.of_tree(reference.to_tree()) == reference
    with pytest.raises(BundleError, match="format_version 9"):
        Reference.of_tree({**reference.to_tree(), "format_version": 9})


@pytest.mark.parametrize(
    ("edges", "counts"), [((1.0,), (1,)), ((2.0, 1.0), (1, 1, 1)), ((1.0,), (1, -1))]
)
def test_counts_that_do_not_fit_their_edges_are_refused(edges, counts):
    with pytest.raises(BundleError, match="rising edges"):
        Binned(edges, counts)
