"""A full disk stops a writer with one clear message, leaves no half-written version, and the same command goes on later.

Two ways: an error put in at random file operations, which works everywhere, and a small file system that really fills.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopfm_ray.errors import StoreError
from loopfm_ray.history.join import write_joined
from loopfm_ray.store.compact import compact
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.publish import publish
from loopfm_ray.store.target import live_spaces, open_current
from tests.oracles import worlds
from tests.store.test_kill import JOIN, MATERIALIZE, PUBLISH, REPLACE
from tests.store.test_kill_points import COMPACT, EXPIRE, INCREMENTAL

POINTS = 14
SEED = 20260202

# As the driver of test_kill, but an operation that needs space fails, and all later ones that need some too. Arrow opens
# its files out of Python's sight, so that it does is announced.
DRIVER = """
import errno, json, os, random, shutil, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from loopfm_ray.errors import StoreError
from tests.oracles import worlds
from loopfm_ray.history.join import write_joined
from loopfm_ray.store import manifest
from loopfm_ray.store.publish import publish

base = Path(sys.argv[1])
manifest.code_version = lambda: "test"
# what a process wrote outlives it without a flush, and flushing takes nine tenths of the time, more on a busy disk
os.fsync = lambda handle: None


def announced(function):
    def call(path, *arguments, **options):
        sys.audit("open", str(path), "w", 0)
        return function(path, *arguments, **options)
    return call


pq.ParquetWriter = announced(pq.ParquetWriter)
pa.OSFile = announced(pa.OSFile)
write_table = pq.write_table
pq.write_table = lambda table, path, **options: announced(
    lambda where, **kept: write_table(table, where, **kept)
)(path, **options)


def needs_space(event, arguments):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return any(c in mode for c in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in ("os.mkdir", "os.link", "os.rename")


def fork(function, root, full_from):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (3 if full_from else 0), (root, full_from, code)
        return
    count = 0

    def hook(event, arguments):
        nonlocal count
        if not needs_space(event, arguments) or not str(arguments[-1 if event == "os.link" else 0]).startswith(str(root)):
            return
        count += 1
        # a name that takes the place of another needs no space but the first time
        if full_from and (count == full_from or (count > full_from and event != "os.rename")):
            raise OSError(errno.ENOSPC, "No space left on device")

    status = 1
    try:
        sys.addaudithook(hook)
        function(root)
        (base / "count").write_text(str(count))
        status = 0
    except StoreError as error:
        status = 3 if "no space left" in str(error) and "MiB free" in str(error) else 4
        if status == 4:
            print(error, file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def main(setup, program):
    base.mkdir()
    fork(setup, base / "start", 0)
    (base / "start").mkdir(exist_ok=True)
    shutil.copytree(base / "start", base / "whole")
    fork(program, base / "whole", 0)
    total = int((base / "count").read_text())
    points = random.Random(SEED).sample(range(1, total + 1), min(total, POINTS))
    for point in points:
        shutil.copytree(base / "start", base / f"{point}-full")
        fork(program, base / f"{point}-full", point)
        shutil.copytree(base / f"{point}-full", base / f"{point}-again")
        fork(program, base / f"{point}-again", 0)
    print(json.dumps(points))


examples = worlds.make_examples(num_rows=120)


def nothing(root):
    pass
"""

PROGRAMS = {
    "materialize": (MATERIALIZE, "latents"),
    "replace": (REPLACE, "latents"),
    "incremental": (INCREMENTAL, "latents"),
    "join": (JOIN, "joined"),
    "publish": (PUBLISH, None),
    "compact": (COMPACT, "latents"),
    "expire": (EXPIRE, "latents"),
}
CLEAN = ("join", "compact", "expire")
"""Those that keep nothing of a run that failed; the others go on from what was done."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_disk_full_at_any_operation_is_told_and_the_rerun_ends_the_same(kind, tmp_path):
    program, name = PROGRAMS[kind]
    base = tmp_path / "base"
    constants = f"SEED, POINTS = {SEED}, {POINTS}\n"
    done = subprocess.run(
        [sys.executable, "-c", constants + DRIVER + program, str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    assert len(points) >= min(POINTS, 5)
    want = worlds.tree_bytes(base / "whole")
    allowed = [
        read_manifest(base / folder / name).version
        for folder in ("start", "whole")
        if name and (base / folder / name).exists()
    ]
    for point in points:
        full = base / f"{point}-full"
        if name is None:
            for live in live_spaces(full / "online"):
                store = open_current(full / "online", live.space)
                assert any(store.get_many(worlds.user_keys()))
                store.close()
        elif (base / "start" / name).exists() or (full / name).exists():
            verify(full / name)
            assert read_manifest(full / name).version in allowed
        if kind in CLEAN:
            assert [p.name for p in full.iterdir() if p.name.startswith(".")] == [], point
        assert worlds.tree_bytes(base / f"{point}-again") == want, (kind, point)


class SmallDisk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self._mount("size=64m")

    def _mount(self, options, *more):
        command = ["mount", "-t", "tmpfs", *more, "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def resize(self, num_bytes):
        self._mount(f"remount,size={num_bytes}")

    def used_bytes(self):
        return shutil.disk_usage(self.folder).used

    def close(self):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    small = SmallDisk(tmp_path / "disk")
    yield small
    small.close()


EXAMPLES = worlds.make_examples(num_rows=3000, num_periods=8)


def set_up(root):
    worlds.write_prepared(root / "prepared", EXAMPLES)
    worlds.update_latents(root / "latents", EXAMPLES)


ON_DISK = {
    "materialize": lambda root: worlds.update_latents(root / "more", EXAMPLES),
    "join": lambda root: write_joined(
        root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, worlds.SETTINGS
    ),
    "compact": lambda root: compact(root / "latents"),
    "publish": lambda root: publish(root / "latents", worlds.user_keys(), root / "online"),
}


def message_of(program, root):
    """Run the program and return what its StoreError says, None if there was none."""
    try:
        program(root)
    except StoreError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_file_system_that_fills_up_is_told_and_more_space_is_enough(kind, disk, tmp_path):
    program = ON_DISK[kind]
    set_up(tmp_path / "want")
    program(tmp_path / "want")
    want = worlds.tree_bytes(tmp_path / "want")
    num_full = 0
    for spare in (0, 3, 9, 17, 33, 65, 129, 1024):
        disk.resize(64 << 20)
        shutil.rmtree(disk.folder / "run", ignore_errors=True)
        root = disk.folder / "run"
        set_up(root)
        before = worlds.tree_bytes(root)
        disk.resize(disk.used_bytes() + spare * 4096)
        message = message_of(program, root)
        if message is not None:
            num_full += 1
            assert "MiB free" in message
            assert str(disk.folder) in message
            seen = worlds.tree_bytes(root)
            assert {path: seen[path] for path in before} == before
            if kind in ("join", "compact"):
                assert seen == before
            disk.resize(64 << 20)
            program(root)
        assert worlds.tree_bytes(root) == want, spare
    assert 2 <= num_full < 8


def test_the_small_disk_is_really_small(disk):
    disk.resize(64 << 10)
    with pytest.raises(OSError, match="No space left"):
        Path(disk.folder / "a").write_bytes(b"1" * (1 << 20))
