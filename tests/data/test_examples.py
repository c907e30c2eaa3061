"""Reading examples back: all rows once, in order or shuffled within bounded windows."""

from pathlib import Path

import numpy as np
import pytest

from loopfm_ray.data.config import ColumnsConfig
from loopfm_ray.data.examples import ExampleSet, concat_rows, iterate_files, iterate_rows, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import SchemaError, StoreError
from loopfm_ray.types import TimeRange
from tests.oracles.logs import DAY_US, ORIGIN_TS, good_rows, prepare_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    rows = good_rows(300)
    for row in rows[100:120]:  # twenty rows at one time
        row["at"] = row["known_at"] = rows[100]["at"]
        row["price"] = 1.0
    rows = [{**row, "seen": ["a", "b", "c", "d"][: n % 5]} for n, row in enumerate(rows)]
    columns = ColumnsConfig.model_validate(
        {"user": "uid", "item": "sku", "event_ts": "at", "label": "clicked", "sequence": ["seen"]}
    )
    return prepare_rows(tmp_path_factory.mktemp("data"), rows, columns=columns, duplicates="drop")


HALF = TimeRange(ORIGIN_TS + 5 * DAY_US + 7, ORIGIN_TS + 16 * DAY_US)


def test_files_come_by_period_then_bucket(data: PreparedData) -> None:
    files = data.examples.files()
    assert [(f.period, f.bucket) for f in files] == sorted((f.period, f.bucket) for f in files)
    assert sum(f.num_rows for f in files) == data.examples.num_rows() == data.manifest.num_rows
    one = files[0].bucket
    assert {f.bucket for f in data.examples.files(buckets=[one])} == {one}
    assert {f.period for f in data.examples.files(HALF)} == {0, 1, 2}


def test_number_of_rows_is_exact_inside_periods(data: PreparedData) -> None:
    event_ts = read_rows(data.examples.files())["event_ts"]
    inside = ((event_ts >= HALF.start_ts) & (event_ts < HALF.stop_ts)).sum()
    assert data.examples.num_rows(HALF) == inside
    by_bucket = sum(data.examples.num_rows(HALF, [b]) for b in range(data.num_buckets))
    assert by_bucket == inside


@pytest.mark.parametrize("block_rows", [1, 7, 64, 10_000])
def test_blocks_of_files_hold_their_rows_file_after_file(
    data: PreparedData, block_rows: int
) -> None:
    files, columns = data.examples.files(HALF), ["example_id", "item", "label", "seen"]
    blocks = list(iterate_files(files, columns=columns, block_rows=block_rows))
    sizes = [len(block["item"]) for block in blocks]
    assert set(sizes[:-1]) <= {block_rows}
    assert 0 < sizes[-1] <= block_rows
    expected = concat_rows([read_rows([file], columns=columns) for file in files])
    found = concat_rows(blocks)
    assert set(found) == set(columns)
    for name in columns:
        np.testing.assert_array_equal(found[name], expected[name])


def test_blocks_of_no_files_are_none(data: PreparedData) -> None:
    assert list(iterate_files([], columns=["item"], block_rows=3)) == []
    with pytest.raises(SchemaError, match="nothing"):
        next(iterate_files(data.examples.files(), columns=["nothing"], block_rows=3))


@pytest.mark.parametrize("window_rows", [1, 7, 50, 10_000])
@pytest.mark.parametrize("batch_rows", [1, 16, 1000])
def test_rows_come_in_time_order(data: PreparedData, window_rows: int, batch_rows: int) -> None:
    batches = list(
        iterate_rows(
            data.examples.files(HALF), HALF, window_rows=window_rows, batch_rows=batch_rows
        )
    )
    assert all(len(batch["item"]) == batch_rows for batch in batches[:-1])
    expected = read_rows(data.examples.files(HALF), HALF)
    for name, values in expected.items():
        if name == "seen":
            continue
        assert np.concatenate([batch[name] for batch in batches]).tolist() == values.tolist()
    order = list(zip(expected["event_ts"], expected["example_id"], strict=True))
    assert order == sorted(order)


def test_shuffled_rows_are_all_rows_once_and_stay_in_their_window(data: PreparedData) -> None:
    def ids(seed: int | None) -> list[int]:
        batches = iterate_rows(
            data.examples.files(),
            columns=["example_id"],
            window_rows=40,
            shuffle_seed=seed,
            batch_rows=16,
        )
        return np.concatenate([batch["example_id"] for batch in batches]).tolist()  # type: ignore[no-any-return]

    ordered = ids(None)
    assert ids(1) != ordered
    assert ids(1) == ids(1) != ids(2)
    assert sorted(ids(1)) == sorted(ordered)
    distance = np.abs(np.argsort(ids(1)) - np.arange(len(ordered)))
    assert 0 < distance.max() < 2 * 40


def test_columns_are_those_asked_for(data: PreparedData) -> None:
    batch = next(iterate_rows(data.examples.files(), columns=["label", "item"]))
    assert list(batch) == ["label", "item"]
    with pytest.raises(SchemaError, match="nothing"):
        next(iterate_rows(data.examples.files(), columns=["nothing"]))


def test_sequences_are_padded_with_zeros(data: PreparedData) -> None:
    rows = read_rows(data.examples.files(), columns=["seen", "event_ts"])
    keys = ["", *data.vocabulary("seen").keys]
    lengths = (rows["seen"] != 0).sum(axis=1)
    assert set(lengths.tolist()) == {0, 1, 2, 3, 4}
    for ids, length in zip(rows["seen"], lengths, strict=True):
        assert [keys[i] for i in ids] == ["a", "b", "c", "d"][:length] + [""] * (
            ids.shape[0] - length
        )


def test_no_files_and_empty_windows(data: PreparedData) -> None:
    nothing = TimeRange(ORIGIN_TS - 10, ORIGIN_TS - 5)
    assert data.examples.files(nothing) == []
    assert list(iterate_rows([], None)) == []
    assert read_rows([]) == {}
    gap = TimeRange(ORIGIN_TS + 1, ORIGIN_TS + 2)
    assert list(iterate_rows(data.examples.files(gap), gap)) == []
    assert list(iterate_rows(data.examples.files(gap), gap, window_rows=1)) == []


def test_examples_of_what_is_no_version(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        ExampleSet.open(tmp_path, "examples")
    with pytest.raises(StoreError):
        PreparedData.open(tmp_path)


def test_damaged_file_is_a_store_error(tmp_path: Path) -> None:
    data = prepare_rows(tmp_path, good_rows())
    file = data.examples.files()[0]
    file.path.unlink()
    with pytest.raises(StoreError, match="can not be read"):
        read_rows([file])
    (data.version.folder / "items.parquet").unlink()
    with pytest.raises(StoreError, match="entity table"):
        _ = data.items
    with pytest.raises(StoreError, match="vocabulary"):
        data.vocabulary("nothing")
