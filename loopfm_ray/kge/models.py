"""The table of backbones: config kind -> builder. A new one is a function, a line here, and a twin in the tests."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import GraphSize, KgeModel
from loopfm_ray.kge.bilinear import (
    ComplexConfig,
    DistMultConfig,
    SimpleConfig,
    TuckerConfig,
    build_complex,
    build_distmult,
    build_simple,
    build_tucker,
)
from loopfm_ray.kge.conve import ConveConfig, build_conve
from loopfm_ray.kge.translations import (
    RotateConfig,
    RoteConfig,
    TranseConfig,
    build_rotate,
    build_rote,
    build_transe,
)

__all__ = ["BACKBONES", "AnyKgeConfig", "KgeConfig", "build_kge", "read_kge_config"]

BACKBONES: Mapping[str, Callable[..., KgeModel]] = {
    "complex": build_complex,
    "conve": build_conve,
    "distmult": build_distmult,
    "rotate": build_rotate,
    "rote": build_rote,
    "simple": build_simple,
    "transe": build_transe,
    "tucker": build_tucker,
}
"""`(config, size) -> KgeModel`"""

AnyKgeConfig = (
    ComplexConfig
    | ConveConfig
    | DistMultConfig
    | RotateConfig
    | RoteConfig
    | SimpleConfig
    | TranseConfig
    | TuckerConfig
)

KgeConfig = Annotated[AnyKgeConfig, Field(discriminator="kind")]
"""The config of a backbone, told by its `kind`."""


def read_kge_config(tree: Mapping[str, Any]) -> AnyKgeConfig:  # Any: what the user wrote
    """Build the config of a backbone from a mapping with its `kind`.

    Raises:
        ConfigError: the kind is unknown, or a key or value is not accepted.
    """
    adapter: TypeAdapter[AnyKgeConfig] = TypeAdapter(KgeConfig)
    try:
        return adapter.validate_python(dict(tree))
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(
            f"backbone {dict(tree)} is not valid: {'; '.join(lines)}; kinds are {', '.join(BACKBONES)}"
        ) from error


def build_kge(config: AnyKgeConfig, num_entities: int, num_relations: int) -> KgeModel:
    """Build the backbone of a config for a graph of E entities and R relations, reciprocal ones not counted.

    The first values are drawn from torch's random state.
    """
    size = GraphSize(num_entities, num_relations, config.is_reciprocal)
    return BACKBONES[config.kind](config, size)
