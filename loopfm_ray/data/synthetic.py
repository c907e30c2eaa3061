"""A seeded click log whose best possible scores are known.

Every user has one taste, every item one topic. A click is likelier when they match, when the item is good and on one of
two surfaces:

    logit = base_logit + match_effect * [topic == taste] + quality(item) + surface effect

The taste is a field of the user table that only the FM reads. A vertical model without `user` and `taste` can at best
average over tastes; the difference between the two is the room that transfer through the history can fill.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.config import SyntheticConfig
from loopfm_ray.errors import MetricError
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S, TimeRange

__all__ = ["BestScores", "SyntheticLog", "bayes_optimal", "generate"]

Floats = NDArray[np.float64]
_SURFACES = ("feed", "search")
_SURFACE_EFFECT = (-0.4, 0.6)


@dataclass(frozen=True)
class SyntheticLog:
    """The log and its tables; `rows` is canonical and has the probability of each row in `true_prob`.

    `vm_prob` [n] is the probability of a click given item and surface alone: the best that a model without history and
    user can say.
    """

    # Any: pyarrow ships no types.
    rows: Any
    items: Any
    users: Any
    vm_prob: Floats


@dataclass(frozen=True)
class BestScores:
    """Scores of the best possible predictions on the rows of a window."""

    ne: float
    auc: float
    logloss: float
    num_rows: int


def generate(config: SyntheticConfig) -> SyntheticLog:
    """Return the log of `config`, the same for the same config."""
    rng = np.random.default_rng([config.seed, 20_240_101])
    taste = rng.integers(0, config.num_topics, config.num_users)
    activity = rng.gamma(2.0, 1.0, config.num_users) + 0.1
    activity /= activity.sum()
    topic = np.arange(config.num_items) % config.num_topics
    quality = rng.normal(0.0, 0.5, config.num_items)
    popularity = rng.gamma(1.5, 1.0, config.num_items) + 0.05
    popularity /= popularity.sum()

    num = config.num_rows
    user = rng.choice(config.num_users, num, p=activity)
    item = rng.choice(config.num_items, num, p=popularity)
    surface = rng.integers(0, 2, num)
    # seconds without repeats: rows are distinct in time, so the log has no duplicates
    span_us = round(config.days * MICROS_PER_DAY)
    event_ts = config.period_origin_ts + np.arange(num, dtype=np.int64) * (span_us // num)
    event_ts += rng.integers(0, max(span_us // num - MICROS_PER_S, 1), num)

    common = config.base_logit + quality[item] + np.asarray(_SURFACE_EFFECT)[surface]
    true_prob = _sigmoid(common + config.match_effect * (topic[item] == taste[user]))
    share = np.bincount(taste, weights=activity, minlength=config.num_topics)[topic[item]]
    vm_prob = share * _sigmoid(common + config.match_effect) + (1.0 - share) * _sigmoid(common)
    label = (rng.random(num) < true_prob).astype(np.float32)
    rows = pa.table(
        {
            "event_ts": event_ts,
            "user": pa.array([f"u{value}" for value in user]),
            "item": pa.array([f"i{value}" for value in item]),
            "label": label,
            "label_ts": event_ts + round(config.label_delay_s * MICROS_PER_S),
            "surface": pa.array([_SURFACES[value] for value in surface]),
            "true_prob": true_prob,
        }
    )
    items = pa.table(
        {
            "item": [f"i{number}" for number in range(config.num_items)],
            "topic": [f"topic{value}" for value in topic],
            "price": np.exp(quality),
        }
    )
    users = pa.table(
        {
            "user": [f"u{number}" for number in range(config.num_users)],
            "taste": [f"topic{value}" for value in taste],
        }
    )
    return SyntheticLog(rows, items, users, vm_prob)


def bayes_optimal(
    log: SyntheticLog, time_range: TimeRange | None = None, view: str = "fm"
) -> BestScores:
    """Return the scores on the rows of `time_range` of the best predictions from what `view` sees.

    Args:
        log: what `generate` gave.
        time_range: which rows; None is all.
        view: `fm` sees all features; `vm` sees item and surface, and no history.

    Raises:
        MetricError: all labels of the rows are equal.
    """
    event_ts = log.rows.column("event_ts").to_numpy()
    keep = np.ones(len(event_ts), dtype=bool)
    if time_range is not None:
        keep = (event_ts >= time_range.start_ts) & (event_ts < time_range.stop_ts)
    prob = log.rows.column("true_prob").to_numpy() if view == "fm" else log.vm_prob
    return _scores(prob[keep], log.rows.column("label").to_numpy()[keep].astype(np.float64))


def _scores(prob: Floats, label: Floats) -> BestScores:
    num, num_positive = len(label), int(label.sum())
    if num_positive in (0, num):
        raise MetricError(
            f"the best score of {num} rows with {num_positive} positives is undefined; take a longer window"
        )
    logloss = float(-np.mean(np.where(label > 0, np.log(prob), np.log1p(-prob))))
    rate = num_positive / num
    entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log(1.0 - rate))
    _, inverse, counts = np.unique(prob, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    above = mean_rank[label > 0].sum() - num_positive * (num_positive + 1) / 2.0
    return BestScores(
        float(logloss / entropy), float(above / (num_positive * (num - num_positive))), logloss, num
    )


def _sigmoid(logit: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))
