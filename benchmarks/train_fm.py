"""Training of the FM under Ray Train against a bare loop over tensors in memory, and two workers against one, in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine, print_found
from materialize_world import KINDS as LOGS
from train_turns import end_turn, per_second, run_turn, start_turn

CONTENDERS = {
    "files": ("files", 1),
    "ray_data": ("ray_data", 1),
    "files_two_workers": ("files", 2),
    "ray_data_two_workers": ("ray_data", 2),
    "bare": ("bare", 1),
}
"""What a turn is asked for, and its workers."""
LIBRARIES = ("numpy", "pyarrow", "torch", "ray")
Record = dict[str, Any]  # Any: JSON


def measure(sizes: Record, repeats: int) -> dict[str, list[Record]]:
    """Return the turns of each contender."""
    turns: dict[str, list[Record]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, (contender, workers) in CONTENDERS.items():
            turns[name].append(run_turn("fm", contender, {**sizes, "workers": workers}))
    return turns


def measure_pair(sizes: Record, repeats: int) -> list[Record]:
    """Return the turns of two bare loops at once, taken together: what the machine has to give to two processes."""
    found = []
    for _ in range(repeats):
        pair = [end_turn(turn) for turn in [start_turn("fm", "bare", sizes) for _ in range(2)]]
        seconds = max(record["seconds"] for record in pair)
        found.append({"num": sum(record["num"] for record in pair), "seconds": seconds})
    return found


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Make the data, measure all and return the keys that `README.md` explains."""
    names = ("data", "log_rows", "users", "rows", "batch", "lr")
    given = {name: getattr(args, name) for name in names}
    sizes = {**given, "folder": str(folder), "epochs": args.epochs + 1, "workers": 1, "seed": 0}
    run_turn("fm_world", "none", sizes)
    turns = measure(sizes, args.repeats)
    pair = measure_pair(sizes, args.repeats)
    speed = {name: per_second(of) for name, of in turns.items()}
    per_cpu_s = {name: per_second(of, "cpu_seconds") for name, of in turns.items()}
    return {
        "ratio_vs_bare_loop": speed["files"] / speed["bare"],
        "ratio_vs_bare_loop_ray_data": speed["ray_data"] / speed["bare"],
        "ratio_two_workers": speed["files_two_workers"] / speed["files"],
        "ratio_two_workers_ray_data": speed["ray_data_two_workers"] / speed["ray_data"],
        "ratio_two_bare_loops": per_second(pair) / speed["bare"],
        "cpu_ratio_vs_bare_loop": per_cpu_s["files"] / per_cpu_s["bare"],
        "cpu_ratio_two_workers": per_cpu_s["files_two_workers"] / per_cpu_s["files"],
        "examples_per_s": speed,
        "until_first_rows_s": {
            name: min(min(record["until_first_rows"][1:]) for record in of)
            for name, of in turns.items()
            if name != "bare"
        },
        "num_parameters": turns["bare"][0]["num_parameters"],
        "records": {**turns, "two_bare_loops": pair},
        "sizes": {**given, "examples": turns["bare"][0]["num"], "repeats": args.repeats},
        "machine": {"threads": 1, **describe_machine(LIBRARIES)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--data", choices=LOGS, default="complete_journey")
    parser.add_argument("--log-rows", type=int, default=1_500_000, help="of a synthetic log")
    parser.add_argument("--users", type=int, default=10_000, help="of a synthetic log")
    parser.add_argument("--rows", type=int, default=400_000, help="newest ones of the FM's window")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of a turn")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, help="where data is written for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        found = report(args, Path(folder))
    print_found(found, args.json)


if __name__ == "__main__":
    main()
