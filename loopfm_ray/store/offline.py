"""The offline history store: every embedded event once, as a "latents" version of Parquet files.

A shard is the rows of a period and bucket, sorted by user, event_ts and example_id, written as a file of its own; `compact`
puts several into one. Files are written into a hidden work directory beside the final name, each with a marker once it is
whole, so a job that was killed goes on where it stopped; `LatentsWriter.finish` turns the directory into a version in one
rename, or uploads it and commits it on S3. A shard whose input did not change is taken over from the version before.
"""

import logging
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
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location, is_remote
from loopfm_ray.store.manifest import (
    Manifest,
    code_version,
    draft,
    file_location,
    find_manifest,
    finish,
    recover,
)
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.remote import claim, write_claim
from loopfm_ray.store.rows import (
    LATENTS_FORMAT,
    Rule,
    latents_schema,
    make_rows,
    prob_column,
    read_rows,
    rows_columns,
    rows_sha256,
    write_rows,
)
from loopfm_ray.store.shards import (
    SHARDS,
    Place,
    ShardFile,
    ShardStats,
    describe_rows,
    in_shards,
    is_listed,
    latents_meta,
    merge_fingerprint,
    read_shard_table,
    shard_path,
    write_shard_table,
)
from loopfm_ray.store.space import Space
from loopfm_ray.store.teachers import Teacher
from loopfm_ray.store.work import WorkFolder, bring

