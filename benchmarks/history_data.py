"""Seeded synthetic history and requests, as Arrow files that every contender of `history_join.py` reads.

Run as a script: `history_data.py FOLDER --case uniform --events 10000000 --requests 1000000 --users 200000`.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

CASES = ("uniform", "skew", "late")
CODE_BYTES = 16
SPAN_S = 30 * 86_400
MICROS = 1_000_000
_START_TS = 1_700_000_000 * MICROS
_DELAY_S, _BATCH_S, _LATE_S = 3600, 600, 3 * 86_400
_BATCH_ROWS = 1 << 20


def make_codes(example_id: np.ndarray) -> np.ndarray:
    """Return uint8 [N, 16]: a code that tells its row, so that a wrong gather shows."""
    mixed = example_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([mixed, mixed ^ np.uint64(0xD1B54A32D192ED03)], axis=1).view(np.uint8)


def make_events(
    rng: np.random.Generator, num: int, num_users: int, case: str, span_s: int = SPAN_S
) -> dict[str, np.ndarray]:
    """Return unsorted columns of `num` events.

    An event is readable at the first ten-minute mark an hour after it happened. Case "skew" gives user 0 a tenth of all
    events; case "late" holds a twentieth of them back for up to three days, so that they arrive out of order.
    """
    user = _users(rng, num, num_users, case)
    second = rng.integers(0, span_s, num)
    ready = (second + _DELAY_S + _BATCH_S - 1) // _BATCH_S * _BATCH_S
    if case == "late":
        ready += np.where(rng.random(num) < 0.05, rng.integers(0, _LATE_S, num), 0)
    return {
        "example_id": rng.permutation(num),
        "user": user,
        "event_ts": _START_TS + second * MICROS,
        "available_ts": _START_TS + ready * MICROS,
    }


def make_requests(
    rng: np.random.Generator, num: int, num_users: int, case: str, span_s: int = SPAN_S
) -> dict[str, np.ndarray]:
    """Return unsorted columns of `num` requests; under "skew" user 0 asks a tenth of them."""
    return {
        "user": _users(rng, num, num_users, case),
        "request_ts": _START_TS + rng.integers(0, span_s, num) * MICROS,
    }


def start_ts() -> int:
    """Return the first instant of the log."""
    return _START_TS


def _users(rng: np.random.Generator, num: int, num_users: int, case: str) -> np.ndarray:
    user = rng.integers(0, num_users, num, dtype=np.int32)
    if case == "skew":
        user[rng.random(num) < 0.1] = 0
    return user


def write_case(folder: Path, case: str, num_events: int, num_requests: int, num_users: int) -> None:
    """Write `events.arrow` and `requests.arrow`."""
    rng = np.random.default_rng(CASES.index(case) + 1)
    events = make_events(rng, num_events, num_users, case)
    columns = {name: pa.array(values) for name, values in events.items()}
    codes = make_codes(events["example_id"])
    columns["code"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(CODE_BYTES), num_events, [None, pa.py_buffer(codes.reshape(-1))]
    )
    requests = make_requests(rng, num_requests, num_users, case)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("events", pa.table(columns)), ("requests", pa.table(requests))):
        path = str(folder / f"{name}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=_BATCH_ROWS)


def read_case(folder: Path) -> tuple[pa.Table, pa.Table]:
    """Return events and requests, read into memory so that no contender pays for the disk."""
    return _read(folder / "events.arrow"), _read(folder / "requests.arrow")


def _read(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, default="uniform")
    for name in ("events", "requests", "users"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    write_case(args.folder, args.case, args.events, args.requests, args.users)


if __name__ == "__main__":
    main()
