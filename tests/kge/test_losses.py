"""Losses equal the papers' formulas, cell by cell in plain Python."""

import math

import pytest
import torch

from loopfm_ray.kge.losses import (
    k_vs_all_bce,
    margin_ranking,
    one_vs_all_cross_entropy,
    self_adversarial,
)


def random_scores(*shape):
    torch.manual_seed(1)
    return (3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_one_vs_all_by_hand():
    scores, answer = random_scores(4, 6), torch.tensor([0, 5, 2, 2])
    total = 0.0
    for row, true in zip(scores.tolist(), answer.tolist(), strict=True):
        total -= math.log(math.exp(row[true]) / sum(math.exp(score) for score in row))
    assert one_vs_all_cross_entropy(scores, answer).item() == pytest.approx(total / 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_k_vs_all_by_hand(smoothing):
    scores = random_scores(3, 5)
    pairs = [(0, 1), (0, 4), (2, 0)]  # the second row has no answer
    total = 0.0
    for i in range(3):
        for j in range(5):
            label = (1 - smoothing) * ((i, j) in pairs) + smoothing / 5
            score = scores[i, j].item()
            total -= label * log_sigmoid(score) + (1 - label) * log_sigmoid(-score)
    rows, answers = torch.tensor(pairs).T
    found = k_vs_all_bce(scores, rows, answers, smoothing)
    assert found.item() == pytest.approx(total / 15)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_self_adversarial_by_hand(temperature):
    positive, negative, margin = random_scores(3), random_scores(3, 4), 1.5
    total = 0.0
    for true, drawn in zip(positive.tolist(), negative.tolist(), strict=True):
        weights = [math.exp(temperature * score) for score in drawn]
        total -= log_sigmoid(margin + true)
        for weight, score in zip(weights, drawn, strict=True):
            total -= weight / sum(weights) * log_sigmoid(-score - margin)
    found = self_adversarial(positive, negative, margin, temperature)
    assert found.item() == pytest.approx(total / 3)


def test_the_weights_of_negatives_take_no_gradient():
    positive, negative = random_scores(2), random_scores(2, 3)
    self_adversarial(positive, negative, 1.0, 2.0).backward()
    weight = torch.softmax(2.0 * negative.detach(), -1)
    expected = weight * torch.sigmoid(negative.detach() + 1.0) / 2
    torch.testing.assert_close(negative.grad, expected)


def test_margin_by_hand():
    positive, negative = random_scores(3), random_scores(3, 4)
    total = sum(
        max(0.0, 2.0 - true + score)
        for true, drawn in zip(positive.tolist(), negative.tolist(), strict=True)
        for score in drawn
    )
    assert margin_ranking(positive, negative, 2.0).item() == pytest.approx(total / 12)


def test_large_scores_give_finite_losses():
    scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    rows, answers = torch.tensor([0]), torch.tensor([1])
    losses = [
        one_vs_all_cross_entropy(scores, answers),
        k_vs_all_bce(scores, rows, answers, 0.1),
        self_adversarial(scores[:, 1], scores, 9.0, 1.0),
        margin_ranking(scores[:, 1], scores, 9.0),
    ]
    sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses)
    assert torch.isfinite(scores.grad).all()
