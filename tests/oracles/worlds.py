"""Small worlds for the history and store tests: a prepared version and the latents version made from it."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from loopfm_ray.history.join import JoinSettings
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.shards import kept_from
from loopfm_ray.store.tables import write_parquet
from loopfm_ray.types import TimeRange

PERIOD_US = 1000
NUM_PERIODS = 4
NUM_BUCKETS = 3
TRAINED_UNTIL_TS = 999
REQUESTS = TimeRange(2000, 4000)
SPEC = CodeSpec(4, 6, (0.5, 1.0, 1.5, 2.0, 1.0, 3.0))
SETTINGS = JoinSettings(max_len=7, retention_us=1500, with_own_latent=True)


def make_examples(seed=0, num_rows=600, num_users=14, num_periods=NUM_PERIODS):
    """Return columns of examples in periods 0..num_periods - 1: some share a time, some labels come late."""
    rng = np.random.default_rng(seed)
    event_ts = np.sort(rng.integers(0, PERIOD_US * num_periods, num_rows)) // 20 * 20
    user = rng.integers(1, num_users + 1, num_rows)
    late = np.where(rng.random(num_rows) < 0.3, rng.integers(0, 400, num_rows), 0)
    return {
        "example_id": np.arange(num_rows, dtype=np.int64),
        "bucket": (user % NUM_BUCKETS).astype(np.int16),
        "user": user.astype(np.int32),
        "item": rng.integers(0, 50, num_rows).astype(np.int32),
        "event_ts": event_ts.astype(np.int64),
        "label_ts": (event_ts + late).astype(np.int64),
        "label": rng.integers(0, 2, num_rows).astype(np.float32),
        "is_event": rng.random(num_rows) < 0.6,
    }


def user_keys(num_users=14):
    return ["", *(f"user-{number}" for number in range(1, num_users + 1))]


def latents_of(example_id):
    """Return the latent and prediction that stand for the snapshot: functions of the example id alone."""
    rng = np.random.default_rng(7)
    table = rng.normal(size=(4096, SPEC.dim)).astype(np.float32)
    prob = rng.random(4096).astype(np.float32)
    return table[example_id % 4096], prob[example_id % 4096]


def shard_rows(examples, period, bucket):
    chosen = (examples["event_ts"] // PERIOD_US == period) & (examples["bucket"] == bucket)
    return {name: values[chosen] for name, values in examples.items()}


def write_prepared(folder: Path, examples):
    with stage(folder) as staged:
        (staged / "schema.json").write_text("{}")
        for bucket in range(NUM_BUCKETS):
            for period in range(NUM_PERIODS):
                rows = shard_rows(examples, period, bucket)
                path = staged / f"examples/bucket={bucket:03d}/period={period:04d}.parquet"
                write_parquet(pa.table(rows), path)
        meta = {"num_buckets": NUM_BUCKETS, "period_us": PERIOD_US, "period_origin_ts": 0}
        meta |= {"history_events": "positives"}
        return commit(
            staged,
            kind="prepared",
            config_hash="0" * 16,
            inputs={},
            meta=meta,
            num_rows=len(examples["example_id"]),
        )


def make_writer(
    folder: Path, delay_us=10, waits_for_label=True, snapshot_id="snap", inputs=None, scratch=None
):
    return LatentsWriter(
        final_dir=folder,
        snapshot_id=snapshot_id,
        trained_until_ts=TRAINED_UNTIL_TS,
        spec=SPEC,
        delay_us=delay_us,
        waits_for_label=waits_for_label,
        inputs={"prepared": "p"} if inputs is None else inputs,
        period_us=PERIOD_US,
        scratch=scratch,
    )


def write_shard(writer, examples, period, bucket):
    rows = shard_rows(examples, period, bucket)
    latents, prob = latents_of(rows["example_id"])
    names = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
    columns = {**{n: rows[n] for n in names}, "fm_prob": prob}
    return writer.write(period, bucket, columns, latents, shard_sha256(examples, period, bucket))


def shard_sha256(examples, period, bucket):
    """Return what tells whether a shard would be the same: here its rows are all that it is made from."""
    rows = shard_rows(examples, period, bucket)
    order = np.argsort(rows["example_id"])
    parts = [rows[name][order].tobytes() for name in sorted(rows)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


SHARDS = tuple(
    (period, bucket) for period in range(1, NUM_PERIODS) for bucket in range(NUM_BUCKETS)
)


def write_latents(folder: Path, examples, shards=SHARDS, **options):
    writer = make_writer(folder, **options)
    done = writer.begin(shards)
    if done is not None:
        return done
    for period, bucket in shards:
        write_shard(writer, examples, period, bucket)
    return writer.finish(shards, watermark_ts=PERIOD_US * NUM_PERIODS)


def shards_of(examples, retention_us=None):
    """Return the shards that a version of these examples has, and its watermark."""
    watermark_ts = int(examples["event_ts"].max())
    later = examples["event_ts"] > TRAINED_UNTIL_TS
    periods = examples["event_ts"][later] // PERIOD_US
    places = set(zip(periods.tolist(), examples["bucket"][later].tolist(), strict=True))
    if retention_us is not None:
        places = {p for p in places if (p[0] + 1) * PERIOD_US > watermark_ts - retention_us}
    return sorted(places), watermark_ts


def update_latents(folder, examples, retention_us=None, inputs=None):
    """Materialise over what lies there, as the job does, with latents that are a function of the example id."""
    shards, watermark_ts = shards_of(examples, retention_us)
    writer = make_writer(folder, inputs=inputs)
    done = writer.begin(shards)
    if done is not None:
        return done
    previous = writer.previous()
    groups = {}
    for place in shards:
        if writer.completed(*place) is None:
            key = place[1], previous.file_of(*place) if previous else place[0]
            groups.setdefault(key, []).append(place)
    for places in groups.values():
        before = previous.shards if previous else {}
        same = [
            p
            for p in places
            if p in before and before[p].input_sha256 == shard_sha256(examples, *p)
        ]
        if same:
            writer.take_over(previous, same)
        for place in places:
            if place not in same:
                write_shard(writer, examples, *place)
    kept_from_ts = TRAINED_UNTIL_TS + 1
    if retention_us is not None:
        kept_from_ts = max(kept_from_ts, kept_from(watermark_ts, retention_us, PERIOD_US, 0))
    return writer.finish(
        shards, watermark_ts=watermark_ts, kept_from_ts=kept_from_ts, replace_other=True
    )


def tree_bytes(folder: Path):
    """Return the content of every file, but for the fields of manifests that tell when they were written."""
    import json

    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            tree = json.loads(data)
            del tree["created_at"], tree["seconds"]
            tree.pop("record", None)
            data = json.dumps(tree, sort_keys=True).encode()
        found[path.relative_to(folder).as_posix()] = data
    return found
