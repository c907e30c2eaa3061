"""Reading logs: what is accepted in which form, and one clear error for each thing that is wrong."""

import datetime as dt
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from loopfm_ray.data.config import ColumnsConfig
from loopfm_ray.data.events import iterate_periods, open_files, read_blocks
from loopfm_ray.data.prepare import prepare
from loopfm_ray.errors import ConfigError, DataError, LoopFMError, SchemaError
from tests.oracles.logs import (
    DAY_US,
    ORIGIN_TS,
    PLANTED,
    config_for,
    good_rows,
    planted,
    prepare_rows,
    readable_examples,
    write_rows,
)

WORDS = {
    "missing column": ("shop", "missing", "uid"),
    "wrong type of key": ("sku", "double", "text or integers"),
    "wrong type of number": ("price", "string", "numbers"),
    "wrong type of label": ("clicked", "string", "0 and 1"),
    "wrong type of time": ("at", "double", "timestamp"),
    "nan": ("price", "row 3", "nan", "finite"),
    "infinite": ("price", "row 3", "inf", "finite"),
    "label 2": ("clicked", "row 3", "found 2", "0 or 1"),
    "label missing": ("clicked", "row 3", "None", "0 or 1"),
    "time missing": ("at", "row 3", "missing"),
    "time not a time": ("at", "row 3", "yesterday", "ISO"),
    "user missing": ("uid", "row 3", "missing"),
    "item missing": ("sku", "row 3", "missing"),
    "label before the event": ("known_at", "row 3", "before the event"),
}
SCHEMA_ERRORS = {name for name in PLANTED if "type" in name or "column" in name}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_error_is_named_with_file_column_and_row(tmp_path: Path, error: str) -> None:
    config = config_for(tmp_path, planted(error))
    with pytest.raises(DataError) as caught:
        prepare(config, tmp_path / "out")
    message = str(caught.value)
    assert "part.parquet" in message
    for word in WORDS[error]:
        assert word in message, message
    assert isinstance(caught.value, SchemaError) == (error in SCHEMA_ERRORS)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_row_in_message_counts_over_blocks_of_the_file(tmp_path: Path) -> None:
    config = config_for(tmp_path, planted("nan", row=13), block_rows=5)
    with pytest.raises(DataError, match="row 13"):
        prepare(config, tmp_path / "out")


def test_log_without_rows_is_an_error(tmp_path: Path) -> None:
    config = config_for(tmp_path, good_rows())
    table = pq.read_table(config.path)
    pq.write_table(table.slice(0, 0), config.path)
    with pytest.raises(DataError, match="no rows"):
        prepare(config, tmp_path / "out")


