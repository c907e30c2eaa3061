"""Files of JSON lines that a replica appends to beside its requests, and the reader of what is left of them.

A writer takes records without waiting: they are written by a thread of its own, and dropped and counted when that can not
keep up. Each replica has a slot of its own in the folder, which its successor takes over, so a folder holds at most as
many files as `keep` times the replicas that ever ran at once. A line is written whole; one that a killed process left
half is cut off when the slot is opened again, and told of by `read_lines`.
"""

import fcntl
import itertools
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from loopfm_ray.errors import DataError, StoreError

__all__ = ["LineWriter", "read_lines", "take_slot"]

_log = logging.getLogger(__name__)

Record = Mapping[str, Any]  # Any: JSON

_MAX_SLOTS = 256
_MAX_WAITING = 4096
_AT_ONCE = 256
_CLOSE_S = 10.0
_TAIL_BYTES = 1 << 16
_STOP: Final = None


class LineWriter:
    """Appends records to `FOLDER/NAME-SLOT.jsonl`, which only their owner may read. Threads may share it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        max_bytes: int,
        keep: int,
        max_waiting: int = _MAX_WAITING,
    ) -> None:
        """Take a free slot of the folder and start writing.

        Args:
            folder: made if it is not there.
            name: begin of the files' names.
            max_bytes: of a file, before it becomes `NAME-SLOT.1.jsonl`, that one `.2`, and so on.
            keep: files of a slot, the present one with them.
            max_waiting: records that may wait for the disk.

        Raises:
            StoreError: the folder can not be written to, or has no free slot.
        """
        self._max_bytes, self._keep = max_bytes, keep
        self._queue: queue.Queue[Record | None] = queue.Queue(max_waiting)
        self._lock = threading.Lock()
        self._written = self._dropped = 0
        self._last_failure = ""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._slot, self._lock_file = take_slot(folder, name)
            self.path = folder / f"{name}-{self._slot}.jsonl"
            self._file = _open(self.path)
        except OSError as error:
            raise StoreError(
                f"{folder} can not take the {name} log: {error}; give a folder that the service may write to"
            ) from error
        self._thread = threading.Thread(target=self._run, name=f"{name}-log", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Records that are in a file."""
        return self._written

    @property
    def dropped(self) -> int:
        """Records that were lost because too many waited, or the disk refused them."""
        return self._dropped

    def put(self, record: Record) -> None:
        """Take a record if there is room, else count it as dropped; never waits."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            with self._lock:
                self._dropped += 1

    def close(self) -> None:
        """Write what waits and let go of the slot; takes 10 s at most."""
        try:
            self._queue.put(_STOP, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            os.close(self._file)
            os.close(self._lock_file)

    def _run(self) -> None:
        while True:
            records = [self._queue.get()]
            while len(records) < _AT_ONCE and records[-1] is not _STOP:
                try:
                    records.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            found = [record for record in records if record is not None]
            if found:
                self._write(found)
            if records[-1] is _STOP:
                return

    def _write(self, records: list[Record]) -> None:
        lines = [json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records]
        try:
            data, size = b"".join(lines), os.fstat(self._file).st_size
            if size and size + len(data) > self._max_bytes:
                self._rotate()
                size = 0
            _write_whole(self._file, data, size)
        except OSError as error:
            with self._lock:
                self._dropped += len(records)
            if str(error) != self._last_failure:  # said once, not for every record
                self._last_failure = str(error)
                _log.error("%s can not be written, records are dropped: %s", self.path, error)
            return
        self._last_failure = ""
        with self._lock:
            self._written += len(records)

    def _rotate(self) -> None:
        names = [self.path, *(_older(self.path, n) for n in range(1, self._keep))]
        names[-1].unlink(missing_ok=True)
        for source, target in reversed(list(itertools.pairwise(names))):
            if source.exists():
                source.replace(target)
        fresh = _open(self.path)
        os.close(self._file)
        self._file = fresh


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}.jsonl")


def _write_whole(file: int, data: bytes, size: int) -> None:
    """Append all of `data` to a file of `size`, or nothing."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, size)
        raise


def take_slot(folder: Path, name: str) -> tuple[int, int]:
    """Return the first number that no living process holds, and the open file that holds it until it is closed.

    Raises:
        StoreError: all are held.
        OSError: the folder can not be written to.
    """
    for slot in range(_MAX_SLOTS):
        file = os.open(folder / f"{name}-{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return slot, file
    raise StoreError(
        f"{folder} is used by {_MAX_SLOTS} processes as {name} already; give another folder"
    )


def _open(path: Path) -> int:
    """Open a file to append to, after cutting off a last line that is not whole."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.fchmod(file, 0o600)
    size = end = os.fstat(file).st_size
    while end:
        begin = max(end - _TAIL_BYTES, 0)
        place = os.pread(file, end - begin, begin).rfind(b"\n")
        end = begin + place + 1 if place >= 0 else begin
        if place >= 0:
            break
    if end < size:
        _log.warning("%s ended in half a line, which is cut off", path)
        os.ftruncate(file, end)
    return file


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:  # Any: JSON
    """Yield the records of a file; None for a last line that is not whole.

    Raises:
        StoreError: the file can not be read.
        DataError: another line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    yield None
                    return
                yield _parse(path, number, line)
    except OSError as error:
        raise StoreError(f"{path} can not be read: {error.strerror}; give a log file") from error


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is no JSON: {error}; take the line out") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} is no JSON object; take the line out")
    return record
