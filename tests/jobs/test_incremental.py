"""A version made from the one before has the bytes of a full rebuild, whatever changed in the log."""

import os
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import StoreError
from loopfm_ray.jobs import materialize as job
from loopfm_ray.jobs.materialize import Scope, materialize
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.fitting import calibrate
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.store.compact import compact, expire
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import read_rows
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, save_snapshot
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.oracles.worlds import tree_bytes
from tests.serial import embed_here
from tests.serving import world

EVERYTHING = Scope()


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    """Run the shards in this process, without Ray."""
    monkeypatch.setattr(job, "_run", embed_here)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a log of 60 days and its config, and a snapshot that reads raw histories."""
    root = tmp_path_factory.mktemp("base")
    config = world.write_log(root, num_rows=1500)
    log = pq.read_table(root / "log.parquet")
    prepare(config, root / "prepared")
    schema = PreparedData.open(root / "prepared").schema_as_of(world.FM_STOP)
    torch.manual_seed(0)
    fm = build_fm(FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5)), schema, ("item", "category"))
    shape = BottleneckConfig(latent_dim=4, prefixes=(2, 4))
    bottleneck = build_bottleneck(shape, fm.embedding_dim(["hidden_0"]))
    spec = SnapshotSpec(
        trained_until_ts=world.FM_STOP - 1,
        schema=schema,
        item_fields=("item", "category"),
        max_len=5,
        fm=FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5)),
        bottleneck=shape,
        embedding_layers=("hidden_0",),
        code_spec=calibrate(bottleneck, torch.randn(50, fm.embedding_dim(["hidden_0"])), 4),
    )
    save_snapshot(Snapshot(fm.eval(), bottleneck.eval(), spec), root / "snapshot", inputs={})
    return root, config, log


def make(base, folder, rows, out, scope=EVERYTHING):
    """Write a log of these rows, prepare it and materialise it at `out`."""
    root, config, log = base
    pq.write_table(log.filter(rows), root / "log.parquet")
    # a name of its own: PreparedData keeps tables by path
    prepared = folder / f"prepared-{len(list(folder.glob('prepared-*')))}"
    prepare(config, prepared)
    return materialize(prepared, root / "snapshot", out, delay_us=10, num_workers=1, scope=scope)


def data_bytes(folder):
    found = tree_bytes(folder)
    del found["manifest.json"]
    return found


def all_rows(log):
    return np.ones(log.num_rows, dtype=bool)


@pytest.mark.parametrize("seed", range(4))
def test_new_and_late_events_give_the_bytes_of_a_full_rebuild(base, tmp_path, seed):
    log = base[2]
    ts = log.column("ts").to_numpy()
    rng = np.random.default_rng(seed)
    days = [float(rng.uniform(40, 50)), float(rng.uniform(50, 59))]
    late = np.zeros(log.num_rows, dtype=bool)
    if seed % 2:
        # one moment some time before the first watermark, held back at first
        moment = rng.choice(
            ts[
                (ts > world.START + 30 * MICROS_PER_DAY)
                & (ts < world.START + days[0] * MICROS_PER_DAY)
            ]
        )
        late = ts == moment
    first = (ts < world.START + days[0] * MICROS_PER_DAY) & ~late
    second = ts < world.START + days[1] * MICROS_PER_DAY
    make(base, tmp_path, first, tmp_path / "step")
    stepped = make(base, tmp_path, second, tmp_path / "step")
    full = make(base, tmp_path, second, tmp_path / "full")
    assert stepped.version == full.version
    assert data_bytes(tmp_path / "step") == data_bytes(tmp_path / "full")
    verify(tmp_path / "step")
    record = stepped.record
    assert record["num_reused"] > 0
    assert record["num_redone"] > 0
    labels = log.column("label").to_numpy()
    assert record["num_late_events"] == np.count_nonzero(late & (labels > 0))
    assert full.record == {
        "num_reused": 0,
        "num_redone": record["num_reused"] + record["num_redone"],
    }


def all_buckets(folder):
    reader = LatentsReader(folder)
    return [reader.read_bucket(bucket) for bucket in reader.buckets]


@pytest.mark.parametrize("seed", range(3))
def test_random_steps_with_compaction_and_expiry_give_the_rows_of_a_full_rebuild(
    base, tmp_path, seed
):
    log = base[2]
    ts = log.column("ts").to_numpy()
    rng = np.random.default_rng(seed)
    late = rng.random(log.num_rows) < 0.02
    days, keep, known = 38.0, None, None
    for step in [
        "grow",
        *rng.permutation(["grow", "grow", "late", "compact", "compact", "expire"]),
    ]:
        if step == "compact":
            compact(tmp_path / "step", target_rows=int(rng.choice([60, 10**6])))
            continue
        if step == "expire":
            keep = 21 * MICROS_PER_DAY
            expire(tmp_path / "step", keep)
            continue
        days += float(rng.uniform(2, 8)) if step == "grow" else 0.0
        late &= step != "late"
        known = (ts < world.START + days * MICROS_PER_DAY) & ~late
        make(base, tmp_path, known, tmp_path / "step", Scope(keep_us=keep))
    stepped = read_manifest(tmp_path / "step")
    full = make(base, tmp_path, known, tmp_path / "full", Scope(keep_us=keep))
    verify(tmp_path / "step")
    assert stepped.content == full.content
    assert stepped.num_rows == full.num_rows
    for found, want in zip(
        all_buckets(tmp_path / "step"), all_buckets(tmp_path / "full"), strict=True
    ):
        assert found.equals(want)


def test_of_a_compacted_version_only_what_changed_is_embedded(base, tmp_path):
    log = base[2]
    ts = log.column("ts").to_numpy()
    make(base, tmp_path, ts < world.START + 50 * MICROS_PER_DAY, tmp_path / "step")
    compact(tmp_path / "step")
    stepped = make(base, tmp_path, all_rows(log), tmp_path / "step")
    full = make(base, tmp_path, all_rows(log), tmp_path / "full")
    assert stepped.content == full.content
    assert stepped.record["num_reused"] > stepped.record["num_redone"] > 0
    again = compact(tmp_path / "step")
    assert again.content == full.content
    # the same inputs: nothing is left to do, and the compact version stays
    assert make(base, tmp_path, all_rows(log), tmp_path / "step").content == full.content


def test_a_changed_item_redoes_what_read_it_though_the_examples_are_the_same(base, tmp_path):
    root, _, log = base
    make(base, tmp_path, all_rows(log), tmp_path / "step")
    items = pq.read_table(root / "items.parquet")
    try:
        changed = pc.if_else(pc.equal(items.column("what"), "i3"), "c6", items.column("category"))
        place = items.column_names.index("category")
        pq.write_table(items.set_column(place, "category", changed), root / "items.parquet")
        stepped = make(base, tmp_path, all_rows(log), tmp_path / "step")
        full = make(base, tmp_path, all_rows(log), tmp_path / "full")
    finally:
        pq.write_table(items, root / "items.parquet")
    assert stepped.version == full.version
    assert data_bytes(tmp_path / "step") == data_bytes(tmp_path / "full")
    old, new = (
        {e.path: e.sha256 for e in read_manifest(tmp_path / f"prepared-{n}").files} for n in (0, 1)
    )
    assert [path for path in old if path.startswith("examples") and old[path] != new[path]] == []
    assert stepped.record["num_redone"] > 0


def test_a_shard_that_is_taken_over_is_not_copied(base, tmp_path):
    log = base[2]
    ts = log.column("ts").to_numpy()
    make(base, tmp_path, ts < world.START + 50 * MICROS_PER_DAY, tmp_path / "step")
    inodes = {p.stat().st_ino for p in (tmp_path / "step").rglob("bucket=*.parquet")}
    stepped = make(base, tmp_path, all_rows(log), tmp_path / "step")
    again = {p.stat().st_ino for p in (tmp_path / "step").rglob("bucket=*.parquet")}
    assert len(inodes & again) == stepped.record["num_reused"]


def test_a_backfill_redoes_its_range_and_refuses_changes_outside(base, tmp_path):
    log = base[2]
    ts = log.column("ts").to_numpy()
    day = MICROS_PER_DAY
    make(base, tmp_path, ts < world.START + 50 * day, tmp_path / "step")
    shutil.copytree(tmp_path / "step", tmp_path / "narrow", copy_function=os.link)
    span = TimeRange(world.START + 45 * day, world.STOP + day)
    stepped = make(base, tmp_path, all_rows(log), tmp_path / "step", Scope(redo=span))
    full = make(base, tmp_path, all_rows(log), tmp_path / "full")
    assert stepped.version == full.version
    assert data_bytes(tmp_path / "step") == data_bytes(tmp_path / "full")
    narrow = Scope(redo=TimeRange(world.START + 45 * day, world.START + 46 * day))
    with pytest.raises(StoreError, match="can not be taken over"):
        make(base, tmp_path, all_rows(log), tmp_path / "narrow", narrow)
    verify(tmp_path / "narrow")


def test_expired_periods_are_left_out_and_the_rest_is_taken_over(base, tmp_path):
    log = base[2]
    make(base, tmp_path, all_rows(log), tmp_path / "step")
    scope = Scope(keep_us=20 * MICROS_PER_DAY)
    stepped = make(base, tmp_path, all_rows(log), tmp_path / "step", scope)
    full = make(base, tmp_path, all_rows(log), tmp_path / "full", scope)
    assert stepped.version == full.version
    assert data_bytes(tmp_path / "step") == data_bytes(tmp_path / "full")
    assert stepped.record["num_redone"] == 0
    last = int(base[2].column("ts").to_numpy().max())
    period_us = read_manifest(tmp_path / "prepared-0").meta["period_us"]
    for path in (tmp_path / "step").rglob("bucket=*.parquet"):
        times = (
            read_rows(path, LatentsReader(tmp_path / "step").spec, ["event_ts"])
            .column("event_ts")
            .to_numpy()
        )
        assert times.min() > last - 20 * MICROS_PER_DAY - period_us
