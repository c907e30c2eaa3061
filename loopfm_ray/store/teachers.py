"""Whose predictions a version holds: the FM snapshots that scored its rows, each from a moment on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import StoreError

__all__ = ["Teacher", "teacher_number", "teachers_of"]


@dataclass(frozen=True)
class Teacher:
    """A snapshot that scored rows.

    Attributes:
        snapshot_id: its name.
        trained_until_ts: the last moment that it may have seen.
        from_ts: the first moment whose rows it scored, later than the last one that it has seen.
    """

    snapshot_id: str
    trained_until_ts: int
    from_ts: int


def teachers_of(meta: Mapping[str, Any]) -> tuple[Teacher, ...]:  # Any: JSON, checked here
    """Return the teachers of a latents or joined version from the meta of its manifest, in the order of their times.

    Raises:
        StoreError: they are not told, or one has seen what it scored.
    """
    alone = {
        "snapshot_id": meta.get("snapshot_id"),
        "trained_until_ts": meta.get("trained_until_ts", 0),
        "from_ts": meta.get("trained_until_ts", 0) + 1,
    }
    try:
        found = tuple(Teacher(**tree) for tree in meta.get("teachers", [alone]))
        moments = [one.from_ts for one in found]
        is_right = moments == sorted(set(moments)) and all(
            one.trained_until_ts < one.from_ts for one in found
        )
    except TypeError as error:
        raise StoreError(
            f"the version does not tell who scored its rows: {error}; materialize it again"
        ) from error
    if not found or not is_right:
        raise StoreError(
            f"the version names snapshots that scored what they had seen, or in no order: {found}; materialize it again"
        )
    return found


def teacher_number(teachers: Sequence[Teacher], event_ts: NDArray[np.integer]) -> NDArray[np.int16]:
    """Return [n] which of `teachers` scored the row of each moment; rows before all of them are the first one's."""
    moments = np.asarray([one.from_ts for one in teachers[1:]], dtype=np.int64)
    return np.searchsorted(moments, event_ts, side="right").astype(np.int16)
