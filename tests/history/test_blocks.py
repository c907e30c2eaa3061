"""The join gives the same bytes whatever the size of a block, and they are right."""

import errno
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import StoreError
from loopfm_ray.history import blocks, slabs, spill
from loopfm_ray.history.join import JoinSettings, JoinTask, StoredSide, join_bucket
from loopfm_ray.store import columns, tables
from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.rows import LATENTS_FORMAT, Rule, latents_schema, write_rows
from loopfm_ray.store.shards import shard_path
from loopfm_ray.store.tables import code_column, map_ipc, write_parquet
from loopfm_ray.types import TimeRange
from tests.oracles import worlds
from tests.oracles.asof import newest_visible_slow

PERIOD_US = 10
SIDE = StoredSide(label="click", event_type="kind")
BLOCK_ROWS = st.sampled_from([1, 2, 3, 5, 8, 13, 40])


@dataclass(frozen=True)
class Log:
    """Rows of one bucket, one of them per example id, and what is asked of them."""

    user: list[int]
    event_ts: list[int]
    available_ts: list[int]
    is_event: list[bool]
    start_ts: int
    stop_ts: int
    settings: JoinSettings


@st.composite
def logs(draw, max_rows=40):
    """Logs of several periods: few distinct times, few users or one that has most rows, clocks that disagree."""
    num = draw(st.integers(0, max_rows))
    num_periods = draw(st.integers(1, 4))
    last_ts = num_periods * PERIOD_US - 1
    users = draw(
        st.sampled_from(
            [st.just(3), st.integers(0, 2), st.sampled_from([0, 7, 7, 7, 7, 2**31 - 1])]
        )
    )
    late = draw(st.sampled_from([st.just(2), st.integers(-3, 5), st.integers(0, 60)]))
    event_ts = draw(st.lists(st.integers(0, last_ts), min_size=num, max_size=num))
    each = {"min_size": num, "max_size": num}
    retention_us = draw(st.one_of(st.none(), st.integers(1, 20)))
    start_ts = draw(st.integers(0, last_ts))
    return Log(
        user=draw(st.lists(users, **each)),
        event_ts=event_ts,
        available_ts=[t + d for t, d in zip(event_ts, draw(st.lists(late, **each)), strict=True)],
        is_event=draw(st.lists(st.sampled_from([True, True, False]), **each)),
        start_ts=start_ts,
        stop_ts=draw(st.integers(start_ts + 1, last_ts + 3)),
        settings=JoinSettings(
            draw(st.integers(1, 6)), retention_us, with_own_latent=True, side=SIDE
        ),
    )


