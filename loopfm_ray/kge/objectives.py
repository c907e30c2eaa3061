"""What training minimises: questions in both directions, one of the losses, and a regulariser.

Every triple asks two questions, (h, r, ?) and (t, r + R, ?). A backbone with reciprocal relations answers both as tails; one
without answers the second with its heads of (?, r, t).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from loopfm_ray.config import Config
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.filters import Answers, index_facts
from loopfm_ray.kge.losses import (
    k_vs_all_bce,
    margin_ranking,
    one_vs_all_cross_entropy,
    self_adversarial,
)
from loopfm_ray.kge.negatives import FilteredNegatives, uniform_negatives
from loopfm_ray.kge.processes import ALONE, Part, Process, part_of
from loopfm_ray.kge.regularizers import dura, n3
from loopfm_ray.kge.triples import TripleSet

__all__ = [
    "AnyLossConfig",
    "Asked",
    "KVsAllConfig",
    "LossConfig",
    "MarginConfig",
    "Objective",
    "OneVsAllConfig",
    "RegularizerConfig",
    "SelfAdversarialConfig",
    "make_objective",
    "score_answers",
]

Share = Annotated[float, Field(ge=0, le=1)]
Ids = NDArray[np.int64]


class OneVsAllConfig(Config):
    """Cross entropy of each true answer against all entities."""

    kind: Literal["one_vs_all"] = "one_vs_all"


class KVsAllConfig(Config):
    """Binary cross entropy of all entities, for each distinct question once."""

    kind: Literal["k_vs_all"] = "k_vs_all"
    label_smoothing: Share = 0.1
    """Share of the label that is spread over all entities."""


class _SampledConfig(Config):
    num_negatives: PositiveInt = 64
    """False answers drawn for each true one."""
    margin: NonNegativeFloat = 9.0
    """gamma."""
    is_filtered: bool = False
    """Whether known answers are never drawn."""


class SelfAdversarialConfig(_SampledConfig):
    """RotatE's loss: drawn answers weighted by how well they score."""

    kind: Literal["self_adversarial"] = "self_adversarial"
    temperature: NonNegativeFloat = 1.0
    """alpha; 0 weighs all alike."""


class MarginConfig(_SampledConfig):
    """A true answer is to score better than each drawn one by a margin."""

    kind: Literal["margin"] = "margin"


SampledConfig = SelfAdversarialConfig | MarginConfig
AnyLossConfig = OneVsAllConfig | KVsAllConfig | SampledConfig
LossConfig = Annotated[AnyLossConfig, Field(discriminator="kind")]
"""The config of a loss, told by its `kind`."""


