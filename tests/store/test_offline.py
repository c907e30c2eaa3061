import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopfm_ray.errors import DataError, LeakError, ShapeError, StoreError
from loopfm_ray.store.codes import encode
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.offline import LatentsReader, merge_fingerprint
from loopfm_ray.store.tables import code_bytes, map_ipc, read_parquet, write_ipc, write_parquet
from tests.oracles import worlds


@pytest.fixture(scope="module")
def examples():
    return worlds.make_examples(seed=2)


@pytest.fixture(scope="module")
def latents(examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "latents"
    worlds.write_latents(folder, examples)
    return folder


def test_bucket_reads_back_sorted_with_codes_and_availability(latents, examples):
    reader = LatentsReader(latents)
    assert reader.buckets == [0, 1, 2]
    assert reader.periods == [1, 2, 3]
    seen = 0
    for bucket in reader.buckets:
        table = reader.read_bucket(bucket)
        column = {name: table.column(name).to_numpy() for name in table.column_names[:-1]}
        ids = column["example_id"]
        order = np.lexsort([ids, column["event_ts"], column["user"]])
        assert order.tolist() == list(range(len(ids)))
        for name in ("user", "item", "event_ts", "label_ts", "is_event"):
            np.testing.assert_array_equal(column[name], examples[name][ids])
        ready = np.maximum(column["event_ts"] + 10, column["label_ts"])
        np.testing.assert_array_equal(column["available_ts"], ready)
        values, prob = worlds.latents_of(ids)
        np.testing.assert_array_equal(column["fm_prob"], prob)
        np.testing.assert_array_equal(code_bytes(table.column("code")), encode(values, worlds.SPEC))
        seen += len(ids)
    assert seen == reader.manifest.num_rows == np.count_nonzero(examples["event_ts"] >= 1000)


def test_columns_periods_and_events_are_chosen(latents):
    reader = LatentsReader(latents)
    table = reader.read_bucket(1, columns=["fm_prob", "event_ts"], periods=[2], events_only=True)
    assert table.column_names == ["fm_prob", "event_ts"]
    times = table.column("event_ts").to_numpy()
    assert len(times)
    assert ((times >= 2000) & (times < 3000)).all()
    whole = reader.read_bucket(1, periods=[2])
    assert table.num_rows == np.count_nonzero(whole.column("is_event").to_numpy())


def test_a_bucket_without_shards_is_empty(latents):
    table = LatentsReader(latents).read_bucket(99)
    assert table.num_rows == 0
    assert table.schema.field("code").type == pa.binary(worlds.SPEC.num_bytes)


def test_manifest_says_what_made_it(latents, examples):
    meta = read_manifest(latents).meta
    values, _ = worlds.latents_of(examples["example_id"][examples["event_ts"] >= 1000])
    assert meta["snapshot_id"] == "snap"
    assert meta["trained_until_ts"] == 999
    assert meta["code_spec"] == worlds.SPEC.to_tree()
    assert meta["watermark_ts"] == 4000
    assert (meta["delay_us"], meta["waits_for_label"]) == (10, True)
    np.testing.assert_allclose(meta["fingerprint"]["mean"], values.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(meta["fingerprint"]["std"], values.std(axis=0), atol=1e-5)
    verify(latents)


def test_row_order_and_shard_order_change_no_byte(latents, examples, tmp_path):
    rng = np.random.default_rng(0)
    mixed = rng.permutation(len(examples["user"]))
    shuffled = {name: values[mixed] for name, values in examples.items()}
    writer = pickle.loads(pickle.dumps(worlds.make_writer(tmp_path / "latents")))
    writer.begin(worlds.SHARDS)
    for place in rng.permutation(len(worlds.SHARDS)):
        worlds.write_shard(writer, shuffled, *worlds.SHARDS[place])
    writer.finish(worlds.SHARDS, watermark_ts=4000)
    assert worlds.tree_bytes(tmp_path) == worlds.tree_bytes(latents.parent)


def test_events_the_snapshot_was_trained_on_are_refused(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    with pytest.raises(LeakError, match="snap was trained until 999"):
        worlds.write_shard(writer, examples, 0, 1)
    assert writer.completed(0, 1) is None


def test_wrong_rows_are_refused(tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    rows = {
        "example_id": np.array([1, 2]),
        "user": np.array([1, 1]),
        "item": np.array([1, 1]),
        "event_ts": np.array([1000, 1001]),
        "label_ts": np.array([1000, 1001]),
        "is_event": np.array([True, True]),
        "fm_prob": np.array([0.5, 0.5]),
    }
    latents = np.zeros((2, 6), dtype=np.float32)
    with pytest.raises(ShapeError, match="columns"):
        writer.write(1, 0, rows, latents[:1])
    with pytest.raises(ShapeError, match="columns"):
        writer.write(1, 0, {n: v for n, v in rows.items() if n != "user"}, latents)
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(DataError, match="fm_prob"):
            writer.write(1, 0, rows | {"fm_prob": np.array([0.5, bad])}, latents)
    with pytest.raises(DataError, match="finite"):
        writer.write(1, 0, rows, latents * np.nan)


def test_a_missing_shard_stops_the_finish(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    worlds.write_shard(writer, examples, 1, 0)
    with pytest.raises(StoreError, match=r"1 of 2 shards .* \(1, 1\)"):
        writer.finish([(1, 0), (1, 1)], watermark_ts=0)


def test_whole_shards_are_kept_and_damaged_ones_written_again(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    stats = worlds.write_shard(writer, examples, 1, 0)
    path = writer.work_dir / "data/period=0001/bucket=000.parquet"
    before = path.stat().st_ino
    assert writer.completed(1, 0) == stats
    assert worlds.write_shard(writer, examples, 1, 0) == stats
    assert path.stat().st_ino == before
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert writer.completed(1, 0) is None
    assert worlds.write_shard(writer, examples, 1, 0) == stats
    assert path.read_bytes() == content


def test_shards_of_other_inputs_are_not_reused(examples, tmp_path):
    old = worlds.make_writer(tmp_path / "latents", snapshot_id="old")
    old.begin(worlds.SHARDS)
    worlds.write_shard(old, examples, 1, 0)
    new = worlds.make_writer(tmp_path / "latents", snapshot_id="new")
    new.begin(worlds.SHARDS)
    assert new.completed(1, 0) is None
    assert not old.work_dir.exists()


def test_shards_outside_the_version_are_dropped(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    for period in (1, 2):
        worlds.write_shard(writer, examples, period, 0)
    manifest = writer.finish([(1, 0)], watermark_ts=2000)
    paths = [entry.path for entry in manifest.files]
    assert paths == ["period=0001/bucket=000.parquet", "shards.parquet"]
    assert not writer.work_dir.exists()


def test_a_version_that_is_there_leaves_nothing_to_do(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    assert writer.begin([(1, 0)]) is None
    worlds.write_shard(writer, examples, 1, 0)
    manifest = writer.finish([(1, 0)], watermark_ts=2000)
    writer.work_dir.mkdir()
    assert writer.begin([(1, 0)]) == manifest
    assert not writer.work_dir.exists()
    assert writer.begin([(1, 0), (2, 0)]) is None
    assert worlds.make_writer(tmp_path / "latents", snapshot_id="new").begin([(1, 0)]) is None


def test_empty_shards_are_shards(tmp_path):
    none = {name: values[:0] for name, values in worlds.make_examples().items()}
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    worlds.write_shard(writer, none, 1, 0)
    manifest = writer.finish([(1, 0)], watermark_ts=0)
    assert manifest.num_rows == 0
    assert LatentsReader(tmp_path / "latents").read_bucket(0).num_rows == 0
    assert merge_fingerprint([], 2) == {"mean": [0.0, 0.0], "std": [0.0, 0.0]}


def test_full_disk_is_a_store_error_and_leaves_no_shard(examples, tmp_path, monkeypatch):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    (tmp_path / "full").symlink_to("/dev/full")
    real = pq.ParquetWriter
    monkeypatch.setattr(
        pq, "ParquetWriter", lambda p, *a, **k: real(str(tmp_path / "full"), *a, **k)
    )
    with pytest.raises(StoreError, match="no space left"):
        worlds.write_shard(writer, examples, 1, 0)
    assert writer.completed(1, 0) is None
    assert list((writer.work_dir / "data").rglob("*.parquet")) == []


def test_other_kinds_and_strange_files_are_refused(examples, tmp_path):
    worlds.write_prepared(tmp_path / "prepared", examples)
    with pytest.raises(StoreError, match="kind 'prepared', expected 'latents'"):
        LatentsReader(tmp_path / "prepared")
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin(worlds.SHARDS)
    worlds.write_shard(writer, examples, 1, 0)
    (writer.work_dir / "data" / "notes.txt").write_text("?")
    writer.finish([(1, 0)], watermark_ts=0)
    with pytest.raises(StoreError, match=r"'notes\.txt' is no shard"):
        LatentsReader(tmp_path / "latents")


def test_arrow_files_map_without_copies_and_missing_files_are_store_errors(tmp_path):
    table = pa.table({"x": pa.chunked_array([[1, 2], [3]])})
    write_ipc(table, tmp_path / "a.arrow")
    write_ipc(table.slice(0, 0), tmp_path / "empty.arrow")
    allocated = pa.total_allocated_bytes()
    mapped = map_ipc(tmp_path / "a.arrow")
    assert mapped.column("x").num_chunks == 1
    assert mapped.column("x").chunk(0).to_numpy(zero_copy_only=True).tolist() == [1, 2, 3]
    assert pa.total_allocated_bytes() == allocated
    assert map_ipc(tmp_path / "empty.arrow").num_rows == 0
    with pytest.raises(StoreError, match="can not be read"):
        map_ipc(tmp_path / "none.arrow")
    (tmp_path / "bad.arrow").write_text("bad")
    with pytest.raises(StoreError, match="can not be read"):
        map_ipc(tmp_path / "bad.arrow")
    with pytest.raises(StoreError, match="can not be read"):
        read_parquet(tmp_path / "none.parquet")
    write_parquet(table, tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="can not be read"):
        read_parquet(tmp_path / "bad.arrow")


@pytest.mark.s3
def test_latents_and_manifests_read_from_s3(latents, s3):
    from pyarrow import fs as pafs

    system, path = pafs.FileSystem.from_uri(s3)
    pafs.copy_files(str(latents), path, destination_filesystem=system)
    verify(s3)
    remote, local = LatentsReader(s3), LatentsReader(latents)
    assert remote.manifest == local.manifest
    for bucket in local.buckets:
        assert remote.read_bucket(bucket).equals(local.read_bucket(bucket))
    with pytest.raises(StoreError, match="no dataset version"):
        read_manifest(f"{s3}/nothing")


def test_addresses_of_unknown_systems_are_refused():
    with pytest.raises(StoreError, match="can not be opened"):
        read_manifest("ftp2://host/x")
