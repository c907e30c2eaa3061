"""Which row an id has in a table that admits ids while it trains and lets go of those that are no longer used."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from loopfm_ray.config import Config
from loopfm_ray.models.sharded.hash_index import HashIndex, Ints

__all__ = ["Admission", "IdConfig", "IdEntries", "IdMap"]


class IdConfig(Config):
    """When an id gets a row of its own, and which ids give way once all rows are taken."""

    capacity: PositiveInt
    """Rows, over all ranks together."""
    min_sightings: PositiveInt = 1
    """Training steps with an id before it gets a row; until then it reads the default row of its field."""
    eviction: Literal["lru", "lfu"] = "lru"
    """Who gives way: ids whose last step is longest ago, or ids that were met in the fewest steps."""
    evict_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the rows that are freed at once, at the least: a search through all rows is not for every step."""


@dataclass(frozen=True)
class IdEntries:
    """Ids of a map in rising order, with what it knows of each."""

    keys: Ints
    """[n] ids."""
    counts: Ints
    """[n] training steps in which each was met."""
    last_steps: Ints
    """[n] the last of these."""


@dataclass(frozen=True)
class Admission:
    """What a step's ids got."""

    rows: Ints
    """[n] row of each id, -1 where it has none."""
    is_new: NDArray[np.bool_]
    """[n] whether it got the row now, which has to begin anew."""


class _Ledger:
    """Ids with slots, how often and when each was met."""

    def __init__(self, capacity: int) -> None:
        self.index = HashIndex(capacity)
        self.counts = np.zeros(capacity, np.int64)
        self.last_steps = np.zeros(capacity, np.int64)
        self._num_begun = 0
        self._free: Ints = np.zeros(0, np.int64)

    @property
    def room(self) -> int:
        """Free slots."""
        return self.index.capacity - self.index.size

    def see(self, slots: Ints, step: int) -> None:
        """Count ids, each once a step."""
        self.counts[slots] += self.last_steps[slots] != step
        self.last_steps[slots] = step

    def add(self, entries: IdEntries) -> Ints:
        """Give new ids free slots, which there are enough of; return them."""
        num = len(entries.keys)
        reused, self._free = self._free[:num], self._free[num:]
        begun = np.arange(self._num_begun, self._num_begun + num - len(reused))
        self._num_begun += len(begun)
        slots = np.concatenate([reused, begun])
        self.index.insert(entries.keys, slots)
        self.counts[slots], self.last_steps[slots] = entries.counts, entries.last_steps
        return slots

    def drop(self, slots: Ints) -> None:
        self.index.remove(slots)
        self._free = np.concatenate([self._free, np.sort(slots)])

    def make_room(self, num: int, at_least: int, step: int, policy: str) -> None:
        """Free slots so that `num` are, `at_least` so many if any; ids of this step stay."""
        if num <= self.room:
            return
        wanted = max(num - self.room, at_least)
        slots = self.index.slots
        slots = slots[self.last_steps[slots] < step]
        first, second = self.last_steps, self.counts
        if policy == "lfu":
            first, second = second, first
        if len(slots) > wanted:
            limit = np.partition(first[slots], wanted - 1)[wanted - 1]
            slots = slots[first[slots] <= limit]
            order = np.lexsort((self.index.keys[slots], second[slots], first[slots]))
            slots = slots[order[:wanted]]
        self.drop(slots)

    def entries(self) -> tuple[IdEntries, Ints]:
        """Return all ids and their slots."""
        slots = self.index.slots
        slots = slots[np.argsort(self.index.keys[slots])]
        keys = self.index.keys[slots]
        return IdEntries(keys, self.counts[slots], self.last_steps[slots]), slots


