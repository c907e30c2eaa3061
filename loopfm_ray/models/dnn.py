"""DNN: an MLP over everything side by side; the plainest VM and the default."""

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import (
    BaseVmConfig,
    DeepHead,
    TowerOutput,
    VerticalModel,
    VmInputs,
    assemble_vm,
)

__all__ = ["DnnConfig", "DnnTower", "build_dnn"]


class DnnConfig(BaseVmConfig):
    """An MLP over embedded fields, numbers and the summed-up histories."""

    kind: Literal["dnn"] = "dnn"
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the MLP."""


class DnnTower(nn.Module):
    """An MLP with a linear output.

    Source: Covington et al., Deep neural networks for YouTube recommendations, RecSys 2016, ranking network.
    """

    def __init__(self, head: DeepHead) -> None:
        super().__init__()
        self.head = head
        self.layer_dims = head.layer_dims

    def forward(self, inputs: VmInputs) -> TowerOutput:
        """See `Tower`."""
        out: TowerOutput = self.head(inputs.flat())
        return out


def build_dnn(
    config: DnnConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a DNN; arguments and errors as in `assemble_vm`."""
    return assemble_vm(
        config,
        schema,
        item_fields,
        latent_dim,
        lambda widths: DnnTower(
            DeepHead(Mlp(widths.flat_dim, config.hidden, config.dropout), widths.num_tasks)
        ),
    )
