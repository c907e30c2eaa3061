"""Optimizers of single rows: what a step costs depends on the rows it touches, not on the table."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from loopfm_ray.config import Config

__all__ = [
    "RowAdagrad",
    "RowAdagradConfig",
    "RowAdam",
    "RowAdamConfig",
    "RowOptimConfig",
    "RowOptimizer",
    "Touched",
    "build_row_optimizer",
    "write_rows",
]

Beta = Annotated[float, Field(gt=0, lt=1)]


class RowAdagradConfig(Config):
    """Adagrad with one number of state a row: the sum of the mean squares of its gradients."""

    kind: Literal["row_adagrad"] = "row_adagrad"
    lr: PositiveFloat = 0.02
    """Learning rate."""
    eps: PositiveFloat = 1e-8
    """Added to the root."""
    initial: NonNegativeFloat = 0.0
    """What the sum begins with."""


class RowAdamConfig(Config):
    """Adam that leaves rows alone which a step does not touch; each row counts its own steps."""

    kind: Literal["row_adam"] = "row_adam"
    lr: PositiveFloat = 2e-3
    """Learning rate."""
    beta1: Beta = 0.9
    """How much of the mean gradient stays."""
    beta2: Beta = 0.999
    """How much of the mean square stays."""
    eps: PositiveFloat = 1e-8
    """Added to the root."""


RowOptimConfig = Annotated[RowAdagradConfig | RowAdamConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Touched:
    """What a step updates."""

    rows: Tensor
    """[m] int64, none twice."""
    values: Tensor
    """[m, D] what these rows are now; it may be changed in place."""
    gradient: Tensor
    """[m, D]"""


class RowOptimizer(Protocol):
    """Updates some rows of a table; the state of each row lies at its place in tensors beside the table."""

    def state(self, num_rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Return the shape of each tensor of state and what it begins with."""
        ...

    def update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        touched: Touched,
        factor: float,
    ) -> None:
        """Take one step in place.

        Args:
            table: [n, D].
            state: tensors of n rows each.
            touched: the rows to update.
            factor: share of the learning rate.
        """
        ...


class RowAdagrad:
    """Row-wise Adagrad.

    Source: the exact row-wise Adagrad of FBGEMM and TorchRec: sum += mean(g * g), row -= lr * g / (sqrt(sum) + eps).
    """

    def __init__(self, config: RowAdagradConfig) -> None:
        self.config = config

    def state(self, num_rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """See `RowOptimizer`."""
        del dim
        return {"square_sum": ((num_rows,), self.config.initial)}

    def update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        touched: Touched,
        factor: float,
    ) -> None:
        """See `RowOptimizer`."""
        total = state["square_sum"].index_select(0, touched.rows)
        total += touched.gradient.square().mean(1)
        write_rows(state["square_sum"], touched.rows, total)
        scale = -self.config.lr * factor / (total.sqrt() + self.config.eps)
        write_rows(table, touched.rows, touched.values.addcmul_(touched.gradient, scale[:, None]))


class RowAdam:
    """Adam on the touched rows alone.

    `torch.optim.SparseAdam` corrects the means by the steps of the whole table. Here each row is corrected by the steps that
    it took itself, so that the first step of a row that is met late, or anew, is as long as that of any other.

    Source: Adam, arXiv 1412.6980, Algorithm 1.
    """

    def __init__(self, config: RowAdamConfig) -> None:
        self.config = config

    def state(self, num_rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """See `RowOptimizer`."""
        shape = (num_rows, dim)
        return {"mean": (shape, 0.0), "square_mean": (shape, 0.0), "num_steps": ((num_rows,), 0.0)}

    def update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        touched: Touched,
        factor: float,
    ) -> None:
        """See `RowOptimizer`."""
        config, rows, gradient = self.config, touched.rows, touched.gradient
        mean = state["mean"].index_select(0, rows).lerp_(gradient, 1 - config.beta1)
        square = state["square_mean"].index_select(0, rows)
        square.lerp_(gradient.square(), 1 - config.beta2)
        steps = state["num_steps"].index_select(0, rows) + 1
        for name, value in (("mean", mean), ("square_mean", square), ("num_steps", steps)):
            write_rows(state[name], rows, value)
        # 1 - beta ** steps: written so, it loses four digits in floats of 32 bits
        mean_share = -torch.expm1(steps * math.log(config.beta1))
        square_share = -torch.expm1(steps * math.log(config.beta2))
        root = (square / square_share[:, None]).sqrt_().add_(config.eps)
        step = mean.div_(root) * (-config.lr * factor / mean_share)[:, None]
        write_rows(table, rows, touched.values.add_(step))


def write_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Set rows [m] of a float32 table [n] or [n, D] to values of that many rows."""
    if table.device.type != "cpu" or not table.numel():
        table[rows] = values
        return
    # a row is one item to numpy, copied at once; torch goes number by number and takes twice as long
    item = f"V{4 * table[0].numel()}"
    target = table.numpy().view(item).reshape(-1)
    target[rows.numpy()] = values.contiguous().numpy().view(item).reshape(-1)


def build_row_optimizer(config: RowAdagradConfig | RowAdamConfig) -> RowOptimizer:
    """Build the row optimizer of a config."""
    return RowAdam(config) if isinstance(config, RowAdamConfig) else RowAdagrad(config)
