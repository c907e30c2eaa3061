"""Versions on a real S3 server: whole or absent, one winner, failures retried within limits and then told."""

import io
import json
import multiprocessing
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from botocore.awsrequest import AWSResponse

from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.store import remote
from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.manifest import commit, file_location, read_manifest, stage, verify
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.s3 import ATTEMPTS, S3Folder, connect
from loopfm_ray.store.tables import read_parquet, write_parquet
from tests.oracles import worlds

pytestmark = pytest.mark.s3


def write_version(address, rows=3, replace_other=False, before_commit=None):
    with stage(address) as staged:
        write_parquet(pa.table({"x": list(range(rows))}), staged / "part" / "a.parquet")
        (staged / "c.json").write_text("{}")
        if before_commit is not None:
            before_commit()
        return commit(
            staged,
            kind="run",
            config_hash="h",
            inputs={},
            meta={"pair": (1, 2)},
            num_rows=rows,
            replace_other=replace_other,
        )


def folders(address):
    """Return the folders that hold objects (this server still lists some that are empty)."""
    return sorted({name.split("/")[0] for name in S3Folder.of(address).sizes() if "/" in name})


def scratch():
    return sorted((Remote("s3://any/where").cache_folder() / remote.STAGING).glob("*"))


@pytest.fixture
def store(s3):
    """The address of a version to write."""
    return f"{s3}/version"


def test_a_version_on_s3_is_the_version_that_a_local_directory_holds(store, tmp_path):
    there = write_version(store)
    here = write_version(tmp_path / "v")
    assert there.version == here.version
    assert there.files == here.files
    assert read_manifest(store) == there
    verify(store)
    table = read_parquet(file_location(store, there, "part/a.parquet"))
    assert table.column("x").to_pylist() == [0, 1, 2]
    assert folders(store) == [there.data]
    assert scratch() == []


def test_an_equal_version_stays_and_another_gives_way_only_when_asked(store):
    first = write_version(store)
    assert write_version(store) == first
    with pytest.raises(StoreError, match=f"holds version {first.version}"):
        write_version(store, rows=5)
    assert read_manifest(store) == first
    second = write_version(store, rows=5, replace_other=True)
    assert read_manifest(store) == second
    # a reader that opened the first may finish; with the next commit its files go
    assert folders(store) == sorted([first.data, second.data])
    third = write_version(store, rows=6, replace_other=True)
    assert folders(store) == sorted([second.data, third.data])
    verify(store)


def test_files_that_are_no_version_are_left_alone(store):
    S3Folder.of(store).put("mine.txt", b"keep")
    with pytest.raises(StoreError, match=r"holds 'mine\.txt' and is no dataset version"):
        write_version(store)
    assert S3Folder.of(store).read("mine.txt")[0] == b"keep"


@pytest.mark.parametrize("rows", [None, 4], ids=["first", "replace"])
def test_of_two_writers_the_second_to_commit_is_told(store, rows):
    if rows is not None:
        write_version(store, rows=rows)

    def overtake():
        write_version(store, rows=7, replace_other=True)

    with pytest.raises(StoreError, match="another writer committed version"):
        write_version(store, rows=8, replace_other=True, before_commit=overtake)
    assert read_manifest(store).num_rows == 7
    verify(store)


def test_two_writers_of_equal_content_both_succeed(store):
    seen = []
    first = write_version(store, before_commit=lambda: seen.append(write_version(store)))
    assert first == seen[0] == read_manifest(store)
    assert folders(store) == [first.data]


def race(address, rows, barrier, results):
    try:
        manifest = write_version(address, rows, replace_other=True, before_commit=barrier.wait)
        results.put((rows, manifest.version))
    except StoreError as error:
        results.put((rows, f"StoreError: {error}"))


@pytest.mark.parametrize("round_number", range(3))
def test_of_concurrent_processes_exactly_one_wins(store, round_number):
    context = multiprocessing.get_context("fork")
    connect.cache_clear()
    barrier, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=race, args=(store, rows, barrier, results)) for rows in (3, 4, 5)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    won = [(rows, text) for rows, text in found if "StoreError" not in text]
    assert len(won) == 1, found
    assert all("another writer" in text for _, text in found if "StoreError" in text)
    manifest = read_manifest(store)
    assert (manifest.num_rows, manifest.version) == won[0]
    verify(store)


KILLED = """
import os, sys
from loopfm_ray.store import remote, s3
from tests.store.test_remote import write_version
address, point, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
client, seen = s3.connect(), []
def die(request, **_):
    seen.append(1)
    if str(len(seen)) == point or (point == "commit" and "manifest" in request.url and request.method == "PUT"):
        os._exit(77)
client.meta.events.register("before-send.s3", die)
write_version(address, rows, replace_other=True)
print(len(seen))
"""


def run_killed(address, point, rows):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, address, str(point), str(rows)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 77), done.stderr
    return int(done.stdout) if done.returncode == 0 else None


@pytest.mark.slow
def test_a_writer_killed_at_any_request_leaves_the_old_version_or_the_new(store):
    old = write_version(store)
    want = write_version(f"{store}-other", rows=9)
    total = run_killed(f"{store}-count", 0, 9)
    for point in range(1, total + 4):
        address = f"{store}-{point}"
        write_version(address)
        run_killed(address, point, 9)
        verify(address)
        assert read_manifest(address).version in (old.version, want.version)
        again = write_version(address, rows=9, replace_other=True)
        assert again.version == want.version
        verify(address)
        write_version(address, rows=10, replace_other=True)
        assert len(folders(address)) == 2  # what the killed one left is gone
    assert scratch() == []


