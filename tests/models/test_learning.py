"""Models learn: on a log whose best scores are known, each architecture and each encoder comes near them."""

from functools import cache

import numpy as np
import pytest
import torch

from loopfm_ray.data.batch import Batch, History
from loopfm_ray.data.config import SyntheticConfig
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.data.synthetic import bayes_optimal, generate
from loopfm_ray.metrics.binary import normalized_entropy
from loopfm_ray.models.histories import (
    AttentionConfig,
    DinUnitConfig,
    GruConfig,
    HstuConfig,
    PoolConfig,
    TransformerConfig,
)
from loopfm_ray.models.history_inputs import HistoryInputs, RawHistoryConfig
from loopfm_ray.models.registry import ENCODERS, VMS, build_vm, read_vm_config
from loopfm_ray.types import TimeRange

NUM_ROWS, NUM_TRAIN, MAX_LEN = 24_000, 18_000, 20
CONFIG = SyntheticConfig(num_rows=NUM_ROWS, num_users=300, num_items=40, num_topics=4)


def codes(column):
    return np.unique(column.to_numpy(zero_copy_only=False), return_inverse=True)[1] + 1


@cache
def log():
    """The log's columns as ids from 1, and what is best on its last rows."""
    made = generate(CONFIG)
    rows = made.rows
    columns = {name: codes(rows.column(name)) for name in ("user", "item", "surface")}
    tables = {"topic": ("items", "item"), "taste": ("users", "user")}
    for name, (table, key) in tables.items():
        entities = getattr(made, table)
        by_key = dict(
            zip(entities.column(key).to_pylist(), codes(entities.column(name)), strict=True)
        )
        columns[name] = np.asarray([by_key[value] for value in rows.column(key).to_pylist()])
    columns["label"] = rows.column("label").to_numpy()
    event_ts = rows.column("event_ts").to_numpy()
    window = TimeRange(int(event_ts[NUM_TRAIN]), int(event_ts[-1]) + 1)
    best = {view: bayes_optimal(made, window, view).ne for view in ("fm", "vm")}
    return columns, best


@cache
def past():
    """[N, MAX_LEN] rows of each row's newest earlier clicks of its user, oldest first, and how many there are."""
    columns, _ = log()
    index = np.zeros((NUM_ROWS, MAX_LEN), dtype=np.int64)
    length = np.zeros(NUM_ROWS, dtype=np.int64)
    clicks = {}
    for row, (user, label) in enumerate(zip(columns["user"], columns["label"], strict=True)):
        mine = clicks.setdefault(user, [])
        newest = mine[-MAX_LEN:]
        index[row, : len(newest)], length[row] = newest, len(newest)
        if label:
            mine.append(row)
    return index, length


def schema_of(names):
    columns, _ = log()
    sides = {"item": Side.ITEM, "topic": Side.ITEM, "taste": Side.USER, "surface": Side.CONTEXT}
    fields = [
        Field(name, sides[name], Kind.CATEGORICAL, int(columns[name].max()) + 1) for name in names
    ]
    return FeatureSchema(tuple(fields))


def batch_of(rows, names):
    columns, _ = log()
    index, length = (part[rows] for part in past())
    mask = np.arange(MAX_LEN) < length[:, None]
    ids = np.stack([columns[name][index] * mask for name in ("item", "topic")], -1)
    history = History(
        row=torch.arange(len(rows)),
        mask=torch.from_numpy(mask),
        age_s=torch.from_numpy((rows[:, None] - index).astype(np.float32) * mask),
        item_ids=torch.from_numpy(ids),
    )
    return Batch(
        ids=torch.from_numpy(np.stack([columns[name][rows] for name in names], 1)),
        numeric=torch.zeros(len(rows), 0),
        sequences={},
        histories={"raw": history},
        label=torch.from_numpy(columns["label"][rows]).float()[:, None],
    )


def ne_after_training(config, names, epochs=4):
    """Train on the first rows and return the NE on the last."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_vm(config, schema_of(names), ("item", "topic"))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    rng = np.random.default_rng(0)
    steps = epochs * (NUM_TRAIN // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        order = rng.permutation(NUM_TRAIN)
        for start in range(0, NUM_TRAIN - 255, 256):
            batch = batch_of(order[start : start + 256], names)
            optimizer.zero_grad()
            loss_of(model(batch), batch.label).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        batch = batch_of(np.arange(NUM_TRAIN, NUM_ROWS), names)
        prob = torch.sigmoid(model(batch))[:, 0].double().numpy()
    return normalized_entropy(batch.label[:, 0].numpy(), prob)


NAMES = ("item", "topic", "surface")
EPOCHS = {"augru": 10, "hstu": 10, "transformer": 10}
ENCODER_CONFIGS = {
    "attention": AttentionConfig(num_heads=2),
    "augru": GruConfig(kind="augru", hidden=16),
    "din": DinUnitConfig(),
    "gru": GruConfig(hidden=16),
    "mean": PoolConfig(),
    "sum": PoolConfig(kind="sum"),
    "hstu": HstuConfig(width=16),
    "transformer": TransformerConfig(width=16),
}


def test_every_encoder_is_tried():
    assert set(ENCODER_CONFIGS) == set(ENCODERS)


@pytest.mark.parametrize("kind", VMS)
def test_every_architecture_comes_near_the_best(kind):
    """It sees the user's taste, so what is left to learn is that taste and topic have to match."""
    _, best = log()
    found = ne_after_training(read_vm_config({"kind": kind, "embed_dim": 4}), (*NAMES, "taste"))
    assert best["fm"] - 0.005 < found < best["fm"] + 0.015


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_finds_the_taste_in_the_history(encoder):
    """The taste is hidden: without a history nothing beats `vm`, and `fm` is out of reach until it is certain."""
    _, best = log()
    history = HistoryInputs.of(own=RawHistoryConfig(encoder=ENCODER_CONFIGS[encoder]))
    config = read_vm_config({"kind": "dnn", "history": history.model_dump()})
    found = ne_after_training(config, NAMES, EPOCHS.get(encoder, 4))
    closed = (best["vm"] - found) / (best["vm"] - best["fm"])
    assert 0.8 < closed < 1.0


def test_without_a_history_nothing_beats_the_best_of_a_plain_vm():
    _, best = log()
    found = ne_after_training(read_vm_config({}), NAMES)
    assert best["vm"] - 0.005 < found < best["vm"] + 0.015
