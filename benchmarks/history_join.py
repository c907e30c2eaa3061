"""The newest L visible history rows of every request: ours against DuckDB, Polars and Feast, in one run on one machine.

Each measurement is a process of its own, contenders take turns, and the best of the repeats counts. `README.md` beside
this file says what each key means.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from history_data import CASES, read_case
from machine import describe_machine, print_found

HERE = Path(__file__).resolve().parent
DUCKDB = ("duckdb_asof", "duckdb_window")
POLARS = ("polars_asof", "polars_window", "polars_search")
PEERS = (*DUCKDB, *POLARS)
LIBRARIES = ("numpy", "pyarrow", "duckdb", "polars")
FEAST_SIZES = {"events": 400_000, "requests": 5_000, "users": 2_000}
Record = dict[str, Any]  # Any: JSON


def run_script(name: str, *args: object, python: str = sys.executable, **env: str) -> str:
    """Run one script of this folder and return its last line on stdout."""
    root = str(HERE.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, str(HERE / name), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def measure(args: argparse.Namespace, folder: Path, contender: str, *options: object) -> Record:
    """Run one contender once."""
    line = run_script(
        "history_contenders.py",
        contender,
        folder,
        "--max-len",
        args.max_len,
        *options,
        BENCH_THREADS=str(args.threads),
        POLARS_MAX_THREADS=str(args.threads),
    )
    print(
        f"{folder.name:8} {contender:14} {' '.join(map(str, options)):20} {line}", file=sys.stderr
    )
    return json.loads(line)


def measure_rounds(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[Record]]]:
    """Return the records of `slices` and `codes` of the uniform case, and of ours in the other cases."""
    runs: dict[str, dict[str, list[Record]]] = {
        name: {} for name in ("slices", "codes", *CASES[1:])
    }
    for turn in range(args.repeats):
        names = ("ours", *PEERS)
        shift = turn % len(names)
        oracle = ("--oracle-sample", args.oracle_sample) if turn == 0 else ()
        for name in names[shift:] + names[:shift]:
            checked = oracle if name == "ours" else ()
            found = measure(args, folder / "uniform", name, *checked)
            runs["slices"].setdefault(name, []).append(found)
            found = measure(args, folder / "uniform", name, "--codes")
            runs["codes"].setdefault(name, []).append(found)
        for case in CASES[1:]:
            found = measure(args, folder / case, "ours", *oracle)
            runs[case].setdefault("ours", []).append(found)
    for name in PEERS:  # late arrivals are none of the peers' formulations: a prefix is not visible
        runs["skew"][name] = [measure(args, folder / "skew", name)]
    return runs


def best(records: list[Record], key: str = "seconds") -> float:
    """Return the least of the repeats: noise only adds."""
    return min(record[key] for record in records)


def ratio(figure: dict[str, list[Record]], key: str = "seconds") -> float:
    """Return how much longer the best peer takes than we do."""
    return min(best(figure[name], key) for name in PEERS) / best(figure["ours"], key)


def all_equal(runs: dict[str, dict[str, list[Record]]]) -> bool:
    """Whether all contenders gave one answer in every case, and ours is the oracle's on the samples."""
    for figure in runs.values():
        if len({record["digest"] for records in figure.values() for record in records}) != 1:
            return False
    checked = [runs[name]["ours"][0]["equal_to_oracle"] for name in ("slices", *CASES[1:])]
    return all(checked)


