"""The whole preparation against slow twins, and what must not change its rows."""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.config import ColumnsConfig, NegativesConfig, SplitConfig, SyntheticConfig
from loopfm_ray.data.derive import derive_context
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.windows import Learnable, count_learnable, keep_learnable
from loopfm_ray.errors import ConfigError, DataError, SchemaError, StoreError
from loopfm_ray.store.manifest import verify
from loopfm_ray.types import TimeRange
from tests.oracles.logs import (
    DAY_US,
    ORIGIN_TS,
    config_for,
    good_rows,
    item_rows,
    prepare_rows,
    readable_examples,
    write_rows,
)
from tests.oracles.past import Event, Request, past_twin, raw_history_twin

HOUR = 3_600_000_000
KINDS = {str(row["sku"]): row["kind"] for row in item_rows()}


@st.composite
def logs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw logs with equal times, late labels and items that the table lacks (7 and 8)."""
    cells = draw(
        st.lists(
            st.tuples(
                st.integers(0, 3),
                st.integers(0, 8),
                st.integers(0, 40),
                st.booleans(),
                st.sampled_from([0, 0, 1, 30, 200]),
            ),
            min_size=3,
            max_size=40,
            unique_by=lambda cell: cell[:4],
        )
    )
    rows = [
        {
            "uid": f"u{user}",
            "sku": item,
            "at": ORIGIN_TS + when * 16 * HOUR,
            "clicked": int(click),
            "known_at": ORIGIN_TS + when * 16 * HOUR + delay * HOUR,
            "shop": f"s{user % 2}",
            "price": float(when),
        }
        for user, item, when, click, delay in cells
    ]
    # the split of the test config needs events on both sides
    for when in (0, 41):
        rows.append(
            {
                **rows[0],
                "at": ORIGIN_TS + when * 16 * HOUR,
                "known_at": ORIGIN_TS + when * 16 * HOUR,
                "sku": 99,
            }
        )
    return rows


@settings(max_examples=25, deadline=None)
@given(logs(), st.sampled_from(["positives", "all"]))
def test_every_example_equals_the_slow_twin(rows: list[dict[str, Any]], history: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_rows(Path(folder), rows, history_events=history)
        frame = readable_examples(data)
        verify(data.version.folder)
    assert frame.height == len(rows)
    assert frame["example_id"].to_list() == list(range(len(rows)))
    assert frame["event_ts"].is_sorted()
    events = [
        Event(
            user=example["user"],
            event_ts=example["event_ts"],
            available_ts=example["label_ts"] if history == "positives" else example["event_ts"],
            values={"item": example["item"], "kind": KINDS.get(example["item"])},
            name=example["example_id"],
        )
        for example in frame.iter_rows(named=True)
        if example["is_event"]
    ]
    is_all = history == "all"
    assert len(events) == (len(rows) if is_all else sum(r["clicked"] for r in rows))
    for example in frame.iter_rows(named=True):
        values = {"item": example["item"], "kind": KINDS.get(example["item"])}
        request = Request(example["user"], example["event_ts"], values)
        found = {name: example[name] for name in example if name.startswith("past_")}
        assert found == pytest.approx(past_twin(request, events), rel=1e-6)
        assert example["history"] == raw_history_twin(request, events, 4)
    own = sorted(
        (r["uid"], str(r["sku"]), r["at"], float(r["clicked"]), r["known_at"], r["shop"])
        for r in rows
    )
    assert (
        sorted(frame.select("user", "item", "event_ts", "label", "label_ts", "shop").rows()) == own
    )


@settings(max_examples=10, deadline=None)
@given(logs(), st.integers(1, 6))
def test_number_of_buckets_changes_no_example(rows: list[dict[str, Any]], num_buckets: int) -> None:
    settings_ = {"negatives": NegativesConfig(kind="popularity", per_positive=2)}
    with tempfile.TemporaryDirectory() as folder:
        one = readable_examples(prepare_rows(Path(folder), rows, "one", num_buckets=1, **settings_))
        many = prepare_rows(Path(folder), rows, "many", num_buckets=num_buckets, **settings_)
        assert readable_examples(many).equals(one)


@settings(max_examples=10, deadline=None)
@given(logs(), st.integers(1, 3))
def test_later_events_change_no_earlier_row(rows: list[dict[str, Any]], weeks: int) -> None:
    # Negatives are drawn within a period, so what comes later begins with the next one.
    stop_ts = ORIGIN_TS + weeks * 7 * DAY_US
    split = SplitConfig(fm_stop="2024-01-02", vm_stop="2024-01-04", valid_s=3600)
    early = [row for row in rows if row["at"] < stop_ts]
    early += [{**rows[0], "at": ORIGIN_TS + 5 * DAY_US, "known_at": ORIGIN_TS + 5 * DAY_US}]
    late = [row for row in rows if row["at"] >= stop_ts]
    options = {
        "negatives": NegativesConfig(kind="popularity"),
        "split": split,
        "duplicates": "drop",
    }
    with tempfile.TemporaryDirectory() as folder:
        before = prepare_rows(Path(folder), early, "before", **options)
        after = prepare_rows(Path(folder), early + late, "after", **options)
        old, new = readable_examples(before), readable_examples(after)
        assert new.filter(pl.col("event_ts") < stop_ts).equals(old)
        for field in before.schema.categorical:
            keys = before.vocabulary(field.name).keys
            assert after.vocabulary(field.name).keys[: len(keys)] == keys


def test_known_ids_at_a_time_are_a_prefix(tmp_path: Path) -> None:
    rows = good_rows()
    data = prepare_rows(tmp_path, rows)
    ts = ORIGIN_TS + 2 * DAY_US
    schema = data.schema_as_of(ts)
    for field in schema.categorical:
        vocabulary = data.vocabulary(field.name)
        assert vocabulary.first_ts.tolist() == sorted(vocabulary.first_ts)
        assert field.cardinality == 1 + sum(first < ts for first in vocabulary.first_ts)
    known = data.vocabulary("item").keys[: schema.of("categorical")[1].cardinality - 1]
    assert known == [str(row["sku"]) for row in rows[:3]]
    assert data.schema_as_of(2**62) == data.schema


def test_numbers_are_standardised_by_what_the_fm_window_holds(tmp_path: Path) -> None:
    rows = good_rows()
    rows[2]["price"] = None
    rows[-1]["price"] = 1e6
    data = prepare_rows(tmp_path, rows)
    stop_ts = ORIGIN_TS + 9 * DAY_US
    known = np.asarray([r["price"] for r in rows if r["at"] < stop_ts and r["price"] is not None])
    price = next(field for field in data.schema.numeric if field.name == "price")
    assert (price.mean, price.std) == pytest.approx((known.mean(), known.std()))
    frame = readable_examples(data)
    expected = [0.0 if r["price"] is None else (r["price"] - price.mean) / price.std for r in rows]
    assert frame["price"].to_list() == pytest.approx(expected, rel=1e-5)
    assert data.manifest.meta["counts"]["missing_numeric"] == 1
    weight = next(field for field in data.schema.numeric if field.name == "weight")
    assert (weight.mean, weight.std) == pytest.approx((3.0, 2.0))
    assert data.items.numeric["weight"].tolist() == pytest.approx([0.0, *((np.arange(7) - 3) / 2)])


def test_entities_lie_in_id_order_with_an_unknown_first(tmp_path: Path) -> None:
    rows = [
        *good_rows(),
        {
            **good_rows()[0],
            "sku": 50,
            "at": ORIGIN_TS + 27 * DAY_US,
            "known_at": ORIGIN_TS + 27 * DAY_US,
        },
    ]
    data = prepare_rows(tmp_path, rows)
    items = data.items
    assert items.keys == ["", *(str(n) for n in range(7)), "50"]
    kinds = ["", *data.vocabulary("kind").keys]
    assert [kinds[i] for i in items.ids["kind"]] == ["", *(f"k{n % 3}" for n in range(7)), ""]
    assert len(items) == 9
    assert len(data.users) == 6
    assert data.users.ids == {}
    assert data.manifest.meta["counts"]["items_without_row"] == 1
    assert data.vocabulary("kind").encode(["k1", "nothing", None]).tolist() == [2, 0, 0]


def test_same_input_gives_the_same_bytes_serial_or_in_processes(tmp_path: Path) -> None:
    config = config_for(tmp_path, good_rows(80), negatives=NegativesConfig(kind="popularity"))
    first = prepare(config, tmp_path / "first")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        second = prepare(config, tmp_path / "second", mapper=pool.map)
    assert first.version == second.version
    assert prepare(config, tmp_path / "first").created_at == first.created_at


def test_other_data_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first = prepare(config_for(tmp_path, good_rows(80)), tmp_path / "out")
    other = config_for(tmp_path, good_rows(40))
    with pytest.raises(StoreError):
        prepare(other, tmp_path / "out")
    assert PreparedData.open(tmp_path / "out").manifest.version == first.version
    assert prepare(other, tmp_path / "out", replace_other=True).version != first.version


def test_negatives_copy_the_request_and_change_the_item(tmp_path: Path) -> None:
    rows = [{**row, "clicked": 1} for row in good_rows(60)]
    data = prepare_rows(
        tmp_path, rows, negatives=NegativesConfig(kind="popularity", per_positive=2)
    )
    frame = readable_examples(data)
    counts = data.manifest.meta["counts"]
    assert counts["negatives"] == frame.height - 60 == 120 - counts["negatives_given_up"]
    request = ["user", "event_ts", "label_ts", "shop", "price", "hour"]
    positives = frame.filter(pl.col("label") == 1)
    negatives = frame.filter(pl.col("label") == 0)
    assert not negatives["is_event"].any()
    assert positives["is_event"].all()
    joined = negatives.join(positives, on=request, suffix="_taken")
    assert joined.height == negatives.height
    assert (joined["item"] != joined["item_taken"]).all()
    assert frame["example_id"].to_list() == list(range(frame.height))


def test_derived_context_is_what_serving_computes(tmp_path: Path) -> None:
    frame = readable_examples(prepare_rows(tmp_path, good_rows()))
    for example in frame.iter_rows(named=True):
        assert derive_context(example["event_ts"]) == {
            "hour": example["hour"],
            "weekday": example["weekday"],
        }
    monday = derive_context(ORIGIN_TS + 5 * HOUR)
    assert monday == {"hour": "5", "weekday": "0"}
    with pytest.raises(ConfigError, match="month"):
        derive_context(0, ["month"])


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"fm_stop": "2025-01-10", "vm_stop": "2025-01-20"}, "newer than the events"),
        ({"fm_stop": "2024-01-10", "vm_stop": "2025-01-20"}, "after the last event"),
        ({"fm_stop": "2023-01-10", "vm_stop": "2024-01-20"}, "before the first event"),
        ({"fm_stop": "2024-01-10", "vm_stop": "2024-01-20", "valid_s": 20 * 86_400}, "fm_train"),
    ],
)
def test_split_that_does_not_fit_the_log_is_an_error(
    tmp_path: Path, split: dict[str, Any], words: str
) -> None:
    config = config_for(tmp_path, good_rows(), split=SplitConfig(**split))
    with pytest.raises(ConfigError, match=words):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_entity_tables_are_errors(tmp_path: Path) -> None:
    for wrong, error, words in (
        ([*item_rows(), {"sku": 3, "kind": "k", "weight": 0.0}], DataError, "'3' more than once"),
        ([*item_rows(), {"sku": None, "kind": "k", "weight": 0.0}], DataError, "key is missing"),
        (
            [*item_rows(), {"sku": 8, "kind": "k", "weight": float("inf")}],
            DataError,
            "weight.*row 7",
        ),
        ([{"sku": 1, "kind": "k"}], SchemaError, "weight"),
    ):
        config = config_for(tmp_path, good_rows())
        assert config.items is not None
        write_rows(Path(config.items.path), wrong)
        with pytest.raises(error, match=words):
            prepare(config, tmp_path / "out")


def test_names_that_are_no_fields_are_errors(tmp_path: Path) -> None:
    for values, words in (({"vm_fields": ("colour",)}, "colour"), ({"vertical": "price"}, "price")):
        with pytest.raises(ConfigError, match=words):
            prepare(config_for(tmp_path, good_rows(), **values), tmp_path / "out")


def test_log_of_positives_alone_without_tables(tmp_path: Path) -> None:
    columns = ColumnsConfig(user="uid", item="sku", event_ts="at")
    data = prepare_rows(
        tmp_path,
        good_rows(),
        columns=columns,
        items=None,
        derive=(),
        past={"count_fields": ("item", "user")},
    )
    assert [field.name for field in data.schema.fields][:2] == ["user", "item"]
    assert readable_examples(data)["label"].to_list() == [1.0] * 40
    assert len(data.items) == 8


def test_synthetic_data_is_prepared(tmp_path: Path) -> None:
    config = SyntheticConfig(num_rows=2000, num_users=20, num_buckets=2)
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    assert [field.name for field in config.vm_schema(data.schema).fields] == [
        "item",
        "topic",
        "price",
        "surface",
    ]
    assert "taste" in data.users.ids


def test_bucket_files_hold_their_users_only(tmp_path: Path) -> None:
    data = prepare_rows(tmp_path, good_rows())
    for file in data.examples.files():
        table = pq.read_table(file.path, partitioning=None)
        assert set(table.column("bucket").to_pylist()) == {file.bucket}
        assert table.num_rows == file.num_rows
        for ts in table.column("event_ts").to_pylist():
            assert file.period_range.contains(ts)


def test_a_path_that_comes_to_hold_another_version_is_read_anew(tmp_path: Path) -> None:
    keys = []
    for num_items in (10, 20):
        config = SyntheticConfig(num_rows=500, num_users=10, num_items=num_items)
        prepare(config, tmp_path / "p", replace_other=True)
        data = PreparedData.open(tmp_path / "p")
        keys.append((len(data.items), len(data.vocabulary("item"))))
    assert keys == [(11, 10), (21, 20)]


@settings(max_examples=15, deadline=None)
@given(logs(), st.integers(0, 30 * 24), st.integers(1, 30 * 24))
def test_a_model_learns_from_no_item_that_was_not_met_before_it_ends(
    rows: list[dict[str, Any]], begin: int, hours: int
) -> None:
    """In the middle of a period some negatives are of items that come later: they would say that new items are not bought."""
    start, until = (ORIGIN_TS + one * DAY_US // 24 for one in (begin, begin + hours))
    learnable_range = TimeRange(start, until)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_rows(
            Path(folder), rows, negatives=NegativesConfig(kind="popularity", per_positive=2)
        )
        learnable = data.learnable(learnable_range, until)
        files = data.examples.files()
        found = read_rows(files, columns=["example_id", *Learnable.columns, "label"])
        known = data.vocabulary("item").first_ts
        expected = [
            start <= ts < until and label_ts <= until and known[item - 1] < until
            for ts, label_ts, item in zip(
                found["event_ts"], found["label_ts"], found["item"], strict=True
            )
        ]
        assert learnable.mask(found).tolist() == expected
        # what a positive says is never lost: its item had been met
        is_due = (found["event_ts"] < until) & (found["event_ts"] >= start)
        is_due &= found["label_ts"] <= until
        lost = is_due & ~learnable.mask(found)
        assert not (lost & (found["label"] > 0)).any()
        counts = count_learnable(files, learnable)
        assert sum(counts.values()) == sum(expected)
        blocks = [read_rows([file], columns=["example_id", *Learnable.columns]) for file in files]
        kept = [rows["example_id"] for rows in keep_learnable(blocks, learnable)]
        assert sorted(np.concatenate(kept).tolist()) == sorted(
            found["example_id"][np.asarray(expected, dtype=bool)].tolist()
        )


def test_a_negative_of_an_item_that_comes_later_is_not_learnt_from(tmp_path: Path) -> None:
    rows = [{**row, "clicked": 1} for row in good_rows(60)]
    data = prepare_rows(
        tmp_path, rows, negatives=NegativesConfig(kind="popularity", per_positive=2)
    )
    known = data.vocabulary("item").first_ts
    until = int(known[len(known) // 2])
    found = read_rows(data.examples.files(), columns=["label", *Learnable.columns])
    mask = data.learnable(TimeRange(0, until), until).mask(found)
    dropped = (found["label_ts"] <= until) & (found["event_ts"] < until) & ~mask
    assert dropped.any()
    assert not (found["label"][dropped] > 0).any()
