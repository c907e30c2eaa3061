"""DIN: an MLP with data-adaptive activations over fields and what the candidate wakes up in the history."""

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.dnn import DnnTower
from loopfm_ray.models.layers import Mlp
from loopfm_ray.models.vertical import BaseVmConfig, DeepHead, VerticalModel, assemble_vm

__all__ = ["DinConfig", "build_din"]


class DinConfig(BaseVmConfig):
    """DIN's MLP; its attention is the history encoder `din`, which `configs/vm/din.yaml` sets beside it."""

    kind: Literal["din"] = "din"
    hidden: tuple[PositiveInt, ...] = (200, 80)
    """Widths of the MLP."""
    activation: Literal["dice", "prelu"] = "dice"
    """`dice` follows mean and variance of the batch; `prelu` does not."""


def build_din(
    config: DinConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build a DIN; arguments and errors as in `assemble_vm`.

    Source: DIN, arXiv 1706.06978, figure 2 (right) and section 5.2. Left out: mini-batch aware regularisation.
    """
    return assemble_vm(
        config,
        schema,
        item_fields,
        latent_dim,
        lambda widths: DnnTower(
            DeepHead(
                Mlp(widths.flat_dim, config.hidden, config.dropout, config.activation),
                widths.num_tasks,
            )
        ),
    )
