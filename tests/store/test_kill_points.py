"""Kill writers at 200 and more random file operations; each time readers see whole versions and a rerun ends the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.target import live_spaces, open_current
from tests.oracles import worlds
from tests.store.test_kill import DRIVER, JOIN, MATERIALIZE, PUBLISH, REPLACE, RETIRE

POINTS = 45
SEED = 20260101

INCREMENTAL = """
from dataclasses import replace
from loopfm_ray.store import offline
offline.code_version = manifest.code_version

def setup(root):
    worlds.write_latents(root / "latents", examples)

def program(root):
    writer = replace(worlds.make_writer(root / "latents"), inputs={"prepared": "q"})
    if writer.begin(worlds.SHARDS) is None:
        previous = writer.previous()
        for number, place in enumerate(worlds.SHARDS):
            if writer.completed(*place) is None:
                if number % 3:
                    writer.take_over(previous, [place])
                else:
                    worlds.write_shard(writer, examples, *place)
        writer.finish(worlds.SHARDS, watermark_ts=4000, replace_other=True)

main(setup, program)
"""

COMPACT = """
from loopfm_ray.store.compact import compact

def setup(root):
    worlds.update_latents(root / "latents", many)

def program(root):
    compact(root / "latents", target_rows=60)

many = worlds.make_examples(num_rows=200, num_periods=8)
main(setup, program)
"""

EXPIRE = """
from loopfm_ray.store.compact import compact, expire

def setup(root):
    worlds.update_latents(root / "latents", many)
    compact(root / "latents", target_rows=60)

def program(root):
    expire(root / "latents", 3 * worlds.PERIOD_US)

many = worlds.make_examples(num_rows=200, num_periods=8)
main(setup, program)
"""
JOIN_BLOCKS = (
    """
from dataclasses import replace
worlds.SETTINGS = replace(worlds.SETTINGS, block_rows=10)
"""
    + JOIN
)

JOIN_KEYED = (
    """
from dataclasses import replace
from loopfm_ray.history.join import StoredSide
worlds.SETTINGS = replace(
    worlds.SETTINGS, block_rows=10, keys=(("item",),), side=StoredSide(label="label")
)
"""
    + JOIN
)

PROGRAMS = {
    "materialize": (MATERIALIZE, "latents"),
    "replace": (REPLACE, "latents"),
    "join": (JOIN, "joined"),
    "incremental": (INCREMENTAL, "latents"),
    "publish": (PUBLISH, None),
    "retire": (RETIRE, None),
    "compact": (COMPACT, "latents"),
    "expire": (EXPIRE, "latents"),
    "join-blocks": (JOIN_BLOCKS, "joined"),
    "join-keyed": (JOIN_KEYED, "joined"),
}


def random_driver(seed):
    """Return the driver with random points instead of even ones."""
    start = DRIVER.index("    points = {")
    stop = DRIVER.index("    for stop_at in sorted(points)")
    line = (
        "    import random\n"
        f"    points = random.Random({seed}).sample(range(1, total + 1), min(total, {POINTS}))\n"
    )
    driver = DRIVER[:start] + line + DRIVER[stop:]
    return driver.replace('"shutil.rmtree"}', '"shutil.rmtree", "os.link", "os.truncate"}')


@pytest.fixture(scope="module")
def counts():
    """How many points were tried, by program."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
def test_killed_anywhere_readers_see_whole_versions_and_a_rerun_ends_the_same(
    kind, tmp_path, counts
):
    program, name = PROGRAMS[kind]
    base = tmp_path / "base"
    seed = SEED + list(PROGRAMS).index(kind)
    done = subprocess.run(
        [sys.executable, "-c", random_driver(seed) + program, str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    want = worlds.tree_bytes(base / "whole")
    allowed = {
        read_manifest(base / folder / name).version
        for folder in ("start", "whole")
        if name and (base / folder / name).exists()
    }
    for point in points:
        killed = base / f"{point}-killed"
        if name is None:
            live = [item.space for item in live_spaces(killed / "online")]
            assert len(live) == 2 or kind == "retire"
            for space in live:
                store = open_current(killed / "online", space)
                assert any(store.get_many(worlds.user_keys()))
                store.close()
        elif (killed / name).exists():
            verify(killed / name)
            assert read_manifest(killed / name).version in allowed
        assert worlds.tree_bytes(base / f"{point}-again") == want, (kind, point)
    counts[kind] = len(points)


@pytest.mark.slow
def test_at_least_two_hundred_points_were_tried(counts, request):
    if set(counts) != set(PROGRAMS):
        pytest.skip("runs with the rest of this file")
    report = request.config.getoption("--kill-report")
    if report:
        found = {"points": counts, "total": sum(counts.values()), "seed": SEED}
        Path(report).write_text(json.dumps(found, indent=1) + "\n")
    print(f"kill points: {counts}, {sum(counts.values())} in all, every rerun equal")  # noqa: T201
    assert sum(counts.values()) >= 200
