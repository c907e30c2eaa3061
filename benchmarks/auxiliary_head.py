"""What ExFM's auxiliary head and student adapter cost: nothing where the VM serves, a share of a step where it trains.

`README.md` beside this file says what each key means.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, print_found

from loopfm_ray.data.batch import Batch
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.distill.heads import AdapterConfig, AuxiliaryConfig, AuxiliaryVm
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.dcnv2 import DcnV2Config
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.train.optim import OptimConfig, build_adapter_optimizer, build_optimizer
from loopfm_ray.train.step import make_adapter_step, make_objective
from loopfm_ray.train.trained import TrainedVm, load_trained_vm, save_trained_vm

SIZES = {"user": 2_500, "item": 68_000, "type": 1_600, "category": 300, "brand": 3, "hour": 24}
ARMS = {
    "plain": None,
    "adapted": AuxiliaryConfig(gradient_scale=3.0, adapter=AdapterConfig()),
}
Step = Callable[[], None]


def make_batch(num_rows: int) -> Batch:
    """Return random rows with a teacher's predictions."""
    ids = [torch.randint(0, size, (num_rows,)) for size in SIZES.values()]
    return Batch(
        ids=torch.stack(ids, 1),
        numeric=torch.zeros(num_rows, 0),
        sequences={},
        histories={},
        label=torch.randint(0, 2, (num_rows, 1)).float(),
        teacher_prob=torch.rand(num_rows),
    )


def trained(arm: str, schema: FeatureSchema, folder: Path, rows: int) -> tuple[VerticalModel, Step]:
    """Train one arm for a step, and return the VM as it comes back from disk and its training step."""
    torch.manual_seed(0)
    config = DcnV2Config(embed_dim=8, hidden=(128, 64))
    vm = build_vm(config, schema)
    auxiliary = ARMS[arm]
    model = vm if auxiliary is None else AuxiliaryVm(vm, auxiliary)
    heads = None if auxiliary is None else model
    objective = make_objective(model, auxiliary=heads)
    optimizer = build_optimizer(OptimConfig(), model)
    adapter = build_adapter_optimizer(model)
    before = None if adapter is None else make_adapter_step(model, adapter)
    batch = make_batch(rows)

    def step() -> None:
        if before is not None:
            before(batch)
        optimizer.zero_grad(set_to_none=True)
        objective(batch).total.backward()
        optimizer.step()

    step()
    out = TrainedVm(vm, config, schema, (), None, PlattScaling(1.0, 0.0), {})
    save_trained_vm(folder / arm, out, config_hash=arm, inputs={}, num_rows=rows)
    return load_trained_vm(folder / arm).model.eval(), step


def in_turns(first: Step, second: Step, rounds: int, repeats: int) -> float:
    """Return the median over rounds of the seconds of the second / of the first, each `repeats` calls in turn."""
    ratios = []
    for _ in range(rounds):
        taken = []
        for call in (first, second):
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            taken.append(time.perf_counter() - began)
        ratios.append(taken[1] / taken[0])
    return sorted(ratios)[len(ratios) // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys as JSON")
    parser.add_argument("--candidates", type=int, default=50, help="rows of a request")
    parser.add_argument("--rows", type=int, default=512, help="rows of a training step")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schema = FeatureSchema(
        tuple(Field(name, Side.CONTEXT, Kind.CATEGORICAL, size) for name, size in SIZES.items())
    )
    with tempfile.TemporaryDirectory() as folder:
        made = {arm: trained(arm, schema, Path(folder), options.rows) for arm in ARMS}
        num_bytes = {
            arm: sum(file.stat().st_size for file in (Path(folder) / arm).rglob("*.safetensors"))
            for arm in ARMS
        }
    request = make_batch(options.candidates)

    def scorer(arm: str) -> Step:
        vm = made[arm][0]

        def score() -> None:
            with torch.inference_mode():
                vm(request)

        return score

    sizes = {arm: sum(value.numel() for value in vm.parameters()) for arm, (vm, _) in made.items()}
    found: dict[str, Any] = {  # Any: JSON
        "ratio_score_latency": in_turns(scorer("plain"), scorer("adapted"), options.rounds, 50),
        "ratio_parameters": sizes["adapted"] / sizes["plain"],
        "ratio_weights_bytes": num_bytes["adapted"] / num_bytes["plain"],
        "ratio_training_step": in_turns(made["plain"][1], made["adapted"][1], options.rounds, 5),
        "num_parameters": sizes["plain"],
        "machine": describe_machine(("torch",)),
    }
    print_found(found, options.json)


if __name__ == "__main__":
    main()
