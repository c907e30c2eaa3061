"""History encoders: from a user's past events, and the candidate, to one vector per row."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch, History
from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.ages import NUM_AGE_FEATURES, age_features
from loopfm_ray.models.embeddings import EmbeddingTables
from loopfm_ray.models.hstu import HstuBody
from loopfm_ray.models.layers import TargetAttention, masked_mean, masked_sum
from loopfm_ray.models.sequences import AugruBody, DinBody, GruBody, TransformerBody

__all__ = [
    "AnyEncoderConfig",
    "AttentionBody",
    "AttentionConfig",
    "DinUnitConfig",
    "EncoderConfig",
    "GruConfig",
    "HistoryBody",
    "HistoryEncoder",
    "HstuConfig",
    "PoolBody",
    "PoolConfig",
    "RawEvents",
    "TransformerConfig",
    "build_encoder",
    "need_history",
]


class AttentionConfig(Config):
    """Target attention over the history, with intensities; the best and the default."""

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt = 4
    """Attention heads, each with its own query."""
    query_hidden: PositiveInt = 64
    """Hidden width of the map from the candidate to the queries."""
    has_mean: bool = True
    """Whether the plain mean of the history is added."""


class PoolConfig(Config):
    """Mean or sum over the history, blind to the candidate."""

    kind: Literal["mean", "sum"] = "mean"
    hidden: NonNegativeInt = 0
    """Width of a layer applied to each event before pooling; 0 pools the events as they are."""


class DinUnitConfig(Config):
    """DIN's activation unit: each event weighted by an MLP of candidate and event. arXiv 1706.06978."""

    kind: Literal["din"] = "din"
    hidden: tuple[PositiveInt, ...] = Field(default=(36,), min_length=1)
    """Widths of the unit's MLP."""
    activation: Literal["prelu", "dice"] = "prelu"
    """`dice` follows the batch while training, so that a row's score then depends on its neighbours."""
    has_softmax: bool = False
    """Whether the weights of a history sum to 1; the paper leaves them as they are, so that they tell strength."""


class GruConfig(Config):
    """A GRU over the events, blind to the candidate; `augru` follows the candidate's interest. arXiv 1809.03672."""

    kind: Literal["gru", "augru"] = "gru"
    hidden: PositiveInt = 32
    """Width of the state."""


class _BlocksConfig(Config):
    """What encoders with self-attention have in common."""

    width: PositiveInt = 32
    """Width of an event inside; a multiple of `num_heads`."""
    num_heads: PositiveInt = 2
    """Heads of each block, and of the read-out."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the blocks."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.num_heads:
            raise ConfigError(
                f"width must be a multiple of num_heads, found {self.width} and {self.num_heads};"
                " change one of them"
            )
        return self


class TransformerConfig(_BlocksConfig):
    """Self-attention among the events, read out by the candidate. arXiv 1905.06874."""

    kind: Literal["transformer"] = "transformer"
    num_layers: PositiveInt = 1
    """Blocks; one was best in the paper."""


class HstuConfig(_BlocksConfig):
    """Self-attention without softmax, gated, placed by order and time, read out by the candidate; for long histories. arXiv 2402.17152."""

    kind: Literal["hstu"] = "hstu"
    num_layers: PositiveInt = 2
    """Layers."""


AnyEncoderConfig = (
    AttentionConfig | PoolConfig | DinUnitConfig | GruConfig | TransformerConfig | HstuConfig
)
EncoderConfig = Annotated[AnyEncoderConfig, Field(discriminator="kind")]


class HistoryBody(Protocol):
    """What sums up a history: a module with a known output width."""

    out_dim: int

    def __call__(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """Return [B, out_dim] from query [B, q], values [G, L, d] and the mask, ages and rows of `history`."""
        ...


class HistoryEncoder(nn.Module):
    """Sums up each row's history, tells its length, and gives a learnt vector where there is none."""

    def __init__(self, body: HistoryBody) -> None:
        super().__init__()
        self.body = body
        self.out_dim = body.out_dim + 1
        self.missing = nn.Parameter(torch.zeros(body.out_dim))
        """[body.out_dim] what a row without history gets."""

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """Encode each row's history.

        Args:
            query: [B, q] features of the candidate.
            values: [G, L, d] one vector per past event.
            history: mask, ages and the history of each row; its latents and ids are not read.

        Returns:
            [B, out_dim].
        """
        length = history.mask.sum(1)[history.row][:, None]
        body = torch.where(length > 0, self.body(query, values, history), self.missing)
        return torch.cat([body, torch.log1p(length.to(body.dtype)) / 5], -1)


