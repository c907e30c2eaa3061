import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.errors import StoreError
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.fitting import calibrate, fit_bottleneck
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.train.embed import Embedder, embedding_chunks
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, load_snapshot, save_snapshot
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch

FM = FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5))
BOTTLENECK = BottleneckConfig(latent_dim=4, prefixes=(2, 4))


@pytest.fixture
def snapshot():
    torch.manual_seed(0)
    fm = build_fm(FM, SCHEMA, ITEM_FIELDS)
    bottleneck = build_bottleneck(BOTTLENECK, fm.embedding_dim(["hidden_0"]))
    chunks = list(embedding_chunks(fm, ["hidden_0"], [make_batch(50, seed=n) for n in range(4)]))
    fit_bottleneck(bottleneck, chunks)
    spec = SnapshotSpec(
        trained_until_ts=123,
        schema=SCHEMA,
        item_fields=ITEM_FIELDS,
        max_len=5,
        fm=FM,
        bottleneck=BOTTLENECK,
        embedding_layers=("hidden_0",),
        code_spec=calibrate(bottleneck, chunks[0].embedding, 4),
    )
    return Snapshot(fm.eval(), bottleneck.eval(), spec)


def test_round_trip_gives_the_same_latents_and_bytes(snapshot, tmp_path):
    manifest = save_snapshot(snapshot, tmp_path / "a", inputs={"prepared": "0" * 16}, num_rows=7)
    again = save_snapshot(snapshot, tmp_path / "b", inputs={"prepared": "0" * 16}, num_rows=7)
    assert manifest.version == again.version
    assert manifest.meta["snapshot_id"] == snapshot.snapshot_id
    loaded = load_snapshot(tmp_path / "a")
    assert loaded.spec == snapshot.spec
    assert loaded.snapshot_id == snapshot.snapshot_id
    assert loaded.version == manifest.version
    first, second = Embedder(snapshot)(make_batch()), Embedder(loaded)(make_batch())
    np.testing.assert_array_equal(first.latents, second.latents)
    np.testing.assert_array_equal(first.fm_probs, second.fm_probs)


def test_the_id_depends_on_weights_and_spec(snapshot):
    assert len(snapshot.snapshot_id) == 16
    spec = replace(snapshot.spec, trained_until_ts=124)
    assert Snapshot(snapshot.fm, snapshot.bottleneck, spec).snapshot_id != snapshot.snapshot_id
    with torch.no_grad():
        snapshot.fm.head.bias.add_(1e-3)
    other = Snapshot(snapshot.fm, snapshot.bottleneck, snapshot.spec)
    assert other.snapshot_id != snapshot.snapshot_id


def test_embedding_equals_the_steps_by_hand(snapshot):
    batch = make_batch()
    result = Embedder(snapshot)(batch)
    out = snapshot.fm(batch)
    latent = snapshot.bottleneck.encode(out.layers["hidden_0"]).detach().numpy()
    assert result.latents.shape == (12, 4)
    np.testing.assert_allclose(result.latents, latent, atol=1e-6)
    np.testing.assert_allclose(result.fm_probs, torch.sigmoid(out.logit).detach(), rtol=1e-6)
    columns = result.columns(("label", "long_view"))
    assert list(columns) == ["fm_prob", "fm_prob_long_view"]
    np.testing.assert_array_equal(columns["fm_prob_long_view"], result.fm_probs[:, 1])


def test_embedding_does_not_read_the_label(snapshot):
    batch = make_batch()
    other = replace(batch, label=1 - batch.label)
    first, second = Embedder(snapshot)(batch), Embedder(snapshot)(other)
    np.testing.assert_array_equal(first.latents, second.latents)


def test_another_snapshot_takes_the_place_and_keeps_its_record(snapshot, tmp_path):
    first = save_snapshot(snapshot, tmp_path / "a", inputs={})
    second = save_snapshot(
        snapshot, tmp_path / "a", inputs={}, settings_hash="f" * 16, record={"seconds": 3}
    )
    assert first.version != second.version == load_snapshot(tmp_path / "a").version
    assert (second.config_hash, second.meta["record"]) == ("f" * 16, {"seconds": 3})


def test_damage_and_other_kinds_are_errors(snapshot, tmp_path):
    with pytest.raises(StoreError):
        load_snapshot(tmp_path / "none")
    save_snapshot(snapshot, tmp_path / "a", inputs={})
    manifest = tmp_path / "a" / "manifest.json"
    weights = tmp_path / "a" / "fm.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="damaged"):
        load_snapshot(tmp_path / "a")
    assert json.loads(manifest.read_text())["kind"] == "snapshot"


def test_weights_that_do_not_fit_the_spec_are_errors(snapshot, tmp_path):
    wide = replace(snapshot.spec, fm=FM.model_copy(update={"hidden": (6, 7)}))
    save_snapshot(Snapshot(snapshot.fm, snapshot.bottleneck, wide), tmp_path / "a", inputs={})
    with pytest.raises(StoreError, match="does not fit its spec"):
        load_snapshot(tmp_path / "a")


def test_a_spec_survives_json_and_bad_ones_are_errors(snapshot):
    spec = replace(snapshot.spec, code_spec=CodeSpec(16, 4))
    assert SnapshotSpec.from_tree(json.loads(json.dumps(spec.to_tree()))) == spec
    with pytest.raises(StoreError, match="not a snapshot spec"):
        SnapshotSpec.from_tree({**spec.to_tree(), "fm": {"kind": "other"}})
    with pytest.raises(StoreError, match="not a snapshot spec"):
        SnapshotSpec.from_tree({})
