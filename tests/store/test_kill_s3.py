"""Kill a writer right before and right after random S3 requests: readers see whole versions, a rerun ends the same.

Counted are the requests that go out on the wire, those that a client repeats included. "Before" dies with the request not
sent, "after" with the request done and its answer not looked at.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.manifest import MANIFEST, find_manifest, read_manifest, verify
from loopfm_ray.store.s3 import S3Folder
from tests.store.test_s3_faults import write_version

pytestmark = [pytest.mark.s3, pytest.mark.slow]

POINTS = 18
SEED = 20260301
NUM_EXPECTED = 60

# Forks of one process that has imported all it needs run `program(place, folder)`: once undisturbed to count the requests,
# then, at an address and with a folder for each point, once dying there and once more to the end.
DRIVER = """
import json, os, random, sys
from pathlib import Path
from botocore.httpsession import URLLib3Session
from loopfm_ray.store import manifest, offline
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.format import find_manifest
from tests.oracles import worlds
from tests.store.test_s3_faults import materialize, write_version, writer_at

base, prefix, seed, num_points = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
manifest.code_version = offline.code_version = lambda: "test"
examples = worlds.make_examples(num_rows=120)


def place(name, machine):
    return Remote(f"{prefix}/{name}", str(base / machine / "cache"))


def fork(function, name, machine, stop_at=None):
    (base / machine).mkdir(exist_ok=True)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (77 if stop_at else 0), (name, stop_at, code)
        return
    import threading
    count, lock, send = 0, threading.Lock(), URLLib3Session.send

    def counting(self, request):
        nonlocal count
        with lock:
            count += 1
            number = count
        if stop_at == (number, "before"):
            os._exit(77)
        answer = send(self, request)
        if stop_at == (number, "after"):
            os._exit(77)
        return answer

    status = 1
    try:
        URLLib3Session.send = counting
        function(place(name, machine), base / machine)
        (base / "count").write_text(str(count))
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def main(setup, program):
    base.mkdir()
    fork(setup, "whole", "setup")
    fork(program, "whole", "machine")
    total = int((base / "count").read_text())
    every = [(number, when) for number in range(1, total + 1) for when in ("before", "after")]
    points = random.Random(seed).sample(every, min(num_points, len(every)))
    for number, when in sorted(points):
        name = f"{number}-{when}"
        fork(setup, name, f"{name}-setup")
        fork(note_version, name, name)
        fork(program, name, name, (number, when))
        print(json.dumps({"name": name, "before": (base / "before").read_text()}), flush=True)
        # the test looks at what lies there, then lets us go on
        assert sys.stdin.readline()
        fork(program, name, name)
        print("again", flush=True)
        assert sys.stdin.readline()
    print("done", flush=True)


def note_version(place, folder):
    found = find_manifest(place)
    (base / "before").write_text("" if found is None else found.version)


def nothing(place, folder):
    pass
"""

COMMIT = """
def program(place, folder):
    write_version(place, 5)

main(nothing, program)
"""

REPLACE = """
def setup(place, folder):
    write_version(place, 3)
    write_version(place, 4)

def program(place, folder):
    write_version(place, 5)

main(setup, program)
"""

MATERIALIZE = """
def program(place, folder):
    materialize(writer_at(place, folder / "scratch"), examples)

main(nothing, program)
"""

INCREMENTAL = """
def setup(place, folder):
    materialize(writer_at(place, folder / "scratch"), examples)

def program(place, folder):
    materialize(writer_at(place, folder / "scratch", inputs="q"), examples, reuse=worlds.SHARDS[:6])

main(setup, program)
"""

FETCH = """
def setup(place, folder):
    write_version(place, 400, files=8)

def program(place, folder):
    manifest.verify(open_version(place).fetch())

main(setup, program)
"""

PROGRAMS = {
    "commit": COMMIT,
    "replace": REPLACE,
    "materialize": MATERIALIZE,
    "incremental": INCREMENTAL,
    "fetch": FETCH,
}


@pytest.fixture(scope="module")
def counts():
    """How many points were tried, by program."""
    return {}


def folders(address):
    return {name.split("/")[0] for name in S3Folder.of(address).sizes() if "/" in name}


def check_cache(cache, manifest):
    """Make sure that no half file of the version has its final name."""
    for entry in manifest.files:
        path = cache / manifest.version / entry.path
        assert not path.exists() or path.stat().st_size == entry.num_bytes


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_killed_at_any_request_whole_versions_are_seen_and_a_rerun_ends_the_same(
    kind, s3, tmp_path, counts
):
    base = tmp_path / "base"
    seed = SEED + list(PROGRAMS).index(kind)
    command = [sys.executable, "-c", DRIVER + PROGRAMS[kind]]
    driver = subprocess.Popen(
        [*command, str(base), s3, str(seed), str(POINTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    num_points = 0
    with driver:
        for line in driver.stdout:
            if line.strip() == "done":
                break
            point = json.loads(line)
            address = f"{s3}/{point['name']}"
            want = read_manifest(f"{s3}/whole")
            found = find_manifest(address)
            version = "" if found is None else found.version
            assert version in (point["before"], want.version), point
            if found is not None:
                verify(address)
                check_cache(base / point["name"] / "cache", found)
            go_on(driver)
            assert driver.stdout.readline().strip() == "again"
            check_end(address, want, base / point["name"], kind)
            num_points += 1
            go_on(driver)
    assert driver.returncode == 0
    counts[kind] = num_points


def go_on(driver):
    driver.stdin.write("go\n")
    driver.stdin.flush()


def check_end(address, want, machine, kind):
    """What the rerun left is what an undisturbed run leaves, and nothing else."""
    found = read_manifest(address)
    assert found.version == want.version
    assert found.files == want.files
    verify(address)
    if kind == "fetch":
        check_cache(machine / "cache", found)
        verify(machine / "cache" / found.version)
        return
    assert not list((machine / "cache" / "staging").glob("*"))
    assert not list((machine / "scratch").glob(".*"))
    # the next commit of the name takes away what the killed one left
    last = write_version(Remote(address, str(machine / "cache")), 77)
    assert folders(address) <= {last.data, last.previous_data}
    assert MANIFEST in S3Folder.of(address).sizes()


def test_the_points_are_counted(counts, request):
    if set(counts) != set(PROGRAMS):
        pytest.skip("runs with the rest of this file")
    total = sum(counts.values())
    print(f"kill points at S3 requests: {counts}, {total} in all, every rerun equal")  # noqa: T201
    report = request.config.getoption("--kill-report", default=None)
    if report:
        path = Path(report)
        known = json.loads(path.read_text()) if path.exists() else {}
        known["s3"] = {"points": counts, "total": total}
        path.write_text(json.dumps(known, indent=1))
    assert total >= NUM_EXPECTED
