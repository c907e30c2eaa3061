"""Compaction and expiry change files, not rows; a version made over a compacted one is that of a full rebuild."""

import shutil
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import write_joined
from loopfm_ray.store import compact as module
from loopfm_ray.store import offline
from loopfm_ray.store.compact import compact, expire, plan_files
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.shards import SHARDS
from tests.oracles import worlds


@pytest.fixture(scope="module")
def examples():
    return worlds.make_examples(seed=4, num_periods=12, num_rows=1500)


@pytest.fixture
def latents(examples, tmp_path):
    worlds.update_latents(tmp_path / "latents", examples)
    return tmp_path / "latents"


def files(folder):
    return [entry.path for entry in read_manifest(folder).files if entry.path != SHARDS]


def rows(folder):
    """Return all rows of a version by bucket."""
    reader = LatentsReader(folder)
    return {bucket: reader.read_bucket(bucket) for bucket in reader.buckets}


def same_rows(left, right):
    return left.keys() == right.keys() and all(left[b].equals(right[b]) for b in left)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_compacted_version_has_fewer_files_and_the_same_rows_and_content(latents):
    before, old = rows(latents), read_manifest(latents)
    manifest = compact(latents)
    verify(latents)
    assert read_manifest(latents) == manifest
    assert manifest.content == old.content
    assert manifest.version != old.version
    assert (manifest.meta, manifest.inputs, manifest.config_hash) == (
        old.meta,
        old.inputs,
        old.config_hash,
    )
    assert same_rows(rows(latents), before)
    # the newest period stays alone
    assert files(latents) == [
        f"period={span}/bucket={bucket:03d}.parquet"
        for span in ("0001-0010", "0011")
        for bucket in range(worlds.NUM_BUCKETS)
    ]
    assert manifest.record == {
        "previous": old.version,
        "num_expired": 0,
        "num_files_before": 33,
        "num_files": 6,
    }
    assert hidden(latents.parent) == []


def test_compacting_again_does_nothing(latents):
    manifest = compact(latents, target_rows=120)
    inode = latents.stat().st_ino
    assert compact(latents, target_rows=120) == manifest
    assert latents.stat().st_ino == inode
    assert hidden(latents.parent) == []


@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=40),
    target=st.integers(1, 80),
)
def test_planned_files_are_within_the_target_and_a_plan_of_them_is_the_same(sizes, target):
    zero = (0.0,) * worlds.SPEC.dim
    shards = []
    for period, (num_rows, bucket) in enumerate(sizes):
        span = (period * 10, period * 10 + 9)
        path = offline.shard_path(period, bucket)
        shards.append(offline.ShardStats(period, bucket, path, num_rows, 0, *span, zero, zero))
    groups = plan_files(shards, target)
    assert sorted(item.place for group in groups for item in group) == sorted(
        item.place for item in shards
    )
    for group in groups:
        assert len({item.bucket for item in group}) == 1
        if len(group) > 1:
            assert sum(item.num_rows for item in group) <= target
            assert all(item.period < len(sizes) - 1 for item in group)
    again = plan_files(
        [replace(item, path=module._Group(group).path) for group in groups for item in group],
        target,
    )
    assert [[i.place for i in group] for group in again] == [
        [i.place for i in group] for group in groups
    ]


def test_chosen_periods_are_read_from_compacted_files(latents):
    plain = LatentsReader(latents)
    want = {p: plain.read_bucket(1, periods=[p]) for p in plain.periods}
    some = plain.read_bucket(2, periods=[3, 7], columns=["code"], events_only=True)
    compact(latents)
    reader = LatentsReader(latents)
    assert reader.periods == plain.periods == list(range(1, 12))
    assert reader.buckets == plain.buckets
    for period, table in want.items():
        assert reader.read_bucket(1, periods=[period]).equals(table)
    assert reader.read_bucket(2, periods=[3, 7], columns=["code"], events_only=True).equals(some)


def test_what_was_made_from_a_version_holds_for_the_compacted_one(latents, examples, tmp_path):
    worlds.write_prepared(tmp_path / "prepared", examples)
    where = (tmp_path / "prepared", latents)
    first = write_joined(*where, tmp_path / "joined", worlds.REQUESTS, worlds.SETTINGS)
    compact(latents)
    assert audit(tmp_path / "joined", latents, where[0], sample=None).num_leaks == 0
    again = write_joined(*where, tmp_path / "again", worlds.REQUESTS, worlds.SETTINGS)
    assert again.version == first.version
    found, want = worlds.tree_bytes(tmp_path / "again"), worlds.tree_bytes(tmp_path / "joined")
    assert found == want


def test_a_materialise_of_the_same_inputs_leaves_a_compacted_version(latents, examples):
    manifest = compact(latents)
    assert worlds.update_latents(latents, examples) == manifest


