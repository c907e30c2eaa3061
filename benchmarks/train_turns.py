"""One turn of one contender of `train_vm.py` or `train_fm.py`, in a process of its own; the last line is JSON."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from train_clock import EpochClock, merged, run_worker, task_of
from train_world import fm_training, vm_job, write_export, write_joined_world, write_prepared

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs import train_fm, train_vm, training
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.training import Task, Worker, score_rows
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.metrics.binary import auc
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.step import task_logits
from loopfm_ray.train.trained import load_trained_vm

HERE = Path(__file__).resolve().parent
ALONE = Worker(0, 1)
Record = dict[str, Any]  # Any: JSON


def watched_job(module: ModuleType, marks: Path) -> Any:
    """Return a context in which the workers of a training job write what their epochs took, beside `marks`."""
    return mock.patch.object(module, "_worker", partial(run_worker, module.__name__, str(marks)))


def read_marks(marks: Path) -> Record:
    """Return what the workers wrote."""
    files = sorted(marks.parent.glob(f"{marks.name}-*.json"))
    return merged([json.loads(file.read_text(encoding="utf-8")) for file in files])


def bare_loop(task: Task) -> Record:
    """Train the model of a task with Adam, on the batches that the task makes of its rows, which lie in memory as tensors."""
    set_up_process()
    batches = map(task.collate, training._batches(task, ALONE))
    epochs = [list(islice(batches, task.plan.num_steps)) for _ in range(task.learning.epochs)]
    clock, model = EpochClock(), task.model
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning.optim.lr, fused=True)
    for epoch in epochs:
        clock.begin()
        for batch in epoch:
            optimizer.zero_grad()
            logit = task_logits(model, batch)
            functional.binary_cross_entropy_with_logits(logit, batch.label).backward()
            optimizer.step()
        clock.end()
    num_parameters = sum(value.numel() for value in model.parameters())
    found = {**clock.spans(), "num_rows": task.plan.num_rows[0], "num_parameters": num_parameters}
    return merged([found])


def vm_auc(model: nn.Module, job: VmJob) -> float:
    """Return the AUC of a VM on the test rows."""
    data = VmData.open(job)
    collate = data.collator(range(data.prepared.num_buckets))
    files = data.requests.files(job.splits.test)
    found = score_rows(model.eval(), collate, files, job.splits.test)
    return auc(found.label, found.logit)


def vm_turn(contender: str, sizes: Record, work: Path) -> Record:
    """Train one VM once; return what its epochs took and its AUC on the test rows."""
    job = vm_job(work / "vm", sizes)
    if contender.startswith("fuxictr_"):
        return fuxictr_turn(contender.removeprefix("fuxictr_"), sizes, work)
    if contender == "bare":
        task = task_of(train_vm, lambda: train_vm.train_one(job, ALONE))
        return {**bare_loop(task), "auc": vm_auc(task.model, job)}
    with connect(RayConfig()), watched_job(train_vm, work / "marks"):
        train_vm._fit([job], work / "checkpoints")
    return {**read_marks(work / "marks"), "auc": vm_auc(load_trained_vm(job.out_dir).model, job)}


def fuxictr_turn(loader: str, sizes: Record, work: Path) -> Record:
    """Train FuxiCTR's model once; Ray, which one of its readers runs on, is started before."""
    import train_fuxictr  # an extra

    with connect(RayConfig()) if loader == "parquet" else nullcontext():
        found = train_fuxictr.train(loader, Path(sizes["folder"]) / "fuxictr", work, sizes)
    prob, label = found.pop("prob"), found.pop("label")
    return {**merged([found]), "auc": auc(label, prob)}


def fm_turn(contender: str, sizes: Record, work: Path) -> Record:
    """Train the FM once; return what its epochs took."""
    prepared, training_ = fm_training(work / "fm", sizes)
    if contender == "bare":
        job = train_fm._job(PreparedData.open(prepared), prepared, training_, work, True)
        return bare_loop(task_of(train_fm, lambda: train_fm._train_one(job, ALONE, ())))
    with connect(RayConfig()), watched_job(train_fm, work / "marks"):
        train_fm.train_fms(
            prepared,
            [training_],
            work / "work",
            work / "checkpoints",
            reads_files=contender == "files",
        )
    return read_marks(work / "marks")


def vm_world(sizes: Record) -> Record:
    """Write what VMs train on, also for FuxiCTR."""
    write_joined_world(sizes)
    return write_export(sizes)


def fm_world(sizes: Record) -> Record:
    """Write what the FM trains on."""
    return write_prepared(sizes)


TURNS = {"vm": vm_turn, "fm": fm_turn}
WORLDS = {"vm_world": vm_world, "fm_world": fm_world}


def start_turn(task: str, contender: str, sizes: Record) -> "subprocess.Popen[str]":
    """Start one turn in a process of its own."""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(sizes["cores"] if contender.startswith("fuxictr") else 1)
    return subprocess.Popen(
        [sys.executable, str(HERE / "train_turns.py"), task, contender, json.dumps(sizes)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "POLARS_MAX_THREADS": threads,
        },
        stdout=subprocess.PIPE,
        text=True,
    )


def end_turn(process: "subprocess.Popen[str]") -> Record:
    """Return the record of a turn."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed with {process.returncode}; see above")
    record: Record = json.loads(out.strip().splitlines()[-1])
    return record


def run_turn(task: str, contender: str, sizes: Record) -> Record:
    """Run one turn and return its record."""
    record = end_turn(start_turn(task, contender, sizes))
    shown = {name: value for name, value in record.items() if name != "num_parameters"}
    print(f"{task} {contender} {sizes.get('kind', '')} {json.dumps(shown)}", file=sys.stderr)
    return record


def per_second(records: list[Record], seconds: str = "seconds") -> float:
    """Return rows a second of the best turn: noise only adds."""
    return max(record["num"] / record[seconds] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=(*TURNS, *WORLDS))
    parser.add_argument("contender")
    parser.add_argument("sizes", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.task in WORLDS:
        found = WORLDS[args.task](args.sizes)
    else:
        with tempfile.TemporaryDirectory(dir=args.sizes["folder"]) as work:
            found = TURNS[args.task](args.contender, args.sizes, Path(work))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**found, "peak_rss_gib": peak}))


if __name__ == "__main__":
    main()
