"""A graph in one file whose entities are linked to the items of a log, as RecBole publishes them.

Its "atomic files" are columns by tab under a header of `name:type`: `.kg` with head_id, relation_id and tail_id, `.link` with item_id and
entity_id, `.item` with item_id. Other columns and other types are not looked at, and `:type` may be missing. W. X. Zhao et al. 2021, arXiv
2011.01731; the graphs are those of KB4Rec, arXiv 1807.11141.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.datasets.published import PublishedFile, require_files
from loopfm_ray.errors import ConfigError, DataError, SchemaError
from loopfm_ray.kge.triples import Columns, TripleSet, index_triples

__all__ = ["read_item_keys", "read_linked_graph", "read_links", "split_triples"]

_WHERE = (
    "expected files as RecBole names them, such as ml-100k.kg, ml-100k.link and ml-100k.item, which are in the wheel of recbole"
    " (pip download --no-deps recbole==1.2.1; give the wheel)"
)


def read_linked_graph(root: Path, name: str, held_out: float, seed: int) -> TripleSet:
    """Return the graph `name.kg` of a directory, zip or wheel, split by `split_triples`.

    Raises:
        ConfigError: `root` has no such file, or too much is held out.
        SchemaError, DataError: the file is not as expected.
    """
    columns = _read(_file(root, f"{name}.kg"), ("head_id", "relation_id", "tail_id"))
    head, relation, tail = (pa.array(column, pa.large_string()) for column in columns)
    return split_triples((head, relation, tail), held_out, seed)


def read_links(root: Path, name: str) -> dict[str, str]:
    """Return item -> entity from `name.link`.

    Raises:
        ConfigError: `root` has no such file.
        SchemaError, DataError: the file is not as expected, or an item has two entities.
    """
    file = _file(root, f"{name}.link")
    items, entities = _read(file, ("item_id", "entity_id"))
    _check_distinct(file, items)
    return dict(zip(items, entities, strict=True))


def read_item_keys(root: Path, name: str) -> list[str]:
    """Return the keys of all items of `name.item`, in its order.

    Raises:
        ConfigError: `root` has no such file.
        SchemaError, DataError: the file is not as expected, or an item comes twice.
    """
    file = _file(root, f"{name}.item")
    (items,) = _read(file, ("item_id",))
    _check_distinct(file, items)
    return items


def split_triples(columns: Columns, held_out: float, seed: int) -> TripleSet:
    """Hold out triples for validation, and as many for test, so that they ask for what training does not tell.

    All triples of two entities go together: the inverse of a held-out triple, which many graphs hold under another relation, does not
    stay in train. Every entity and relation keeps a triple in train, so all vectors are trained.

    Args:
        columns: names of heads, relations and tails.
        held_out: share of the triples for validation, and for test.
        seed: of the choice.

    Raises:
        ConfigError: so many triples can not be held out.
    """
    names = pa.concat_arrays([columns[0], columns[2]]).dictionary_encode().indices
    ends = np.sort(names.to_numpy().reshape(2, -1).T, axis=1)
    pairs, pair_of = np.unique(ends, axis=0, return_inverse=True)
    relations = columns[1].dictionary_encode().indices.to_numpy()
    num = max(1, round(held_out * len(ends)))
    chosen = _choose(pairs, pair_of.ravel(), relations, (num, num), seed)
    splits = [np.flatnonzero(chosen == place) for place in (0, 1, 2)]
    if len(splits[1]) < num or len(splits[2]) < num:
        raise ConfigError(
            f"held_out is {held_out} of {len(ends)} triples, of which only {len(splits[1]) + len(splits[2])} can be held out if"
            " every entity and relation keeps one; hold out less"
        )
    train, valid, test = (_rows(columns, rows) for rows in splits)
    return index_triples(train, valid, test)


def _choose(
    pairs: NDArray[np.int64],
    pair_of: NDArray[np.int64],
    relations: NDArray[np.int64],
    sizes: Sequence[int],
    seed: int,
) -> NDArray[np.int8]:
    """Return [n] the split of each triple: 0 for train, 1 and 2 for those of `sizes`."""
    split = np.zeros(len(pair_of), dtype=np.int8)
    order = np.argsort(pair_of, kind="stable")
    starts = np.searchsorted(pair_of[order], np.arange(len(pairs) + 1))
    degree, uses = Counter(pairs.ravel().tolist()), Counter(relations.tolist())
    left, place = list(sizes), 1
    for pair in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        rows = order[starts[pair] : starts[pair + 1]]
        here, ends = Counter(relations[rows].tolist()), Counter(pairs[pair].tolist())
        if any(degree[end] <= num for end, num in ends.items()):
            continue
        if any(uses[relation] <= num for relation, num in here.items()):
            continue
        degree.subtract(ends)
        uses.subtract(here)
        split[rows] = place
        left[place - 1] -= len(rows)
        if left[place - 1] <= 0:
            place += 1
        if place > len(left):
            break
    return split


def _rows(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    head, relation, tail = (column.take(pa.array(rows)) for column in columns)
    return head, relation, tail


def _file(root: Path, name: str) -> PublishedFile:
    if not root.exists():
        raise ConfigError(f"graph.path is {root}, which does not exist; {_WHERE}")
    return require_files(str(root), [name], _WHERE)[name]


def _read(file: PublishedFile, columns: Sequence[str]) -> list[list[str]]:
    """Return the values of some columns, none of them empty."""
    with file.open() as raw:
        content = raw.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8 ({error}); write it so") from error
    lines = text.replace("\r\n", "\n").split("\n")
    header = [name.partition(":")[0] for name in lines[0].split("\t")]
    missing = [name for name in columns if name not in header]
    if missing:
        raise SchemaError(
            f"{file}: the header is {lines[0].split(chr(9))}, which lacks {missing}; expected columns by tab under their names"
        )
    places = [header.index(name) for name in columns]
    values: list[list[str]] = [[] for _ in columns]
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        cells = line.split("\t")
        wanted = [cells[place] for place in places] if len(cells) == len(header) else []
        if not all(wanted) or not wanted:
            raise DataError(
                f"{file}, line {number}: expected {len(header)} columns, {list(columns)} not empty, found {cells[:6]};"
                " correct the line"
            )
        for column, value in zip(values, wanted, strict=True):
            column.append(value)
    if not values[0]:
        raise DataError(f"{file} has no rows under its header")
    return values


def _check_distinct(file: PublishedFile, items: Iterable[str]) -> None:
    repeated = [item for item, num in Counter(items).items() if num > 1]
    if repeated:
        raise DataError(
            f"{file}: item_id {repeated[0]!r} comes more than once, as do {len(repeated) - 1} others; expected one row an item"
        )
