"""The same history in LMDB, in Parquet in two layouts and in Lance, and how each is read by user and by bucket.

A reader gets users and gives, for each, uint8 [n, 16]: the newest codes, oldest first.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from random_reads_data import History

from loopfm_ray.store.lmdb import LmdbStore, write_lmdb
from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.online import UserHistory, pack_history
from loopfm_ray.store.tables import code_bytes

Reader = Callable[[Sequence[int], int], list[np.ndarray]]
SMALL_GROUP = 2048
_COLUMNS = ["event_ts", "available_ts", "code"]
_ENCODING = {
    **dict.fromkeys(("user", "event_ts", "available_ts"), "DELTA_BINARY_PACKED"),
    "code": "PLAIN",
}


def write_stores(folder: Path, history: History) -> tuple[dict[str, float], dict[str, int]]:
    """Write every layout below `folder` and read it into the page cache; return the seconds and the bytes of each."""
    seconds, num_bytes = {}, {}
    for name, write in _WRITERS.items():
        began = time.perf_counter()
        write(folder / name, history)
        seconds[name] = time.perf_counter() - began
        num_bytes[name] = sum(map(_warm, (folder / name).rglob("*")))
    return seconds, num_bytes


def _warm(path: Path) -> int:
    """Read a file to its end and return its bytes."""
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        while stream.read(1 << 22):
            pass
        return stream.tell()


def _write_lmdb(folder: Path, history: History) -> None:
    def records() -> Any:
        keys = sorted((f"u{user}", user) for user in range(history.num_users))
        for key, user in keys:
            part = slice(*history.starts[user : user + 2])
            found = UserHistory(
                history.event_ts[part], history.available_ts[part], history.codes[part], True
            )
            yield key, pack_history(found)

    with stage(folder) as staged:
        write_lmdb(staged, records(), 1 << 36)
        meta = {"latents_version": "benchmark"}
        commit(
            staged,
            kind="online",
            config_hash="benchmark",
            inputs={},
            meta=meta,
            num_rows=history.num_users,
        )


def _parquet_writer(group_rows: int) -> Callable[[Path, History], None]:
    def write(folder: Path, history: History) -> None:
        folder.mkdir()
        for bucket in range(len(history.bucket_users) - 1):
            pq.write_table(
                history.table(bucket),
                folder / f"bucket={bucket:03d}.parquet",
                compression="zstd",
                use_dictionary=False,
                column_encoding=_ENCODING,
                write_statistics=["user"],
                row_group_size=group_rows,
            )

    return write


def _write_lance(folder: Path, history: History) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for bucket in range(len(history.bucket_users) - 1):  # one fragment a bucket
        mode = "append" if bucket else "create"
        dataset = lance.write_dataset(
            history.table(bucket), folder, mode=mode, max_rows_per_file=1 << 30
        )
    dataset.create_scalar_index("user", "BTREE")


_WRITERS: dict[str, Callable[[Path, History], None]] = {
    "lmdb": _write_lmdb,
    "parquet": _parquet_writer(SMALL_GROUP),
    "parquet_large": _parquet_writer(1 << 18),
    "lance": _write_lance,
}


def _open_lmdb(folder: Path, history: History) -> Reader:
    del history
    store = LmdbStore(folder / "lmdb")

    def read(users: Sequence[int], max_len: int) -> list[np.ndarray]:
        found = store.get_many([f"u{user}" for user in users])
        return [item.codes[-max_len:] for item in found if item is not None]

    return read


class _Parquet:
    """Shards whose footers stay in memory: a user's row groups are known before anything is read."""

    def __init__(self, folder: Path, history: History) -> None:
        self._buckets = history.bucket_users
        paths = sorted(folder.glob("bucket=*.parquet"))
        self._files = [pq.ParquetFile(path, memory_map=True) for path in paths]
        self._first, self._last = zip(*map(_group_bounds, self._files), strict=True)

    def __call__(self, users: Sequence[int], max_len: int) -> list[np.ndarray]:
        asked = np.asarray(users)
        bucket = np.searchsorted(self._buckets, asked, side="right") - 1
        out: list[Any] = [None] * len(asked)
        for value in np.unique(bucket):
            members = np.flatnonzero(bucket == value)
            found = self._read(int(value), asked[members], max_len)
            for place, codes in zip(members, found, strict=True):
                out[place] = codes
        return out

    def _read(self, bucket: int, users: np.ndarray, max_len: int) -> list[np.ndarray]:
        begin = np.searchsorted(self._last[bucket], users, side="left")
        stop = np.searchsorted(self._first[bucket], users, side="right")
        groups = sorted({g for a, b in zip(begin, stop, strict=True) for g in range(a, b)})
        table = self._files[bucket].read_row_groups(
            groups, columns=["user", "code"], use_threads=False
        )
        user, codes = table.column("user").to_numpy(), code_bytes(table.column("code"))
        return _newest(user, codes, users, max_len)


