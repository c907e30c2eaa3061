"""The audit of histories of other keys than the user: the events of a key come from all users, so all buckets are read.

Keys are taken in groups, each of which reads the prepared version and the latents once, so that only the events of one
group become Python objects.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.errors import StoreError
from loopfm_ray.history.checks import Bucket, Owner, Rules, check_history
from loopfm_ray.history.evidence import Entry, Fact, Origin, Stored, entry_of, fact_of, read_entries
from loopfm_ray.store.cache import Version
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.tables import read_parquet

__all__ = ["Finding", "KeyedAudit"]

# Any below: pyarrow ships no types; a row as Arrow gives it.
Table = Any
Row = dict[str, Any]
Key = tuple[int, ...]

_FACTS = ("user", "item", "event_ts", "label_ts", "is_event")
_ASKED = ("example_id", "user", "item", "event_ts")


class Finding(NamedTuple):
    """What is wrong with the history of one request, and how early its entries were readable, in microseconds."""

    example_id: int
    problems: list[str]
    margins: list[int]


class KeyedAudit:
    """Computes the histories of one key again for some requests."""

    def __init__(self, source: str, key: Sequence[str], versions: tuple[Version, Version]) -> None:
        """Take the source, its key, and the joined and the prepared version."""
        self._source = source
        self._joined, self._prepared = versions
        self._key = tuple(key)
        self._tables = [_part(self._prepared, name) for name in key]
        self._num_groups = int(self._prepared.manifest.meta["num_buckets"])
        self._groups: dict[int, list[Row]] = {}
        self._lacking: list[int] = []

    def add(self, request: Row) -> None:
        """Note a request that is to be checked."""
        pointers = [f"{self._source}_{name}" for name in ("bucket", "start", "len")]
        if any(name not in request for name in pointers):
            self._lacking.append(request["example_id"])
            return
        row = {name: request[name] for name in _ASKED}
        row |= {"place": request[pointers[0]], "start": request[pointers[1]]}
        row |= {"length": request[pointers[2]]}
        group = hash(self._owner(row["user"], row["item"]) or ()) % self._num_groups
        self._groups.setdefault(group, []).append(row)

    def check(self, latents: LatentsReader, rules: Rules) -> Iterator[Finding]:
        """Yield what was found of each request that was noted."""
        for number in self._lacking:
            yield Finding(
                number, [f"has no columns of {self._source}, of which the manifest tells"], []
            )
        for _, requests in sorted(self._groups.items()):
            entries, sizes = self._entries(requests)
            met = [*requests, *(entry._asdict() for entry in entries.values())]
            keys = {self._owner(row["user"], row["item"]) for row in met} - {None}
            origin = self._origin(keys)
            stored = self._stored(latents, keys)
            owner = Owner(" and ".join(self._key), self._owner)
            for request in requests:
                place, start, length = request["place"], request["start"], request["length"]
                size = sizes[place]
                if start < 0 or length < 0 or start + length > size:
                    text = f"{self._source} slice {start}+{length} lies outside of {size} rows"
                    yield Finding(request["example_id"], [text], [])
                    continue
                given = [entries[place, row] for row in range(start, start + length)]
                known = Bucket(origin, stored, {}, size)
                problems = check_history(given, request, known, rules, owner)
                margins = [request["event_ts"] - entry.available_ts for entry in given]
                yield Finding(
                    request["example_id"], [f"{self._source}: {text}" for text in problems], margins
                )

    def _owner(self, user: int, item: int) -> Key | None:
        """Return the key of a row; None where a part of it is unknown."""
        own = {"user": user, "item": item}
        found = tuple(
            own[side] if values is None else values[own[side]] for side, values in self._tables
        )
        return found if all(found) else None

    def _entries(self, requests: list[Row]) -> tuple[dict[tuple[int, int], Entry], dict[int, int]]:
        """Return the entries of the requests by place and row, and the rows of each place; -1 where it is not there."""
        slices: dict[int, list[tuple[int, int]]] = {}
        for row in requests:
            slices.setdefault(row["place"], []).append((row["start"], row["length"]))
        entries: dict[tuple[int, int], Entry] = {}
        sizes = {}
        for place, own in sorted(slices.items()):
            name = f"history/{self._source}/bucket={place:03d}.arrow"
            sizes[place] = -1
            if name in self._joined:
                found, sizes[place] = read_entries(self._joined, name, own)
                entries |= {(place, row): entry for row, entry in found.items()}
        return entries, sizes

    def _origin(self, keys: set[Any]) -> Origin:
        """Return what the prepared version says of the events of some keys."""
        manifest = self._prepared.manifest
        side: dict[str, str] = self._joined.manifest.meta["side"]
        columns = list(dict.fromkeys(["example_id", *_FACTS, *side.values()]))
        facts: dict[int, Fact] = {}
        sides: dict[int, Row] = {}
        by_owner: dict[Any, list[tuple[int, int]]] = {}
        for file in manifest.files:
            if not file.path.startswith("examples/"):
                continue
            table = read_parquet(self._prepared.path(file.path), columns)
            for row, key in self._events_of(table, keys):
                number = row["example_id"]
                facts[number] = fact_of(row)
                sides[number] = {name: row[origin] for name, origin in side.items()}
                by_owner.setdefault(key, []).append((row["event_ts"], number))
        for events in by_owner.values():
            events.sort()
        is_waiting = manifest.meta["history_events"] == "positives"
        return Origin(facts, by_owner, {}, [], [], {}, {}, sides, is_waiting, None)

    def _stored(self, latents: LatentsReader, keys: set[Any]) -> dict[int, Stored]:
        """Return the latents of the events of some keys."""
        stored = {}
        for bucket in latents.buckets:
            for row, _ in self._events_of(latents.read_bucket(bucket), keys):
                entry = entry_of(row)._replace(side=())
                stored[row["example_id"]] = Stored(fact_of(row), entry, row["fm_prob"])
        return stored

    def _events_of(self, table: Table, keys: set[Any]) -> Iterator[tuple[Row, Key]]:
        """Yield the events of some keys, with their key."""
        chosen = table.column("is_event").to_numpy(zero_copy_only=False)
        for place, (side, values) in enumerate(self._tables):
            ids = table.column(side).to_numpy()
            part = ids if values is None else np.asarray(values)[ids]
            chosen = chosen & np.isin(part, [key[place] for key in keys])
        for row in table.filter(pa.array(chosen)).to_pylist():
            key = self._owner(row["user"], row["item"])
            if key is not None and key in keys:
                yield row, key


def _part(prepared: Version, name: str) -> tuple[str, list[int] | None]:
    """Return whose id a part of a key is looked up by, and its values by id; None is the id itself."""
    if name in ("user", "item"):
        return name, None
    for side in ("item", "user"):
        path = prepared.path(f"{side}s.parquet")
        if name in pq.read_schema(path).names:
            return side, pq.read_table(path, columns=[name]).column(name).to_pylist()
    raise StoreError(
        f"the joined version has histories of {name!r}, which is no field of {prepared.location}; join again"
    )
