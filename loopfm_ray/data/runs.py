"""Walk over runs of equal values in a sorted column."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["runs"]


def runs(values: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Yield `(value, start, stop)` for each run of equal values in `values` [N], which never falls."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)] if len(values) else []
    for start, stop in itertools.pairwise(bounds):
        yield int(values[start]), start, stop
