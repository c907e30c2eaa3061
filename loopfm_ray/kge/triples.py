"""Read a knowledge graph: three files of triples become int64 arrays and the names behind their ids.

Layouts, told by the names of the files; the first that has a train file is taken:

| files | columns | published so |
| --- | --- | --- |
| `train.parquet`, `valid.parquet`, `test.parquet` | head, relation, tail, by name | tables of `../shared/data/kg` |
| `train.tsv`, ... | head, relation, tail, by tab | exports of other libraries |
| `train.txt`, ... | head, relation, tail, by tab | FB15k-237, WN18RR, CoDEx, YAGO3-10, NELL-995, UMLS, Kinships |
| `train2id.txt`, ... | a count, then head, tail, relation, by blank or tab | OpenKE's benchmarks of all of these |

The validation file may be `dev` instead of `valid`, as in the NELL-995 of MINERVA. In the last layout the names come from
`entity2id.txt` and `relation2id.txt` where these exist; else the numbers are the names. Other files, such as CoDEx's negatives
and labels, are not read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.errors import DataError, SchemaError

__all__ = ["SPLITS", "Columns", "Split", "TripleSet", "Unseen", "index_triples", "read_triples"]

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

_ENDINGS = (".parquet", ".tsv", ".txt", "2id.txt")
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "dev"),
    "test": ("test",),
}
_COLUMNS = ("head", "relation", "tail")

Columns = tuple[pa.Array, pa.Array, pa.Array]
"""Names of heads, relations and tails, one string a triple."""


@dataclass(frozen=True)
class Unseen:
    """What a split holds that the training triples do not."""

    num_entities: int
    """Distinct entities that no training triple has."""
    num_relations: int
    """Distinct relations that no training triple has."""
    num_triples: int
    """Triples with such an entity or relation."""


@dataclass(frozen=True, eq=False)
class TripleSet:
    """A knowledge graph in three splits; ids go by first appearance in train, then valid, then test, head before tail.

    So what training saw is a prefix: an entity is known from training when its id is under `num_train_entities`.
    """

    entities: tuple[str, ...]
    """[E] the name of each entity."""
    relations: tuple[str, ...]
    """[R] the name of each relation."""
    train: NDArray[np.int64]
    """[n, 3] head, relation, tail."""
    valid: NDArray[np.int64]
    """[n, 3]."""
    test: NDArray[np.int64]
    """[n, 3]."""
    num_train_entities: int
    """Entities with a training triple; their ids are 0 up to here."""
    num_train_relations: int
    """Relations with a training triple; their ids are 0 up to here."""

    @property
    def num_entities(self) -> int:
        """E, over all splits."""
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        """R, over all splits, without reciprocal relations."""
        return len(self.relations)

    def split(self, name: Split) -> NDArray[np.int64]:
        """Return [n, 3] the triples of a split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def all_triples(self) -> NDArray[np.int64]:
        """Return [n, 3] the triples of all splits: the facts that filtered ranks leave out."""
        return np.concatenate([self.train, self.valid, self.test])

    def has_unseen(self, name: Split) -> NDArray[np.bool_]:
        """Return [n] whether each triple of a split holds an entity or a relation without a training triple."""
        triples = self.split(name)
        return (
            (triples[:, 0] >= self.num_train_entities)
            | (triples[:, 2] >= self.num_train_entities)
            | (triples[:, 1] >= self.num_train_relations)
        )

    def unseen(self, name: Split) -> Unseen:
        """Count what a split holds that the training triples do not."""
        triples = self.split(name)
        entities, relations = np.unique(triples[:, [0, 2]]), np.unique(triples[:, 1])
        return Unseen(
            num_entities=int((entities >= self.num_train_entities).sum()),
            num_relations=int((relations >= self.num_train_relations).sum()),
            num_triples=int(self.has_unseen(name).sum()),
        )

    def with_reciprocals(self, name: Split) -> NDArray[np.int64]:
        """Return [2n, 3] a split followed by its triples read backwards, (tail, relation + R, head).

        Source: Lacroix et al. 2018, arXiv 1806.07297, section 3.
        """
        triples = self.split(name)
        backwards = triples[:, ::-1] + np.array([0, self.num_relations, 0])
        return np.concatenate([triples, backwards])


def read_triples(root: Path) -> TripleSet:
    """Read the graph in the directory `root`, in one of the layouts above.

    Raises:
        DataError: no such directory or files, a line without three columns, or a split without triples.
        SchemaError: a Parquet file without the columns head, relation and tail.
    """
    root = Path(root)
    ending = _ending(root)
    paths = {name: _path(root, name, ending) for name in SPLITS}
    if ending == ".parquet":
        return index_triples(*(_from_parquet(paths[name]) for name in SPLITS))
    if ending == "2id.txt":
        names = _names(root / "entity2id.txt"), _names(root / "relation2id.txt")
        return index_triples(*(_from_numbers(paths[name], *names) for name in SPLITS))
    return index_triples(*(_from_text(paths[name]) for name in SPLITS))


