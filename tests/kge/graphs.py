"""Graphs that tests share: published ones where they are at hand, and small random ones."""

from pathlib import Path

import numpy as np
import pytest


def shared_graph(name):
    """Return the directory of a published graph, in a folder `shared/data` above this one; skip loudly without it."""
    for parent in Path(__file__).parents:
        found = parent / "shared" / "data" / "kg" / name
        if found.is_dir():
            return found
    pytest.skip(f"no shared/data/kg/{name} above {Path(__file__).parent}: it was NOT checked")


def random_triples(seed, num, num_entities, num_relations):
    """Return [num, 3] random triples, with repeats."""
    generator = np.random.default_rng(seed)
    sizes = (num_entities, num_relations, num_entities)
    return np.stack([generator.integers(0, size, num) for size in sizes], axis=1)
