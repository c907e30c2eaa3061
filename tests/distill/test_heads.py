"""Auxiliary head and student adapter: the paper's losses by hand, Algorithm 1 step by step, and a VM that stays plain."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from loopfm_ray.config import validate
from loopfm_ray.distill.heads import (
    AdapterConfig,
    AuxiliaryConfig,
    AuxiliaryVm,
    StudentAdapter,
    scale_gradient,
)
from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.experiments import VmStageConfig
from loopfm_ray.models.registry import build_vm, read_vm_config
from loopfm_ray.train.loop import Hooks, LoopConfig, fit
from loopfm_ray.train.optim import OptimConfig, build_adapter_optimizer, build_optimizer
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import first_logit, make_adapter_step, make_objective
from tests.model_inputs import SCHEMA, make_batch

OPTIM = OptimConfig(lr=0.01, warmup_steps=0)
KINDS = ("dnn", "deepfm", "dcnv2", "dlrm", "autoint", "din", "finalmlp")
FULL = AuxiliaryConfig(
    hidden=(4,), gradient_scale=3.0, label_scale=1.5, weight=2.0, adapter=AdapterConfig(weight=0.5)
)


def make(config=FULL, kind="dnn", seed=0):
    torch.manual_seed(seed)
    hidden = {} if kind == "autoint" else {"hidden": [6, 5]}
    vm = build_vm(read_vm_config({"kind": kind, "embed_dim": 4, **hidden}), SCHEMA)
    return AuxiliaryVm(vm, config)


def logloss(logit, target):
    """Mean cross entropy of numpy arrays in double precision."""
    prob = 1 / (1 + np.exp(-logit.detach().double().numpy()))
    target = target.detach().double().numpy()
    return float(-np.mean(target * np.log(prob) + (1 - target) * np.log1p(-prob)))


def test_the_gradient_is_scaled_and_the_value_is_not():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x, 4.0)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [4.0, 12.0]


def test_the_losses_by_hand():
    model, batch = make(), make_batch(num_rows=20)
    out = model(batch)
    found = make_objective(model, auxiliary=model)(batch).total.item()
    teacher = batch.teacher_prob
    labels = sum(logloss(out.logit[:, task], batch.label[:, task]) for task in range(2))
    target = torch.minimum(torch.ones(20), 1.5 * teacher)
    assert (target == 1).any()
    fresh = torch.sigmoid(model.adapters[0](teacher))
    expected = (
        labels
        + 2.0 * logloss(out.distilled[:, 0], target)
        + 0.5 * logloss(out.adapted[:, 0], fresh)
    )
    assert found == pytest.approx(expected, rel=1e-6)


def gradients(config):
    model, batch = make(config), make_batch(num_rows=20)
    make_objective(model, auxiliary=model)(batch).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_beta_scales_what_the_heads_send_into_the_vm_and_nothing_else():
    bare = {"hidden": (4,), "adapter": None}
    none, one, five = (
        gradients(AuxiliaryConfig(gradient_scale=beta, **bare)) for beta in (0.0, 1.0, 5.0)
    )
    for name, gradient in one.items():
        if name.startswith("head."):
            assert torch.equal(gradient, none[name])
            assert torch.equal(gradient, five[name])
        else:
            by_head = gradient - none[name]
            torch.testing.assert_close(five[name] - none[name], 5.0 * by_head, atol=1e-6, rtol=1e-3)
    assert any(
        (one[name] - none[name]).abs().max() > 1e-5 for name in one if name.startswith("vm.")
    )
    # what the served logit alone reads learns from labels alone
    for name in one:
        if name.startswith("vm.tower.head.out") or name.startswith("vm.tower.out"):
            assert torch.equal(one[name], none[name])


def test_an_adapter_begins_with_the_predictions_of_the_fm():
    prob = torch.tensor([0.001, 0.3, 0.98])
    torch.testing.assert_close(torch.sigmoid(StudentAdapter(8)(prob)), prob)
    assert torch.isfinite(StudentAdapter(8)(torch.tensor([0.0, 1.0]))).all()


def test_an_adapter_learns_the_labels_of_a_biased_fm():
    torch.manual_seed(0)
    model = make()
    step = make_adapter_step(model, torch.optim.Adam(model.adapters.parameters(), lr=0.02))
    batch = make_batch(num_rows=512)
    label = (torch.rand(512) < 0.1).float()
    batch.label[:, 0] = label
    batch.teacher_prob[:] = 0.5
    for _ in range(200):
        step(batch)
    assert torch.sigmoid(model.adapters[0](batch.teacher_prob)).mean().item() == pytest.approx(
        label.mean().item(), abs=0.01
    )


@pytest.mark.parametrize("has_own_head", [True, False])
def test_algorithm_1_step_by_step(has_own_head):
    adapter = AdapterConfig(has_own_head=has_own_head, lr=0.1)
    config = AuxiliaryConfig(hidden=(4,), label_scale=1.2, adapter=adapter)
    model, twin = make(config), make(config)
    batches = [make_batch(num_rows=12, seed=seed) for seed in range(4)]
    state = TrainState(
        model, build_optimizer(OPTIM, model), adapter_optimizer=build_adapter_optimizer(model)
    )
    hooks = Hooks(before_step=make_adapter_step(model, state.adapter_optimizer))
    fit(state, batches, make_objective(model, auxiliary=model), LoopConfig(optim=OPTIM), 4, hooks)

    of_adapter = torch.optim.Adam(twin.adapters.parameters(), lr=0.1)
    others = [p for name, p in twin.named_parameters() if not name.startswith("adapters.")]
    of_vm = torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)
    bce = functional.binary_cross_entropy_with_logits
    for number, batch in enumerate(batches):
        teacher = batch.teacher_prob
        of_adapter.zero_grad()
        bce(twin.adapters[0](teacher), batch.label[:, 0]).backward()  # 1
        of_adapter.step()
        fresh = torch.sigmoid(twin.adapters[0](teacher)).detach()  # 2
        out = twin(batch)
        loss = bce(out.logit[:, 0], batch.label[:, 0]) + bce(out.logit[:, 1], batch.label[:, 1])
        loss = (
            loss
            + bce(out.distilled[:, 0], (1.2 * teacher).clamp_max(1))
            + bce(out.adapted[:, 0], fresh)
        )
        for group in of_vm.param_groups:
            group["lr"] = 0.01 * max(0.1, (4 - number) / 1.2) if 4 - number < 1.2 else 0.01
        of_vm.zero_grad()
        loss.backward()  # 3
        of_vm.step()
    for (name, mine), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name, atol=1e-6, rtol=1e-4)


def test_the_adapter_moves_in_its_own_step_alone():
    model, batch = make(), make_batch()
    optimizer = build_optimizer(OPTIM, model)
    before = copy.deepcopy(model.adapters.state_dict())
    make_objective(model, auxiliary=model)(batch).total.backward()
    optimizer.step()
    assert all(
        torch.equal(value, before[name]) for name, value in model.adapters.state_dict().items()
    )
    vm = copy.deepcopy(model.vm.state_dict())
    make_adapter_step(model, build_adapter_optimizer(model))(batch)
    assert all(torch.equal(value, vm[name]) for name, value in model.vm.state_dict().items())
    moved = model.adapters.state_dict()
    assert not torch.equal(moved["0.out.bias"], before["0.out.bias"])


def test_two_workers_take_the_adapters_step_of_one():
    whole, batch = make(), make_batch(num_rows=12)
    make_adapter_step(whole, build_adapter_optimizer(whole))(batch)
    halves = [make_batch(num_rows=12), make_batch(num_rows=12)]
    for half, part in zip(halves, (slice(0, 5), slice(5, 12)), strict=True):
        for name in ("label", "teacher_prob"):
            object.__setattr__(half, name, getattr(half, name)[part])
    sums: list[list[torch.Tensor]] = []

    def collect(tensors):
        sums.append([tensor.clone() for tensor in tensors])

    first = make()
    for half in halves:
        make_adapter_step(copy.deepcopy(first), build_adapter_optimizer(first), collect)(half)
    total = [a + b for a, b in zip(*sums, strict=True)]

    def add(tensors):
        for tensor, value in zip(tensors, total, strict=True):
            tensor.copy_(value)

    make_adapter_step(first, build_adapter_optimizer(first), add)(halves[0])
    for name, value in first.adapters.state_dict().items():
        torch.testing.assert_close(value, whole.adapters.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_the_plain_vm(kind):
    model, batch = make(kind=kind), make_batch()
    plain = make(kind=kind).vm
    assert {name: value.shape for name, value in model.vm.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert torch.equal(first_logit(model, batch), model.vm(batch)[:, 0])
    # the head reads what the served logit reads
    make_objective(model, auxiliary=model)(batch).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.vm.parameters() if p.grad is not None)


def test_a_resumed_training_ends_in_the_same_bits(tmp_path):
    batches = [make_batch(num_rows=12, seed=seed) for seed in range(6)]

    def start():
        model = make()
        optimizer = build_adapter_optimizer(model)
        state = TrainState(model, build_optimizer(OPTIM, model), adapter_optimizer=optimizer)
        hooks = Hooks(before_step=make_adapter_step(model, optimizer))
        return state, make_objective(model, auxiliary=model), hooks

    state, objective, hooks = start()
    fit(state, batches, objective, LoopConfig(optim=OPTIM), 6, hooks)
    first, objective, hooks = start()
    fit(first, batches[:3], objective, LoopConfig(optim=OPTIM), 6, hooks)
    save_state(first, tmp_path / "state")
    second, objective, hooks = start()
    load_state(second, tmp_path / "state")
    fit(second, batches[3:], objective, LoopConfig(optim=OPTIM), 6, hooks)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="auxiliary and kd_weight are both set"):
        validate(VmStageConfig, {"kd_weight": 1.0, "auxiliary": {}}, "test")
    with pytest.raises(ConfigError, match="auxiliary and fitnets are both set"):
        validate(VmStageConfig, {"fitnets": {}, "auxiliary": {}}, "test")
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        make(AuxiliaryConfig(layer="nowhere"))
    model, batch = make(), make_batch()
    object.__setattr__(batch, "teacher_prob", None)
    with pytest.raises(DataError, match="needs teacher predictions"):
        make_objective(model, auxiliary=model)(batch)


def test_every_task_that_the_fm_predicts_is_distilled():
    torch.manual_seed(0)
    vm = build_vm(read_vm_config({"kind": "dnn", "embed_dim": 4, "hidden": [6, 5]}), SCHEMA)
    model, batch = AuxiliaryVm(vm, FULL, num_taught=2), make_batch(num_rows=20)
    with pytest.raises(DataError, match="teacher predictions of 2 tasks, found fewer"):
        make_objective(model, auxiliary=model)(batch)
    more = torch.rand(20, 1)
    batch = replace(batch, teacher_more=more)
    out = model(batch)
    assert out.distilled.shape == out.adapted.shape == (20, 2)
    found = make_objective(model, auxiliary=model)(batch).total.item()
    expected = 0.0
    for task, prob in enumerate((batch.teacher_prob, more[:, 0])):
        fresh = torch.sigmoid(model.adapters[task](prob))
        expected += logloss(out.logit[:, task], batch.label[:, task])
        expected += 2.0 * logloss(out.distilled[:, task], (1.5 * prob).clamp_max(1))
        expected += 0.5 * logloss(out.adapted[:, task], fresh)
    assert found == pytest.approx(expected, rel=1e-6)
    # each task has an adapter of its own, which learns its own labels
    step = make_adapter_step(model, torch.optim.Adam(model.adapters.parameters(), lr=0.05))
    label = torch.stack([torch.zeros(20), torch.ones(20)], 1)
    for _ in range(60):
        step(replace(batch, label=label))
    assert model.adapters[0](batch.teacher_prob).max() < model.adapters[1](more[:, 0]).min()

    plain, kd = make_objective(vm)(batch).total, make_objective(vm, kd_weight=2.0)(batch).total
    logit = vm(batch)
    follows = logloss(logit[:, 0], batch.teacher_prob) + logloss(logit[:, 1], more[:, 0])
    assert (kd - plain).item() == pytest.approx(2.0 * follows, rel=1e-5)
