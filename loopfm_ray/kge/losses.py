"""Losses over scores, higher for better: all tails at once, or a true one against drawn ones. Each is a mean over rows."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["k_vs_all_bce", "margin_ranking", "one_vs_all_cross_entropy", "self_adversarial"]


def one_vs_all_cross_entropy(scores: Tensor, answer: Tensor) -> Tensor:
    """Return [] the mean of `-log softmax(scores)[answer]`.

    Other true answers of a question count as false, as published. Source: Lacroix et al. 2018, arXiv 1806.07297 (code
    facebookresearch/kbc).

    Args:
        scores: [B, E] of all entities.
        answer: [B] int64 the true one.
    """
    return functional.cross_entropy(scores, answer)


def k_vs_all_bce(
    scores: Tensor, row: Tensor, answer: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return [] the mean over all cells of the cross entropy of sigmoid(scores) against all true answers.

    The label y of a cell becomes `(1 - s) y + s / E`; the code of ConvE and of TuckER adds 1 / E whatever s is. No array of labels
    is made. Source: Dettmers et al. 2018, arXiv 1707.01476, section 5 (1-N scoring).

    Args:
        scores: [B, E] of all entities.
        row: [P] int64 in which row each true answer is.
        answer: [P] int64 the true answers, each once a row.
        label_smoothing: s in [0, 1].
    """
    of_true = (1.0 - label_smoothing) * scores[row, answer].sum()
    of_all = label_smoothing / scores.shape[1] * scores.sum()
    return (functional.softplus(scores).sum() - of_true - of_all) / scores.numel()


def self_adversarial(
    positive: Tensor, negative: Tensor, margin: float, temperature: float
) -> Tensor:
    """Return [] the mean of `-log sigmoid(gamma + s) - sum_i p_i log sigmoid(-s_i - gamma)`, `p = softmax(alpha s_i)`.

    p takes no gradient; at temperature 0 it is uniform. The authors' code halves the sum, and weighs rows by how rare their
    question is; here all weigh the same. Source: Sun et al. 2019, arXiv 1902.10197, section 3.3, with s = -d.

    Args:
        positive: [B] score of the true answer.
        negative: [B, N] scores of drawn ones.
        margin: gamma; 0 for scores that are no distances.
        temperature: alpha.
    """
    weight = torch.softmax(temperature * negative.detach(), -1)
    of_negatives = (weight * functional.softplus(negative + margin)).sum(-1)
    return (functional.softplus(-positive - margin) + of_negatives).mean()


def margin_ranking(positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Return [] the mean over rows and negatives of `max(0, gamma - s + s_i)`.

    Source: Bordes et al. 2013 (NIPS), equation 1; the sum there is a mean here.

    Args:
        positive: [B] score of the true answer.
        negative: [B, N] scores of drawn ones.
        margin: gamma.
    """
    return functional.relu(margin - positive[:, None] + negative).mean()
