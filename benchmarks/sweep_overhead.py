"""What a sweep costs beside its trials: `loopfm sweep` against the same trials in bare processes, in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from machine import describe_machine, print_found

from loopfm_ray.sweep.config import load_sweep

LIBRARIES = ("ray", "optuna", "torch")
MIB = 2**20
Json = dict[str, Any]  # Any: JSON


def write_graph(folder: Path, num_triples: int) -> Path:
    """Write a random graph of 2,000 entities and 20 relations."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", num_triples), ("valid", 200), ("test", 200)):
        head, tail = rng.integers(0, 2000, (2, count))
        relation = rng.integers(0, 20, count)
        rows = zip(head.tolist(), relation.tolist(), tail.tolist(), strict=True)
        lines = sorted({f"e{h}\tr{r}\te{t}" for h, r, t in rows})
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_sweep(folder: Path, name: str, args: argparse.Namespace, epochs: int) -> Path:
    """Write a sweep whose trials are given, so that both contenders run the same."""
    rates = np.geomspace(0.01, 0.3, args.trials).tolist()
    tree = {
        "name": name,
        "run_dir": str(folder / "runs"),
        "base": {
            "kind": "kge",
            "name": name,
            "graph": {"kind": "splits", "path": str(folder / "graph")},
            "backbone": {"kind": "complex", "dimension": 32},
            "train": {"batch_size": 1000, "epochs": epochs, "eval_every": max(1, epochs // 4)},
        },
        "space": {"train.lr": {"kind": "float", "low": 0.001, "high": 1.0, "log": True}},
        "first": [{"train.lr": rate} for rate in rates],
        "objectives": [{"metric": "mrr"}],
        "budget": {"num_trials": args.trials, "cores": args.cores},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run_bare(task: tuple[Path, Json]) -> float:
    """Run one trial in this process and return its seconds."""
    from loopfm_ray.jobs.sweep_trial import run_trial

    path, params = task
    began = time.perf_counter()
    run_trial(load_sweep(path), params, lambda number, value: None)  # noqa: ARG005
    return time.perf_counter() - began


def measure_bare(path: Path, cores: int) -> Json:
    """Run all trials in `cores` processes side by side."""
    config = load_sweep(path)
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        seconds = pool.map(run_bare, [(path, dict(one)) for one in config.first], chunksize=1)
    return {"wall_s": time.perf_counter() - began, "trial_s": seconds}


def measure_sweep(path: Path) -> Json:
    """Run the command, from its start to its end, and watch the memory of its trials."""
    command = [sys.executable, "-m", "loopfm_ray.cli", "sweep", str(path), "--json"]
    began = time.perf_counter()
    memory: list[float] = []
    stop = threading.Event()
    watcher = threading.Thread(target=watch_trials, args=(memory, stop))
    watcher.start()
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        stop.set()
        watcher.join()
    wall_s = time.perf_counter() - began
    summary = json.loads(done.stdout)
    seconds = [trial["seconds"] for trial in summary["trials"]]
    return {"wall_s": wall_s, "trial_s": seconds, "trial_mib": max(memory, default=0.0)}


def watch_trials(found: list[float], stop: threading.Event) -> None:
    """Note the memory that no other process shares, of the processes that run trials."""
    while not stop.wait(2.0):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"ImplicitFunc" in (folder / "cmdline").read_bytes():
                    lines = (folder / "smaps_rollup").read_text(encoding="utf-8").splitlines()
                    private = [line.split()[1] for line in lines if line.startswith("Private_")]
                    found.append(sum(map(int, private)) * 1024 / MIB)
            except OSError:
                continue  # it has ended


def choose_epochs(folder: Path, args: argparse.Namespace) -> int:
    """Return how many epochs take about `--trial-seconds`."""
    path = write_sweep(folder, "probe", args, 4)
    seconds = [run_bare((path, {"train.lr": 0.1 + 0.01 * turn})) for turn in range(2)]
    return max(4, round(4 * args.trial_seconds / min(seconds)))


def report(args: argparse.Namespace, folder: Path) -> Json:
    """Measure and return the keys that `README.md` explains."""
    write_graph(folder / "graph", args.triples)
    epochs = choose_epochs(folder, args)
    turns: dict[str, list[Json]] = {"bare": [], "sweep": []}
    for number in range(args.repeats):
        turns["bare"].append(
            measure_bare(write_sweep(folder, f"bare-{number}", args, epochs), args.cores)
        )
        turns["sweep"].append(measure_sweep(write_sweep(folder, f"sweep-{number}", args, epochs)))
    bare = min(turns["bare"], key=lambda turn: turn["wall_s"])
    sweep = min(turns["sweep"], key=lambda turn: turn["wall_s"])
    compute_s = sum(bare["trial_s"]) / args.cores
    return {
        "overhead_share": sweep["wall_s"] / compute_s - 1,
        "overhead_share_of_bare_processes": bare["wall_s"] / compute_s - 1,
        "ratio_vs_bare_processes": sweep["wall_s"] / bare["wall_s"],
        "trial_s": float(np.mean(bare["trial_s"])),
        "trial_private_mib": max(turn["trial_mib"] for turn in turns["sweep"]),
        "turns": turns,
        "sizes": {name: str(value) for name, value in vars(args).items()},
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--trial-seconds", type=float, default=30.0)
    parser.add_argument("--triples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_found(report(args, Path(folder)), args.json)


if __name__ == "__main__":
    main()
