"""What every backbone is made of: entity vectors, a map of each relation, and a comparison."""

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.kge.comparisons import Comparison
from loopfm_ray.models.embeddings import look_up

__all__ = [
    "BaseKgeConfig",
    "Even",
    "Factors",
    "GraphSize",
    "KgeModel",
    "RelationMap",
    "uniform",
]

_SMALLEST = 1e-24
"""Squared moduli below it count as it: the root has no gradient at 0."""

Even = Annotated[int, Field(gt=0, multiple_of=2)]


class BaseKgeConfig(Config):
    """What the configs of all backbones share."""

    dimension: PositiveInt = 32
    """Real parameters of an entity's vector; complex numbers count twice, so ComplEx of dimension 32 has 16 of them."""
    is_reciprocal: bool = True
    """Whether each relation has a second one for questions about heads, (t, r + R, ?); else heads are scored by r itself."""


@dataclass(frozen=True)
class GraphSize:
    """How many rows a backbone has."""

    num_entities: int
    """E."""
    num_relations: int
    """R, without reciprocal ones."""
    is_reciprocal: bool
    """Whether there is a second relation for each."""

    @property
    def num_maps(self) -> int:
        """Return 2R with reciprocal relations, else R."""
        return self.num_relations * (2 if self.is_reciprocal else 1)


class RelationMap(Protocol):
    """The part of a backbone that depends on relations; an `nn.Module`."""

    is_complex: bool
    """Whether vectors are complex: real parts, then imaginary parts."""
    is_bilinear: bool
    """Whether the score is `h M_r t`, so that `to_tail` is `h M_r` and `to_head` is `M_r t`."""

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return [B, D] where tails should lie, from head [B, D] and relation [B] int64."""
        ...

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return [B, D] where heads should lie: the same comparison with it gives the same score."""
        ...

    def vectors(self, relation: Tensor) -> Tensor | None:
        """Return [B, k] the vectors of relations that regularisers weigh; None for pure rotations."""
        ...


@dataclass(frozen=True)
class Factors:
    """What the regularisers of a batch of triples read; moduli where vectors are complex."""

    head: Tensor
    """[B, k] not negative where complex."""
    relation: Tensor | None
    """[B, k]; None where a relation has no length."""
    tail: Tensor
    """[B, k]."""
    mapped_head: Tensor | None
    """[B, D] `h M_r` of a bilinear backbone; None for others."""
    mapped_tail: Tensor | None
    """[B, D] `M_r t` of a bilinear backbone; None for others."""


