"""Exported vectors come back bit for bit, damage is found, and a version is there whole or not at all."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from loopfm_ray.config import validate
from loopfm_ray.errors import StoreError
from loopfm_ray.kge.digest import graph_digest
from loopfm_ray.kge.export import export_kge, load_kge
from loopfm_ray.kge.models import BACKBONES, read_kge_config
from loopfm_ray.kge.training import KgeTrainConfig, train_kge
from loopfm_ray.kge.triples import index_triples
from loopfm_ray.store.manifest import commit, read_manifest, stage


def columns(rows):
    return tuple(pa.array(column, pa.large_string()) for column in zip(*rows, strict=True))


def small_graph():
    """Twelve entities in a ring of two relations; `late` has no training triple."""
    ring = [(f"é{at}", f"r{at % 2}", f"é{(at + 1) % 12}") for at in range(12)]
    return index_triples(
        columns(ring), columns([("é0", "r0", "late")]), columns([("é3", "r1", "é5")])
    )


GRAPH = small_graph()
TRAIN = validate(KgeTrainConfig, {"epochs": 2, "eval_every": 1, "batch_size": 8}, "test")


def export(directory, kind="complex", **config):
    backbone = read_kge_config({"kind": kind, "dimension": 16, **config})
    trained = train_kge(GRAPH, backbone, TRAIN)
    return trained, export_kge(trained, GRAPH, backbone, TRAIN, directory, {"test_mrr": 0.25})


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_comes_back_bit_for_bit(kind, tmp_path):
    trained, manifest = export(tmp_path / "out", kind)
    before = torch.get_rng_state()
    found = load_kge(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    state = trained.model.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert np.array_equal(found.vectors, state["entity"].numpy())
    assert (found.entities, found.relations) == (GRAPH.entities, GRAPH.relations)
    assert (found.num_train_entities, found.entities[12]) == (12, "late")
    assert found.backbone.kind == kind
    assert found.graph == graph_digest(GRAPH)
    assert found.version == manifest.version
    assert dict(found.metrics) == {
        "valid_mrr": trained.best_mrr,
        "best_epoch": trained.best_epoch,
        "num_epochs": 2,
        "test_mrr": 0.25,
    }
    ids = torch.arange(4)
    with torch.no_grad():
        again = found.model.score_tails(ids, ids % 2)
        assert torch.equal(again, trained.model.score_tails(ids, ids % 2))


def test_the_files_can_be_read_without_this_package(tmp_path):
    trained, manifest = export(tmp_path / "out")
    table = pq.read_table(tmp_path / "out/entities.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table["entity"].to_pylist() == list(GRAPH.entities)
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    weights = load_file(tmp_path / "out/embeddings.safetensors")
    assert np.array_equal(vectors, weights["entity"].numpy())
    assert {name.partition(".")[0] for name in weights} == {"entity", "relations"}
    record = json.loads((tmp_path / "out/model.json").read_text())
    assert record["backbone"]["kind"] == "complex"
    assert (record["dimension"], record["num_entities"]) == (16, 13)
    assert (manifest.kind, manifest.num_rows) == ("kge", 13)
    assert manifest.inputs == {"graph": graph_digest(GRAPH)}
    assert trained.model.dimension == 16


def test_the_same_training_gives_the_same_version_and_another_one_takes_its_place(tmp_path):
    _, first = export(tmp_path / "a")
    _, second = export(tmp_path / "b")
    assert (first.version, first.files) == (second.version, second.files)
    _, other = export(tmp_path / "a", "distmult")
    assert other.version != first.version
    assert load_kge(tmp_path / "a").backbone.kind == "distmult"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]


@pytest.mark.parametrize("name", ["embeddings.safetensors", "entities.parquet", "model.json"])
def test_a_damaged_file_is_found(name, tmp_path):
    export(tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        load_kge(tmp_path / "out")
    path.unlink()
    with pytest.raises(StoreError, match=f"{name} of version .* can not be read"):
        load_kge(tmp_path / "out")


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is no dataset version"):
        load_kge(tmp_path / "nothing")
    with stage(tmp_path / "other") as staged:
        (staged / "x").write_text("x")
        commit(staged, kind="fm", config_hash="x", inputs={}, meta={}, num_rows=0)
    with pytest.raises(StoreError, match="of kind 'fm', expected 'kge'"):
        load_kge(tmp_path / "other")


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loopfm_ray.kge.export.write_parquet", full)
    with pytest.raises(StoreError, match="no space left"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(tmp_path):
    _, manifest = export(tmp_path / "out")
    record = json.loads((tmp_path / "out/model.json").read_text())
    (tmp_path / "out/model.json").write_text(json.dumps({**record, "format_version": 2}))
    with stage(tmp_path / "new") as staged:
        for entry in manifest.files:
            (staged / entry.path).write_bytes((tmp_path / "out" / entry.path).read_bytes())
        commit(staged, kind="kge", config_hash="x", inputs={}, meta={}, num_rows=0)
    assert read_manifest(tmp_path / "new").kind == "kge"
    with pytest.raises(StoreError, match="format_version 2, this code reads 1"):
        load_kge(tmp_path / "new")
