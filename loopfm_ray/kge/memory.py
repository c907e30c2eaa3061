"""What a model remembers of its own earlier iterations, and what it knew then about the questions of a batch.

Each memory is one copy: of the weights (`snapshot`, `average`), or of the best answers to every training question at its last
visit (`last_visit`). A fixed teacher has the same face, so that distillation from another model differs in nothing else.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.best import best_columns
from loopfm_ray.kge.objectives import Asked, Objective, score_answers
from loopfm_ray.kge.processes import ALONE, Process

__all__ = [
    "AnyMemoryConfig",
    "AverageConfig",
    "Knowledge",
    "LastVisitConfig",
    "Memory",
    "MemoryConfig",
    "SnapshotConfig",
    "TeacherConfig",
    "averaged_model",
    "make_memory",
]

Decay = Annotated[float, Field(ge=0, lt=1)]


class AverageConfig(Config):
    """An exponential moving average of the weights of all iterations."""

    kind: Literal["average"] = "average"
    decay: Decay = 0.99
    """Share of the average that stays at each step."""


class SnapshotConfig(Config):
    """The weights as they were at the end of an earlier epoch."""

    kind: Literal["snapshot"] = "snapshot"
    every: PositiveInt = 1
    """Epochs between snapshots."""


class LastVisitConfig(Config):
    """The scores of the best answers to each question when it was last asked; for losses over all entities.

    With a decay it is a moving average over its visits (temporal ensembling, arXiv 1610.02242): of an answer that was kept before, of
    one that was not its present score.
    """

    kind: Literal["last_visit"] = "last_visit"
    num_kept: PositiveInt = 64
    """Answers kept of each question: those that scored best."""
    decay: Decay = 0.0
    """Share of what was remembered that stays at each visit; with 0 the last visit alone counts."""


class TeacherConfig(Config):
    """Another model, trained before, as in distillation from a teacher; given to `train_kge`."""

    kind: Literal["teacher"] = "teacher"


AnyMemoryConfig = AverageConfig | SnapshotConfig | LastVisitConfig | TeacherConfig
MemoryConfig = Annotated[AnyMemoryConfig, Field(discriminator="kind")]
"""The config of a memory, told by its `kind`."""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Earlier scores of the questions of a batch, without gradient."""

    scores: Tensor
    """[B, K] float32."""
    columns: Tensor | None
    """[B, K] int64 their places among the batch's scores; None: they are the same columns."""


class Memory(Protocol):
    """Remembers earlier iterations of one model."""

    def recall(self, asked: Asked) -> Knowledge | None:
        """Return what was known of the questions; None as long as nothing is."""
        ...

    def after_step(self, model: KgeModel, asked: Asked) -> None:
        """Take in what a step made of the model and the scores that it saw."""
        ...

    def after_epoch(self, model: KgeModel, epoch: int) -> None:
        """Take in the model after `epoch` epochs."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `load_state_dict` brings back."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what was remembered."""
        ...


def make_memory(
    config: AnyMemoryConfig,
    model: KgeModel,
    objective: Objective,
    teacher: KgeModel | None,
    process: Process = ALONE,
) -> Memory:
    """Build the empty memory of a model that is trained on an objective; processes that train together remember the same.

    Raises:
        ConfigError: the memory and the loss, or the memory and the teacher, do not go together.
    """
    if (teacher is not None) != isinstance(config, TeacherConfig):
        found = "none was" if teacher is None else "one was"
        raise ConfigError(
            f"memory.kind is {config.kind} and {found} given as teacher: a teacher goes with memory.kind teacher alone"
        )
    if teacher is not None:
        return _Teacher(teacher, model)
    if isinstance(config, AverageConfig):
        return _Average(model, config.decay)
    if isinstance(config, SnapshotConfig):
        return _Snapshot(model, config.every)
    assert isinstance(config, LastVisitConfig)
    num_kept = min(config.num_kept, model.num_entities)
    return _LastVisit(objective, num_kept, config.decay, model.entity.device, process)


class _Copy:
    """A second set of weights, in evaluation and without gradient."""

    def __init__(self, model: KgeModel) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.is_set = False

    def recall(self, asked: Asked) -> Knowledge | None:
        if not self.is_set:
            return None
        with torch.no_grad():
            scores = score_answers(self.model, asked.entity, asked.relation, asked.candidates)
        return Knowledge(scores, None)

    def after_step(self, model: KgeModel, asked: Asked) -> None:
        pass

    def after_epoch(self, model: KgeModel, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict()) if self.is_set else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.is_set = bool(state)
        if state:
            self.model.load_state_dict(state)

    def _take(self, model: KgeModel) -> None:
        self.model.load_state_dict(model.state_dict())
        self.is_set = True


