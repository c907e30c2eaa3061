"""A function on every rank of a small gloo group, each in a process of its own."""

import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(size, function, folder, *args):
    """Return what `function(rank, *args)` gives on each rank; a rank that fails fails the caller."""
    name = uuid.uuid4().hex
    mp.start_processes(
        _run, (size, function, str(folder / name), args), nprocs=size, start_method="fork"
    )
    return [torch.load(f"{folder / name}.{rank}", weights_only=False) for rank in range(size)]


def _run(rank, size, function, path, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(path, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=200),  # a rank that waits for ever ends before its test's limit
    )
    torch.save(function(rank, *args), f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