class IdMap:
    """Rows of ids, and a waiting list of as many ids that were not met often enough.

    An id is met once a step, however often a batch holds it: a single burst admits nobody, and the count does not depend on how
    the rows of a step fall into ranks. Rows of ids of the present step are never taken away. Where there is not enough room, ids that
    were met in more steps come first, then smaller ids.
    """

    def __init__(self, config: IdConfig, capacity: int) -> None:
        """Make an empty map of `capacity` rows, which are this rank's part of `config.capacity`."""
        self.config, self.capacity = config, capacity
        self._members = _Ledger(capacity)
        self._waiting = _Ledger(capacity if config.min_sightings > 1 else 0)

    @property
    def size(self) -> int:
        """Ids with a row."""
        return self._members.index.size

    def find(self, keys: Ints) -> Ints:
        """Return [n]: the row of each id, -1 where it has none."""
        return self._members.index.find(keys)

    def meet(self, keys: Ints, step: int) -> Admission:
        """Note that ids were met in a training step, and admit those that are due.

        Args:
            keys: [n] int64, none twice, rising.
            step: number of the step, from 1; not smaller than any before.
        """
        rows = self.find(keys)
        is_member = rows >= 0
        self._members.see(rows[is_member], step)
        is_new = np.zeros(len(keys), bool)
        others = np.flatnonzero(~is_member)
        if len(others):
            counts = self._wait(keys[others], step)
            is_due = counts >= self.config.min_sightings
            due = self._admit(keys, others[is_due], counts[is_due], step)
            rows[due] = self._members.index.find(keys[due])
            is_new[due] = True
        return Admission(rows, is_new)

    def _wait(self, keys: Ints, step: int) -> Ints:
        """Return [n] in how many steps each id without a row was met, this one counted."""
        if self.config.min_sightings == 1:
            return np.ones(len(keys), np.int64)
        waiting = self._waiting
        slots = waiting.index.find(keys)
        waiting.see(slots[slots >= 0], step)
        fresh = np.flatnonzero(slots < 0)
        waiting.make_room(len(fresh), self._share(), step, "lru")
        fresh = fresh[: waiting.room]
        ones = np.ones(len(fresh), np.int64)
        waiting.add(IdEntries(keys[fresh], ones, ones * step))
        slots = waiting.index.find(keys)
        return np.where(slots >= 0, waiting.counts[slots], 1)

    def _admit(self, keys: Ints, due: Ints, counts: Ints, step: int) -> Ints:
        """Give rows to the ids `keys[due]`, as far as there is room; return which of `due` got one."""
        members = self._members
        members.make_room(len(due), self._share(), step, self.config.eviction)
        if len(due) > members.room:
            chosen = np.sort(np.lexsort((keys[due], -counts))[: members.room])
            due, counts = due[chosen], counts[chosen]
        members.add(IdEntries(keys[due], counts, np.full(len(due), step)))
        if self.config.min_sightings > 1:
            slots = self._waiting.index.find(keys[due])
            self._waiting.drop(slots[slots >= 0])
        return due

    def _share(self) -> int:
        return int(self.config.evict_share * self.capacity)

    def members(self) -> tuple[IdEntries, Ints]:
        """Return all ids that have a row, and [n] their rows."""
        return self._members.entries()

    def waiting(self) -> IdEntries:
        """Return all ids on the waiting list."""
        return self._waiting.entries()[0]

    def restore(self, members: IdEntries, waiting: IdEntries) -> Ints:
        """Fill an empty map; return [n] the rows of `members`, -1 for those that give way since there is no room for all."""
        kept = _best(members, self.capacity, self.config.eviction)
        rows = np.full(len(members.keys), -1, np.int64)
        rows[kept] = self._members.add(_take(members, kept))
        self._waiting.add(_take(waiting, _best(waiting, self._waiting.index.capacity, "lru")))
        return rows


def _best(entries: IdEntries, capacity: int, policy: str) -> Ints:
    """Return the places, rising, of the ids that would be evicted last."""
    first, second = entries.last_steps, entries.counts
    if policy == "lfu":
        first, second = second, first
    order = np.lexsort((entries.keys, second, first))
    return np.sort(order[max(0, len(order) - capacity) :])


def _take(entries: IdEntries, places: Ints) -> IdEntries:
    return IdEntries(entries.keys[places], entries.counts[places], entries.last_steps[places])
