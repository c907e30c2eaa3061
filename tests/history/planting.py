"""A whole small world to plant leaks in, so that files, manifests and versions fit: only the audit can tell."""

import shutil
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, StoredSide, write_joined
from loopfm_ray.history.slices import HISTORY_COLUMNS
from loopfm_ray.store.manifest import commit, read_manifest, stage, write_manifest
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import Rule, read_rows, write_rows
from loopfm_ray.store.tables import map_ipc, write_ipc, write_parquet
from loopfm_ray.types import TimeRange
from tests.oracles import paths

MAX_LEN = 6
DELAY_US = 3 * paths.HOUR_US
RETENTION_US = 9 * paths.DAY_US
SIDE = StoredSide(label="label", event_type="shop")
SETTINGS = JoinSettings(MAX_LEN, RETENTION_US, with_own_latent=True, side=SIDE)
SNAPSHOT = "snap"


def make_world(root):
    """Write the honest world that every case starts from."""
    paths.walk(
        root,
        paths.random_rows(seed=5, num_rows=450),
        name="honest",
        delay_us=DELAY_US,
        join=SETTINGS,
        period_s=9 * 86_400.0,
        num_buckets=2,
    )
    write_snapshot(root / "honest" / "snapshot", paths.FM_STOP_TS - 1)


def write_snapshot(folder, trained_until_ts):
    """Write the manifest of a snapshot; the audit reads no more of it."""
    with stage(folder) as staged:
        (staged / "snapshot.json").write_text(str(trained_until_ts))
        meta = {"snapshot_id": SNAPSHOT, "trained_until_ts": trained_until_ts}
        commit(
            staged,
            kind="snapshot",
            config_hash="0" * 16,
            inputs={},
            meta=meta,
            num_rows=0,
            replace_other=True,
        )


def read(path):
    return pq.read_table(path, partitioning=None).to_pylist()


def rewrite(folder, **changes):
    """Write the manifest of a version anew from its files, with changed fields; return its content id."""
    manifest = replace(read_manifest(folder), **changes)
    (folder / "manifest.json").unlink()
    return write_manifest(folder, manifest).content


class Case:
    """A copy of the honest world, with the tables of one request file at hand."""

    def __init__(self, world, folder):
        shutil.copytree(world / "honest", folder / "case")
        self.root = folder / "case"
        self.prepared, self.latents = self.root / "prepared", self.root / "latents"
        self.joined, self.snapshot = self.root / "joined", self.root / "snapshot"
        files = [e for e in read_manifest(self.joined).files if e.path.startswith("requests/")]
        # the last whole period, where histories are long
        files = [e for e in files if e.path.endswith("period=0002.parquet")]
        self.request_path = self.joined / max(files, key=lambda e: e.num_rows).path
        self.bucket = int(self.request_path.parent.name.removeprefix("bucket="))
        self.history_path = self.joined / f"history/bucket={self.bucket:03d}.arrow"
        self.requests, self.history = (
            read(self.request_path),
            map_ipc(self.history_path).to_pylist(),
        )
        spec = LatentsReader(self.latents).spec
        self.stored = [row for path in self.shards() for row in read_rows(path, spec).to_pylist()]
        self.sides = {
            row["example_id"]: {name: row[origin] for name, origin in SIDE.origins.items()}
            for path in sorted(self.prepared.glob(f"examples/bucket={self.bucket:03d}/*.parquet"))
            for row in read(path)
        }
        self.stored.sort(key=lambda row: (row["event_ts"], row["example_id"]))

    def shards(self):
        return sorted(self.latents.glob(f"*/bucket={self.bucket:03d}.parquet"))

    def of(self, row, where=lambda event, row: True, events=True):
        """Return the latents rows of a request's user, oldest first."""
        return [
            e
            for e in self.stored
            if e["user"] == row["user"] and e["is_event"] == events and where(e, row)
        ]

    def window(self, row):
        return self.history[row["latent_start"] : row["latent_start"] + row["latent_len"]]

    def request(self, where=lambda row: True, min_len=3):
        """Return the last request with some history for which something holds."""
        for row in self.requests[::-1]:
            if row["latent_len"] >= min_len and where(row):
                return row
        raise AssertionError("the world has no such request")

    def request_with(self, where, min_len=2):
        """Return the last request whose user has an event of some kind, and the last such event."""
        row = self.request(lambda row: self.of(row, where), min_len)
        return row, self.of(row, where)[-1]

    def give(self, row, events):
        """Give one request another history, in rows of its own."""
        row["latent_start"], row["latent_len"] = len(self.history), len(events)
        for event in events:
            whole = {**event, **self.sides[event["example_id"]]}
            self.history.append({name: whole[name] for name in (*HISTORY_COLUMNS, *SIDE.columns)})

    def add_event(self, row, event):
        """Give one request one event more, as its newest, within the longest history."""
        self.give(row, [*self.window(row), event][-MAX_LEN:])

    def save(self):
        """Write the tables of the joined version."""
        write_ipc(
            pa.Table.from_pylist(self.history, map_ipc(self.history_path).schema), self.history_path
        )
        schema = pq.read_schema(self.request_path)
        write_parquet(pa.Table.from_pylist(self.requests, schema), self.request_path)
        rewrite(self.joined)

    def edit(self, version, pattern, change, **manifest):
        """Apply `change` to every row of the files of a version; the joined version names the result as its input."""
        folder = self.root / version
        for path in sorted(folder.glob(pattern)):
            table, write = self._open(path, version)
            rows = table.to_pylist()
            for row in rows:
                change(row)
            write(pa.Table.from_pylist(rows, table.schema), path)
        self.rename(version, rewrite(folder, **manifest))

    def _open(self, path, version):
        """Return the rows of a file and what writes such files."""
        if path.suffix == ".arrow":
            return map_ipc(path), write_ipc
        if version == "latents":
            reader = LatentsReader(self.latents)
            meta = reader.manifest.meta
            rule = Rule(meta["delay_us"], meta["waits_for_label"])
            return read_rows(path, reader.spec), partial(write_rows, rule=rule)
        return pq.read_table(path, partitioning=None), write_parquet

    def rename(self, name, version):
        inputs = {**read_manifest(self.joined).inputs, name: version}
        rewrite(self.joined, inputs=inputs)

    def join_again(self):
        """Join what lies there now, honestly: the leak is in what the join reads."""
        meta = read_manifest(self.joined).meta
        shutil.rmtree(self.joined)
        span = TimeRange(meta["start_ts"], meta["stop_ts"])
        write_joined(self.prepared, self.latents, self.joined, span, SETTINGS)

    def audit(self, sample=None):
        return audit(self.joined, self.latents, self.prepared, self.snapshot, sample=sample)