class RegularizerConfig(Config):
    """A penalty on the factors of the triples of each batch."""

    kind: Literal["n3", "dura"] = "n3"
    """Which one; DURA is for bilinear backbones."""
    weight: NonNegativeFloat = 0.05
    """What it is multiplied by."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The questions of a batch, or of this process's part of it, and their scores."""

    rows: Ids
    """[B] their numbers, under `Objective.num_rows`."""
    entity: Tensor
    """[B] int64."""
    relation: Tensor
    """[B] int64 under 2R."""
    answer: Tensor | None
    """[B] int64 the column of the one true answer that is looked for; None where a question is asked for all of them."""
    candidates: Tensor | None
    """[B, K] int64 entities that were scored, the true one first; None: all, in order."""
    scores: Tensor
    """[B, K] or [B, E], with gradient."""
    batch: Ids
    """The numbers of the whole batch, in which the part's own follow one another."""
    weight: float
    """What a mean over the part's questions counts in that over the batch; 1 in a single process."""


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of batches of training rows."""

    loss: AnyLossConfig
    regularizer: RegularizerConfig | None
    rows: Ids
    """[m, 3] entity, relation under 2R, answer: each triple both ways."""
    known: Answers
    """The answers of each distinct question of the rows."""
    filtered: FilteredNegatives | None
    """Draws negatives where the loss wants them filtered."""

    @property
    def num_rows(self) -> int:
        """Return how many rows an epoch has: distinct questions for k-vs-all, else answers."""
        return len(self.known.keys) if self.loss.kind == "k_vs_all" else len(self.rows)

    def question_of_rows(self) -> Ids:
        """Return [num_rows] the number of each row's question, under `len(known.keys)`."""
        if self.loss.kind == "k_vs_all":
            return np.arange(len(self.known.keys))
        return np.searchsorted(self.known.keys, self.known.key(self.rows[:, 0], self.rows[:, 1]))

    def batch_loss(self, model: KgeModel, batch: Ids, generator: np.random.Generator) -> Tensor:
        """Return [] the loss of rows batch [B], numbers under `num_rows`; negatives are drawn from `generator`."""
        return self.ask(model, batch, generator)[1]

    def ask(
        self,
        model: KgeModel,
        batch: Ids,
        generator: np.random.Generator,
        process: Process = ALONE,
    ) -> tuple[Asked, Tensor]:
        """Return the questions of a process's part of rows batch [B] with their scores, and [] its summand of the loss.

        Negatives are drawn for the whole batch, so they are the same whatever the number of processes.
        """
        part = part_of(len(batch), process)
        if isinstance(self.loss, KVsAllConfig):
            return self._ask_questions(model, self.loss, batch, part)
        own = batch[part.rows]
        weight = part.weight(len(own), len(batch))
        entity, relation, answer = (np.ascontiguousarray(one) for one in self.rows[own].T)
        who, by, true = _to(model, entity, relation, answer)
        penalty = self._penalty(model, who, by, true)
        if isinstance(self.loss, OneVsAllConfig):
            scores = score_answers(model, who, by)
            loss = one_vs_all_cross_entropy(scores, true)
            asked = Asked(own, who, by, true, None, scores, batch, weight)
            return asked, weight * (loss + penalty)
        drawn = self._draw(self.loss, generator, batch)[part.rows]
        (candidates,) = _to(model, np.concatenate([answer[:, None], drawn], axis=1))
        scores = score_answers(model, who, by, candidates)
        first = torch.zeros_like(true)
        asked = Asked(own, who, by, first, candidates, scores, batch, weight)
        return asked, weight * (_sampled_loss(self.loss, scores) + penalty)

    def _ask_questions(
        self, model: KgeModel, config: KVsAllConfig, batch: Ids, part: Part
    ) -> tuple[Asked, Tensor]:
        own = batch[part.rows]
        entity, relation = np.divmod(self.known.keys[own], self.known.num_relations)
        row, answer = self.known.pairs(entity, relation)
        who, by = _to(model, entity, relation)
        scores = score_answers(model, who, by)
        places, answers = _to(model, row, answer)
        loss = k_vs_all_bce(scores, places, answers, config.label_smoothing)
        triples = _to(model, entity[row], relation[row])
        penalty = self._penalty(model, triples[0], triples[1], answers)
        weight = part.weight(len(own), len(batch))
        of_triples = part.weight(len(row), self._num_answers(batch))
        asked = Asked(own, who, by, None, None, scores, batch, weight)
        return asked, weight * loss + of_triples * penalty

    def _num_answers(self, questions: Ids) -> int:
        offsets = self.known.offsets
        return int((offsets[questions + 1] - offsets[questions]).sum())

    def _draw(self, config: SampledConfig, generator: np.random.Generator, batch: Ids) -> Ids:
        num = config.num_negatives
        if self.filtered is None:
            return uniform_negatives(generator, len(batch), num, self.known.num_entities)
        entity, relation = (np.ascontiguousarray(one) for one in self.rows[batch, :2].T)
        return self.filtered.draw(generator, entity, relation, num)

    def _penalty(
        self, model: KgeModel, entity: Tensor, relation: Tensor, answer: Tensor
    ) -> Tensor | float:
        if self.regularizer is None:
            return 0.0
        head, tail = entity, answer
        if not model.size.is_reciprocal:
            is_head = relation >= model.num_relations
            head, tail = torch.where(is_head, answer, entity), torch.where(is_head, entity, answer)
            relation = relation % model.num_relations
        penalty = n3 if self.regularizer.kind == "n3" else dura
        return self.regularizer.weight * penalty(model.factors(head, relation, tail))


def make_objective(
    graph: TripleSet,
    loss: AnyLossConfig,
    regularizer: RegularizerConfig | None = None,
) -> Objective:
    """Prepare the training triples of a graph for a loss.

    Raises:
        DataError: negatives are to be filtered, and a question has every entity as an answer.
    """
    rows = graph.with_reciprocals("train")
    known = index_facts(rows, graph.num_entities, 2 * graph.num_relations).tails
    is_filtered = isinstance(loss, SampledConfig) and loss.is_filtered
    filtered = FilteredNegatives(known) if is_filtered else None
    return Objective(loss, regularizer, rows, known, filtered)


def score_answers(
    model: KgeModel, entity: Tensor, relation: Tensor, candidates: Tensor | None = None
) -> Tensor:
    """Return [B, E], or [B, K] of candidates [B, K], for questions entity [B] and relation [B] under 2R.

    The second half of the relations asks for heads: through reciprocal relations where the backbone has them.
    """
    return model.score_answers(entity, relation, candidates)


def _sampled_loss(config: SampledConfig, scores: Tensor) -> Tensor:
    """Return [] the loss of scores [B, 1 + N], the true answer first."""
    positive, negative = scores[:, 0], scores[:, 1:]
    if isinstance(config, MarginConfig):
        return margin_ranking(positive, negative, config.margin)
    return self_adversarial(positive, negative, config.margin, config.temperature)


def _to(model: KgeModel, *arrays: Ids) -> list[Tensor]:
    return [torch.from_numpy(array).to(model.entity.device) for array in arrays]
