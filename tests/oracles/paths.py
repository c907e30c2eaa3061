"""The whole path of a small log: prepared data, latents from a stand-in for the FM, the join; and what each request saw."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from loopfm_ray.data.config import to_ts
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.tables import map_ipc
from loopfm_ray.types import TimeRange
from tests.oracles.logs import ORIGIN, ORIGIN_TS, prepare_rows

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
FM_STOP_TS = ORIGIN_TS + 9 * DAY_US
"""Where the split of `logs.config_for` ends the FM window."""
SPEC = CodeSpec(4, 6, (0.5, 1.0, 1.5, 2.0, 1.0, 3.0))
SETTINGS = JoinSettings(5)
COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")


@dataclass(frozen=True)
class Paths:
    """Where the versions lie."""

    prepared: Path
    latents: Path
    joined: Path

    @property
    def data(self) -> PreparedData:
        return PreparedData.open(self.prepared)


def latents_of(rows, zero_ts=ORIGIN_TS):
    """Return latent and prediction of each row from what it is and when after `zero_ts`, whatever its id."""
    latents = np.empty((len(rows["item"]), SPEC.dim), dtype=np.float32)
    probs = np.empty(len(latents), dtype=np.float32)
    keys = zip(*(rows[name].tolist() for name in ("user", "item", "event_ts")), strict=True)
    for row, (user, item, event_ts) in enumerate(keys):
        rng = np.random.default_rng([user, item, event_ts - zero_ts])
        latents[row], probs[row] = rng.normal(size=SPEC.dim), rng.random()
    return latents, probs


def write_latents(
    data: PreparedData, where, *, delay_us=0, zero_ts=ORIGIN_TS, scratch=None
) -> Manifest:
    """Embed everything after the FM window of a log that begins at `zero_ts`, on disk or on S3 (with scratch)."""
    until_ts = zero_ts + FM_STOP_TS - ORIGIN_TS - 1
    is_waiting = data.manifest.meta["history_events"] == "positives"
    inputs = {"prepared": data.manifest.version}
    writer = LatentsWriter(where, "snap", until_ts, SPEC, delay_us, is_waiting, inputs, scratch)
    span = TimeRange(until_ts + 1, data.log_range[1] + 1)
    parts = {
        (file.period, file.bucket): read_rows([file], span, columns=COLUMNS)
        for file in data.examples.files(span)
    }
    parts = {place: rows for place, rows in parts.items() if len(rows["user"])}
    writer.begin(list(parts))
    for place, rows in parts.items():
        latents, probs = latents_of(rows, zero_ts)
        writer.write(*place, {**rows, "fm_prob": probs}, latents)
    return writer.finish(list(parts), watermark_ts=data.log_range[1])


def walk(folder: Path, rows, name="path", *, delay_us=0, join=SETTINGS, **settings) -> Paths:
    """Take a log from its rows to the joined version of everything after the FM window.

    With another `period_origin` the log begins there, and the split has to follow.
    """
    root = folder / name
    shift_us = to_ts(settings.get("period_origin", ORIGIN)) - ORIGIN_TS
    data = prepare_rows(root, rows, **settings)
    write_latents(data, root / "latents", delay_us=delay_us, zero_ts=ORIGIN_TS + shift_us)
    found = Paths(root / "prepared", root / "latents", root / "joined")
    requests = TimeRange(FM_STOP_TS + shift_us, data.log_range[1] + 1)
    write_joined(found.prepared, found.latents, found.joined, requests, join)
    return found


def what_each_request_saw(path: Paths, before_ts=None):
    """Return every joined request with keys and contents instead of ids and pointers, sorted.

    Each is (user, item, time, label, prediction, past features, raw history, history); a history is a list of (item,
    event_ts, available_ts, code). Example ids and buckets do not show.
    """
    data = path.data
    names = {field: ["", *data.vocabulary(field).keys] for field in ("user", "item")}
    seen = []
    for entry in read_manifest(path.joined).files:
        if not entry.path.startswith("requests/"):
            continue
        bucket = int(entry.path.split("/")[1].removeprefix("bucket="))
        table = map_ipc(path.joined / f"history/bucket={bucket:03d}.arrow").to_pylist()
        raw = data.events(bucket).to_pylist()
        for row in pq.read_table(path.joined / entry.path, partitioning=None).to_pylist():
            if before_ts is not None and row["event_ts"] >= before_ts:
                continue
            window = table[row["latent_start"] : row["latent_start"] + row["latent_len"]]
            raw_window = raw[row["raw_start"] : row["raw_start"] + row["raw_len"]]
            seen.append(
                (
                    names["user"][row["user"]],
                    names["item"][row["item"]],
                    row["event_ts"],
                    row["label"],
                    row["teacher_prob"],
                    tuple(row[name] for name in sorted(row) if name.startswith("past_")),
                    [(names["item"][e["item"]], e["event_ts"]) for e in raw_window],
                    [
                        (names["item"][e["item"]], e["event_ts"], e["available_ts"], e["code"])
                        for e in window
                    ],
                )
            )
    return sorted(seen)


def random_rows(seed=0, num_rows=700, num_users=12):
    """Return a log of four weeks with equal times, late labels and repeated items."""
    rng = np.random.default_rng(seed)
    when = np.sort(rng.integers(0, 28 * 12, num_rows)) * 2 * HOUR_US
    late = np.where(rng.random(num_rows) < 0.4, rng.integers(0, 60, num_rows), 0) * HOUR_US
    cells = zip(
        rng.integers(0, num_users, num_rows).tolist(),
        rng.integers(0, 9, num_rows).tolist(),
        when.tolist(),
        late.tolist(),
        (rng.random(num_rows) < 0.6).tolist(),
        strict=True,
    )
    rows = {
        (user, item, at, click): {
            "uid": f"u{user}",
            "sku": item,
            "at": ORIGIN_TS + at,
            "clicked": int(click),
            "known_at": ORIGIN_TS + at + delay,
            "shop": f"s{user % 2}",
            "price": float(item % 4),
        }
        for user, item, at, delay, click in cells
    }
    return list(rows.values())
