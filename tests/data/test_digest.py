"""The digest of a shard's rows changes exactly when something changes that embedding them reads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.config import ColumnsConfig
from loopfm_ray.data.digest import inputs_sha256
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from tests.oracles import logs
from tests.oracles.digest import inputs_twin
from tests.oracles.logs import DAY_US, ORIGIN_TS, good_rows, prepare_rows

STOP_TS = ORIGIN_TS + 10 * DAY_US
COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
MAX_LEN = 3
Rows = list[dict[str, Any]]


def log_rows() -> Rows:
    return [
        {**row, "seen": [f"t{k}" for k in range(n % 3)]} for n, row in enumerate(good_rows(120))
    ]


def prepared(folder, name, rows) -> PreparedData:
    columns = ColumnsConfig.model_validate(
        {"user": "uid", "item": "sku", "event_ts": "at", "label": "clicked", "label_ts": "known_at",
         "categorical": ["shop"], "numeric": ["price"], "sequence": ["seen"]}
    )  # fmt: skip
    return prepare_rows(
        folder, rows, name, columns=columns, history_events="all", period_s=7 * 86_400.0
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    data = prepared(tmp_path_factory.mktemp("base"), "prepared", log_rows())
    return data, data.schema_as_of(STOP_TS)


def digest(data: PreparedData, schema: FeatureSchema, rows: dict[str, Any], bucket: int) -> str:
    fields = [field.name for field in schema.of(Kind.CATEGORICAL, Side.ITEM)]
    source = RawHistorySource({bucket: data.events(bucket)}, data.items, fields, MAX_LEN)
    collate = Collator(schema, data.items, data.users)
    return inputs_sha256(rows, COLUMNS, collate, source.limited(schema))


def shards(data: PreparedData, schema: FeatureSchema) -> dict[tuple[int, int], tuple[str, Any]]:
    """Return the digest of every shard and what its slow twin says."""
    found = {}
    for file in data.examples.files():
        rows = read_rows([file])
        twin = inputs_twin(data, schema, rows, COLUMNS, MAX_LEN)
        found[file.period, file.bucket] = (digest(data, schema, rows, file.bucket), twin)
    return found


def dropped(row: int) -> Callable[[Rows], Rows]:
    return lambda rows: rows[:row] + rows[row + 1 :]


def changed(row: int, **values: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [{**r, **values} if n == row else r for n, r in enumerate(rows)]


def added(**values: Any) -> Callable[[Rows], Rows]:
    return lambda rows: sorted([*rows, {**rows[0], **values}], key=lambda row: row["at"])


CHANGES = {
    "an event at the end": added(at=ORIGIN_TS + 28 * DAY_US - 1, known_at=ORIGIN_TS + 28 * DAY_US),
    "a new user at the end": added(
        uid="new", at=ORIGIN_TS + 28 * DAY_US - 1, known_at=ORIGIN_TS + 28 * DAY_US
    ),
    "an event less": dropped(70),
    "the last event less": dropped(119),
    "another item": changed(75, sku=6),
    "a later label": changed(75, known_at=ORIGIN_TS + 25 * DAY_US),
    "another shop": changed(80, shop="s1"),
    "another price": changed(80, price=1.5),
    "another tag": changed(80, seen=["t1"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_changes_exactly_with_what_is_read(base, tmp_path, name):
    data, schema = base
    before = shards(data, schema)
    after = shards(prepared(tmp_path, "prepared", CHANGES[name](log_rows())), schema)
    same = [
        (before[place][0] == after[place][0], before[place][1] == after[place][1])
        for place in before
        if place in after
    ]
    assert all(by_digest == by_twin for by_digest, by_twin in same)
    assert any(by_twin for _, by_twin in same)
    assert not all(by_twin for _, by_twin in same)


def test_labels_are_not_read(base, tmp_path):
    data, schema = base
    after = shards(prepared(tmp_path, "prepared", changed(75, clicked=0)(log_rows())), schema)
    assert after == shards(data, schema)


def test_a_changed_field_of_an_item_changes_the_digest_of_what_met_it(base, tmp_path, monkeypatch):
    data, schema = base
    before = shards(data, schema)
    items = logs.item_rows()
    items[3] = {**items[3], "kind": "k1"}
    monkeypatch.setattr(logs, "item_rows", lambda: items)
    after = shards(prepared(tmp_path, "prepared", log_rows()), schema)
    for place, (found, twin) in before.items():
        assert (found == after[place][0]) == (twin == after[place][1])
    assert any(found != after[place][0] for place, (found, _) in before.items())


def test_pointers_that_move_with_their_events_leave_the_digest_alone(base):
    data, schema = base
    for file in data.examples.files():
        rows = read_rows([file])
        table = data.events(file.bucket)
        ahead = table.slice(0, min(2, table.num_rows))
        moved = pa.concat_tables([ahead, table]).combine_chunks()
        fields = [field.name for field in schema.of(Kind.CATEGORICAL, Side.ITEM)]
        source = RawHistorySource({file.bucket: moved}, data.items, fields, MAX_LEN).limited(schema)
        shifted = {**rows, "raw_start": rows["raw_start"] + ahead.num_rows}
        collate = Collator(schema, data.items, data.users)
        expected = digest(data, schema, rows, file.bucket)
        assert inputs_sha256(shifted, COLUMNS, collate, source) == expected


@pytest.mark.parametrize("column", ["raw_start", "raw_len", *COLUMNS[:-1]])
def test_the_digest_changes_with_every_column(base, column):
    data, schema = base
    file = max(data.examples.files(), key=lambda file: (file.period, file.num_rows))
    rows = read_rows([file])
    other = {**rows, column: rows[column].copy()}
    other[column][np.flatnonzero(rows["raw_len"] > 1)[0]] -= 1
    assert digest(data, schema, other, file.bucket) != digest(data, schema, rows, file.bucket)


def test_rows_without_any_history_have_a_digest(base):
    data, schema = base
    file = data.examples.files()[0]
    rows = read_rows([file])
    rows["raw_len"] = np.zeros_like(rows["raw_len"])
    assert len(digest(data, schema, rows, file.bucket)) == 64
