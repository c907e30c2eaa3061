"""Feast's Ray store on one synthetic log; run by the interpreter of an environment with feast 0.67 and ray <= 2.58.

Feast gives the last feature row before each request, not the last L, and knows one clock: it is asked for less than our
join does. Its rows carry the instant they are readable as their event timestamp. `benchmarks/README.md` says how to make
the environment; `history_join.py --feast-python` starts this script and checks the answer.
"""

import argparse
import json
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Int64


def read(path: Path) -> pd.DataFrame:
    with pa.OSFile(str(path), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    return table.select([name for name in table.column_names if name != "code"]).to_pandas()


def instants(micros: np.ndarray) -> pd.Series:
    return pd.to_datetime(pd.Series(micros), unit="us", utc=True)


def open_store(folder: Path) -> FeatureStore:
    repo = folder / "feast"
    repo.mkdir(exist_ok=True)
    return FeatureStore(
        config=RepoConfig(
            project="bench",
            registry=str(repo / "registry.db"),
            provider="local",
            offline_store={
                "type": "ray",
                "storage_path": str(repo / "ray"),
                "enable_ray_logging": False,
            },
            online_store={"type": "sqlite", "path": str(repo / "online.db")},
            entity_key_serialization_version=3,
        )
    )


def define(store: FeatureStore, path: Path) -> None:
    user = Entity(name="user", join_keys=["user"])
    view = FeatureView(
        name="history",
        entities=[user],
        ttl=timedelta(days=365),
        schema=[Field(name="example_id", dtype=Int64)],
        source=FileSource(path=str(path), timestamp_field="ready"),
    )
    store.apply([user, view])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    events, requests = read(folder / "events.arrow"), read(folder / "requests.arrow")
    ready = np.maximum(events["event_ts"].to_numpy() + 1, events["available_ts"].to_numpy())
    table = pd.DataFrame(
        {
            "user": events["user"].astype(np.int64),
            "example_id": events["example_id"],
            "ready": instants(ready),
        }
    )
    table.to_parquet(folder / "features.parquet")
    store = open_store(folder)
    define(store, folder / "features.parquet")
    spine = pd.DataFrame(
        {
            "user": requests["user"].astype(np.int64),
            "event_timestamp": instants(requests["request_ts"].to_numpy()),
            "r": np.arange(len(requests)),
        }
    )
    begin = time.perf_counter()
    found = store.get_historical_features(entity_df=spine, features=["history:example_id"]).to_df()
    seconds = time.perf_counter() - begin
    newest = np.full(len(requests), -1, dtype=np.int64)
    newest[found["r"].to_numpy()] = found["example_id"].fillna(-1).astype(np.int64).to_numpy()
    np.save(folder / "feast_newest.npy", newest)
    versions = {name: version(name) for name in ("feast", "ray", "pandas")}
    json.dump({"seconds": seconds, "versions": versions}, sys.stdout)


if __name__ == "__main__":
    main()
