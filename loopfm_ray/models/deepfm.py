"""DeepFM: a factorization machine and an MLP over the same embeddings."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.features import FeatureInput
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

__all__ = ["DeepFmConfig", "DeepFmTower", "build_deepfm", "pairwise_products"]


class DeepFmConfig(BaseVmConfig):
    """First-order weights, products of all pairs of fields, and an MLP."""

    kind: Literal["deepfm"] = "deepfm"
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the MLP."""
    history_fields: PositiveInt = 1
    """Fields that the histories become."""


class DeepFmTower(nn.Module):
    """`<w, x> + sum_{i<j} <v_i, v_j> x_i x_j + MLP(v x)`; the histories are fields like the others.

    With several tasks each has first-order weights and an output of the MLP of its own; the pairs are shared.

    Source: DeepFM, arXiv 1703.04247, equations 1 to 4.
    """

    def __init__(
        self, widths: VmWidths, hidden: Sequence[int], dropout: float, history_fields: int
    ) -> None:
        super().__init__()
        self.tokens = FieldTokens(widths, history_fields)
        self.linear = FeatureInput(widths.schema, widths.num_tasks)
        self.numbers = nn.Parameter(torch.zeros(widths.num_numeric, widths.num_tasks))
        self.head = DeepHead(Mlp(self.tokens.out_dim, hidden, dropout), widths.num_tasks)
        self.layer_dims = self.head.layer_dims

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        tokens = self.tokens(inputs)
        parts = self.linear.split(inputs.batch)
        first_order = parts.embedded.sum(1) + parts.numeric @ self.numbers
        deep: TowerOutput = self.head(tokens.flatten(1))
        logit = deep.logit + first_order + pairwise_products(tokens)
        return TowerOutput(logit, deep.layers)


def pairwise_products(tokens: Tensor) -> Tensor:
    """Return [B, 1]: the sum over all pairs of fields of tokens [B, M, D] of their inner products, in O(M D)."""
    return 0.5 * (tokens.sum(1).square() - tokens.square().sum(1)).sum(-1, keepdim=True)


def build_deepfm(
    config: DeepFmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a DeepFM; arguments and errors as in `assemble_vm`."""
    return assemble_vm(
        config,
        schema,
        item_fields,
        latent_dim,
        lambda widths: DeepFmTower(widths, config.hidden, config.dropout, config.history_fields),
    )
