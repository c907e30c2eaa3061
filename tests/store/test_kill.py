"""Kill a writer at every file operation, run it again, and find the bytes of an undisturbed run."""

import subprocess
import sys
import textwrap

import pytest

from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.publish import open_current
from tests.oracles import worlds

KILLED = 77

# The hook dies before the n-th operation that changes files below the folder.
DRIVER = """
import os, sys
from pathlib import Path
from tests.oracles import worlds
import loopfm_ray.history.join, loopfm_ray.store.publish

root, stop_at = Path(sys.argv[1]), int(sys.argv[2])
count = 0
def hook(event, arguments):
    global count
    if event not in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}:
        return
    if not str(arguments[0]).startswith(str(root)):
        return
    count += 1
    if count == stop_at:
        os._exit(77)
examples = worlds.make_examples(num_rows=120)
"""

MATERIALIZE = """
sys.addaudithook(hook)
writer = worlds.make_writer(root / "latents")
if writer.finished() is None:
    worlds.write_latents(root / "latents", examples)
print(count)
"""

JOIN = """
if not (root / "prepared").exists():
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples)
sys.addaudithook(hook)
loopfm_ray.history.join.write_joined(
    root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, worlds.SETTINGS
)
print(count)
"""

PUBLISH = """
from loopfm_ray.store.publish import publish
if not (root / "one").exists():
    worlds.write_latents(root / "zero", examples, snapshot_id="zero")
    worlds.write_latents(root / "one", examples, snapshot_id="one")
    worlds.write_latents(root / "two", examples, snapshot_id="two")
    publish(root / "zero", worlds.user_keys(), root / "online")
    publish(root / "one", worlds.user_keys(), root / "online")
sys.addaudithook(hook)
publish(root / "two", worlds.user_keys(), root / "online")
print(count)
"""

REPLACE = """
if not (root / "latents").exists():
    worlds.write_latents(root / "latents", examples, snapshot_id="one")
sys.addaudithook(hook)
writer = worlds.make_writer(root / "latents", snapshot_id="two")
if writer.finished() is None:
    writer.begin()
    worlds.write_shard(writer, examples, 1, 0)
    writer.finish([(1, 0)], watermark_ts=0, replace_other=True)
print(count)
"""


def run(program, root, stop_at):
    """Return the exit code and output of the program, killed before operation `stop_at` (0: never)."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER + program), str(root), str(stop_at)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, KILLED), done.stderr
    return done.returncode, done.stdout


def kill_points(total, count):
    """Return `count` operations spread over all, with the first and last few, where the commit is."""
    spread = {1 + step * total // count for step in range(count)}
    return sorted(spread | set(range(max(total - 5, 1), total + 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name"), [(MATERIALIZE, "latents"), (JOIN, "joined"), (REPLACE, "latents")]
)
def test_killed_writer_shows_no_half_version_and_completes(tmp_path, program, name):
    code, output = run(program, tmp_path / "whole", 0)
    assert code == 0
    want = worlds.tree_bytes(tmp_path / "whole")
    for stop_at in kill_points(int(output), 8):
        root = tmp_path / f"at-{stop_at}"
        code, _ = run(program, root, stop_at)
        assert code == KILLED, stop_at
        if (root / name).exists():
            verify(root / name)
        assert run(program, root, 0)[0] == 0
        assert worlds.tree_bytes(root) == want, stop_at


@pytest.mark.slow
def test_killed_publish_leaves_the_old_version_live_and_completes(tmp_path):
    code, output = run(PUBLISH, tmp_path / "whole", 0)
    assert code == 0
    want = worlds.tree_bytes(tmp_path / "whole")
    old = read_manifest(tmp_path / "whole" / "one").version
    new = read_manifest(tmp_path / "whole" / "two").version
    seen = set()
    for stop_at in kill_points(int(output), 8):
        root = tmp_path / f"at-{stop_at}"
        assert run(PUBLISH, root, stop_at)[0] == KILLED
        store = open_current(root / "online")
        seen.add(store.version)
        assert store.version in (old, new)
        assert any(store.get_many(worlds.user_keys()))
        store.close()
        assert run(PUBLISH, root, 0)[0] == 0
        assert worlds.tree_bytes(root) == want, stop_at
        assert open_current(root / "online").version == new
    assert seen == {old, new}