def test_path_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data at"):
        open_files(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        open_files(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="can not be read"):
        open_files("nosuch://bucket/file")


def test_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    path.write_text("not parquet")
    with pytest.raises(LoopFMError, match=r"log\.parquet"):
        list(read_blocks(str(path), columns(), block_rows=10, label_delay_us=0))


def test_duplicates_are_an_error_or_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = good_rows()
    rows += [rows[4], {**rows[7], "shop": "s9"}]
    with pytest.raises(DataError, match=r"repeat another.*data\.duplicates"):
        prepare(config_for(tmp_path, rows), tmp_path / "out")
    data = prepare_rows(tmp_path, rows, duplicates="drop")
    assert data.manifest.meta["counts"]["duplicates_dropped"] == 2
    assert data.manifest.num_rows == len(rows) - 2


def test_same_pair_with_the_other_label_is_no_duplicate(tmp_path: Path) -> None:
    rows = good_rows()
    rows.append({**rows[3], "clicked": 1 - rows[3]["clicked"]})
    assert prepare_rows(tmp_path, rows).manifest.num_rows == len(rows)


def test_event_before_the_first_period_is_an_error(tmp_path: Path) -> None:
    rows = [
        {**row, "at": row["at"] // 1_000_000, "known_at": row["known_at"]} for row in good_rows()
    ]
    with pytest.raises(ConfigError, match="timestamp_unit"):
        prepare(config_for(tmp_path, rows), tmp_path / "out")


def test_unsorted_files_give_the_same_bytes_as_sorted_ones(tmp_path: Path) -> None:
    rows = good_rows(60)
    order = np.random.default_rng(3).permutation(len(rows))
    first = prepare_rows(tmp_path, rows, "first")
    second = prepare_rows(tmp_path, [rows[i] for i in order], "second", block_rows=7)
    assert first.manifest.files == second.manifest.files


def test_several_files_equal_one(tmp_path: Path) -> None:
    rows = good_rows(60)
    first = prepare_rows(tmp_path, rows, "first")
    config = config_for(tmp_path / "in", rows)
    Path(config.path).unlink()
    for number in range(3):
        write_rows(tmp_path / f"in/log/part-{number}.parquet", rows[number::3])
    config = config.model_copy(update={"path": str(tmp_path / "in/log")})
    assert prepare(config, tmp_path / "second").files == first.manifest.files


def columns(**values: object) -> ColumnsConfig:
    return ColumnsConfig.model_validate({"user": "u", "item": "i", "event_ts": "t", **values})


def times_of(values: pa.Array, folder: Path, **settings: object) -> list[int]:
    path = folder / "log.parquet"
    number = list(range(len(values)))
    pq.write_table(pa.table({"u": number, "i": number, "t": values}), path)
    blocks = read_blocks(str(path), columns(**settings), block_rows=10, label_delay_us=5)
    table = pa.concat_tables(blocks)
    assert table.column("label_ts").to_pylist() == [
        t + 5 for t in table.column("event_ts").to_pylist()
    ]
    assert table.column("label").to_pylist() == [1.0] * len(values)
    result: list[int] = table.column("event_ts").to_pylist()
    return result


NOON = dt.datetime(2024, 1, 1, 12, 30, 15, 250_000, tzinfo=dt.UTC)
NOON_TS = ORIGIN_TS + (12 * 3600 + 30 * 60 + 15) * 1_000_000 + 250_000


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_arrow_timestamps_of_every_unit_are_read(tmp_path: Path, unit: str) -> None:
    exact = NOON_TS if unit != "s" else NOON_TS - 250_000
    values = pa.array([NOON], pa.timestamp("us")).cast(pa.timestamp(unit), safe=False)
    assert times_of(values, tmp_path) == [exact]


def test_time_zones_are_turned_to_utc(tmp_path: Path) -> None:
    values = pa.array([NOON], pa.timestamp("us", tz="America/New_York"))
    assert times_of(values, tmp_path) == [NOON_TS]


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", NOON_TS // 10**6), ("ms", NOON_TS // 1000), ("us", NOON_TS), ("ns", NOON_TS * 1000 + 7)],
)
def test_integers_count_the_unit_that_the_config_says(
    tmp_path: Path, unit: str, value: int
) -> None:
    expected = NOON_TS - (250_000 if unit == "s" else 0)
    assert times_of(pa.array([value]), tmp_path, timestamp_unit=unit) == [expected]


@pytest.mark.parametrize(
    "texts",
    [
        ["2024-01-01T12:30:15.250", "2024-01-01 12:30:15.25"],
        ["2024-01-01T12:30:15.25Z", "2024-01-01T13:30:15.250+01:00"],
        ["2024-01-01T12:30:15.250", "2024-01-01T13:30:15.25+01:00"],
    ],
)
def test_iso_text_is_read_with_and_without_zone(tmp_path: Path, texts: list[str]) -> None:
    assert times_of(pa.array(texts), tmp_path) == [NOON_TS, NOON_TS]


def test_dates_are_midnight_utc(tmp_path: Path) -> None:
    assert times_of(pa.array([dt.date(2024, 1, 2)]), tmp_path) == [ORIGIN_TS + DAY_US]


def test_csv_is_read_like_parquet(tmp_path: Path) -> None:
    rows = good_rows()
    config = config_for(tmp_path, rows)
    path = tmp_path / "log.csv"
    pa_csv.write_csv(pq.read_table(config.path), path)
    first = prepare(config, tmp_path / "a")
    second = prepare(config.model_copy(update={"path": str(path)}), tmp_path / "b")
    assert first.files == second.files


def test_sequences_and_tasks_are_read(tmp_path: Path) -> None:
    rows = [
        {**row, "seen": [str(n % 4), "x", None][: n % 4], "paid": n % 2}
        for n, row in enumerate(good_rows())
    ]
    base = {"user": "uid", "item": "sku", "event_ts": "at", "label": "clicked"}
    data = prepare_rows(
        tmp_path,
        rows,
        columns=ColumnsConfig.model_validate({**base, "sequence": ["seen"], "tasks": ["paid"]}),
        sequence_len=2,
    )
    assert data.schema.tasks == ("label", "paid")
    frame = readable_examples(data)
    keys = ["", *data.vocabulary("seen").keys]
    found = [[keys[i] for i in ids] for ids in frame["seen"]]
    assert found == [[key or "" for key in row["seen"]][-2:] for row in rows]
    assert frame["paid"].to_list() == [row["paid"] for row in rows]


def test_periods_come_in_order_and_hold_their_rows(tmp_path: Path) -> None:
    event_ts = np.asarray([50, 10, 30, 31, 11, 10], dtype=np.int64)
    block = pa.table(
        {
            "event_ts": event_ts,
            "user": list("abcabz"),
            "item": ["i"] * 6,
            "label": np.ones(6, np.float32),
            "label_ts": event_ts,
        }
    )
    periods = list(
        iterate_periods(
            [block, block.slice(0, 0)],
            tmp_path / "spill",
            origin_ts=0,
            period_us=20,
            drop_duplicates=False,
        )
    )
    assert [p.period for p in periods] == [0, 1, 2]
    assert [p.rows["event_ts"].to_list() for p in periods] == [[10, 10, 11], [30, 31], [50]]
    assert periods[0].rows["user"].to_list() == ["b", "z", "b"]
    assert not list((tmp_path / "spill").iterdir())


@pytest.mark.s3
def test_log_is_read_from_s3(tmp_path: Path, s3: str) -> None:
    config = config_for(tmp_path, good_rows())
    expected = prepare(config, tmp_path / "local")
    filesystem, folder = pafs.FileSystem.from_uri(s3)
    for number in range(2):
        table = pq.read_table(config.path).slice(number * 20, 20)
        pq.write_table(table, f"{folder}/log/part-{number}.parquet", filesystem=filesystem)
    remote = config.model_copy(update={"path": f"{s3}/log"})
    assert prepare(remote, tmp_path / "remote").files == expected.files
    with pytest.raises(ConfigError, match="no data at"):
        prepare(config.model_copy(update={"path": f"{s3}/nothing"}), tmp_path / "none")
