"""A bottleneck that is trained along with an FM: the FM does not notice, the bottleneck learns, workers make no difference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from loopfm_ray.errors import ConfigError
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.channel import ChannelRows, channel_report
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.joint import RunningMoments, build_joint
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.train.loop import Hooks, LoopConfig, fit
from loopfm_ray.train.optim import OptimConfig, build_optimizer
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import Workers, make_objective
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch, take_rows

LAYERS = ("embedding", "hidden_0")
SMALL = BottleneckConfig(
    fitted="jointly", metric="spread", latent_dim=4, prefixes=(2, 4), predict_weight=0.5, lr=0.02
)
LOOP = LoopConfig(optim=OptimConfig(lr=0.01, warmup_steps=2, weight_decay=0.1))


def make_fm(dropout=0.2):
    torch.manual_seed(0)
    config = FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5), dropout=dropout)
    return build_fm(config, SCHEMA, ITEM_FIELDS)


def make_state(config=SMALL, dropout=0.2):
    joint = build_joint(make_fm(dropout), config, LAYERS)
    return TrainState(joint, build_optimizer(LOOP.optim, joint))


def batches(num, start=0):
    return [make_batch(num_rows=20 + seed % 3, seed=seed) for seed in range(start, start + num)]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_fm_gets_the_same_bits_with_and_without():
    fm = make_fm()
    alone = TrainState(fm, build_optimizer(LOOP.optim, fm))
    fit(alone, batches(12), make_objective(fm), LOOP, 12)
    for config in (SMALL, SMALL.model_copy(update={"hidden": 3, "lr": 0.5})):
        state = make_state(config)
        before = weights(state.model.bottleneck)
        fit(state, batches(12), make_objective(state.model), LOOP, 12)
        assert_same_bits(weights(fm), weights(state.model.fm))
        after = weights(state.model.bottleneck)
        fixed = {name for name in before if torch.equal(before[name], after[name])}
        assert fixed == {"weight", "step"}


def test_the_bottleneck_learns_from_a_random_start():
    state = make_state(SMALL.model_copy(update={"predict_weight": 0.0}), dropout=0.0)
    fm, bottleneck = state.model.fm, state.model.bottleneck
    with torch.no_grad():
        unseen = fm(make_batch(500, seed=1000)).embedding(LAYERS)
    bottleneck.set_moments(unseen.mean(0), unseen.var(0))
    rows = ChannelRows(unseen)
    start = channel_report(bottleneck, rows, CodeSpec(16, 4)).variance_explained
    steps = [make_batch(num_rows=100, seed=seed) for seed in range(400)]
    fit(state, steps, make_objective(state.model), LOOP, 400)
    with torch.no_grad():
        unseen = fm(make_batch(500, seed=1000)).embedding(LAYERS)
    found = channel_report(bottleneck, ChannelRows(unseen), CodeSpec(16, 4)).variance_explained
    # of what the best 4 directions could keep, were there no tanh
    normal = bottleneck.standardise(unseen)
    values = torch.linalg.eigvalsh(torch.cov(normal.T))
    best = float(values[-4:].sum() / values.sum())
    assert start["latent"] < 0.25 * best
    assert 0.75 * best < found["latent"] <= best + 1e-6
    assert found["prefix_2"] < found["prefix_4"]


def test_a_random_start_decodes_the_projection_on_its_directions():
    torch.manual_seed(3)
    bottleneck = build_bottleneck(SMALL.model_copy(update={"spread": 50.0}), 10)
    bottleneck.initialise_at_random()
    x = torch.randn(200, 10)
    for prefix in SMALL.prefixes:
        directions = torch.linalg.qr(bottleneck.encoder.weight[:prefix].T)[0]
        expected = x @ directions @ directions.T
        decoded = bottleneck.decode(bottleneck.encode(x), prefix)
        np.testing.assert_allclose(decoded.detach(), expected.detach(), atol=1e-2)


def test_running_moments_are_those_of_all_rows_while_few_were_seen():
    generator = torch.Generator().manual_seed(0)
    # far from 0, where the difference of mean square and square of the mean has no digits left in half the bits
    parts = [1e4 + torch.randn(50, 3, generator=generator) * (n + 1) for n in range(20)]
    moments = RunningMoments(3)
    for part in parts:
        moments.update(part)
    whole = torch.cat(parts).double()
    torch.testing.assert_close(moments.mean, whole.mean(0))
    torch.testing.assert_close(moments.variance, whole.var(0, correction=0))


def test_running_moments_follow_a_stream_that_moves():
    generator = torch.Generator().manual_seed(0)
    moments = RunningMoments(2)
    for step in range(400):
        scale, shift = (1.0, 0.0) if step < 200 else (3.0, 10.0)
        moments.update(shift + scale * torch.randn(100, 2, generator=generator))
    torch.testing.assert_close(moments.mean, torch.full((2,), 10.0).double(), atol=0.2, rtol=0)
    torch.testing.assert_close(moments.variance, torch.full((2,), 9.0).double(), atol=0.6, rtol=0)


def test_moments_move_in_training_alone():
    model = make_state(dropout=0.0).model
    model.eval()
    before = weights(model)
    first = model(make_batch())
    assert_same_bits(before, weights(model))
    assert first.bottleneck_sum.item() > 0
    model.train()
    model(make_batch())
    assert int(model.moments.num_batches) == 1
    embedding = model.fm(make_batch()).embedding(LAYERS).detach()
    torch.testing.assert_close(model.bottleneck.mean, embedding.mean(0))


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resume_goes_on_with_the_same_bits(tmp_path, stop):
    whole = make_state()
    fit(whole, batches(10), make_objective(whole.model), LOOP, 10)
    first = make_state()
    fit(first, batches(stop), make_objective(first.model), LOOP, 10)
    save_state(first, tmp_path / "state")
    torch.manual_seed(99)
    second = make_state(SMALL.model_copy(update={"spread": 1.0}))
    load_state(second, tmp_path / "state")
    fit(second, batches(10 - stop, stop), make_objective(second.model), LOOP, 10)
    assert_same_bits(weights(whole.model), weights(second.model))


def test_the_best_weights_bring_back_the_bottleneck_of_that_step():
    state, at_best, scores = make_state(), {}, iter([0.9, 0.5, 0.8])
    config = LOOP.model_copy(update={"eval_every": 2, "patience": 5})

    def evaluate():
        value = next(scores)
        if value == 0.5:
            at_best.update(weights(state.model))
        return {"ne": value}

    fit(state, batches(6), make_objective(state.model), config, 6, Hooks(evaluate=evaluate))
    assert_same_bits(weights(state.model), at_best)


def test_the_bottleneck_learns_at_its_own_rate_without_decay():
    state = make_state()
    own = {id(parameter) for parameter in state.model.bottleneck.parameters()}
    groups = [
        group for group in state.optimizer.param_groups if {id(p) for p in group["params"]} & own
    ]
    assert len(groups) == 1
    assert {id(p) for p in groups[0]["params"]} == own
    assert (groups[0]["full_lr"], groups[0]["weight_decay"]) == (0.02, 0.0)


SHARES = (slice(0, 3), slice(3, None))


FORMS = {
    "reconstruct": SMALL,
    "predict": SMALL.model_copy(update={"reconstruct_weight": 0.0}),  # leaves the decoders out
}


def train_as_worker(rank, folder):
    """Train each form on this worker's share of the batches and keep its weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for name, config in FORMS.items():
        state = make_state(config, dropout=0.0)
        rows = iter([float(len(batch.label)) for batch in batches(6)])
        workers = Workers(2, lambda _, rows=rows: next(rows))
        objective = make_objective(DistributedDataParallel(state.model), workers=workers)
        fit(state, [take_rows(batch, SHARES[rank]) for batch in batches(6)], objective, LOOP, 6)
        torch.save(state.model.state_dict(), Path(folder) / f"{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_workers_train_as_one(tmp_path):
    multiprocessing.spawn(train_as_worker, (str(tmp_path),), nprocs=2)
    for form, config in FORMS.items():
        whole = make_state(config, dropout=0.0)
        fit(whole, batches(6), make_objective(whole.model), LOOP, 6)
        found = [torch.load(tmp_path / f"{form}_{rank}.pt") for rank in range(2)]
        assert_same_bits(*found)
        for name, tensor in whole.model.state_dict().items():
            # where a gradient is near Adam's epsilon, its rounding shows
            torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("metric", "gradient"), ("rounding", "noise"), ("rotation", "random"), ("epochs", 2)],
)
def test_what_needs_a_trained_fm_is_refused_by_name(name, value):
    settings = {"fitted": "jointly", "metric": "spread", name: value}
    with pytest.raises(ValidationError, match=f"fitted jointly takes {name} .* found {value}"):
        BottleneckConfig(**settings)
    BottleneckConfig(**{**settings, "fitted": "after"})


def test_layers_too_narrow_are_refused_before_training():
    with pytest.raises(ConfigError, match="at most the embedding's 6"):
        build_joint(make_fm(), SMALL.model_copy(update={"latent_dim": 8}), ["hidden_0"])
    with pytest.raises(ConfigError, match="no layers"):
        build_joint(make_fm(), SMALL, ["hidden_7"])
