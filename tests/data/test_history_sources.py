"""Side information and other keys of histories: point in time, and equal to slow twins."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.collate import Collator
from loopfm_ray.data.examples import concat_rows, rows_of
from loopfm_ray.data.history_sources import (
    EVENT_TYPE,
    LABEL,
    LatentHistorySource,
    RawHistorySource,
    known_label,
)
from loopfm_ray.data.prepared import EntityTable
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.errors import SchemaError
from loopfm_ray.store.codes import CodeSpec, decode

SPEC = CodeSpec(bits=4, dim=4, scale=None)
SCHEMA = FeatureSchema((Field("item", Side.ITEM, Kind.CATEGORICAL, 4),))
ITEMS = EntityTable({}, {}, ["", "a", "b", "c"])
USERS = EntityTable({}, {}, [""])

events = st.lists(
    st.tuples(
        st.integers(0, 20),  # event_ts
        st.integers(0, 30),  # label comes so much later
        st.booleans(),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


def table_of(drawn, seed=0):
    drawn = sorted(drawn)
    codes = np.random.default_rng(seed).integers(0, 256, (len(drawn), SPEC.num_bytes), np.uint8)
    return pa.table(
        {
            "event_ts": pa.array([ts for ts, *_ in drawn], pa.int64()),
            "item": pa.array([n % 4 for n in range(len(drawn))], pa.int32()),
            "code": pa.array([row.tobytes() for row in codes], pa.binary(SPEC.num_bytes)),
            "label": pa.array([float(is_hit) for *_, is_hit, _ in drawn], pa.float32()),
            "label_ts": pa.array([ts + delay for ts, delay, *_ in drawn], pa.int64()),
            "event_type": pa.array([kind for *_, kind in drawn], pa.int16()),
        }
    )


def sources(table, side, max_len):
    return {
        "latent": LatentHistorySource({0: table}, SPEC, max_len, side),
        "raw": RawHistorySource({0: table}, ITEMS, ["item"], max_len, side),
    }


@settings(deadline=None, max_examples=60)
@given(drawn=events, request_ts=st.integers(0, 60), max_len=st.integers(1, 5))
def test_a_label_shows_from_the_moment_it_is_known(drawn, request_ts, max_len):
    table = table_of(drawn)
    length = int(np.searchsorted(table.column("event_ts").to_numpy(), request_ts))
    rows = table.slice(0, length).to_pylist()[-max_len:]
    zero = np.zeros(1, dtype=np.int64)
    for source in sources(table, (LABEL, EVENT_TYPE), max_len).values():
        found = source.gather(zero, zero, zero + length, zero + request_ts)
        expected = [
            0 if row["label_ts"] > request_ts else (2 if row["label"] else 1) for row in rows
        ]
        assert found.label[found.mask].tolist() == expected
        assert found.event_type[found.mask].tolist() == [row["event_type"] for row in rows]
        assert not found.label[~found.mask].any()


@settings(deadline=None, max_examples=40)
@given(drawn=events, request_ts=st.integers(0, 25))
def test_a_label_that_comes_later_changes_no_earlier_row(drawn, request_ts):
    table = table_of(drawn)
    late = table.column("label_ts").to_numpy() > request_ts
    flipped = np.where(late, 1 - table.column("label").to_numpy(), table.column("label").to_numpy())
    column = table.column_names.index("label")
    other = table.set_column(column, "label", pa.array(flipped.astype(np.float32)))
    zero = np.zeros(1, dtype=np.int64)
    length = int(np.searchsorted(table.column("event_ts").to_numpy(), request_ts))
    found = [
        sources(version, (LABEL,), 12)["latent"].gather(
            zero, zero, zero + length, zero + request_ts
        )
        for version in (table, other)
    ]
    np.testing.assert_array_equal(found[0].label, found[1].label)


def test_the_label_of_the_very_instant_is_known():
    found = known_label(np.ones(3), np.asarray([4, 5, 6]), np.asarray([5, 5, 5]))
    assert found.tolist() == [2, 2, 0]


@pytest.mark.parametrize("missing", ["label", "label_ts"])
def test_a_table_without_labels_is_refused_where_they_are_asked_for(missing):
    table = table_of([(1, 1, True, 0)]).drop_columns([missing])
    for build in sources(table, (), 3).values():
        assert build.gather(*[np.zeros(1, dtype=np.int64)] * 4).label is None
    with pytest.raises(SchemaError, match=missing):
        sources(table, (LABEL,), 3)


def rows(**more):
    base = {
        "user": np.asarray([1, 1, 2]),
        "item": np.asarray([1, 2, 2]),
        "bucket": np.asarray([0, 0, 0]),
        "event_ts": np.asarray([30, 30, 40]),
        "label": np.asarray([0.0, 1.0, 0.0]),
    }
    return base | more


def test_a_history_of_another_key_lies_in_a_bucket_of_its_own():
    tables = {bucket: table_of([(n, 0, True, 1) for n in range(5)], bucket) for bucket in (3, 6)}
    source = LatentHistorySource(tables, SPEC, 2)
    collate = Collator(SCHEMA, ITEMS, USERS, {"latent_by_item": source})
    assert {"latent_by_item_bucket", "latent_by_item_start"} <= set(collate.columns)
    batch = collate(
        rows(
            latent_by_item_bucket=np.asarray([6, 3, 3]),
            latent_by_item_start=np.asarray([0, 1, 1]),
            latent_by_item_len=np.asarray([3, 2, 0]),
        )
    )
    history = batch.histories["latent_by_item"]
    for row, (bucket, start, stop) in enumerate([(6, 1, 3), (3, 1, 3), (3, 0, 0)]):
        group = int(history.row[row])
        codes = [bytes(code) for code in tables[bucket].column("code").to_pylist()[start:stop]]
        packed = np.frombuffer(b"".join(codes), np.uint8).reshape(-1, SPEC.num_bytes)
        found = history.latents[group][history.mask[group]]
        expected = decode(packed, SPEC) if len(packed) else np.zeros((0, SPEC.dim))
        np.testing.assert_array_equal(found.numpy(), expected)


def test_the_rows_own_codes_become_the_teachers_latents():
    codes = np.random.default_rng(0).integers(0, 256, (3, SPEC.num_bytes), np.uint8)
    collate = Collator(SCHEMA, ITEMS, USERS, teacher_spec=SPEC)
    assert "teacher_code" in collate.columns
    batch = collate(rows(teacher_code=codes))
    np.testing.assert_array_equal(batch.teacher_latent.numpy(), decode(codes, SPEC))
    assert Collator(SCHEMA, ITEMS, USERS)(rows(teacher_code=codes)).teacher_latent is None
    with pytest.raises(SchemaError, match="teacher_code"):
        collate(rows())


def test_fixed_size_binary_becomes_bytes_whatever_its_chunks():
    codes = np.random.default_rng(0).integers(0, 256, (7, 3), np.uint8)
    column = pa.array([row.tobytes() for row in codes], pa.binary(3))
    chunked = pa.chunked_array([column[:2], column[2:2], column[3:6]])
    found = rows_of(pa.table({"code": chunked}))["code"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, codes[[0, 1, 3, 4, 5]])
    whole = concat_rows([{"code": found}, {"code": codes}])["code"]
    assert (whole.dtype, whole.shape) == (np.dtype(np.uint8), (12, 3))
    empty = rows_of(pa.table({"code": pa.chunked_array([], pa.binary(3))}))["code"]
    assert empty.shape == (0, 3)
