"""Filtered ranks of test triples against PyKEEN's evaluator with the same weights, model by model, in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from kge_turns import per_second, run_turn
from machine import describe_machine, print_found

MODELS = ("transe", "rotate", "complex", "distmult")
LIBRARIES = ("numpy", "torch", "pykeen")
Record = dict[str, Any]  # Any: JSON


def measure(
    kind: str, contenders: list[str], sizes: Record, repeats: int
) -> dict[str, list[Record]]:
    """Return the turns of each contender."""
    turns: dict[str, list[Record]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, records in turns.items():
            records.append(run_turn("rank", name, kind, sizes))
    return turns


def differing_ranks(kind: str, contenders: list[str], sizes: Record) -> int:
    """Return how many of the ranks of ours and of PyKEEN's differ in double precision, where rounding decides none."""
    ranks = []
    for name in contenders[:2]:
        run_turn("rank", name, kind, {**sizes, "dtype": "float64"})
        ranks.append(np.load(sizes["ranks"]))
    return int((ranks[0] != ranks[1]).sum())


def ratio(turns: dict[str, list[Record]], seconds: str) -> float:
    """Return triples a second of ours / of PyKEEN's best batch size."""
    peer = max(per_second(records, seconds) for name, records in turns.items() if name != "ours")
    return per_second(turns["ours"], seconds) / peer


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Measure every model and return the keys that `README.md` explains."""
    sizes = {
        "root": str(args.root) if args.root else None,
        "synthetic": args.synthetic,
        "triples": 0,
        "test_triples": args.triples,
        "dimension": args.dimension,
        "threads": args.threads,
        "dtype": "float32",
        "ranks": str(folder / "ranks.npy"),
    }
    contenders = ["ours", *(f"pykeen_{batch}" for batch in args.peer_batches.split(","))]
    kinds = args.models.split(",")
    turns = {kind: measure(kind, contenders, sizes, args.repeats) for kind in kinds}
    differing = {kind: differing_ranks(kind, contenders, sizes) for kind in kinds}
    wall = {kind: ratio(records, "seconds") for kind, records in turns.items()}
    cpu = {kind: ratio(records, "cpu_seconds") for kind, records in turns.items()}
    return {
        "ratio_vs_pykeen": min(wall.values()),
        "cpu_ratio_vs_pykeen": min(cpu.values()),
        "equal_ranks": not any(differing.values()),
        **{f"ratio_vs_pykeen_{kind}": value for kind, value in wall.items()},
        **{f"cpu_ratio_vs_pykeen_{kind}": value for kind, value in cpu.items()},
        "differing_ranks": differing,
        "triples_per_s": {
            kind: {name: per_second(records[name]) for name in contenders}
            for kind, records in turns.items()
        },
        "peak_rss_gib": {
            name: max(r["peak_rss_gib"] for of in turns.values() for r in of[name])
            for name in contenders
        },
        "records": turns,
        "sizes": {**sizes, "repeats": args.repeats},
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--root", type=Path, default=Path("../shared/data/kg/fb15k237"))
    parser.add_argument("--synthetic", help="entities,relations,train,test of a random graph")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--triples", type=int, default=2048, help="that are ranked; 0 takes all")
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--peer-batches", default="32,256", help="batch sizes of PyKEEN's")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = report(args, Path(folder))
    print_found(found, args.json)


if __name__ == "__main__":
    main()
