"""The newest L codes of random users: the LMDB online store against Parquet shards and Lance; and the scan of a bucket.

`README.md` beside this file says what each key means.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from random_reads_data import History, make_history
from random_reads_stores import READERS, SCANS, Reader, write_stores

LIBRARIES = ("numpy", "pyarrow", "lmdb", "pylance")
BATCH_USERS = 128
Record = dict[str, Any]  # Any: JSON


def check(history: History, name: str, read: Reader, max_len: int) -> None:
    """Make sure that a contender gives the newest codes, oldest first."""
    users = np.random.default_rng(5).integers(0, history.num_users, 40)
    asked = [users[:1], *np.array_split(users[1:], 3)]
    for group in asked:
        for user, codes in zip(group, read(group.tolist(), max_len), strict=True):
            stop = history.starts[user + 1]
            expected = history.codes[max(history.starts[user], stop - max_len) : stop]
            if not np.array_equal(codes, expected):
                raise SystemExit(f"{name} gave other codes for user {user} than were written")


def measure(read: Reader, batches: Sequence[list[int]], max_len: int, budget_s: float) -> Record:
    """Time one call after another, for `budget_s` at most."""
    took = []
    used, began = time.process_time(), time.perf_counter()
    for users in batches:
        start = time.perf_counter()
        read(users, max_len)
        took.append(time.perf_counter() - start)
        if time.perf_counter() - began > budget_s:
            break
    used = time.process_time() - used
    num_reads = sum(map(len, batches[: len(took)]))
    return {
        "reads_per_s": num_reads / sum(took),
        "reads_per_cpu_s": num_reads / used,
        "p50_us": float(np.percentile(took, 50)) * 1e6,
        "p99_us": float(np.percentile(took, 99)) * 1e6,
        "num_calls": len(took),
    }


def random_batches(rng: np.random.Generator, num: int, size: int, users: int) -> list[list[int]]:
    return rng.integers(0, users, (num, size)).tolist()


def measure_reads(args: argparse.Namespace, readers: dict[str, Reader]) -> dict[str, Record]:
    """Return, for one user at a time and for batches, the figures of each contender; they take turns, the best counts."""
    found: dict[str, Record] = {}
    for label, size in (("one", 1), ("batch", BATCH_USERS)):
        best: Record = {}
        for turn in range(args.repeats + 1):
            rng = np.random.default_rng([size, turn])
            batches = random_batches(rng, args.reads // size + 1, size, args.users)
            for name, read in readers.items():
                budget_s = args.budget_s if turn else args.budget_s / 4
                record = measure(read, batches, args.max_len, budget_s)
                print(f"{label:6} {name:16} {json.dumps(record)}", file=sys.stderr)
                # the first turn warms up
                if turn and record["reads_per_s"] > best.get(name, {}).get("reads_per_s", 0):
                    best[name] = record
        found[label] = best
    return found


def measure_scans(
    args: argparse.Namespace, scans: dict[str, Callable[[int], int]]
) -> dict[str, float]:
    """Return the rows a second of reading the columns that the join needs, one bucket after another."""
    best = dict.fromkeys(scans, 0.0)
    for _ in range(args.repeats):
        for name, scan in scans.items():
            began = time.perf_counter()
            num_rows = sum(scan(bucket) for bucket in range(min(4, args.buckets)))
            best[name] = max(best[name], num_rows / (time.perf_counter() - began))
    return best


def ratios(
    found: dict[str, Record], base: str, key: str = "reads_per_s"
) -> dict[str, dict[str, float]]:
    """Return one figure of each contender / of `base`."""
    return {
        label: {n: r[key] / records[base][key] for n, r in records.items()}
        for label, records in found.items()
    }


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Write all stores, measure and return the keys that `README.md` explains."""
    history = make_history(args.users, args.events_per_user, args.buckets)
    seconds, num_bytes = write_stores(folder, history)
    readers = {name: make(folder, history) for name, make in READERS.items()}
    for name, read in readers.items():
        check(history, name, read, args.max_len)
    found = measure_reads(args, readers)
    scans = {name: functools.partial(scan, folder) for name, scan in SCANS.items()}
    scanned = measure_scans(args, scans)
    return {
        "reads": found,
        "ratio_to_lmdb": ratios(found, "lmdb"),
        "ratio_to_parquet": ratios(found, "parquet"),
        "cpu_ratio_to_lmdb": ratios(found, "lmdb", "reads_per_cpu_s"),
        "cpu_ratio_to_parquet": ratios(found, "parquet", "reads_per_cpu_s"),
        "scan_rows_per_s": scanned,
        "scan_ratio_to_parquet": {n: rate / scanned["parquet"] for n, rate in scanned.items()},
        "bytes_on_disk": num_bytes,
        "write_seconds": seconds,
        "sizes": {
            "users": args.users,
            "events": len(history.user),
            "max_len": args.max_len,
            "code_bytes": history.codes.shape[1],
            "buckets": args.buckets,
            "batch_users": BATCH_USERS,
        },
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only the reads")
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--events-per-user", type=int, default=50)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument("--reads", type=int, default=20_000, help="users asked for in one turn")
    parser.add_argument("--budget-s", type=float, default=5.0, help="most seconds of one turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, help="where the stores are written for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        found = report(args, Path(folder))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for label, records in found["reads"].items():
            for name, record in records.items():
                print(f"{label:6} {name:16} {record['reads_per_s']:12.0f} reads/s")


if __name__ == "__main__":
    # Lance starts a thread per core for compute; all contenders share the same cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
