"""The offline history store: every embedded event once, as a "latents" version of Parquet shards.

A shard is `period=0000/bucket=000.parquet`, sorted by user, event_ts and example_id. Shards are written into a hidden
work directory beside the final name, each with a marker once it is whole, so a job that was killed goes on where it
stopped; `LatentsWriter.finish` turns the directory into a version in one rename. Versions are read from local disk and
S3; they are written locally.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.config import config_hash
from loopfm_ray.errors import DataError, LeakError, ShapeError, StoreError
from loopfm_ray.history.order import time_order
from loopfm_ray.history.times import available_from
from loopfm_ray.store.codes import CodeSpec, encode
from loopfm_ray.store.filesystem import Location, join
from loopfm_ray.store.manifest import (
    MANIFEST,
    Manifest,
    disk_errors,
    draft,
    install,
    read_manifest,
    recover,
    write_manifest,
)
from loopfm_ray.store.tables import code_column, read_parquet, write_atomically, write_parquet

__all__ = [
    "LatentsReader",
    "LatentsWriter",
    "ShardStats",
    "latents_schema",
    "merge_fingerprint",
    "shard_path",
]

# Any below: pyarrow ships no types.
Table = Any

_SORT_KEYS = ("user", "event_ts", "example_id")


def shard_path(period: int, bucket: int) -> str:
    """Return the path of one shard inside a latents version."""
    return f"period={period:04d}/bucket={bucket:03d}.parquet"


def latents_schema(spec: CodeSpec) -> Any:
    """Return the Arrow schema of a shard whose codes follow `spec`."""
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("user", pa.int32()),
            ("item", pa.int32()),
            ("event_ts", pa.int64()),
            ("label_ts", pa.int64()),
            ("available_ts", pa.int64()),
            ("is_event", pa.bool_()),
            ("fm_prob", pa.float32()),
            ("code", pa.binary(spec.num_bytes)),
        ]
    )


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds; sums, so that shards merge exactly."""

    period: int
    bucket: int
    num_rows: int
    num_events: int
    num_bytes: int
    sums: tuple[float, ...]
    squares: tuple[float, ...]


def merge_fingerprint(stats: Sequence[ShardStats], dim: int) -> dict[str, list[float]]:
    """Return mean and standard deviation of each latent dimension over all shards, in shard order."""
    count = sum(item.num_rows for item in stats)
    ordered = sorted(stats, key=lambda item: (item.period, item.bucket))
    mean = np.zeros(dim)
    square = np.zeros(dim)
    for item in ordered:
        mean += item.sums
        square += item.squares
    mean /= max(count, 1)
    std = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0.0))
    return {"mean": mean.tolist(), "std": std.tolist()}