class AttentionBody(nn.Module):
    """`TargetAttention` over events and their ages, beside the plain mean."""

    def __init__(
        self, query_dim: int, value_dim: int, num_heads: int, query_hidden: int, has_mean: bool
    ) -> None:
        super().__init__()
        self.attention = TargetAttention(
            query_dim, value_dim, NUM_AGE_FEATURES, num_heads, query_hidden
        )
        self.has_mean = has_mean
        self.out_dim = self.attention.out_dim + (value_dim if has_mean else 0)

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`."""
        side = age_features(history.age_s)
        found: Tensor = self.attention(query, values, side, history.mask, history.row)
        if not self.has_mean:
            return found
        mean = masked_mean(values, history.mask) * self.attention.gain
        return torch.cat([found, mean.index_select(0, history.row)], -1)


class PoolBody(nn.Module):
    """Mean or sum of the events, blind to the candidate."""

    def __init__(self, value_dim: int, hidden: int, is_sum: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(value_dim, hidden) if hidden else None
        self.is_sum = is_sum
        self.out_dim = hidden or value_dim

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`; `query` is not read."""
        del query
        if self.layer is not None:
            values = torch.relu(self.layer(values))
        pool = masked_sum if self.is_sum else masked_mean
        return pool(values, history.mask).index_select(0, history.row)


class RawEvents(nn.Module):
    """Past events in the model's own item-side tables, side by side or mapped to one width."""

    def __init__(
        self,
        embeddings: EmbeddingTables,
        item_fields: Sequence[str],
        fields: Sequence[str],
        out_dim: int | None,
    ) -> None:
        """Read `fields` out of `History.item_ids`, whose columns are `item_fields`; no fields stands for all, no `out_dim` for none.

        Raises:
            ConfigError: a field is not a column, or has no table.
        """
        super().__init__()
        chosen = tuple(fields) or tuple(item_fields)
        missing = sorted(set(chosen).difference(item_fields))
        if missing or not chosen:
            raise ConfigError(
                f"a raw history has the columns {tuple(item_fields)}, found {chosen} asked for; set"
                " history fields to item-side categorical fields of the schema"
            )
        columns = torch.tensor([list(item_fields).index(name) for name in chosen])
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("offsets", embeddings.offsets(chosen), persistent=False)
        in_dim = len(chosen) * embeddings.dim
        self.layer = nn.Linear(in_dim, out_dim) if out_dim is not None else None
        self.out_dim = out_dim or in_dim

    columns: Tensor
    offsets: Tensor

    def forward(self, embeddings: EmbeddingTables, item_ids: Tensor | None) -> Tensor:
        """Return [G, L, out_dim] from item_ids [G, L, F_item].

        Raises:
            ShapeError: there are none.
        """
        if item_ids is None:
            raise ShapeError("the raw history of the batch has no item ids; check its source")
        events: Tensor = embeddings(item_ids[..., self.columns], self.offsets)
        return events if self.layer is None else self.layer(events)


def need_history(batch: Batch, name: str) -> History:
    """Return the history `name` of a batch.

    Raises:
        ShapeError: the batch has none.
    """
    history = batch.histories.get(name)
    if history is None:
        raise ShapeError(
            f"the model reads the {name!r} history, the batch has {sorted(batch.histories)};"
            " give the collator a source of that name"
        )
    return history


def build_encoder(config: AnyEncoderConfig, query_dim: int, value_dim: int) -> HistoryEncoder:
    """Build the encoder of queries [B, query_dim] and events [G, L, value_dim]."""
    return HistoryEncoder(_build_body(config, query_dim, value_dim))


def _build_body(config: AnyEncoderConfig, query_dim: int, value_dim: int) -> HistoryBody:
    if isinstance(config, AttentionConfig):
        return AttentionBody(
            query_dim, value_dim, config.num_heads, config.query_hidden, config.has_mean
        )
    if isinstance(config, PoolConfig):
        return PoolBody(value_dim, config.hidden, config.kind == "sum")
    if isinstance(config, DinUnitConfig):
        return DinBody(query_dim, value_dim, config.hidden, config.activation, config.has_softmax)
    if isinstance(config, TransformerConfig | HstuConfig):
        body = TransformerBody if isinstance(config, TransformerConfig) else HstuBody
        return body(
            query_dim, value_dim, config.width, config.num_heads, config.num_layers, config.dropout
        )
    if config.kind == "augru":
        return AugruBody(query_dim, value_dim, config.hidden)
    return GruBody(value_dim, config.hidden)
