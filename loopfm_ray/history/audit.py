"""Prove that a joined version has no leak, by computing its histories again in the plainest way.

Shares no code with the join: plain lists, dictionaries and comparisons, straight from the latents version. Slow on
purpose; give `sample` for large sets.
"""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.tables import map_ipc

__all__ = ["AuditReport", "audit"]

_NUM_SHOWN = 20
_NUM_MARGINS = 1_000_000


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    `num_leaks` counts requests with anything wrong, `leaks` describes the first 20, and `margin_s` holds quantiles of
    `request_ts - available_ts` in seconds over the checked history entries: how early they were readable.
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


class _Event(NamedTuple):
    """One event as the latents version holds it; tuples sort by time, then example_id."""

    event_ts: int
    example_id: int
    user: int
    item: int
    available_ts: int
    code: bytes


class _Truth(NamedTuple):
    """One bucket of the latents version: events of each user, and all rows by example_id."""

    by_user: dict[int, list[_Event]]
    by_id: dict[int, _Event]
    rows: dict[int, tuple[int, int, float]]  # user, event_ts, fm_prob
    faults: dict[int, str]  # events that the latents version itself got wrong


class _Rules(NamedTuple):
    max_len: int
    retention_us: int | None
    trained_until_ts: int


def audit(
    joined: Location, latents: Location, *, sample: int | None = 10_000, seed: int = 0
) -> AuditReport:
    """Check requests of the joined version against the latents version it was made from.

    Args:
        joined: the joined version, a directory or an `s3://` address.
        latents: the latents version it names as its input.
        sample: how many requests to check, drawn by `seed`; None checks all.
        seed: of the draw.

    Raises:
        StoreError: the latents version is not the one that was joined.
    """
    version = open_version(joined)
    manifest = version.manifest
    reader = LatentsReader(latents)
    expected = manifest.inputs.get("latents")
    if reader.manifest.version != expected:
        raise StoreError(
            f"{joined} was made from latents {expected}, found {reader.manifest.version} at {latents};"
            " give the version it was made from"
        )
    meta = manifest.meta
    rules = _Rules(meta["max_len"], meta["retention_us"], reader.manifest.meta["trained_until_ts"])
    files = [entry for entry in manifest.files if entry.path.startswith("requests/")]
    chosen = _draw([entry.num_rows for entry in files], sample, seed)
    leaks: list[str] = []
    margins: list[int] = []
    num_leaks = 0
    bucket, truth, history = -1, _Truth({}, {}, {}, {}), list[_Event]()
    for entry, rows in zip(files, chosen, strict=True):
        if not rows:
            continue
        owner = int(entry.path.split("/")[1].removeprefix("bucket="))
        if owner != bucket:
            bucket, truth = owner, _read_truth(reader, owner)
            history = _read_history(version, owner)
        requests = pq.read_table(version.path(entry.path), partitioning=None).take(rows).to_pylist()
        for request in requests:
            problems = _check(request, history, truth, rules, margins)
            num_leaks += bool(problems)
            if problems and len(leaks) < _NUM_SHOWN:
                leaks.append(
                    f"bucket {owner} example {request['example_id']}: " + "; ".join(problems)
                )
    num_checked = sum(len(rows) for rows in chosen)
    return AuditReport(num_checked, num_leaks, tuple(leaks), len(margins), _quantiles(margins))


def _draw(sizes: list[int], sample: int | None, seed: int) -> list[list[int]]:
    """Return which rows of each file to check, rising."""
    total = sum(sizes)
    if sample is None or sample >= total:
        return [list(range(size)) for size in sizes]
    numbers = sorted(random.Random(seed).sample(range(total), sample))
    chosen: list[list[int]] = []
    begin = 0
    place = 0
    for size in sizes:
        rows = []
        while place < len(numbers) and numbers[place] < begin + size:
            rows.append(numbers[place] - begin)
            place += 1
        chosen.append(rows)
        begin += size
    return chosen


def _read_truth(reader: LatentsReader, bucket: int) -> _Truth:
    truth = _Truth({}, {}, {}, {})
    meta = reader.manifest.meta
    for row in reader.read_bucket(bucket).to_pylist():
        event = _event(row)
        truth.rows[event.example_id] = (event.user, event.event_ts, row["fm_prob"])
        if not row["is_event"]:
            continue
        truth.by_user.setdefault(event.user, []).append(event)
        truth.by_id[event.example_id] = event
        ready_ts = event.event_ts + meta["delay_us"]
        if meta["waits_for_label"] and row["label_ts"] > ready_ts:
            ready_ts = row["label_ts"]
        if event.available_ts != ready_ts:
            truth.faults[event.example_id] = (
                f"event {event.example_id} says available_ts {event.available_ts}, delay and label give {ready_ts}"
            )
        elif event.event_ts <= meta["trained_until_ts"]:
            truth.faults[event.example_id] = (
                f"event {event.example_id} at {event.event_ts} was embedded by a snapshot trained until"
                f" {meta['trained_until_ts']}"
            )
    for events in truth.by_user.values():
        events.sort()
    return truth


