"""What must hold of time through the whole path: a log is prepared, embedded and joined, and the requests are looked at."""

import datetime
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.config import SplitConfig
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings
from loopfm_ray.store.manifest import read_manifest
from tests.oracles import logs, paths
from tests.oracles.paths import DAY_US, HOUR_US, what_each_request_saw

LAST_HOUR = 27 * 24
SETTINGS = {"duplicates": "drop", "period_s": 3 * 86_400.0, "num_buckets": 2}
"""Periods of three days: labels may come several periods later."""

cells = st.tuples(
    st.integers(0, 2),
    st.integers(0, 5),
    st.integers(0, 55).map(lambda n: n * 12),
    st.booleans(),
    st.sampled_from([0, 0, 1, 30, 24 * 8]),
)
logs_of_cells = st.lists(cells, min_size=1, max_size=40)
delays = st.sampled_from([0, 1, 13 * HOUR_US, 5 * DAY_US])
FRAME = [(0, 7, 0, True, 0), (0, 7, 19 * 24 + 1, True, 30), (1, 7, 19 * 24 + 1, True, 0)]
"""Rows that every log has, so that the windows of the split are not empty."""


def rows_of(drawn):
    return [
        {
            "uid": f"u{user}",
            "sku": item,
            "at": logs.ORIGIN_TS + hour * HOUR_US,
            "clicked": int(click),
            "known_at": logs.ORIGIN_TS + (hour + late) * HOUR_US,
            "shop": f"s{item % 2}",
            "price": float(item),
        }
        for user, item, hour, click, late in [*FRAME, *drawn]
    ]


def slow_histories(rows, delay_us, max_len, retention_us):
    """Return (user, item, time, history) of each request straight from the log, one rule at a time."""
    unique = {(r["at"], r["uid"], str(r["sku"]), r["clicked"]): r for r in reversed(rows)}
    ordered = [unique[key] for key in sorted(unique)]
    seen = []
    for request in ordered:
        if request["at"] < paths.FM_STOP_TS:
            continue
        history = []
        for event in ordered:
            ready_ts = max(event["at"] + delay_us, event["known_at"])
            if event["uid"] != request["uid"] or not event["clicked"]:
                continue
            if event["at"] < paths.FM_STOP_TS:
                continue  # the snapshot was trained on it
            if event["at"] >= request["at"] or ready_ts > request["at"]:
                continue
            if retention_us is not None and request["at"] - event["at"] > retention_us:
                continue
            history.append((str(event["sku"]), event["at"], ready_ts))
        seen.append((request["uid"], str(request["sku"]), request["at"], history[-max_len:]))
    return sorted(seen)


@settings(max_examples=12)
@given(
    logs_of_cells,
    delays,
    st.sampled_from([1, 3]),
    st.sampled_from([None, 12 * HOUR_US, 3 * DAY_US]),
)
def test_histories_are_those_of_the_log_itself(drawn, delay_us, max_len, retention_us):
    # the log keeps the row with the earliest label of those that are equal
    drawn = list({cell[:4]: cell for cell in sorted(drawn, reverse=True)}.values())
    rows = rows_of(drawn)
    join = JoinSettings(max_len, retention_us)
    with tempfile.TemporaryDirectory() as folder:
        path = paths.walk(Path(folder), rows, delay_us=delay_us, join=join, **SETTINGS)
        seen = what_each_request_saw(path)
    found = [(*row[:3], [event[:3] for event in row[-1]]) for row in seen]
    assert sorted(found) == slow_histories(rows, delay_us, max_len, retention_us)


@settings(max_examples=10)
@given(logs_of_cells, logs_of_cells, delays, st.integers(20, 26))
def test_a_later_event_changes_no_earlier_row(early, late, delay_us, cut_day):
    """Not its history, its features from the past, its prediction, nor the codes it reads."""
    cut = cut_day * 24
    early = [cell for cell in [*early, *late] if cell[2] < cut]
    late = [(u, i + 4, cut + hour % (LAST_HOUR + 24 - cut), c, d) for u, i, hour, c, d in late]
    cut_ts = logs.ORIGIN_TS + cut * HOUR_US
    with tempfile.TemporaryDirectory() as folder:
        options = {"delay_us": delay_us, **SETTINGS}
        before = paths.walk(Path(folder), rows_of(early), "before", **options)
        after = paths.walk(Path(folder), rows_of([*early, *late]), "after", **options)
        old = what_each_request_saw(before)
        assert what_each_request_saw(after, before_ts=cut_ts) == old
        assert len(what_each_request_saw(after)) > len(old)