def test_a_compacted_file_is_linked_if_nothing_in_it_changed_else_its_rows_are_taken(
    latents, examples
):
    compact(latents)
    inodes = {path: (latents / path).stat().st_ino for path in files(latents)}
    late = {name: values.copy() for name, values in examples.items()}
    chosen = (late["event_ts"] // worlds.PERIOD_US == 4) & (late["bucket"] == 1)
    late["item"][np.flatnonzero(chosen)[0]] += 1
    manifest = worlds.update_latents(latents, late, inputs={"prepared": "q"})
    assert (manifest.record["num_redone"], manifest.record["num_reused"]) == (1, 32)
    assert sorted(set(files(latents)) - set(inodes)) == ["period=0004/bucket=001.parquet"]
    kept = {path for path in inodes if (latents / path).stat().st_ino == inodes[path]}
    assert set(inodes) - kept == {"period=0001-0010/bucket=001.parquet"}
    assert 4 not in [
        item.period
        for item in LatentsReader(latents).shards.values()
        if item.path == "period=0001-0010/bucket=001.parquet"
    ]
    full = worlds.update_latents(latents.parent / "full", late, inputs={"prepared": "q"})
    assert manifest.content == full.content
    assert same_rows(rows(latents), rows(latents.parent / "full"))
    assert compact(latents).content == full.content
    assert len(files(latents)) == 6


def test_expiry_drops_whole_old_periods_and_leaves_other_files_alone(latents, examples):
    inodes = {path: (latents / path).stat().st_ino for path in files(latents)}
    watermark_ts = read_manifest(latents).meta["watermark_ts"]
    retention_us = 3 * worlds.PERIOD_US
    manifest = expire(latents, retention_us)
    oldest = (watermark_ts - retention_us) // worlds.PERIOD_US
    assert LatentsReader(latents).periods == list(range(oldest, 12))
    assert manifest.record["num_expired"] == 3 * (oldest - 1)
    full = worlds.update_latents(latents.parent / "full", examples, retention_us)
    assert manifest.content == full.content
    assert manifest.version == full.version
    assert same_rows(rows(latents), rows(latents.parent / "full"))
    for path in files(latents):
        assert (latents / path).stat().st_ino == inodes[path]
        # of the expired version nothing holds on to any file
        assert (latents / path).stat().st_nlink == 1
    assert expire(latents, retention_us) == manifest
    assert hidden(latents.parent) == []


def test_expired_rows_of_a_compacted_file_are_gone_from_disk(latents, examples):
    compact(latents)
    retention_us = 3 * worlds.PERIOD_US
    manifest = expire(latents, retention_us)
    full = worlds.update_latents(latents.parent / "full", examples, retention_us)
    assert manifest.content == full.content
    expired = examples["example_id"][
        examples["event_ts"] < LatentsReader(latents).periods[0] * 1000
    ]
    left = np.concatenate([table.column("example_id") for table in rows(latents).values()])
    assert not np.isin(expired, left).any()
    # every file below the folder belongs to one of the two versions
    known = {root / path for root in (latents, latents.parent / "full") for path in files(root)}
    assert set(latents.parent.rglob("bucket=*")) == known


def test_one_step_can_expire_and_compact(latents, examples):
    manifest = compact(latents, retention_us=5 * worlds.PERIOD_US)
    full = worlds.update_latents(latents.parent / "full", examples, 5 * worlds.PERIOD_US)
    assert manifest.content == full.content
    assert len(files(latents)) == 6


def test_wrong_settings_and_versions_are_refused(latents, examples, tmp_path):
    with pytest.raises(ConfigError, match="target_rows must be at least 1, found 0"):
        compact(latents, target_rows=0)
    with pytest.raises(ConfigError, match="retention must be positive, found -1"):
        expire(latents, -1)
    with pytest.raises(StoreError, match="no dataset version"):
        compact(tmp_path / "nothing")
    worlds.write_prepared(tmp_path / "prepared", examples)
    with pytest.raises(StoreError, match=r"kind 'prepared', expected 'latents'"):
        compact(tmp_path / "prepared")
    writer = replace(worlds.make_writer(tmp_path / "other"), period_us=None)
    writer.begin([(1, 0)])
    worlds.write_shard(writer, examples, 1, 0)
    writer.finish([(1, 0)], watermark_ts=2000)
    with pytest.raises(StoreError, match="does not say how long its periods are"):
        expire(tmp_path / "other", 10)
    assert hidden(tmp_path) == []


def test_shards_that_overlap_in_time_do_not_share_a_file(examples, tmp_path):
    writer = worlds.make_writer(tmp_path / "latents")
    writer.begin([(1, 0), (2, 0), (3, 0)])
    worlds.write_shard(writer, examples, 1, 0)
    for period in (2, 3):
        # the rows of period 5 under two other names
        chosen = worlds.shard_rows(examples, 5, 0)
        values, prob = worlds.latents_of(chosen["example_id"])
        names = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
        writer.write(period, 0, {**{n: chosen[n] for n in names}, "fm_prob": prob}, values)
    writer.begin([(1, 0), (2, 0), (3, 0), (4, 0)])
    worlds.write_shard(writer, examples, 4, 0)
    writer.finish([(1, 0), (2, 0), (3, 0), (4, 0)], watermark_ts=9000)
    before = worlds.tree_bytes(tmp_path / "latents")
    with pytest.raises(StoreError, match=r"periods 2 and 3 of bucket 0 .* overlap in time"):
        compact(tmp_path / "latents")
    assert worlds.tree_bytes(tmp_path / "latents") == before


def test_shards_of_another_code_stay_so_when_they_are_compacted(latents, examples, monkeypatch):
    written = read_manifest(latents).code_version
    monkeypatch.setattr("loopfm_ray.store.manifest.code_version", lambda: "newer")
    monkeypatch.setattr(offline, "code_version", lambda: "newer")
    assert compact(latents).code_version == written
    assert worlds.make_writer(latents).previous() is None


def test_a_longer_run_that_was_killed_leaves_no_expired_rows(latents, examples):
    """The whole compacted file was taken over, then a run that lets its first periods expire goes on."""
    compact(latents)
    shards, _ = worlds.shards_of(examples)
    inputs = {"prepared": "q"}
    writer = worlds.make_writer(latents, inputs=inputs)
    writer.begin(shards)
    previous = writer.previous()
    writer.take_over(previous, [place for place in shards if place[0] < 11 and place[1] == 0])
    assert writer.completed(1, 0).path == "period=0001-0010/bucket=000.parquet"
    retention_us = 3 * worlds.PERIOD_US
    manifest = worlds.update_latents(latents, examples, retention_us, inputs)
    full = worlds.update_latents(latents.parent / "full", examples, retention_us, inputs)
    assert manifest.content == full.content
    assert same_rows(rows(latents), rows(latents.parent / "full"))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("advance"), st.integers(1, 4)),
        st.tuples(st.just("late"), st.integers(0, 3)),
        st.tuples(st.just("change"), st.integers(0, 10**6)),
        st.tuples(st.just("compact"), st.sampled_from([1, 30, 90, 10**6])),
        st.tuples(st.just("expire"), st.integers(1, 8)),
    ),
    min_size=2,
    max_size=9,
)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), steps=STEPS)
def test_any_order_of_steps_gives_the_content_and_rows_of_a_full_rebuild(
    tmp_path_factory, seed, steps
):
    root = tmp_path_factory.mktemp("steps")
    log = worlds.make_examples(seed, num_rows=300, num_periods=10)
    lag = np.random.default_rng(seed).integers(0, 4, len(log["user"]))
    lag[np.random.default_rng(seed + 1).random(len(lag)) < 0.9] = 0
    until, patience, retention_us = 3, 0, None
    # flushing to disk, which is of no use here, takes most of the time
    with patch("os.fsync"):
        for number, (step, value) in enumerate([("advance", 0), *steps]):
            if step == "compact":
                before = read_manifest(root / "step").content
                assert compact(root / "step", target_rows=value).content == before
                continue
            if step == "expire":
                retention_us = min(value * worlds.PERIOD_US, retention_us or 2**60)
                expire(root / "step", retention_us)
                continue
            if step == "advance":
                until += value
            elif step == "late":
                patience = max(patience, value)
            else:
                log["item"][value % len(log["item"])] += 1
            # late events arrive once the log was read with enough patience
            arrived = (log["event_ts"] < until * worlds.PERIOD_US) & (lag <= patience)
            known = {name: values[arrived] for name, values in log.items()}
            inputs = {"prepared": str(number)}
            worlds.update_latents(root / "step", known, retention_us, inputs)
        stepped = read_manifest(root / "step")
        full = worlds.update_latents(root / "full", known, retention_us, inputs)
    verify(root / "step")
    assert stepped.content == full.content
    assert stepped.meta == full.meta
    assert same_rows(rows(root / "step"), rows(root / "full"))
    shutil.rmtree(root)


