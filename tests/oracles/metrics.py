"""Slow twins of the metrics: the definitions, one pair or one user at a time."""

import math


def auc(label, score):
    positive = [s for y, s in zip(label, score, strict=True) if y == 1]
    negative = [s for y, s in zip(label, score, strict=True) if y == 0]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def grouped_auc(label, score, group):
    """Return (value, share, number of groups), or None when no group has both labels."""
    total, weight, count = 0.0, 0, 0
    for user in sorted(set(group)):
        rows = [i for i, g in enumerate(group) if g == user]
        labels, scores = [label[i] for i in rows], [score[i] for i in rows]
        if 0 < sum(labels) < len(labels):
            total += len(rows) * auc(labels, scores)
            weight += len(rows)
            count += 1
    return (total / weight, weight / len(label), count) if weight else None


def logloss(label, prob):
    losses = [
        -(y * math.log(p) + (1 - y) * math.log(1 - p)) for y, p in zip(label, prob, strict=True)
    ]
    return sum(losses) / len(losses)


def normalized_entropy(label, prob):
    mean = sum(label) / len(label)
    return logloss(label, prob) / -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