def shard_of(log, rows, rng):
    """Return the latents of some rows, sorted as a shard is."""
    rows = rows[np.lexsort((rows, np.array(log.event_ts)[rows], np.array(log.user)[rows]))]
    values = {
        "example_id": rows,
        "user": np.array(log.user)[rows],
        "item": rng.integers(0, 9, len(rows)),
        "event_ts": np.array(log.event_ts)[rows],
        "label_ts": np.array(log.event_ts)[rows],
        "available_ts": np.array(log.available_ts)[rows],
        "is_event": np.array(log.is_event, dtype=bool)[rows],
        "fm_prob": rng.random(len(rows)),
        "code": None,
    }
    packed = rng.integers(0, 256, (len(rows), worlds.SPEC.num_bytes), dtype=np.uint8)
    schema = latents_schema(worlds.SPEC)
    arrays = [
        code_column(packed)
        if field.name == "code"
        else pa.array(values[field.name]).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_log(folder, log):
    """Write one bucket of latents and its examples; return the task that joins them."""
    rng = np.random.default_rng(0)
    period = np.array(log.event_ts, dtype=np.int64) // PERIOD_US
    examples = []
    with stage(folder / "latents") as staged:
        for number in range(5):
            rows = np.flatnonzero(period == number)
            if not len(rows):
                continue
            table = shard_of(log, rows, rng)
            write_rows(table, staged / shard_path(number, 0), Rule())
            path = folder / f"examples/period={number:04d}.parquet"
            shuffled = table.take(pa.array(rng.permutation(table.num_rows)))
            asked = shuffled.select(["item", "event_ts", "label_ts", "example_id", "user"])
            ids = asked.column("example_id").to_numpy()
            asked = asked.append_column("click", pa.array((ids % 2).astype(np.float32)))
            asked = asked.append_column("kind", pa.array((ids % 5).astype(np.int32)))
            text = pa.array([None if row % 3 == 0 else [row] * (row % 4) for row in rows])
            write_parquet(asked.append_column("list", text), path)
            examples.append((number, path))
        meta = {
            "code_spec": worlds.SPEC.to_tree(),
            "latents_format": LATENTS_FORMAT,
            "delay_us": 0,
        }
        commit(
            staged, kind="latents", config_hash="x", inputs={}, meta=meta, num_rows=len(log.user)
        )
    time_range = TimeRange(log.start_ts, log.stop_ts)
    earlier = tuple(part for part in examples if (part[0] + 1) * PERIOD_US <= log.start_ts)
    asked = tuple(part for part in examples if part not in earlier)
    return JoinTask(0, asked, folder / "latents", folder / "out", time_range, log.settings, earlier)


def joined(task, out_dir, block_rows):
    """Return the stats and the files of a join in blocks."""
    chosen = replace(task.settings, block_rows=block_rows)
    stats = join_bucket(replace(task, out_dir=out_dir, settings=chosen))
    return stats, worlds.tree_bytes(out_dir)


def expected(log):
    """Return example_id -> history as example ids, from the slow twin over the raw rows."""
    num = len(log.user)
    rows = [i for i in range(num) if log.is_event[i] and log.event_ts[i] < log.stop_ts]
    rows.sort(key=lambda i: (log.user[i], log.event_ts[i], i))
    asked = [i for i in range(num) if log.start_ts <= log.event_ts[i] < log.stop_ts]
    answers = newest_visible_slow(
        ([log.user[i] for i in asked], [log.event_ts[i] for i in asked]),
        tuple([column[i] for i in rows] for column in (log.user, log.event_ts, log.available_ts)),
        log.settings.max_len,
        log.settings.retention_us,
    )
    return {i: [rows[row] for row in answer] for i, answer in zip(asked, answers, strict=True)}


@pytest.fixture(scope="module")
def small_parts():
    """Make every internal part small, so that small logs cross its borders."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tables, "sync", lambda path: None)
        monkeypatch.setattr(blocks, "_MAX_BINS", 4)
        monkeypatch.setattr(slabs, "_MOST_COPIES", 8)
        monkeypatch.setattr(slabs, "_PIECE_ROWS", 3)
        monkeypatch.setattr(columns, "_COPY_BYTES", 16)
        monkeypatch.setattr(tables, "_ROW_GROUP", 7)
        yield


@given(log=logs(), block_rows=BLOCK_ROWS)
@settings(max_examples=150, deadline=None)
def test_blocks_of_any_size_give_the_same_bytes_and_the_slow_twins_answers(
    log, block_rows, tmp_path_factory, small_parts
):
    folder = tmp_path_factory.mktemp("log")
    task = write_log(folder, log)
    whole = joined(task, folder / "whole", 1000)
    assert joined(task, folder / "blocks", block_rows) == whole

    table = map_ipc(folder / "whole/history/bucket=000.arrow").to_pylist()
    for event in table:
        told = [event[name] for name in ("label", "label_ts", "event_type")]
        number = event["example_id"]
        assert told == [number % 2, log.event_ts[number], number % 5]
    ids = [event["example_id"] for event in table]
    seen = {}
    for path in sorted((folder / "whole").glob("requests/*/*.parquet")):
        for row in pq.read_table(path, partitioning=None).to_pylist():
            start = row["latent_start"]
            seen[row["example_id"]] = ids[start : start + row["latent_len"]]
    assert seen == expected(log)


@given(log=logs(max_rows=150), block_rows=st.sampled_from([7, 16, 32]))
@settings(max_examples=40, deadline=None)
def test_longer_logs_give_the_same_bytes(log, block_rows, tmp_path_factory, small_parts):
    folder = tmp_path_factory.mktemp("log")
    task = write_log(folder, log)
    whole = joined(task, folder / "whole", 1000)
    assert joined(task, folder / "blocks", block_rows) == whole


def random_log(num_rows, users, late_us, seed=0):
    """Return a log of four periods with a request for each row of the last two."""
    rng = np.random.default_rng(seed)
    event_ts = rng.integers(0, 4 * PERIOD_US, num_rows)
    late = rng.integers(1, late_us + 1, num_rows)
    return Log(
        user=rng.choice(users, num_rows).tolist(),
        event_ts=event_ts.tolist(),
        available_ts=(event_ts + late).tolist(),
        is_event=(rng.random(num_rows) < 0.8).tolist(),
        start_ts=2 * PERIOD_US,
        stop_ts=4 * PERIOD_US,
        settings=JoinSettings(5, 18),
    )


@pytest.mark.parametrize("late_us", [1, 25])
@pytest.mark.parametrize("users", [[5], [5] * 9 + [1, 2, 9], list(range(200))])
def test_one_user_most_rows_of_one_user_and_many_users(users, late_us, tmp_path, small_parts):
    task = write_log(tmp_path, random_log(2000, users, late_us))
    whole = joined(task, tmp_path / "whole", 10_000)
    assert whole[0].num_requests > 900
    assert (whole[0].num_extra_rows > 0) == (late_us > 1)
    for block_rows in (60, 500):
        assert joined(task, tmp_path / f"{block_rows}", block_rows) == whole


def test_nothing_is_left_beside_the_files(tmp_path, small_parts):
    task = write_log(tmp_path, random_log(300, [1, 1, 1, 2], 25))
    joined(task, tmp_path / "out", 20)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"history", "requests"}


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    task = write_log(tmp_path, random_log(300, [1, 2], 25))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", full)
    with pytest.raises(StoreError, match="no space left"):
        joined(task, tmp_path / "out", 20)


def test_rows_of_equal_keys_make_a_block_larger_than_asked_for(tmp_path):
    schema = pa.schema([("a", pa.int64()), ("b", pa.int64())])
    table = pa.table({"a": [1, 1, 2, 2, 2, 2], "b": [3, 3, 1, 1, 1, 2]}, schema=schema)
    cutting = blocks.Cutting(("a", "b"), schema, schema, tmp_path, 2)

    def source(columns):
        return iter([table.select(columns)])

    cut = list(blocks.cut_into_blocks(source, source, 6, cutting))
    assert [block.rows.to_pydict() for block in cut] == [
        {"a": [1, 1], "b": [3, 3]},
        {"a": [2, 2, 2], "b": [1, 1, 1]},
        {"a": [2], "b": [2]},
    ]
    assert [block.user for block in cut] == [None, 2, 2]
    assert all(block.requests == block.rows for block in cut)
