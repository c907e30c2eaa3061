"""Small sharded tables, of fixed and of raw ids, and steps that train them on any number of ranks."""

from itertools import pairwise

import torch

from loopfm_ray.models.sharded.dynamic import DynamicEmbeddings
from loopfm_ray.models.sharded.embeddings import ShardedEmbeddings
from loopfm_ray.models.sharded.id_map import IdConfig
from loopfm_ray.models.sharded.optim import RowAdagradConfig, build_row_optimizer

# On tensors this small a second thread costs more than it gives.
torch.set_num_threads(1)

FIELDS, DIM = {"a": 7, "b": 5, "c": 1}, 3
RAW_FIELDS = ("user", "item")


def batches(size, step):
    """Return the rows of each rank: ids [B, 3] and a sequence [B, L] of `a`; ids repeat, and rank 1 has none in step 1."""
    generator = torch.Generator().manual_seed(step)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    whole = [
        (torch.stack([draw(high, 6) for high in FIELDS.values()], 1), draw(7, 6, 4))
        for _ in range(2)
    ]
    ids, past = (torch.cat(parts) for parts in zip(*whole, strict=True))
    cuts = [0, *range(12 // size, 12, 12 // size), 12][: size + 1]
    cuts[-1] = 12
    if step == 1 and size > 1:
        cuts[2] = cuts[1]  # rank 1 has no rows
    return [(ids[i:j], past[i:j]) for i, j in pairwise(cuts)]


def loss_of(embedded, past):
    scale = torch.arange(1.0, embedded.shape[1] + 1)
    return (embedded * scale).sum() + embedded.square().sum() + past.square().sum()


def make(config, group=None):
    return ShardedEmbeddings(FIELDS, DIM, build_row_optimizer(config), group)


def train(tables, rank, steps, size=None):
    """Return the outputs of every step."""
    size = tables.group.size if size is None else size
    seen = []
    for step in steps:
        ids, past = batches(size, step)[rank]
        embedded = tables(ids, tables.offsets(list(FIELDS)))
        of_past = tables(past[..., None], tables.offsets(["a"]))
        # ranks are averaged, so each loss counts as many times as there are ranks
        (loss_of(embedded, of_past) * tables.group.size).backward()
        tables.step(1.0 - 0.1 * step)
        seen.append(embedded.detach())
    return seen


def weights(tables):
    return torch.cat([tables.table(name) for name in FIELDS])


def make_dynamic(group=None, **settings):
    ids = IdConfig(**{"capacity": 300, "min_sightings": 2, **settings})
    return DynamicEmbeddings(
        RAW_FIELDS, DIM, build_row_optimizer(RowAdagradConfig(lr=0.5)), ids, group
    )


def ids_of(step, size, rank):
    """Return [B, 2] raw ids; they repeat in a batch and over ranks, and the last rank has none in step 1."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(12, (12, 2), generator=generator) * 7_000_000_000_000 - 10**13
    if step == 1 and size > 1:
        return ids if rank == 0 else ids[:0]
    return ids[rank * 12 // size : (rank + 1) * 12 // size]


def train_dynamic(tables, rank, steps):
    size, seen = tables.group.size, []
    for step in steps:
        found = tables(ids_of(step, size, rank), tables.offsets(RAW_FIELDS))
        (found.square().sum() + found.sum()).mul(size).backward()
        tables.step()
        seen.append(found.detach())
    return seen