def test_a_first_writer_that_was_killed_leaves_nothing_visible(store):
    assert run_killed(store, "commit", 3) is None
    left = folders(store)
    assert len(left) == 1
    with pytest.raises(StoreError, match="no dataset version"):
        read_manifest(store)
    manifest = write_version(store)
    assert folders(store) == [manifest.data]
    assert manifest.data not in left
    assert scratch() == []


def test_wrong_credentials_are_a_store_error(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    connect.cache_clear()
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        write_version(store)
    with pytest.raises(StoreError, match="refuses the credentials"):
        read_manifest(store)


def test_a_store_that_does_not_answer_is_a_store_error(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    connect.cache_clear()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StoreError, match="Could not connect"):
        write_version(store)


class Raw(io.BytesIO):
    def stream(self, **_):
        yield self.read()


def inject(status, code, times, method="PUT", path=""):
    """Answer the next `times` requests of `method` with an error; return what counts them."""
    seen = []
    lock = threading.Lock()

    def answer(request, **_):
        if request.method != method or path not in request.url:
            return None
        with lock:
            seen.append(request.url)
            if len(seen) > times:
                return None
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        return AWSResponse(request.url, status, {"content-type": "application/xml"}, Raw(body))

    connect().meta.events.register("before-send.s3", answer)
    return seen


@pytest.fixture
def no_wait(monkeypatch):
    """Waits between attempts take no time."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "Throttling")]
)
@pytest.mark.parametrize("path", ["a.parquet", "manifest.json"])
def test_throttling_and_server_errors_are_retried_and_then_told(store, status, code, path):
    seen = inject(status, code, ATTEMPTS - 1, path=path)
    manifest = write_version(store)
    assert len(seen) == ATTEMPTS
    verify(store)
    connect.cache_clear()
    seen = inject(status, code, 99, path=path)
    with pytest.raises(StoreError, match="the object store failed"):
        write_version(store, rows=9, replace_other=True)
    assert len(seen) == ATTEMPTS
    assert read_manifest(store) == manifest
    verify(store)


def test_a_commit_whose_answer_was_lost_counts(store):
    real = S3Folder.put_if
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Folder, "put_if", lambda *args: real(*args) and real(*args))
        manifest = write_version(store)
    assert read_manifest(store) == manifest
    assert folders(store) == [manifest.data]


def test_an_object_that_did_not_arrive_stops_the_commit(store, monkeypatch):
    real = S3Folder.upload

    def lossy(self, path, name):
        if not name.endswith("c.json"):
            real(self, path, name)

    monkeypatch.setattr(S3Folder, "upload", lossy)
    with pytest.raises(StoreError, match=r"c\.json has None bytes, expected 2"):
        write_version(store)
    with pytest.raises(StoreError, match="no dataset version"):
        read_manifest(store)


def test_a_failure_while_staging_leaves_nothing(store):
    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        write_version(store, before_commit=fail)
    assert folders(store) == []
    assert scratch() == []


def test_a_directory_that_is_taken_for_a_dead_writers_before_it_is_locked_is_made_anew(
    store, monkeypatch
):
    made = []

    def make_and_lose(real=remote.tempfile.mkdtemp, **kwargs):
        made.append(real(**kwargs))
        if len(made) == 1:
            folder, prefix = Path(kwargs["dir"]), kwargs["prefix"]
            remote._remove_dead(folder, prefix)  # as another writer would, just now
        return made[-1]

    monkeypatch.setattr(remote.tempfile, "mkdtemp", make_and_lose)
    assert write_version(store).num_rows == 3
    assert len(made) == 2


def test_cleaning_leaves_alone_who_may_still_commit(store):
    folder = S3Folder.of(store)
    folder.put("data-new-1/a", b"a")
    remote.clean(store)
    assert folders(store) == ["data-new-1"]
    manifest = write_version(store)
    assert folders(store) == [manifest.data]


def test_a_damaged_manifest_stops_the_writer(store):
    S3Folder.of(store).put("manifest.json", json.dumps({"format_version": 1}).encode())
    with pytest.raises(StoreError, match="damaged"):
        write_version(store)


@pytest.mark.parametrize("address", ["s3://", "s3://bucket", "s3:///x"])
def test_addresses_without_bucket_or_name_are_refused(address):
    with pytest.raises(StoreError, match="no folder in an object store"):
        S3Folder.of(address)


def test_latents_written_through_a_scratch_folder_lie_on_s3_and_are_taken_over(store, tmp_path):
    examples = worlds.make_examples()
    writer = replace(
        worlds.make_writer(tmp_path / "x"), final_dir=store, scratch=tmp_path / "scratch"
    )
    assert writer.begin(worlds.SHARDS) is None
    for place in worlds.SHARDS:
        worlds.write_shard(writer, examples, *place)
    manifest = writer.finish(worlds.SHARDS, watermark_ts=4000)
    local = worlds.write_latents(tmp_path / "latents", examples)
    assert manifest.version == local.version
    assert writer.begin(worlds.SHARDS) == manifest
    there, here = LatentsReader(store), LatentsReader(tmp_path / "latents")
    for bucket in here.buckets:
        assert there.read_bucket(bucket).equals(here.read_bucket(bucket))
    later = replace(writer, inputs={"prepared": "q"})
    assert later.begin(worlds.SHARDS) is None
    previous = later.previous()
    for place in worlds.SHARDS:
        later.take_over(previous, [place])
    second = later.finish(worlds.SHARDS, watermark_ts=4000, replace_other=True)
    assert second.record["num_reused"] == len(worlds.SHARDS)
    assert second.files == manifest.files
    verify(store)
    assert not list((tmp_path / "scratch").iterdir())


def test_latents_on_s3_need_a_scratch_folder():
    with pytest.raises(ConfigError, match="give scratch"):
        worlds.make_writer("s3://bucket/latents")
