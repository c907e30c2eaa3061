"""What the sampler and the scheduler of a sweep are worth: TPE with ASHA against random search, within the same time.

Every value of a small space was trained once, for real; the table of learning curves and of their seconds lies beside this file. A
search over it takes no time but that of the clock that the table keeps. `README.md` beside this file says what each key means.
"""

import argparse
import itertools
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from machine import describe_machine, print_found

from loopfm_ray.config import validate
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.jobs.sweep import StudySearch, make_scheduler
from loopfm_ray.kge.models import read_kge_config
from loopfm_ray.kge.training import KgeTrainConfig, train_kge
from loopfm_ray.kge.triples import read_triples
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.study import Outcome, open_study

TABLE = Path(__file__).with_name("sweep_search_table.json")
LIBRARIES = ("optuna", "ray", "torch")
SPACE = {
    "train.lr": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
    "train.regularizer.weight": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "train.batch_size": [256, 512, 1024],
}
EPOCHS, EVAL_EVERY = 30, 3
METHODS = {
    "tpe_asha": {"sampler": {"kind": "tpe", "num_startup_trials": 8}, "scheduler": {"grace": 2}},
    "tpe": {"sampler": {"kind": "tpe", "num_startup_trials": 8}},
    "random": {"sampler": {"kind": "random"}},
}
Json = dict[str, Any]  # Any: JSON


def name_of(params: Json) -> str:
    """Return the key of a row of the table."""
    return json.dumps([params[path] for path in SPACE])


def train_row(task: tuple[Path, tuple[float, ...]]) -> tuple[str, list[list[float]]]:
    """Train one row of the table: seconds and validation MRR at each evaluation."""
    root, (lr, weight, batch_size) = task
    torch.set_num_threads(1)
    config = KgeTrainConfig.model_validate(
        {
            "lr": lr,
            "regularizer": {"weight": weight},
            "batch_size": batch_size,
            "epochs": EPOCHS,
            "eval_every": EVAL_EVERY,
        }
    )
    backbone = read_kge_config({"kind": "complex", "dimension": 32})
    trained = train_kge(read_triples(root), backbone, config)
    return json.dumps([lr, weight, batch_size]), [[p.train_s, p.valid_mrr] for p in trained.curve]


def make_table(root: Path, cores: int) -> None:
    """Train every row and write the table."""
    tasks = [(root, values) for values in itertools.product(*SPACE.values())]
    with ProcessPoolExecutor(cores) as pool:
        rows = dict(pool.map(train_row, tasks))
    TABLE.write_text(json.dumps({"graph": root.name, "rows": rows}, indent=0), encoding="utf-8")


def search(rows: Json, method: str, seed: int, budget_s: float, folder: Path) -> list[list[float]]:
    """Search the table until its clock is at `budget_s`; return the best MRR so far at each moment.

    A trial that is not over by then counts with what it has reached.
    """
    space = {path: {"kind": "choice", "values": values} for path, values in SPACE.items()}
    settings = json.loads(json.dumps(METHODS[method]))
    settings["sampler"]["seed"] = seed
    base = {"kind": "kge", "name": "t", "graph": {"kind": "splits", "path": "."}}
    tree = {
        "name": f"{method}-{seed}",
        "run_dir": str(folder),
        "base": {**base, "train": {"regularizer": {"weight": 0.1}}},
        "space": space,
        "objectives": [{"metric": "mrr"}],
        "budget": {"num_trials": 100_000},
        **settings,
    }
    config = validate(SweepConfig, tree, "the benchmark")
    study = open_study(config)
    searcher = StudySearch(study, silent)
    scheduler = make_scheduler(config, study, searcher)
    clock, best, found = 0.0, 0.0, []
    while clock < budget_s:
        asked = study.ask()
        assert asked is not None
        trial = SimpleNamespace(trial_id=f"t{asked.number}")
        scheduler.on_trial_add(None, trial)
        curve, before, state = rows[name_of(asked.params)], 0.0, "complete"
        top = 0.0
        for rung, (seconds, mrr) in enumerate(curve, 1):
            clock, before = clock + seconds - before, seconds
            if clock > budget_s:
                break
            top = max(top, mrr)
            best = max(best, mrr)
            found.append([clock, best])
            if rung == len(curve):
                break
            study.report(asked.number, rung, mrr)
            result = {"rung": rung, "value": mrr}
            if scheduler.on_trial_result(None, trial, result) == "STOP":
                state = "pruned"
                break
        study.tell(asked.number, Outcome(state, {"mrr": top}))
    study.close()
    return found


def report(args: argparse.Namespace, folder: Path) -> Json:
    """Search with every method under every seed and return the keys that `README.md` explains."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    best = {
        method: [
            search(rows, method, seed, args.budget_s, folder)[-1][1] for seed in range(args.seeds)
        ]
        for method in METHODS
    }
    ours, peer = np.array(best["tpe_asha"]), np.array(best["random"])
    return {
        "share_of_repetitions_better": float(np.mean(ours > peer)),
        "share_of_repetitions_not_worse": float(np.mean(ours >= peer)),
        "mean_mrr_tpe_asha": float(ours.mean()),
        "mean_mrr_tpe": float(np.mean(best["tpe"])),
        "mean_mrr_random": float(peer.mean()),
        "best_mrr_of_the_table": max(mrr for curve in rows.values() for _, mrr in curve),
        "best_mrr": best,
        "budget_s": args.budget_s,
        "trial_s": float(np.mean([curve[-1][0] for curve in rows.values()])),
        "num_rows": len(rows),
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget-s", type=float, default=60.0, help="of the table's clock")
    parser.add_argument("--make", type=Path, metavar="GRAPH", help="train the table anew")
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    if args.make is not None:
        make_table(args.make, args.cores)
    with tempfile.TemporaryDirectory() as folder:
        print_found(report(args, Path(folder)), args.json)


if __name__ == "__main__":
    main()
