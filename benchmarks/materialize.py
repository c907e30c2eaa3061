"""Materialise, the whole job with its checks, against a bare loop over the same rows, and two workers against one.

`README.md` beside this file says what each key means.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from machine import describe_machine, print_found
from materialize_world import KINDS, write_world

HERE = Path(__file__).resolve().parent
LIBRARIES = ("numpy", "pyarrow", "torch", "ray")
Record = dict[str, Any]  # Any: JSON


def start(script: str, *args: object) -> "subprocess.Popen[str]":
    """Start one script of this folder with one thread."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **threads},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> Record:
    """Return the last line that a script printed, as JSON."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed with {process.returncode}; its log is above")
    return json.loads(out.strip().splitlines()[-1])


def speed(records: list[Record], seconds: str = "seconds") -> float:
    """Return rows a second of the best repeat: noise only adds."""
    return max(record["num_rows"] / record[seconds] for record in records)


def measure_pair(folder: Path, repeats: int) -> float:
    """Return how many times the rows a second of one bare loop two at once do: what the machine has to give."""
    for name in ("a", "b"):  # each writes beside its inputs
        place = folder / f"pair-{name}"
        place.mkdir()
        for part in ("prepared", "snapshot"):
            (place / part).symlink_to(folder / part)
    args = ("--contenders", "bare", "--repeats", repeats)
    alone = finish(start("materialize_loops.py", folder / "pair-a", *args))
    both = [start("materialize_loops.py", folder / f"pair-{name}", *args) for name in ("a", "b")]
    together = [finish(process) for process in both]
    return sum(speed(found["records"]["bare"]) for found in together) / speed(
        alone["records"]["bare"]
    )


def measure_bytes(out: Path, num_rows: int) -> Record:
    """Return the bytes that an embedded row takes on disk, after compression and before it, in all and for codes."""
    shards = sorted(out.glob("period=*/bucket=*.parquet"))
    encoded = codes = 0
    for path in shards:
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                encoded += column.total_uncompressed_size
                codes += column.total_compressed_size * (column.path_in_schema == "code")
    return {
        "bytes_per_event": sum(path.stat().st_size for path in shards) / num_rows,
        "encoded_bytes_per_event": encoded / num_rows,
        "code_bytes_per_event": codes / num_rows,
    }


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Make the data, measure everything and return the keys that `README.md` explains."""
    write_world(folder, args.data, args.rows, args.users)
    loops = finish(start("materialize_loops.py", folder, "--repeats", args.repeats))
    mine, bare = loops["records"]["ours"], loops["records"]["bare"]
    job = finish(start("materialize_ray.py", folder, "--repeats", args.ray_repeats))
    one, two = job["records"]["1"], job["records"]["2"]
    num_rows = one[0]["num_rows"]
    if len({record["version"] for record in [*one, *two]}) != 1:
        raise SystemExit("the version depends on the number of workers")
    return {
        "ratio_vs_bare_loop": speed(mine) / speed(bare),
        "cpu_ratio_vs_bare_loop": speed(mine, "cpu_seconds") / speed(bare, "cpu_seconds"),
        "ratio_two_workers": speed(two, "span_s") / speed(one, "span_s"),
        "ratio_two_workers_whole": speed(two, "whole_s") / speed(one, "whole_s"),
        "ratio_two_bare_loops": measure_pair(folder, 1),
        "ratio_ray_vs_bare_loop": speed(one, "span_s") / speed(bare),
        "ratio_ray_vs_bare_loop_whole": speed(one, "whole_s") / speed(bare),
        "rows_per_s": {
            "ours": speed(mine),
            "bare": speed(bare),
            "ray_one_worker": speed(one, "span_s"),
            "ray_two_workers": speed(two, "span_s"),
        },
        **measure_bytes(folder / "out", num_rows),
        "peak_rss_gib": loops["peak_rss_gib"],
        "peak_rss_gib_of_ray_worker": max(r["worker_peak_rss_gib"] for r in [*one, *two]),
        "ray_start_s": job["ray_start_s"],
        "records": {**loops["records"], "ray": job["records"]},
        "sizes": {
            "data": args.data,
            "num_rows": num_rows,
            "num_shards": one[0]["num_shards"],
            "repeats": args.repeats,
            "ray_repeats": args.ray_repeats,
        },
        "machine": {"threads": 1, **describe_machine(LIBRARIES)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--data", choices=KINDS, default="synthetic")
    parser.add_argument("--rows", type=int, default=1_500_000, help="of the generated log")
    parser.add_argument("--users", type=int, default=10_000, help="of the generated log")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray-repeats", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, help="where data is written for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        found = report(args, Path(folder))
    print_found(found, args.json)


if __name__ == "__main__":
    main()
