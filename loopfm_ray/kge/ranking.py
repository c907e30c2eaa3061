"""Filtered ranks of the true tail of (h, r, ?) and the true head of (?, r, t), and what is said of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopfm_ray.errors import DataError, MetricError, ShapeError
from loopfm_ray.kge.filters import Answers, KnownFacts

__all__ = ["RankingMetrics", "Ranks", "Scorer", "rank_triples", "summarize_ranks"]

_CELLS = 1 << 20
"""Scores held at a time: 4 MiB in single precision, which the caches of a CPU hold; 64 MiB take twice as long."""
_CELLS_OF_ACCELERATOR = 1 << 24
_EXACT = 1 << 24
"""Up to here single precision has every whole number."""
_HITS = (1, 3, 10)

Ids = NDArray[np.int64]
Score = Callable[[Tensor, Tensor], Tensor]


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
    if len(triples) == 0:
        raise DataError("ranking needs at least one triple, found none; check the split")
    head, relation, tail = (np.ascontiguousarray(column) for column in triples.T)
    if max_cells is None:
        max_cells = _CELLS if torch.device(device).type == "cpu" else _CELLS_OF_ACCELERATOR

    def of_heads(entity: Tensor, relation: Tensor) -> Tensor:
        return model.score_heads(relation, entity)

    with torch.no_grad(), _in_evaluation(model):
        tails, num_tails = _ranks(
            model.score_tails, known.tails, (head, relation, tail), max_cells, device
        )
        heads, num_heads = _ranks(of_heads, known.heads, (tail, relation, head), max_cells, device)
    return Ranks(tails, heads, num_tails, num_heads)


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


def _ranks(
    score: Score,
    known: Answers,
    triples: tuple[Ids, Ids, Ids],
    max_cells: int,
    device: torch.device | str,
) -> tuple[NDArray[np.float64], Ids]:
    """Return ranks [n] and numbers of candidates [n] of triples given as (entity asked about, relation, answer)."""
    entity, relation, answer = triples
    is_known = known.contains(entity, relation, answer)
    candidates = known.num_entities - known.counts(entity, relation) + is_known
    key = known.key(entity, relation)
    order = np.argsort(key, kind="stable")
    _, first = np.unique(key[order], return_index=True)
    bounds = np.append(first, len(key))
    found = np.empty(len(key))
    step = max(1, max_cells // known.num_entities)
    for start in range(0, len(first), step):
        stop = min(start + step, len(first))
        asked = order[first[start:stop]]
        scores = _scores(score, entity[asked], relation[asked], known, device)
        rows = order[bounds[start] : bounds[stop]]
        question = np.repeat(np.arange(stop - start), np.diff(bounds[start : stop + 1]))
        places = torch.from_numpy(question).to(device), torch.from_numpy(answer[rows]).to(device)
        true = scores[places]
        others = known.pairs(entity[asked], relation[asked])
        scores[
            torch.from_numpy(others[0]).to(device), torch.from_numpy(others[1]).to(device)
        ] = -torch.inf
        found[rows] = _counted(scores, places[0], true, step) - ~is_known[rows] / 2.0
    return found, candidates


def _scores(
    score: Score, entity: Ids, relation: Ids, known: Answers, device: torch.device | str
) -> Tensor:
    scores = score(torch.from_numpy(entity).to(device), torch.from_numpy(relation).to(device))
    expected = (len(entity), known.num_entities)
    if scores.shape != expected:
        raise ShapeError(
            f"the model gives scores of shape {tuple(scores.shape)}, expected {expected}; build it for this graph"
        )
    if not all(torch.isfinite(end) for end in torch.aminmax(scores)):  # which passes NaN on
        raise MetricError(
            "the model gives scores that are not finite; training diverged: lower its learning rate"
        )
    return scores


def _counted(scores: Tensor, row: Tensor, true: Tensor, step: int) -> NDArray[np.float64]:
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
