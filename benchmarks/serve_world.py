"""What `serve.py` serves: a VM with random weights that reads a history, and an online store of many users.

The log, the schema and the bundle are made by the library's own steps; what the weights are changes no cost.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loopfm_ray.data.config import SplitConfig, SyntheticConfig
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.history_inputs import HistoryInputs, LatentHistoryConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.serving.bundle import BundleSpec, HistoryPin, save_bundle
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.online import UserHistory, pack_history
from loopfm_ray.store.space import Space
from loopfm_ray.store.target import open_target

LATENT_DIM, BITS, MAX_LEN = 32, 4, 50
NUM_ITEMS = 20_000
_VERSION = "benchmark"


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
        _write_bundle(folder / "bundle", data)
    online = folder / "online"
    if not online.exists():
        write_histories(online, num_users, request_ts)
    items = data.items.keys[1:]
    return World(folder / "bundle", online, num_users, request_ts, list(items))


def _write_bundle(path: Path, data: PreparedData) -> None:
    schema = data.schema_as_of(data.log_range[1])
    history = HistoryInputs({"user": LatentHistoryConfig()})
    config = DnnConfig(embed_dim=8, hidden=(128, 64), history=history)
    torch.manual_seed(0)
    model = build_vm(config, schema, latent_dim=LATENT_DIM)
    pin = HistoryPin(space(), _VERSION, MAX_LEN)
    derive = tuple(
        name for name in ("hour", "weekday") if any(f.name == name for f in schema.fields)
    )
    spec = BundleSpec("vm", config, schema, history=pin, derive=derive)
    version = data.manifest.version
    save_bundle(path, spec, model, data, {"prepared": version}, ("torch", "onnx", "onnx_int8"))


def histories(num_users: int, request_ts: int) -> Iterator[tuple[str, bytes]]:
    """Yield the record of every user: 50 events with random codes, an hour apart."""
    rng = np.random.default_rng(3)
    width = space().code_spec.num_bytes
    hours = 3_600_000_000 * np.arange(MAX_LEN + 1, 1, -1, dtype=np.int64)
    for start in range(0, num_users, 10_000):
        codes = rng.integers(0, 256, (10_000, MAX_LEN, width), dtype=np.uint8)
        shift = rng.integers(0, 3_600_000_000, 10_000)
        for n in range(min(10_000, num_users - start)):
            event_ts = request_ts - hours - int(shift[n])
            found = UserHistory(event_ts, event_ts + 3_600_000_000, codes[n], True)
            yield f"u{start + n:08d}", pack_history(found)


def write_histories(target: Path | str, num_users: int, request_ts: int) -> float:
    """Publish the histories at `target`; return the seconds."""
    began = time.perf_counter()
    meta = {**space().to_meta(), "latents_version": _VERSION, "max_events_per_user": None}
    opened = open_target(target)
    try:
        records = histories(num_users, request_ts)
        opened.write(meta["space"], _VERSION, records, meta, num_users * 8192 + (16 << 20))
    finally:
        opened.close()
    return time.perf_counter() - began
