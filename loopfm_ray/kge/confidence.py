"""How far earlier knowledge is to be trusted: a weight in [0, 1] for each question and each of its candidates.

A question's candidates here are those that the earlier self scored best, and its true answers among them. The semantic module is
a small network that reads only what does not depend on the scale of scores, so it goes with any backbone; it learns, beside the
model, to tell true answers from the others by what the earlier self said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.config import Config

__all__ = [
    "AnyConfidenceConfig",
    "ConfidenceConfig",
    "NoConfidenceConfig",
    "RuleConfig",
    "SemanticConfig",
    "SemanticModule",
    "Views",
    "standardized",
]

_SMALLEST = 1e-6
"""Standard deviations below it count as it: scores of a new model are nearly equal."""


class NoConfidenceConfig(Config):
    """All knowledge counts alike."""

    kind: Literal["none"] = "none"


class RuleConfig(Config):
    """A question counts as much as the earlier self knew its answer."""

    kind: Literal["probability", "rank"] = "probability"
    """`probability`: softmax of its scores at the true answer; `rank`: 1 / rank of the true answer."""


class SemanticConfig(Config):
    """A learned gate."""

    kind: Literal["semantic"] = "semantic"
    hidden: PositiveInt = 16
    """Width of its one hidden layer."""
    lr: PositiveFloat = 0.01
    """Learning rate of its Adam."""
    doubt: Annotated[float, Field(ge=0)] = 1.0
    """Power of the confidence; 0 lets all pass."""


AnyConfidenceConfig = NoConfidenceConfig | RuleConfig | SemanticConfig
ConfidenceConfig = Annotated[AnyConfidenceConfig, Field(discriminator="kind")]
"""The config of the confidence, told by its `kind`."""