@pytest.mark.s3
def test_on_s3_rows_stay_when_compacted_and_expired_objects_go_with_the_next_commit(
    s3, examples, tmp_path, monkeypatch
):
    import tempfile

    from loopfm_ray.store.s3 import S3Folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, there = tmp_path / "latents", f"{s3}/latents"
    local = worlds.update_latents(here, examples)
    writer = worlds.make_writer(there, scratch=tmp_path / "scratch")
    shards, watermark_ts = worlds.shards_of(examples)
    writer.begin(shards)
    for place in shards:
        worlds.write_shard(writer, examples, *place)
    first = writer.finish(shards, watermark_ts=watermark_ts)
    assert first.content == local.content
    small = compact(there)
    assert (small.content, small.version) == (local.content, compact(here).version)
    assert same_rows(rows(there), rows(here))
    assert compact(there) == small
    gone = expire(there, 3 * worlds.PERIOD_US)
    assert gone.content == expire(here, 3 * worlds.PERIOD_US).content
    names = S3Folder.of(there).sizes()
    assert {name.split("/")[0] for name in names} == {"manifest.json", gone.data, small.data}
    # one more commit, and what had the expired rows is no longer there
    again = expire(there, 2 * worlds.PERIOD_US)
    names = S3Folder.of(there).sizes()
    assert {name.split("/")[0] for name in names} == {"manifest.json", again.data, gone.data}
    verify(there)
    assert not list(tmp_path.glob("loopfm-*"))
