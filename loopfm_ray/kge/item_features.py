"""Graph vectors as features of items: a table with one row an item, which `data.items` joins to a log.

Columns of `items.parquet`: `item` (text), `kge_linked` (1 where the item has an entity with a training triple, else 0) and `kge_0` to
`kge_{D-1}` (float32). An item without such an entity takes the mean of those that have one, or zeros; no value is null.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.config import config_hash
from loopfm_ray.errors import DataError
from loopfm_ray.kge.export import KgeEmbeddings
from loopfm_ray.store.manifest import Manifest, commit, stage
from loopfm_ray.store.tables import write_parquet

__all__ = ["ITEMS_FILE", "Unlinked", "write_item_features"]

Unlinked = Literal["mean", "zeros"]
ITEMS_FILE = "items.parquet"


def write_item_features(
    embeddings: KgeEmbeddings,
    links: Mapping[str, str],
    items: Sequence[str],
    directory: Path,
    unlinked: Unlinked = "mean",
) -> Manifest:
    """Write the table as the version `directory`, in place of another one there.

    The manifest's `meta` counts the items: `num_linked`; `num_without_link`; `num_without_entity`, whose link names what the graph lacks;
    `num_untrained`, whose entity has no training triple; and `num_links_without_item`, links that no item has.

    Args:
        embeddings: from `load_kge`.
        links: item -> entity.
        items: all items that the log may have.
        directory: of the version.
        unlinked: what the last three kinds of items take.

    Raises:
        DataError: an item is named twice, or no item is linked.
        StoreError: the disk is full, or `directory` holds something that is no version.
    """
    if len(set(items)) < len(items):
        raise DataError(
            f"the items are not distinct: {len(items)} of which {len(set(items))} differ; expected one row an item"
        )
    ids, counts = _entity_ids(embeddings, links, items)
    is_linked = ids >= 0
    if not is_linked.any():
        raise DataError(
            f"none of the {len(items)} items is linked to an entity with a training triple ({counts}); do the links belong to"
            f" these items, such as {list(items[:3])}, and to this graph, with entities such as {list(embeddings.entities[:3])}?"
        )
    vectors = _fill(embeddings.vectors, ids, unlinked)
    columns = {"item": pa.array(items, pa.string())}
    columns["kge_linked"] = pa.array(is_linked.astype(np.float32))
    columns |= {f"kge_{at}": pa.array(column) for at, column in enumerate(vectors.T)}
    with stage(directory) as staged:
        write_parquet(pa.table(columns), staged / ITEMS_FILE)
        return commit(
            staged,
            kind="item_features",
            config_hash=config_hash({"unlinked": unlinked}),
            inputs={"embeddings": embeddings.version},
            meta={"dimension": vectors.shape[1], "unlinked": unlinked, **counts},
            num_rows=len(items),
            replace_other=True,
        )


def _entity_ids(
    embeddings: KgeEmbeddings, links: Mapping[str, str], items: Sequence[str]
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Return [n] the trained entity of each item, -1 where it has none, and how many of each kind there are."""
    numbers = {name: number for number, name in enumerate(embeddings.entities)}
    names = [links.get(item) for item in items]
    found = [-2 if name is None else numbers.get(name, -1) for name in names]
    ids = np.array(found, dtype=np.int64)
    is_untrained = ids >= embeddings.num_train_entities
    counts = {
        "num_items": len(items),
        "num_linked": int(((ids >= 0) & ~is_untrained).sum()),
        "num_without_link": int((ids == -2).sum()),
        "num_without_entity": int((ids == -1).sum()),
        "num_untrained": int(is_untrained.sum()),
        "num_links_without_item": len(set(links).difference(items)),
    }
    return np.where(is_untrained, -1, np.maximum(ids, -1)), counts


def _fill(
    vectors: NDArray[np.float32], ids: NDArray[np.int64], unlinked: Unlinked
) -> NDArray[np.float32]:
    """Return [n, D] the vectors of entities; the default where the id is -1."""
    is_linked = ids >= 0
    linked = vectors[ids[is_linked]]
    default = linked.mean(0, dtype=np.float64) if unlinked == "mean" else np.zeros(linked.shape[1])
    filled = np.tile(default.astype(np.float32), (len(ids), 1))
    filled[is_linked] = linked
    return filled
