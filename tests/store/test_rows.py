"""Rows come back from a file exactly as they were written, whatever the times, and take few bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import StoreError
from loopfm_ray.store import rows as module
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.rows import (
    Rule,
    latents_schema,
    read_rows,
    rows_columns,
    rows_sha256,
    write_rows,
)

SPEC = CodeSpec(4, 6)
EDGE = np.iinfo(np.int64)
TIMES = st.one_of(
    st.integers(EDGE.min, EDGE.max),
    st.sampled_from([EDGE.min, EDGE.min + 1, -1, 0, 1, EDGE.max - 1, EDGE.max]),
    st.integers(-50, 50).map(lambda n: n * 1_000_000),
    st.integers(-50, 50).map(lambda n: n * 1_000),
)


def make_table(times, seed=0):
    """Return rows with these (event_ts, label_ts, available_ts) and anything in the other columns."""
    rng = np.random.default_rng(seed)
    count = len(times)
    wide = np.array(times, dtype=np.int64).reshape(count, 3)
    whole = np.iinfo(np.int32)
    columns = [
        pa.array(rng.integers(EDGE.min, EDGE.max, count, endpoint=True)),
        *(pa.array(rng.integers(whole.min, whole.max, count).astype(np.int32)) for _ in "ui"),
        *(pa.array(wide[:, place]) for place in range(3)),
        pa.array(rng.random(count) < 0.5),
        pa.array(rng.random(count).astype(np.float32)),
        pa.array([rng.bytes(SPEC.num_bytes) for _ in range(count)], pa.binary(SPEC.num_bytes)),
    ]
    return pa.Table.from_arrays(columns, schema=latents_schema(SPEC))


@given(
    times=st.lists(st.tuples(TIMES, TIMES, TIMES), max_size=150),
    waits=st.booleans(),
    delay_us=st.integers(0, 10**15),
)
def test_any_times_come_back_as_they_were(tmp_path_factory, times, waits, delay_us):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    table = make_table(times)
    write_rows(table, path, Rule(delay_us, waits))
    assert read_rows(path, SPEC).equals(table)
    for name in table.column_names:
        assert read_rows(path, SPEC, [name]).equals(table.select([name]))
    assert read_rows(path, SPEC, ["code", "label_ts"]).column_names == ["label_ts", "code"]


def test_a_label_before_its_event_comes_back(tmp_path):
    table = make_table([(1_000_000, 250_000, 1_000_000), (5, -7, 3)])
    write_rows(table, tmp_path / "a.parquet", Rule())
    assert read_rows(tmp_path / "a.parquet", SPEC, ["label_ts"]).column(0).to_pylist() == [
        250_000,
        -7,
    ]


@pytest.mark.parametrize("unit", [1_000_000, 1_000, 1])
def test_times_are_held_in_the_largest_unit_that_fits(tmp_path, unit):
    table = make_table([(n * unit, (n + 3) * unit, 9 * n) for n in (-2, 1, 7)])
    write_rows(table, tmp_path / "a.parquet", Rule())
    held = pq.read_table(tmp_path / "a.parquet", partitioning=None)
    assert held.column("event_ts").to_pylist() == [-2, 1, 7]
    assert held.column("label_after").to_pylist() == [3, 3, 3]
    assert read_rows(tmp_path / "a.parquet", SPEC).equals(table)


def test_times_that_follow_the_rule_take_nothing(tmp_path):
    count = 20_000
    rng = np.random.default_rng(0)
    event_ts = rng.integers(0, 10**12, count)
    label_ts = event_ts + 3_600_000_000
    rule = Rule(delay_us=7_200_000_000, waits_for_label=True)
    times = np.stack([event_ts, label_ts, rule.available(event_ts, label_ts)], axis=1)
    write_rows(make_table(times), tmp_path / "a.parquet", rule)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    sizes = {
        group.column(n).path_in_schema: group.column(n).total_uncompressed_size
        for n in range(group.num_columns)
    }
    assert sizes["label_after"] < 0.05 * count
    assert sizes["available_after"] < 0.05 * count
    assert sizes["code"] < (SPEC.num_bytes + 0.05) * count


def test_equal_rows_give_equal_bytes_and_other_rows_another_digest(tmp_path):
    table = make_table([(n, n + 1, n + 2) for n in range(500)])
    for name in ("a", "b"):
        write_rows(table, tmp_path / name, Rule(5, True))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert rows_sha256(rows_columns(read_rows(tmp_path / "a", SPEC))) == rows_sha256(
        rows_columns(table)
    )
    seen = {rows_sha256(rows_columns(table))}
    for place, name in enumerate(table.column_names):
        column = table.column(name).to_pylist()
        column[3], column[4] = column[4], column[3]
        if name == "is_event":
            column[3] = not column[3]
        changed = table.set_column(
            place, table.field(place), pa.array(column, table.field(place).type)
        )
        seen.add(rows_sha256(rows_columns(changed)))
    assert len(seen) == 1 + len(table.column_names)


def test_other_formats_are_refused_with_what_to_do(tmp_path, monkeypatch):
    table = make_table([(1, 2, 3)])
    pq.write_table(table, tmp_path / "old.parquet")
    with pytest.raises(StoreError, match="write its version again"):
        read_rows(tmp_path / "old.parquet", SPEC)
    with pytest.raises(StoreError, match="does not say how its rows are written"):
        read_rows(tmp_path / "old.parquet", SPEC, ["user"])
    monkeypatch.setattr(module, "LATENTS_FORMAT", 3)
    write_rows(table, tmp_path / "new.parquet", Rule())
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has latents format 3, this code reads 2"):
        read_rows(tmp_path / "new.parquet", SPEC)
