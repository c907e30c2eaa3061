"""Filtered ranks of the true tail of (h, r, ?) and the true head of (?, r, t), and what is said of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopfm_ray.errors import DataError, MetricError, ShapeError
from loopfm_ray.kge.filters import Answers, KnownFacts

__all__ = [
    "Ranking",
    "RankingMetrics",
    "RankingPart",
    "Ranks",
    "Scorer",
    "prepare_ranking",
    "rank_triples",
    "summarize_ranks",
]

_CELLS = 1 << 20
"""Scores held at a time: 4 MiB in single precision, which the caches of a CPU hold; 64 MiB take twice as long."""
_CELLS_OF_ACCELERATOR = 1 << 24
_EXACT = 1 << 24
"""Up to here single precision has every whole number."""
_HITS = (1, 3, 10)

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """What can be ranked: any backbone, or a table in a test. The scores it returns belong to the caller, who changes them."""

    def score_tails(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return [B, E] the scores of all tails of heads [B] and relations [B] int64."""
        ...

    def score_heads(self, relation: Tensor, tail: Tensor) -> Tensor:
        """Return [B, E] the scores of all heads of relations [B] and tails [B] int64."""
        ...


@dataclass(frozen=True, eq=False)
class Ranks:
    """Filtered ranks of n triples in both directions; ranks of parts of a split can be joined."""

    tail: NDArray[np.float64]
    """[n] rank of the tail among those of (h, r); a half where ties are odd."""
    head: NDArray[np.float64]
    """[n] rank of the head among those of (r, t)."""
    num_tails: Ids
    """[n] tails that it was ranked among, itself counted."""
    num_heads: Ids
    """[n] heads that it was ranked among, itself counted."""


@dataclass(frozen=True)
class RankingMetrics:
    """Means over the head and tail queries of the ranked triples."""

    mrr: float
    """Mean of 1 / rank."""
    hits_at_1: float
    """Share of ranks of at most 1."""
    hits_at_3: float
    """Share of ranks of at most 3."""
    hits_at_10: float
    """Share of ranks of at most 10."""
    mean_rank: float
    """Mean rank."""
    adjusted_mean_rank: float
    """Mean rank over its expectation under random scores, the mean of (candidates + 1) / 2: 1 is chance, less is better."""
    num_ranked: int
    """Triples that the means are over, two queries each."""
    num_unseen: int
    """Triples of the split with an entity or relation that training did not see, ranked or not."""
    num_left_out: int
    """Triples of the split that the means leave out."""


def rank_triples(
    model: Scorer,
    triples: Ids,
    known: KnownFacts,
    max_cells: int | None = None,
    device: torch.device | str = "cpu",
) -> Ranks:
    """Rank each triple's tail among all entities as tails, and its head as heads.

    Other known answers of a query are left out, and a tie counts half: `1 + |better| + |ties| / 2`, the mean of the optimistic
    and the pessimistic rank. Each distinct query is scored once, however many triples ask it, and a true answer is compared
    in the same row of scores, so rounding makes no difference between it and the others.

    Args:
        model: a module is put into evaluation for the time, without gradients.
        triples: [n, 3] head, relation, tail; relations under R.
        known: facts to leave out, in general of all splits.
        max_cells: scores to hold at a time; one row of E is held at least. None takes what suits the device.
        device: where the model is.

    Raises:
        DataError: no triples.
        MetricError: a score is not finite: NaN compares as worse than nothing, which would rank first.
        ShapeError: the model does not score the graph's entities.
    """
    ranking = prepare_ranking(triples, known, max_cells, device)
    return ranking.join([ranking.rank(model, part) for (part,) in ranking.parts(1)])


@dataclass(frozen=True)
class RankingPart:
    """Questions of one side, which are scored block by block."""

    is_tail: bool
    """Whether tails are ranked, else heads."""
    start: int
    stop: int
    """Numbers of distinct questions, in order of their keys."""


