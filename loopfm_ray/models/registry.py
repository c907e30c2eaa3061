"""The tables of models: config kind -> builder. A new model is a file, a line here, a test row and a YAML."""

from collections.abc import Callable, Mapping
from typing import Any

from loopfm_ray.models.bottleneck import build_bottleneck
from loopfm_ray.models.foundation import build_fm
from loopfm_ray.models.histories import build_encoder
from loopfm_ray.models.vertical import build_vm

__all__ = ["BOTTLENECKS", "ENCODERS", "FMS", "VMS"]

# Any: each builder takes the config of its own kind, which the kind has already chosen.
Builder = Callable[..., Any]

FMS: Mapping[str, Builder] = {"fm": build_fm}
"""`(config, schema, item_fields) -> FoundationModel`"""

VMS: Mapping[str, Builder] = {"vm": build_vm}
"""`(config, schema, item_fields, latent_dim) -> VerticalModel`"""

BOTTLENECKS: Mapping[str, Builder] = {"matryoshka": build_bottleneck}
"""`(config, in_dim) -> Bottleneck`"""

ENCODERS: Mapping[str, Builder] = {
    "attention": build_encoder,
    "mean": build_encoder,
    "sum": build_encoder,
}
"""`(config, query_dim, value_dim) -> HistoryEncoder`"""
