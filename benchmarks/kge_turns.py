"""One turn of one contender of `kge_train.py` or `kge_eval.py`, in a process of its own; the last line is JSON."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kge_graphs import cut, load_graph

from loopfm_ray.config import validate
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.ranking import rank_triples, summarize_ranks
from loopfm_ray.kge.training import KgeTrainConfig, train_kge
from loopfm_ray.kge.triples import TripleSet

HERE = Path(__file__).resolve().parent
MARGIN = 9.0
Record = dict[str, Any]  # Any: JSON


class _EnoughError(Exception):
    pass


class Clock:
    """Notes wall and processor time after each epoch; the first epoch warms up."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note an epoch's end."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def best(self) -> tuple[float, float]:
        """Return the least seconds and processor seconds of an epoch."""
        spans = np.diff(np.array(self.marks), axis=0)
        wall, cpu = spans.min(axis=0)
        return float(wall), float(cpu)


def backbone(kind: str, sizes: Record) -> Record:
    """Return the config of a backbone whose heads are scored by the same relations as tails, as PyKEEN's are."""
    return {"kind": kind, "dimension": sizes["dimension"], "is_reciprocal": False}


def train_ours(graph: TripleSet, kind: str, sizes: Record, counting: str, clock: Clock) -> None:
    """Train with the negatives of PyKEEN, counted one way or the other; see `README.md`."""
    share = 2 if counting == "triples" else 1
    tree = {
        "loss": {
            "kind": "self_adversarial",
            "num_negatives": sizes["negatives"] // share,
            "margin": MARGIN,
        },
        "optimizer": "adam",
        "lr": sizes["lr"],
        "batch_size": sizes["batch"] * share,
        "epochs": clock.epochs + 1,
        "eval_every": clock.epochs + 1,
    }

    def note(epoch: int, _: float) -> None:
        clock.tick()
        if epoch == clock.epochs:
            raise _EnoughError

    config = validate(KgeTrainConfig, tree, "benchmark")
    try:
        train_kge(graph, read_kge_config(backbone(kind, sizes)), config, on_epoch=note)
    except _EnoughError:  # before the validation triples are ranked
        return


def train_turn(contender: str, kind: str, graph: TripleSet, sizes: Record) -> Record:
    """Return the seconds of an epoch and what it had of triples, or questions."""
    clock, num = Clock(sizes["epochs"]), len(graph.train)
    if contender == "pykeen":
        import kge_pykeen

        factory = kge_pykeen.make_factory(graph)
        model = kge_pykeen.make_model(kind, sizes["dimension"], factory, MARGIN)
        kge_pykeen.train(model, factory, sizes, clock.epochs, clock.tick)
    else:
        counting = contender.removeprefix("ours_")
        train_ours(graph, kind, sizes, counting, clock)
        num *= 2 if counting == "questions" else 1
    seconds, cpu_seconds = clock.best()
    return {"num": num, "seconds": seconds, "cpu_seconds": cpu_seconds}


def made(kind: str, graph: TripleSet, sizes: Record) -> KgeModel:
    """Return the model that both rank with, of one seed."""
    torch.manual_seed(0)
    config = read_kge_config(backbone(kind, sizes))
    model = build_kge(config, graph.num_entities, graph.num_relations)
    return model.to(getattr(torch, sizes["dtype"]))


def rank_ours(model: KgeModel, graph: TripleSet) -> tuple[float, float, np.ndarray]:
    """Return seconds, processor seconds and ranks [2, n] of the test triples, tails first; facts are indexed in the time."""
    began, cpu = time.perf_counter(), time.process_time()
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    ranks = rank_triples(model, graph.test, known)
    summarize_ranks(ranks)
    spent = time.perf_counter() - began, time.process_time() - cpu
    return *spent, np.stack([ranks.tail, ranks.head])


def rank_turn(contender: str, kind: str, graph: TripleSet, sizes: Record) -> Record:
    """Rank the test triples, and write the ranks where that is asked."""
    model = made(kind, graph, sizes)
    if contender == "ours":
        small = cut(graph, 0, min(200, len(graph.test)))
        rank_ours(model, small)  # warms up
        seconds, cpu_seconds, ranks = rank_ours(model, graph)
    else:
        import kge_pykeen

        peer = kge_pykeen.make_model(
            kind, sizes["dimension"], kge_pykeen.make_factory(graph), MARGIN
        )
        kge_pykeen.copy_weights(model, kind, peer)
        batch = int(contender.removeprefix("pykeen_"))
        kge_pykeen.evaluate(peer, cut(graph, 0, 2 * batch), batch)  # warms up
        seconds, cpu_seconds, ranks = kge_pykeen.evaluate(peer, graph, batch)
    np.save(sizes["ranks"], ranks)
    return {"num": len(graph.test), "seconds": seconds, "cpu_seconds": cpu_seconds}


def run_turn(task: str, contender: str, kind: str, sizes: Record) -> Record:
    """Run one turn in a process of its own and return its record."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(sizes["threads"])
    done = subprocess.run(
        [sys.executable, str(HERE / "kge_turns.py"), task, contender, kind, json.dumps(sizes)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        },
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{task} {contender} {kind} failed with {done.returncode}; see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def per_second(records: list[Record], seconds: str = "seconds") -> float:
    """Return triples a second of the best turn: noise only adds."""
    return max(record["num"] / record[seconds] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("train", "rank"))
    parser.add_argument("contender")
    parser.add_argument("kind")
    parser.add_argument("sizes", type=json.loads)
    args = parser.parse_args()
    sizes = args.sizes
    torch.set_num_threads(sizes["threads"])
    root = Path(sizes["root"]) if sizes["root"] else None
    graph = cut(load_graph(root, sizes["synthetic"]), sizes["triples"], sizes["test_triples"])
    turn = train_turn if args.task == "train" else rank_turn
    found = turn(args.contender, args.kind, graph, sizes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**found, "peak_rss_gib": peak}))


if __name__ == "__main__":
    main()