@dataclass(frozen=True, eq=False)
class _Side:
    """The questions of triples about one side."""

    known: Answers
    entity: Ids
    """[n] what is asked about."""
    relation: Ids
    """[n]."""
    answer: Ids
    """[n]."""
    order: Ids
    """[n] triples sorted by question."""
    bounds: Ids
    """[Q + 1] question q is asked by the triples `order[bounds[q] : bounds[q + 1]]`."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Triples that are to be ranked, so prepared that processes can share them and find the same ranks.

    A part is whole blocks of questions: a block's scores are computed in one piece, in the same shape in whatever process.
    """

    tails: _Side
    heads: _Side
    step: int
    """Questions of a block."""
    device: torch.device

    def parts(self, num: int) -> tuple[list[RankingPart], list[RankingPart]]:
        """Return `num` parts of the questions about tails, and as many about heads; some may be empty."""
        return self._parts(self.tails, num), self._parts(self.heads, num)

    def rank(self, model: Scorer, part: RankingPart) -> Floats:
        """Return the ranks of a part's triples, in the order of their questions.

        Raises:
            MetricError, ShapeError: see `rank_triples`.
        """
        side = self.tails if part.is_tail else self.heads
        with torch.no_grad(), _in_evaluation(model):
            found = [
                self._block(model, side, start, min(start + self.step, part.stop))
                for start in range(part.start, part.stop, self.step)
            ]
        return np.concatenate([np.empty(0), *found])

    def join(self, found: Sequence[Floats]) -> Ranks:
        """Return the ranks of all triples from those [n] of tails and those [n] of heads, each one part after another."""
        ranks, numbers = [], []
        for side, ranked in zip((self.tails, self.heads), found, strict=True):
            in_place = np.empty(len(side.order))
            in_place[side.order] = ranked
            ranks.append(in_place)
            numbers.append(
                side.known.num_entities
                - side.known.counts(side.entity, side.relation)
                + side.known.contains(side.entity, side.relation, side.answer)
            )
        return Ranks(ranks[0], ranks[1], numbers[0], numbers[1])

    def _parts(self, side: _Side, num: int) -> list[RankingPart]:
        num_questions = len(side.bounds) - 1
        blocks = -(-num_questions // self.step)
        cuts = [min(blocks * n // num * self.step, num_questions) for n in range(num + 1)]
        return [RankingPart(side is self.tails, start, stop) for start, stop in pairwise(cuts)]

    def _block(self, model: Scorer, side: _Side, start: int, stop: int) -> Floats:
        """Return the ranks of the triples of questions start to stop."""
        known, device, bounds = side.known, self.device, side.bounds
        asked = side.order[bounds[start:stop]]
        entity, relation = side.entity[asked], side.relation[asked]
        who, by = (torch.from_numpy(ids).to(device) for ids in (entity, relation))
        is_tail = side is self.tails
        scores = model.score_tails(who, by) if is_tail else model.score_heads(by, who)
        _check_scores(scores, (len(entity), known.num_entities))
        rows = side.order[bounds[start] : bounds[stop]]
        question = np.repeat(np.arange(stop - start), np.diff(bounds[start : stop + 1]))
        answer = side.answer[rows]
        places = torch.from_numpy(question).to(device), torch.from_numpy(answer).to(device)
        true = scores[places]
        others = known.pairs(entity, relation)
        scores[
            torch.from_numpy(others[0]).to(device), torch.from_numpy(others[1]).to(device)
        ] = -torch.inf
        is_known = known.contains(side.entity[rows], side.relation[rows], answer)
        return _counted(scores, places[0], true, self.step) - ~is_known / 2.0


def prepare_ranking(
    triples: Ids,
    known: KnownFacts,
    max_cells: int | None = None,
    device: torch.device | str = "cpu",
) -> Ranking:
    """Sort the questions of triples into those of both sides; the arguments are those of `rank_triples`.

    Raises:
        DataError: no triples.
    """
    if len(triples) == 0:
        raise DataError("ranking needs at least one triple, found none; check the split")
    head, relation, tail = (np.ascontiguousarray(column) for column in triples.T)
    device = torch.device(device)
    if max_cells is None:
        max_cells = _CELLS if device.type == "cpu" else _CELLS_OF_ACCELERATOR
    return Ranking(
        tails=_side(known.tails, head, relation, tail),
        heads=_side(known.heads, tail, relation, head),
        step=max(1, max_cells // known.tails.num_entities),
        device=device,
    )


def _side(known: Answers, entity: Ids, relation: Ids, answer: Ids) -> _Side:
    key = known.key(entity, relation)
    order = np.argsort(key, kind="stable")
    _, first = np.unique(key[order], return_index=True)
    return _Side(known, entity, relation, answer, order, np.append(first, len(key)))


def summarize_ranks(
    ranks: Ranks,
    is_unseen: NDArray[np.bool_] | None = None,
    unseen: Literal["ranked", "left_out"] = "ranked",
) -> RankingMetrics:
    """Return the means of ranks, with or without triples that hold something training did not see.

    Published figures differ here: LibKGE ranks them all, others leave them out, which gives up to .03 more on WN18RR. Source
    of the adjusted mean rank: Berrendorf et al. 2020, arXiv 2002.06914.

    Args:
        ranks: of n triples.
        is_unseen: [n] from `TripleSet.has_unseen`; None says that all were seen.
        unseen: whether such triples count.

    Raises:
        MetricError: no triple is left.
        ShapeError: the lengths differ.
    """
    num = len(ranks.tail)
    unknown = np.zeros(num, bool) if is_unseen is None else is_unseen
    if unknown.shape != (num,):
        raise ShapeError(f"is_unseen must have shape {(num,)}, found {unknown.shape}")
    kept = ~unknown if unseen == "left_out" else np.ones(num, bool)
    if not kept.any():
        raise MetricError(
            f"ranking metrics need a triple, found none of {num} left; rank those with unseen entities too"
        )
    rank = np.concatenate([ranks.tail[kept], ranks.head[kept]])
    candidates = np.concatenate([ranks.num_tails[kept], ranks.num_heads[kept]])
    hits = [float(np.mean(rank <= k)) for k in _HITS]
    mean_rank = float(np.mean(rank))
    return RankingMetrics(
        mrr=float(np.mean(1.0 / rank)),
        hits_at_1=hits[0],
        hits_at_3=hits[1],
        hits_at_10=hits[2],
        mean_rank=mean_rank,
        adjusted_mean_rank=mean_rank / float(np.mean((candidates + 1) / 2.0)),
        num_ranked=int(kept.sum()),
        num_unseen=int(unknown.sum()),
        num_left_out=int(num - kept.sum()),
    )


@contextmanager
def _in_evaluation(model: Scorer) -> Iterator[None]:
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)


def _check_scores(scores: Tensor, expected: tuple[int, int]) -> None:
    if scores.shape != expected:
        raise ShapeError(
            f"the model gives scores of shape {tuple(scores.shape)}, expected {expected}; build it for this graph"
        )
    if not all(torch.isfinite(end) for end in torch.aminmax(scores)):  # which passes NaN on
        raise MetricError(
            "the model gives scores that are not finite; training diverged: lower its learning rate"
        )


def _counted(scores: Tensor, row: Tensor, true: Tensor, step: int) -> Floats:
    """Return [m] 1 + better + ties / 2 for true scores [m] among scores [C, E], row [m] sorted, `step` rows at a time.

    A better score has the sign 1, a tie 0 and a worse one -1, so that better + ties / 2 is half of E and the sum of signs.
    """
    width = scores.shape[1]
    is_exact = width <= _EXACT and scores.dtype != torch.float64
    dtype = torch.float32 if is_exact else torch.float64
    parts = []
    for start in range(0, len(row), step):
        block = slice(start, start + step)
        # where each question has one triple, the rows are the block
        rows = scores[block] if len(row) == len(scores) else scores.index_select(0, row[block])
        signs = rows.sub_(true[block, None]).sign_().sum(1, dtype=dtype)
        parts.append(1.0 + (signs.double() + width) / 2.0)
    return torch.cat(parts).cpu().numpy()
