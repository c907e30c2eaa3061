"""What stored codes cost a VM, told apart from the chance of its training: one trained VM reads the same histories in other codes.

Two VMs of one seed that were trained on different codes differ by more than the codes (a standard deviation of .004 AUC on Complete
Journey), so their difference says little about a cost below that. Here nothing is trained: each VM of an experiment whose variants
differ in `fm.bits` is measured on the test rows of every variant of its seed. Prints JSON.

    loopfm experiment configs/pipeline/loopfm_bits.yaml --set keep_data=true
    python benchmarks/code_bits.py runs/loopfm_bits
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import LoopFMError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import read_run
from loopfm_ray.jobs.stages import vm_jobs
from loopfm_ray.jobs.training import score_rows
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.train.evaluate import Predictions, binary_metrics
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.trained import load_trained_vm

Json = dict[str, Any]  # Any: JSON


def main() -> None:
    """Measure every VM that reads latents on the codes of every variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the experiment, finished with keep_data")
    run = parser.parse_args().run
    set_up_process()
    try:
        folders = sorted(path.parent for path in (run / "variants").glob("*/config.yaml"))
        variants = {folder.name: read_run(folder) for folder in folders}
        measured = [row for name in variants for row in measure(variants, name)]
    except LoopFMError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({"cost_by_bits": summarise(measured), "measured": measured}, indent=1))


def measure(variants: dict[str, PipelineConfig], trained_on: str) -> Iterator[Json]:
    """Yield the test metrics of each VM of a variant on the codes of every variant."""
    for job in vm_jobs(variants[trained_on]):
        if job.config.model.history.kind not in ("latent", "both"):
            continue
        for config in variants.values():
            joined = config.paths.joined(job.seed)
            bits = read_manifest(joined).meta["code_spec"]["bits"]
            yield {
                "vm": job.name,
                "seed": job.seed,
                "trained_on_bits": read_manifest(job.joined).meta["code_spec"]["bits"],
                "read_bits": bits,
                **score(replace(job, joined=joined)),
            }


def score(job: VmJob) -> Json:
    """Return AUC and NE of a trained VM on the test rows of a joined set."""
    data, trained = VmData.open(job), load_trained_vm(job.out_dir)
    buckets = range(PreparedData.open(job.prepared).num_buckets)
    files = data.requests.files(job.splits.test)
    found = score_rows(trained.model, data.collator(buckets), files, job.splits.test)
    logit = trained.calibration.apply(found.logit)
    metrics = binary_metrics(Predictions(logit, found.label, found.user))
    return {name: metrics[name] for name in ("auc", "ne")}


def summarise(measured: list[Json]) -> dict[str, Json]:
    """Return, for each number of bits, what reading it costs the VMs that were trained on 16 bits, and those trained on itself."""
    by_cell = {
        (row["vm"], row["seed"], row["trained_on_bits"], row["read_bits"]): row for row in measured
    }
    costs: dict[str, Json] = {}
    for bits in sorted({row["read_bits"] for row in measured} - {16}):
        costs[str(bits)] = {}
        for trained in (16, bits):
            lost = [
                by_cell[vm, seed, trained, 16]["auc"] - by_cell[vm, seed, trained, bits]["auc"]
                for vm, seed, on, read in by_cell
                if (on, read) == (trained, bits)
            ]
            costs[str(bits)][f"auc_lost_trained_on_{trained}_bits"] = {
                "mean": float(np.mean(lost)),
                "least": float(np.min(lost)),
                "most": float(np.max(lost)),
                "num_vms": len(lost),
            }
    return costs


if __name__ == "__main__":
    main()