__all__ = [
    "LatentsReader",
    "LatentsWriter",
    "Previous",
    "ShardStats",
    "latents_schema",
    "merge_fingerprint",
    "shard_path",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Previous:
    """The version that a new one takes shards over from."""

    location: Location
    manifest: Manifest
    shards: Mapping[Place, ShardStats]

    def file_of(self, period: int, bucket: int) -> str:
        """Return the path of the file that holds a shard, or would if it were there."""
        found = self.shards.get((period, bucket))
        return shard_path(period, bucket) if found is None else found.path


@dataclass(frozen=True)
class LatentsWriter:
    """Writes one latents version, shard by shard, from any number of processes.

    Picklable, so a worker gets it whole. `waits_for_label` says that being an event tells the label (a log whose events
    are its positives), so an event is not readable before its label is known. `scratch` is where shards wait for the
    upload when `final_dir` is an `s3://` address: a local folder, or one that all workers share. `attempt` names work that
    is to be done though the version is there already; its shards wait apart, so that they mix with no others. `period_us`
    and `period_origin_ts` say which time a period is; without them periods can not expire later. `teachers` are the snapshots whose
    predictions the rows hold, in the order of their times, where they are several. `tasks` are those beside the first whose
    predictions rows have too, in columns named by `prob_column`.
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
    period_us: int | None = None
    period_origin_ts: int = 0
    teachers: tuple[Teacher, ...] = ()
    tasks: tuple[str, ...] = ()

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
            *self.tasks,
        )

    @property
    def _rule(self) -> Rule:
        return Rule(self.delay_us, self.waits_for_label)

    @property
    def work_dir(self) -> Path:
        """Where shards wait for `finish`."""
        parent, name = self._place
        return (
            parent
            / f".{name}.work-{config_hash(self.key, self.attempt) if self.attempt else self.key}"
        )

    @property
    def work(self) -> WorkFolder:
        """The files that wait."""
        return WorkFolder(self.work_dir)

    @property
    def _place(self) -> tuple[Path, str]:
        """The local folder that the work lies in, and the name of the version."""
        if self.scratch is not None and is_remote(self.final_dir):
            return self.scratch, str(self.final_dir).rstrip("/").rpartition("/")[2]
        final = Path(str(self.final_dir))
        return final.parent, final.name

    def begin(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Clear what killed runs and other inputs left; call it once, in the driver, before any `write`.

        Args:
            shards: all `(period, bucket)` of the version.

        Returns:
            the manifest, if the version of these shards is there and no `attempt` asks for it again.
        """
        if not is_remote(self.final_dir):
            recover(Path(str(self.final_dir)))
        done = None if self.attempt else self._finished(shards)
        parent, name = self._place
        for folder in parent.glob(f".{name}.work-*"):
            if done is not None or folder != self.work_dir:
                shutil.rmtree(folder)
        if done is None:
            self.work.forget(shards)
        if done is None and is_remote(self.final_dir):
            self.work_dir.mkdir(parents=True, exist_ok=True)
            write_claim(claim(str(self.final_dir)), self.work_dir)
        return done

    def previous(self) -> Previous | None:
        """Return the version under the final name if its shards may be taken over, else None.

        They may if the same code embedded them with the same snapshot, code spec and delay.
        """
        manifest = find_manifest(self.final_dir)
        if manifest is None or manifest.kind != "latents":
            return None
        same = all(manifest.meta.get(name) == value for name, value in self._meta().items())
        if not same or not is_listed(manifest) or manifest.code_version != code_version():
            return None
        return Previous(self.final_dir, manifest, read_shard_table(self.final_dir, manifest))

    def take_over(self, previous: Previous, places: Sequence[Place]) -> list[ShardStats]:
        """Make shards of one file of `previous` shards of this version, and return their stats.

        If they are all that the file holds, it is linked where it is on this disk, else copied; otherwise their rows are
        written anew, into one file again.

        Args:
            previous: from `previous()`.
            places: `(period, bucket)` of each.
        """
        stats = [previous.shards[place] for place in places]
        path = stats[0].path
        source = file_location(previous.location, previous.manifest, path)
        if len(stats) < sum(item.path == path for item in previous.shards.values()):
            path = ShardFile.over(places).path
            rows = read_rows(source, self.spec, tasks=self.tasks)
            chosen = in_shards(rows.column("event_ts").to_numpy(), stats)
            write_rows(rows.filter(pa.array(chosen)), self.work.file(path), self._rule)
        else:
            bring(source, self.work.file(path))
        taken = [replace(item, path=path, is_reused=True) for item in stats]
        self.work.mark(taken)
        return taken

    def completed(self, period: int, bucket: int) -> ShardStats | None:
        """Return the stats of a shard that is already whole, else None."""
        return self.work.find(period, bucket)

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
            rows: [N] columns example_id, user, item, event_ts, label_ts, is_event, fm_prob and those of further tasks, in any order.
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
        values = np.asarray(latents, dtype=np.float32)[order]
        ordered = {name: np.asarray(rows[name])[order] for name in rows}
        table = make_rows(ordered, values, self.spec, self._rule, self.tasks)
        path = shard_path(period, bucket)
        write_rows(table, self.work.file(path), self._rule)
        columns = rows_columns(table)
        stats = ShardStats(
            period=period,
            bucket=bucket,
            path=path,
            **describe_rows(columns, values),
            input_sha256=input_sha256,
            rows_sha256=rows_sha256(columns),
        )
        self.work.mark([stats])
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
        self.work.drop_strays(whole)
        write_shard_table(whole, self.work.file(SHARDS))
        record = self._record(whole)
        made = {
            **self._meta(),
            "watermark_ts": watermark_ts,
            "kept_from_ts": self.trained_until_ts + 1 if kept_from_ts is None else kept_from_ts,
        }
        manifest = draft(
            kind="latents",
            config_hash=self.key,
            inputs=self.inputs,
            meta=latents_meta(made, whole),
            num_rows=sum(item.num_rows for item in whole),
            record=record,
        )
        manifest = finish(
            self.work.data,
            Path(str(self.final_dir)),
            manifest,
            replace_other=replace_other,
            keep_equal=not self.attempt,
        )
        shutil.rmtree(self.work_dir)
        _log.info("latents %s: %s", manifest.version, record)
        return manifest

    def _meta(self) -> dict[str, Any]:  # Any: JSON
        """Return what readers must know of how the shards were made."""
        space = Space(self.snapshot_id, self.spec, self.delay_us, self.waits_for_label)
        return {
            "latents_format": LATENTS_FORMAT,
            **space.to_meta(),
            "trained_until_ts": self.trained_until_ts,
            "period_us": self.period_us,
            "period_origin_ts": self.period_origin_ts,
            **({"teachers": [asdict(one) for one in self.teachers]} if self.teachers else {}),
            **({"tasks": list(self.tasks)} if self.tasks else {}),
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
            table = read_rows(self.work.file(item.path), self.spec, ["event_ts", "is_event"])
            early = table.column("event_ts").to_numpy() <= watermark_ts
            found = int(np.count_nonzero(early & table.column("is_event").to_numpy()))
            before = previous.shards.get(item.place)
            num_late += max(found - (before.num_events if before else 0), 0)
        return {**record, "num_late_events": num_late, "previous": previous.manifest.version}

    def _finished(self, shards: Sequence[tuple[int, int]]) -> Manifest | None:
        """Return the manifest under the final name if it has these shards of the same inputs, else None."""
        manifest = find_manifest(self.final_dir)
        if manifest is None:
            return None
        if manifest.config_hash != self.key or not is_listed(manifest):
            return None
        # the shards, not the files: compaction puts several into one
        found = read_shard_table(self.final_dir, manifest)
        return manifest if set(found) == set(shards) else None

    def _check(self, rows: Mapping[str, NDArray[Any]], latents: NDArray[Any]) -> None:
        needed = [
            name
            for name in latents_schema(self.spec, self.tasks).names
            if name not in ("available_ts", "code")
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
        for name in ("fm_prob", *map(prob_column, self.tasks)):
            prob = np.asarray(rows[name])
            if not ((prob >= 0) & (prob <= 1)).all():
                raise DataError(
                    f"{name} must lie in [0, 1], found another value or NaN; store probabilities, not logits"
                )
