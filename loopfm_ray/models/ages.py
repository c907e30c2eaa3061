"""Ages of events as features of a model."""

import torch
from torch import Tensor

__all__ = ["NUM_AGE_FEATURES", "age_features"]

NUM_AGE_FEATURES = 5
_DAYS = (7.0, 28.0, 90.0)
_SECONDS_PER_DAY = 86_400.0


def age_features(age_s: Tensor) -> Tensor:
    """Return [G, L, 5] features of ages [G, L] in seconds: 1, a log, and decays over a week, a month, a quarter."""
    days = age_s / _SECONDS_PER_DAY
    decays = [torch.exp(days / -length) for length in _DAYS]
    return torch.stack([torch.ones_like(days), torch.log1p(days) / 3, *decays], -1)
