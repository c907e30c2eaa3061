"""Graphs in one file: read as published, split so that nothing of a held-out triple stays in train, embedded and exported."""

import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loopfm_ray import cli_kge
from loopfm_ray.cli import app
from loopfm_ray.config import load_config
from loopfm_ray.errors import ConfigError, DataError, SchemaError, StoreError
from loopfm_ray.kge.embed import KgeRunConfig, embed_graph
from loopfm_ray.kge.export import load_kge
from loopfm_ray.kge.linked import (
    read_item_keys,
    read_linked_graph,
    read_links,
    split_triples,
)
from loopfm_ray.kge.triples import SPLITS
from tests.kge.graphs import random_triples

HEADERS = {
    "kg": "head_id:token\trelation_id:token\ttail_id:token",
    "link": "item_id:token\tentity_id:token",
    "item": "item_id:token\tmovie_title:token_seq",
}


def rows_of(num=60, seed=0):
    """Films with a genre and an actor, each triple also the other way round under a relation of its own."""
    draw = np.random.default_rng(seed)
    rows = []
    for film in range(num):
        genre, actor = f"g{draw.integers(4)}", f"a{draw.integers(8)}"
        rows += [(f"m.{film}", "genre", genre), (genre, "films_of_genre", f"m.{film}")]
        rows += [(f"m.{film}", "actor", actor), (f"m.{film}", "writer", actor)]
    return rows


def write_files(folder, rows=None, items=62, links=60):
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "kg": rows_of() if rows is None else rows,
        "link": [(str(item), f"m.{item}") for item in range(links)],
        "item": [(str(item), f"Title é {item}") for item in range(items)],
    }
    for ending, lines in texts.items():
        text = "\n".join([HEADERS[ending], *("\t".join(line) for line in lines)]) + "\n"
        (folder / f"small.{ending}").write_text(text, encoding="utf-8")


def names_of(graph, name):
    return {
        (graph.entities[head], graph.relations[relation], graph.entities[tail])
        for head, relation, tail in graph.split(name).tolist()
    }


def test_a_folder_and_a_wheel_give_the_same(tmp_path):
    write_files(tmp_path / "in")
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        for path in (tmp_path / "in").iterdir():
            out.write(path, f"recbole/dataset_example/small/{path.name}")
    for root in (tmp_path / "in", wheel):
        graph = read_linked_graph(root, "small", 0.05, seed=0)
        assert set.union(*(names_of(graph, name) for name in SPLITS)) == set(rows_of())
        assert sum(len(graph.split(name)) for name in SPLITS) == len(rows_of())
        assert read_links(root, "small")["7"] == "m.7"
        assert read_item_keys(root, "small") == [str(item) for item in range(62)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 0.15))
def test_what_is_held_out_leaves_no_trace_but_all_names_in_train(seed, share):
    triples = random_triples(seed, 80, 12, 3).astype(str)
    rows = [(f"e{head}", f"r{relation}", f"e{tail}") for head, relation, tail in triples]
    columns = tuple(pa.array(column, pa.large_string()) for column in zip(*rows, strict=True))
    try:
        graph = split_triples(columns, share, seed)
    except ConfigError:
        reject()
    pairs = {
        name: {frozenset((head, tail)) for head, _, tail in names_of(graph, name)}
        for name in SPLITS
    }
    assert not pairs["train"] & (pairs["valid"] | pairs["test"])
    assert not pairs["valid"] & pairs["test"]
    assert graph.num_train_entities == graph.num_entities
    assert graph.num_train_relations == graph.num_relations
    found = sorted(
        row
        for name in SPLITS
        for row in (
            (graph.entities[head], graph.relations[relation], graph.entities[tail])
            for head, relation, tail in graph.split(name).tolist()
        )
    )
    assert found == sorted(rows)
    least = max(1, round(share * len(rows)))
    assert min(len(graph.valid), len(graph.test)) >= least
    again = split_triples(columns, share, seed)
    assert np.array_equal(again.test, graph.test)


def test_a_chain_has_nothing_to_hold_out():
    rows = [("a", "r", "b"), ("c", "r", "d")]
    columns = tuple(pa.array(column, pa.large_string()) for column in zip(*rows, strict=True))
    with pytest.raises(ConfigError, match="only 0 can be held out"):
        split_triples(columns, 0.1, 0)


