"""Latents of several snapshots in one version, put together of versions whose every number is known."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

import tests.serving.world as worlds
from loopfm_ray.analysis.alignment import Alignment, fit_alignment
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import make_splits
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import RefreshConfig
from loopfm_ray.jobs.refresh import SpliceTask, _Newer, check_refresh, splice_bucket
from loopfm_ray.store.codes import CodeSpec, decode, quantize
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S

HALF = CodeSpec(16, worlds.CODE.dim)
FIRST, SECOND = (worlds.FM_STOP + days * MICROS_PER_DAY for days in (11, 23))
KNOWN = np.random.default_rng(7).normal(0, 0.5, (10_000, HALF.dim))
"""What the world's snapshots say of each example."""
TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(HALF.dim, HALF.dim)))[0]


def turned(latents):
    return latents @ TURN


@pytest.fixture
def task(tmp_path):
    """Three snapshots: one for all, one from FIRST on whose space is turned, one from SECOND on that says minus the same."""
    prepare(worlds.write_log(tmp_path), tmp_path / "prepared")
    prepared = PreparedData.open(tmp_path / "prepared")
    worlds.write_latents(prepared, tmp_path / "base", "base")
    worlds.write_latents(
        prepared, tmp_path / "one", "one", trained_until_ts=FIRST - 1, spec=HALF, change=turned
    )
    worlds.write_latents(
        prepared,
        tmp_path / "two",
        "two",
        trained_until_ts=SECOND - 1,
        spec=HALF,
        change=np.negative,
    )
    align = fit_alignment("orthogonal", KNOWN @ TURN, KNOWN)
    same = Alignment("none", np.eye(HALF.dim), np.zeros(HALF.dim))
    newer = (_Newer(FIRST, tmp_path / "one", align), _Newer(SECOND, tmp_path / "two", same))
    writer = LatentsWriter(
        tmp_path / "out", "three", worlds.FM_STOP, worlds.CODE, 3600 * MICROS_PER_S, True, {}
    )
    return SpliceTask(tmp_path / "base", newer, writer, -1, ())


def splice(task, stop_after=None):
    reader = LatentsReader(task.base)
    places = sorted(reader.shards)
    task.writer.begin(places)
    replaced = 0
    for done, bucket in enumerate(reader.buckets):
        if done == stop_after:
            return None
        periods = tuple(period for period, other in places if other == bucket)
        replaced += splice_bucket(replace(task, bucket=bucket, periods=periods))
    return task.writer.finish(places, watermark_ts=worlds.STOP), replaced


def rows_of(location):
    reader = LatentsReader(location)
    tables = [reader.read_bucket(bucket) for bucket in reader.buckets]
    columns = {
        name: np.concatenate([table.column(name).to_numpy() for table in tables])
        for name in tables[0].column_names
        if name != "code"
    }
    codes = np.concatenate([code_bytes(table.column("code")) for table in tables])
    return columns, decode(codes, reader.spec)


def test_each_event_has_the_latent_of_the_newest_snapshot_trained_before_it(task):
    _, num_replaced = splice(task)
    found, latents = rows_of(task.writer.final_dir)
    base, _ = rows_of(task.base)
    for name, values in base.items():
        np.testing.assert_array_equal(found[name], values)
    times, known = found["event_ts"], KNOWN[found["example_id"]]
    assert num_replaced == np.count_nonzero(times >= FIRST)
    expected = np.where((times >= SECOND)[:, None], -known, known).astype(np.float32)
    step = np.asarray(worlds.CODE.scale) / 8
    inside = np.abs(expected) < np.asarray(worlds.CODE.scale) * 0.85
    # the first snapshot's codes everywhere; the turn is undone but for half floats
    assert (np.abs(latents - expected) <= step / 2 + 2e-3)[inside].all()
    old = times < FIRST
    exact = quantize(known[old], worlds.CODE) * step
    np.testing.assert_allclose(latents[old], exact, atol=1e-6)
    assert (
        min(old.mean(), (times >= SECOND).mean(), ((times >= FIRST) & (times < SECOND)).mean())
        > 0.1
    )


def test_a_killed_splice_goes_on_to_the_same_version(task, tmp_path):
    whole, _ = splice(task)
    elsewhere = replace(task, writer=replace(task.writer, final_dir=tmp_path / "again"))
    assert splice(elsewhere, stop_after=2) is None
    assert not (tmp_path / "again").exists()
    manifest, _ = splice(elsewhere)
    assert manifest.content == whole.content
    files = [{entry.path: entry.sha256 for entry in one.files} for one in (manifest, whole)]
    assert files[0] == files[1]


def splits():
    day = MICROS_PER_DAY
    return make_splits(
        (0, 100 * day), start_ts=None, fm_stop_ts=40 * day, vm_stop_ts=70 * day, test_stop_ts=None,
        valid_us=5 * day,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("days", "warm", "message"),
    [
        ((40,), True, "must lie between data.split.fm_stop"),
        ((60, 101), True, "must lie between"),
        ((44, 60), True, "432000 s of each"),
        ((60, 64), True, "nothing is left to learn from"),
        ((44, 60), False, None),
        ((50, 60, 90), True, None),
    ],
)
def test_a_refresh_lies_in_the_embedded_time_with_something_to_learn(days, warm, message):
    at = tuple(day * MICROS_PER_DAY for day in days)
    config = RefreshConfig(at=at, warm_start=warm)
    if message is None:
        check_refresh(config, splits())
        return
    with pytest.raises(ConfigError, match=message):
        check_refresh(config, splits())


def test_refreshes_rise():
    with pytest.raises(ValidationError, match=r"fm.refresh.at must rise, found \[5, 3\]"):
        RefreshConfig(at=(5, 3))
