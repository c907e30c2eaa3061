"""Kill a writer at file operations all along its way, run it again, and find the bytes of an undisturbed run."""

import json
import subprocess
import sys

import pytest

from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.target import live_spaces, open_current
from tests.oracles import worlds

# Runs `program(root)` in forks of one process that has imported all it needs: once undisturbed, to count the operations
# that change files below the folder, then, for points spread over them and for the last few, where the commit is, in
# folders of their own: once dying before that operation, then again to the end. Prints the points.
DRIVER = """
import json, os, shutil, sys
from pathlib import Path
from tests.oracles import worlds
from loopfm_ray.history.join import write_joined
from loopfm_ray.store import manifest
from loopfm_ray.store.publish import publish

base = Path(sys.argv[1])
manifest.code_version = lambda: "test"
# what a process wrote outlives it without a flush, and flushing takes nine tenths of the time, more on a busy disk
os.fsync = lambda handle: None
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def fork(function, root, stop_at):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (77 if stop_at else 0), (root, stop_at, code)
        return
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and str(arguments[0]).startswith(str(root)):
            count += 1
            if count == stop_at:
                os._exit(77)

    status = 1
    try:
        sys.addaudithook(hook)
        function(root)
        (base / "count").write_text(str(count))
        status = 0
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
    points = {1 + step * total // 12 for step in range(12)} | set(range(max(total - 9, 1), total + 1))
    for stop_at in sorted(points):
        shutil.copytree(base / "start", base / f"{stop_at}-killed")
        fork(program, base / f"{stop_at}-killed", stop_at)
        shutil.copytree(base / f"{stop_at}-killed", base / f"{stop_at}-again")
        fork(program, base / f"{stop_at}-again", 0)
    print(json.dumps(sorted(points)))


examples = worlds.make_examples(num_rows=120)


def nothing(root):
    pass
"""

MATERIALIZE = """
def program(root):
    worlds.write_latents(root / "latents", examples)

main(nothing, program)
"""

REPLACE = """
def setup(root):
    worlds.write_latents(root / "latents", examples, snapshot_id="one")

def program(root):
    writer = worlds.make_writer(root / "latents", snapshot_id="two")
    if writer.begin([(1, 0)]) is None:
        worlds.write_shard(writer, examples, 1, 0)
        writer.finish([(1, 0)], watermark_ts=0, replace_other=True)

main(setup, program)
"""

JOIN = """
def setup(root):
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples)

def program(root):
    write_joined(root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, worlds.SETTINGS)

main(setup, program)
"""

# versions of one space, beside another space
PUBLISH = """
def setup(root):
    for part, name in enumerate(("zero", "one", "two"), 2):
        known = {column: values[examples["event_ts"] < part * 1000] for column, values in examples.items()}
        worlds.write_latents(root / name, known)
    worlds.write_latents(root / "other", examples, snapshot_id="other")
    for name in ("zero", "one", "other"):
        publish(root / name, worlds.user_keys(), root / "online")

def program(root):
    publish(root / "two", worlds.user_keys(), root / "online")

main(setup, program)
"""

RETIRE = (
    PUBLISH[: PUBLISH.index("def program")]
    + """
from loopfm_ray.errors import StoreError
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.target import live_spaces, retire

def program(root):
    space = read_manifest(root / "one").meta["space"]
    try:
        retire(root / "online", space)
    except StoreError as error:  # killed after the end
        assert "holds no space" in str(error)

main(setup, program)
"""
)


def kill_all_along(base, program, at_least=11):
    """Return the bytes that an undisturbed run leaves, and the points where other runs were killed."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + program, str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    assert len(points) >= at_least
    return worlds.tree_bytes(base / "whole"), points


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name"),
    [
        pytest.param(MATERIALIZE, "latents", id="materialize"),
        pytest.param(REPLACE, "latents", id="replace"),
        pytest.param(JOIN, "joined", id="join"),
    ],
)
def test_killed_writer_shows_no_half_version_and_completes(tmp_path, program, name):
    base = tmp_path / "base"
    want, points = kill_all_along(base, program)
    for point in points:
        killed = base / f"{point}-killed" / name
        if killed.exists():
            verify(killed)
        assert worlds.tree_bytes(base / f"{point}-again") == want, point


@pytest.mark.slow
def test_killed_publish_leaves_the_old_version_live_and_completes(tmp_path):
    base = tmp_path / "base"
    want, points = kill_all_along(base, PUBLISH)
    old, new = (read_manifest(base / "whole" / name).content for name in ("one", "two"))
    space, other = space_and_other(base / "whole")
    seen = []
    for point in points:
        store = open_current(base / f"{point}-killed" / "online", space)
        assert any(store.get_many(worlds.user_keys()))
        seen.append(store.version)
        assert any(
            open_current(base / f"{point}-killed" / "online", other).get_many(worlds.user_keys())
        )
        assert open_current(base / f"{point}-again" / "online", space).version == new
        assert worlds.tree_bytes(base / f"{point}-again") == want, point
    # the switch happens once, near the end
    assert seen == [old] * seen.count(old) + [new] * seen.count(new)
    assert set(seen) == {old, new}


@pytest.mark.slow
def test_killed_retire_leaves_a_whole_space_or_none_and_completes(tmp_path):
    base = tmp_path / "base"
    want, points = kill_all_along(base, RETIRE, at_least=5)
    space, other = space_and_other(base / "whole")
    seen = []
    for point in points:
        target = base / f"{point}-killed" / "online"
        live = [item.space for item in live_spaces(target)]
        assert other in live
        seen.append(space in live)
        if space in live:
            assert any(open_current(target, space).get_many(worlds.user_keys()))
        assert worlds.tree_bytes(base / f"{point}-again") == want, point
    assert seen == [True] * seen.count(True) + [False] * seen.count(False)
    assert set(seen) == {True, False}


def space_and_other(root):
    return [read_manifest(root / name).meta["space"] for name in ("one", "other")]
