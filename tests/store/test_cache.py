"""Versions on S3 as local files: whole, checked, shared by processes, and bounded."""

import multiprocessing
import os
import pickle
import time

import pyarrow as pa
import pytest

from loopfm_ray.errors import StoreError
from loopfm_ray.store import cache as cache_module
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.manifest import commit, read_manifest, stage, verify
from loopfm_ray.store.s3 import S3Folder, check_access, connect
from loopfm_ray.store.tables import map_ipc, write_ipc


def write_version(location, rows=3, files=3):
    with stage(location) as staged:
        for number in range(files):
            write_ipc(pa.table({"x": list(range(rows))}), staged / f"events/{number}.arrow")
        return commit(
            staged,
            kind="run",
            config_hash="h",
            inputs={},
            meta={},
            num_rows=rows,
            replace_other=True,
        )


@pytest.fixture
def place(s3, tmp_path):
    return Remote(f"{s3}/version", str(tmp_path / "cache"))


@pytest.fixture
def reads(s3):
    """The keys of all objects that this process asks for."""
    seen = []

    def look(request, **_):
        if request.method == "GET" and "?" not in request.url:
            seen.append(request.url.rpartition("/")[2])

    connect().meta.events.register("before-send.s3", look)
    return seen


def test_a_local_version_is_read_where_it_lies(tmp_path):
    manifest = write_version(tmp_path / "v")
    version = open_version(tmp_path / "v", "run")
    assert version.manifest == manifest
    assert version.path("events/1.arrow") == tmp_path / "v" / "events/1.arrow"
    assert version.fetch() == tmp_path / "v"
    assert "events/1.arrow" in version
    assert "events/9.arrow" not in version
    with pytest.raises(StoreError, match="kind 'run', expected 'latents'"):
        open_version(tmp_path / "v", "latents")


@pytest.mark.s3
def test_files_come_when_they_are_asked_for_and_once(place, reads):
    manifest = write_version(place)
    reads.clear()
    version = open_version(place)
    assert map_ipc(version.path("events/1.arrow")).num_rows == 3
    assert reads == ["manifest.json", "1.arrow"]
    assert sorted(path.name for path in version.folder.rglob("*.arrow")) == ["1.arrow"]
    open_version(place).fetch()
    again = open_version(place)
    verify(again.fetch())
    assert sorted(name for name in reads if name != "manifest.json") == [
        "0.arrow",
        "1.arrow",
        "2.arrow",
    ]
    assert read_manifest(again.folder).version == manifest.version
    with pytest.raises(StoreError, match=r"has no file 'events/7\.arrow'"):
        again.path("events/7.arrow")


@pytest.mark.s3
def test_a_version_travels_to_another_process_as_its_address(place):
    write_version(place)
    version = open_version(place)
    copy = pickle.loads(pickle.dumps(version))
    assert copy == version
    assert copy.path("events/0.arrow").is_file()


@pytest.mark.s3
@pytest.mark.parametrize("change", ["content", "size"])
def test_a_damaged_object_is_not_read(place, change):
    manifest = write_version(place)
    folder = S3Folder.of(place.address)
    data = folder.read(f"{manifest.data}/events/1.arrow")[0]
    damaged = data[:-1] + b"?" if change == "content" else data + b"?"
    folder.put(f"{manifest.data}/events/1.arrow", damaged)
    version = open_version(place)
    with pytest.raises(StoreError, match="is damaged"):
        version.fetch()
    assert not (version.folder / "events/1.arrow").exists()
    assert not list(version.folder.rglob(".*.tmp-*"))
    folder.put(f"{manifest.data}/events/1.arrow", data)
    verify(version.fetch())


@pytest.mark.s3
def test_a_file_that_was_cut_on_this_disk_comes_anew(place):
    write_version(place)
    path = open_version(place).path("events/1.arrow")
    path.write_bytes(path.read_bytes()[:10])
    leftover = path.parent / ".1.arrow.tmp-00"
    leftover.write_bytes(b"half")
    version = open_version(place)
    verify(version.fetch())
    assert not leftover.exists()


