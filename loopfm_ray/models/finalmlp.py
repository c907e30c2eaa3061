"""FinalMLP: two MLPs over differently gated inputs, fused by a bilinear form."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import (
    BaseVmConfig,
    TowerOutput,
    VerticalModel,
    VmInputs,
    VmWidths,
    assemble_vm,
)

__all__ = ["BilinearFusion", "FinalMlpConfig", "FinalMlpTower", "StreamGate", "build_finalmlp"]


class FinalMlpConfig(BaseVmConfig):
    """Two streams that see the inputs through gates of their own, and their bilinear fusion."""

    kind: Literal["finalmlp"] = "finalmlp"
    hidden: tuple[PositiveInt, ...] = Field(default=(128, 64), min_length=1)
    """Widths of the first stream's MLP."""
    hidden_2: tuple[PositiveInt, ...] = Field(default=(64, 64), min_length=1)
    """Widths of the second stream's MLP."""
    gate_hidden: PositiveInt = 64
    """Hidden width of the gates."""
    gate_fields: tuple[str, ...] = ()
    """Embedded fields from which the first gate is computed; empty learns one gate for all rows."""
    gate_fields_2: tuple[str, ...] = ()
    """The same for the second gate."""
    num_heads: PositiveInt = 1
    """Parts into which the streams' outputs are cut for the bilinear form; divides the last widths of both."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        for width in (self.hidden[-1], self.hidden_2[-1]):
            if width % self.num_heads:
                raise ConfigError(
                    f"the last widths of hidden and hidden_2 must be multiples of num_heads {self.num_heads}, found"
                    f" {width}; change one of them"
                )
        return self


class StreamGate(nn.Module):
    """Feature gating of one stream: `2 sigmoid(MLP(context)) * x`.

    The context is the embeddings of some fields, or a learnt vector where none are named.

    Source: FinalMLP, arXiv 2304.00902, equations 5 to 7.
    """

    def __init__(self, widths: VmWidths, fields: Sequence[str], hidden: int) -> None:
        super().__init__()
        unknown = sorted(set(fields).difference(widths.field_names))
        if unknown:
            raise ConfigError(
                f"gate fields {unknown} are no embedded fields of the VM, which has {widths.field_names}"
            )
        columns = [widths.field_names.index(name) for name in fields]
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        in_dim = len(columns) * widths.embed_dim
        self.context = None if columns else nn.Parameter(torch.randn(1, widths.embed_dim) * 0.05)
        self.mlp = Mlp(in_dim or widths.embed_dim, (hidden,))
        self.out = nn.Linear(hidden, widths.flat_dim)

    columns: Tensor

    def forward(self, inputs: VmInputs, flat: Tensor) -> Tensor:
        """Return [B, flat_dim]: flat [B, flat_dim], gated."""
        context: Tensor | None = self.context
        if context is None:
            context = inputs.embedded.index_select(1, self.columns).flatten(1)
        return 2 * torch.sigmoid(self.out(self.mlp(context))) * flat


class BilinearFusion(nn.Module):
    """`b + w1 x + w2 y + sum_j x_j W_j y_j`, x and y cut into `num_heads` parts.

    Source: FinalMLP, arXiv 2304.00902, equations 8 and 9.
    """

    def __init__(self, dim_1: int, dim_2: int, num_tasks: int, num_heads: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim_1, num_tasks)
        self.second = nn.Linear(dim_2, num_tasks, bias=False)
        weight = torch.empty(num_tasks, num_heads, dim_1 // num_heads, dim_2 // num_heads)
        self.weight = nn.Parameter(nn.init.xavier_normal_(weight))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return [B, T] from x [B, dim_1] and y [B, dim_2]."""
        num_heads = self.weight.shape[1]
        parts = x.view(x.shape[0], num_heads, -1), y.view(y.shape[0], num_heads, -1)
        crossed = torch.einsum("bhi,thij,bhj->bt", parts[0], self.weight, parts[1])
        out: Tensor = self.first(x) + self.second(y) + crossed
        return out


class FinalMlpTower(nn.Module):
    """Two gated streams and their fusion.

    Source: FinalMLP, arXiv 2304.00902, section 3. The histories are gated like every other input.
    """

    def __init__(self, widths: VmWidths, config: FinalMlpConfig) -> None:
        super().__init__()
        self.gate_1 = StreamGate(widths, config.gate_fields, config.gate_hidden)
        self.gate_2 = StreamGate(widths, config.gate_fields_2, config.gate_hidden)
        self.stream_1 = Mlp(widths.flat_dim, config.hidden, config.dropout)
        self.stream_2 = Mlp(widths.flat_dim, config.hidden_2, config.dropout)
        self.fusion = BilinearFusion(
            self.stream_1.out_dim, self.stream_2.out_dim, widths.num_tasks, config.num_heads
        )
        self.layer_dims = {f"hidden_{index}": width for index, width in enumerate(config.hidden)}

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        flat = inputs.flat()
        hidden = self.stream_1.forward_all(self.gate_1(inputs, flat))
        other = self.stream_2(self.gate_2(inputs, flat))
        return TowerOutput(
            self.fusion(hidden[-1], other), dict(zip(self.layer_dims, hidden, strict=True))
        )


def build_finalmlp(
    config: FinalMlpConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a FinalMLP; arguments and errors as in `assemble_vm`, and gate fields have to be embedded fields."""
    return assemble_vm(
        config, schema, item_fields, latent_dim, lambda widths: FinalMlpTower(widths, config)
    )
