"""Negatives: entities drawn uniformly as false answers, from all or from those that are not known to be true."""

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import DataError
from loopfm_ray.kge.filters import Answers

__all__ = ["FilteredNegatives", "uniform_negatives"]

Ids = NDArray[np.int64]


def uniform_negatives(
    generator: np.random.Generator, num_rows: int, num_negatives: int, num_entities: int
) -> Ids:
    """Return [B, N] entities drawn uniformly, with repeats; some may be true answers."""
    return generator.integers(0, num_entities, (num_rows, num_negatives))


class FilteredNegatives:
    """Draws exactly from what is not a known answer, without trying again.

    A question with known answers v_0 < v_1 < ... has E - k others; the u-th of them is `u + |{j : v_j - j <= u}|`, which
    one search in the sorted `v_j - j` of all questions finds.
    """

    def __init__(self, known: Answers) -> None:
        """Prepare the search.

        Raises:
            DataError: every entity is a true answer of some question.
        """
        counts = np.diff(known.offsets)
        if (counts >= known.num_entities).any():
            key = int(known.keys[np.argmax(counts)])
            raise DataError(
                f"entity {key // known.num_relations} with relation {key % known.num_relations} has all"
                f" {known.num_entities} entities as true answers; draw negatives without a filter"
            )
        self.known = known
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(known.values)) - known.offsets[rows]
        self._stride = known.num_entities + 1
        self._codes = rows * self._stride + known.values - places

    def draw(
        self, generator: np.random.Generator, entity: Ids, relation: Ids, num_negatives: int
    ) -> Ids:
        """Return [B, N] entities that are no known answers of questions given by entity [B] and relation [B]."""
        known = self.known
        key = known.key(entity, relation)
        row = np.minimum(np.searchsorted(known.keys, key), len(known.keys) - 1)
        is_known = (known.keys[row] == key)[:, None]
        free = known.num_entities - known.counts(entity, relation)
        drawn = generator.integers(0, free[:, None], (len(entity), num_negatives))
        wanted = row[:, None] * self._stride + drawn
        skipped = np.searchsorted(self._codes, wanted, side="right") - known.offsets[row][:, None]
        return np.where(is_known, drawn + skipped, drawn)
