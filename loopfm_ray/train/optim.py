"""Adam with its own rate and decay for embeddings, and the schedule of the learning rate."""

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from loopfm_ray.config import Config
from loopfm_ray.distill.heads import AuxiliaryVm, StudentAdapter
from loopfm_ray.models.bottleneck import Bottleneck
from loopfm_ray.models.embeddings import FieldEmbeddings

__all__ = ["OptimConfig", "build_adapter_optimizer", "build_optimizer", "rate_factor", "set_rate"]

Share = Annotated[float, Field(ge=0, le=1)]


class OptimConfig(Config):
    """Adam with decoupled weight decay; the rate warms up, holds, and falls in a line at the end."""

    lr: PositiveFloat = 2e-3
    """Learning rate."""
    embed_lr: PositiveFloat | None = None
    """Learning rate of embedding tables; null takes `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of all but embedding tables."""
    embed_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of embedding tables; it also shrinks rows that a batch does not touch."""
    warmup_steps: NonNegativeInt = 50
    """Steps over which the rate rises to its full value."""
    decay_share: Share = 0.3
    """Share of the steps, at the end, over which the rate falls."""
    final_share: Share = 0.1
    """Share of the full rate that is left at the end."""


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Build the optimizer of a model; with no weight decay it is Adam.

    A bottleneck that is trained along has the learning rate of its own config and no weight decay. A student adapter is
    left to `build_adapter_optimizer`.
    """
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, FieldEmbeddings)
    }
    bottlenecks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    adapters = [module for module in model.modules() if isinstance(module, StudentAdapter)]
    beside = {
        id(parameter) for module in (*bottlenecks, *adapters) for parameter in module.parameters()
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in learning if id(parameter) not in beside]
    dense = [p for p in parameters if id(p) not in tables]
    embeddings = [p for p in parameters if id(p) in tables]
    embed_lr = config.embed_lr or config.lr
    groups = [
        {"params": dense, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": embeddings, "lr": embed_lr, "weight_decay": config.embed_weight_decay},
    ]
    for module in bottlenecks:
        own = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups.append({"params": own, "lr": module.config.lr, "weight_decay": 0.0})
    groups = [{**group, "full_lr": group["lr"]} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, fused=True)


def build_adapter_optimizer(model: nn.Module) -> torch.optim.Adam | None:
    """Build the optimizer of a VM's student adapter, at a constant rate of its own; None where there is no adapter."""
    if not isinstance(model, AuxiliaryVm) or model.config.adapter is None:
        return None
    return torch.optim.Adam(model.adapters.parameters(), lr=model.config.adapter.lr, fused=True)


def rate_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the share of the full learning rate at `step`, counted from 0, of `total_steps`."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_share * total_steps
    left = total_steps - step
    if left >= decay_steps or decay_steps == 0:
        return rise
    return rise * max(config.final_share, left / decay_steps)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to `factor` times its full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
