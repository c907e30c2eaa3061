"""The offline history store: every embedded event once, as a "latents" version of Parquet shards.

A shard is `period=0000/bucket=000.parquet`, sorted by user, event_ts and example_id. Shards are written into a hidden
work directory beside the final name, each with a marker once it is whole, so a job that was killed goes on where it
stopped; `LatentsWriter.finish` turns the directory into a version in one rename, or uploads it and commits it on S3. A
shard whose input did not change is taken over from the version before.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.config import config_hash
from loopfm_ray.errors import ConfigError, DataError, LeakError, ShapeError, StoreError
from loopfm_ray.history.order import time_order
from loopfm_ray.history.times import available_from
from loopfm_ray.store.codes import CodeSpec, encode
from loopfm_ray.store.filesystem import Location, is_remote, read_bytes
from loopfm_ray.store.manifest import (
    MANIFEST,
    Manifest,
    code_version,
    disk_errors,
    draft,
    file_location,
    install,
    read_manifest,
    recover,
    write_manifest,
)
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.remote import claim, claim_of, commit_folder, read_current, write_claim
from loopfm_ray.store.shards import (
    SHARDS,
    ShardStats,
    latents_schema,
    merge_fingerprint,
    parse_stats,
    read_shard_table,
    shard_path,
    write_shard_table,
)
from loopfm_ray.store.tables import code_column, read_parquet, write_atomically, write_parquet

__all__ = [
    "LatentsReader",
    "LatentsWriter",
    "Previous",
    "ShardStats",
    "latents_schema",
    "merge_fingerprint",
    "shard_path",
]

# Any below: pyarrow ships no types.
Table = Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Previous:
    """The version that a new one takes shards over from."""

    location: Location
    manifest: Manifest
    shards: Mapping[tuple[int, int], ShardStats]


@dataclass(frozen=True)
class LatentsWriter:
    """Writes one latents version, shard by shard, from any number of processes.

    Picklable, so a worker gets it whole. `waits_for_label` says that being an event tells the label (a log whose events
    are its positives), so an event is not readable before its label is known. `scratch` is where shards wait for the
    upload when `final_dir` is an `s3://` address: a local folder, or one that all workers share. `attempt` names work that
    is to be done though the version is there already; its shards wait apart, so that they mix with no others.
    """

    final_dir: Location
    snapshot_id: str
    trained_until_ts: int
    spec: CodeSpec
    delay_us: int
    waits_for_label: bool
    inputs: Mapping[str, str]
    scratch: Path | None = None
    attempt: str = ""

    def __post_init__(self) -> None:
        if is_remote(self.final_dir) and self.scratch is None:
            raise ConfigError(
                f"latents at {self.final_dir} need a folder where shards wait for the upload; give scratch"
            )

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
        parent, name = self._place
        return (
            parent
            / f".{name}.work-{config_hash(self.key, self.attempt) if self.attempt else self.key}"
        )

    @property
    def _place(self) -> tuple[Path, str]:
        """The local folder that the work lies in, and the name of the version."""
        if self.scratch is not None and is_remote(self.final_dir):
            return self.scratch, str(self.final_dir).rstrip("/").rpartition("/")[2]
        final = Path(self.final_dir)
        return final.parent, final.name

    def begin(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Clear what killed runs and other inputs left; call it once, in the driver, before any `write`.

        Args:
            shards: all `(period, bucket)` of the version.

        Returns:
            the manifest, if the version of these shards is there and no `attempt` asks for it again.
        """
        if not is_remote(self.final_dir):
            recover(Path(self.final_dir))
        done = None if self.attempt else self._finished(shards)
        parent, name = self._place
        for folder in parent.glob(f".{name}.work-*"):
            if done is not None or folder != self.work_dir:
                shutil.rmtree(folder)
        if done is None and is_remote(self.final_dir):
            self.work_dir.mkdir(parents=True, exist_ok=True)
            write_claim(claim(str(self.final_dir)), self.work_dir)
        return done

    def previous(self) -> Previous | None:
        """Return the version under the final name if its shards may be taken over, else None.

        They may if the same code embedded them with the same snapshot, code spec and delay.
        """
        manifest = self._present()
        if manifest is None or manifest.kind != "latents":
            return None
        same = all(manifest.meta.get(name) == value for name, value in self._meta().items())
        listed = any(entry.path == SHARDS for entry in manifest.files)
        if not same or not listed or manifest.code_version != code_version():
            return None
        return Previous(self.final_dir, manifest, read_shard_table(self.final_dir, manifest))

    def take_over(self, previous: Previous, period: int, bucket: int) -> ShardStats:
        """Make a shard of `previous` one of this version: linked where it is on this disk, else copied."""
        source = file_location(previous.location, previous.manifest, shard_path(period, bucket))
        path = self._shard(period, bucket)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if is_remote(previous.location):
            data = read_bytes(source)
            write_atomically(path, lambda staged: staged.write_bytes(data))
        else:
            os.link(source, path)
        stats = replace(previous.shards[period, bucket], is_reused=True)
        self._mark(stats)
        return stats

    def completed(self, period: int, bucket: int) -> ShardStats | None:
        """Return the stats of a shard that is already whole, else None."""
        try:
            tree = json.loads(self._marker(period, bucket).read_text(encoding="utf-8"))
            num_bytes = self._shard(period, bucket).stat().st_size
        except FileNotFoundError:
            return None
        stats = parse_stats(tree)
        return stats if stats.num_bytes == num_bytes else None

    def write(
        self,
        period: int,
        bucket: int,
        rows: Mapping[str, NDArray[Any]],
        latents: NDArray[Any],
        input_sha256: str = "",
    ) -> ShardStats:
        """Write one shard, or keep it if it is already whole.

        Args:
            period: of the rows.
            bucket: of the rows.
            rows: [N] columns example_id, user, item, event_ts, label_ts, is_event, fm_prob, in any order.
            latents: float [N, d].
            input_sha256: of all that the shard was made from.

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
            input_sha256=input_sha256,
        )
        self._mark(stats)
        return stats

    def finish(
        self,
        shards: Sequence[tuple[int, int]],
        *,
        watermark_ts: int,
        kept_from_ts: int | None = None,
        replace_other: bool = False,
    ) -> Manifest:
        """Make the version of exactly these `(period, bucket)` shards.

        Args:
            shards: all shards of the version.
            watermark_ts: time up to which all events are in it.
            kept_from_ts: time from which on all events are in it; None is everything later than the snapshot.
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
        write_shard_table(whole, self.work_dir / "data" / SHARDS)
        record = self._record(whole)
        meta = {
            **self._meta(),
            "watermark_ts": watermark_ts,
            "kept_from_ts": self.trained_until_ts + 1 if kept_from_ts is None else kept_from_ts,
            "num_events": sum(item.num_events for item in whole),
            "fingerprint": merge_fingerprint(whole, self.spec.dim),
        }
        manifest = draft(
            kind="latents",
            config_hash=self.key,
            inputs=self.inputs,
            meta=meta,
            num_rows=sum(item.num_rows for item in whole),
            record=record,
        )
        with disk_errors(self.work_dir):
            staged = self.work_dir / "data"
            manifest = write_manifest(staged, manifest)
            begun = claim_of(staged)
            if begun is not None:
                manifest = commit_folder(begun, staged, manifest, replace_other=replace_other)
            else:
                final, again = Path(self.final_dir), bool(self.attempt)
                manifest = install(staged, final, replace_other=replace_other, keep_equal=not again)
        shutil.rmtree(self.work_dir)
        _log.info("latents %s: %s", manifest.version, record)
        return manifest

    def _meta(self) -> dict[str, Any]:  # Any: JSON
        """Return what readers must know of how the shards were made."""
        return {
            "snapshot_id": self.snapshot_id,
            "trained_until_ts": self.trained_until_ts,
            "code_spec": self.spec.to_tree(),
            "delay_us": self.delay_us,
            "waits_for_label": self.waits_for_label,
        }

    def _record(self, stats: Sequence[ShardStats]) -> dict[str, Any]:  # Any: JSON
        """Return how much was taken over, and how many events came after the watermark of the version before."""
        reused = sum(item.is_reused for item in stats)
        record: dict[str, Any] = {"num_reused": reused, "num_redone": len(stats) - reused}
        previous = self.previous()
        if previous is None:
            return record
        watermark_ts = int(previous.manifest.meta["watermark_ts"])
        num_late = 0
        for item in stats:
            if item.is_reused:
                continue
            table = read_parquet(self._shard(item.period, item.bucket), ["event_ts", "is_event"])
            early = table.column("event_ts").to_numpy() <= watermark_ts
            found = int(np.count_nonzero(early & table.column("is_event").to_numpy()))
            before = previous.shards.get((item.period, item.bucket))
            num_late += max(found - (before.num_events if before else 0), 0)
        return {**record, "num_late_events": num_late, "previous": previous.manifest.version}

    def _mark(self, stats: ShardStats) -> None:
        text = json.dumps(asdict(stats), sort_keys=True)
        write_atomically(
            self._marker(stats.period, stats.bucket),
            lambda staged: staged.write_text(text, encoding="utf-8"),
        )

    def _present(self) -> Manifest | None:
        """Return the manifest of the version under the final name, None if there is none."""
        if is_remote(self.final_dir):
            current = read_current(str(self.final_dir))
            return None if current is None else current[0]
        if not (Path(self.final_dir) / MANIFEST).is_file():
            return None
        return read_manifest(self.final_dir)

    def _finished(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Return the manifest under the final name if it has these shards of the same inputs, else None."""
        manifest = self._present()
        if manifest is None:
            return None
        paths = {entry.path for entry in manifest.files} - {SHARDS}
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