def _read_history(joined: Version, bucket: int) -> list[_Event]:
    table = map_ipc(joined.path(f"history/bucket={bucket:03d}.arrow"))
    return [_event(row) for row in table.to_pylist()]


def _event(row: dict[str, Any]) -> _Event:  # Any: a row as Arrow gives it
    return _Event(
        row["event_ts"],
        row["example_id"],
        row["user"],
        row["item"],
        row["available_ts"],
        row["code"],
    )


def _check(
    request: dict[str, Any],  # Any: a row as Arrow gives it
    history: list[_Event],
    truth: _Truth,
    rules: _Rules,
    margins: list[int],
) -> list[str]:
    """Return what is wrong with one request, in words; add its margins to `margins`."""
    user, request_ts = request["user"], request["event_ts"]
    start, length = request["latent_start"], request["latent_len"]
    if start < 0 or length < 0 or start + length > len(history):
        return [f"history slice {start}+{length} lies outside {len(history)} rows"]
    given = history[start : start + length]
    problems = _check_teacher(request, truth)
    if request_ts <= rules.trained_until_ts:
        problems.append("the snapshot was trained on this request")
    for event in given:
        problems += _check_event(event, request, truth, rules)
        if len(margins) < _NUM_MARGINS:
            margins.append(request_ts - event.available_ts)
    if length > rules.max_len:
        problems.append(f"history has {length} events, at most {rules.max_len} are allowed")

    visible = [
        event
        for event in truth.by_user.get(user, [])
        if event.event_ts < request_ts
        and event.available_ts <= request_ts
        and (rules.retention_us is None or request_ts - event.event_ts <= rules.retention_us)
    ]
    wanted = [event.example_id for event in visible[-rules.max_len :]]
    found = [event.example_id for event in given]
    missing = sorted(set(wanted) - set(found))
    if missing:
        problems.append(f"lacks visible events {missing[:3]} ({len(missing)} in all)")
    elif not problems and found != wanted:
        problems.append(
            f"order or number of events is wrong, found {found[:5]}, expected {wanted[:5]}"
        )
    return problems


def _check_teacher(request: dict[str, Any], truth: _Truth) -> list[str]:  # Any: a row
    known = truth.rows.get(request["example_id"])
    if known is None:
        return ["the latents version has no row of this example"]
    user, event_ts, fm_prob = known
    problems = []
    if (user, event_ts) != (request["user"], request["event_ts"]):
        problems.append("user or time differ from the latents version")
    if request["teacher_prob"] != fm_prob:
        problems.append(f"teacher_prob is {request['teacher_prob']}, the snapshot gave {fm_prob}")
    return problems


def _check_event(
    event: _Event,
    request: dict[str, Any],
    truth: _Truth,
    rules: _Rules,  # Any: a row
) -> list[str]:
    """Return what is wrong with one entry of a history."""
    request_ts = request["event_ts"]
    known = truth.by_id.get(event.example_id)
    if known is None:
        return [f"event {event.example_id} is no event of the latents version"]
    problems = []
    if event.example_id in truth.faults:
        problems.append(truth.faults[event.example_id])
    if event != known:
        fields = [name for name in event._fields if getattr(event, name) != getattr(known, name)]
        problems.append(f"event {event.example_id} differs from the latents version in {fields}")
    if event.example_id == request["example_id"]:
        problems.append("history holds the request's own event")
    if known.user != request["user"]:
        problems.append(f"event {event.example_id} belongs to another user")
    if known.event_ts >= request_ts:
        problems.append(f"event {event.example_id} at {known.event_ts} is not before {request_ts}")
    if known.available_ts > request_ts:
        problems.append(
            f"event {event.example_id} was available at {known.available_ts}, after {request_ts}"
        )
    if rules.retention_us is not None and request_ts - known.event_ts > rules.retention_us:
        problems.append(f"event {event.example_id} is older than the retention")
    return problems


def _quantiles(margins: list[int]) -> dict[str, float]:
    if not margins:
        return {}
    ordered = sorted(margins)
    shares = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {
        name: ordered[round(share * (len(ordered) - 1))] / 1e6 for name, share in shares.items()
    }