@settings(max_examples=8)
@given(logs_of_cells, delays, st.integers(1, 5), st.sampled_from([1.0, 2.5, 7.0, 30.0]))
def test_buckets_and_periods_change_no_result(drawn, delay_us, num_buckets, days):
    other = {**SETTINGS, "num_buckets": num_buckets, "period_s": days * 86_400.0}
    with tempfile.TemporaryDirectory() as folder:
        one = paths.walk(Path(folder), rows_of(drawn), "one", delay_us=delay_us, **SETTINGS)
        many = paths.walk(Path(folder), rows_of(drawn), "many", delay_us=delay_us, **other)
        assert what_each_request_saw(many) == what_each_request_saw(one)


@settings(max_examples=8)
@given(logs_of_cells, st.randoms(use_true_random=False), st.integers(1, 9))
def test_order_of_rows_and_blocks_changes_no_byte(drawn, random, block_rows):
    # rows with the same key but another label time would be told apart by nothing but their order
    rows = rows_of(list({cell[:4]: cell for cell in drawn}.values()))
    mixed = list(rows)
    random.shuffle(mixed)
    with tempfile.TemporaryDirectory() as folder:
        one = paths.walk(Path(folder), rows, "one", **SETTINGS)
        two = paths.walk(Path(folder), mixed, "two", block_rows=block_rows, **SETTINGS)
        found = [read_manifest(path.joined).files for path in (one, two)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "origin_ts",
    [
        -10 * DAY_US - HOUR_US,  # the epoch lies inside of the log
        -(2**53) // DAY_US * DAY_US,  # the year 1684
        253_000_000_000_000_000 // DAY_US * DAY_US,  # the year 9987
    ],
    ids=["around the epoch", "long ago", "far future"],
)
def test_when_the_log_happened_changes_nothing(tmp_path, origin_ts):
    rows, shift_us = paths.random_rows(seed=3, num_rows=150), origin_ts - logs.ORIGIN_TS
    moved = [
        {**row, "at": row["at"] + shift_us, "known_at": row["known_at"] + shift_us} for row in rows
    ]
    split = SplitConfig(
        fm_stop=origin_ts + 9 * DAY_US, vm_stop=origin_ts + 19 * DAY_US, valid_s=86_400
    )
    then = paths.walk(tmp_path, rows, "then", delay_us=7, **SETTINGS)
    other = {**SETTINGS, "period_origin": origin_ts, "split": split}
    there = paths.walk(tmp_path, moved, "there", delay_us=7, **other)
    want = [
        (
            *row[:2],
            row[2] + shift_us,
            *row[3:6],
            [(item, ts + shift_us) for item, ts in row[6]],
            [(item, ts + shift_us, ready + shift_us, code) for item, ts, ready, code in row[7]],
        )
        for row in what_each_request_saw(then)
    ]
    assert what_each_request_saw(there) == sorted(want)
    assert audit(there.joined, there.latents, there.prepared, sample=None).num_leaks == 0


