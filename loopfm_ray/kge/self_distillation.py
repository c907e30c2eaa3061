"""Confidence-aware self-distillation (CSD) as implemented here: a model learns from its own earlier embeddings.

The paper (arXiv 2206.02963) fixes this much: one model is teacher and student in turn, what it learns from are its embeddings of
earlier iterations, a semantic module estimates how far they can be trusted and filters them, and the loss is Huber's. Its
equations are not public; those here are ours. With s the scores of a question's K candidates, s' those of the memory, z(.) the
standardised scores, c_q the confidence in the question and c_j in a candidate:

    L = L_task + w(t) mean_q c_q (1/K) sum_j c_j Huber_d(z(s)_j - z(s')_j)                        `huber`
    L = L_task + w(t) mean_q c_q T^2 sum_j p'_j (log p'_j - log p_j),  p = softmax(s / T)         `kl`

`kl` is the loss of the paper's first version. No gradient goes through s', c_q and c_j. With a fixed teacher instead of a memory the
same loss is distillation from that teacher.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor
from torch.nn import functional

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.best import best_columns
from loopfm_ray.kge.confidence import (
    ConfidenceConfig,
    EvenConfig,
    RuleConfig,
    SemanticConfig,
    SemanticModule,
    Views,
    answer_confidence,
    gate_confidence,
    gate_loss,
    standardized,
)
from loopfm_ray.kge.memory import (
    AverageConfig,
    Knowledge,
    MemoryConfig,
    averaged_model,
    make_memory,
)
from loopfm_ray.kge.objectives import Asked, Objective
from loopfm_ray.kge.processes import ALONE, Process, sum_gradients

__all__ = [
    "DivergenceConfig",
    "HuberConfig",
    "KlConfig",
    "SelfDistillation",
    "SelfDistillationConfig",
    "huber_distance",
    "kl_distance",
]


class HuberConfig(Config):
    """Huber's loss of standardised scores."""

    kind: Literal["huber"] = "huber"
    threshold: PositiveFloat = 1.0
    """d: from here on the loss grows linearly, in standard deviations of a row's scores."""


class KlConfig(Config):
    """Kullback-Leibler divergence of the softmax over the candidates; candidates count alike."""

    kind: Literal["kl"] = "kl"
    temperature: PositiveFloat = 1.0
    """T."""


DivergenceConfig = Annotated[HuberConfig | KlConfig, Field(discriminator="kind")]
"""The config of a distance, told by its `kind`."""


class SelfDistillationConfig(Config):
    """How a model learns from what it was."""

    memory: MemoryConfig = Field(default=AverageConfig())
    """What is remembered."""
    divergence: DivergenceConfig = Field(default=HuberConfig())
    """How present and earlier scores are compared."""
    confidence: ConfidenceConfig = Field(default=SemanticConfig())
    """How far earlier scores are trusted."""
    weight: NonNegativeFloat = 1.0
    """w, once the ramp is over."""
    begin_epoch: NonNegativeInt = 5
    """Epochs without it, in which embeddings are noise."""
    ramp_epochs: PositiveInt = 5
    """Epochs over which the weight then grows in equal steps."""
    num_candidates: PositiveInt | None = 64
    """K: of the scores of a question, those that were best before, with the asked answer; null takes all."""
    serves: Literal["student", "average"] = "student"
    """Whose weights are validated and kept: the model's that learns, or with `memory.kind: average` those of its average, the teacher (as
    in mean teacher, arXiv 1703.01780). With a weight of 0 that is weight averaging alone."""

    @model_validator(mode="after")
    def _has_average(self) -> Self:
        if self.serves == "average" and not isinstance(self.memory, AverageConfig):
            raise ConfigError(
                f"distillation.serves is average and memory.kind {self.memory.kind}: only memory.kind average keeps one; set"
                " it, or serve the student"
            )
        return self


