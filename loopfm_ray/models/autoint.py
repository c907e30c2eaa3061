"""AutoInt+: self-attention among the fields, beside an MLP."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import (
    BaseVmConfig,
    DeepHead,
    FieldTokens,
    TowerOutput,
    VerticalModel,
    VmInputs,
    VmWidths,
    assemble_vm,
)

__all__ = ["AutoIntConfig", "AutoIntTower", "FieldAttention", "build_autoint"]


class AutoIntConfig(BaseVmConfig):
    """Layers of self-attention among the fields, the histories among them, and an MLP beside them."""

    kind: Literal["autoint"] = "autoint"
    attention_layers: PositiveInt = 2
    """Attention layers; k layers give interactions of up to k + 1 fields."""
    num_heads: PositiveInt = 2
    """Heads of each."""
    head_dim: PositiveInt = 8
    """Width of each head."""
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the MLP, the plus in AutoInt+; empty leaves a linear map of the fields."""
    history_fields: PositiveInt = 1
    """Fields that the histories become."""


class FieldAttention(nn.Module):
    """One interacting layer: `relu(concat_h(softmax(Q_h K_h') V_h) + W x)`, scores not scaled.

    Source: AutoInt, arXiv 1810.11921, equations 5 to 8.
    """

    def __init__(self, in_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.out_dim = num_heads * head_dim
        self.mix = nn.Linear(in_dim, 4 * self.out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, M, out_dim] from x [B, M, in_dim]."""
        num, fields, _ = x.shape
        query, key, value, residual = self.mix(x).chunk(4, -1)

        def heads(part: Tensor) -> Tensor:
            return part.view(num, fields, self.num_heads, -1).transpose(1, 2)

        weight = torch.softmax(heads(query) @ heads(key).transpose(2, 3), -1)
        found = (weight @ heads(value)).transpose(1, 2).reshape(num, fields, self.out_dim)
        return torch.relu(found + residual)


class AutoIntTower(nn.Module):
    """Interacting layers and a linear output, plus an MLP of the same fields.

    Source: AutoInt, arXiv 1810.11921, equation 9 and section 5.3 (AutoInt+: joint training with a feed-forward network).
    """

    def __init__(self, widths: VmWidths, config: AutoIntConfig) -> None:
        super().__init__()
        self.tokens = FieldTokens(widths, config.history_fields)
        wide = config.num_heads * config.head_dim
        dims = [widths.embed_dim, *[wide] * config.attention_layers]
        self.layers = nn.ModuleList(
            FieldAttention(dim, config.num_heads, config.head_dim) for dim, _ in pairwise(dims)
        )
        self.of_attention = nn.Linear(self.tokens.num_fields * wide, widths.num_tasks, bias=False)
        mlp = Mlp(self.tokens.out_dim, config.hidden, config.dropout)
        self.head = DeepHead(mlp, widths.num_tasks)
        self.layer_dims = self.head.layer_dims

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        tokens = self.tokens(inputs)
        deep: TowerOutput = self.head(tokens.flatten(1))
        x = tokens
        for layer in self.layers:
            x = layer(x)
        return TowerOutput(deep.logit + self.of_attention(x.flatten(1)), deep.layers)


def build_autoint(
    config: AutoIntConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build an AutoInt+; arguments and errors as in `assemble_vm`."""
    return assemble_vm(
        config, schema, item_fields, latent_dim, lambda widths: AutoIntTower(widths, config)
    )