def test_an_hour_that_wall_clocks_repeat_is_two_hours_apart_in_utc(tmp_path):
    """Times with offsets, as a log of Berlin has them in the night of 2024-10-27, are ordered by what they mean."""
    night = datetime.datetime(2024, 10, 27, tzinfo=datetime.UTC)
    origin_ts = int(night.timestamp() * 1e6) - 19 * DAY_US - DAY_US // 2
    shift_us = origin_ts - logs.ORIGIN_TS
    rows = [
        {**row, "at": row["at"] + shift_us, "known_at": row["known_at"] + shift_us}
        for row in paths.random_rows(seed=4, num_rows=150)
    ]
    change_ts = int(night.timestamp() * 1e6) + HOUR_US

    def wall_clock(ts):
        hours = 2 if ts < change_ts else 1
        zone = datetime.timezone(datetime.timedelta(hours=hours))
        return datetime.datetime.fromtimestamp(ts / 1e6, zone).isoformat()

    texts = [
        {**row, "at": wall_clock(row["at"]), "known_at": wall_clock(row["known_at"])}
        for row in rows
    ]
    split = SplitConfig(
        fm_stop=origin_ts + 9 * DAY_US, vm_stop=origin_ts + 19 * DAY_US, valid_s=3600
    )
    options = {**SETTINGS, "period_origin": origin_ts, "split": split}
    one = paths.walk(tmp_path, rows, "numbers", **options)
    two = paths.walk(tmp_path, texts, "texts", **options)
    assert read_manifest(one.joined).files == read_manifest(two.joined).files
    times = np.array([row[2] for row in what_each_request_saw(two)])
    assert np.any(times < change_ts)
    assert np.any(times >= change_ts)


def documented_rows():
    """Return the worked example of docs/time.md: row, times in microseconds after midnight, and what is said of it."""
    text = (Path(__file__).parents[2] / "docs" / "time.md").read_text(encoding="utf-8")
    section = text.split("## Five rows, worked out")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    names, table = lines[0], lines[2:]
    rows = []
    for line in table:
        row = dict(zip(names, line, strict=True))
        for name in ("event_ts", "label_ts", "event_ts + delay", "available_ts"):
            hour, minute = row[name].split(":")
            row[name] = (int(hour) * 60 + int(minute)) * HOUR_US // 60
        rows.append(row)
    return rows


def test_the_worked_example_of_the_documentation(tmp_path):
    table = documented_rows()
    assert [row["row"] for row in table] == ["A", "B", "C", "D", "E"]
    midnight, delay_us = logs.ORIGIN_TS + 22 * DAY_US, 2 * HOUR_US

    def log(request_ts):
        own = [
            {
                **rows_of([])[0],
                "uid": "ann",
                "sku": row["row"],
                "at": midnight + row["event_ts"],
                "known_at": midnight + row["label_ts"],
            }
            for row in table
        ]
        asked = {**own[3], "sku": "asked", "at": request_ts, "known_at": request_ts, "clicked": 0}
        return [{**row, "sku": str(row["sku"])} for row in [*rows_of([]), *own, asked]]

    def history(request_ts, item, join=paths.SETTINGS):
        name = f"{request_ts}-{join.max_len}-{join.retention_us}"
        options = {**SETTINGS, "items": None, "past": {"count_fields": ("item",), "max_len": 4}}
        path = paths.walk(tmp_path, log(request_ts), name, delay_us=delay_us, join=join, **options)
        row = next(r for r in what_each_request_saw(path) if r[1] == item and r[2] == request_ts)
        return row[-1]

    noon = midnight + 12 * HOUR_US
    found = {item: ready_ts - midnight for item, _, ready_ts, _ in history(noon, "D")}
    assert list(found) == [row["row"] for row in table if row["visible"] == "yes"] == ["A", "B"]
    for row in table:
        assert row["event_ts + delay"] == row["event_ts"] + delay_us
        assert row["available_ts"] == max(row["event_ts + delay"], row["label_ts"])
        assert found.get(row["row"], row["available_ts"]) == row["available_ts"]
        first = row["event_ts < 12:00"] == "yes"
        second = row["available_ts <= 12:00"] == "yes"
        assert first == (row["event_ts"] < 12 * HOUR_US)
        assert second == (row["available_ts"] <= 12 * HOUR_US)
        assert (row["visible"] == "yes") == (first and second)

    def items(*args):
        return [event[0] for event in history(*args)]

    assert items(noon, "D", JoinSettings(1)) == ["B"]
    assert items(noon, "D", JoinSettings(5, 2 * HOUR_US)) == ["B"]
    assert items(noon - 1, "asked") == ["A"]
    assert items(noon + HOUR_US // 2, "asked") == ["A", "E", "B"]