class KgeModel(nn.Module):
    """Scores of triples, of all tails of (h, r) and of all heads of (r, t).

    `score(h, r, t)` and the columns of `score_tails(h, r)` are the same function. With reciprocal relations `score_heads(r, t)`
    is `score_tails(t, r + R)`, which learns beside it; without, it is the same function as well.
    """

    head_bias: nn.Parameter | None
    tail_bias: nn.Parameter | None

    def __init__(
        self,
        entity: Tensor,
        relations: RelationMap,
        comparison: Comparison,
        size: GraphSize,
        biases: tuple[bool, bool] = (False, False),
    ) -> None:
        """Put the parts together.

        Args:
            entity: [E, D] the first values of the entity vectors.
            relations: maps heads to where tails should lie.
            comparison: scores queries against entities.
            size: of the graph.
            biases: whether each entity has a bias as head, and one as tail, beside its vector; they begin at 0.
        """
        super().__init__()
        self.entity = nn.Parameter(entity)
        self.relations = relations
        self.comparison = comparison
        self.size = size
        for name, is_there in zip(("head_bias", "tail_bias"), biases, strict=True):
            zeros = nn.Parameter(torch.zeros(size.num_entities)) if is_there else None
            self.register_parameter(name, zeros)

    @property
    def num_entities(self) -> int:
        """E."""
        return self.size.num_entities

    @property
    def num_relations(self) -> int:
        """R, without reciprocal ones."""
        return self.size.num_relations

    @property
    def dimension(self) -> int:
        """D, the real parameters of an entity's vector, without biases."""
        return self.entity.shape[1]

    def score(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """Return [B] the scores of triples given by ids [B] int64; a relation may be a reciprocal one."""
        query = self.relations.to_tail(self._vectors(head), relation)
        score = self.comparison.against(query, self.entity, tail[:, None])[:, 0]
        return _plus(_plus(score, self.head_bias, head), self.tail_bias, tail)

    def score_tails(
        self, head: Tensor, relation: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """Return the scores of tails.

        Args:
            head: [B] int64.
            relation: [B] int64, a reciprocal one in r + R.
            candidates: [B, K] int64 the tails of each row; None takes all.

        Returns:
            [B, K], or [B, E] in order of ids.
        """
        query = self.relations.to_tail(self._vectors(head), relation)
        return self._scores(query, (self.head_bias, head), self.tail_bias, candidates)

    def score_heads(
        self, relation: Tensor, tail: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """Return the scores of heads.

        Args:
            relation: [B] int64 under R.
            tail: [B] int64.
            candidates: [B, K] int64 the heads of each row; None takes all.

        Returns:
            [B, K], or [B, E] in order of ids.
        """
        if self.size.is_reciprocal:
            return self.score_tails(tail, relation + self.num_relations, candidates)
        query = self.relations.to_head(self._vectors(tail), relation)
        return self._scores(query, (self.tail_bias, tail), self.head_bias, candidates)

    def score_answers(
        self, entity: Tensor, relation: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """Return the scores of tails where a relation is under R, else of heads of relation - R.

        With reciprocal relations both are tails. Without, all rows are compared at once, whichever way they ask.

        Args:
            entity: [B] int64 the heads, or tails, that are known.
            relation: [B] int64 under 2R.
            candidates: [B, K] int64 the answers of each row; None takes all.

        Returns:
            [B, K], or [B, E] in order of ids.
        """
        if self.size.is_reciprocal:
            return self.score_tails(entity, relation, candidates)
        is_head = relation >= self.num_relations
        query = self._both_ways(self._vectors(entity), relation, is_head)
        if candidates is None:
            score = self.comparison.against_all(query, self.entity, None)
        else:
            score = self.comparison.against(query, self.entity, candidates)
        for bias, is_answer in ((self.head_bias, is_head), (self.tail_bias, ~is_head)):
            if bias is not None:
                of_answer = bias if candidates is None else bias[candidates]
                score = score + torch.where(is_answer[:, None], of_answer, bias[entity][:, None])
        return score

    def _both_ways(self, vectors: Tensor, relation: Tensor, is_head: Tensor) -> Tensor:
        """Return [B, D] where the answers should lie, from vectors [B, D] of what is known and relations [B] under 2R."""
        of_tails, of_heads = torch.nonzero(~is_head)[:, 0], torch.nonzero(is_head)[:, 0]
        tails = self.relations.to_tail(look_up(vectors, of_tails), relation[of_tails])
        heads = self.relations.to_head(
            look_up(vectors, of_heads), relation[of_heads] - self.num_relations
        )
        return look_up(torch.cat([tails, heads]), torch.argsort(torch.cat([of_tails, of_heads])))

    def factors(self, head: Tensor, relation: Tensor, tail: Tensor) -> Factors:
        """Return what the regularisers of triples given by ids [B] read."""
        first, last = self._vectors(head), self._vectors(tail)
        vectors, has_maps = self.relations.vectors(relation), self.relations.is_bilinear
        return Factors(
            head=self._lengths(first),
            relation=None if vectors is None else self._lengths(vectors),
            tail=self._lengths(last),
            mapped_head=self.relations.to_tail(first, relation) if has_maps else None,
            mapped_tail=self.relations.to_head(last, relation) if has_maps else None,
        )

    def _vectors(self, ids: Tensor) -> Tensor:
        return look_up(self.entity, ids)

    def _lengths(self, vectors: Tensor) -> Tensor:
        if not self.relations.is_complex:
            return vectors
        real, imaginary = vectors.chunk(2, -1)
        return (real.square() + imaginary.square()).clamp_min(_SMALLEST).sqrt()

    def _scores(
        self,
        query: Tensor,
        asked: tuple[nn.Parameter | None, Tensor],
        bias: nn.Parameter | None,
        candidates: Tensor | None,
    ) -> Tensor:
        if candidates is None:
            score = self.comparison.against_all(query, self.entity, bias)
        else:
            score = self.comparison.against(query, self.entity, candidates)
            score = _plus(score, bias, candidates)
        of_query, ids = asked
        return score if of_query is None else score + of_query[ids][:, None]


def _plus(score: Tensor, bias: nn.Parameter | None, ids: Tensor) -> Tensor:
    return score if bias is None else score + bias[ids]


def uniform(bound: float, *shape: int) -> Tensor:
    """Return random numbers between -bound and bound."""
    return torch.empty(*shape).uniform_(-bound, bound)
