"""What the files of one bucket say, read in the plainest way for the audit: no code of prepare or of the join.

The prepared version is the origin: it says what happened, when and when it was known. The latents version adds codes and
predictions, and is itself checked against the origin. Only rows of the users that are asked for become Python objects.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loopfm_ray.store.cache import Version
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import prob_column
from loopfm_ray.store.tables import map_ipc, read_parquet

__all__ = [
    "Entry",
    "Fact",
    "Origin",
    "Stored",
    "entry_of",
    "fact_of",
    "read_entries",
    "read_origin",
    "read_stored",
]

# Any below: pyarrow ships no types.
Table = Any

_ENTRY = ("event_ts", "example_id", "user", "item", "available_ts", "code")
_SIDE = ("label", "label_ts", "event_type")
_FACTS = ("user", "item", "event_ts", "label_ts", "is_event")


class Fact(NamedTuple):
    """One row of the prepared version: the log itself, with ids."""

    user: int
    item: int
    event_ts: int
    label_ts: int
    is_event: bool


class Entry(NamedTuple):
    """One entry of a written history."""

    event_ts: int
    example_id: int
    user: int
    item: int
    available_ts: int
    code: bytes
    side: tuple[tuple[str, Any], ...] = ()
    """What stands beside the event: `(column, value)`."""


class Stored(NamedTuple):
    """One row of the latents version."""

    fact: Fact
    entry: Entry
    fm_prob: float
    more_probs: tuple[tuple[str, float], ...] = ()
    """`(task, probability)` of further tasks."""


class Origin(NamedTuple):
    """One bucket of the prepared version, as far as the users that were asked for go.

    Attributes:
        facts: their rows by example_id.
        by_owner: `(event_ts, example_id)` of the events of each user, or of each key, rising.
        requests: the whole rows of the requests that were asked for, by example_id.
        request_ids: example ids of all requests of the bucket in the joined time range, with repetitions.
        raw_ids: the example_id of each row of the events table.
        raw_faults: what is wrong with rows of the events table, by example_id.
        item_values: for each counted field of the item table, its value by item.
        sides: what stands beside an event, by example_id and then by the column of a history.
        is_waiting: whether an event is readable only once its label is known.
        raw_max_len: the longest raw history, None when the version has none.
    """

    facts: dict[int, Fact]
    by_owner: dict[Any, list[tuple[int, int]]]
    requests: dict[int, dict[str, Any]]
    request_ids: list[int]
    raw_ids: list[int]
    raw_faults: dict[int, str]
    item_values: dict[str, list[int]]
    sides: dict[int, dict[str, Any]]
    is_waiting: bool
    raw_max_len: int | None


def read_stored(reader: LatentsReader, bucket: int, users: Iterable[int]) -> dict[int, Stored]:
    """Return the rows of these users in one bucket of a latents version, by example_id."""
    stored = {}
    for row in _of_users(reader.read_bucket(bucket), users).to_pylist():
        entry = entry_of(row)._replace(side=())
        more = tuple((task, row[prob_column(task)]) for task in reader.tasks)
        stored[row["example_id"]] = Stored(fact_of(row), entry, row["fm_prob"], more)
    return stored


def read_entries(
    joined: Version, name: str, slices: Sequence[tuple[int, int]]
) -> tuple[dict[int, Entry], int]:
    """Return the entries that slices `(start, length)` of a table of histories name, by row, and the rows of the table.

    Rows outside of the table are left out. `name` is that of the table in the joined version.
    """
    table = map_ipc(joined.path(name))
    rows = {
        row
        for start, length in slices
        for row in range(max(start, 0), min(start + length, table.num_rows))
    }
    order = sorted(rows)
    taken = table.take(pa.array(order, pa.int64())).to_pylist()
    entries = {row: entry_of(item) for row, item in zip(order, taken, strict=True)}
    return entries, table.num_rows


def read_origin(
    prepared: Version,
    bucket: int,
    users: Iterable[int],
    wanted: tuple[set[int], tuple[int, int]],
    side: Mapping[str, str],
) -> Origin:
    """Return what the prepared version says of these users.

    Args:
        prepared: the version.
        bucket: the bucket of the users.
        users: their ids.
        wanted: example ids of the requests whose whole rows are needed, and the half-open time range of all requests.
        side: the column of the examples for each side information of a history.
    """
    request_ids, (start_ts, stop_ts) = wanted
    users = sorted(set(users))
    facts: dict[int, Fact] = {}
    sides: dict[int, dict[str, Any]] = {}
    requests: dict[int, dict[str, Any]] = {}
    all_ids: list[int] = []
    manifest = prepared.manifest
    for entry in manifest.files:
        if not entry.path.startswith(f"examples/bucket={bucket:03d}/"):
            continue
        table = read_parquet(prepared.path(entry.path))
        event_ts = table.column("event_ts").to_numpy()
        in_range = pa.array((event_ts >= start_ts) & (event_ts < stop_ts))
        all_ids += table.column("example_id").filter(in_range).to_pylist()
        chosen = pc.is_in(table.column("example_id"), pa.array(sorted(request_ids), pa.int64()))
        requests |= {row["example_id"]: row for row in table.filter(chosen).to_pylist()}
        columns = list(dict.fromkeys(["example_id", *_FACTS, *side.values()]))
        for row in _of_users(table.select(columns), users).to_pylist():
            facts[row["example_id"]] = fact_of(row)
            sides[row["example_id"]] = {name: row[origin] for name, origin in side.items()}
    by_user: dict[int, list[tuple[int, int]]] = {user: [] for user in users}
    for example_id, fact in facts.items():
        if fact.is_event:
            by_user[fact.user].append((fact.event_ts, example_id))
    for events in by_user.values():
        events.sort()
    is_waiting = manifest.meta["history_events"] == "positives"
    raw_ids, raw_faults = _read_raw(prepared, bucket, users, facts, is_waiting)
    return Origin(
        facts=facts,
        by_owner=by_user,
        requests=requests,
        request_ids=all_ids,
        raw_ids=raw_ids,
        raw_faults=raw_faults,
        item_values=_item_values(prepared, requests),
        sides=sides,
        is_waiting=is_waiting,
        raw_max_len=manifest.meta.get("raw_max_len"),
    )


def _read_raw(
    prepared: Version, bucket: int, users: list[int], facts: dict[int, Fact], is_waiting: bool
) -> tuple[list[int], dict[int, str]]:
    """Return the example ids of the events table and the faults of the users' rows in it."""
    name = f"events/bucket={bucket:03d}.arrow"
    if name not in prepared:
        return [], {}
    table = map_ipc(prepared.path(name))
    faults = {}
    for row in _of_users(table, users).to_pylist():
        fact = facts.get(row["example_id"])
        if fact is None or not fact.is_event:
            faults[row["example_id"]] = f"raw event {row['example_id']} is no event of the examples"
            continue
        ready_ts = max(fact.event_ts, fact.label_ts) if is_waiting else fact.event_ts
        told = (row["user"], row["item"], row["event_ts"], row["available_ts"])
        known = (fact.user, fact.item, fact.event_ts, ready_ts)
        if told != known:
            faults[row["example_id"]] = (
                f"raw event {row['example_id']} says (user, item, event_ts, available_ts) {told}, the examples give {known}"
            )
    return table.column("example_id").to_pylist(), faults


def _item_values(prepared: Version, requests: dict[int, dict[str, Any]]) -> dict[str, list[int]]:
    """Return the value of each item for the fields of the item table that the requests count."""
    columns = next(iter(requests.values()), {})
    fields = [name.removeprefix("past_count_") for name in columns if "past_count_" in name]
    of_table = [name for name in fields if name not in ("item", "user")]
    if not of_table:
        return {}
    table = pq.read_table(prepared.path("items.parquet"), columns=of_table)
    return {name: table.column(name).to_pylist() for name in of_table}


def _of_users(table: Table, users: Iterable[int]) -> Table:
    wanted = np.isin(table.column("user").to_numpy(), np.asarray(sorted(set(users))))
    return table.filter(pa.array(wanted))


def fact_of(row: dict[str, Any]) -> Fact:
    """Return what a row says of the log."""
    return Fact(*(row[name] for name in _FACTS))


def entry_of(row: dict[str, Any]) -> Entry:
    """Return a row as an entry of a history, with what stands beside it."""
    side = tuple((name, row[name]) for name in _SIDE if name in row)
    return Entry(**{name: row[name] for name in _ENTRY}, side=side)
