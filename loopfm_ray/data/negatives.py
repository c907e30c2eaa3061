"""Negative rows for logs that only have positives: items by their popularity within the same period."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SampledNegatives", "sample_negatives"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SampledNegatives:
    """Negatives of one period: `source` [N] is the row of the positive each belongs to, rising; `item` [N] its item."""

    source: Ints
    item: NDArray[np.int32]
    num_given_up: int
    """Negatives left out because every try drew an item of the same request."""


def sample_negatives(
    rows: tuple[NDArray[np.int32], NDArray[np.int32], Ints],
    group: Ints,
    *,
    per_positive: int,
    max_tries: int,
    seed: int,
) -> SampledNegatives:
    """Draw `per_positive` items for each positive from the positives of its group.

    The draw depends on `seed`, the group and the positives of the group alone. An item is drawn again, up to
    `max_tries` times in all, when the user took it in the same request (same user and time) or when it was already
    drawn for the same positive; then the negative is left out.

    Args:
        rows: `(user, item, event_ts)` of the positives [P], in time order.
        group: [P] which rows draw from one another, by a number not negative that means the same in every run.
        per_positive: negatives for each positive.
        max_tries: draws for each negative.
        seed: seeds all draws.
    """
    user, item, event_ts = rows
    sources: list[Ints] = []
    items: list[NDArray[np.int32]] = []
    num_given_up = 0
    for value in np.unique(group):
        members = np.flatnonzero(group == value)
        # Any number of rows before or after this group leaves its draws alone.
        rng = np.random.default_rng([seed, int(value)])
        taken = _Taken(user[members], item[members], event_ts[members])
        source, drawn = _draw(taken, rng, per_positive, max_tries)
        num_given_up += len(members) * per_positive - len(source)
        sources.append(members[source])
        items.append(drawn)
    source = np.concatenate([np.zeros(0, np.int64), *sources])
    drawn_items = np.concatenate([np.zeros(0, np.int32), *items])
    order = np.argsort(source, kind="stable")
    return SampledNegatives(source[order], drawn_items[order], num_given_up)


class _Taken:
    """The items of every request of a group, for look-up."""

    def __init__(self, user: NDArray[np.int32], item: NDArray[np.int32], event_ts: Ints) -> None:
        self.item = item
        self._base = int(item.max()) + 1
        order = np.lexsort((event_ts, user))
        starts = np.ones(len(user), dtype=bool)
        starts[1:] = (user[order][1:] != user[order][:-1]) | (
            event_ts[order][1:] != event_ts[order][:-1]
        )
        self.request = np.empty(len(user), dtype=np.int64)
        self.request[order] = np.cumsum(starts) - 1
        self._keys = np.unique(self.request * self._base + item)

    def holds(self, request: Ints, item: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether each request took each item."""
        key = request * self._base + item
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.asarray(self._keys[place] == key)


def _draw(
    taken: _Taken, rng: np.random.Generator, per_positive: int, max_tries: int
) -> tuple[Ints, NDArray[np.int32]]:
    num = len(taken.item)
    source = np.repeat(np.arange(num, dtype=np.int64), per_positive)
    drawn = np.full(len(source), -1, dtype=np.int32)
    pending = np.arange(len(source))
    for _ in range(max_tries):
        if not len(pending):
            break
        drawn[pending] = taken.item[rng.integers(0, num, size=len(pending))]
        bad = taken.holds(taken.request[source[pending]], drawn[pending])
        if per_positive > 1:
            bad |= _repeated(drawn.reshape(num, per_positive)).reshape(-1)[pending]
        pending = pending[bad]
    keep = np.ones(len(source), dtype=bool)
    keep[pending] = False
    return source[keep], drawn[keep]


def _repeated(drawn: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return [P, k] whether an item stands further left in its row."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    same = np.zeros_like(ranked, dtype=bool)
    same[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    out = np.zeros_like(same)
    np.put_along_axis(out, order, same, axis=1)
    return out
