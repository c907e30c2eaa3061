"""Learning curves: they are kept with the checkpoints of a training and lie in the version that it ends in."""

import json
from pathlib import Path
from typing import Any

from loopfm_ray.errors import StoreError
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location

__all__ = ["load_curves", "read_curves", "write_curves"]

_CURVES = "curves.jsonl"
_KEYS = ("split", "name", "step", "value")


def write_curves(folder: Path, lines: str) -> None:
    """Write the curves of a training, one JSON object a line, into the folder of a version or a checkpoint."""
    (folder / _CURVES).write_text(lines, encoding="utf-8")


def load_curves(folder: Path) -> str:
    """Return what `write_curves` wrote into a folder."""
    return (folder / _CURVES).read_text(encoding="utf-8")


def read_curves(location: Location) -> list[dict[str, Any]]:  # Any: JSON
    """Return the points (`split`, `name`, `step`, `value`) of the model at `location`.

    Raises:
        StoreError: it was saved without curves.
    """
    version = open_version(location)
    if _CURVES not in version:
        raise StoreError(f"{location} holds no learning curves; train it again with this code")
    points = map(json.loads, load_curves(version.path(_CURVES).parent).splitlines())
    return [{key: point[key] for key in _KEYS} for point in points]
