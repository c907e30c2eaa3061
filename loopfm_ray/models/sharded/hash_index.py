"""int64 key -> slot, for many keys at once: a hash table with open addressing in numpy."""

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.models.sharded.noise import mix

__all__ = ["HashIndex", "Ints"]

Ints = NDArray[np.int64]
_EMPTY, _DEAD = 0, -1
"""Entries of the table; any other is a slot + 1."""


class HashIndex:
    """Keys of slots 0 to capacity - 1, found in a few rounds of array operations, however many are asked at once.

    Which slot a key takes is the caller's choice, so results do not depend on the order of earlier changes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys = np.zeros(capacity, np.int64)
        """[capacity] key of each slot that is in use."""
        self._place = np.full(capacity, -1, np.int64)
        self._table = np.zeros(1 << max(2, (2 * capacity - 1).bit_length()), np.int64)
        self._num_dead = 0
        self.size = 0

    @property
    def slots(self) -> Ints:
        """[size] slots that are in use, rising."""
        return np.flatnonzero(self._place >= 0)

    def find(self, keys: Ints) -> Ints:
        """Return [n]: the slot of each key, -1 where it has none."""
        result = np.full(len(keys), -1, np.int64)
        waiting, place = np.arange(len(keys)), self._home(keys)
        while len(waiting):
            entry = self._table[place]
            is_found = (entry > 0) & (self.keys[np.maximum(entry - 1, 0)] == keys[waiting])
            result[waiting[is_found]] = entry[is_found] - 1
            goes_on = ~is_found & (entry != _EMPTY)
            waiting, place = waiting[goes_on], self._next(place[goes_on])
        return result

    def insert(self, keys: Ints, slots: Ints) -> None:
        """Give keys, none twice and none that has a slot, these free slots."""
        self.keys[slots] = keys
        self.size += len(keys)
        waiting, place = np.arange(len(keys)), self._home(keys)
        while len(waiting):
            is_free = np.flatnonzero(self._table[place] <= 0)
            _, first = np.unique(place[is_free], return_index=True)
            winner = is_free[first]
            self._num_dead -= int((self._table[place[winner]] == _DEAD).sum())
            self._table[place[winner]] = slots[waiting[winner]] + 1
            self._place[slots[waiting[winner]]] = place[winner]
            goes_on = np.ones(len(waiting), bool)
            goes_on[winner] = False
            waiting, place = waiting[goes_on], self._next(place[goes_on])

    def remove(self, slots: Ints) -> None:
        """Free slots that are in use, none twice."""
        self._table[self._place[slots]] = _DEAD
        self._place[slots] = -1
        self.size -= len(slots)
        self._num_dead += len(slots)
        # dead entries lengthen every search, so they may be a quarter of the table
        if 4 * self._num_dead > len(self._table):
            used = self.slots
            self._table[:], self._num_dead, self.size = _EMPTY, 0, 0
            self.insert(self.keys[used], used)

    def _home(self, keys: Ints) -> Ints:
        mixed: Ints = mix(torch.from_numpy(np.ascontiguousarray(keys))).numpy()
        return mixed & (len(self._table) - 1)

    def _next(self, place: Ints) -> Ints:
        return (place + 1) & (len(self._table) - 1)
