"""Objectives: losses of questions in both directions, with and without reciprocal relations, equal a slow twin."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.objectives import (
    KVsAllConfig,
    MarginConfig,
    OneVsAllConfig,
    RegularizerConfig,
    SelfAdversarialConfig,
    make_objective,
    score_answers,
)
from loopfm_ray.kge.regularizers import dura, n3
from loopfm_ray.kge.triples import index_triples
from tests.kge.graphs import random_triples

E, R = 8, 2


def random_graph(seed=0, num=30):
    names = [
        tuple(
            pa.array([f"{letter}{x}" for x in column])
            for letter, column in zip("ere", part.T, strict=True)
        )
        for part in np.split(random_triples(seed, num, E, R), [num - 8, num - 4])
    ]
    return index_triples(*names)


def make(is_reciprocal, kind="complex"):
    graph = random_graph()
    torch.manual_seed(0)
    tree = {"kind": kind, "dimension": 4, "is_reciprocal": is_reciprocal}
    if kind == "complex":
        tree["init_scale"] = 1.0
    return graph, build_kge(read_kge_config(tree), graph.num_entities, graph.num_relations).double()


def answers_to(graph, model, entity, relation):
    """All scores of one question, by the backbone's own functions."""
    e, r = torch.tensor([entity]), torch.tensor([relation])
    if model.size.is_reciprocal or relation < graph.num_relations:
        return model.score_tails(e, r)[0]
    return model.score_heads(r - graph.num_relations, e)[0]


@pytest.mark.parametrize("is_reciprocal", [True, False])
@pytest.mark.parametrize("kind", ["complex", "rote", "transe"])
def test_questions_of_both_directions_are_answered_in_their_order(is_reciprocal, kind):
    graph, model = make(is_reciprocal, kind)
    entity, relation = torch.tensor([3, 0, 5, 0, 1]), torch.tensor([3, 0, 2, 1, 0])
    found = score_answers(model, entity, relation)
    for row in range(5):
        expected = answers_to(graph, model, int(entity[row]), int(relation[row]))
        torch.testing.assert_close(found[row], expected)
    candidates = torch.randint(0, E, (5, 3))
    chosen = score_answers(model, entity, relation, candidates)
    torch.testing.assert_close(chosen, found.gather(1, candidates))
    for rows in ([0, 2], [1, 3, 4]):  # questions of one direction alone
        torch.testing.assert_close(score_answers(model, entity[rows], relation[rows]), found[rows])


@pytest.mark.parametrize("is_reciprocal", [True, False])
def test_one_vs_all_of_a_batch_by_hand(is_reciprocal):
    graph, model = make(is_reciprocal)
    objective = make_objective(graph, OneVsAllConfig())
    num = len(graph.train)
    assert objective.num_rows == 2 * num
    batch = np.array([3, num + 3, 0, num + 5])
    total = 0.0
    for row in batch:
        h, r, t = graph.train[row % num].tolist()
        entity, relation, answer = (h, r, t) if row < num else (t, r + graph.num_relations, h)
        total -= torch.log_softmax(answers_to(graph, model, entity, relation), 0)[answer].item()
    found = objective.batch_loss(model, batch, np.random.default_rng(0))
    assert found.item() == pytest.approx(total / 4)


@pytest.mark.parametrize("is_reciprocal", [True, False])
def test_k_vs_all_of_all_questions_by_hand(is_reciprocal):
    graph, model = make(is_reciprocal)
    objective = make_objective(graph, KVsAllConfig(label_smoothing=0.2))
    answers = {}
    for h, r, t in graph.train.tolist():
        answers.setdefault((h, r), set()).add(t)
        answers.setdefault((t, r + graph.num_relations), set()).add(h)
    assert objective.num_rows == len(answers)
    total = 0.0
    for question, true in answers.items():
        for entity, score in enumerate(answers_to(graph, model, *question).tolist()):
            label = 0.8 * (entity in true) + 0.2 / graph.num_entities
            total += math.log1p(math.exp(score)) - label * score
    everything = np.arange(len(answers))[::-1].copy()
    found = objective.batch_loss(model, everything, np.random.default_rng(0))
    assert found.item() == pytest.approx(total / (len(answers) * graph.num_entities))


@pytest.mark.parametrize("config", [MarginConfig, SelfAdversarialConfig])
@pytest.mark.parametrize("is_filtered", [True, False])
def test_sampled_losses_see_the_true_answer_and_drawn_ones(config, is_filtered, monkeypatch):
    from loopfm_ray.kge import objectives

    graph, model = make(True)
    loss = config(num_negatives=50, margin=2.0, is_filtered=is_filtered)
    objective = make_objective(graph, loss)
    seen = []

    def noted(model, entity, relation, candidates):
        seen.append((entity, relation, candidates))
        return score_answers(model, entity, relation, candidates)

    monkeypatch.setattr(objectives, "score_answers", noted)
    batch = np.arange(objective.num_rows)
    found = objective.batch_loss(model, batch, np.random.default_rng(0))
    (entity, relation, candidates) = seen[0]
    assert candidates[:, 0].tolist() == objective.rows[:, 2].tolist()
    true = objective.known.contains(
        entity.numpy().repeat(50), relation.numpy().repeat(50), candidates[:, 1:].numpy().ravel()
    )
    assert true.any() == (not is_filtered)
    scores = model.score_tails(entity, relation, candidates)
    if config is MarginConfig:
        expected = torch.relu(2.0 - scores[:, :1] + scores[:, 1:]).mean()
    else:
        weight = torch.softmax(scores[:, 1:].detach(), 1)
        drawn = (weight * torch.nn.functional.logsigmoid(-scores[:, 1:] - 2.0)).sum(1)
        expected = -(torch.nn.functional.logsigmoid(2.0 + scores[:, 0]) + drawn).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_reciprocal", [True, False])
@pytest.mark.parametrize(("name", "penalty"), [("n3", n3), ("dura", dura)])
@pytest.mark.parametrize("loss", [OneVsAllConfig(), KVsAllConfig()])
def test_the_penalty_is_that_of_the_triples(is_reciprocal, name, penalty, loss):
    graph, model = make(is_reciprocal)
    generator = np.random.default_rng(0)
    plain, penalised = (
        make_objective(graph, loss, regularizer)
        for regularizer in (None, RegularizerConfig(kind=name, weight=0.5))
    )
    batch = np.arange(plain.num_rows)
    difference = penalised.batch_loss(model, batch, generator) - plain.batch_loss(
        model, batch, generator
    )
    triples = graph.train
    if isinstance(loss, KVsAllConfig):
        triples = np.unique(triples, axis=0)
    h, r, t = torch.from_numpy(triples.copy()).T
    expected = 0.5 * penalty(model.factors(h, r, t))
    if is_reciprocal:
        backwards = model.factors(t, r + graph.num_relations, h)
        expected = (expected + 0.5 * penalty(backwards)) / 2
    torch.testing.assert_close(difference, expected)
