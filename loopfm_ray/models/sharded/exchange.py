"""One look-up over a group: keys go to the ranks that own them, rows come back; gradients go the same way later.

A look-up begins with a header to every rank: how many keys follow, and how its sender is. So a mistake of one rank is an error on
all, and a rank that has nothing more to ask can go on answering.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopfm_ray.errors import DataError, LoopFMError, StoreError
from loopfm_ray.models.sharded.group import Group

__all__ = [
    "BAD_ID",
    "DONE",
    "LEARNS",
    "READS",
    "Asked",
    "Request",
    "agree",
    "answer",
    "ask",
    "send_back",
]

READS, LEARNS, DONE, BAD_ID = range(4)
"""What the sender of a header does: looks up alone, trains, only answers from now on, or met an id that it may not look up."""


@dataclass(frozen=True)
class Request:
    """What a rank asks the others in one look-up."""

    keys: Tensor
    """[U] int64, none twice, grouped by owner."""
    counts: Sequence[int]
    """[size] keys of each owner."""
    status: int = READS
    detail: tuple[int, int] = (0, 0)
    """Of a bad id: the place of its field and the id."""


@dataclass(frozen=True)
class Asked:
    """What all ranks asked this one in one look-up, and whether all ranks are done."""

    keys: Tensor
    """[m] int64, by rank; those of two ranks may be equal."""
    counts: tuple[int, ...]
    """[size] keys of each rank."""
    is_over: bool
    """Whether no rank asks any more."""


def ask(group: Group, request: Request, describe: Callable[[int, int, int], str]) -> Asked:
    """Send keys to their owners and return those that came; every rank has to call it.

    Args:
        group: the ranks.
        request: what this one asks.
        describe: rank, place of a field and id -> the error about a bad id.

    Raises:
        DataError: on all ranks, if one of them met a bad id or only some of them train.
    """
    device = request.keys.device
    header = torch.tensor(
        [[count, request.status, *request.detail] for count in request.counts], device=device
    )
    headers = group.swap(header).tolist()
    statuses = [row[1] for row in headers]
    for rank, (_, status, field, value) in enumerate(headers):
        if status == BAD_ID:
            raise DataError(describe(rank, field, value))
    if LEARNS in statuses and set(statuses) != {LEARNS}:
        raise DataError(
            f"all ranks have to take a training step together, found ranks"
            f" {[rank for rank, status in enumerate(statuses) if status == LEARNS]} of {group.size} in one; give"
            " every rank as many steps, with an empty batch where it has no rows"
        )
    counts = tuple(row[0] for row in headers)
    is_over = set(statuses) == {DONE}
    if group.size == 1 or is_over:
        return Asked(request.keys, counts, is_over)
    return Asked(group.exchange(request.keys, request.counts, counts), counts, is_over)


def send_back(group: Group, rows: Tensor, request: Request, asked: Asked) -> Tensor:
    """Return [U, ...]: the rows of this rank's keys, given the rows [m, ...] of those that it was asked."""
    return group.exchange(rows, asked.counts, request.counts)


def answer(
    group: Group,
    reply: Callable[[Request, Asked], None],
    describe: Callable[[int, int, int], str],
    device: torch.device,
) -> None:
    """Ask nothing and let `reply` answer the others until no rank asks any more; every rank has to call it.

    Raises:
        DataError: as `ask`.
    """
    nothing = Request(
        torch.zeros(0, dtype=torch.int64, device=device), [0] * group.size, status=DONE
    )
    while True:
        asked = ask(group, nothing, describe)
        if asked.is_over:
            return
        reply(nothing, asked)


def agree(group: Group, error: LoopFMError | None, device: torch.device) -> None:
    """Raise `error`, or one that says which rank has an error; every rank has to call it.

    Raises:
        LoopFMError: a rank has an error.
    """
    failed = torch.full((group.size, 1), int(error is not None), device=device)
    failures = [rank for rank, (has,) in enumerate(group.swap(failed).tolist()) if has]
    if error is not None:
        raise error
    if failures:
        raise StoreError(f"ranks {failures} of {group.size} failed; their own errors say why")