class _Teacher(_Copy):
    """Another model, which stays as it is; a checkpoint does not hold it, as it is given again."""

    def __init__(self, teacher: KgeModel, model: KgeModel) -> None:
        super().__init__(teacher)
        sizes = [(one.num_entities, one.num_relations) for one in (teacher, model)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the teacher has {sizes[0][0]} entities and {sizes[0][1]} relations, the model {sizes[1][0]} and"
                f" {sizes[1][1]}; train the teacher on the same graph"
            )
        self.is_set = True

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


class _Snapshot(_Copy):
    def __init__(self, model: KgeModel, every: int) -> None:
        super().__init__(model)
        self.every = every

    def after_epoch(self, model: KgeModel, epoch: int) -> None:
        if epoch % self.every == 0:
            self._take(model)


class _Average(_Copy):
    """It begins with the weights after the first epoch: those before are noise."""

    def __init__(self, model: KgeModel, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def after_step(self, model: KgeModel, asked: Asked) -> None:  # noqa: ARG002  of a protocol
        if not self.is_set:
            return
        mine, its = self.model.state_dict(), model.state_dict()
        for name, value in mine.items():
            if value.is_floating_point():
                value.lerp_(its[name], 1.0 - self.decay)
            else:  # a counter of batch norm
                value.copy_(its[name])

    def after_epoch(self, model: KgeModel, epoch: int) -> None:  # noqa: ARG002  of a protocol
        if not self.is_set:
            self._take(model)


def averaged_model(memory: Memory) -> KgeModel:
    """Return the model that a memory of kind `average` has made by the end of the first epoch, in evaluation."""
    assert isinstance(memory, _Average)
    assert memory.is_set
    return memory.model


class _LastVisit:
    """[Q, K] the places and scores of each question's best answers; a question that was not asked yet has none."""

    def __init__(
        self,
        objective: Objective,
        num_kept: int,
        decay: float,
        device: torch.device,
        process: Process,
    ) -> None:
        if objective.loss.kind not in ("one_vs_all", "k_vs_all"):
            raise ConfigError(
                f"memory.kind last_visit remembers scores of all entities, and loss.kind is {objective.loss.kind},"
                " which scores drawn ones; take average or snapshot"
            )
        num = len(objective.known.keys)
        self.process, self.decay = process, decay
        self.questions = torch.from_numpy(objective.question_of_rows()).to(device)
        self.columns = torch.zeros(num, num_kept, dtype=torch.int32, device=device)
        self.scores = torch.full((num, num_kept), torch.nan, device=device)

    def recall(self, asked: Asked) -> Knowledge | None:
        if self.scores[self._questions(asked.batch), 0].isnan().any():
            return None  # in the first epoch; all processes find the same
        question = self._questions(asked.rows)
        return Knowledge(self.scores[question], self.columns[question].long())

    def after_step(self, model: KgeModel, asked: Asked) -> None:  # noqa: ARG002  of a protocol
        question = self._questions(asked.rows)
        # a question may be asked by several rows, whose scores may differ in their last bits
        once = _first_places(question)
        present = asked.scores.detach()[once]
        columns, scores = self._remembered(question[once], present)
        question = self.process.gather(question[once])
        scores = self.process.gather(scores)
        columns = self.process.gather(columns.int())
        once = _first_places(question)
        self.scores[question[once]] = scores[once]
        self.columns[question[once]] = columns[once]

    def _remembered(self, question: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, K] the places and scores to keep of questions [B] that now have scores present [B, E]."""
        num = self.scores.shape[1]
        best = best_columns(present, num)
        now = present.gather(1, best)
        before = self.scores[question]
        was_asked = ~before[:, :1].isnan()
        if self.decay == 0.0 or not bool(was_asked.any()):
            return best, now
        old = self.columns[question].long()
        averaged = self.decay * before + (1.0 - self.decay) * present.gather(1, old)
        averaged = torch.where(was_asked, averaged, -torch.inf)
        is_old = (best[:, :, None] == old[:, None, :]).any(2) & was_asked
        scores = torch.cat([averaged, now.masked_fill(is_old, -torch.inf)], 1)
        kept, place = scores.topk(num, dim=1)
        return torch.cat([old, best], 1).gather(1, place), kept

    def _questions(self, rows: NDArray[np.int64]) -> Tensor:
        return self.questions[torch.from_numpy(rows).to(self.questions.device)]

    def after_epoch(self, model: KgeModel, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {"columns": self.columns, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])


def _first_places(question: Tensor) -> Tensor:
    """Return where each distinct question comes first."""
    places = np.unique(question.cpu().numpy(), return_index=True)[1]
    return torch.from_numpy(places).to(question.device)
