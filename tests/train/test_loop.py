import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import DataError, StoreError
from loopfm_ray.metrics.binary import BinarySums
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.registry import build_vm
from loopfm_ray.train.loop import Hooks, LoopConfig, Progress, fit, progress_records
from loopfm_ray.train.optim import OptimConfig, build_optimizer
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import Workers, make_objective
from tests.model_inputs import ITEM_FIELDS, LATENT_DIM, SCHEMA, histories, make_batch, take_rows

OPTIM = OptimConfig(lr=0.01, warmup_steps=2)


def make_state(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    config = DnnConfig(embed_dim=3, hidden=(6, 5), dropout=dropout, history=histories("latent"))
    model = build_vm(config, SCHEMA, (), LATENT_DIM)
    return TrainState(model, build_optimizer(OPTIM, model))


def batches(num, start=0):
    return [make_batch(num_rows=10 + seed % 3, seed=seed) for seed in range(start, start + num)]


def weights(state):
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_and_reports_progress():
    state, seen = make_state(dropout=0.0), []
    batch = make_batch(num_rows=64)
    report = fit(
        state,
        [batch] * 60,
        make_objective(state.model),
        LoopConfig(optim=OPTIM, log_every=25),
        60,
        Hooks(on_progress=seen.append),
    )
    assert [progress.step for progress in seen] == [25, 50, 60]
    assert [progress.sums.num_rows for progress in seen] == [1600, 1600, 640]
    assert seen[-1].sums.logloss < seen[0].sums.logloss
    assert (report.num_steps, report.num_rows) == (60, 3840)
    assert report.rows_per_s > 0
    names = [name for _, _, name, _ in progress_records(seen[0])]
    assert names == ["logloss", "loss", "ne", "rows_per_s"]


@pytest.mark.parametrize("checkpoint_every", [4, 5])
def test_2n_steps_equal_n_steps_save_load_n_steps(tmp_path, checkpoint_every):
    config = LoopConfig(optim=OPTIM, log_every=3, checkpoint_every=checkpoint_every)
    whole, whole_seen = make_state(), []
    objective = make_objective(whole.model, kd_weight=0.5)
    fit(whole, batches(10), objective, config, 10, Hooks(on_progress=whole_seen.append))

    first, seen = make_state(), []
    hooks = Hooks(
        on_progress=seen.append, on_checkpoint=lambda state: save_state(state, tmp_path / "ckpt")
    )
    objective = make_objective(first.model, kd_weight=0.5)
    fit(first, batches(checkpoint_every), objective, config, 10, hooks)
    seen = [p for p in seen if p.step % 3 == 0]  # the interrupted run also reports its end

    second = make_state(seed=7)
    load_state(second, tmp_path / "ckpt")
    assert second.counters.step == checkpoint_every
    rest = batches(10 - checkpoint_every, start=checkpoint_every)
    objective = make_objective(second.model, kd_weight=0.5)
    fit(second, rest, objective, config, 10, Hooks(on_progress=seen.append))
    assert_same_bits(weights(whole), weights(second))
    assert second.counters == whole.counters
    assert [(p.step, p.sums) for p in seen] == [(p.step, p.sums) for p in whole_seen]


def test_same_seed_same_bits():
    results = []
    for _ in range(2):
        state = make_state()
        fit(state, batches(5), make_objective(state.model), LoopConfig(optim=OPTIM), 5)
        results.append(weights(state))
    assert_same_bits(*results)


def test_one_step_equals_the_step_by_hand():
    state, other = make_state(dropout=0.0), make_state(dropout=0.0)
    batch = make_batch()
    config = LoopConfig(optim=OptimConfig(lr=0.01, warmup_steps=0, decay_share=0))
    fit(state, [batch], make_objective(state.model, kd_weight=2.0), config, 1)
    logit = other.model(batch)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss = bce(logit[:, 0], batch.label[:, 0]) + bce(logit[:, 1], batch.label[:, 1])
    loss = loss + 2.0 * bce(logit[:, 0], batch.teacher_prob)
    loss.backward()
    torch.optim.Adam(other.model.parameters(), lr=0.01).step()
    for name, tensor in weights(state).items():
        # Where a gradient is near Adam's epsilon, its rounding shows.
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=2e-4)


