"""What latents take on disk and how fast a bucket is read: today's encoding against plain Parquet, and compaction.

Prints JSON. Without arguments it makes a synthetic shard in which every number is as hard to encode as a log's can be:
microsecond times, ids of a large log, items of a wide catalogue. `--latents PATH` measures a version that is there, such
as `runs/demo/seed=0/latents`. Plain Parquet is what Arrow writes by default, with zstd: dictionaries, absolute times.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.history.order import time_order
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.compact import compact
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import Rule, latents_schema, read_rows, write_rows
from loopfm_ray.store.sizes import measure_sizes, online_event_bytes

SPEC = CodeSpec(4, 32)
DAY_US = 86_400_000_000
START_TS = 1_704_067_200_000_000


def make_rows(num_rows: int, num_users: int, span_us: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return columns of rows in time order; one row in three is an event."""
    rng = np.random.default_rng(seed)
    event_ts = START_TS + np.sort(rng.integers(0, span_us, num_rows))
    return {
        "example_id": np.sort(rng.integers(0, 16 * num_rows, num_rows)),
        "user": rng.integers(1, num_users, num_rows).astype(np.int32),
        "item": np.minimum(rng.pareto(1.0, num_rows) * 5_000, 999_999).astype(np.int32),
        "event_ts": event_ts,
        "label_ts": event_ts + 3_600_000_000,
        "is_event": rng.random(num_rows) < 1 / 3,
        "fm_prob": rng.random(num_rows).astype(np.float32),
    }


def make_table(columns: dict[str, np.ndarray], rule: Rule) -> pa.Table:
    """Return the rows, sorted, with random codes, which nothing can compress."""
    order = time_order(columns["user"], columns["event_ts"], columns["example_id"])
    ready = {name: values[order] for name, values in columns.items()}
    ready["available_ts"] = rule.available(ready["event_ts"], ready["label_ts"])
    codes = np.random.default_rng(1).bytes(len(order) * SPEC.num_bytes)
    code = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(SPEC.num_bytes), len(order), [None, pa.py_buffer(codes)]
    )
    schema = latents_schema(SPEC)
    arrays = [code if name == "code" else pa.array(ready[name]) for name in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)


def best_s(call: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def footer_sizes(path: Path) -> tuple[float, float]:
    """Return bytes of a row encoded and in the file."""
    footer = pq.read_metadata(path)
    encoded = sum(footer.row_group(n).total_byte_size for n in range(footer.num_row_groups))
    return encoded / footer.num_rows, path.stat().st_size / footer.num_rows


def measure_encoding(num_rows: int, repeats: int, folder: Path) -> dict[str, object]:
    """Compare the files of the store with plain Parquet on one synthetic shard."""
    rule = Rule(delay_us=7_200_000_000, waits_for_label=True)
    table = make_table(make_rows(num_rows, num_rows // 20 + 2, 7 * DAY_US), rule)
    ours, plain = folder / "ours.parquet", folder / "plain.parquet"
    writes = {
        "ours": lambda: write_rows(table, ours, rule),
        "plain": lambda: pq.write_table(table, plain, compression="zstd", row_group_size=1 << 18),
    }
    reads = {
        "ours": lambda: read_rows(ours, SPEC),
        "plain": lambda: pq.read_table(plain, partitioning=None),
    }
    write_s = {name: best_s(call, repeats) for name, call in writes.items()}
    read_s = {name: best_s(call, repeats) for name, call in reads.items()}
    assert read_rows(ours, SPEC).equals(table)
    sizes = {name: footer_sizes(path) for name, path in (("ours", ours), ("plain", plain))}
    return {
        "num_rows": num_rows,
        "code_bytes": SPEC.num_bytes,
        "encoded_bytes_per_event": {name: size[0] for name, size in sizes.items()},
        "disk_bytes_per_event": {name: size[1] for name, size in sizes.items()},
        "write_s": write_s,
        "read_s": read_s,
        "read_ratio": read_s["ours"] / read_s["plain"],
        "write_ratio": write_s["ours"] / write_s["plain"],
        "online_bytes_per_event": online_event_bytes(SPEC),
    }


def measure_compaction(
    num_periods: int, rows: int, repeats: int, folder: Path
) -> dict[str, object]:
    """Write one bucket of daily periods, compact it, and read it before and after."""
    writer = LatentsWriter(
        folder / "latents", "s", START_TS - 1, SPEC, 0, False, {}, period_us=DAY_US
    )
    columns = make_rows(num_periods * rows, 2_000, num_periods * DAY_US)
    period = (columns["event_ts"] - START_TS) // DAY_US
    shards = [(int(number), 0) for number in np.unique(period)]
    writer.begin(shards)
    rng = np.random.default_rng(2)
    for number, bucket in shards:
        chosen = {name: values[period == number] for name, values in columns.items()}
        latents = rng.normal(size=(len(chosen["user"]), SPEC.dim)).astype(np.float32)
        writer.write(number, bucket, chosen, latents)
    writer.finish(shards, watermark_ts=int(columns["event_ts"].max()))
    result: dict[str, object] = {"num_periods": len(shards), "num_rows": len(period)}
    contents = []
    for name in ("before", "after"):
        reader = LatentsReader(folder / "latents")
        sizes = measure_sizes(folder / "latents")
        result[name] = {
            "num_files": sizes.num_files,
            "disk_bytes_per_event": sizes.disk_bytes_per_event,
            "read_s": best_s(lambda reader=reader: reader.read_bucket(0), repeats),
        }
        contents.append((reader.manifest.content, reader.read_bucket(0)))
        if name == "before":
            began = time.perf_counter()
            compact(folder / "latents")
            result["compact_s"] = time.perf_counter() - began
    assert contents[0][0] == contents[1][0]
    assert contents[0][1].equals(contents[1][1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="what is printed in any case")
    parser.add_argument("--latents", type=Path, help="a latents version to measure")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--periods", type=int, default=365)
    parser.add_argument("--period-rows", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.latents:
        sizes = measure_sizes(args.latents)
        found = {
            "num_rows": sizes.num_rows,
            "num_files": sizes.num_files,
            "encoded_bytes_per_event": sizes.encoded_bytes_per_event,
            "disk_bytes_per_event": sizes.disk_bytes_per_event,
            "columns": sizes.per_event,
        }
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = {
                "encoding": measure_encoding(args.rows, args.repeats, Path(folder)),
                "compaction": measure_compaction(
                    args.periods, args.period_rows, args.repeats, Path(folder)
                ),
            }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
