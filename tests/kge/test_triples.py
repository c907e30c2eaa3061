"""Triples: every published layout gives the same graph, ids go by first appearance, mistakes are told with their line."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import DataError, SchemaError
from loopfm_ray.kge.triples import SPLITS, index_triples, read_triples
from tests.kge.graphs import shared_graph

GRAPH = {
    "train": [("b", "likes", "a"), ("a", "knows", "c é"), ("b", "likes", "c é")],
    "valid": [("c é", "likes", "new")],
    "test": [("a", "hates", "b"), ("newer", "likes", "new"), ("a", "knows", "b")],
}
ENTITIES = ("b", "a", "c é", "new", "newer")
RELATIONS = ("likes", "knows", "hates")


def write_text(root, ending, stems=SPLITS):
    for stem, split in zip(stems, SPLITS, strict=True):
        lines = ["\t".join(triple) + "\n" for triple in GRAPH[split]]
        (root / f"{stem}{ending}").write_text("".join(lines), encoding="utf-8")


def write_parquet(root):
    for split in SPLITS:
        head, relation, tail = zip(*GRAPH[split], strict=True)
        # another order of columns, and one more
        table = {"tail": tail, "score": [1.0] * len(head), "head": head, "relation": relation}
        pq.write_table(pa.table(table), root / f"{split}.parquet")


def write_numbers(root, has_names=True):
    """OpenKE: numbers of its own, head tail relation, a count on top."""
    entities = {name: 10 + number for number, name in enumerate(reversed(ENTITIES))}
    relations = {name: 20 + number for number, name in enumerate(reversed(RELATIONS))}
    for split in SPLITS:
        lines = [f"{len(GRAPH[split])}\n"]
        lines += [f"{entities[h]} {entities[t]} {relations[r]}\n" for h, r, t in GRAPH[split]]
        (root / f"{split}2id.txt").write_text("".join(lines), encoding="utf-8")
    if has_names:
        for name, table in (("entity", entities), ("relation", relations)):
            lines = [f"{len(table)}\n"] + [f"{key}\t{value}\n" for key, value in table.items()]
            (root / f"{name}2id.txt").write_text("".join(lines), encoding="utf-8")
    return entities, relations


WRITERS = {
    "parquet": write_parquet,
    "tsv": lambda root: write_text(root, ".tsv"),
    "txt": lambda root: write_text(root, ".txt"),
    "dev": lambda root: write_text(root, ".txt", ("train", "dev", "test")),
    "openke": write_numbers,
}


def named(graph, split):
    return [
        (graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in graph.split(split)
    ]


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_graph(layout, tmp_path):
    WRITERS[layout](tmp_path)
    graph = read_triples(tmp_path)
    assert graph.entities == ENTITIES
    assert graph.relations == RELATIONS
    for split in SPLITS:
        assert named(graph, split) == GRAPH[split]
        assert graph.split(split).dtype == np.int64
    assert (graph.num_train_entities, graph.num_train_relations) == (3, 2)
    assert graph.all_triples().tolist() == [
        row for split in SPLITS for row in graph.split(split).tolist()
    ]


def test_lines_may_end_as_on_windows_and_the_last_need_not_end(tmp_path):
    write_text(tmp_path, ".txt")
    path = tmp_path / "train.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert named(read_triples(tmp_path), "train") == GRAPH["train"]


def test_numbers_without_names_are_the_names(tmp_path):
    entities, relations = write_numbers(tmp_path, has_names=False)
    graph = read_triples(tmp_path)
    assert graph.entities == tuple(str(entities[name]) for name in ENTITIES)
    assert graph.relations == tuple(str(relations[name]) for name in RELATIONS)


def test_what_training_did_not_see_is_counted(tmp_path):
    write_text(tmp_path, ".txt")
    graph = read_triples(tmp_path)
    valid, test = graph.unseen("valid"), graph.unseen("test")
    assert (valid.num_entities, valid.num_relations, valid.num_triples) == (1, 0, 1)
    assert (test.num_entities, test.num_relations, test.num_triples) == (2, 1, 2)
    assert graph.has_unseen("test").tolist() == [True, True, False]
    assert graph.unseen("train").num_triples == 0


def test_reciprocals_follow_the_triples(tmp_path):
    write_text(tmp_path, ".txt")
    graph = read_triples(tmp_path)
    expected = graph.train.tolist() + [[t, r + 3, h] for h, r, t in graph.train.tolist()]
    assert graph.with_reciprocals("train").tolist() == expected


names = st.sampled_from([f"n{number}" for number in range(6)])
splits = st.lists(st.tuples(names, names, names), min_size=1, max_size=12)


@given(splits, splits, splits)
def test_ids_equal_those_of_a_dictionary_filled_row_by_row(train, valid, test):
    entities, relations, expected, seen = {}, {}, [], []
    for split in (train, valid, test):
        for head, relation, tail in split:
            h = entities.setdefault(head, len(entities))
            t = entities.setdefault(tail, len(entities))
            expected.append([h, relations.setdefault(relation, len(relations)), t])
        seen.append((len(entities), len(relations)))
    columns = [
        tuple(pa.array(column) for column in zip(*split, strict=True))
        for split in (train, valid, test)
    ]
    graph = index_triples(*columns)
    assert graph.entities == tuple(entities)
    assert graph.relations == tuple(relations)
    assert graph.all_triples().tolist() == expected
    assert (graph.num_train_entities, graph.num_train_relations) == seen[0]


def test_a_directory_without_triples_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        read_triples(tmp_path / "nowhere")
    (tmp_path / "graph.nt").write_text("")
    with pytest.raises(DataError, match=r"looked for train\.parquet, .*it holds \['graph\.nt'\]"):
        read_triples(tmp_path)


def test_a_missing_split_is_named(tmp_path):
    write_text(tmp_path, ".tsv")
    (tmp_path / "valid.tsv").unlink()
    with pytest.raises(DataError, match=r"no valid\.tsv or dev\.tsv"):
        read_triples(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tlikes", "line 2: expected 3 columns that are not empty, found 2"),
        ("a\tlikes\tb\tc", "line 2: expected 3 columns that are not empty, found 4"),
        ("a\t\tb", "line 2: expected 3 columns that are not empty, found 3"),
        ("", "line 2: expected 3 columns that are not empty, found 1"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(line, message, tmp_path):
    write_text(tmp_path, ".txt")
    (tmp_path / "test.txt").write_text(f"a\tlikes\tb\n{line}\na\tlikes\tb\n")
    with pytest.raises(DataError, match=message):
        read_triples(tmp_path)


def test_an_empty_split_is_refused(tmp_path):
    write_text(tmp_path, ".txt")
    (tmp_path / "valid.txt").write_text("")
    with pytest.raises(DataError, match=r"valid\.txt holds no triples"):
        read_triples(tmp_path)


def test_wrong_parquet_files_are_refused(tmp_path):
    write_parquet(tmp_path)
    path = tmp_path / "test.parquet"
    pq.write_table(pa.table({"h": ["a"], "relation": ["r"], "tail": ["b"]}), path)
    with pytest.raises(SchemaError, match=r"found \['h', 'relation', 'tail'\]"):
        read_triples(tmp_path)
    pq.write_table(
        pa.table({"head": ["a", None], "relation": ["r", "r"], "tail": ["b", "b"]}), path
    )
    with pytest.raises(DataError, match="nulls in head"):
        read_triples(tmp_path)
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("head", "relation", "tail")}), path
    )
    with pytest.raises(DataError, match="holds no triples"):
        read_triples(tmp_path)


def test_wrong_numbers_are_refused(tmp_path):
    write_numbers(tmp_path)
    path = tmp_path / "test2id.txt"
    text = path.read_text()
    for broken, message in (
        (text.replace("3\n", "4\n", 1), "announces 4 triples and holds 3"),
        (text.partition("\n")[2], "line 1: expected the number of triples"),
        (text.replace("13", "99"), "line 2: 99 has no name"),
        ("", "line 1: expected the number of triples"),
        ("0\n", "holds no triples"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=message):
            read_triples(tmp_path)
    path.write_text(text)
    (tmp_path / "entity2id.txt").write_text("1\nalone\n")
    with pytest.raises(DataError, match=r"entity2id\.txt, line 2: expected a name and a number"):
        read_triples(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes", "num_entities", "num_relations", "num_unseen"),
    [
        ("umls", (5216, 652, 661), 135, 46, 0),
        ("codex_s", (32888, 1827, 1828), 2034, 42, 0),
        ("wn18rr", (86835, 3034, 3134), 40943, 11, 210),
        ("fb15k237", (272115, 17535, 20466), 14541, 237, 28),
    ],
)
def test_published_sets_have_their_published_sizes(
    name, sizes, num_entities, num_relations, num_unseen
):
    graph = read_triples(shared_graph(name))
    assert tuple(len(graph.split(split)) for split in SPLITS) == sizes
    assert (graph.num_entities, graph.num_relations) == (num_entities, num_relations)
    assert graph.unseen("test").num_triples == num_unseen
