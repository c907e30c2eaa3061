"""ExFM's auxiliary head and student adapter: the VM learns from the FM through heads that are not served.

With one head for both targets, the FM's bias goes straight into the served probability. Here the FM is followed by a
head of its own on the VM's last hidden layer, so that only the representation is shared, and the VM that is served is the
plain one.

Source: ExFM, arXiv 2502.17494, sections 3.3 and 3.4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.config import Config
from loopfm_ray.data.batch import Batch
from loopfm_ray.distill.losses import weighted_bce_sum
from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import VerticalModel

__all__ = [
    "AdapterConfig",
    "AuxiliaryConfig",
    "AuxiliaryOutput",
    "AuxiliaryVm",
    "StudentAdapter",
    "adapter_sum",
    "auxiliary_sum",
    "scale_gradient",
]

_EPSILON = 1e-6


class AdapterConfig(Config):
    """The student adapter: recalibrates the FM's prediction on fresh labels before the VM follows it."""

    hidden: PositiveInt = 8
    """Width of its hidden layer."""
    lr: PositiveFloat = 1e-2
    """Learning rate of its own optimizer."""
    weight: NonNegativeFloat = 1.0
    """Weight of the loss against its output, beside that against the FM itself."""
    has_own_head: bool = True
    """Whether its output is followed by a head of its own; else by the head that follows the FM."""


class AuxiliaryConfig(Config):
    """The auxiliary head, with the three scalings of the paper's section 3.3."""

    layer: str | None = None
    """The VM's hidden layer that heads read; null is its last one, the one that the served logit is read from."""
    hidden: tuple[PositiveInt, ...] = (32,)
    """Hidden widths of a head."""
    gradient_scale: NonNegativeFloat = 1.0
    """beta: what the gradient of the heads is multiplied by where it enters the VM."""
    label_scale: PositiveFloat = 1.0
    """alpha: what the FM's probability is multiplied by, then clipped at 1: probabilities near 0 say little."""
    weight: NonNegativeFloat = 1.0
    """w: weight of the loss against the FM."""
    adapter: AdapterConfig | None = Field(default=None)
    """The student adapter; null leaves it out."""


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # Any: torch's context
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        scaled: Tensor = grad[0] * ctx.factor
        return scaled, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, whose gradient is `factor` times what comes back. Source: equation 4, GS."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return scaled


class StudentAdapter(nn.Module):
    """From the FM's probability to a logit that is calibrated for fresh labels.

    `logit(p) + MLP(logit(p))`, the MLP's last layer starting at 0: before it has learnt anything it gives the FM's own
    prediction. The paper says "MLP" alone.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, teacher_prob: Tensor) -> Tensor:
        """Return [B] logits from probabilities [B]."""
        given = torch.logit(teacher_prob, _EPSILON)[:, None]
        moved: Tensor = self.out(functional.relu(self.inner(given)))
        return (given + moved)[:, 0]


@dataclass(frozen=True)
class AuxiliaryOutput:
    """What a VM gives while heads beside it learn."""

    logit: Tensor
    """[B, T] of the serving head."""
    distilled: Tensor
    """[B, K] of the head that follows the FM, for the K tasks that it predicts."""
    adapted: Tensor | None
    """[B, K] of the head that follows the adapters; None without them."""


class AuxiliaryVm(nn.Module):
    """A VM and the heads beside it, which are thrown away after training."""

    def __init__(self, vm: VerticalModel, config: AuxiliaryConfig, num_taught: int = 1) -> None:
        """Put heads on a layer of `vm`, for the first `num_taught` tasks.

        Raises:
            ConfigError: the VM has no such layer.
        """
        super().__init__()
        names = list(vm.tower.layer_dims)
        if config.layer is None and not names:
            raise ConfigError(
                "an auxiliary head reads a hidden layer, and the VM has none; give it one"
            )
        self.vm, self.config, self.num_taught = vm, config, num_taught
        self.layer = config.layer or names[-1]
        dim = vm.layer_dim(self.layer)
        self.head = _head(dim, config, num_taught)
        adapter = config.adapter
        num_adapters = num_taught if adapter is not None else 0
        hidden = adapter.hidden if adapter is not None else 0
        self.adapters = nn.ModuleList(StudentAdapter(hidden) for _ in range(num_adapters))
        # their gradients do not come with those of the VM
        self._ddp_params_and_buffers_to_ignore = [
            f"adapters.{name}" for name, _ in self.adapters.named_parameters()
        ]
        has_own = adapter is not None and adapter.has_own_head
        self.adapted_head = _head(dim, config, num_taught) if has_own else None

    def forward(self, batch: Batch) -> AuxiliaryOutput:
        """Score a batch with all heads."""
        found = self.vm.forward_all(batch)
        shared = scale_gradient(found.layers[self.layer], self.config.gradient_scale)
        distilled = self.head(shared)
        adapted = None
        if len(self.adapters):
            adapted = distilled if self.adapted_head is None else self.adapted_head(shared)
        return AuxiliaryOutput(found.logit, distilled, adapted)


def _head(dim: int, config: AuxiliaryConfig, num_taught: int) -> nn.Module:
    mlp = Mlp(dim, config.hidden)
    return nn.Sequential(mlp, nn.Linear(mlp.out_dim, num_taught))


def adapter_sum(model: AuxiliaryVm, batch: Batch) -> Tensor:
    """Return [] the summed loss that trains the adapters alone: their outputs against the labels.

    Source: equation 6, L_sta.

    Raises:
        DataError: the batch lacks teacher predictions.
    """
    teacher = _teacher(batch, model)
    losses = [
        weighted_bce_sum(adapter(prob), label, torch.ones_like(label))[0]
        for adapter, prob, label in zip(
            model.adapters, teacher.unbind(1), batch.label.unbind(1), strict=False
        )
    ]
    return torch.stack(losses).sum()


def auxiliary_sum(model: AuxiliaryVm, output: AuxiliaryOutput, batch: Batch) -> Tensor:
    """Return [] what the heads add to the summed loss of a batch, over all tasks that are taught.

    `w h(distilled, min(1, alpha p))`, equation 5 with the scalings of section 3.3, and with an adapter its weight times
    `h(adapted, sg(sigmoid(adapter(p))))`, equation 7.

    Raises:
        DataError: the batch lacks teacher predictions.
    """
    config, teacher = model.config, _teacher(batch, model)
    weight = torch.ones_like(teacher[:, 0])
    total = weight.new_zeros(())
    for place, prob in enumerate(teacher.unbind(1)):
        target = (config.label_scale * prob).clamp_max(1.0)
        follows = weighted_bce_sum(output.distilled[:, place], target, weight)[0]
        total = total + config.weight * follows
        if output.adapted is not None and config.adapter is not None:
            with torch.no_grad():
                fresh = torch.sigmoid(model.adapters[place](prob))
            adapted = weighted_bce_sum(output.adapted[:, place], fresh, weight)[0]
            total = total + config.adapter.weight * adapted
    return total


def _teacher(batch: Batch, model: AuxiliaryVm) -> Tensor:
    """Return [B, K] the FM's probabilities of the tasks that are taught."""
    if batch.teacher_prob is None or (batch.teacher_more is None and model.num_taught > 1):
        raise DataError(
            f"an auxiliary head needs teacher predictions of {model.num_taught} tasks, found fewer; train on a joined set,"
            " or take `auxiliary` out of the VM's config"
        )
    first = batch.teacher_prob[:, None]
    if batch.teacher_more is None or model.num_taught == 1:
        return first
    return torch.cat([first, batch.teacher_more], 1)
