"""What `serve.py` serves: a VM with random weights that reads a history, and an online store of many users.

The log, the schema and the bundle are made by the library's own steps; what the weights are changes no cost.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopfm_ray.data.config import SplitConfig, SyntheticConfig
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.history_inputs import HistoryInputs, LatentHistoryConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.serving.bundle import save_bundle
from loopfm_ray.serving.contract import Backend
from loopfm_ray.serving.spec import BundleSpec, HistoryPin
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.online import UserHistory, pack_history
from loopfm_ray.store.space import Space
from loopfm_ray.store.target import open_target

LATENT_DIM, BITS, MAX_LEN = 32, 4, 50
NUM_ITEMS = 20_000
CANDIDATES = 50
LIBRARIES = ("ray", "torch", "onnxruntime", "uvicorn", "fastapi", "lmdb", "redis")
VERSION = "benchmark"


@dataclass(frozen=True)
class World:
    """Where the bundle and the LMDB store lie, and what to ask for."""

    bundle: Path
    online: Path
    num_users: int
    request_ts: int
    items: list[str]


def space() -> Space:
    """Return the space of the histories: codes of 32 numbers of 4 bits."""
    spec = CodeSpec(BITS, LATENT_DIM, tuple([0.5] * LATENT_DIM))
    return Space("benchmark-snapshot", spec, 3_600_000_000, False)


def write_world(folder: Path, num_users: int) -> World:
    """Write everything under `folder`; what is there already stays."""
    config = SyntheticConfig(
        split=SplitConfig(fm_stop="2024-01-08", vm_stop="2024-02-12", valid_s=86_400.0),
        num_rows=200_000,
        num_users=20_000,
        num_items=NUM_ITEMS,
        num_topics=20,
        history_events="all",
    )
    if not (folder / "prepared").exists():
        prepare(config, folder / "prepared")
    data = PreparedData.open(folder / "prepared")
    request_ts = data.log_range[1]
    if not (folder / "bundle").exists():
        write_bundle(folder / "bundle", data, ("torch", "onnx", "onnx_int8"))
    online = folder / "online"
    if not online.exists():
        write_histories(online, num_users, request_ts)
    items = data.items.keys[1:]
    return World(folder / "bundle", online, num_users, request_ts, list(items))


def write_bundle(
    path: Path, data: PreparedData, backends: Sequence[Backend], seed: int = 0
) -> None:
    """Write a bundle with random weights."""
    schema = data.schema_as_of(data.log_range[1])
    history = HistoryInputs({"user": LatentHistoryConfig()})
    config = DnnConfig(embed_dim=8, hidden=(128, 64), history=history)
    torch.manual_seed(seed)
    model = build_vm(config, schema, latent_dim=LATENT_DIM)
    pin = HistoryPin(space(), VERSION, MAX_LEN)
    names = {field.name for field in schema.fields}
    derive = tuple(name for name in ("hour", "weekday") if name in names)
    spec = BundleSpec("vm", config, schema, history=pin, derive=derive)
    save_bundle(path, spec, model, data, {"prepared": data.manifest.version}, backends=backends)


def histories(num_users: int, request_ts: int, seed: int = 3) -> Iterator[tuple[str, bytes]]:
    """Yield the record of every user: 50 events with random codes, an hour apart."""
    rng = np.random.default_rng(seed)
    width = space().code_spec.num_bytes
    hours = 3_600_000_000 * np.arange(MAX_LEN + 1, 1, -1, dtype=np.int64)
    for start in range(0, num_users, 10_000):
        codes = rng.integers(0, 256, (10_000, MAX_LEN, width), dtype=np.uint8)
        shift = rng.integers(0, 3_600_000_000, 10_000)
        for n in range(min(10_000, num_users - start)):
            event_ts = request_ts - hours - int(shift[n])
            found = UserHistory(event_ts, event_ts + 3_600_000_000, codes[n], True)
            yield f"u{start + n:08d}", pack_history(found)


def write_histories(
    target: Path | str, num_users: int, request_ts: int, version: str = VERSION, seed: int = 3
) -> float:
    """Publish the histories at `target` and return the seconds."""
    began = time.perf_counter()
    meta = {**space().to_meta(), "latents_version": version, "max_events_per_user": None}
    opened = open_target(target)
    try:
        records = histories(num_users, request_ts, seed)
        opened.write(meta["space"], version, records, meta, num_users * 8192 + (16 << 20))
    finally:
        opened.close()
    return time.perf_counter() - began


def score_bodies(world: World, num: int) -> list[dict[str, Any]]:
    """Return requests of random users with random candidates."""
    rng = np.random.default_rng(4)
    past = ("past_count_item", "past_recency_item", "past_count_topic", "past_recency_topic")
    return [
        {
            "user": f"u{int(rng.integers(0, world.num_users)):08d}",
            "request_ts": int(world.request_ts),
            "items": [world.items[n] for n in rng.integers(0, len(world.items), CANDIDATES)],
            "context": {name: rng.integers(0, 9, CANDIDATES).tolist() for name in past},
        }
        for _ in range(num)
    ]
