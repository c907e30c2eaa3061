"""One contender of `history_join.py` in one process: load the columns, warm up, join once, print one JSON line.

Every contender starts from the same unsorted Arrow columns and gives the same answer: `ids`, the history's example ids in
time order, and for each request, in the order asked, `start` and `length` of its slice of `ids`. With `--codes` it gives
`length` and the gathered codes of all slices, one after another, instead.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
os.environ.setdefault("POLARS_MAX_THREADS", str(THREADS))

from history_data import CODE_BYTES, read_case  # noqa: E402  after the thread count is set
from history_peers import PEERS  # noqa: E402

from loopfm_ray.history.unsorted import LogChunk, join_log  # noqa: E402
from tests.oracles.asof import newest_visible_slow  # noqa: E402

Answer = dict[str, np.ndarray]
PIECE = 1 << 15


def ours(events: pa.Table, requests: pa.Table, max_len: int, codes: bool) -> Answer:
    """Sort and search with `join_log`; move whole codes as one 16-byte number each."""
    log = [log_chunk(batch, codes) for batch in events.to_batches()]
    asked = (requests.column("user").to_numpy(), requests.column("request_ts").to_numpy())
    found = join_log(asked, log, max_len, num_threads=THREADS)
    history, index = found.carried[0], found.index
    if index.rows is not None:
        history = history[index.rows]
    if not codes:
        return {"ids": history, "start": index.start, "length": index.length}
    return {"length": index.length, "codes": gather(history, index.start, index.length)}


def log_chunk(batch: pa.RecordBatch, codes: bool) -> LogChunk:
    """Return one batch as NumPy columns, without a copy."""
    user, event_ts, available_ts, example_id = (
        batch.column(name).to_numpy() for name in ("user", "event_ts", "available_ts", "example_id")
    )
    packed = batch.column("code")
    whole = np.frombuffer(
        packed.buffers()[1], dtype="c16", count=len(packed), offset=CODE_BYTES * packed.offset
    )
    return LogChunk(user, event_ts, available_ts, example_id, (whole if codes else example_id,))


def gather(history: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the entries of all slices, one after another; pieces of the requests share the threads."""
    stop = np.cumsum(length)
    taken = np.empty(stop[-1] if len(stop) else 0, dtype=history.dtype)

    def fill(begin: int) -> None:
        part = slice(begin, begin + PIECE)
        first, last = stop[begin] - length[begin], stop[part][-1]
        # "clip" lets NumPy write into `out` itself; the rows are never out of bounds
        rows = spread(start[part], length[part])
        np.take(history, rows, out=taken[first:last], mode="clip")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, range(0, len(length), PIECE)))
    return taken


def spread(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the rows of all slices `[start, start + length)`, one after another."""
    stop = np.cumsum(length)
    return np.repeat(start - stop + length, length) + np.arange(stop[-1] if len(stop) else 0)


CONTENDERS: dict[str, Callable[..., Answer]] = {"ours": ours, **PEERS}


def digest(answer: Answer, codes: bool) -> str:
    """Return a hash of the answer of every request: its length and its example ids, or its codes."""
    length = np.ascontiguousarray(answer["length"], dtype=np.int64)
    if codes:
        values = np.ascontiguousarray(answer["codes"])
    else:
        start = np.asarray(answer["start"], dtype=np.int64)
        values = np.asarray(answer["ids"], dtype=np.int64)[spread(start, length)]
    whole = hashlib.blake2b(length.data, digest_size=16)
    whole.update(values.view(np.uint8).data)
    return whole.hexdigest()


def agrees_with_oracle(
    answer: Answer, events: pa.Table, requests: pa.Table, max_len: int, sample: int
) -> bool:
    """Whether the slow twin gives the same ids for a sample of requests, user 0 (the skewed one) among them."""
    user, event_ts, available_ts, example_id = (
        events.column(name).to_numpy()
        for name in ("user", "event_ts", "available_ts", "example_id")
    )
    asked, request_ts = (requests.column(name).to_numpy() for name in ("user", "request_ts"))
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(asked), min(sample, len(asked)), replace=False)
    zero = np.flatnonzero(asked == 0)[:3]
    chosen = np.union1d(chosen[asked[chosen] != 0], zero)
    for owner in np.unique(asked[chosen]):
        rows = np.flatnonzero(user == owner)
        rows = rows[np.lexsort((example_id[rows], event_ts[rows]))]
        which = chosen[asked[chosen] == owner]
        table = [column[rows].tolist() for column in (user, event_ts, available_ts)]
        wanted = ([int(owner)] * len(which), request_ts[which].tolist())
        for row, want in zip(which, newest_visible_slow(wanted, table, max_len), strict=True):
            begin = int(answer["start"][row])
            found = answer["ids"][begin : begin + int(answer["length"][row])]
            if found.tolist() != example_id[rows[want]].tolist():
                return False
    return True


def peak_rss_gib() -> float:
    """Return the largest resident size this process ever had."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/status has no VmHWM; run on Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=sorted(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--codes", action="store_true")
    parser.add_argument("--oracle-sample", type=int, default=0)
    args = parser.parse_args()
    join = CONTENDERS[args.contender]
    events, requests = read_case(args.folder)
    join(events.slice(0, 2000), requests.slice(0, 200), args.max_len, args.codes)

    loaded_gib, cpu, wall = peak_rss_gib(), time.process_time(), time.perf_counter()
    answer = join(events, requests, args.max_len, args.codes)
    record = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_gib": peak_rss_gib(),
        "loaded_rss_gib": loaded_gib,
        "digest": digest(answer, args.codes),
        "num_history_rows": int(np.sum(answer["length"])),
    }
    if args.codes:
        assert answer["codes"].nbytes == record["num_history_rows"] * CODE_BYTES
    if args.oracle_sample:
        record["equal_to_oracle"] = agrees_with_oracle(
            answer, events, requests, args.max_len, args.oracle_sample
        )
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main()
