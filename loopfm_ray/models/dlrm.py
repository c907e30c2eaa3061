"""DLRM: a bottom MLP for the numbers, dot products of all pairs of fields, a top MLP."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import (
    BaseVmConfig,
    DeepHead,
    TowerOutput,
    VerticalModel,
    VmInputs,
    VmWidths,
    assemble_vm,
)

__all__ = ["DlrmConfig", "DlrmTower", "build_dlrm"]


class DlrmConfig(BaseVmConfig):
    """Dot products of the embeddings, the histories and the mapped numbers, and an MLP on top."""

    kind: Literal["dlrm"] = "dlrm"
    bottom: tuple[PositiveInt, ...] = (32,)
    """Hidden widths of the MLP over the numbers, whose output is `embed_dim` wide."""
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the top MLP."""
    history_fields: PositiveInt = 4
    """Fields that the histories become; one of width `embed_dim` is narrow for a whole history."""


class DlrmTower(nn.Module):
    """`top([z; <e_i, e_j> for i < j])` with z the bottom MLP of the numbers, and z and the histories among the e.

    The top MLP also reads z itself, as published; without numbers, it reads the dot products alone.

    Source: DLRM, arXiv 1906.00091, section 2.2 and figure 1.
    """

    def __init__(self, widths: VmWidths, config: DlrmConfig) -> None:
        super().__init__()
        dim, num_numeric = widths.embed_dim, widths.num_numeric
        self.bottom = (
            Mlp(num_numeric, (*config.bottom, dim), config.dropout) if num_numeric else None
        )
        self.history = (
            nn.Linear(widths.history_dim, config.history_fields * dim)
            if widths.history_dim
            else None
        )
        num = len(widths.field_names) + (num_numeric > 0)
        num += config.history_fields if widths.history_dim else 0
        if num < 2 and self.bottom is None:
            raise ConfigError(
                f"dlrm needs two fields to multiply, or numbers, found {widths.field_names}; give the VM more fields"
            )
        pairs = torch.triu_indices(num, num, offset=1)
        self.register_buffer("pairs", pairs[0] * num + pairs[1], persistent=False)
        in_dim = len(self.pairs) + (dim if self.bottom is not None else 0)
        self.head = DeepHead(Mlp(in_dim, config.hidden, config.dropout), widths.num_tasks)
        self.layer_dims = self.head.layer_dims

    pairs: Tensor

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        fields, parts = [inputs.embedded], []
        if self.bottom is not None:
            parts.append(self.bottom(inputs.numeric))
            fields.append(parts[0][:, None])
        if self.history is not None:
            dim = inputs.embedded.shape[-1]
            fields.append(self.history(inputs.history).unflatten(1, (-1, dim)))
        table = torch.cat(fields, 1)
        dots = torch.bmm(table, table.transpose(1, 2)).flatten(1)
        parts.append(dots.index_select(1, self.pairs))
        out: TowerOutput = self.head(torch.cat(parts, -1))
        return out


def build_dlrm(
    config: DlrmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a DLRM; arguments and errors as in `assemble_vm`, and two fields at least."""
    return assemble_vm(
        config, schema, item_fields, latent_dim, lambda widths: DlrmTower(widths, config)
    )
