"""Context fields computed from the time of a row, the same in training and serving."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S

__all__ = ["DERIVED", "derive_columns", "derive_context"]

_HOUR_US = 3_600 * MICROS_PER_S

DERIVED = ("hour", "weekday")
"""What can be derived: the hour of the day 0 to 23 and the day of the week, Monday 0, both in UTC."""


def derive_columns(
    event_ts: NDArray[np.int64], names: Sequence[str] = DERIVED
) -> dict[str, NDArray[np.int64]]:
    """Return [n] integers for each of `names`; their decimal text is the key in the vocabulary.

    Raises:
        ConfigError: a name is not one of `DERIVED`.
    """
    out: dict[str, NDArray[np.int64]] = {}
    for name in names:
        if name == "hour":
            out[name] = event_ts // _HOUR_US % 24
        elif name == "weekday":
            out[name] = (event_ts // MICROS_PER_DAY + 3) % 7  # 1970-01-01 was a Thursday
        else:
            raise ConfigError(
                f"data.derive: {name!r} can not be derived, expected some of {DERIVED}"
            )
    return out


def derive_context(event_ts: int, names: Sequence[str] = DERIVED) -> dict[str, str]:
    """Return the context keys of one request at `event_ts`, as the vocabularies hold them."""
    columns = derive_columns(np.asarray([event_ts], dtype=np.int64), names)
    return {name: str(int(values[0])) for name, values in columns.items()}
