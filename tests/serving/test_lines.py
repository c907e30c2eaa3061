"""Files of JSON lines: whole lines only, whoever is killed; slots; rotation; a writer that never holds a request up."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from loopfm_ray.errors import DataError, StoreError
from loopfm_ray.serving import lines
from loopfm_ray.serving.lines import LineWriter, read_lines


def writer(folder, **changes):
    return LineWriter(folder, "log", **{"max_bytes": 10**6, "keep": 3, **changes})


def numbers(path):
    return [record["n"] for record in read_lines(path)]


def test_records_come_back_in_order_and_only_their_owner_may_read_them(tmp_path):
    log = writer(tmp_path / "logs")
    for n in range(1000):
        log.put({"n": n})
    log.close()
    assert numbers(log.path) == list(range(1000))
    assert (log.written, log.dropped) == (1000, 0)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


def test_each_writer_has_a_slot_and_a_successor_takes_it_over(tmp_path):
    first, second = writer(tmp_path), writer(tmp_path)
    assert first.path != second.path
    first.put({"n": 1})
    first.close()
    third = writer(tmp_path)
    assert third.path == first.path
    third.put({"n": 2})
    third.close()
    second.close()
    assert numbers(first.path) == [1, 2]


def test_files_are_rotated_by_size_and_the_oldest_go(tmp_path):
    log = writer(tmp_path, max_bytes=200)
    for n in range(400):
        log.put({"n": n})
        if n % 10 == 9:
            while log.written <= n:
                time.sleep(0.001)
    log.close()
    files = [log.path, tmp_path / "log-0.1.jsonl", tmp_path / "log-0.2.jsonl"]
    assert sorted(tmp_path.glob("*.jsonl")) == sorted(files)
    kept = [n for file in reversed(files) for n in numbers(file)]
    assert kept == list(range(kept[0], 400))
    assert all(file.stat().st_size <= 200 for file in files)


def test_a_disk_that_is_slow_or_full_costs_records_and_no_time(tmp_path, monkeypatch, caplog):
    gate = threading.Event()
    whole = lines._write_whole

    def stuck(file, data, size):
        gate.wait()
        raise OSError("no space left")

    monkeypatch.setattr(lines, "_write_whole", stuck)
    log = writer(tmp_path, max_waiting=10)
    began_s = time.monotonic()
    for n in range(2000):
        log.put({"n": n})
    assert time.monotonic() - began_s < 5
    assert log.dropped >= 2000 - 10 - lines._AT_ONCE
    gate.set()
    while log.dropped < 2000:
        time.sleep(0.001)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    monkeypatch.setattr(lines, "_write_whole", whole)
    log.put({"n": 7})
    log.close()
    assert numbers(log.path) == [7]


KILLED = """
import os, signal, sys
from pathlib import Path
from loopfm_ray.serving.lines import LineWriter
log = LineWriter(Path(sys.argv[1]), "log", max_bytes=10**9, keep=2)
n = 0
while True:
    log.put({"n": n, "text": "x" * 300})
    n += 1
    if n == 3000:
        print("go", flush=True)
"""


def test_a_killed_writer_leaves_whole_lines_and_its_successor_goes_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "go\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    path = tmp_path / "log-0.jsonl"
    with path.open("ab") as file:  # as a machine that lost power would leave it
        file.write(b'{"n": 12, "te')
    found = list(read_lines(path))
    assert found[-1] is None
    assert None not in found[:-1]
    rising = [record["n"] for record in found[:-1]]
    assert rising == sorted(set(rising))
    log = writer(tmp_path, max_bytes=10**9)
    assert log.path == path
    log.put({"n": -1})
    log.close()
    after = list(read_lines(path))
    assert after[:-1] == found[:-1]
    assert after[-1] == {"n": -1}


def test_a_long_torn_line_is_cut_off_whole(tmp_path):
    path = tmp_path / "log-0.jsonl"
    path.write_text(json.dumps({"n": 1}) + "\n" + "x" * 300_000)
    writer(tmp_path).close()
    assert numbers(path) == [1]
    path.write_text("y" * 300_000)
    writer(tmp_path).close()
    assert path.read_bytes() == b""


def test_a_line_that_is_no_record_is_named(tmp_path):
    for text, message in (
        ("nonsense\n", "line 1 is no JSON"),
        ("{}\n[]\n", "line 2 is no JSON object"),
    ):
        path = tmp_path / "file"
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_lines(path))
    with pytest.raises(StoreError, match="can not be read"):
        list(read_lines(tmp_path / "nowhere"))


def test_a_folder_that_can_not_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can not take the log log"):
        writer(tmp_path / "file")
