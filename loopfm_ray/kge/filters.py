"""Known facts: the true tails of (head, relation) and the true heads of (relation, tail), as sorted arrays."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import DataError

__all__ = ["Answers", "KnownFacts", "index_facts"]

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Answers:
    """The true answers of every question that has one: rows of different lengths, in one array.

    A question is an entity and a relation; its key is `entity * num_relations + relation`.
    """

    keys: Ids
    """[Q] of the questions, sorted, each once."""
    offsets: Ids
    """[Q + 1] question q has the answers `values[offsets[q] : offsets[q + 1]]`."""
    values: Ids
    """[n] entities, sorted within each question, each once."""
    num_entities: int
    num_relations: int

    def key(self, entity: Ids, relation: Ids) -> Ids:
        """Return [B] keys of questions."""
        return entity * self.num_relations + relation

    def counts(self, entity: Ids, relation: Ids) -> Ids:
        """Return [B] how many true answers each question has."""
        return self._bounds(entity, relation)[1]

    def pairs(self, entity: Ids, relation: Ids) -> tuple[Ids, Ids]:
        """Return the true answers of B questions as pairs (row, answer), sorted by both."""
        return self._stretches(*self._bounds(entity, relation))

    def pairs_of(self, question: Ids) -> tuple[Ids, Ids]:
        """Return the same of B questions given by their numbers."""
        starts = self.offsets[question]
        return self._stretches(starts, self.offsets[question + 1] - starts)

    def contains(self, entity: Ids, relation: Ids, answer: Ids) -> NDArray[np.bool_]:
        """Return [B] whether each answer is a true one of its question."""
        found = self.has(self._rows(entity, relation), answer)
        found &= self.counts(entity, relation) > 0
        return found

    def has(self, question: Ids, answer: Ids) -> NDArray[np.bool_]:
        """Return whether answers are true ones of questions given by their numbers, both of one shape or broadcast to one."""
        wanted = question * self.num_entities + answer
        places = np.minimum(np.searchsorted(self._codes, wanted), len(self._codes) - 1)
        found: NDArray[np.bool_] = self._codes[places] == wanted
        return found

    @cached_property
    def _codes(self) -> Ids:
        """[n] number of the question times E, plus the answer: sorted."""
        return (
            np.repeat(np.arange(len(self.keys)), np.diff(self.offsets)) * self.num_entities
            + self.values
        )

    def _rows(self, entity: Ids, relation: Ids) -> Ids:
        """Return [B] the number of each question; of an unknown one, that of another."""
        places = np.searchsorted(self.keys, self.key(entity, relation))
        return np.minimum(places, len(self.keys) - 1)

    def _stretches(self, starts: Ids, counts: Ids) -> tuple[Ids, Ids]:
        """Return pairs (row, value) of B stretches of the values."""
        rows = np.repeat(np.arange(len(starts)), counts)
        before = np.cumsum(counts) - counts
        places = np.arange(len(rows)) + np.repeat(starts - before, counts)
        return rows, self.values[places]

    def _bounds(self, entity: Ids, relation: Ids) -> tuple[Ids, Ids]:
        rows = self._rows(entity, relation)
        is_known = self.keys[rows] == self.key(entity, relation)
        counts = np.where(is_known, self.offsets[rows + 1] - self.offsets[rows], 0)
        return self.offsets[rows], counts


@dataclass(frozen=True, eq=False)
class KnownFacts:
    """Both directions of a set of triples."""

    tails: Answers
    """Of (head, relation): the true tails."""
    heads: Answers
    """Of (tail, relation): the true heads."""


def index_facts(triples: Ids, num_entities: int, num_relations: int) -> KnownFacts:
    """Sort triples [n, 3], repeats allowed, into the answers of both directions.

    Raises:
        DataError: no triples, or an id out of range.
    """
    if len(triples) == 0:
        raise DataError(
            "known facts need at least one triple, found none; pass those of all splits"
        )
    limits = np.array([num_entities, num_relations, num_entities])
    is_outside = ((triples < 0) | (triples >= limits)).any(axis=1)
    if is_outside.any():
        row = int(np.argmax(is_outside))
        raise DataError(
            f"triple {row} is {triples[row].tolist()}, outside of {num_entities} entities and {num_relations}"
            " relations; pass the sizes of the graph that it is from"
        )
    head, relation, tail = triples.T
    return KnownFacts(
        tails=_answers(head, relation, tail, num_entities, num_relations),
        heads=_answers(tail, relation, head, num_entities, num_relations),
    )


def _answers(
    entity: Ids, relation: Ids, answer: Ids, num_entities: int, num_relations: int
) -> Answers:
    key, answer = _sorted_pairs(
        entity * num_relations + relation, answer, num_entities * num_relations, num_entities
    )
    is_new = key[1:] != key[:-1]
    is_first = np.concatenate(([True], is_new | (answer[1:] != answer[:-1])))
    key, answer = key[is_first], answer[is_first]
    starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    offsets = np.append(starts, len(key)).astype(np.int64)
    return Answers(key[starts], offsets, answer, num_entities, num_relations)


def _sorted_pairs(key: Ids, answer: Ids, num_keys: int, num_answers: int) -> tuple[Ids, Ids]:
    """Sort pairs by key, then answer: as one number each where it fits, which takes a tenth of the time."""
    if num_keys * num_answers > np.iinfo(np.int64).max:
        order = np.lexsort((answer, key))
        return key[order], answer[order]
    key, answer = np.divmod(np.sort(key * num_answers + answer), num_answers)
    return key, answer
