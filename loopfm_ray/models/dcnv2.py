"""DCN V2: cross layers, full, of low rank or with low-rank experts, under or beside an MLP."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.layers import CrossNet, Mlp
from loopfm_ray.models.vertical import (
    BaseVmConfig,
    DeepHead,
    TowerOutput,
    VerticalModel,
    VmInputs,
    VmWidths,
    assemble_vm,
)

__all__ = ["CrossExperts", "DcnV2Config", "DcnV2Tower", "FullCrossNet", "build_dcnv2"]


class DcnV2Config(BaseVmConfig):
    """Cross layers over everything side by side, and an MLP."""

    kind: Literal["dcnv2"] = "dcnv2"
    structure: Literal["stacked", "parallel"] = "stacked"
    """`stacked`: the MLP reads what the cross layers give; `parallel`: both read the input."""
    cross_layers: PositiveInt = 2
    """Cross layers; k layers give products of up to k + 1 inputs."""
    cross_rank: PositiveInt | None = None
    """Rank of each cross matrix; null takes full matrices."""
    num_experts: PositiveInt = 1
    """Low-rank experts of each cross layer, mixed by a gate; more than 1 needs `cross_rank`."""
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the MLP."""

    @model_validator(mode="after")
    def _experts_have_a_rank(self) -> Self:
        if self.num_experts > 1 and self.cross_rank is None:
            raise ConfigError(
                f"num_experts {self.num_experts} needs a cross_rank, found null; set one, such as 16"
            )
        return self


class FullCrossNet(nn.Module):
    """Cross layers `x <- x0 * (W x + b) + x` with full matrices.

    Source: DCN V2, arXiv 2008.13535, equation 1.
    """

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, dim] from x [B, dim]."""
        crossed = x
        for layer in self.layers:
            crossed = torch.addcmul(crossed, x, layer(crossed))
        return crossed


class CrossExperts(nn.Module):
    """Cross layers of several low-rank experts, `x <- sum_i G_i(x) x0 * (U_i g(C_i g(V_i x)) + b) + x`.

    g is tanh, and the gate G a softmax over the experts.

    Source: DCN V2, arXiv 2008.13535, equations 3 and 4 (section 3.3).
    """

    def __init__(self, dim: int, num_layers: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.rank, self.num_experts = rank, num_experts
        self.down = nn.ModuleList(
            nn.Linear(dim, num_experts * rank, bias=False) for _ in range(num_layers)
        )
        self.mix = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(num_experts, rank, rank)) for _ in range(num_layers)
        )
        self.up = nn.ModuleList(
            nn.Linear(num_experts * rank, dim, bias=False) for _ in range(num_layers)
        )
        self.bias = nn.ParameterList(torch.zeros(dim) for _ in range(num_layers))
        self.gate = nn.ModuleList(
            nn.Linear(dim, num_experts, bias=False) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, dim] from x [B, dim]."""
        crossed = x
        layers = zip(self.down, self.mix, self.up, self.bias, self.gate, strict=True)
        for down, mix, up, bias, gate in layers:
            inner = torch.tanh(down(crossed)).view(x.shape[0], self.num_experts, self.rank)
            inner = torch.tanh(torch.einsum("bkr,krs->bks", inner, mix))
            # the gate scales each expert's inner vector: its map back is linear, and gates sum to 1
            inner = inner * torch.softmax(gate(crossed), -1)[..., None]
            crossed = torch.addcmul(crossed, x, up(inner.flatten(1)) + bias)
        return crossed


class DcnV2Tower(nn.Module):
    """Cross layers under or beside an MLP.

    Source: DCN V2, arXiv 2008.13535, figure 1.
    """

    def __init__(self, widths: VmWidths, config: DcnV2Config) -> None:
        super().__init__()
        dim = widths.flat_dim
        self.cross = _build_cross(config, dim)
        self.is_stacked = config.structure == "stacked"
        self.head = DeepHead(Mlp(dim, config.hidden, config.dropout), widths.num_tasks)
        self.of_cross = None if self.is_stacked else nn.Linear(dim, widths.num_tasks, bias=False)
        self.layer_dims = self.head.layer_dims

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        x = inputs.flat()
        crossed = self.cross(x)
        deep: TowerOutput = self.head(crossed if self.is_stacked else x)
        if self.of_cross is None:
            return deep
        return TowerOutput(deep.logit + self.of_cross(crossed), deep.layers)


def _build_cross(config: DcnV2Config, dim: int) -> nn.Module:
    if config.cross_rank is None:
        return FullCrossNet(dim, config.cross_layers)
    if config.num_experts == 1:
        return CrossNet(dim, config.cross_layers, config.cross_rank)
    return CrossExperts(dim, config.cross_layers, config.cross_rank, config.num_experts)


def build_dcnv2(
    config: DcnV2Config,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a DCN V2; arguments and errors as in `assemble_vm`."""
    return assemble_vm(
        config, schema, item_fields, latent_dim, lambda widths: DcnV2Tower(widths, config)
    )
