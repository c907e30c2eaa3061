"""What one step minimises: the objectives of the FM and the VM."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopfm_ray.data.collate import Batch
from loopfm_ray.distill.heads import AuxiliaryOutput, AuxiliaryVm, adapter_sum, auxiliary_sum
from loopfm_ray.distill.hints import HintedOutput
from loopfm_ray.distill.losses import normalise, weighted_bce_sum, weighted_mse_sum
from loopfm_ray.errors import DataError
from loopfm_ray.models.foundation import FmOutput
from loopfm_ray.models.joint import JointOutput

__all__ = [
    "Objective",
    "StepLoss",
    "Workers",
    "first_logit",
    "make_adapter_step",
    "make_objective",
    "task_logits",
]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one batch, and what progress is measured on."""

    total: Tensor
    """[] what is differentiated."""
    logit: Tensor
    """[B] first task, without gradient."""
    label: Tensor
    """[B] first task."""


Objective = Callable[[Batch], StepLoss]


@dataclass(frozen=True)
class Workers:
    """How a step is spread: `world_size` workers average their gradients."""

    world_size: int = 1
    count_rows: Callable[[int], float] = float
    """Rows of this worker's batch -> rows of all workers' batches in this step."""


def make_objective(
    model: nn.Module,
    *,
    kd_weight: float = 0.0,
    hint_weight: float = 0.0,
    auxiliary: AuxiliaryVm | None = None,
    workers: Workers | None = None,
) -> Objective:
    """Return the objective of an FM or a VM: cross entropy summed over tasks, and what follows the teacher.

    A `JointFm` adds the loss of its bottleneck, from which the FM learns nothing, an `AuxiliaryVm` those of its heads.

    The KD loss compares the first task with `Batch.teacher_prob` and the others with `Batch.teacher_more` if it is there, the hint loss the hint of a `HintedVm` with
    `Batch.teacher_latent`.

    Args:
        model: gives [B, T] logits, an `FmOutput`, `JointOutput`, `HintedOutput` or `AuxiliaryOutput`; may be wrapped for data
            parallelism.
        kd_weight: weight of the KD loss; 0 leaves it out.
        hint_weight: weight of the hint loss; 0 leaves it out.
        auxiliary: what `model` is, unwrapped, when it has heads beside it.
        workers: data parallelism; none is a single worker.
    """
    shared = workers or Workers()

    def objective(batch: Batch) -> StepLoss:
        output = model(batch)
        logit = _logits(output)
        weight = torch.ones_like(logit[:, 0])
        total = torch.stack(
            [
                weighted_bce_sum(logit[:, task], batch.label[:, task], weight)[0]
                for task in range(logit.shape[1])
            ]
        ).sum()
        if kd_weight:
            total = total + kd_weight * _kd_sum(logit, batch, weight)
        if hint_weight:
            total = total + hint_weight * _hint_sum(output, batch, weight)
        if isinstance(output, JointOutput):
            total = total + output.bottleneck_sum
        if auxiliary is not None:
            total = total + auxiliary_sum(auxiliary, output, batch)
        num_rows = shared.count_rows(len(batch.label))
        total = normalise(total, num_rows, shared.world_size)
        return StepLoss(total, logit[:, 0].detach(), batch.label[:, 0])

    return objective


def make_adapter_step(
    model: AuxiliaryVm,
    optimizer: torch.optim.Optimizer,
    reduce: Callable[[list[Tensor]], None] | None = None,
) -> Callable[[Batch], None]:
    """Return what takes the adapter's step on a batch, to be called before the VM's step on the same batch.

    Source: ExFM, arXiv 2502.17494, Algorithm 1: a step on L_sta; then the adapter's output, without gradient, is a target
    of the VM.

    Args:
        model: a VM with an adapter.
        optimizer: of the adapter alone.
        reduce: sums tensors over all workers in place; none is a single worker.

    Raises:
        AssertionError: the model has no adapter.
    """
    parameters = list(model.adapters.parameters())
    if not parameters:
        raise AssertionError("there is no adapter to train")

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        num_rows = torch.tensor([float(len(batch.label))])
        gradients = list(torch.autograd.grad(adapter_sum(model, batch), parameters))
        if reduce is not None:
            reduce([num_rows, *gradients])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / num_rows.to(gradient.device).clamp_min(1.0)
        optimizer.step()

    return step


def task_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return [B, T]: the logits of an FM or a VM."""
    return _logits(model(batch))


def first_logit(model: nn.Module, batch: Batch) -> Tensor:
    """Return [B]: the first task's logit of an FM or a VM."""
    return task_logits(model, batch)[:, 0]


def _logits(output: Tensor | FmOutput | JointOutput | HintedOutput | AuxiliaryOutput) -> Tensor:
    return output if isinstance(output, Tensor) else output.logit


def _kd_sum(logit: Tensor, batch: Batch, weight: Tensor) -> Tensor:
    if batch.teacher_prob is None:
        raise DataError(
            "kd_weight needs teacher predictions, found none; train on a joined set, or set"
            " kd_weight to 0"
        )
    total = weighted_bce_sum(logit[:, 0], batch.teacher_prob, weight)[0]
    if batch.teacher_more is None:
        return total
    others = zip(logit[:, 1:].unbind(1), batch.teacher_more.unbind(1), strict=True)
    return total + sum(weighted_bce_sum(one, prob, weight)[0] for one, prob in others)


def _hint_sum(output: Tensor | FmOutput | HintedOutput, batch: Batch, weight: Tensor) -> Tensor:
    if batch.teacher_latent is None or not isinstance(output, HintedOutput):
        found = type(output).__name__ if batch.teacher_latent is not None else "no latents"
        raise DataError(
            "hint_weight needs a HintedVm and the rows' own latents, found"
            f" {found}; train on a joined set that holds them, or leave fitnets out"
        )
    return weighted_mse_sum(output.hint, batch.teacher_latent, weight)[0]
