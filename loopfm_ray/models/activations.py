"""Activations that have state or parameters, and the table of all by name."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Activation", "Dice", "build_activation"]

Activation = Literal["relu", "prelu", "dice"]


class Dice(nn.Module):
    """A PReLU whose bend follows the data: `p x + (1 - p) a x` with `p = sigmoid((x - mean) / std)`.

    Mean and variance are those of the batch while training and running averages afterwards. Under data parallelism each
    worker takes them from its own rows.

    Source: DIN, arXiv 1706.06978, section 5.2, equation 3.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(dim))
        self.momentum, self.epsilon = momentum, epsilon
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [..., dim] from x [..., dim]; entries outside mask [...] are left out of mean and variance."""
        mean, var = self._moments(x, mask) if self.training else (None, None)
        if mean is None or var is None:
            mean, var = self.running_mean, self.running_var
        share = torch.sigmoid((x - mean) * torch.rsqrt(var + self.epsilon))
        return x * (self.slope + share * (1 - self.slope))

    def _moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        flat = x.reshape(-1, x.shape[-1])
        kept = flat.new_ones(len(flat)) if mask is None else mask.reshape(-1).to(flat.dtype)
        count = kept.sum()
        if not bool(count):  # a batch in which nobody has a history
            return None, None
        mean = kept @ flat / count
        var = kept @ (flat - mean).square() / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return mean, var


class _Stateless(nn.Module):
    """An activation that looks at each entry alone, behind the face of `Dice`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        del mask
        out: Tensor = self.inner(x)
        return out


class _LastAxisPrelu(nn.Module):
    """A PReLU with one slope for each entry of the last axis, starting at 0.25."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((dim,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x.reshape(-1, x.shape[-1]), self.slope).view_as(x)


def build_activation(kind: Activation, dim: int) -> nn.Module:
    """Return a module from x [..., dim], and optionally a mask [...], to [..., dim]."""
    if kind == "dice":
        return Dice(dim)
    return _Stateless(nn.ReLU() if kind == "relu" else _LastAxisPrelu(dim))