class SelfDistillation:
    """The memory and the confidence of one training."""

    def __init__(
        self,
        config: SelfDistillationConfig,
        model: KgeModel,
        objective: Objective,
        teacher: KgeModel | None = None,
        process: Process = ALONE,
    ) -> None:
        """Begin with nothing remembered.

        Args:
            config: how.
            model: the model that is trained.
            objective: what it is trained on.
            teacher: the model to learn from, with `memory.kind: teacher` alone.
            process: this one among those that train the model.

        Raises:
            ConfigError: memory, loss and teacher do not go together.
        """
        self.config = config
        self.memory = make_memory(config.memory, model, objective, teacher, process)
        self._objective, self._process = objective, process
        self._question = objective.question_of_rows()
        self._told: tuple[Tensor, Tensor] | None = None
        """Of the present step: the gate's logits and the known answers, [B, K] each."""
        self.gate: SemanticModule | None = None
        if isinstance(config.confidence, SemanticConfig):
            self.gate = SemanticModule(config.confidence.hidden).to(model.entity.device)
            self._adam = torch.optim.Adam(self.gate.parameters(), lr=config.confidence.lr)

    def served(self, model: KgeModel) -> KgeModel:
        """Return the model whose weights are validated and kept: `model`, which learns, or its average."""
        if self.config.serves == "student":
            return model
        return averaged_model(self.memory)

    def weight_at(self, epoch: int) -> float:
        """Return w in an epoch, the first of which is 0."""
        since = epoch - self.config.begin_epoch + 1
        return self.config.weight * min(1.0, max(0, since) / self.config.ramp_epochs)

    def penalty(self, asked: Asked, epoch: int) -> Tensor | float:
        """Return [] what is added to the loss of a batch, with gradient to its scores; 0 where nothing is remembered yet.

        Of a part of a batch, its summand.
        """
        weight, self._told = self.weight_at(epoch), None
        known = self.memory.recall(asked) if weight > 0 else None
        if known is None:
            return 0.0
        columns, earlier = self._focus(asked, known)
        present = asked.scores if columns is None else asked.scores.gather(1, columns)
        views = Views(earlier, present.detach(), self._is_answer(asked, columns))
        of_question, of_candidate = self._confidence(views)
        divergence = self.config.divergence
        if isinstance(divergence, HuberConfig):
            distance = huber_distance(present, earlier, divergence.threshold, of_candidate)
        else:
            distance = kl_distance(present, earlier, divergence.temperature)
        return weight * asked.weight * (of_question * distance).mean()

    def after_step(self, model: KgeModel, asked: Asked) -> None:
        """Let the memory and the semantic module learn from a step."""
        if self.gate is not None and self._told is not None:
            self._adam.zero_grad()
            loss = asked.weight * gate_loss(*self._told)
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            sum_gradients(self.gate, self._process)
            self._adam.step()
        self.memory.after_step(model, asked)

    def after_epoch(self, model: KgeModel, epoch: int) -> None:
        """Let the memory take in the model after `epoch` epochs."""
        self.memory.after_epoch(model, epoch)

    def state_dict(self) -> dict[str, Any]:  # Any: the state of torch's optimiser
        """Return what `load_state_dict` brings back."""
        learned = {}
        if self.gate is not None:
            learned = {"gate": self.gate.state_dict(), "adam": self._adam.state_dict()}
        return {"memory": self.memory.state_dict(), **learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring back the state of a training of the same config."""
        self.memory.load_state_dict(state["memory"])
        if self.gate is not None:
            self.gate.load_state_dict(state["gate"])
            self._adam.load_state_dict(state["adam"])

    def _focus(self, asked: Asked, known: Knowledge) -> tuple[Tensor | None, Tensor]:
        """Return [B, K] the columns to compare, None for all, and the earlier scores there."""
        num = self.config.num_candidates
        if known.columns is not None or num is None or num >= known.scores.shape[1]:
            return known.columns, known.scores
        columns = best_columns(known.scores, num)
        if asked.answer is not None:
            wanted = asked.answer[:, None]
            is_there = (columns == wanted).any(1, keepdim=True)
            columns[:, -1:] = torch.where(is_there, columns[:, -1:], wanted)
        return columns, known.scores.gather(1, columns)

    def _is_answer(self, asked: Asked, columns: Tensor | None) -> Tensor:
        """Return [B, K] bool: which of the compared are known answers from training."""
        question, device = self._question[asked.rows], asked.scores.device
        if asked.candidates is None:
            # the few answers are marked among all entities: a search for each candidate takes several times as long
            row, answer = self._objective.known.pairs_of(question)
            marked = torch.zeros(asked.scores.shape, dtype=torch.bool, device=device)
            marked[torch.from_numpy(row).to(device), torch.from_numpy(answer).to(device)] = True
            return marked if columns is None else marked.gather(1, columns)
        entities = asked.candidates if columns is None else asked.candidates.gather(1, columns)
        found = self._objective.known.has(question[:, None], entities.cpu().numpy())
        return torch.from_numpy(found).to(device)

    def _confidence(self, views: Views) -> tuple[Tensor, Tensor]:
        config = self.config.confidence
        all_alike = torch.ones_like(views.earlier)
        if isinstance(config, EvenConfig):
            return all_alike[:, 0], all_alike
        if isinstance(config, RuleConfig):
            return answer_confidence(views, config.kind), all_alike
        assert self.gate is not None
        self._told = self.gate(views), views.is_answer  # once: the step after learns from the same
        return gate_confidence(*self._told, config.sharpness)


def huber_distance(
    present: Tensor, earlier: Tensor, threshold: float, confidence: Tensor
) -> Tensor:
    """Return [B] the weighted mean over candidates of Huber's loss, `a^2/2` up to the threshold d, then `d (|a| - d/2)`.

    Args:
        present: [B, K] scores, with gradient.
        earlier: [B, K] scores.
        threshold: d, of standardised scores.
        confidence: [B, K].
    """
    loss = functional.huber_loss(
        standardized(present), standardized(earlier), reduction="none", delta=threshold
    )
    return (confidence * loss).mean(-1)


def kl_distance(present: Tensor, earlier: Tensor, temperature: float) -> Tensor:
    """Return [B] `T^2 KL(softmax(earlier / T) || softmax(present / T))`.

    Args:
        present: [B, K] scores, with gradient.
        earlier: [B, K] scores.
        temperature: T.
    """
    of_present = torch.log_softmax(present / temperature, -1)
    of_earlier = torch.log_softmax(earlier / temperature, -1)
    divergence = functional.kl_div(of_present, of_earlier, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)
