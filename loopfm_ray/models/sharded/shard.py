"""The rows of a table that one rank owns, the state of their optimizer, and gradients until the next step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loopfm_ray.models.sharded.distinct import Distinct, find_distinct
from loopfm_ray.models.sharded.exchange import LEARNS, Asked, Request, send_back
from loopfm_ray.models.sharded.group import Group
from loopfm_ray.models.sharded.optim import RowOptimizer, Touched, write_rows

__all__ = ["Route", "Shard", "pull"]


@dataclass
class Route:
    """One look-up of a training step: which rows went where, and the gradient once there is one."""

    request: Request
    asked: Asked
    rows: Tensor
    """[m] int64: rows of this shard that were asked, by rank; -1 where there is none."""
    values: Tensor
    """[m, D] what they are until the next step."""
    gradient: Tensor | None = None
    """[U, D] of the different keys of this rank."""

    def add(self, gradient: Tensor) -> None:
        """Add a gradient [U, D]."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class Shard:
    """Rows [n, D] with their optimizer; no parameter of a module, so that nothing copies it to every rank."""

    def __init__(
        self, num_rows: int, dim: int, optimizer: RowOptimizer, device: torch.device | None = None
    ) -> None:
        """Reserve memory; rows begin as zeros, untouched ones cost none."""
        self.dim, self.optimizer = dim, optimizer
        self.table = _reserve((num_rows, dim), 0.0, device)
        shapes = optimizer.state(num_rows, dim)
        self.begins = {name: value for name, (_, value) in shapes.items()}
        self.state = {name: _reserve(*spec, device) for name, spec in shapes.items()}
        self.routes: list[Route] = []
        # what makes autograd call the backward of a look-up, which has no other input with a gradient
        self.anchor = torch.zeros(0, requires_grad=True)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert all tensors, as `nn.Module._apply`."""
        self.table = function(self.table)
        self.state = {name: function(value) for name, value in self.state.items()}

    def reset(self, rows: Tensor, values: Tensor) -> None:
        """Begin anew with rows [m]: their values [m, D], and the state of a fresh row."""
        write_rows(self.table, rows, values.to(self.table.device))
        for name, value in self.state.items():
            value[rows] = self.begins[name]

    def restore(self, rows: Tensor, values: Tensor, state: Mapping[str, Tensor]) -> None:
        """Set rows [m] to the values [m, D] and the state that they had."""
        rows = rows.to(self.table.device)
        self.table[rows] = values.to(self.table.device)
        for name, value in self.state.items():
            value[rows] = state[name].to(value.device)

    def read(self, rows: Tensor) -> Tensor:
        """Return [m, D] rows; zeros for -1."""
        found = self.table.index_select(0, rows.clamp_min(0))
        return found.masked_fill_((rows < 0)[:, None], 0.0)

    def forget(self) -> None:
        """Drop the look-ups since the last step."""
        self.routes.clear()

    def step(self, group: Group, factor: float) -> None:
        """Send the gradients since the last step to their owners and update the rows that they touch.

        A row's gradient is the mean over ranks, as data parallelism has it for dense parameters. Every rank has to call it.
        """
        routes, self.routes = self.routes, []
        if not routes:
            return
        sent = [
            [count if route.gradient is not None else 0 for count in route.request.counts]
            for route in routes
        ]
        header = torch.tensor(sent, device=self.table.device).T
        came = group.swap(header.contiguous()).T.tolist()
        rows = _by_rank([(r.rows, r.asked.counts) for r in routes], came)
        values = _by_rank([(r.values, r.asked.counts) for r in routes], came)
        own = _by_rank([(self._gradient(r), r.request.counts) for r in routes], sent)
        gradient = group.exchange(own, _totals(sent), _totals(came))
        if len(routes) > 1 or group.size > 1:
            distinct = find_distinct(rows)
            rows, gradient = distinct.keys, distinct.sum(gradient) / group.size
            values = values.index_select(0, distinct.order[distinct.starts])
        is_row = rows >= 0
        if not bool(is_row.all()):
            rows, values, gradient = rows[is_row], values[is_row], gradient[is_row]
        self.optimizer.update(self.table, self.state, Touched(rows, values, gradient), factor)

    def _gradient(self, route: Route) -> Tensor:
        if route.gradient is not None:
            return route.gradient
        return self.table.new_zeros(1, self.dim).expand(sum(route.request.counts), -1)


def pull(
    group: Group, shard: Shard, distinct: Distinct, request: Request, asked: Asked, rows: Tensor
) -> Tensor:
    """Return [n, D] the rows of all keys of this rank; in a training step their gradients wait for `Shard.step`.

    Args:
        group: the ranks, all of which call it.
        shard: rows of this rank.
        distinct: the keys of this rank.
        request: what it asked the others.
        asked: what the others asked it.
        rows: [m] where in the shard that lies; -1 reads as zeros.
    """
    values = shard.read(rows)
    replies = send_back(group, values, request, asked)
    if request.status != LEARNS:
        return replies.index_select(0, distinct.place)
    route = Route(request, asked, rows, values)
    shard.routes.append(route)
    found: Tensor = _Pull.apply(shard.anchor, replies, distinct, route)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


class _Pull(torch.autograd.Function):
    """Rows of keys [n]; backward leaves the sums over the different keys in the route."""

    @staticmethod
    def forward(  # Any: torch's context
        ctx: Any, anchor: Tensor, rows: Tensor, distinct: Distinct, route: Route
    ) -> Tensor:
        del anchor
        ctx.distinct, ctx.route = distinct, route
        return rows.index_select(0, distinct.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None, None, None]:
        ctx.route.add(ctx.distinct.sum(grad[0]))
        return None, None, None, None


def _by_rank(
    parts: Sequence[tuple[Tensor, Sequence[int]]], counts: Sequence[Sequence[int]]
) -> Tensor:
    """Put tensors that are grouped by rank together by rank, then by tensor, without those that count 0."""
    pieces = [torch.split(part, list(sizes)) for part, sizes in parts]
    taken = [
        of_part[rank]
        for rank in range(len(counts[0]))
        for of_part, count in zip(pieces, counts, strict=True)
        if count[rank]
    ]
    return torch.cat(taken) if taken else parts[0][0][:0]


def _totals(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts, strict=True)]


def _reserve(shape: tuple[int, ...], value: float, device: torch.device | None) -> Tensor:
    if device is not None and device.type != "cpu":
        return torch.full(shape, value, device=device)
    # numpy asks for huge pages, without which a look-up in a large table waits for its page first
    table = torch.from_numpy(np.zeros(shape, np.float32))
    return table if value == 0 else table.fill_(value)
