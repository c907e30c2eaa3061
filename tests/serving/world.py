"""A small world with every kind of field: log, prepared data, random latents, join, online store and a VM."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from loopfm_ray.data.config import (
    ColumnsConfig,
    EntityConfig,
    EventsConfig,
    PastConfig,
    SplitConfig,
)
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import AnyVmConfig, build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.serving.bundle import save_bundle
from loopfm_ray.serving.spec import BundleSpec, HistoryPin
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.publish import publish
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S, TimeRange
from tests.model_inputs import histories

START = 1_704_067_200 * MICROS_PER_S
"""2024-01-01, a Monday."""
FM_STOP = START + 20 * MICROS_PER_DAY
VM_STOP = START + 40 * MICROS_PER_DAY
STOP = START + 60 * MICROS_PER_DAY
MAX_LEN = 12
CODE = CodeSpec(4, 10, tuple(0.5 + 0.1 * n for n in range(10)))
FIELDS = (
    "item", "age", "city", "category", "price", "device", "shown", "tags", "hour", "weekday",
    "past_count_item", "past_recency_item",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    prepared: Path
    latents: Path
    joined: Path
    online: Path
    bundle: Path
    spec: BundleSpec
    model: VerticalModel


def write_log(folder: Path, seed: int = 0, num_rows: int = 4000) -> EventsConfig:
    """Write a log with delayed labels, equal times, nulls, and items and devices that appear late."""
    rng = np.random.default_rng(seed)
    day = np.sort(rng.uniform(0, 60, num_rows))
    ts = START + (day * MICROS_PER_DAY).astype(np.int64)
    ts[1::3] = ts[::3][: len(ts[1::3])]  # several candidates at one time
    user = rng.integers(0, 40, num_rows)
    user[1::3] = user[::3][: len(user[1::3])]
    item = rng.integers(0, 30 + day.astype(int), num_rows)
    device = np.where(day < 45, rng.integers(0, 3, num_rows), rng.integers(0, 5, num_rows))
    tags = [
        [f"t{tag}" for tag in rng.integers(0, 8 + int(now / 6), rng.integers(0, 5))] for now in day
    ]
    device[1::3] = device[::3][: len(device[1::3])]
    label = (rng.random(num_rows) < 0.4).astype(np.int64)
    log = pa.table(
        {
            "who": [f"u{value}" for value in user],
            "what": [f"i{value}" for value in item],
            "ts": ts,
            "label": label,
            "label_ts": ts + (rng.exponential(2.0, num_rows) * MICROS_PER_DAY).astype(np.int64),
            "device": pa.array([None if n % 17 == 0 else f"d{v}" for n, v in enumerate(device)]),
            "shown": pa.array(
                [None if n % 13 == 0 else v for n, v in enumerate(rng.normal(300, 20, num_rows))]
            ),
            "tags": tags,
        }
    )
    pq.write_table(log, folder / "log.parquet")
    items = pa.table(
        {
            "what": [f"i{n}" for n in range(120)],
            "category": [f"c{n % 7}" for n in range(120)],
            "price": rng.lognormal(2, 1, 120),
        }
    )
    users = pa.table(
        {
            "who": [f"u{n}" for n in range(40)],
            "city": [f"town{n % 5}" for n in range(40)],
            "age": rng.normal(40, 9, 40),
        }
    )
    pq.write_table(items, folder / "items.parquet")
    pq.write_table(users, folder / "users.parquet")
    return EventsConfig(
        path=str(folder / "log.parquet"),
        split=SplitConfig(fm_stop=FM_STOP, vm_stop=VM_STOP, valid_s=2 * 86_400.0),
        columns=ColumnsConfig(
            user="who",
            item="what",
            event_ts="ts",
            label="label",
            label_ts="label_ts",
            categorical={"device": "device"},
            numeric={"shown": "shown"},
            sequence={"tags": "tags"},
        ),
        items=EntityConfig(
            path=str(folder / "items.parquet"),
            key="what",
            categorical={"category": "category"},
            numeric={"price": "price"},
        ),
        users=EntityConfig(
            path=str(folder / "users.parquet"),
            key="who",
            categorical={"city": "city"},
            numeric={"age": "age"},
        ),
        past=PastConfig(count_fields=("item",)),
        period_origin=START,
        num_buckets=3,
        duplicates="drop",
    )


def unchanged(latents: np.ndarray) -> np.ndarray:
    return latents


def write_latents(
    prepared: PreparedData,
    path: Path,
    snapshot: str = "snap",
    stop_ts: int = STOP,
    trained_until_ts: int = FM_STOP,
    spec: CodeSpec = CODE,
    change: Callable[[np.ndarray], np.ndarray] = unchanged,
) -> None:
    """Embed every later example as random numbers, changed by `change`; `stop_ts` is the watermark."""
    rng = np.random.default_rng(7)
    writer = LatentsWriter(path, snapshot, trained_until_ts, spec, 3600 * MICROS_PER_S, True, {})
    columns = ["example_id", "user", "item", "event_ts", "label_ts", "is_event"]
    span = TimeRange(trained_until_ts + 1, stop_ts)
    files = {(file.period, file.bucket): file for file in prepared.examples.files(span)}
    parts = {place: read_rows([file], span, columns=columns) for place, file in files.items()}
    parts = {place: rows for place, rows in parts.items() if len(rows["user"])}
    writer.begin(list(parts))
    # by example, so that every version of a snapshot says the same of an event
    latents = rng.normal(0, 0.5, (10_000, CODE.dim)), rng.random(10_000).astype(np.float32)
    for place, rows in parts.items():
        rows["fm_prob"] = latents[1][rows["example_id"]]
        writer.write(*place, rows, change(latents[0][rows["example_id"]]))
    writer.finish(list(parts), watermark_ts=stop_ts)


def make_model(config: AnyVmConfig, schema, latent_dim: int | None = None) -> VerticalModel:
    """Return a VM with weights large enough that every input shows in the score."""
    torch.manual_seed(0)
    model = build_vm(config, schema, latent_dim=latent_dim)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model


def make_world(folder: Path, kind: str = "latent", fields=FIELDS) -> World:
    """Write a whole world under `folder`."""
    config = write_log(folder)
    prepare(config, folder / "prepared")
    prepared = PreparedData.open(folder / "prepared")
    write_latents(prepared, folder / "latents")
    retention = 25 * MICROS_PER_DAY
    joined = write_joined(
        folder / "prepared", folder / "latents", folder / "joined",
        TimeRange(VM_STOP, STOP), JoinSettings(MAX_LEN, retention),
    )  # fmt: skip
    publish(folder / "latents", prepared.users.keys, folder / "online")
    schema = prepared.schema_as_of(FM_STOP + 12 * MICROS_PER_DAY).select(fields)
    pin = HistoryPin.of_joined(joined) if kind == "latent" else None
    derive = tuple(name for name in ("hour", "weekday") if name in fields)
    vm = DnnConfig(hidden=(16, 8), history=histories(kind))
    spec = BundleSpec("vm_loopfm", vm, schema, PlattScaling(1.2, -0.3), pin, derive)
    model = make_model(vm, schema, CODE.dim if pin else None)
    inputs = {"prepared": read_manifest(folder / "prepared").version}
    save_bundle(folder / "bundle", spec, model, prepared, inputs)
    return World(
        folder / "prepared", folder / "latents", folder / "joined", folder / "online",
        folder / "bundle", spec, model,
    )  # fmt: skip
