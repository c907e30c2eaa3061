"""What all vertical models share: their fields, their histories, and the seam to an architecture.

An architecture is a tower: a module from the embedded fields, the numbers and the summed-up histories to logits. The
histories go in beside the fields, before anything interacts. The architectures themselves are in the files of their names,
the table of them in `models/registry.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.features import FeatureInput
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    HistoryReader,
    StoredWidths,
    build_history_reader,
)
from loopfm_ray.models.layers import Mlp

__all__ = [
    "BaseVmConfig",
    "DeepHead",
    "FieldTokens",
    "Tower",
    "TowerOutput",
    "VerticalModel",
    "VmInputs",
    "VmWidths",
    "assemble_vm",
]


class BaseVmConfig(Config):
    """What every vertical model has."""

    embed_dim: PositiveInt = 8
    """Width of every id embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each hidden layer."""
    history: HistoryInputs = HistoryInputs()
    """The histories that are read, by a name of one's own; none is the plain VM."""
    reads_teacher_latent: bool = False
    """Whether the FM's latent of the row itself is read: an upper bound that takes a live FM, and can not be served."""


@dataclass(frozen=True)
class VmWidths:
    """What a tower is built for."""

    schema: FeatureSchema
    embed_dim: int
    field_names: tuple[str, ...]
    """The F embedded fields, in order."""
    history_dim: int
    """Numbers of all histories together; 0 for the plain VM."""

    @property
    def num_numeric(self) -> int:
        """Numeric fields."""
        return len(self.schema.numeric)

    @property
    def num_tasks(self) -> int:
        """Outputs."""
        return len(self.schema.tasks)

    @property
    def flat_dim(self) -> int:
        """Width of everything side by side."""
        return len(self.field_names) * self.embed_dim + self.num_numeric + self.history_dim


@dataclass(frozen=True)
class VmInputs:
    """What a tower reads."""

    batch: Batch
    """Its ids and sequences, for weights of the tower's own."""
    embedded: Tensor
    """[B, F, D]"""
    numeric: Tensor
    """[B, F_num]"""
    history: Tensor
    """[B, H]"""

    def flat(self) -> Tensor:
        """Return [B, F * D + F_num + H]: everything side by side."""
        return torch.cat([self.embedded.flatten(1), self.numeric, self.history], -1)


@dataclass(frozen=True)
class TowerOutput:
    """What a tower gives for a batch."""

    logit: Tensor
    """[B, T]"""
    layers: dict[str, Tensor]
    """Named hidden layers [B, D_l]; `hidden_0` is the first one of the (first) MLP."""


class Tower(Protocol):
    """An architecture: a module with named hidden layers."""

    layer_dims: dict[str, int]

    def __call__(self, inputs: VmInputs) -> TowerOutput:
        """Score a batch."""
        ...


class VerticalModel(nn.Module):
    """Fields and histories, then a tower.

    The query of a history is what the VM knows of the request and the candidate: all its fields.
    """

    def __init__(
        self,
        features: FeatureInput,
        histories: HistoryReader,
        tower: Tower,
        teacher_dim: int = 0,
    ) -> None:
        """Compose the parts; `teacher_dim` is the width of the row's own latent, 0 to read none."""
        super().__init__()
        self.features, self.histories, self.tower = features, histories, tower
        self.teacher_dim = teacher_dim

    def forward(self, batch: Batch) -> Tensor:
        """Return [B, T] logits.

        Raises:
            ShapeError: the batch lacks a history that the VM reads.
        """
        return self.forward_all(batch).logit

    def forward_all(self, batch: Batch) -> TowerOutput:
        """Return the logits and the named hidden layers."""
        parts = self.features.split(batch)
        history = self.histories(parts.flat(), batch, self.features.embeddings)
        if self.teacher_dim:
            history = torch.cat([history, self._teacher(batch)], -1)
        return self.tower(VmInputs(batch, parts.embedded, parts.numeric, history))

    def layer_dim(self, name: str) -> int:
        """Return the width of a named layer.

        Raises:
            ConfigError: there is no such layer.
        """
        if name not in self.tower.layer_dims:
            raise ConfigError(
                f"the VM has no layer {name!r}, it has {list(self.tower.layer_dims)}; name one of these"
            )
        return self.tower.layer_dims[name]

    def _teacher(self, batch: Batch) -> Tensor:
        latent = batch.teacher_latent
        if latent is None or latent.shape[-1] != self.teacher_dim:
            found = "none" if latent is None else f"{latent.shape[-1]} numbers"
            raise ShapeError(
                f"the VM reads the row's own latent of {self.teacher_dim} numbers, the batch has {found}; it takes a"
                " live FM, so read rows of a joined set that holds it"
            )
        return latent.detach()


