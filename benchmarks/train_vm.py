"""Training of vertical models against FuxiCTR on the same rows, and against a bare loop over tensors in memory, in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from machine import describe_machine, print_found
from materialize_world import KINDS as LOGS
from train_turns import per_second, run_turn

MODELS = ("dcnv2", "din")
LOADERS = ("npz", "npz_worker", "parquet")
LIBRARIES = ("numpy", "pyarrow", "torch", "ray", "fuxictr")
Record = dict[str, Any]  # Any: JSON
Turns = dict[str, list[Record]]


def contenders(args: argparse.Namespace) -> dict[str, int]:
    """Return how many workers each contender has; FuxiCTR has one process, with a thread for each core."""
    peers = [f"fuxictr_{loader}" for loader in args.loaders.split(",") if loader]
    return {"ours": args.cores, "ours_one_worker": 1, "bare": 1, **dict.fromkeys(peers, 1)}


def measure(kind: str, sizes: Record, args: argparse.Namespace) -> Turns:
    """Return the turns of each contender, one for each seed."""
    turns: Turns = {name: [] for name in contenders(args)}
    for seed in args.seeds:
        for name, workers in contenders(args).items():
            asked = {**sizes, "kind": kind, "workers": workers, "seed": seed}
            turns[name].append(run_turn("vm", name, asked))
    return turns


def ratio_vs_fuxictr(turns: Turns, name: str = "ours") -> float:
    """Return how many times the rows a second of FuxiCTR's fastest reader a contender has."""
    peers = [per_second(of) for other, of in turns.items() if other.startswith("fuxictr_")]
    return per_second(turns[name]) / max(peers)


def ratio_vs_bare(turns: Turns, seconds: str = "seconds") -> float:
    """Return how many times the rows a second of the bare loop one worker of ours has."""
    return per_second(turns["ours_one_worker"], seconds) / per_second(turns["bare"], seconds)


def ratios(turns: dict[str, Turns]) -> Record:
    """Return all ratios, of the models and the least of them."""
    bare = {kind: ratio_vs_bare(of) for kind, of in turns.items()}
    cpu = {kind: ratio_vs_bare(of, "cpu_seconds") for kind, of in turns.items()}
    found: Record = {}
    if all(any(name.startswith("fuxictr_") for name in of) for of in turns.values()):
        peer = {kind: ratio_vs_fuxictr(of) for kind, of in turns.items()}
        alone = {kind: ratio_vs_fuxictr(of, "ours_one_worker") for kind, of in turns.items()}
        found = {
            "ratio_vs_fuxictr": min(peer.values()),
            **{f"ratio_vs_fuxictr_{kind}": value for kind, value in peer.items()},
            **{f"ratio_one_worker_vs_fuxictr_{kind}": value for kind, value in alone.items()},
        }
    return {
        **found,
        "ratio_vs_bare_loop_vm": min(bare.values()),
        **{f"ratio_vs_bare_loop_vm_{kind}": value for kind, value in bare.items()},
        **{f"cpu_ratio_vs_bare_loop_vm_{kind}": value for kind, value in cpu.items()},
    }


def table(turns: dict[str, Turns], value: Any) -> Record:
    """Return a value of the turns of each model and contender."""
    return {kind: {name: value(of) for name, of in by.items()} for kind, by in turns.items()}


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Make the data, measure every model and return the keys that `README.md` explains."""
    names = ("data", "log_rows", "users", "rows", "test_rows", "max_len", "embed_dim", "batch")
    given = {name: getattr(args, name) for name in (*names, "epochs", "lr", "cores")}
    sizes = {**given, "folder": str(folder), "epochs": args.epochs + 1, "workers": 1, "seed": 0}
    world = run_turn("vm_world", "none", sizes)
    turns = {kind: measure(kind, sizes, args) for kind in args.models.split(",")}
    return {
        **ratios(turns),
        "rows_per_s": table(turns, per_second),
        "auc": table(turns, lambda of: [record["auc"] for record in of]),
        "mean_auc": table(turns, lambda of: mean(record["auc"] for record in of)),
        "num_parameters": table(turns, lambda of: of[0]["num_parameters"]),
        "peak_rss_gib": table(turns, lambda of: max(record["peak_rss_gib"] for record in of)),
        "records": turns,
        "sizes": {**given, **world, "seeds": args.seeds},
        "machine": describe_machine([n for n in LIBRARIES if n != "fuxictr" or args.loaders]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--data", choices=LOGS, default="complete_journey")
    parser.add_argument("--log-rows", type=int, default=400_000, help="of a synthetic log")
    parser.add_argument("--users", type=int, default=10_000, help="of a synthetic log")
    parser.add_argument("--rows", type=int, default=200_000, help="newest ones of the VM's window")
    parser.add_argument("--test-rows", type=int, default=100_000)
    parser.add_argument("--max-len", type=int, default=50, help="events of a history")
    parser.add_argument("--embed-dim", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of a turn")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--loaders", default=",".join(LOADERS), help="FuxiCTR's; none leaves it out"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a turn for each")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--work-dir", type=Path, help="where data is written for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        found = report(args, Path(folder))
    print_found(found, args.json)


if __name__ == "__main__":
    main()