@pytest.mark.s3
def test_a_version_that_was_replaced_twice_says_so(place):
    write_version(place, 3)
    version = open_version(place)
    write_version(place, 4)
    assert map_ipc(version.path("events/0.arrow")).num_rows == 3
    write_version(place, 5)
    with pytest.raises(StoreError, match="is gone; the version was replaced"):
        version.path("events/1.arrow")
    assert map_ipc(open_version(place).path("events/1.arrow")).num_rows == 5


@pytest.mark.s3
def test_the_cache_keeps_to_its_size_and_spares_what_is_read(s3, tmp_path):
    size = write_version(tmp_path / "local", 1000).num_bytes
    limit = int(2.5 * size)

    def place(name):
        return Remote(f"{s3}/{name}", str(tmp_path / "cache"), limit)

    def cached():
        return {path.name for path in (tmp_path / "cache").glob("[0-9a-f]*") if path.is_dir()}

    made = [write_version(place(n), 1000 + n).version for n in range(5)]
    in_use = open_version(place(0))
    in_use.fetch()
    for number in (1, 2):
        open_version(place(number)).fetch()
        time.sleep(0.01)
    # the second was opened before the third and nobody reads it; the first is older still, but in use
    assert cached() == {made[0], made[2]}
    open_version(place(3)).fetch()
    assert cached() == {made[0], made[3]}
    verify(in_use.fetch())
    del in_use
    open_version(place(4)).fetch()
    assert cached() == {made[3], made[4]}
    assert not list((tmp_path / "cache").glob(".*"))
    assert {path.stem for path in (tmp_path / "cache").glob("*.lock")} == cached()


def read_all(place, number, results):
    connect.cache_clear()
    try:
        for turn in range(12):
            version = open_version(
                Remote(f"{place.address}{(number + turn) % 3}", place.cache_dir, place.cache_bytes)
            )
            verify(version.fetch())
        results.put("whole")
    except BaseException as error:  # noqa: BLE001  told to the test
        results.put(repr(error))


@pytest.mark.s3
@pytest.mark.parametrize("num_bytes", [1 << 30, 30_000], ids=["roomy", "tight"])
def test_many_processes_share_a_cache(place, tmp_path, num_bytes):
    """In the tight one each download throws out what the others have just read."""
    place = Remote(place.address, place.cache_dir, num_bytes)
    for number in range(3):
        write_version(Remote(f"{place.address}{number}", place.cache_dir), 800 + number)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=read_all, args=(place, number, results)) for number in range(5)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == ["whole"] * 5
    for worker in workers:
        worker.join()


@pytest.mark.s3
def test_a_cache_that_can_not_be_made_names_the_key(s3, tmp_path):
    (tmp_path / "file").write_text("")
    place = Remote(f"{s3}/version", str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match="set cache_dir"):
        write_version(place)


@pytest.mark.s3
def test_mistakes_are_told_within_seconds_and_clearly(s3, monkeypatch):
    def fails(address, match):
        connect.cache_clear()
        began = time.monotonic()
        with pytest.raises(StoreError, match=match):
            check_access(address)
        assert time.monotonic() - began < 20

    check_access(s3)
    fails("s3://no-such-bucket/x", "there is no such bucket")
    with pytest.raises(StoreError, match="there is no such bucket"):
        read_manifest("s3://no-such-bucket/x")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        fails(s3, "refuses the credentials.*SignatureDoesNotMatch")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        fails(s3, "refuses the credentials.*InvalidAccessKeyId")
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fails(s3, "refuses the credentials.*Unable to locate credentials")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        fails(s3, "does not answer.*Could not connect")
    connect.cache_clear()


@pytest.mark.s3
def test_a_place_that_holds_something_else_is_refused_before_the_work(place):
    S3Folder.of(place.address).put("mine.txt", b"keep")
    with (
        pytest.raises(StoreError, match=r"holds 'mine\.txt' and is no dataset version"),
        stage(place),
    ):
        pytest.fail("the work began")


def test_the_lock_of_a_removed_version_is_not_taken(tmp_path):
    lock = tmp_path / "v.lock"
    handle = cache_module._lock(lock)
    assert not cache_module._remove_unread(lock, tmp_path / "v")
    os.close(handle)
    assert cache_module._remove_unread(lock, tmp_path / "v")
    assert not lock.exists()
