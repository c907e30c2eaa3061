"""Feast's online store with the histories of users as array features; run by the interpreter of an environment with feast.

`serve.py --feast-python` writes the same histories as Arrow, starts this script and compares the reads. A user's row has the
times of the events, when they became readable, and their codes: what a request needs to see the newest of them.
"""

import argparse
import json
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Array, Bytes, Int64
from feast.value_type import ValueType

FEATURES = ["history:event_ts", "history:available_ts", "history:codes"]
CHUNK = 2000


def open_store(folder: Path, online: dict[str, str]) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    return FeatureStore(
        config=RepoConfig(
            project="bench",
            registry=str(folder / "registry.db"),
            provider="local",
            online_store=online,
            entity_key_serialization_version=3,
        )
    )


def write(store: FeatureStore, folder: Path, table: pa.Table) -> None:
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    view = FeatureView(
        name="history",
        entities=[user],
        ttl=timedelta(days=3650),
        schema=[
            Field(name="event_ts", dtype=Array(Int64)),
            Field(name="available_ts", dtype=Array(Int64)),
            Field(name="codes", dtype=Bytes),
        ],
        source=FileSource(path=str(folder / "none.parquet"), timestamp_field="ready"),
    )
    store.apply([user, view])
    now = datetime.now(UTC)
    for start in range(0, table.num_rows, CHUNK):
        frame: pd.DataFrame = table.slice(start, CHUNK).to_pandas()
        store.write_to_online_store("history", frame.assign(ready=now))


def measure(store: FeatureStore, users: list[str], size: int, budget_s: float) -> dict[str, float]:
    """Return reads a second of `size` users at a time, and the quantiles of a call."""
    rng = np.random.default_rng(2)
    took: list[float] = []
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        rows = [{"user": users[n]} for n in rng.integers(0, len(users), size)]
        began = time.perf_counter()
        found = store.get_online_features(features=FEATURES, entity_rows=rows).to_dict()
        took.append(time.perf_counter() - began)
        if any(codes is None for codes in found["codes"]):
            raise SystemExit("Feast lost a user")
    warm = np.asarray(took[len(took) // 10 :])
    return {
        "users_per_s": size / float(warm.mean()),
        "p50_us": float(np.percentile(warm, 50)) * 1e6,
        "p99_us": float(np.percentile(warm, 99)) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("histories", type=Path, help="Arrow file")
    parser.add_argument("--redis", help="HOST:PORT of a server that may be written to")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--budget-s", type=float, default=5.0)
    args = parser.parse_args()
    with pa.OSFile(str(args.histories), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    users = table.column("user").to_pylist()
    folder = args.histories.parent
    stores = {"sqlite": {"type": "sqlite", "path": str(folder / "feast-sqlite" / "online.db")}}
    if args.redis:
        stores["redis"] = {"type": "redis", "connection_string": args.redis}
    found = {}
    for name, online in stores.items():
        store = open_store(folder / f"feast-{name}", online)
        write(store, folder, table)
        found[name] = {
            "one": measure(store, users, 1, args.budget_s),
            "batch": measure(store, users, args.batch, args.budget_s),
        }
    print("RESULT " + json.dumps({"feast": version("feast"), **found}))


if __name__ == "__main__":
    main()
