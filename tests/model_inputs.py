"""Small schemas and random batches for the tests of models and training."""

from dataclasses import replace

import torch

from loopfm_ray.data.collate import Batch, History
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    LatentHistoryConfig,
    RawHistoryConfig,
)

# On tensors this small a second thread costs more than it gives.
torch.set_num_threads(1)

ITEM_FIELDS = ("item", "category")
LATENT_DIM = 6

SCHEMA = FeatureSchema(
    (
        Field("user", Side.USER, Kind.CATEGORICAL, 7),
        Field("item", Side.ITEM, Kind.CATEGORICAL, 11),
        Field("category", Side.ITEM, Kind.CATEGORICAL, 4),
        Field("hour", Side.CONTEXT, Kind.CATEGORICAL, 5),
        Field("tags", Side.CONTEXT, Kind.SEQUENCE, 6),
        Field("count", Side.PAST, Kind.NUMERIC),
    ),
    ("label", "long_view"),
)
BARE_SCHEMA = FeatureSchema((Field("item", Side.ITEM, Kind.CATEGORICAL, 11),))
NUMERIC_SCHEMA = FeatureSchema((Field("price", Side.ITEM, Kind.NUMERIC),))


def histories(kind="none", **more):
    """The histories `none`, `latent`, `raw` or `both` of a VM, all with the same further settings."""
    made = {}
    if kind in ("latent", "both"):
        made["latent"] = LatentHistoryConfig(**more)
    if kind in ("raw", "both"):
        made["raw"] = RawHistoryConfig(**more)
    return HistoryInputs(made)


def make_history(row, lengths, seed=0, length=None):
    """G histories of the given lengths, with every payload."""
    generator = torch.Generator().manual_seed(seed)
    num, width = len(lengths), length or max(1, *lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    age = torch.rand(num, width, generator=generator) * 1e6 * mask
    latents = (torch.rand(num, width, LATENT_DIM, generator=generator) * 2 - 1) * mask[..., None]
    limits = [SCHEMA.categorical[1].cardinality, SCHEMA.categorical[2].cardinality]
    ids = [torch.randint(0, n, (num, width), generator=generator) * mask for n in limits]
    label = torch.randint(0, 3, (num, width), generator=generator) * mask
    event_type = torch.randint(0, 4, (num, width), generator=generator) * mask
    return History(
        torch.as_tensor(row), mask, age, latents, torch.stack(ids, -1), label, event_type
    )


def make_batch(num_rows=12, schema=SCHEMA, seed=0, lengths=(3, 0, 5)):
    """A batch with raw, latent and item histories that some rows lack."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(0, field.cardinality, (num_rows,), generator=generator)
        for field in schema.categorical
    ]
    row = torch.randint(0, len(lengths), (num_rows,), generator=generator)
    sequences = {
        field.name: torch.randint(0, field.cardinality, (num_rows, 3), generator=generator)
        for field in schema.sequences
    }
    return Batch(
        ids=torch.stack(ids, 1) if ids else torch.zeros(num_rows, 0, dtype=torch.int64),
        numeric=torch.randn(num_rows, len(schema.numeric), generator=generator),
        sequences=sequences,
        histories={
            "raw": make_history(row, lengths, seed),
            "latent": make_history(row, lengths, seed + 1),
            "latent_by_item": make_history(row.flip(0), lengths, seed + 2),
        },
        label=torch.randint(0, 2, (num_rows, len(schema.tasks)), generator=generator).float(),
        teacher_prob=torch.rand(num_rows, generator=generator),
        teacher_latent=torch.rand(num_rows, LATENT_DIM, generator=generator) * 2 - 1,
    )


def take_rows(batch, rows):
    """Some rows of a batch, in the order asked, each with its histories; what the teacher says stays as it is."""
    return replace(
        batch,
        ids=batch.ids[rows],
        numeric=batch.numeric[rows],
        sequences={name: ids[rows] for name, ids in batch.sequences.items()},
        histories={name: replace(one, row=one.row[rows]) for name, one in batch.histories.items()},
        label=batch.label[rows],
    )
