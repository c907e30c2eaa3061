"""Batches equal a slow twin; histories are shared, padded and cut as they should be."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.collate import Collator, LatentHistorySource, RawHistorySource
from loopfm_ray.data.config import ColumnsConfig, NegativesConfig
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.errors import SchemaError
from loopfm_ray.store.codes import CodeSpec, decode
from tests.oracles.collate import ids_twin, numeric_twin, raw_twin
from tests.oracles.logs import DAY_US, ORIGIN_TS, good_rows, prepare_rows

STOP_TS = ORIGIN_TS + 3 * DAY_US


def collator(data: PreparedData, schema: FeatureSchema, max_len: int = 4) -> Collator:
    fields = [field.name for field in schema.of(Kind.CATEGORICAL, Side.ITEM)]
    source = RawHistorySource(data.all_events(), data.items, fields, max_len)
    return Collator(schema, data.items, data.users, {"raw": source})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    rows = [{**row, "seen": ["a", "b", "c"][: n % 3]} for n, row in enumerate(good_rows(120))]
    columns = ColumnsConfig.model_validate(
        {"user": "uid", "item": "sku", "event_ts": "at", "label": "clicked", "label_ts": "known_at",
         "categorical": ["shop"], "numeric": ["price"], "sequence": ["seen"]}
    )  # fmt: skip
    return prepare_rows(
        tmp_path_factory.mktemp("data"),
        rows,
        columns=columns,
        negatives=NegativesConfig(kind="popularity", per_positive=2),
        history_events="all",
    )


def check(
    data: PreparedData, schema: FeatureSchema, rows: dict[str, Any], max_len: int = 4
) -> None:
    batch = collator(data, schema, max_len)(rows)
    history = batch.histories["raw"]
    assert history.item_ids is not None
    longest = 1
    requests = set()
    for row in range(len(batch)):
        assert batch.ids[row].tolist() == ids_twin(data, schema, rows, row)
        assert batch.numeric[row].tolist() == numeric_twin(data, schema, rows, row)
        assert batch.label[row].tolist() == [float(rows["label"][row])]
        ids, ages = raw_twin(data, schema, rows, row, max_len)
        at = int(history.row[row])
        size = len(ids)
        longest = max(longest, size)
        assert history.mask[at].tolist() == [True] * size + [False] * (history.mask.shape[1] - size)
        assert history.item_ids[at, :size].tolist() == ids
        assert history.age_s[at, :size].tolist() == ages
        assert not history.item_ids[at, size:].any()
        assert not history.age_s[at, size:].any()
        requests.add((int(rows["user"][row]), int(rows["event_ts"][row])) if size else None)
    assert history.mask.shape == (len(requests), longest)


def test_batch_equals_the_slow_twin(data: PreparedData) -> None:
    rows = read_rows(data.examples.files())
    for schema in (data.schema, data.schema_as_of(STOP_TS)):
        check(data, schema, rows)
        order = np.random.default_rng(0).permutation(len(rows["item"]))
        check(data, schema, {name: values[order[:50]] for name, values in rows.items()}, max_len=2)


stamps = st.integers(0, 10).map(lambda n: ORIGIN_TS + n * 3 * DAY_US)
cells = st.tuples(st.integers(0, 2), st.integers(0, 6), stamps, st.integers(0, 8))


@settings(max_examples=15, deadline=None)
@given(st.lists(cells, min_size=2, max_size=30, unique_by=lambda cell: cell[:3]))
def test_histories_with_late_labels_equal_the_slow_twin(log: list[tuple[int, ...]]) -> None:
    rows = [
        {
            "uid": f"u{u}",
            "sku": i,
            "at": ts,
            "clicked": 1,
            "known_at": ts + late * DAY_US,
            "shop": "s",
            "price": 1.0,
        }
        for u, i, ts, late in log
    ]
    rows += [
        {**rows[0], "sku": 6, "uid": "other", "at": ts, "known_at": ts}
        for ts in (ORIGIN_TS, ORIGIN_TS + 30 * DAY_US)
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_rows(Path(folder), rows)
        check(data, data.schema, read_rows(data.examples.files()))


def test_ids_that_the_schema_does_not_know_are_zero(data: PreparedData) -> None:
    rows = read_rows(data.examples.files())
    schema = data.schema_as_of(ORIGIN_TS + DAY_US)
    batch = collator(data, schema)(rows)
    for column, field in enumerate(schema.categorical):
        assert int(batch.ids[:, column].max()) < field.cardinality
    history = batch.histories["raw"].item_ids
    assert history is not None
    assert int(history[..., 0].max()) < schema.select(["item"]).fields[0].cardinality


def test_entities_beyond_the_table_are_unknown(data: PreparedData) -> None:
    rows = {name: values[:3].copy() for name, values in read_rows(data.examples.files()).items()}
    rows["item"][:] = 10_000
    rows["user"][:] = 10_000
    batch = collator(data, data.schema)(rows)
    for column, field in enumerate(data.schema.categorical):
        if field.side in (Side.USER, Side.ITEM):
            assert not batch.ids[:, column].any()


def test_sequences_are_cut_to_the_longest_of_the_batch(data: PreparedData) -> None:
    rows = read_rows(data.examples.files())
    short = (rows["seen"] != 0).sum(axis=1) == 1
    batch = collator(data, data.schema)({name: values[short] for name, values in rows.items()})
    assert batch.sequences["seen"].shape == (int(short.sum()), 1)
    assert batch.sequences["seen"].dtype == torch.int64
    none = (rows["seen"] != 0).sum(axis=1) == 0
    empty = collator(data, data.schema)({name: values[none] for name, values in rows.items()})
    assert empty.sequences["seen"].tolist() == [[0]] * int(none.sum())
    no_width = {name: values[none] for name, values in rows.items()} | {
        "seen": np.zeros((int(none.sum()), 0))
    }
    assert collator(data, data.schema)(no_width).sequences["seen"].shape[1] == 1


def test_columns_are_enough_and_a_missing_one_is_named(data: PreparedData) -> None:
    collate = collator(data, data.schema)
    rows = read_rows(data.examples.files(), columns=collate.columns)
    assert set(rows) == set(collate.columns)
    assert len(collate(rows)) == data.manifest.num_rows
    del rows["shop"]
    with pytest.raises(SchemaError, match="shop"):
        collate(rows)


def test_history_fields_must_be_in_the_schema(data: PreparedData) -> None:
    schema = data.schema.select(["item", "shop"])
    source = RawHistorySource(data.all_events(), data.items, ["item", "kind"], 3)
    with pytest.raises(SchemaError, match="kind"):
        Collator(schema, data.items, data.users, {"raw": source})


def test_teacher_and_device_move_with_the_batch(data: PreparedData) -> None:
    rows = read_rows(data.examples.files())
    rows["teacher_prob"] = np.linspace(0, 1, len(rows["item"]), dtype=np.float32)
    batch = collator(data, data.schema)(rows)
    assert batch.teacher_prob is not None
    assert batch.teacher_prob.tolist() == rows["teacher_prob"].tolist()
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.histories["raw"].mask.device.type == "meta"
    assert moved.sequences["seen"].device.type == "meta"
    assert moved.histories["raw"].latents is None


def latent_table(codes: np.ndarray, event_ts: list[int]) -> pa.Table:
    kind = pa.binary(codes.shape[1])
    return pa.table(
        {"event_ts": event_ts, "code": pa.array([row.tobytes() for row in codes], kind)}
    )


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_latent_histories_are_the_decoded_codes(bits: int) -> None:
    spec = CodeSpec(bits=bits, dim=6, scale=None)
    codes = np.random.default_rng(0).integers(0, 120, (2, 5, spec.num_bytes), dtype=np.uint8)
    tables = {
        3: latent_table(codes[0], [10, 20, 30, 40, 50]),
        7: latent_table(codes[1], [1, 2, 3, 4, 5]),
    }
    sliced = {bucket: table.slice(1) for bucket, table in tables.items()}
    source = LatentHistorySource(sliced, spec, max_len=2)
    found = source.gather(
        np.asarray([3, 7, 3]),
        np.asarray([0, 1, -1]),
        np.asarray([4, 1, 0]),
        np.asarray([1_000_050, 7, 9]),
    )
    assert found.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert found.latents is not None
    np.testing.assert_array_equal(found.latents[0], decode(codes[0][3:5], spec))
    np.testing.assert_array_equal(found.latents[1, 0], decode(codes[1][2:3], spec)[0])
    assert not found.latents[1, 1].any()
    assert not found.latents[2].any()
    np.testing.assert_allclose(found.age_s[0], [1.00001, 1.0], rtol=1e-6)


def test_source_without_events_gives_empty_histories() -> None:
    spec = CodeSpec(bits=4, dim=4, scale=None)
    source = LatentHistorySource({0: latent_table(np.zeros((0, 2), np.uint8), [])}, spec, max_len=3)
    zero = np.zeros(2, dtype=np.int64)
    found = source.gather(zero, zero, zero, zero)
    assert found.mask.tolist() == [[False], [False]]


def test_collating_does_not_change_the_rows(data: PreparedData) -> None:
    rows = read_rows(data.examples.files())
    before = copy.deepcopy(rows)
    collator(data, data.schema_as_of(STOP_TS))(rows)
    for name, values in before.items():
        assert np.array_equal(rows[name], values), name
