"""Prove that a joined version has no leak, by computing its rows again in the plainest way.

Shares no code with the join and the features: plain lists, dictionaries and comparisons, from the prepared version, which
is the origin, and the latents version. Slow on purpose; give `sample` for large sets. Buckets are read one at a time, and
only those that hold a row of the sample.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.history.audit_keyed import KeyedAudit
from loopfm_ray.history.checks import Bucket, Rules, check_request, given_entries
from loopfm_ray.history.evidence import Origin, read_entries, read_origin, read_stored
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.tables import read_parquet
from loopfm_ray.store.teachers import teachers_of
from loopfm_ray.types import MICROS_PER_S

__all__ = ["AuditReport", "audit"]

_NUM_SHOWN = 20
_NUM_WAITING = 100_000
_SHARES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_INHERITED = ("snapshot_id", "trained_until_ts", "delay_us", "waits_for_label", "code_spec")
"""What a joined version says of its latents, and they must say of themselves."""


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Attributes:
        num_checked: requests that were computed again.
        num_leaks: those with anything wrong, and what is wrong with the version as a whole.
        leaks: the first 20 in words.
        num_entries: history entries of the checked requests.
        margin_s: min, p1, p10, p50, p90, p99 and max of `request_ts - available_ts` over these entries, in seconds: how
            early they were readable; min and max are exact, the others within 2.2 %. Empty without entries.
    """

    num_checked: int
    num_leaks: int
    leaks: tuple[str, ...]
    num_entries: int
    margin_s: dict[str, float]

    def raise_if_leaking(self) -> None:
        """Raise a LeakError that lists what was found, if anything was.

        Raises:
            LeakError: a request holds what it must not, or lacks what it must hold.
        """
        if self.num_leaks:
            lines = "\n  ".join(self.leaks)
            raise LeakError(
                f"audit found {self.num_leaks} wrong rows among {self.num_checked}:\n  {lines}\n"
                "do not train on this version; remove it and join again"
            )


