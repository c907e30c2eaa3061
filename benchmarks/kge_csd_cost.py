"""What an epoch of self-distillation (CSD) costs beside a plain one, model by model, epochs in turns.

`README.md` beside this file says what each key means.
"""

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kge_graphs import cut, load_graph
from machine import describe_machine, print_found

from loopfm_ray.config import validate
from loopfm_ray.kge.checkpoint import KgeState
from loopfm_ray.kge.models import read_kge_config
from loopfm_ray.kge.objectives import Objective
from loopfm_ray.kge.training import KgeTrainConfig, begin_training, train_epoch
from loopfm_ray.kge.triples import TripleSet

MODELS = ("complex", "distmult", "rotate", "rote")
DRAWN = ("rotate",)
ARMS = ("plain", "csd")
WARM_UP = 2
"""Epochs before those that count: in the first nothing is remembered yet."""
Record = dict[str, Any]  # Any: JSON


@dataclass
class Training:
    """One of the two, with the seconds of its epochs that count."""

    state: KgeState
    objective: Objective
    config: KgeTrainConfig
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def step(self, counts: bool) -> None:
        """Train one epoch."""
        wall, cpu = time.perf_counter(), time.process_time()
        train_epoch(self.state, self.objective, self.config)
        if counts:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)


def begin(kind: str, arm: str, graph: TripleSet, args: argparse.Namespace) -> Training:
    """Return a training before its first epoch."""
    tree: Record = {"batch_size": args.batch, "epochs": 1000}
    if kind in DRAWN:
        loss = {"kind": "self_adversarial", "num_negatives": args.negatives, "margin": 9.0}
        tree |= {"loss": loss, "optimizer": "adam", "lr": 0.001}
    elif kind in ("complex", "distmult"):
        tree |= {"regularizer": {"weight": 0.01}}
    if arm == "csd":
        memory = {"kind": args.memory}
        tree["distillation"] = {"begin_epoch": 0, "ramp_epochs": 1, "memory": memory}
    config = validate(KgeTrainConfig, tree, "benchmark")
    backbone = read_kge_config({"kind": kind, "dimension": args.dimension})
    return Training(*begin_training(graph, backbone, config), config)


def num_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in nested dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return sum(num_bytes(one) for one in inner)


def measure(kind: str, graph: TripleSet, args: argparse.Namespace) -> Record:
    """Return the seconds of both arms' epochs, which take turns, and what CSD remembers."""
    trainings = {arm: begin(kind, arm, graph, args) for arm in ARMS}
    for epoch in range(WARM_UP + args.repeats):
        for training in trainings.values():
            training.step(counts=epoch >= WARM_UP)
    wall, cpu = (
        {arm: getattr(one, name) for arm, one in trainings.items()} for name in ("wall", "cpu")
    )
    state = trainings["csd"].state
    assert state.distillation is not None
    return {
        "ratio": min(wall["csd"]) / min(wall["plain"]),
        "cpu_ratio": min(cpu["csd"]) / min(cpu["plain"]),
        "median_of_pairs": float(np.median(np.divide(wall["csd"], wall["plain"]))),
        "memory_copies": num_bytes(state.distillation.state_dict())
        / num_bytes(state.model.state_dict()),
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def report(args: argparse.Namespace) -> Record:
    """Measure every model and return the keys that `README.md` explains."""
    torch.set_num_threads(args.threads)
    graph = cut(load_graph(args.root, args.synthetic), args.triples, 1)
    found = {kind: measure(kind, graph, args) for kind in args.models.split(",")}
    return {
        "ratio_epoch_csd_vs_plain": max(one["ratio"] for one in found.values()),
        "cpu_ratio_epoch_csd_vs_plain": max(one["cpu_ratio"] for one in found.values()),
        "memory_copies": max(one["memory_copies"] for one in found.values()),
        **{f"ratio_epoch_csd_vs_plain_{kind}": one["ratio"] for kind, one in found.items()},
        **{f"cpu_ratio_epoch_csd_vs_plain_{kind}": one["cpu_ratio"] for kind, one in found.items()},
        "records": found,
        "sizes": {
            "entities": graph.num_entities,
            "relations": graph.num_relations,
            "triples": len(graph.train),
            **{name: getattr(args, name) for name in ("dimension", "batch", "negatives", "memory")},
            "threads": args.threads,
            "repeats": args.repeats,
        },
        "machine": describe_machine(("numpy", "torch")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--root", type=Path, default=Path("../shared/data/kg/codex_s"))
    parser.add_argument("--synthetic", help="entities,relations,train,test of a random graph")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--memory", choices=("average", "snapshot", "last_visit"), default="average"
    )
    parser.add_argument("--triples", type=int, default=0, help="of an epoch; 0 takes all")
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    found = report(args)
    print_found(found, args.json)


if __name__ == "__main__":
    main()