def _group_bounds(file: Any) -> tuple[np.ndarray, np.ndarray]:
    metadata = file.metadata
    column = metadata.schema.names.index("user")
    found = [
        metadata.row_group(index).column(column).statistics
        for index in range(metadata.num_row_groups)
    ]
    return np.array([part.min for part in found]), np.array([part.max for part in found])


def _newest(
    user: np.ndarray, codes: np.ndarray, asked: np.ndarray, max_len: int
) -> list[np.ndarray]:
    """Return the last codes of each user asked for, from rows sorted by user."""
    start = np.searchsorted(user, asked, side="left")
    stop = np.searchsorted(user, asked, side="right")
    return [codes[max(a, b - max_len) : b] for a, b in zip(start, stop, strict=True)]


def _open_lance(folder: Path, history: History) -> Reader:
    """Ask by the scalar index."""
    del history
    dataset = lance.dataset(folder / "lance")

    def read(users: Sequence[int], max_len: int) -> list[np.ndarray]:
        asked = (
            f"user = {users[0]}" if len(users) == 1 else f"user IN ({', '.join(map(str, users))})"
        )
        table = dataset.to_table(columns=["user", "code"], filter=asked, scan_in_order=True)
        user, codes = table.column("user").to_numpy(), code_bytes(table.column("code"))
        return _newest(user, codes, np.asarray(users), max_len)

    return read


def _take_lance(folder: Path, history: History) -> Reader:
    """Ask by row numbers, with the first row of every user in memory: the fastest way that Lance has."""
    dataset, starts = lance.dataset(folder / "lance"), history.starts

    def read(users: Sequence[int], max_len: int) -> list[np.ndarray]:
        asked = np.asarray(users)
        stop = starts[asked + 1]
        start = np.maximum(starts[asked], stop - max_len)
        rows = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
        codes = code_bytes(dataset.take(pa.array(rows), columns=["code"]).column("code"))
        return np.split(codes, np.cumsum(stop - start)[:-1])

    return read


READERS: dict[str, Callable[[Path, History], Reader]] = {
    "lmdb": _open_lmdb,
    "parquet": lambda folder, history: _Parquet(folder / "parquet", history),
    "parquet_large": lambda folder, history: _Parquet(folder / "parquet_large", history),
    "lance": _open_lance,
    "lance_take": _take_lance,
}


def _scan_parquet(name: str) -> Callable[[Path, int], int]:
    def scan(folder: Path, bucket: int) -> int:
        path = folder / name / f"bucket={bucket:03d}.parquet"
        return pq.read_table(path, columns=_COLUMNS, partitioning=None).num_rows

    return scan


def _scan_lance(folder: Path, bucket: int) -> int:
    dataset = lance.dataset(folder / "lance")
    fragment = dataset.get_fragment(bucket)
    return fragment.to_table(columns=_COLUMNS).num_rows


SCANS: dict[str, Callable[[Path, int], int]] = {
    "parquet": _scan_parquet("parquet_large"),
    "parquet_small_groups": _scan_parquet("parquet"),
    "lance": _scan_lance,
}