class _Margins:
    """Margins of many entries in little memory."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._sketch = StalenessSketch()
        self._low: list[int] = []
        self._high: list[int] = []
        self.num = 0

    def add(self, margins: list[int]) -> None:
        """Add margins in microseconds."""
        self.num += len(margins)
        self._waiting += margins
        if len(self._waiting) >= _NUM_WAITING:
            self._merge()

    def _merge(self) -> None:
        values = np.asarray(self._waiting, dtype=np.int64)
        self._sketch = StalenessSketch.merge([self._sketch, StalenessSketch.of(values)])
        self._low = [min([*self._low, *self._waiting])]
        self._high = [max([*self._high, *self._waiting])]
        self._waiting = []

    def quantiles(self) -> dict[str, float]:
        """Return the distribution in seconds."""
        if not self.num:
            return {}
        if self._waiting:
            self._merge()
        low, high = self._low[0] / MICROS_PER_S, self._high[0] / MICROS_PER_S
        inner = {name: self._sketch.quantile_s(share) or 0.0 for name, share in _SHARES.items()}
        kept = {name: min(max(value, low), high) for name, value in inner.items()}
        return {"min": low, **kept, "max": high}


class _Versions(NamedTuple):
    """The versions that are compared."""

    joined: Version
    latents: LatentsReader
    prepared: Version

    @property
    def manifest(self) -> Manifest:
        """Of the joined version."""
        return self.joined.manifest

    @property
    def origin(self) -> Manifest:
        """Of the prepared version."""
        return self.prepared.manifest

    @property
    def range_ts(self) -> tuple[int, int]:
        """The half-open time range of the requests."""
        return self.manifest.meta["start_ts"], self.manifest.meta["stop_ts"]

    @property
    def request_files(self) -> dict[int, list[tuple[str, int]]]:
        """`(path, rows)` of the request files of each bucket."""
        files: dict[int, list[tuple[str, int]]] = {}
        for entry in self.manifest.files:
            if entry.path.startswith("requests/"):
                files.setdefault(_bucket_of(entry.path), []).append((entry.path, entry.num_rows))
        return files


def audit(
    joined: Location,
    latents: Location,
    prepared: Location,
    snapshot: Location | None = None,
    *,
    sample: int | None = 10_000,
    seed: int = 0,
) -> AuditReport:
    """Check requests of the joined version against the versions it was made from.

    Args:
        joined: the joined version, local or on S3 as all that follow.
        latents: the latents version it names as its input.
        prepared: the prepared version it names as its input: the origin of everything else.
        snapshot: the snapshot, which knows until when it was trained; None believes the latents version.
        sample: how many requests to check, drawn by `seed`; None checks all.
        seed: of the draw.

    Raises:
        StoreError: a version is not the one that was joined, or can not be read.
    """
    versions = _open(joined, latents, prepared)
    found = [*_check_versions(versions, snapshot), *_check_buckets(versions)]
    num_leaks, num_checked, margins = len(found), 0, _Margins()
    rules = _rules(versions)
    files = versions.request_files
    chosen = _draw(files, sample, seed)
    keyed = [
        KeyedAudit(source, one["key"], (versions.joined, versions.prepared))
        for source, one in sorted(versions.manifest.meta["histories"].items())
    ]
    for bucket, rows in sorted(chosen.items()):
        requests, all_ids = _read_requests(versions, files[bucket], rows)
        num_checked += len(requests)
        if not requests:
            continue
        known = _read_bucket(versions, bucket, requests)
        missing = list(_check_completeness(all_ids, known.origin))
        wrong = []
        for request in requests:
            problems = check_request(request, known, rules)
            if problems:
                wrong.append(f"example {request['example_id']}: " + "; ".join(problems))
            entries = given_entries(request, known)
            margins.add([request["event_ts"] - entry.available_ts for entry in entries])
            for one in keyed:
                one.add(request)
        num_leaks += len(missing) + len(wrong)
        found += [f"bucket {bucket} {text}" for text in [*missing, *wrong][:_NUM_SHOWN]]
    for one in keyed:
        for number, problems, early in one.check(versions.latents, rules):
            margins.add(early)
            num_leaks += bool(problems)
            if problems and len(found) < _NUM_SHOWN:
                found.append(f"example {number}: " + "; ".join(problems))
    shown = tuple(found[:_NUM_SHOWN])
    return AuditReport(num_checked, num_leaks, shown, margins.num, margins.quantiles())


def _open(joined: Location, latents: Location, prepared: Location) -> _Versions:
    found, reader, origin = open_version(joined), LatentsReader(latents), open_version(prepared)
    places = {"latents": (latents, reader.manifest), "prepared": (prepared, origin.manifest)}
    for name, (place, other) in places.items():
        expected = found.manifest.inputs.get(name)
        if other.content != expected:
            raise StoreError(
                f"{joined} was made from {name} {expected}, found {other.content} at {place};"
                " give the version it was made from"
            )
    return _Versions(found, reader, origin)


def _rules(versions: _Versions) -> Rules:
    own, meta = versions.manifest.meta, versions.latents.manifest.meta
    trained_until_ts = meta["trained_until_ts"]
    return Rules(
        own["max_len"],
        own["retention_us"],
        trained_until_ts,
        meta["kept_from_ts"],
        meta["delay_us"],
        own["with_own_latent"],
        tuple(own["side"]),
        tuple(one.from_ts for one in teachers_of(meta)),
    )


def _check_versions(versions: _Versions, snapshot: Location | None) -> Iterator[str]:
    """Check what the versions say of each other."""
    own, meta = versions.manifest.meta, versions.latents.manifest.meta
    if teachers_of(own) != teachers_of(meta):
        yield f"the joined version says that {teachers_of(own)} scored its rows, its latents say {teachers_of(meta)}"
    for name in _INHERITED:
        if own[name] != meta[name]:
            yield f"the joined version says {name} {own[name]}, its latents say {meta[name]}"
    is_waiting = versions.origin.meta["history_events"] == "positives"
    if meta["waits_for_label"] != is_waiting:
        yield f"the latents say waits_for_label {meta['waits_for_label']}, the prepared data needs {is_waiting}"
    if snapshot is not None:
        true = read_manifest(snapshot).meta
        for name in ("snapshot_id", "trained_until_ts"):
            if meta[name] != true[name]:
                yield f"the latents say {name} {meta[name]}, the snapshot {snapshot} says {true[name]}"


def _check_buckets(versions: _Versions) -> Iterator[str]:
    """Check that no bucket of the origin is missing."""
    start_ts, stop_ts = versions.range_ts
    origin_ts, period_us = (versions.origin.meta[n] for n in ("period_origin_ts", "period_us"))
    present = versions.request_files
    expected: Counter[int] = Counter()
    for entry in versions.origin.files:
        if entry.path.startswith("examples/"):
            begin = origin_ts + int(Path(entry.path).stem.removeprefix("period=")) * period_us
            is_whole = start_ts <= begin and begin + period_us <= stop_ts
            if is_whole and entry.num_rows:
                expected[_bucket_of(entry.path)] += entry.num_rows
    for bucket in sorted(set(expected) - set(present)):
        yield f"bucket {bucket}: {expected[bucket]} requests are missing, the bucket is not there"


def _check_completeness(found: list[int], origin: Origin) -> Iterator[str]:
    """Check that each request of the origin is there once."""
    have, want = Counter(found), Counter(origin.request_ids)
    lost, added = want - have, have - want
    if lost:
        yield f"lacks {sum(lost.values())} requests of the prepared version, such as {min(lost)}"
    if added:
        yield f"has {sum(added.values())} requests twice or out of range, such as {min(added)}"


def _draw(
    files: dict[int, list[tuple[str, int]]], sample: int | None, seed: int
) -> dict[int, list[list[int]] | None]:
    """Return which rows of each file of each bucket to check, rising; None is all of the bucket."""
    places = [
        (bucket, number, size)
        for bucket, own in sorted(files.items())
        for number, (_, size) in enumerate(own)
    ]
    total = sum(size for _, _, size in places)
    if sample is None or sample >= total:
        return dict.fromkeys(files)
    numbers = sorted(random.Random(seed).sample(range(total), sample))
    chosen: dict[int, list[list[int]] | None] = {}
    begin = place = 0
    for bucket, number, size in places:
        rows = []
        while place < len(numbers) and numbers[place] < begin + size:
            rows.append(numbers[place] - begin)
            place += 1
        begin += size
        if rows:
            own = chosen.setdefault(bucket, [[] for _ in files[bucket]])
            if own is not None:
                own[number] = rows
    return chosen


def _read_requests(
    versions: _Versions, files: Sequence[tuple[str, int]], rows: list[list[int]] | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the chosen requests of a bucket, and the example ids of all.

    Raises:
        StoreError: a file has other rows than the manifest says.
    """
    requests: list[dict[str, Any]] = []
    ids: list[int] = []
    for number, (path, size) in enumerate(files):
        table = read_parquet(versions.joined.path(path))
        if table.num_rows != size:
            raise StoreError(
                f"{path} of {versions.joined.location} has {table.num_rows} rows, its manifest says {size}; join again"
            )
        ids += table.column("example_id").to_pylist()
        kept = table if rows is None else table.take(pa.array(rows[number], pa.int64()))
        requests += kept.to_pylist()
    return requests, ids


def _read_bucket(versions: _Versions, bucket: int, requests: list[dict[str, Any]]) -> Bucket:
    """Read what the other versions say of the users of these requests, and of those in their histories."""
    slices = [(row["latent_start"], row["latent_len"]) for row in requests]
    entries, num_rows = read_entries(versions.joined, f"history/bucket={bucket:03d}.arrow", slices)
    users = {row["user"] for row in requests} | {entry.user for entry in entries.values()}
    wanted = ({row["example_id"] for row in requests}, versions.range_ts)
    origin = read_origin(versions.prepared, bucket, users, wanted, versions.manifest.meta["side"])
    return Bucket(origin, read_stored(versions.latents, bucket, users), entries, num_rows)


def _bucket_of(path: str) -> int:
    return int(path.split("/")[1].removeprefix("bucket="))