class FieldTokens(nn.Module):
    """All inputs as one table of equally wide fields [B, M, D], for towers that let fields interact.

    A number x becomes `x v` with a learnt v, and the histories become `history_fields` fields through a linear map.
    """

    def __init__(self, widths: VmWidths, history_fields: int) -> None:
        super().__init__()
        dim = widths.embed_dim
        self.numbers = nn.Parameter(torch.randn(widths.num_numeric, dim) * 0.05)
        self.history = (
            nn.Linear(widths.history_dim, history_fields * dim) if widths.history_dim else None
        )
        self.num_fields = len(widths.field_names) + widths.num_numeric
        self.num_fields += history_fields if widths.history_dim else 0
        self.out_dim = self.num_fields * dim

    def forward(self, inputs: VmInputs) -> Tensor:
        """Return [B, M, D]."""
        parts = [inputs.embedded, inputs.numeric[..., None] * self.numbers]
        if self.history is not None:
            dim = self.numbers.shape[1]
            parts.append(self.history(inputs.history).unflatten(1, (-1, dim)))
        return torch.cat(parts, 1)


class DeepHead(nn.Module):
    """An MLP with named layers, and a linear output for each task."""

    def __init__(self, mlp: Mlp, num_tasks: int) -> None:
        super().__init__()
        self.mlp, self.out = mlp, nn.Linear(mlp.out_dim, num_tasks)
        self.layer_dims = {
            f"hidden_{index}": int(layer.out_features)  # type: ignore[arg-type]  # a Linear
            for index, layer in enumerate(mlp.layers)
        }

    def forward(self, x: Tensor) -> TowerOutput:
        """Score x [B, in_dim]."""
        hidden = self.mlp.forward_all(x)
        logit = self.out(hidden[-1] if hidden else x)
        return TowerOutput(logit, dict(zip(self.layer_dims, hidden, strict=True)))


def assemble_vm(
    config: BaseVmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str],
    latent_dim: int | None,
    build_tower: Callable[[VmWidths], Tower],
) -> VerticalModel:
    """Build the VM of a schema around a tower.

    Args:
        config: which histories are read.
        schema: the VM's own fields and tasks.
        item_fields: the columns of `History.item_ids` in the raw history, if that is read.
        latent_dim: width of the stored latents, if those are read.
        build_tower: from the widths of its inputs to the tower.

    Raises:
        ConfigError: the config asks for a history or a width that is not there.
    """
    features = FeatureInput(schema, config.embed_dim)
    reader = build_history_reader(
        config.history,
        features.embeddings,
        features.out_dim,
        StoredWidths(tuple(item_fields), latent_dim),
    )
    if config.reads_teacher_latent and latent_dim is None:
        raise ConfigError(
            "a VM with reads_teacher_latent needs the width of the stored latents; train it on a joined set"
        )
    teacher_dim = (latent_dim or 0) if config.reads_teacher_latent else 0
    history_dim = reader.out_dim + teacher_dim
    widths = VmWidths(schema, config.embed_dim, features.names, history_dim)
    return VerticalModel(features, reader, build_tower(widths), teacher_dim)
