"""The part that all models share: a batch's categorical, sequence and numeric fields as one vector per row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopfm_ray.data.collate import Batch
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.embeddings import EmbeddingTables, FieldEmbeddings, TableFactory
from loopfm_ray.models.layers import masked_mean

__all__ = ["FeatureInput", "FieldParts"]

_MAX_NUMERIC = 10.0
"""Standardised numbers are cut here: no outlier may blow up the products of the cross layers."""


@dataclass(frozen=True)
class FieldParts:
    """The fields of a batch, not yet side by side."""

    embedded: Tensor
    """[B, F, D] embedded ids, then the mean embedding of each sequence."""
    numeric: Tensor
    """[B, F_num] standardised numbers, outliers cut."""

    def flat(self) -> Tensor:
        """Return [B, F * D + F_num]."""
        return torch.cat([self.embedded.flatten(1), self.numeric], -1)


class FeatureInput(nn.Module):
    """Embeds the fields of a schema.

    Embedded ids first, then the mean embedding of each sequence, then the numbers. A schema may lack any of these.
    """

    def __init__(
        self, schema: FeatureSchema, embed_dim: int, tables_of: TableFactory = FieldEmbeddings
    ) -> None:
        super().__init__()
        tables = (*schema.categorical, *schema.sequences)
        if not tables and not schema.numeric:
            raise ConfigError("a model needs at least one field, found none; check its fields")
        self.embeddings: EmbeddingTables = tables_of(
            {field.name: field.cardinality for field in tables}, embed_dim
        )
        self.sequence_names = tuple(field.name for field in schema.sequences)
        self.names = tuple(field.name for field in tables)
        """The embedded fields in the order of `FieldParts.embedded`."""
        self.num_numeric = len(schema.numeric)
        self.out_dim = len(tables) * embed_dim + len(schema.numeric)
        self.numeric_columns = slice(len(tables) * embed_dim, self.out_dim)
        names = [field.name for field in schema.categorical]
        self.register_buffer("offsets", self.embeddings.offsets(names), persistent=False)
        self.register_buffer(
            "sequence_offsets", self.embeddings.offsets(self.sequence_names), persistent=False
        )

    offsets: Tensor
    sequence_offsets: Tensor

    def split(self, batch: Batch) -> FieldParts:
        """Return the embedded fields and the numbers."""
        parts = [self.embeddings(batch.ids, self.offsets)] if len(self.offsets) else []
        for index, name in enumerate(self.sequence_names):
            ids = batch.sequences[name]
            events = self.embeddings(ids[..., None], self.sequence_offsets[index : index + 1])
            parts.append(masked_mean(events, ids > 0))
        numeric = batch.numeric.clamp(-_MAX_NUMERIC, _MAX_NUMERIC)
        flat = torch.cat(parts, -1) if parts else numeric[:, :0]
        embedded = flat.view(flat.shape[0], len(self.names), self.embeddings.dim)
        return FieldParts(embedded, numeric)

    def forward(self, batch: Batch) -> Tensor:
        """Return [B, out_dim]."""
        return self.split(batch).flat()