@dataclass(frozen=True)
class LatentsWriter:
    """Writes one latents version, shard by shard, from any number of processes.

    Picklable, so a worker gets it whole. `waits_for_label` says that being an event tells the label (a log whose events
    are its positives), so an event is not readable before its label is known.
    """

    final_dir: Path
    snapshot_id: str
    trained_until_ts: int
    spec: CodeSpec
    delay_us: int
    waits_for_label: bool
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """16 hex digits that name what the shards depend on; shards of another key are not reused."""
        return config_hash(
            self.snapshot_id,
            self.trained_until_ts,
            self.spec.to_tree(),
            self.delay_us,
            self.waits_for_label,
            dict(self.inputs),
        )

    @property
    def work_dir(self) -> Path:
        """Where shards wait for `finish`."""
        return self.final_dir.parent / f".{self.final_dir.name}.work-{self.key}"

    def begin(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Clear what killed runs and other inputs left; call it once, in the driver, before any `write`.

        Args:
            shards: all `(period, bucket)` of the version.

        Returns:
            the manifest, if the version of these shards is already there; then nothing is left to do.
        """
        recover(self.final_dir)
        done = self._finished(shards)
        for folder in self.final_dir.parent.glob(f".{self.final_dir.name}.work-*"):
            if done is not None or folder != self.work_dir:
                shutil.rmtree(folder)
        return done

    def completed(self, period: int, bucket: int) -> ShardStats | None:
        """Return the stats of a shard that is already whole, else None."""
        try:
            tree = json.loads(self._marker(period, bucket).read_text(encoding="utf-8"))
            num_bytes = self._shard(period, bucket).stat().st_size
        except FileNotFoundError:
            return None
        stats = ShardStats(
            **{**tree, "sums": tuple(tree["sums"]), "squares": tuple(tree["squares"])}
        )
        return stats if stats.num_bytes == num_bytes else None

    def write(
        self, period: int, bucket: int, rows: Mapping[str, NDArray[Any]], latents: NDArray[Any]
    ) -> ShardStats:
        """Write one shard, or keep it if it is already whole.

        Args:
            period: of the rows.
            bucket: of the rows.
            rows: [N] columns example_id, user, item, event_ts, label_ts, is_event, fm_prob, in any order.
            latents: float [N, d].

        Raises:
            LeakError: a row is not later than what the snapshot was trained on.
            DataError: a prediction is no probability, or a latent is not finite.
        """
        done = self.completed(period, bucket)
        if done is not None:
            return done
        self._check(rows, latents)
        order = time_order(rows["user"], rows["event_ts"], rows["example_id"])
        columns = {name: np.asarray(values)[order] for name, values in rows.items()}
        values = np.asarray(latents, dtype=np.float32)[order]
        label_ts = columns["label_ts"] if self.waits_for_label else None
        columns["available_ts"] = available_from(columns["event_ts"], label_ts, self.delay_us)
        schema = latents_schema(self.spec)
        arrays = [
            code_column(encode(values, self.spec))
            if field.name == "code"
            else pa.array(columns[field.name]).cast(field.type)
            for field in schema
        ]
        path = self._shard(period, bucket)
        write_parquet(pa.Table.from_arrays(arrays, schema=schema), path)
        wide = values.astype(np.float64)
        stats = ShardStats(
            period=period,
            bucket=bucket,
            num_rows=len(values),
            num_events=int(np.count_nonzero(columns["is_event"])),
            num_bytes=path.stat().st_size,
            sums=tuple(wide.sum(axis=0).tolist()),
            squares=tuple(np.square(wide).sum(axis=0).tolist()),
        )
        text = json.dumps(asdict(stats), sort_keys=True)
        write_atomically(
            self._marker(period, bucket), lambda staged: staged.write_text(text, encoding="utf-8")
        )
        return stats

    def finish(
        self, shards: Sequence[tuple[int, int]], *, watermark_ts: int, replace_other: bool = False
    ) -> Manifest:
        """Make the version of exactly these `(period, bucket)` shards.

        Args:
            shards: all shards of the version.
            watermark_ts: time up to which all events are in it.
            replace_other: whether another version under the final name gives way.

        Raises:
            StoreError: a shard is missing, or the final name is taken.
        """
        stats = [self.completed(period, bucket) for period, bucket in shards]
        whole = [item for item in stats if item is not None]
        if len(whole) < len(stats):
            missing = [place for place, item in zip(shards, stats, strict=True) if item is None]
            raise StoreError(
                f"{len(missing)} of {len(stats)} shards of {self.final_dir} are not written, first"
                f" (period, bucket) {missing[0]}; run materialize again, it keeps what is done"
            )
        self._drop_strays({shard_path(*place) for place in shards})
        meta = {
            "snapshot_id": self.snapshot_id,
            "trained_until_ts": self.trained_until_ts,
            "code_spec": self.spec.to_tree(),
            "delay_us": self.delay_us,
            "waits_for_label": self.waits_for_label,
            "watermark_ts": watermark_ts,
            "num_events": sum(item.num_events for item in whole),
            "fingerprint": merge_fingerprint(whole, self.spec.dim),
        }
        manifest = draft(
            kind="latents",
            config_hash=self.key,
            inputs=self.inputs,
            meta=meta,
            num_rows=sum(item.num_rows for item in whole),
        )
        with disk_errors(self.final_dir.parent):
            staged = self.work_dir / "data"
            write_manifest(staged, manifest)
            manifest = install(staged, self.final_dir, replace_other=replace_other)
        shutil.rmtree(self.work_dir)
        return manifest

    def _finished(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Return the manifest under the final name if it has these shards of the same inputs, else None."""
        if not (self.final_dir / MANIFEST).is_file():
            return None
        manifest = read_manifest(self.final_dir)
        paths = {entry.path for entry in manifest.files}
        same = manifest.config_hash == self.key and paths == {
            shard_path(*place) for place in shards
        }
        return manifest if same else None

    def _check(self, rows: Mapping[str, NDArray[Any]], latents: NDArray[Any]) -> None:
        needed = [
            name for name in latents_schema(self.spec).names if name not in ("available_ts", "code")
        ]
        lengths = {name: len(rows[name]) for name in needed if name in rows}
        if sorted(lengths) != sorted(needed) or set(lengths.values()) - {len(latents)}:
            raise ShapeError(
                f"a shard needs columns {needed}, one value per latent; found lengths {lengths} and {len(latents)}"
            )
        if not len(latents):
            return
        early = int(np.count_nonzero(rows["event_ts"] <= self.trained_until_ts))
        if early:
            raise LeakError(
                f"snapshot {self.snapshot_id} was trained until {self.trained_until_ts} and must embed only later"
                f" events, found {early} of {len(latents)} rows not later, first {int(np.min(rows['event_ts']))};"
                " use an earlier snapshot or a later time range"
            )
        prob = np.asarray(rows["fm_prob"])
        if not ((prob >= 0) & (prob <= 1)).all():
            raise DataError(
                "fm_prob must lie in [0, 1], found another value or NaN; store probabilities, not logits"
            )

    def _drop_strays(self, expected: set[str]) -> None:
        """Remove shards that are not part of the version, such as those of a longer time range."""
        data = self.work_dir / "data"
        for path in data.rglob("*.parquet"):
            if path.relative_to(data).as_posix() not in expected:
                path.unlink()
        (data / MANIFEST).unlink(missing_ok=True)

    def _shard(self, period: int, bucket: int) -> Path:
        return self.work_dir / "data" / shard_path(period, bucket)

    def _marker(self, period: int, bucket: int) -> Path:
        return self.work_dir / "markers" / f"{period:04d}-{bucket:03d}.json"


class LatentsReader:
    """Reads one latents version, local or on S3."""

    def __init__(self, location: Location) -> None:
        """Open the version at `location`.

        Raises:
            StoreError: there is none, or it is of another kind.
        """
        self.location = location
        self.manifest = read_manifest(location)
        if self.manifest.kind != "latents":
            raise StoreError(
                f"{location} holds a version of kind {self.manifest.kind!r}, expected 'latents';"
                " give the directory that materialize wrote"
            )
        self.spec = CodeSpec.from_tree(self.manifest.meta["code_spec"])
        self._shards = sorted(_parse_shard(entry.path) for entry in self.manifest.files)

    @property
    def buckets(self) -> list[int]:
        """The buckets that have shards."""
        return sorted({bucket for _, bucket in self._shards})

    @property
    def periods(self) -> list[int]:
        """The periods that have shards."""
        return sorted({period for period, _ in self._shards})

    def read_bucket(
        self,
        bucket: int,
        *,
        columns: Sequence[str] | None = None,
        periods: Sequence[int] | None = None,
        events_only: bool = False,
    ) -> Table:
        """Return the rows of one bucket, sorted by user, event_ts and example_id.

        Args:
            bucket: to read.
            columns: to return; None gives all.
            periods: to read; None reads all.
            events_only: whether to leave out rows that are no events.
        """
        schema = latents_schema(self.spec)
        wanted = list(columns) if columns is not None else schema.names
        needed = [name for name in schema.names if name in {*wanted, *_SORT_KEYS, "is_event"}]
        parts = [
            read_parquet(join(self.location, *shard_path(period, bucket).split("/")), needed)
            for period, owner in self._shards
            if owner == bucket and (periods is None or period in periods)
        ]
        empty = pa.schema([schema.field(name) for name in needed]).empty_table()
        table = pa.concat_tables(parts) if parts else empty
        if events_only:
            table = table.filter(table.column("is_event"))
        user, event_ts, example_id = (table.column(name).to_numpy() for name in _SORT_KEYS)
        order = time_order(user, event_ts, example_id)
        return table.select(wanted).take(pa.array(order)).combine_chunks()


def _parse_shard(path: str) -> tuple[int, int]:
    """Return `(period, bucket)` of the path of a shard."""
    try:
        folder, name = path.removesuffix(".parquet").split("/")
        return int(folder.removeprefix("period=")), int(name.removeprefix("bucket="))
    except ValueError as error:
        raise StoreError(
            f"{path!r} is no shard of a latents version, expected period=0000/bucket=000.parquet;"
            " remove the version and write it again"
        ) from error
