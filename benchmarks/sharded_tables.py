"""A training step of sharded embedding tables: small against large tables, and against what torch itself has.

`README.md` beside this file says what each key means.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine, print_found
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from loopfm_ray.models.sharded.embeddings import RowNoise, ShardedEmbeddings
from loopfm_ray.models.sharded.group import Group, SoloGroup, TorchGroup
from loopfm_ray.models.sharded.optim import RowAdagradConfig, RowAdamConfig, build_row_optimizer

LIBRARIES = ("numpy", "torch")
RANKS = 2
Record = dict[str, Any]  # Any: JSON


class Ours:
    """Sharded tables with Adagrad or Adam of rows; the rows begin as zeros, each page written."""

    def __init__(self, rows: int, dim: int, group: Group, is_adam: bool = False) -> None:
        config = RowAdamConfig() if is_adam else RowAdagradConfig()
        optimizer = build_row_optimizer(config)
        self.tables = ShardedEmbeddings({"id": rows}, dim, optimizer, group, RowNoise(std=0.0))
        for state in self.tables.shard.state.values():
            state.fill_(0.0)
        self.offsets = self.tables.offsets(["id"])

    def look_up(self, ids: Tensor) -> Tensor:
        """Return [n, D]."""
        return self.tables(ids[:, None], self.offsets)

    def step(self) -> None:
        """Update."""
        self.tables.step()


class Torch:
    """`nn.Embedding` with an optimizer of torch."""

    def __init__(
        self, table: nn.Module, make: Callable[[Any], torch.optim.Optimizer]
    ) -> None:  # Any: parameters
        self.table = table
        self.optimizer = make(list(table.parameters()))

    def look_up(self, ids: Tensor) -> Tensor:
        """Return [n, D]."""
        found: Tensor = self.table(ids)
        return found

    def step(self) -> None:
        """Update."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


Contender = Ours | Torch


def measure(contenders: dict[str, Contender], ids: Sequence[dict[str, Tensor]]) -> Record:
    """Return the least seconds of a whole step and of what follows the look-up, by wall and by processor; they take turns.

    The gradient is the same for all: ones.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for batch in ids:
        for name, contender in contenders.items():
            if dist.is_initialized():
                dist.barrier()
            marks = [(time.perf_counter(), time.process_time())]
            found = contender.look_up(batch[name])
            marks.append((time.perf_counter(), time.process_time()))
            found.sum().backward()
            contender.step()
            marks.append((time.perf_counter(), time.process_time()))
            spans = [[marks[-1][k] - marks[start][k] for start in (0, 1)] for k in (0, 1)]
            turns[name].append([*spans[0], *spans[1]])
    keys = ("wall", "wall_update", "cpu", "cpu_update")
    # the first two steps meet pages and caches that the others find ready
    return {
        name: dict(zip(keys, torch.tensor(of[2:]).min(0).values.tolist(), strict=True))
        for name, of in turns.items()
    }


def draw(rows: dict[str, int], num: int, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Return evenly drawn ids for each step and contender."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randint(of, (num,), generator=generator) for name, of in rows.items()}
        for _ in range(steps + 2)
    ]


def by_size(args: argparse.Namespace) -> Record:
    """Measure a small and a large table."""
    rows = {"small": args.small_rows, "large": args.rows}
    tables: dict[str, Contender] = {
        name: Ours(of, args.dim, SoloGroup()) for name, of in rows.items()
    }
    return measure(tables, draw(rows, args.ids, args.steps, 0))


def by_contender(args: argparse.Namespace) -> Record:
    """Measure one process against dense and sparse gradients of torch."""
    rows, dim = args.small_rows, args.dim
    contenders: dict[str, Contender] = {
        "ours_adagrad": Ours(rows, dim, SoloGroup()),
        "ours_adam": Ours(rows, dim, SoloGroup(), is_adam=True),
        "dense_adagrad": Torch(nn.Embedding(rows, dim), torch.optim.Adagrad),
        "sparse_adagrad": Torch(nn.Embedding(rows, dim, sparse=True), torch.optim.Adagrad),
        "sparse_adam": Torch(nn.Embedding(rows, dim, sparse=True), torch.optim.SparseAdam),
    }
    return measure(contenders, draw(dict.fromkeys(contenders, rows), args.ids, args.steps, 1))


def on_rank(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Measure two processes against DTensor."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    rows, dim = args.small_rows, args.dim
    model = nn.Sequential(nn.Embedding(rows, dim))
    plan = RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0), use_local_output=True)
    mesh = init_device_mesh("cpu", (RANKS,))
    parallelize_module(model, mesh, {"0": plan})
    contenders: dict[str, Contender] = {
        "ours": Ours(rows, dim, TorchGroup()),
        "dtensor": Torch(model, lambda of: torch.optim.Adagrad(of, foreach=False)),
    }
    num = args.ids // RANKS
    found = measure(contenders, draw(dict.fromkeys(contenders, rows), num, args.steps, 2 + rank))
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def by_rank(args: argparse.Namespace) -> Record:
    """Return the slower rank's wall time and the processor time of both."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (folder, args), RANKS, start_method="spawn")
        parts = [torch.load(Path(folder) / str(rank)) for rank in range(RANKS)]
    return {
        name: {
            key: (max if key.startswith("wall") else sum)(part[name][key] for part in parts)
            for key in parts[0][name]
        }
        for name in parts[0]
    }


def report(args: argparse.Namespace) -> Record:
    """Measure all and return the keys that `README.md` explains."""
    ranks, contenders = by_rank(args), by_contender(args)
    sizes = by_size(args)

    def ratios(of: Record, slow: str, fast: str, names: dict[str, str]) -> dict[str, float]:
        return {name: of[slow][key] / of[fast][key] for name, key in names.items()}

    def both(name: str) -> dict[str, str]:
        return {name: "wall", f"cpu_{name}": "cpu"}

    return {
        **ratios(
            sizes,
            "large",
            "small",
            {
                "ratio_50m_vs_1m": "wall_update",
                "cpu_ratio_50m_vs_1m": "cpu_update",
                "ratio_50m_vs_1m_whole_step": "wall",
                "cpu_ratio_50m_vs_1m_whole_step": "cpu",
            },
        ),
        **ratios(contenders, "dense_adagrad", "ours_adagrad", both("ratio_vs_dense")),
        **ratios(contenders, "sparse_adagrad", "ours_adagrad", both("ratio_vs_sparse_torch")),
        **ratios(contenders, "sparse_adam", "ours_adam", both("ratio_vs_sparse_adam")),
        **ratios(ranks, "dtensor", "ours", both("ratio_vs_dtensor")),
        "seconds": {"sizes": sizes, "contenders": contenders, "ranks": ranks},
        "sizes": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only numbers")
    parser.add_argument("--rows", type=int, default=50_000_000, help="of the large table")
    parser.add_argument("--small-rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ids", type=int, default=32_768, help="of a step, over all ranks")
    parser.add_argument("--steps", type=int, default=20, help="timed ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = report(args)
    print_found(found, args.json)


if __name__ == "__main__":
    main()
