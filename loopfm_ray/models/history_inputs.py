"""What a VM reads of the past: named histories, each with its source, side information and encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, RootModel, model_validator
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch, History
from loopfm_ray.data.joined import EVENT_TYPE, LABEL, source_of
from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.ages import NUM_AGE_FEATURES, age_features
from loopfm_ray.models.embeddings import EmbeddingTables
from loopfm_ray.models.histories import (
    AttentionConfig,
    EncoderConfig,
    HistoryEncoder,
    RawEvents,
    build_encoder,
    need_history,
)

__all__ = [
    "HistoryInputConfig",
    "HistoryInputs",
    "HistoryReader",
    "LatentHistoryConfig",
    "RawHistoryConfig",
    "SideConfig",
    "StoredWidths",
    "build_history_reader",
    "newest_events",
]

_NUM_LABELS = 3
HistoryName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]


class SideConfig(Config):
    """What is known of a past event beside the event itself; put beside its vector before it is encoded."""

    age: bool = False
    """The age at the request, as smooth features. The encoders `attention`, `transformer` and `hstu` have it in any case."""
    label: bool = False
    """The event's label if it was known at the request: unknown, negative or positive."""
    num_event_types: NonNegativeInt = 0
    """How many kinds of event there are, id 0 included; ids from there on are unknown. 0 reads none."""
    dim: PositiveInt = 4
    """Width of the embedding of a label, and of a kind of event."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What the history table has to hold for it."""
        return (LABEL,) * self.label + (EVENT_TYPE,) * bool(self.num_event_types)

    @property
    def width(self) -> int:
        """Numbers put beside an event."""
        return NUM_AGE_FEATURES * self.age + self.dim * len(self.columns)


class _HistoryConfig(Config):
    """What all histories share."""

    encoder: EncoderConfig = AttentionConfig()
    """How the history is summed up."""
    side: SideConfig = SideConfig()
    """What is told of each event beside itself."""
    max_len: PositiveInt | None = None
    """The newest so many events are read; null reads all that there are."""
    in_query: bool = False
    """Whether the summed-up history is part of what the other histories are asked with."""


class LatentHistoryConfig(_HistoryConfig):
    """The FM's latents of an entity's past events."""

    kind: Literal["latent"] = "latent"
    key: tuple[HistoryName, ...] = Field(default=("user",), min_length=1)
    """Whose events: `[user]`, `[item]` for those of the candidate, or several, such as `[user, category]`."""
    latent_dim: PositiveInt | None = None
    """How many leading numbers of each latent are read: a Matryoshka prefix; null reads all."""

    @property
    def source(self) -> str:
        """Name of the source in `Batch.histories`, and of its columns in the joined set."""
        return source_of(self.key)


class RawHistoryConfig(_HistoryConfig):
    """The user's past items, as ids in the VM's own tables."""

    kind: Literal["raw"] = "raw"
    fields: tuple[str, ...] = ()
    """Item-side fields of a past event; empty takes all that the VM has."""
    event_dim: PositiveInt | None = None
    """Width that a past event is mapped to; null takes its embeddings side by side."""

    @property
    def source(self) -> str:
        """Name of the source in `Batch.histories`."""
        return "raw"


HistoryInputConfig = Annotated[LatentHistoryConfig | RawHistoryConfig, Field(discriminator="kind")]


