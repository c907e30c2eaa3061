"""The foundation model: long raw history, wide and deep interaction, several tasks; its layers have names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.embeddings import FieldEmbeddings, TableFactory
from loopfm_ray.models.features import FeatureInput
from loopfm_ray.models.histories import (
    AttentionConfig,
    EncoderConfig,
    HistoryEncoder,
    RawEvents,
    build_encoder,
    need_history,
)
from loopfm_ray.models.layers import CrossNet, Mlp

__all__ = ["FmConfig", "FmOutput", "FoundationModel", "build_fm"]


class FmConfig(Config):
    """A deep and cross network over every field, with attention over the user's past events."""

    kind: Literal["fm"] = "fm"
    embed_dim: PositiveInt = 16
    """Width of every id embedding."""
    has_history: bool = True
    """Whether the user's raw past events are read; a user-less data set has none."""
    history_fields: tuple[str, ...] = ()
    """Item-side categorical fields of a past event; empty takes all."""
    history_dim: PositiveInt = 32
    """Width of one past event."""
    encoder: EncoderConfig = AttentionConfig()
    """How the history is summed up."""
    cross_layers: NonNegativeInt = 2
    """Cross layers beside the MLP; 0 leaves them out."""
    cross_rank: PositiveInt = 32
    """Rank of each cross layer."""
    hidden: tuple[PositiveInt, ...] = (256, 128)
    """Widths of the MLP: layers `hidden_0`, `hidden_1`, ..."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each hidden layer."""


@dataclass(frozen=True)
class FmOutput:
    """What the FM gives for a batch."""

    logit: Tensor
    """[B, T] one output per task, before the sigmoid."""
    layers: dict[str, Tensor]
    """Named activations [B, D_l], from which an FM embedding is read."""

    def embedding(self, layers: Sequence[str]) -> Tensor:
        """Return [B, D] the FM embedding: the named activations side by side.

        Source: LoopFM, arXiv 2605.29280, stage 1.
        """
        return torch.cat([self.layers[name] for name in layers], -1)


class FoundationModel(nn.Module):
    """Fields, numbers and history side by side (`embedding`), then an MLP (`hidden_0`, ...) and cross layers.

    The summed-up history alone is the layer `sequence`, where there is one.
    """

    def __init__(
        self,
        features: FeatureInput,
        events: RawEvents | None,
        encoder: HistoryEncoder | None,
        cross: CrossNet | None,
        mlp: Mlp,
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.features, self.events, self.encoder = features, events, encoder
        self.cross, self.mlp = cross, mlp
        in_dim = features.out_dim + (encoder.out_dim if encoder is not None else 0)
        self._dims = {"embedding": in_dim}
        if encoder is not None:
            self._dims["sequence"] = encoder.out_dim
        for index, layer in enumerate(mlp.layers):
            self._dims[f"hidden_{index}"] = int(layer.out_features)  # type: ignore[arg-type]  # a Linear
        self.head = nn.Linear(mlp.out_dim + (in_dim if cross is not None else 0), num_tasks)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in `FmOutput.layers`, input first."""
        return tuple(self._dims)

    def embedding_dim(self, layers: Sequence[str]) -> int:
        """Return the width of the named layers side by side.

        Raises:
            ConfigError: there is no such layer.
        """
        unknown = [name for name in layers if name not in self._dims]
        if unknown or not layers:
            raise ConfigError(
                f"the FM has no layers {unknown or '()'}, it has {self.layer_names}; set embedding_layers to"
                " some of them"
            )
        return sum(self._dims[name] for name in layers)

    def forward(self, batch: Batch) -> FmOutput:
        """Score a batch.

        Raises:
            ShapeError: the FM reads the raw history and the batch has none.
        """
        return self._score(self._inputs(batch))

    def sensitivity(self, batch: Batch, layers: Sequence[str]) -> Tensor:
        """Return [D]: the mean square, over rows, of the first logit's slope in each number of the named layers.

        The slope of a field in the layer `embedding` takes its way through the query of the history along. The numeric
        fields of that layer count 0: they compare the past with this one candidate, and say little later.
        """
        self.embedding_dim(layers)
        with torch.enable_grad():
            inputs = [
                part if part.requires_grad else part.requires_grad_()
                for part in self._inputs(batch)
            ]
            output = self._score(inputs)
            ends = {"embedding": inputs, "sequence": inputs[1:]}
            wanted = [ends.get(name, [output.layers[name]]) for name in layers]
            slopes = torch.autograd.grad(
                output.logit[:, 0].sum(), [t for end in wanted for t in end]
            )
        result = torch.cat(slopes, -1).square().mean(0)
        if "embedding" in layers:
            before = layers[: layers.index("embedding")]
            start = sum(self._dims[name] for name in before)
            numeric = self.features.numeric_columns
            result[start + numeric.start : start + numeric.stop] = 0.0
        return result

    def _inputs(self, batch: Batch) -> list[Tensor]:
        fields = self.features(batch)
        if self.encoder is None or self.events is None:
            return [fields]
        history = need_history(batch, "raw")
        values = self.events(self.features.embeddings, history.item_ids)
        return [fields, self.encoder(fields, values, history)]

    def _score(self, inputs: Sequence[Tensor]) -> FmOutput:
        embedding = torch.cat(tuple(inputs), -1)
        hidden = self.mlp.forward_all(embedding)
        top = hidden[-1] if hidden else embedding
        if self.cross is not None:
            top = torch.cat([top, self.cross(embedding)], -1)
        layers = [embedding, *inputs[1:], *hidden]
        return FmOutput(self.head(top), dict(zip(self._dims, layers, strict=True)))


def build_fm(
    config: FmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    tables_of: TableFactory = FieldEmbeddings,
) -> FoundationModel:
    """Build the FM of a schema.

    Args:
        config: widths and parts.
        schema: fields and tasks; its cardinalities size the tables.
        item_fields: the columns of `History.item_ids` in the raw history; empty when there is none.
        tables_of: makes the embedding tables.

    Raises:
        ConfigError: a history field is not among `item_fields`.
    """
    features = FeatureInput(schema, config.embed_dim, tables_of)
    events = encoder = None
    if config.has_history and item_fields:
        events = RawEvents(
            features.embeddings, item_fields, config.history_fields, config.history_dim
        )
        encoder = build_encoder(config.encoder, features.out_dim, config.history_dim)
    in_dim = features.out_dim + (encoder.out_dim if encoder is not None else 0)
    cross = (
        CrossNet(in_dim, config.cross_layers, config.cross_rank) if config.cross_layers else None
    )
    mlp = Mlp(in_dim, config.hidden, config.dropout)
    return FoundationModel(features, events, encoder, cross, mlp, len(schema.tasks))