@pytest.mark.parametrize(
    ("ending", "text", "error", "expected"),
    [
        ("kg", "head_id:token\ttail_id:token\na\tb\n", SchemaError, r"lacks \['relation_id'\]"),
        ("kg", HEADERS["kg"] + "\na\tr\n", DataError, r"small.kg, line 2: expected 3 columns"),
        ("kg", HEADERS["kg"] + "\na\tr\tb\na\t\tb\n", DataError, "line 3: expected 3 columns"),
        ("kg", HEADERS["kg"] + "\n", DataError, "no rows under its header"),
        ("link", HEADERS["link"] + "\n1\ta\n1\tb\n", DataError, "'1' comes more than once"),
        ("item", HEADERS["item"] + "\n1\ta\n1\tb\n", DataError, "'1' comes more than once"),
        ("kg", b"\xff\xfe\n", DataError, "no text in UTF-8"),
        ("link", None, ConfigError, r"lacks small.link; expected files as RecBole"),
    ],
)
def test_a_file_that_is_not_as_published_is_told(tmp_path, ending, text, error, expected):
    write_files(tmp_path)
    path = tmp_path / f"small.{ending}"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    read = {
        "kg": lambda: read_linked_graph(tmp_path, "small", 0.05, 0),
        "link": lambda: read_links(tmp_path, "small"),
        "item": lambda: read_item_keys(tmp_path, "small"),
    }
    with pytest.raises(error, match=expected):
        read[ending]()


def run_config(tmp_path, **changes):
    tree = {
        "name": "small",
        "run_dir": str(tmp_path / "runs"),
        "graph": {
            "kind": "linked",
            "path": str(tmp_path / "in"),
            "name": "small",
            "held_out": 0.05,
        },
        "backbone": {"kind": "complex", "dimension": 8},
        "train": {"epochs": 4, "eval_every": 2, "batch_size": 64},
        "items": {},
    }
    return KgeRunConfig.model_validate({**tree, **changes})


def test_a_run_ends_in_vectors_and_features(tmp_path):
    write_files(tmp_path / "in")
    result = embed_graph(run_config(tmp_path))
    assert result["item_counts"]["num_linked"] == 60
    assert result["item_counts"]["num_without_link"] == 2
    found = load_kge(Path(result["embeddings"]))
    assert found.metrics["test_mrr"] == result["test_mrr"]
    assert found.metrics["test_num_unseen"] == 0
    table = pl.read_parquet(result["items"])
    assert table.shape == (62, 10)
    at = found.entities.index("m.7")
    row = table.filter(pl.col("item") == "7").select("kge_0", "kge_7").row(0)
    assert row == (found.vectors[at, 0], found.vectors[at, 7])
    epochs = []
    again = embed_graph(run_config(tmp_path), on_epoch=lambda epoch, _: epochs.append(epoch))
    assert (again, epochs) == (result, [])
    fresh = embed_graph(run_config(tmp_path), fresh=True, on_epoch=lambda n, _: epochs.append(n))
    assert (fresh, epochs) == (result, [1, 2, 3, 4])
    other = run_config(tmp_path, backbone={"kind": "distmult", "dimension": 8})
    with pytest.raises(StoreError, match="remove it to begin anew"):
        embed_graph(other)


def test_links_that_lack_are_told_before_anything_is_trained(tmp_path):
    write_files(tmp_path / "in")
    (tmp_path / "in/small.link").unlink()
    with pytest.raises(ConfigError, match=r"lacks small\.link"):
        embed_graph(run_config(tmp_path), on_epoch=lambda *_: pytest.fail("trained"))


def test_a_place_or_device_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"graph.path is .*in, which does not exist; expected"):
        embed_graph(run_config(tmp_path))
    with pytest.raises(ConfigError, match=r"device abacus can not be used: .*; take cpu"):
        embed_graph(run_config(tmp_path), device="abacus")


@pytest.mark.parametrize("name", ["num_workers", "num_ranking_workers"])
def test_workers_need_a_cluster_and_a_cpu(name, tmp_path):
    write_files(tmp_path / "in")
    config = run_config(tmp_path, train={"epochs": 4, name: 2})
    with pytest.raises(ConfigError, match=f"{name}.* 2.* works alone; set them to 1 and 0"):
        embed_graph(config, on_epoch=lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="device is cuda and workers train and rank on CPUs"):
        cli_kge._check_on_cpu(config.train.num_workers, "cuda")


def test_items_need_a_linked_graph(tmp_path):
    with pytest.raises(ValueError, match="items needs a graph of kind linked"):
        run_config(tmp_path, graph={"kind": "splits", "path": "x"})


def test_the_command_takes_a_graph_in_splits(tmp_path):
    folder = tmp_path / "umls"
    folder.mkdir()
    lines = ["\t".join(row) + "\n" for row in rows_of()]
    for name, part in (("train", lines), ("valid", lines[:4]), ("test", lines[4:8])):
        (folder / f"{name}.txt").write_text("".join(part))
    config = tmp_path / "umls.yaml"
    config.write_text(
        f"name: umls\nrun_dir: {tmp_path / 'runs'}\ngraph: {{kind: splits, path: {folder}}}\n"
        "train: {epochs: 1}\n"
    )
    result = CliRunner().invoke(app, ["export-kge", str(config), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_triples"] == [240, 4, 4]
    assert "items" not in found
    assert load_kge(tmp_path / "runs/umls/embeddings").vectors.shape == (72, 32)
    assert load_config(KgeRunConfig, config).items is None
