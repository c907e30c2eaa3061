"""The vertical model: its own few fields, and the history that the FM left behind (or the raw one)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError, ShapeError
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

__all__ = [
    "HistoryInputConfig",
    "HistoryKind",
    "VerticalModel",
    "VmConfig",
    "build_vm",
]

HistoryKind = Literal["none", "latent", "raw", "both"]


class HistoryInputConfig(Config):
    """What a VM reads of the user's past."""

    kind: HistoryKind = "none"
    """`latent`: the FM's latents; `raw`: ids of past items in the VM's own tables; `both`; or `none`."""
    latent_dim: PositiveInt | None = None
    """How many leading numbers of each latent are read: a Matryoshka prefix; null reads all."""
    fields: tuple[str, ...] = ()
    """Item-side fields of a raw past event; empty takes all that the VM has."""
    raw_dim: PositiveInt | None = None
    """Width that a raw past event is mapped to; null takes its embeddings side by side."""
    encoder: EncoderConfig = AttentionConfig()
    """How the history is summed up."""


class VmConfig(Config):
    """An MLP over embedded fields, numbers and the summed-up history."""

    kind: Literal["vm"] = "vm"
    embed_dim: PositiveInt = 8
    """Width of every id embedding."""
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the MLP."""
    cross_layers: NonNegativeInt = 0
    """Cross layers before the MLP."""
    cross_rank: PositiveInt = 16
    """Rank of each cross layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each hidden layer."""
    history: HistoryInputConfig = HistoryInputConfig()
    """The user's past; `none` is the plain VM."""


class VerticalModel(nn.Module):
    """Fields and histories side by side, then cross layers and an MLP.

    The query of a history is what the VM knows of the request and the candidate: all its fields.
    """

    def __init__(
        self,
        features: FeatureInput,
        encoders: dict[str, HistoryEncoder],
        events: RawEvents | None,
        tower: nn.Module,
        latent_dim: int | None = None,
    ) -> None:
        """Compose the parts.

        Args:
            features: the VM's fields.
            encoders: by history, `latent` and `raw`.
            events: what a raw past event is; needed with a raw history.
            tower: from everything side by side to [B, T] logits.
            latent_dim: leading numbers of a latent that are read.
        """
        super().__init__()
        self.features, self.events, self.latent_dim = features, events, latent_dim
        self.encoders = nn.ModuleDict(encoders)
        self.tower = tower

    def forward(self, batch: Batch) -> Tensor:
        """Return [B, T] logits.

        Raises:
            ShapeError: the batch lacks a history that the VM reads.
        """
        fields = self.features(batch)
        parts = [fields]
        for name, encoder in self.encoders.items():
            history = need_history(batch, name)
            if name == "raw" and self.events is not None:
                values = self.events(self.features.embeddings, history.item_ids)
            else:
                values = self._latents(history.latents)
            parts.append(encoder(fields, values, history))
        logit: Tensor = self.tower(torch.cat(parts, -1))
        return logit

    def _latents(self, latents: Tensor | None) -> Tensor:
        width = self.latent_dim or 0
        if latents is None or latents.shape[-1] < width:
            found = "none" if latents is None else f"{latents.shape[-1]}"
            raise ShapeError(
                f"the VM reads latents of {width} numbers, the batch has {found}; check the snapshot"
            )
        return latents[..., :width]


def build_vm(
    config: VmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build the VM of a schema.

    Args:
        config: widths, and which history is read.
        schema: the VM's own fields and tasks.
        item_fields: the columns of `History.item_ids` in the raw history, if that is read.
        latent_dim: width of the stored latents, if those are read.

    Raises:
        ConfigError: the config asks for a history or a width that is not there.
    """
    features = FeatureInput(schema, config.embed_dim)
    encoders: dict[str, HistoryEncoder] = {}
    history, events, width = config.history, None, None
    if history.kind in ("latent", "both"):
        width = _latent_width(history.latent_dim, latent_dim)
        encoders["latent"] = build_encoder(history.encoder, features.out_dim, width)
    if history.kind in ("raw", "both"):
        fields = history.fields or [n for n in item_fields if n in features.embeddings.names]
        events = RawEvents(features.embeddings, item_fields, fields, history.raw_dim)
        encoders["raw"] = build_encoder(history.encoder, features.out_dim, events.out_dim)
    in_dim = features.out_dim + sum(encoder.out_dim for encoder in encoders.values())
    mlp = Mlp(in_dim, config.hidden, config.dropout)
    layers: list[nn.Module] = [mlp, nn.Linear(mlp.out_dim, len(schema.tasks))]
    if config.cross_layers:
        layers.insert(0, CrossNet(in_dim, config.cross_layers, config.cross_rank))
    return VerticalModel(features, encoders, events, nn.Sequential(*layers), width)


def _latent_width(wanted: int | None, stored: int | None) -> int:
    if stored is None:
        raise ConfigError(
            "a VM with a latent history needs the width of the stored latents; train it on a joined set"
        )
    if wanted is not None and wanted > stored:
        raise ConfigError(
            f"history.latent_dim must be at most the stored {stored}, found {wanted}; lower it"
        )
    return wanted or stored
