"""Known facts equal dictionaries of sets."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import DataError
from loopfm_ray.kge.filters import index_facts
from tests.kge.graphs import random_triples

E, R = 7, 3


@given(st.integers(0, 2**31), st.integers(1, 60))
def test_answers_equal_dictionaries(seed, num):
    triples = random_triples(seed, num, E, R)
    tails, heads = defaultdict(set), defaultdict(set)
    for h, r, t in triples.tolist():
        tails[h, r].add(t)
        heads[t, r].add(h)
    facts = index_facts(triples, E, R)
    # every question, those without an answer too, twice and in no order
    entity, relation = (
        part.ravel().repeat(2) for part in np.meshgrid(np.arange(E)[::-1], np.arange(R))
    )
    for answers, expected in ((facts.tails, tails), (facts.heads, heads)):
        questions = list(zip(entity.tolist(), relation.tolist(), strict=True))
        pairs = [
            (row, value)
            for row, question in enumerate(questions)
            for value in sorted(expected[question])
        ]
        rows, values = answers.pairs(entity, relation)
        assert list(zip(rows.tolist(), values.tolist(), strict=True)) == pairs
        assert answers.counts(entity, relation).tolist() == [len(expected[q]) for q in questions]
        for answer in range(E):
            found = answers.contains(entity, relation, np.full(len(entity), answer))
            assert found.tolist() == [answer in expected[question] for question in questions]


def test_repeats_and_order_of_triples_change_nothing():
    triples = random_triples(0, 40, E, R)
    shuffled = np.concatenate([triples, triples])[np.random.default_rng(1).permutation(80)]
    for name in ("tails", "heads"):
        first, second = (getattr(index_facts(rows, E, R), name) for rows in (triples, shuffled))
        for part in ("keys", "offsets", "values"):
            np.testing.assert_array_equal(getattr(first, part), getattr(second, part))


def test_facts_of_more_names_than_one_number_holds_are_sorted_alike():
    triples = random_triples(0, 40, E, R)
    few, many = (index_facts(triples, num, R) for num in (E, 2**40))
    for name in ("tails", "heads"):
        for part in ("keys", "offsets", "values"):
            first, second = (getattr(getattr(facts, name), part) for facts in (few, many))
            np.testing.assert_array_equal(first, second)


def test_what_is_no_graph_is_refused():
    with pytest.raises(DataError, match="found none"):
        index_facts(np.empty((0, 3), np.int64), E, R)
    with pytest.raises(DataError, match=r"triple 1 is \[0, 3, 1\], outside of 7 entities and 3"):
        index_facts(np.array([[0, 0, 1], [0, 3, 1]]), E, R)
    with pytest.raises(DataError, match="outside"):
        index_facts(np.array([[0, 0, -1]]), E, R)
