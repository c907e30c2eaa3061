"""Negatives: every false answer can be drawn, each as often as any other, and no true one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import DataError
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.negatives import FilteredNegatives, uniform_negatives
from tests.kge.graphs import random_triples

E, R = 8, 2


class InTurn:
    """Stands in for a generator: draws 0, 1, 2, ..., and begins again at the limit of a row."""

    def integers(self, low, high, size):
        assert low == 0
        return np.broadcast_to(np.arange(size[1]), size) % high


@given(st.integers(0, 2**31), st.integers(1, 60))
def test_every_false_answer_is_drawn_once_in_turn(seed, num):
    triples = random_triples(seed, num, E, R)
    known = index_facts(triples, E, R).tails
    entity, relation = (part.ravel() for part in np.meshgrid(np.arange(E), np.arange(R)))
    found = FilteredNegatives(known).draw(InTurn(), entity, relation, E)
    for row in range(len(entity)):
        true = {t for h, r, t in triples.tolist() if (h, r) == (entity[row], relation[row])}
        false = [e for e in range(E) if e not in true]
        assert found[row, : len(false)].tolist() == false


def test_draws_are_uniform_over_false_answers():
    triples = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 7]])
    sampler = FilteredNegatives(index_facts(triples, E, R).tails)
    generator = np.random.default_rng(0)
    entity, relation = np.zeros(200, np.int64), np.zeros(200, np.int64)
    counts = np.bincount(sampler.draw(generator, entity, relation, 100).ravel(), minlength=E)
    assert (counts[[1, 2, 7]] == 0).all()
    np.testing.assert_allclose(counts[[0, 3, 4, 5, 6]], 4000, rtol=0.06)


def test_draws_repeat_with_the_seed():
    triples = random_triples(0, 20, E, R)
    sampler = FilteredNegatives(index_facts(triples, E, R).tails)
    first, second = (
        sampler.draw(np.random.default_rng(5), triples[:, 0], triples[:, 1], 6) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_unfiltered_draws_reach_every_entity():
    found = uniform_negatives(np.random.default_rng(0), 50, 20, E)
    assert found.shape == (50, 20)
    np.testing.assert_array_equal(np.unique(found), np.arange(E))


def test_a_question_that_all_entities_answer_is_named():
    triples = np.stack([np.full(E, 3), np.full(E, 1), np.arange(E)], axis=1)
    with pytest.raises(DataError, match="entity 3 with relation 1 has all 8"):
        FilteredNegatives(index_facts(triples, E, R).tails)
