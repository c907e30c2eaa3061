"""The part that all models share: a batch's categorical, sequence and numeric fields as one vector per row."""

import torch
from torch import Tensor, nn

from loopfm_ray.data.collate import Batch
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.layers import masked_mean

__all__ = ["FeatureInput"]

_MAX_NUMERIC = 10.0
"""Standardised numbers are cut here: no outlier may blow up the products of the cross layers."""


class FeatureInput(nn.Module):
    """Embeds the fields of a schema.

    Embedded ids first, then the mean embedding of each sequence, then the numbers. A schema may lack any of these.
    """

    def __init__(self, schema: FeatureSchema, embed_dim: int) -> None:
        super().__init__()
        tables = (*schema.categorical, *schema.sequences)
        if not tables and not schema.numeric:
            raise ConfigError("a model needs at least one field, found none; check its fields")
        self.embeddings = FieldEmbeddings(
            {field.name: field.cardinality for field in tables}, embed_dim
        )
        self.sequence_names = tuple(field.name for field in schema.sequences)
        self.out_dim = len(tables) * embed_dim + len(schema.numeric)
        self.numeric_columns = slice(len(tables) * embed_dim, self.out_dim)
        names = [field.name for field in schema.categorical]
        self.register_buffer("offsets", self.embeddings.offsets(names), persistent=False)
        self.register_buffer(
            "sequence_offsets", self.embeddings.offsets(self.sequence_names), persistent=False
        )

    offsets: Tensor
    sequence_offsets: Tensor

    def forward(self, batch: Batch) -> Tensor:
        """Return [B, out_dim]."""
        parts = [self.embeddings(batch.ids, self.offsets)] if len(self.offsets) else []
        for index, name in enumerate(self.sequence_names):
            ids = batch.sequences[name]
            events = self.embeddings(ids[..., None], self.sequence_offsets[index : index + 1])
            parts.append(masked_mean(events, ids > 0))
        parts.append(batch.numeric.clamp(-_MAX_NUMERIC, _MAX_NUMERIC))
        return torch.cat(parts, -1)