def index_triples(train: Columns, valid: Columns, test: Columns) -> TripleSet:
    """Number the entities and relations of three splits, each the names of heads, relations and tails."""
    splits = (train, valid, test)
    sizes = [len(split[0]) for split in splits]
    stops = np.cumsum(sizes)
    heads, relations, tails = (
        pa.concat_arrays([split[column] for split in splits]) for column in range(3)
    )
    # head and tail of each triple in turn, so that ids go by first appearance
    turns = np.arange(2 * stops[-1]).reshape(2, -1).T.ravel()
    entity_ids, entities = _numbered(pa.concat_arrays([heads, tails]).take(pa.array(turns)))
    relation_ids, names = _numbered(relations)
    ends = entity_ids.reshape(-1, 2)
    triples = np.stack([ends[:, 0], relation_ids, ends[:, 1]], axis=1)
    first, second, third = np.split(triples, stops[:-1])
    return TripleSet(
        entities=entities,
        relations=names,
        train=first,
        valid=second,
        test=third,
        num_train_entities=int(first[:, [0, 2]].max()) + 1,
        num_train_relations=int(first[:, 1].max()) + 1,
    )


def _numbered(names: pa.Array) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    encoded = names.dictionary_encode()
    ids = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return ids, tuple(encoded.dictionary.to_pylist())


def _ending(root: Path) -> str:
    for ending in _ENDINGS:
        if (root / f"train{ending}").is_file():
            return ending
    looked = ", ".join(f"train{ending}" for ending in _ENDINGS)
    found = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
    holds = f"it holds {found[:8]}" if found is not None else "there is no such directory"
    raise DataError(
        f"no training triples in {root}: looked for {looked}; {holds}. Give a directory with one file a split"
    )


def _path(root: Path, name: Split, ending: str) -> Path:
    candidates = [root / f"{stem}{ending}" for stem in _NAMES[name]]
    for path in candidates:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in candidates)
    raise DataError(
        f"{root} has train{ending} but no {names}; all three splits are needed, in one layout"
    )


def _from_parquet(path: Path) -> Columns:
    present = pq.read_schema(path).names
    missing = [column for column in _COLUMNS if column not in present]
    if missing:
        raise SchemaError(
            f"{path} needs the columns head, relation and tail, found {present}; rename its columns"
        )
    table = pq.read_table(path, columns=list(_COLUMNS))
    _check_not_empty(path, table.num_rows)
    for column in _COLUMNS:
        if table[column].null_count:
            raise DataError(f"{path} has nulls in {column}; a triple needs all three names")
    head, relation, tail = (
        pc.cast(table[column], pa.large_string()).combine_chunks() for column in _COLUMNS
    )
    return head, relation, tail


def _from_text(path: Path) -> Columns:
    lines = _lines(path)
    _check_not_empty(path, len(lines))
    rows = [line.split("\t") for line in lines]
    _check_three(path, rows, first_line=1)
    return _columns(rows)


def _from_numbers(
    path: Path, entities: dict[str, str] | None, relations: dict[str, str] | None
) -> Columns:
    """Read OpenKE's layout, whose columns are head, tail, relation, under a line with their number."""
    rows = [line.split() for line in _lines(path)]
    if not rows or len(rows[0]) != 1 or not rows[0][0].isdigit():
        raise DataError(
            f"{path}, line 1: expected the number of triples alone, found {' '.join(rows[0]) if rows else 'nothing'}"
        )
    expected, rows = int(rows[0][0]), rows[1:]
    _check_not_empty(path, len(rows))
    _check_three(path, rows, first_line=2)
    if expected != len(rows):
        raise DataError(
            f"{path} announces {expected} triples and holds {len(rows)}; it was cut or edited, get it again"
        )
    named = (
        (
            _name(path, line, head, entities),
            _name(path, line, relation, relations),
            _name(path, line, tail, entities),
        )
        for line, (head, tail, relation) in enumerate(rows, start=2)
    )
    return _columns(named)


def _name(path: Path, line: int, number: str, names: dict[str, str] | None) -> str:
    if names is None:
        return number
    if number not in names:
        raise DataError(
            f"{path}, line {line}: {number} has no name in entity2id.txt or relation2id.txt;"
            " take all files from one download"
        )
    return names[number]


def _names(path: Path) -> dict[str, str] | None:
    """Return number -> name from `entity2id.txt` or `relation2id.txt`; None without the file."""
    if not path.is_file():
        return None
    pairs = [line.rsplit(maxsplit=1) for line in _lines(path)[1:]]
    for line, pair in enumerate(pairs, start=2):
        if len(pair) != 2:
            raise DataError(f"{path}, line {line}: expected a name and a number, found {pair}")
    return {number: name for name, number in pairs}


def _lines(path: Path) -> list[str]:
    # not splitlines(), which also breaks at characters that names may hold
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _columns(rows: Iterable[Iterable[str]]) -> Columns:
    head, relation, tail = (
        pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)
    )
    return head, relation, tail


def _check_three(path: Path, rows: list[list[str]], first_line: int) -> None:
    for line, row in enumerate(rows, start=first_line):
        if len(row) != 3 or not all(row):
            raise DataError(
                f"{path}, line {line}: expected 3 columns that are not empty, found {len(row)}: {row[:4]};"
                " correct the line"
            )


def _check_not_empty(path: Path, num: int) -> None:
    if num == 0:
        raise DataError(f"{path} holds no triples; every split needs at least one")
