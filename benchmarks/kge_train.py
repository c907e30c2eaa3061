"""Training of knowledge graph embeddings with sampled negatives against PyKEEN, model by model, in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from kge_turns import per_second, run_turn
from machine import describe_machine, print_found

MODELS = ("transe", "rotate", "complex", "distmult")
CONTENDERS = ("ours_triples", "ours_questions", "pykeen")
LIBRARIES = ("numpy", "torch", "pykeen")
Record = dict[str, Any]  # Any: JSON


def measure(kind: str, sizes: Record, repeats: int) -> dict[str, list[Record]]:
    """Return the turns of each contender."""
    turns: dict[str, list[Record]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, records in turns.items():
            records.append(run_turn("train", name, kind, sizes))
    return turns


def ratios(turns: dict[str, list[Record]], seconds: str) -> dict[str, float]:
    """Return how many times PyKEEN's triples a second ours has, by counting."""
    peer = per_second(turns["pykeen"], seconds)
    return {
        name.removeprefix("ours_"): per_second(turns[name], seconds) / peer
        for name in CONTENDERS
        if name != "pykeen"
    }


def report(args: argparse.Namespace) -> Record:
    """Measure every model and return the keys that `README.md` explains."""
    sizes = {
        "root": str(args.root) if args.root else None,
        "synthetic": args.synthetic,
        "triples": args.triples,
        "test_triples": 1,
        "dimension": args.dimension,
        "negatives": args.negatives,
        "batch": args.batch,
        "epochs": args.epochs + 1,
        "lr": 0.001,
        "threads": args.threads,
    }
    turns = {kind: measure(kind, sizes, args.repeats) for kind in args.models.split(",")}
    wall = {kind: ratios(records, "seconds") for kind, records in turns.items()}
    cpu = {kind: ratios(records, "cpu_seconds") for kind, records in turns.items()}
    return {
        "ratio_vs_pykeen": min(min(of.values()) for of in wall.values()),
        "cpu_ratio_vs_pykeen": min(min(of.values()) for of in cpu.values()),
        **{f"ratio_vs_pykeen_{kind}": min(of.values()) for kind, of in wall.items()},
        **{f"cpu_ratio_vs_pykeen_{kind}": min(of.values()) for kind, of in cpu.items()},
        "ratios_by_counting": {"wall": wall, "cpu": cpu},
        "triples_per_s": {
            kind: {name: per_second(records[name]) for name in CONTENDERS}
            for kind, records in turns.items()
        },
        "peak_rss_gib": {
            name: max(r["peak_rss_gib"] for of in turns.values() for r in of[name])
            for name in CONTENDERS
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
    parser.add_argument("--triples", type=int, default=61_440, help="of an epoch; 0 takes all")
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    found = report(args)
    print_found(found, args.json)


if __name__ == "__main__":
    main()
