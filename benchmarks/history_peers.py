"""What DuckDB and Polars do for the same answer as ours, each in more than one formulation.

All rely on what holds for the log of the case: within a user, readiness never falls along time. A row's number among its
user's events is then also the number of events that are visible once it is ready.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
Answer = dict[str, np.ndarray]


def _connect(events: pa.Table, requests: pa.Table) -> Any:
    import duckdb

    con = duckdb.connect(":memory:", config={"threads": THREADS})
    con.execute("SET preserve_insertion_order = false")
    con.register("events", _numbered_codes(events))
    con.register("requests", requests.append_column("r", pa.array(np.arange(requests.num_rows))))
    return con


def _numbered_codes(events: pa.Table) -> pa.Table:
    """Show the 16-byte codes as 128-bit numbers, without a copy: both engines move those faster than strings."""
    place = events.schema.get_field_index("code")
    codes = [chunk.view(pa.decimal128(38, 0)) for chunk in events.column(place).chunks]
    return events.set_column(place, "code", pa.chunked_array(codes, pa.decimal128(38, 0)))


# n: how many events of the user are ready at each request
_ASOF = """
    SELECT q.r, q.user, coalesce(h.n, 0) AS n FROM requests q ASOF LEFT JOIN (
        SELECT user, greatest(event_ts + 1, available_ts) AS ready,
            count(*) OVER (PARTITION BY user ORDER BY greatest(event_ts + 1, available_ts)) AS n
        FROM events
    ) h ON q.user = h.user AND q.request_ts >= h.ready"""
_WINDOW = """
    SELECT r, user, n FROM (
        SELECT r, user, count(*) FILTER (r < 0) OVER (
            PARTITION BY user ORDER BY ts, r >= 0 ROWS UNBOUNDED PRECEDING) AS n
        FROM (
            SELECT user, greatest(event_ts + 1, available_ts) AS ts, -1 AS r FROM events
            UNION ALL SELECT user, request_ts, r FROM requests
        )
    ) WHERE r >= 0"""


def _duckdb_slices(con: Any, counted: str, max_len: int) -> Answer:
    ids = con.sql("SELECT example_id FROM events ORDER BY user, event_ts, example_id").fetchnumpy()
    found = con.sql(
        f"""SELECT c.r, coalesce(b.base, 0) + greatest(c.n - {max_len}, 0) AS start,
            least(c.n, {max_len}) AS length
        FROM ({counted}) c LEFT JOIN (
            SELECT user, sum(num) OVER (ORDER BY user) - num AS base
            FROM (SELECT user, count(*) AS num FROM events GROUP BY user)
        ) b USING (user)"""
    ).fetchnumpy()
    start = np.empty(len(found["r"]), dtype=np.int64)
    length = np.empty_like(start)
    start[found["r"]] = found["start"]
    length[found["r"]] = found["length"]
    return {"ids": ids["example_id"], "start": start, "length": length}


def _duckdb_codes(con: Any, counted: str, max_len: int) -> Answer:
    con.execute("SET preserve_insertion_order = true")
    table = con.sql(
        f"""SELECT least(c.n, {max_len}) AS length,
            list_slice(g.codes, greatest(c.n - {max_len}, 0) + 1, c.n) AS codes
        FROM ({counted}) c LEFT JOIN (
            SELECT user, list(code ORDER BY event_ts, example_id) AS codes FROM events GROUP BY user
        ) g USING (user) ORDER BY c.r"""
    ).to_arrow_table()
    return {
        "length": table.column("length").to_numpy(),
        "codes": _bytes(table.column("codes").chunks),
    }


def _bytes(lists: list[Any]) -> np.ndarray:
    """Return the codes of Arrow lists, one after another, as uint8."""
    flat = [chunk.flatten() for chunk in lists]
    parts = [
        np.frombuffer(part.buffers()[1], dtype="V16", count=len(part), offset=16 * part.offset)
        for part in flat
        if len(part)
    ]
    return np.concatenate(parts).view(np.uint8) if parts else np.zeros(0, dtype=np.uint8)


def _duckdb(counted: str) -> Callable[..., Answer]:
    def join(events: pa.Table, requests: pa.Table, max_len: int, codes: bool) -> Answer:
        with _connect(events, requests) as con:
            return (_duckdb_codes if codes else _duckdb_slices)(con, counted, max_len)

    return join


def _frames(events: pa.Table, requests: pa.Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    history = pl.from_arrow(_numbered_codes(events)).with_columns(
        ready=pl.max_horizontal(pl.col("event_ts") + 1, "available_ts")
    )
    return history, pl.from_arrow(requests).with_row_index("r")


def _polars_answer(history: pl.DataFrame, found: pl.DataFrame, max_len: int, codes: bool) -> Answer:
    """Turn `history`, sorted, and `found` (r, base, stop: first row of the user, end of the visible) into the answer."""
    stop = pl.col("stop").fill_null(0).cast(pl.Int64)
    base = pl.col("base").fill_null(0).cast(pl.Int64)
    found = found.sort("r").select(start=pl.max_horizontal(base, stop - max_len), stop=stop)
    length = found.select(pl.col("stop") - pl.col("start")).to_series()
    if not codes:
        return {
            "ids": history["example_id"].to_numpy(),
            "start": found["start"].to_numpy(),
            "length": length.to_numpy(),
        }
    rows = found.filter(pl.col("stop") > pl.col("start")).select(
        pl.int_ranges("start", "stop").explode()
    )
    taken = history["code"].gather(rows.to_series())
    parts = taken.to_arrow()
    whole = np.frombuffer(
        parts.buffers()[1], dtype="V16", count=len(parts), offset=16 * parts.offset
    )
    return {"length": length.to_numpy(), "codes": whole.view(np.uint8)}


def polars_asof(events: pa.Table, requests: pa.Table, max_len: int, codes: bool) -> Answer:
    """Number the sorted rows and join each request to the last that is ready."""
    history, asked = _frames(events, requests)
    history = history.sort("user", "event_ts", "example_id").with_row_index("row")
    bases = history.group_by("user").agg(base=pl.col("row").first())
    found = (
        asked.sort("user", "request_ts")
        .join_asof(
            history.select("user", "ready", stop=pl.col("row") + 1),
            left_on="request_ts",
            right_on="ready",
            by="user",
            strategy="backward",
            check_sortedness=False,
        )
        .join(bases, on="user", how="left")
    )
    found = found.with_columns(base=pl.when(pl.col("stop").is_null()).then(0).otherwise("base"))
    return _polars_answer(history, found, max_len, codes)


def polars_window(events: pa.Table, requests: pa.Table, max_len: int, codes: bool) -> Answer:
    """Sort events and requests together and count the events before each request."""
    history, asked = _frames(events, requests)
    history = history.sort("user", "event_ts", "example_id")
    both = pl.concat(
        [
            history.select("user", ts="ready", r=pl.lit(-1, pl.Int64)),
            asked.select("user", ts="request_ts", r=pl.col("r").cast(pl.Int64)),
        ]
    ).sort("user", "ts", "r")
    # r is -1 for events, so at one instant they come first; `base` is the count before the user's first row
    both = both.with_columns(stop=(pl.col("r") < 0).cum_sum())
    is_head = pl.col("user") != pl.col("user").shift(1, fill_value=-1)
    before = pl.col("stop") - (pl.col("r") < 0).cast(pl.Int64)
    both = both.with_columns(base=pl.when(is_head).then(before).forward_fill())
    return _polars_answer(history, both.filter(pl.col("r") >= 0), max_len, codes)


def polars_search(events: pa.Table, requests: pa.Table, max_len: int, codes: bool) -> Answer:
    """Our own way in Polars: user and time as one number, then a binary search for each sorted request."""
    history, asked = _frames(events, requests)
    history = history.sort("user", "event_ts", "example_id")
    low = min(history["ready"].min(), asked["request_ts"].min())
    span = max(history["ready"].max(), asked["request_ts"].max()) - low + 1
    user = pl.col("user").cast(pl.Int64) * span
    keys = history.select(user + pl.col("ready") - low).to_series()
    asked = asked.with_columns(key=user + pl.col("request_ts") - low, first=user).sort("key")
    found = asked.select(
        "r",
        stop=pl.Series(keys.search_sorted(asked["key"], side="right")),
        base=pl.Series(keys.search_sorted(asked["first"], side="left")),
    )
    return _polars_answer(history, found, max_len, codes)


PEERS: dict[str, Callable[..., Answer]] = {
    "duckdb_asof": _duckdb(_ASOF),
    "duckdb_window": _duckdb(_WINDOW),
    "polars_asof": polars_asof,
    "polars_window": polars_window,
    "polars_search": polars_search,
}
