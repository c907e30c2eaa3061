"""The on-disk path of the history join on a log of any length: split by bucket of users, then join bucket by bucket.

The log comes in blocks, in time order, and is written as the shards of a "latents" version, one per block and bucket; then
`history.join.join_bucket` does one bucket after another, as a worker would. A longer log has more blocks and the same number
of buckets, so only the size of a join's block bounds its memory. Prints one JSON line with the peak RSS of the process while it joined.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from history_contenders import peak_rss_gib
from history_data import CASES, CODE_BYTES, SPAN_S, make_codes, make_events, make_requests, start_ts

from loopfm_ray.data.runs import runs
from loopfm_ray.history.join import JoinSettings, JoinTask, join_bucket, merge_stats
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.offline import latents_schema, shard_path
from loopfm_ray.store.rows import LATENTS_FORMAT, Rule, write_rows
from loopfm_ray.store.tables import write_parquet
from loopfm_ray.types import TimeRange

SPEC = CodeSpec(bits=4, dim=2 * CODE_BYTES)
Files = dict[int, list[tuple[int, Path]]]


def make_block(
    block: int, sizes: tuple[int, int, int], span_s: int, case: str = "uniform"
) -> pa.Table:
    """Return block `block` of the log: its events and its requests as rows of a latents shard, not sorted.

    `sizes` are the numbers of events, requests and users.
    """
    num_events, num_requests, num_users = sizes
    rng = np.random.default_rng([7, block])
    events = make_events(rng, num_events, num_users, case, span_s)
    asked = make_requests(rng, num_requests, num_users, case, span_s)
    shift = block * span_s * 1_000_000
    num_rows = num_events + num_requests
    event_ts = np.concatenate([events["event_ts"], asked["request_ts"]]) + shift
    example_id = block * num_rows + np.concatenate(
        [events["example_id"], num_events + np.arange(num_requests)]
    )
    columns = {
        "example_id": example_id,
        "user": np.concatenate([events["user"], asked["user"]]),
        "item": np.zeros(num_rows, dtype=np.int32),
        "event_ts": event_ts,
        "label_ts": event_ts,
        "available_ts": np.concatenate([events["available_ts"], asked["request_ts"]]) + shift,
        "is_event": np.arange(num_rows) < num_events,
        "fm_prob": np.full(num_rows, 0.5, dtype=np.float32),
    }
    arrays = [pa.array(values) for values in columns.values()]
    codes = pa.py_buffer(make_codes(example_id).reshape(-1))
    arrays.append(
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(CODE_BYTES), num_rows, [None, codes])
    )
    return pa.Table.from_arrays(arrays, schema=latents_schema(SPEC))


def split(table: pa.Table, num_buckets: int) -> list[tuple[int, pa.Table]]:
    """Return the rows of each bucket of users, sorted as a shard is."""
    # users are numbered at random here, so the remainder is as good as a hash
    bucket = table.column("user").to_numpy() % num_buckets
    keys = (table.column(name).to_numpy() for name in ("example_id", "event_ts", "user"))
    order = np.lexsort((*keys, bucket))
    rows = table.take(pa.array(order))
    return [(int(value), rows.slice(a, b - a)) for value, a, b in runs(bucket[order])]


def write_log(folder: Path, args: argparse.Namespace) -> Files:
    """Write the log as a latents version and, beside it, the requests of every bucket as examples."""
    num_blocks = -(-args.events // args.block_rows)
    sizes = (args.events // num_blocks, args.requests // num_blocks, args.users)
    files: Files = {}
    with stage(folder / "latents") as staged:
        for block in range(num_blocks):
            table = make_block(block, sizes, SPAN_S // 30, args.case)
            for bucket, rows in split(table, args.buckets):
                write_rows(rows, staged / shard_path(block, bucket), Rule())
                asked = rows.filter(pa.array(~rows.column("is_event").to_numpy()))
                path = folder / "examples" / f"bucket={bucket:03d}" / f"period={block:04d}.parquet"
                write_parquet(asked.select(["example_id", "user", "event_ts", "label_ts"]), path)
                files.setdefault(bucket, []).append((block, path))
        meta = {"code_spec": SPEC.to_tree(), "latents_format": LATENTS_FORMAT, "delay_us": 0}
        commit(
            staged,
            kind="latents",
            config_hash="benchmark",
            inputs={},
            meta=meta,
            num_rows=num_blocks * (sizes[0] + sizes[1]),
        )
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("events", "requests", "users", "buckets", "block-rows", "join-block-rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--case", choices=CASES, default="uniform")
    args = parser.parse_args()
    began = time.perf_counter()
    files = write_log(args.folder, args)
    split_gib = peak_rss_gib()
    # from here on the peak is that of the join
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    wrote = time.perf_counter()
    end_ts = start_ts() + 10 * 365 * 86_400 * 1_000_000
    stats = merge_stats(
        [
            join_bucket(
                JoinTask(
                    bucket,
                    tuple(found),
                    args.folder / "latents",
                    args.folder / "joined",
                    TimeRange(start_ts(), end_ts),
                    JoinSettings(args.max_len, block_rows=args.join_block_rows),
                )
            )
            for bucket, found in sorted(files.items())
        ]
    )
    record = {
        "peak_rss_gib": peak_rss_gib(),
        "split_peak_rss_gib": split_gib,
        "split_seconds": wrote - began,
        "join_seconds": time.perf_counter() - wrote,
        "num_buckets": args.buckets,
        "num_requests": stats.num_requests,
        "num_history_rows": stats.num_history_rows,
        "mean_length": stats.mean_length,
    }
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main()
