"""Faults of an S3 store at any request: readers see whole versions, and a repeated command ends the same."""

import threading

import pyarrow as pa
import pytest

from loopfm_ray.errors import StoreError
from loopfm_ray.store import remote
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.manifest import commit, read_manifest, stage, verify
from loopfm_ray.store.publish import publish
from loopfm_ray.store.s3 import S3Folder, connect
from loopfm_ray.store.tables import read_parquet, write_parquet
from loopfm_ray.store.target import open_current
from tests.oracles import worlds
from tests.store.faulty_s3 import AFTER, BEFORE, FAULTS, FaultyS3, no_faults, random_faults

pytestmark = pytest.mark.s3

MAX_RUNS = 60


@pytest.fixture
def faulty(s3, s3_server, monkeypatch):
    """A proxy that the clients of this process talk to, without waits between attempts."""
    proxy = FaultyS3(s3_server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    # each test is a long row of failures: the quota that stops such a client would hide the rest
    monkeypatch.setattr(
        "botocore.retries.standard.RetryQuotaChecker.acquire_retry_quota", lambda *_: True
    )
    monkeypatch.setattr("loopfm_ray.store.s3._wait", lambda _: None)
    connect.cache_clear()
    yield proxy
    proxy.close()


@pytest.fixture
def place(s3, tmp_path):
    return Remote(f"{s3}/version", str(tmp_path / "cache"))


def write_version(location, rows, files=4):
    with stage(location) as staged:
        for number in range(files):
            table = pa.table({"x": list(range(number, number + rows))})
            write_parquet(table, staged / "part" / f"{number}.parquet")
        return commit(
            staged,
            kind="run",
            config_hash="h",
            inputs={},
            meta={},
            num_rows=rows,
            replace_other=True,
        )


def until_done(command, max_runs=MAX_RUNS):
    """Repeat a command as a user would; return what it gave and how often it failed."""
    for failures in range(max_runs):
        try:
            return command(), failures
        except StoreError:
            continue
    pytest.fail(f"{max_runs} runs in a row failed")


def folders(location):
    return {name.split("/")[0] for name in S3Folder.of(str(location)).sizes() if "/" in name}


def check_whole(location, allowed, cache):
    """Read the version as another machine would: through a cache of its own."""
    version = open_version(Remote(str(location), str(cache)))
    assert version.manifest.version in allowed
    verify(version.fetch())


@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault_of_each_kind_is_overcome_without_a_second_run(faulty, place, kind):
    done = set()

    def once_a_request(method, path):
        key = method, path.split("?")[0]
        if key in done:
            return None
        done.add(key)
        return kind

    faulty.schedule = once_a_request
    manifest = write_version(place, 3)
    assert read_parquet(open_version(place).path("part/2.parquet")).column("x").to_pylist() == [
        2,
        3,
        4,
    ]
    assert faulty.met[kind] > 5
    faulty.schedule = no_faults
    assert read_manifest(place) == manifest
    assert folders(place) == {manifest.data}


@pytest.mark.parametrize("seed", range(6))
def test_commits_under_random_faults_show_whole_versions_and_leave_nothing(
    faulty, place, tmp_path, seed
):
    first = write_version(place, 3)
    share = (0.3, 0.6, 0.85)[seed % 3]
    num_failures = 0
    for turn, rows in enumerate((4, 5, 6)):
        before = read_manifest(place).version
        want = write_version(tmp_path / f"{rows}", rows).version
        faulty.schedule = random_faults(1000 * seed + turn, share)
        for _ in range(MAX_RUNS):
            try:
                found = write_version(place, rows)
            except StoreError:
                num_failures += 1
                schedule, faulty.schedule = faulty.schedule, no_faults
                check_whole(place, (before, want), tmp_path / "reader")
                faulty.schedule = schedule
            else:
                break
        else:
            pytest.fail("no run of many came through")
        faulty.schedule = no_faults
        assert found.version == want == read_manifest(place).version
        check_whole(place, (want,), tmp_path / "reader")
    # what failed runs left goes with the next commit
    last = write_version(place, 9)
    assert folders(place) == {last.data, last.previous_data}
    assert first.data not in folders(place)
    assert sum(faulty.met.values()) > 5
    assert share < 0.8 or num_failures > 0
    assert not list((tmp_path / "cache" / remote.STAGING).iterdir())


@pytest.mark.parametrize("seed", range(4))
def test_reading_through_the_cache_under_random_faults_gives_the_bytes(
    faulty, place, tmp_path, seed
):
    write_version(place, 500, files=12)
    write_version(tmp_path / "local", 500, files=12)
    kinds = (*FAULTS, "truncate", "truncate")
    faulty.schedule = random_faults(seed, (0.5, 0.8)[seed % 2], kinds)
    folder, _ = until_done(lambda: open_version(place).fetch())
    found, want = worlds.tree_bytes(folder), worlds.tree_bytes(tmp_path / "local")
    assert {n: d for n, d in found.items() if n.startswith("part")} == {
        n: d for n, d in want.items() if n.startswith("part")
    }
    assert not list(folder.rglob(".*.tmp-*"))
    assert faulty.met["truncate"] > 0


def writer_at(place, scratch, inputs="p"):
    return worlds.make_writer(place, inputs={"prepared": inputs}, scratch=scratch)


def materialize(writer, examples, reuse=()):
    if writer.begin(worlds.SHARDS) is not None:
        return None
    previous = writer.previous()
    for period, bucket in worlds.SHARDS:
        if writer.completed(period, bucket) is None:
            if previous is not None and (period, bucket) in reuse:
                writer.take_over(previous, [(period, bucket)])
            else:
                worlds.write_shard(writer, examples, period, bucket)
    return writer.finish(worlds.SHARDS, watermark_ts=4000, replace_other=True)


@pytest.mark.parametrize("seed", range(4))
def test_materialize_and_publish_under_random_faults_end_in_the_same_bytes(
    faulty, place, tmp_path, seed
):
    examples = worlds.make_examples(num_rows=120)
    local = worlds.write_latents(tmp_path / "latents", examples)
    faulty.schedule = random_faults(seed, (0.2, 0.5)[seed % 2])
    scratch = tmp_path / "scratch"
    until_done(lambda: materialize(writer_at(place, scratch), examples))
    # again over it, most shards taken over
    later = writer_at(place, scratch, inputs="q")
    until_done(lambda: materialize(later, examples, reuse=worlds.SHARDS[:6]))
    online = tmp_path / "online"
    version, _ = until_done(lambda: publish(place, worlds.user_keys(), online))
    faulty.schedule = no_faults
    manifest = read_manifest(place)
    assert manifest.files == local.files
    assert manifest.content == version
    verify(place)
    assert not list(scratch.iterdir())
    publish(tmp_path / "latents", worlds.user_keys(), tmp_path / "online-local")
    space = manifest.meta["space"]
    there, here = open_current(online, space), open_current(tmp_path / "online-local", space)
    for mine, other in zip(
        there.get_many(worlds.user_keys()), here.get_many(worlds.user_keys()), strict=True
    ):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.event_ts.tolist() == other.event_ts.tolist()
            assert mine.codes.tolist() == other.codes.tolist()
    there.close()
    here.close()


@pytest.mark.parametrize("seed", range(4))
def test_of_two_writers_under_faults_one_wins_and_the_other_is_told(faulty, place, seed):
    """Both begin from the same version; whatever is lost on the way, at most one of them replaces it."""
    write_version(place, 3)
    faulty.schedule = random_faults(seed, 0.15, (*BEFORE, *AFTER))
    barrier, results = threading.Barrier(2), {}

    def run(rows):
        try:
            with stage(place) as staged:
                write_parquet(pa.table({"x": [0] * rows}), staged / "a.parquet")
                barrier.wait(timeout=60)
                results[rows] = commit(
                    staged,
                    kind="run",
                    config_hash="h",
                    inputs={},
                    meta={},
                    num_rows=rows,
                    replace_other=True,
                ).version
        except StoreError as error:
            barrier.abort()
            results[rows] = error
        except threading.BrokenBarrierError:
            results[rows] = StoreError("another writer failed before it began")

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    faulty.schedule = no_faults
    won = {rows: text for rows, text in results.items() if isinstance(text, str)}
    assert set(results) == {5, 6}
    assert len(won) <= 1
    manifest = read_manifest(place)
    verify(place)
    if won:
        (rows,) = won
        assert manifest.version == won[rows]
        (loser,) = set(results) - set(won)
        assert "another writer" in str(results[loser]) or "object store" in str(results[loser])


def test_a_put_whose_answer_is_lost_is_no_lost_commit(faulty, place):
    """The manifest arrives, no answer does: neither at the first attempt nor at any other."""
    write_version(place, 3)

    def lose_manifest(method, path):
        return "reset_after" if method == "PUT" and path.endswith("manifest.json") else None

    faulty.schedule = lose_manifest
    with pytest.raises(StoreError, match="object store"):
        write_version(place, 5)
    faulty.schedule = no_faults
    assert read_manifest(place).num_rows == 5
    verify(place)
    again = write_version(place, 5)
    assert folders(place) == {again.data, again.previous_data}
