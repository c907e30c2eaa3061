"""The synthetic log: repeatable, and its best scores are what its truth says."""

import numpy as np
import pytest

from loopfm_ray.data.config import SyntheticConfig
from loopfm_ray.data.synthetic import bayes_optimal, generate
from loopfm_ray.errors import MetricError
from loopfm_ray.types import TimeRange


def test_same_seed_gives_the_same_log() -> None:
    config = SyntheticConfig(num_rows=500)
    assert generate(config).rows.equals(generate(config).rows)
    assert not generate(config).rows.equals(generate(SyntheticConfig(num_rows=500, seed=1)).rows)


def test_labels_follow_the_true_probability() -> None:
    log = generate(SyntheticConfig(num_rows=100_000))
    prob, label = (log.rows.column(name).to_numpy() for name in ("true_prob", "label"))
    for low in np.arange(0, 1, 0.1):
        part = (prob >= low) & (prob < low + 0.1)
        if part.sum() > 1000:
            assert abs(prob[part].mean() - label[part].mean()) < 4 * np.sqrt(0.25 / part.sum())
            assert abs(log.vm_prob.mean() - label.mean()) < 0.01


def test_the_fm_can_know_more_than_a_vertical_model() -> None:
    log = generate(SyntheticConfig())
    fm, vm = bayes_optimal(log), bayes_optimal(log, view="vm")
    assert fm.num_rows == vm.num_rows == 20_000
    assert fm.ne < vm.ne - 0.1 < 1.0
    assert fm.auc > vm.auc + 0.05


def test_without_the_match_there_is_no_room() -> None:
    log = generate(SyntheticConfig(match_effect=0.0))
    assert bayes_optimal(log).ne == pytest.approx(bayes_optimal(log, view="vm").ne, abs=1e-12)


def test_best_scores_of_a_window_count_its_rows() -> None:
    config = SyntheticConfig()
    log = generate(config)
    event_ts = log.rows.column("event_ts").to_numpy()
    splits = config.split.ranges(int(event_ts[0]), int(event_ts[-1]))
    parts = [bayes_optimal(log, part).num_rows for part in (splits.fm, splits.vm, splits.test)]
    assert sum(parts) == 20_000
    assert min(parts) > 2000


def test_auc_and_logloss_by_hand() -> None:
    log = generate(SyntheticConfig(num_rows=400))
    prob, label = (log.rows.column(name).to_numpy() for name in ("true_prob", "label"))
    wins = [(p > n) + 0.5 * (p == n) for p in prob[label == 1] for n in prob[label == 0]]
    best = bayes_optimal(log)
    assert best.auc == pytest.approx(np.mean(wins))
    loss = -np.mean(label * np.log(prob) + (1 - label) * np.log(1 - prob))
    rate = label.mean()
    assert best.logloss == pytest.approx(loss)
    assert best.ne == pytest.approx(loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def test_scores_without_both_labels_are_an_error() -> None:
    log = generate(SyntheticConfig())
    with pytest.raises(MetricError):
        bayes_optimal(log, TimeRange(0, 10))
