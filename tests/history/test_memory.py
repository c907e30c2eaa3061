"""A join takes memory for a block, whatever the length of the log and the share of its longest user."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.rows import LATENTS_FORMAT, Rule, latents_schema, write_rows
from loopfm_ray.store.shards import shard_path
from loopfm_ray.store.tables import code_column, write_parquet
from tests.oracles import worlds

CODE = """
import re, sys, pathlib
import pyarrow
pyarrow.set_cpu_count(1)
pyarrow.set_io_thread_count(1)
from loopfm_ray.history.join import JoinSettings, JoinTask, join_bucket
from loopfm_ray.types import TimeRange

def peak():
    # not ru_maxrss: that begins at what the process that started this one had
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

folder, num_periods = pathlib.Path(sys.argv[1]), int(sys.argv[2])
examples = tuple((n, folder / f"examples/{n}.parquet") for n in range(num_periods))
task = lambda name, chosen, until: JoinTask(
    0, chosen, folder / "latents", folder / name, TimeRange(0, until), JoinSettings(5, None, 50_000)
)
# what is loaded once is there before the count begins
join_bucket(task("warm", examples[:1], 1000))
before = peak()
stats = join_bucket(task("out", examples, num_periods * 1_000_000))
print(stats.num_history_rows, stats.num_extra_rows, peak() - before)
"""
KEYED = """
from dataclasses import replace
from loopfm_ray.history.keyed import DealTask, PlaceTask, deal_bucket, join_place
from loopfm_ray.history.settings import KeyedPlaces

def join_bucket(task):
    settings = replace(task.settings, keys=(("item",),))
    task = replace(task, settings=settings, keyed=KeyedPlaces(task.out_dir / "dealt", 1))
    deal_bucket(DealTask(task, folder, 1, task.keyed.folder))
    place = PlaceTask(("item",), 0, (0,), worlds.SPEC, settings, task.keyed.folder, task.out_dir)
    stats = join_place(place)
    join_users(task)
    return stats
"""
# what an allocator keeps for later depends on which thread freed what: give back what is free, or the peak is a dice roll
GIVE_BACK = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
PERIOD_ROWS = 100_000
"""Two blocks."""


def write_log(folder, num_periods, share):
    """Write one bucket in which user 1 has `share` of all rows, and a fifth of the events arrive late."""
    rng = np.random.default_rng(0)
    schema = latents_schema(worlds.SPEC)
    with stage(folder / "latents") as staged:
        for period in range(num_periods):
            user = rng.integers(2, 5000, PERIOD_ROWS)
            user[rng.random(PERIOD_ROWS) < share] = 1
            event_ts = rng.integers(0, 1_000_000, PERIOD_ROWS) + period * 1_000_000
            order = np.lexsort((event_ts, user))
            user, event_ts = user[order], event_ts[order]
            late = np.where(rng.random(PERIOD_ROWS) < 0.2, rng.integers(0, 10_000, PERIOD_ROWS), 10)
            values = {
                "example_id": np.arange(PERIOD_ROWS) + period * PERIOD_ROWS,
                "user": user,
                "item": user,
                "event_ts": event_ts,
                "label_ts": event_ts,
                "available_ts": event_ts + late,
                "is_event": np.arange(PERIOD_ROWS) % 10 > 0,
                "fm_prob": np.full(PERIOD_ROWS, 0.5),
                "code": code_column(np.zeros((PERIOD_ROWS, worlds.SPEC.num_bytes), np.uint8)),
            }
            arrays = [pa.array(values[f.name]).cast(f.type) for f in schema]
            table = pa.Table.from_arrays(arrays, schema=schema)
            write_rows(table, staged / shard_path(period, 0), Rule())
            asked = table.select(["example_id", "user", "item", "event_ts", "label_ts"])
            write_parquet(asked, folder / f"examples/{period}.parquet")
        commit(
            staged,
            kind="latents",
            config_hash="x",
            inputs={},
            meta={
                "code_spec": worlds.SPEC.to_tree(),
                "latents_format": LATENTS_FORMAT,
                "delay_us": 0,
            },
            num_rows=PERIOD_ROWS * num_periods,
        )


def peak_of_join(folder, num_periods, share, code=CODE):
    """Return KiB that a join adds to what its process had."""
    write_log(folder, num_periods, share)
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(num_periods)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        env={**os.environ, **GIVE_BACK},
    )
    num_history_rows, num_extra_rows, peak = (int(value) for value in result.stdout.split())
    assert num_history_rows == num_periods * PERIOD_ROWS * 9 // 10
    assert num_extra_rows > 0
    return peak


@pytest.mark.timeout(600)
def test_memory_of_a_join_follows_neither_the_log_nor_its_skew(tmp_path):
    short = peak_of_join(tmp_path / "short", 5, 0.0)
    for num_periods, share in ((20, 0.0), (20, 0.1), (20, 1.0)):
        peak = peak_of_join(tmp_path / f"{share}", num_periods, share)
        assert peak < 1.5 * short, (share, peak, short)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_of_a_join_by_item_follows_neither_the_log_nor_its_skew(tmp_path):
    start = CODE.index("folder, num")
    head = CODE[:start].replace("join_bucket\n", "join_bucket as join_users\n")
    code = head + "from tests.oracles import worlds\n" + KEYED + CODE[start:]
    short = peak_of_join(tmp_path / "short", 5, 0.0, code)
    for num_periods, share in ((15, 0.0), (15, 1.0)):
        peak = peak_of_join(tmp_path / f"{share}", num_periods, share, code)
        print(f"share {share}: {peak} KiB, a third of the log: {short} KiB")  # noqa: T201
        assert peak < 1.5 * short, (share, peak, short)