def measure_growth(args: argparse.Namespace, folder: Path) -> Record:
    """Run the on-disk path on a log, on one four times longer and on one with a user who has a tenth of all events."""
    found = {}
    buckets = max(1, args.events // (4 * args.block_rows))
    for name, times, case in (
        ("1x", 1, "uniform"),
        ("4x", 4, "uniform"),
        ("skew", 1, "skew"),
        ("late", 1, "late"),
    ):
        sizes = (f"--{size}={getattr(args, size) * times}" for size in ("events", "requests"))
        with tempfile.TemporaryDirectory(dir=folder) as work:
            line = run_script(
                "history_growth.py",
                work,
                *sizes,
                f"--users={args.users}",
                f"--buckets={buckets}",
                f"--block-rows={args.block_rows}",
                f"--join-block-rows={args.join_block_rows or args.block_rows}",
                f"--max-len={args.max_len}",
                f"--case={case}",
            )
        print(f"on disk, {name}: {line}", file=sys.stderr)
        found[name] = json.loads(line)
    uniform = found["1x"]
    return {
        "peak_rss_growth_at_4x": found["4x"]["peak_rss_gib"] / uniform["peak_rss_gib"],
        "peak_rss_gib_on_disk": uniform["peak_rss_gib"],
        "join_seconds_growth_at_4x": found["4x"]["join_seconds"] / uniform["join_seconds"],
        **{
            f"{case}_on_disk": {
                key: found[case][of] / uniform[of]
                for key, of in (("seconds_ratio", "join_seconds"), ("peak_ratio", "peak_rss_gib"))
            }
            for case in ("skew", "late")
        },
        "on_disk": found,
    }


def measure_feast(args: argparse.Namespace, folder: Path) -> Record:
    """Return how much longer Feast's Ray store takes for the last row than we for the newest L, and its correctness."""
    folder = folder / "feast"
    sizes = {name: min(getattr(args, name), size) for name, size in FEAST_SIZES.items()}
    run_script("history_data.py", folder, *(f"--{name}={size}" for name, size in sizes.items()))
    mine = [measure(args, folder, "ours") for _ in range(args.repeats)]
    line = run_script("feast_ray.py", folder, python=args.feast_python, FEAST_USAGE="False")
    found = json.loads(line)
    events, requests = read_case(folder)
    # readiness repeats, and Feast has no rule for ties: the instant of the row it gives must be right
    ready = np.full(events.num_rows + 1, -1)
    instants = [events.column(name).to_numpy() for name in ("event_ts", "available_ts")]
    ready[events.column("example_id").to_numpy()] = np.maximum(instants[0] + 1, instants[1])
    right = ready[np.load(folder / "feast_newest.npy")] == last_ready(events, requests, ready)
    return {
        "ratio_vs_feast_ray": found["seconds"] / best(mine),
        "feast_ray": {
            "seconds": found["seconds"],
            "seconds_ours": best(mine),
            "share_right": float(np.mean(right)),
            "sizes": sizes,
            "versions": found["versions"],
        },
    }


def last_ready(events: pa.Table, requests: pa.Table, ready: np.ndarray) -> np.ndarray:
    """Return [R] the instant of the last row ready at each request, -1 for none."""
    by_user: dict[int, list[int]] = {}
    users, ids = (events.column(name).to_pylist() for name in ("user", "example_id"))
    for user, example_id in zip(users, ids, strict=True):
        by_user.setdefault(user, []).append(int(ready[example_id]))
    times = {user: np.sort(found) for user, found in by_user.items()}
    none = np.zeros(0, dtype=np.int64)
    asked = zip(
        *(requests.column(name).to_pylist() for name in ("user", "request_ts")), strict=True
    )
    return np.array(
        [
            max((int(t) for t in times.get(user, none)[: _count(times, user, ts)][-1:]), default=-1)
            for user, ts in asked
        ]
    )


def _count(times: dict[int, np.ndarray], user: int, request_ts: int) -> int:
    return int(np.searchsorted(times[user], request_ts, "right")) if user in times else 0


def seconds_table(
    runs: dict[str, dict[str, list[Record]]], key: str
) -> dict[str, dict[str, float]]:
    """Return the best of one figure for each case and contender."""
    return {
        case: {name: best(records, key) for name, records in figure.items()}
        for case, figure in runs.items()
    }


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Make the logs, measure everything and return the keys that `README.md` explains."""
    for case in CASES:
        sizes = (f"--{name}={getattr(args, name)}" for name in ("events", "requests", "users"))
        run_script("history_data.py", folder / case, f"--case={case}", *sizes)
    runs = measure_rounds(args, folder)
    mine = best(runs["slices"]["ours"])
    return {
        "ratio_vs_best_of_duckdb_polars": ratio(runs["slices"]),
        "ratio_vs_best_of_duckdb_polars_codes": ratio(runs["codes"]),
        "cpu_ratio_vs_best_of_duckdb_polars": ratio(runs["slices"], "cpu_seconds"),
        "cpu_ratio_vs_best_of_duckdb_polars_codes": ratio(runs["codes"], "cpu_seconds"),
        "equal_to_oracle": all_equal(runs),
        "peak_rss_gib": max(
            record["peak_rss_gib"] for name in ("slices", "codes") for record in runs[name]["ours"]
        ),
        "skew_slowdown": best(runs["skew"]["ours"]) / mine,
        "late_slowdown": best(runs["late"]["ours"]) / mine,
        **(measure_growth(args, folder) if args.growth else {}),
        **(measure_feast(args, folder) if args.feast_python else {}),
        "seconds": seconds_table(runs, "seconds"),
        "cpu_seconds": seconds_table(runs, "cpu_seconds"),
        "peak_rss_gib_of": seconds_table(runs, "peak_rss_gib"),
        "num_history_rows": runs["slices"]["ours"][0]["num_history_rows"],
        "sizes": {
            name: getattr(args, name)
            for name in (
                "events",
                "requests",
                "users",
                "max_len",
                "repeats",
                "block_rows",
                "join_block_rows",
            )
        },
        "machine": {"threads": args.threads, **describe_machine(LIBRARIES)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only the first")
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--block-rows", type=int, default=1_000_000)
    parser.add_argument("--join-block-rows", type=int, help="as --block-rows if not given")
    parser.add_argument("--oracle-sample", type=int, default=200)
    parser.add_argument("--no-growth", dest="growth", action="store_false")
    parser.add_argument("--feast-python", help="interpreter of an environment with feast 0.67")
    parser.add_argument("--work-dir", type=Path, help="where the logs are written for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        found = report(args, Path(folder))
    print_found(found, args.json)


if __name__ == "__main__":
    main()