class HistoryInputs(RootModel[dict[HistoryName, HistoryInputConfig]]):
    """The histories of a VM by a name of one's own; an empty mapping is the plain VM."""

    model_config = ConfigDict(frozen=True)
    root: dict[HistoryName, HistoryInputConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sides_agree(self) -> Self:
        """One source is gathered once, so what is asked of it has to be of one kind."""
        sizes: dict[str, set[int]] = {}
        for config in self.root.values():
            if config.side.num_event_types:
                sizes.setdefault(config.source, set()).add(config.side.num_event_types)
        wrong = {source: sorted(found) for source, found in sizes.items() if len(found) > 1}
        if wrong:
            raise ConfigError(
                f"histories of one source must agree in side.num_event_types, found {wrong}"
            )
        return self

    @classmethod
    def of(cls, **histories: LatentHistoryConfig | RawHistoryConfig) -> "HistoryInputs":
        """Return the histories given by name."""
        return cls(dict(histories))

    def sorted(self) -> list[tuple[str, LatentHistoryConfig | RawHistoryConfig]]:
        """Return (name, config) by name: the order in which a model holds them, whatever the order of the file."""
        return sorted(self.root.items())

    @property
    def kind(self) -> Literal["none", "latent", "raw", "both"]:
        """What they are made of."""
        kinds = {config.kind for config in self.root.values()}
        if len(kinds) == 2:
            return "both"
        return kinds.pop() if kinds else "none"

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The sources they need, each with the side information that it has to give."""
        out: dict[str, set[str]] = {}
        for _, config in self.sorted():
            out.setdefault(config.source, set()).update(config.side.columns)
        return {source: tuple(sorted(columns)) for source, columns in out.items()}


@dataclass(frozen=True)
class StoredWidths:
    """What the data give: columns of a raw event, and the width of the stored latents; None without latents."""

    item_fields: tuple[str, ...] = ()
    latent_dim: int | None = None


class _Side(nn.Module):
    """Puts side information beside the vectors of the events."""

    def __init__(self, config: SideConfig) -> None:
        super().__init__()
        self.has_age = config.age
        self.label = nn.Embedding(_NUM_LABELS, config.dim) if config.label else None
        self.num_event_types = config.num_event_types
        self.event_type = (
            nn.Embedding(self.num_event_types, config.dim) if self.num_event_types else None
        )

    def forward(self, values: Tensor, history: History) -> Tensor:
        """Return [G, L, d + width] from values [G, L, d].

        Raises:
            ShapeError: the history lacks what is to be read.
        """
        parts = [values]
        if self.has_age:
            parts.append(age_features(history.age_s))
        if self.label is not None:
            parts.append(self.label(_need(history.label, LABEL)))
        if self.event_type is not None:
            ids = _need(history.event_type, EVENT_TYPE)
            parts.append(self.event_type(torch.where(ids < self.num_event_types, ids, 0)))
        return torch.cat(parts, -1) if len(parts) > 1 else values


def _need(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ShapeError(
            f"a history of the batch has no {name!r} of its events; give its source that side information"
        )
    return values


class _Input(nn.Module):
    """One history: which numbers of it are read, what stands beside them, and how it is summed up."""

    def __init__(
        self,
        config: LatentHistoryConfig | RawHistoryConfig,
        events: RawEvents | None,
        latent_dim: int,
        query_dim: int,
    ) -> None:
        super().__init__()
        self.source, self.max_len, self.in_query = config.source, config.max_len, config.in_query
        self.events, self.latent_dim = events, latent_dim
        self.side = _Side(config.side)
        width = latent_dim if events is None else events.out_dim
        self.encoder: HistoryEncoder = build_encoder(
            config.encoder, query_dim, width + config.side.width
        )
        self.out_dim = self.encoder.out_dim

    def forward(self, query: Tensor, batch: Batch, embeddings: EmbeddingTables) -> Tensor:
        """Return [B, out_dim]."""
        history = newest_events(need_history(batch, self.source), self.max_len)
        if self.events is None:
            values = self._latents(history.latents)
        else:
            values = self.events(embeddings, history.item_ids)
        out: Tensor = self.encoder(query, self.side(values, history), history)
        return out

    def _latents(self, latents: Tensor | None) -> Tensor:
        if latents is None or latents.shape[-1] < self.latent_dim:
            found = "none" if latents is None else f"{latents.shape[-1]}"
            raise ShapeError(
                f"the VM reads latents of {self.latent_dim} numbers, the batch has {found}; check the snapshot"
            )
        return latents[..., : self.latent_dim].detach()


class HistoryReader(nn.Module):
    """All histories of a VM, side by side.

    Those with `in_query` are summed up first, asked with the fields alone; the others are asked with the fields and with
    these. The mean latent of the candidate's own past events, for one, tells the attention over the user's what to look for.
    """

    def __init__(self, inputs: Sequence[tuple[str, _Input]]) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in inputs)
        self.inputs = nn.ModuleList(part for _, part in inputs)
        self.out_dim = sum(part.out_dim for _, part in inputs)

    def encoder(self, name: str) -> HistoryEncoder:
        """Return the encoder of one history."""
        encoder: HistoryEncoder = self.inputs[self.names.index(name)].encoder  # type: ignore[assignment]  # an _Input
        return encoder

    def forward(self, fields: Tensor, batch: Batch, embeddings: EmbeddingTables) -> Tensor:
        """Return [B, out_dim].

        Args:
            fields: [B, q] all fields of the VM.
            batch: has the histories.
            embeddings: the VM's tables, in which raw events are looked up.

        Raises:
            ShapeError: the batch lacks a history that the VM reads, or what it reads of it.
        """
        found: dict[int, Tensor] = {}
        for turn in (True, False):
            query = torch.cat([fields, *found.values()], -1)
            for place, part in enumerate(self.inputs):
                if part.in_query == turn:
                    found[place] = part(query, batch, embeddings)
        parts = [found[place] for place in range(len(self.inputs))]
        return torch.cat(parts, -1) if parts else fields[:, :0]


def build_history_reader(
    config: HistoryInputs,
    embeddings: EmbeddingTables,
    query_dim: int,
    stored: StoredWidths,
) -> HistoryReader:
    """Build what reads the histories of `config`, for fields of width `query_dim`.

    Raises:
        ConfigError: a history or a width is asked for that is not there.
    """
    named: dict[str, _Input] = {}
    # those of the query first: their widths add to what the others are asked with
    for turn in (True, False):
        width = query_dim + sum(part.out_dim for part in named.values())
        for name, one in config.sorted():
            if one.in_query == turn:
                named[name] = _build_input(name, one, embeddings, width, stored)
    return HistoryReader(sorted(named.items()))


def _build_input(
    name: str,
    config: LatentHistoryConfig | RawHistoryConfig,
    embeddings: EmbeddingTables,
    query_dim: int,
    stored: StoredWidths,
) -> _Input:
    if isinstance(config, RawHistoryConfig):
        fields = config.fields or [n for n in stored.item_fields if n in embeddings.names]
        events = RawEvents(embeddings, stored.item_fields, fields, config.event_dim)
        return _Input(config, events, 0, query_dim)
    wanted, width = config.latent_dim, stored.latent_dim
    if width is None:
        raise ConfigError(
            f"history {name!r} needs the width of the stored latents; train the VM on a joined set"
        )
    if wanted is not None and wanted > width:
        raise ConfigError(
            f"history.{name}.latent_dim must be at most the stored {width}, found {wanted}; lower it"
        )
    return _Input(config, None, wanted or width, query_dim)


def newest_events(history: History, max_len: int | None) -> History:
    """Return the history cut to its newest `max_len` events; None keeps all."""
    length = history.mask.shape[1]
    if max_len is None or length <= max_len:
        return history
    skipped = (history.mask.sum(1) - max_len).clamp_min(0)
    place = torch.arange(max_len, device=skipped.device) + skipped[:, None]

    def cut(values: Tensor) -> Tensor:
        index = place if values.dim() == 2 else place[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)

    names = ("mask", "age_s", "latents", "item_ids", "label", "event_type")
    parts: Mapping[str, Tensor | None] = {name: getattr(history, name) for name in names}
    return replace(history, **{n: cut(v) for n, v in parts.items() if v is not None})
