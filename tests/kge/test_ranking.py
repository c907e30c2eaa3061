"""Ranks equal those of a brute-force count with many ties, whatever the blocks; metrics by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import DataError, MetricError, ShapeError
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.ranking import Ranks, prepare_ranking, rank_triples, summarize_ranks
from tests.kge.graphs import random_triples
from tests.kge.memory import Largest

E, R = 9, 2


class Table:
    """Scores looked up in tails [h, r, t] and heads [h, r, t], which may differ as with reciprocal relations."""

    def __init__(self, tails, heads=None):
        self.tails = torch.as_tensor(tails, dtype=torch.float32)
        self.heads = self.tails if heads is None else torch.as_tensor(heads, dtype=torch.float32)
        self.asked = []

    def score_tails(self, head, relation):
        self.asked += [
            ("tail", *pair) for pair in zip(head.tolist(), relation.tolist(), strict=True)
        ]
        return self.tails[head, relation].clone()

    def score_heads(self, relation, tail):
        self.asked += [
            ("head", *pair) for pair in zip(relation.tolist(), tail.tolist(), strict=True)
        ]
        return self.heads[:, relation, tail].T.clone()


def random_table(seed, num_values=3):
    """A table of so few values that most candidates tie."""
    generator = np.random.default_rng(seed)
    return Table(*(generator.integers(0, num_values, (E, R, E)) for _ in range(2)))


def counted(true, others):
    """The mean of the rank when ties are won and when they are lost."""
    optimistic = 1 + sum(other > true for other in others)
    pessimistic = 1 + sum(other >= true for other in others)
    return (optimistic + pessimistic) / 2


def brute_force(table, triples, facts):
    facts = {tuple(fact) for fact in facts.tolist()}
    tails, heads, num_tails, num_heads = [], [], [], []
    for h, r, t in triples.tolist():
        others = [table.tails[h, r, e] for e in range(E) if e != t and (h, r, e) not in facts]
        tails.append(counted(table.tails[h, r, t], others))
        num_tails.append(len(others) + 1)
        others = [table.heads[e, r, t] for e in range(E) if e != h and (e, r, t) not in facts]
        heads.append(counted(table.heads[h, r, t], others))
        num_heads.append(len(others) + 1)
    return Ranks(*(np.array(part) for part in (tails, heads, num_tails, num_heads)))


def assert_equal(found, expected):
    for name in ("tail", "head", "num_tails", "num_heads"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def facts_of(triples):
    return index_facts(triples, E, R)


@given(
    st.integers(0, 2**31),
    st.integers(1, 60),
    st.integers(1, 25),
    st.integers(1, 4),
    st.integers(1, 200),
)
def test_ranks_equal_brute_force(seed, num_facts, num_triples, num_values, max_cells):
    """The triples are partly among the facts, partly not, with repeats."""
    facts = random_triples(seed, num_facts, E, R)
    triples = np.concatenate(
        [facts[: num_triples // 2], random_triples(seed + 1, num_triples, E, R)]
    )
    table = random_table(seed, num_values)
    found = rank_triples(table, triples, facts_of(facts), max_cells=max_cells)
    assert_equal(found, brute_force(table, triples, facts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_smallest_difference_of_scores_is_no_tie(dtype):
    """Neighbouring numbers, the subnormal ones too, and the ends of the range."""
    ends = torch.finfo(dtype)
    least = ends.smallest_normal * ends.eps
    ladder = [ends.min, -least, 0.0, least, 1.0, 1.0 + ends.eps, 3.0, ends.max, ends.max]
    table = Table(np.zeros((E, R, E)))
    scores = torch.tensor(ladder, dtype=torch.float64).to(dtype)  # the two best tie
    table.tails = table.heads = scores.expand(E, R, E)
    triples = np.array([[0, 0, tail] for tail in range(E)])
    found = rank_triples(table, triples, facts_of(np.array([[8, 1, 8]])))
    np.testing.assert_array_equal(found.tail, [9, 8, 7, 6, 5, 4, 3, 1.5, 1.5])


@given(st.integers(0, 2**31), st.integers(1, 100))
def test_filtering_never_worsens_a_rank(seed, num_facts):
    triples, table = random_triples(seed, 5, E, R), random_table(seed)
    facts = np.concatenate([triples, random_triples(seed + 1, num_facts, E, R)])
    for number in range(len(triples)):
        one = triples[number : number + 1]
        raw, filtered = (rank_triples(table, one, facts_of(known)) for known in (one, facts))
        assert filtered.tail[0] <= raw.tail[0]
        assert filtered.head[0] <= raw.head[0]


@given(st.integers(0, 2**31))
def test_names_of_entities_and_order_of_triples_change_no_rank(seed):
    facts, table = random_triples(seed, 40, E, R), random_table(seed)
    triples = facts[:15]
    expected = rank_triples(table, triples, facts_of(facts))
    generator = np.random.default_rng(seed)
    new = generator.permutation(E)
    old = np.argsort(new)
    renamed = np.stack([new[facts[:, 0]], facts[:, 1], new[facts[:, 2]]], axis=1)
    moved = Table(*(part[old][:, :, old] for part in (table.tails, table.heads)))
    assert_equal(rank_triples(moved, renamed[:15], facts_of(renamed)), expected)
    order = generator.permutation(15)
    found = rank_triples(table, triples[order], facts_of(facts))
    np.testing.assert_array_equal(found.tail, expected.tail[order])
    np.testing.assert_array_equal(found.head, expected.head[order])


def test_every_query_is_scored_once():
    triples = random_triples(0, 200, E, R)
    table = random_table(0)
    rank_triples(table, triples, facts_of(triples), max_cells=5 * E)
    tails = {("tail", h, r) for h, r, _ in triples.tolist()}
    heads = {("head", r, t) for _, r, t in triples.tolist()}
    assert len(table.asked) == len(tails) + len(heads)
    assert set(table.asked) == tails | heads


def test_scores_that_say_nothing_are_chance():
    facts = random_triples(0, 60, E, R)
    ranks = rank_triples(Table(np.zeros((E, R, E))), facts, facts_of(facts))
    np.testing.assert_array_equal(ranks.tail, (ranks.num_tails + 1) / 2)
    assert summarize_ranks(ranks).adjusted_mean_rank == pytest.approx(1.0)


def test_scores_that_know_all_facts_rank_first():
    facts = random_triples(0, 60, E, R)
    table = np.zeros((E, R, E))
    table[tuple(facts.T)] = 1
    found = summarize_ranks(rank_triples(Table(table), facts, facts_of(facts)))
    assert (found.mrr, found.hits_at_1, found.mean_rank) == (1.0, 1.0, 1.0)
    assert found.adjusted_mean_rank < 0.5


def test_metrics_by_hand():
    ranks = Ranks(
        tail=np.array([1.0, 3.5, 11.0]),
        head=np.array([2.0, 3.0, 10.0]),
        num_tails=np.array([9, 19, 29]),
        num_heads=np.array([9, 9, 39]),
    )
    is_unseen = np.array([False, False, True])
    found = summarize_ranks(ranks, is_unseen)
    assert found.mrr == pytest.approx((1 + 1 / 3.5 + 1 / 11 + 1 / 2 + 1 / 3 + 1 / 10) / 6)
    assert (found.hits_at_1, found.hits_at_3, found.hits_at_10) == (1 / 6, 3 / 6, 5 / 6)
    assert found.mean_rank == pytest.approx(30.5 / 6)
    assert found.adjusted_mean_rank == pytest.approx((30.5 / 6) / ((5 + 10 + 15 + 5 + 5 + 20) / 6))
    assert (found.num_ranked, found.num_unseen, found.num_left_out) == (3, 1, 0)
    found = summarize_ranks(ranks, is_unseen, unseen="left_out")
    assert found.mrr == pytest.approx((1 + 1 / 3.5 + 1 / 2 + 1 / 3) / 4)
    assert found.mean_rank == pytest.approx(9.5 / 4)
    assert (found.num_ranked, found.num_unseen, found.num_left_out) == (2, 1, 1)


def test_what_has_no_rank_is_refused():
    facts = random_triples(0, 20, E, R)
    for value in (np.nan, np.inf):
        table = np.zeros((E, R, E))
        table[facts[3, 0], facts[3, 1], 0] = value
        with pytest.raises(MetricError, match="not finite"):
            rank_triples(Table(table), facts, facts_of(facts))
    with pytest.raises(DataError, match="at least one triple"):
        rank_triples(random_table(0), facts[:0], facts_of(facts))
    with pytest.raises(ShapeError, match="build it for this graph"):
        rank_triples(random_table(0), facts, index_facts(facts, E + 1, R))
    ranks = rank_triples(random_table(0), facts, facts_of(facts))
    with pytest.raises(MetricError, match="none of 20 left"):
        summarize_ranks(ranks, np.ones(20, bool), unseen="left_out")
    with pytest.raises(ShapeError, match="is_unseen"):
        summarize_ranks(ranks, np.ones(3, bool))


@pytest.mark.parametrize("is_reciprocal", [True, False])
def test_a_backbone_is_ranked_by_its_scores(is_reciprocal):
    torch.manual_seed(0)
    config = read_kge_config({"kind": "complex", "dimension": 4, "is_reciprocal": is_reciprocal})
    model = build_kge(config, E, R)
    facts = random_triples(0, 50, E, R)
    with torch.no_grad():
        entities = torch.arange(E)
        tails = torch.stack(
            [
                torch.stack([model.score_tails(e[None], r[None])[0] for r in torch.arange(R)])
                for e in entities
            ]
        )
        heads = torch.stack(
            [
                torch.stack([model.score_heads(r[None], e[None])[0] for r in torch.arange(R)])
                for e in entities
            ]
        )
    table = Table(tails, heads.permute(2, 1, 0))
    found = rank_triples(model, facts, facts_of(facts), max_cells=20)
    assert_equal(found, brute_force(table, facts, facts))


def test_a_model_in_training_is_ranked_in_evaluation():
    torch.manual_seed(0)
    model = build_kge(read_kge_config({"kind": "tucker", "dimension": 4}), E, R).train()
    facts = random_triples(0, 50, E, R)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (rank_triples(model, facts, facts_of(facts)) for _ in range(2))
    assert_equal(first, second)
    assert model.training
    assert model.relations.norm_in.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_memory_is_bounded():
    torch.manual_seed(0)
    model = build_kge(read_kge_config({"kind": "distmult", "dimension": 4}), 100, R)
    # one query with most of the triples, and many with one
    crowd = np.stack([np.zeros(90), np.zeros(90), np.arange(90)], axis=1).astype(np.int64)
    facts = np.concatenate([crowd, random_triples(0, 40, 100, R)])
    with Largest() as largest:
        rank_triples(model, facts, index_facts(facts, 100, R), max_cells=1000)
    assert largest.numel == 1000


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_parts_that_others_rank_join_to_the_same_ranks(num_parts):
    table, triples = random_table(0), random_triples(1, 40, E, R)
    known = index_facts(triples, E, R)
    ranking = prepare_ranking(triples, known, max_cells=3 * E)
    found = [
        np.concatenate([ranking.rank(table, part) for part in parts])
        for parts in ranking.parts(num_parts)
    ]
    joined, expected = ranking.join(found), brute_force(table, triples, triples)
    assert_equal(joined, expected)