def test_stops_early_and_returns_the_best_weights():
    state, scores, at_best = make_state(), iter([0.9, 0.8, 0.85, 0.86, 0.1]), {}

    def evaluate():
        assert not state.model.training
        value = next(scores)
        if value == 0.8:
            at_best.update(weights(state))
        return {"ne": value, "auc": 0.5}

    config = LoopConfig(optim=OPTIM, eval_every=2, patience=2)
    evaluations = []
    hooks = Hooks(evaluate=evaluate, on_evaluation=evaluations.append)
    report = fit(state, batches(20), make_objective(state.model), config, 20, hooks)
    assert (report.num_steps, state.counters.best_step) == (8, 4)
    assert state.counters.is_stopped
    assert [e.step for e in evaluations] == [2, 4, 6, 8]
    assert report.evaluations == tuple(evaluations)
    assert_same_bits(weights(state), at_best)
    again = fit(state, batches(3), make_objective(state.model), config, 20, hooks)
    assert again.num_steps == 0


def test_best_weights_survive_a_resume(tmp_path):
    state = make_state()
    config = LoopConfig(optim=OPTIM, eval_every=1, patience=5)
    scores = iter([0.5, 0.6, 0.7, 0.8])
    hooks = Hooks(evaluate=lambda: {"ne": next(scores)})
    fit(state, batches(1), make_objective(state.model), config, 4, hooks)
    best = weights(state)
    save_state(state, tmp_path / "ckpt")
    save_state(state, tmp_path / "ckpt")  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    other = make_state(seed=3)
    load_state(other, tmp_path / "ckpt")
    fit(other, batches(3, 1), make_objective(other.model), config, 4, hooks)
    assert_same_bits(weights(other), best)


def test_validates_at_the_end_when_no_interval_is_set():
    state = make_state()
    hooks = Hooks(evaluate=lambda: {"ne": 1.0})
    report = fit(state, batches(3), make_objective(state.model), LoopConfig(optim=OPTIM), 3, hooks)
    assert [e.step for e in report.evaluations] == [3]


def test_stops_at_the_total_steps():
    state = make_state()
    report = fit(state, batches(5), make_objective(state.model), LoopConfig(optim=OPTIM), 2)
    assert report.num_steps == state.counters.step == 2


def test_a_loss_that_is_not_finite_is_an_error():
    state = make_state()
    bad = make_batch()
    bad.numeric[0, 0] = math.nan
    with pytest.raises(DataError, match="not finite"):
        fit(state, [bad], make_objective(state.model), LoopConfig(optim=OPTIM), 1)


def test_kd_without_teacher_is_an_error():
    state = make_state()
    batch = replace(make_batch(), teacher_prob=None)
    with pytest.raises(DataError, match="kd_weight"):
        make_objective(state.model, kd_weight=1.0)(batch)


def test_workers_share_a_batch_exactly():
    whole, batch = make_state(dropout=0.0), make_batch(num_rows=12)
    make_objective(whole.model)(batch).total.backward()
    expected = {n: p.grad.clone() for n, p in whole.model.named_parameters()}
    total = {name: torch.zeros_like(grad) for name, grad in expected.items()}
    for rows in (slice(0, 3), slice(3, 12)):
        part = make_state(dropout=0.0)
        workers = Workers(world_size=2, count_rows=lambda _: 12.0)
        make_objective(part.model, workers=workers)(take_rows(batch, rows)).total.backward()
        for name, parameter in part.model.named_parameters():
            total[name] += parameter.grad / 2
    for name, grad in expected.items():
        torch.testing.assert_close(total[name], grad)


def test_the_fm_trains_with_the_same_loop():
    torch.manual_seed(0)
    model = build_fm(FmConfig(embed_dim=3, history_dim=4, hidden=(6,)), SCHEMA, ITEM_FIELDS)
    state = TrainState(model, build_optimizer(OPTIM, model))
    report = fit(state, batches(3), make_objective(model), LoopConfig(optim=OPTIM), 3)
    assert report.num_steps == 3


def test_a_bad_checkpoint_is_an_error(tmp_path):
    state = make_state()
    with pytest.raises(StoreError, match="can not be loaded"):
        load_state(state, tmp_path / "none")
    save_state(state, tmp_path / "ckpt")
    model = build_vm(DnnConfig(), FeatureSchema(SCHEMA.fields[:2]))
    other = TrainState(model, build_optimizer(OPTIM, model))
    with pytest.raises(StoreError, match="config"):
        load_state(other, tmp_path / "ckpt")
    counters = tmp_path / "ckpt" / "counters.json"
    text = counters.read_text().replace('"format_version": 1', '"format_version": 9')
    counters.write_text(text)
    with pytest.raises(StoreError, match="format_version"):
        load_state(state, tmp_path / "ckpt")


def test_progress_of_one_class_has_no_ne():
    progress = Progress(1, 2, BinarySums.from_probs(np.ones(2), np.ones(2) / 2), 0.1, 1.0)
    assert "ne" not in [name for _, _, name, _ in progress_records(progress)]
    empty = Progress(1, 0, BinarySums(), 0.1, 1.0)
    assert [name for _, _, name, _ in progress_records(empty)] == ["loss", "rows_per_s"]
