"""Latents of several snapshots in one version, put together of versions whose every number is known."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

import tests.serving.world as worlds
from loopfm_ray.analysis.alignment import Alignment, fit_alignment
from loopfm_ray.data.examples import ExampleSet, read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import make_splits
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import RefreshConfig
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs.refresh import SpliceTask, _Newer, plan_generations, splice_bucket
from loopfm_ray.store.codes import CodeSpec, decode, quantize
from loopfm_ray.store.compact import compact
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.store.teachers import Teacher, teachers_of
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S, TimeRange

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


DAY = MICROS_PER_DAY


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # split: the FM learns until day 35, is validated until 40; the test window ends after day 100
        ({"at": (44 * DAY, 60 * DAY)}, [(44, 35, 39), (60, 39, 55)]),
        ({"at": (44 * DAY, 60 * DAY), "warm_start": False}, [(44, 0, 39), (60, 0, 55)]),
        ({"at": (60 * DAY,), "delay_s": 3 * 86_400, "valid_s": 86_400}, [(60, 35, 56)]),
        ({"every_s": 25 * 86_400, "valid_s": 86_400}, [(65, 35, 64), (90, 64, 89)]),
    ],
)
def test_a_snapshot_learns_from_what_the_one_before_has_not(config, expected):
    planned = plan_generations(RefreshConfig(**config), splits())
    found = [
        (from_ts // DAY, windows.fm_train.start_ts // DAY, windows.fm_train.stop_ts // DAY)
        for from_ts, windows in planned
    ]
    assert found == expected
    delay_us = config.get("delay_s", 0) * MICROS_PER_S
    for from_ts, windows in planned:
        assert windows.fm_valid.start_ts == windows.fm_train.stop_ts
        assert windows.fm_valid.stop_ts == windows.fm.stop_ts == from_ts - delay_us


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"at": (40 * DAY,)}, r"must lie between data\.split\.fm_stop"),
        ({"at": (60 * DAY, 101 * DAY)}, "must lie between"),
        ({"every_s": 61 * 86_400}, "must lie between"),
        ({"at": (44 * DAY,), "delay_s": 4 * 86_400}, "nothing to learn from: it may learn until"),
        ({"at": (60 * DAY,), "valid_s": 30 * 86_400}, r"2592000 s are for validation"),
    ],
)
def test_a_refresh_lies_in_the_embedded_time_with_something_to_learn(config, message):
    with pytest.raises(ConfigError, match=message):
        plan_generations(RefreshConfig(**config), splits())


def test_refreshes_rise_and_come_from_one_setting():
    with pytest.raises(ValidationError, match=r"fm.refresh.at must rise, found \[5, 3\]"):
        RefreshConfig(at=(5, 3))
    with pytest.raises(ValidationError, match="either at or every_s"):
        RefreshConfig(at=(5,), every_s=3)
    with pytest.raises(ValidationError, match="either at or every_s"):
        RefreshConfig()


@pytest.fixture
def scored(tmp_path):
    """Three snapshots, each with the rows of its own time alone."""
    prepare(worlds.write_log(tmp_path), tmp_path / "prepared")
    prepared = PreparedData.open(tmp_path / "prepared")
    spans = {"base": (worlds.FM_STOP, FIRST), "one": (FIRST, SECOND), "two": (SECOND, worlds.STOP)}
    for name, (start_ts, stop_ts) in spans.items():
        worlds.write_latents(
            prepared, tmp_path / name, name, stop_ts, start_ts - 1, HALF if name != "base" else worlds.CODE
        )  # fmt: skip
    same = Alignment("none", np.eye(worlds.CODE.dim), np.zeros(worlds.CODE.dim))
    newer = tuple(_Newer(spans[name][0], tmp_path / name, same) for name in ("one", "two"))
    teachers = tuple(Teacher(name, start - 1, start) for name, (start, _) in spans.items())
    writer = LatentsWriter(
        tmp_path / "out", "three", worlds.FM_STOP, worlds.CODE, 3600 * MICROS_PER_S, True, {},
        teachers=teachers,
    )  # fmt: skip
    return SpliceTask(tmp_path / "base", newer, writer, -1, (), "newest")


def test_each_example_is_scored_once_by_the_snapshot_of_its_time(scored, tmp_path):
    folders = [tmp_path / name for name in ("base", "one", "two")]
    places = sorted({place for folder in folders for place in LatentsReader(folder).shards})
    scored.writer.begin(places)
    for bucket in sorted({bucket for _, bucket in places}):
        periods = tuple(period for period, other in places if other == bucket)
        splice_bucket(replace(scored, bucket=bucket, periods=periods))
    manifest = scored.writer.finish(places, watermark_ts=worlds.STOP)
    found, latents = rows_of(scored.writer.final_dir)
    prepared = PreparedData.open(tmp_path / "prepared")
    rows = read_rows(prepared.examples.files())
    later = rows["example_id"][rows["event_ts"] >= worlds.FM_STOP]
    assert sorted(found["example_id"].tolist()) == sorted(later.tolist())
    counts = [read_manifest(folder).num_rows for folder in folders]
    assert sum(counts) == manifest.num_rows == len(later)
    assert min(counts) > 100
    step = np.asarray(worlds.CODE.scale) / 8
    inside = np.abs(KNOWN[found["example_id"]]) < np.asarray(worlds.CODE.scale) * 0.85
    gap = np.abs(latents - KNOWN[found["example_id"]])
    assert (gap <= step / 2 + 2e-3)[inside].all()

    compact(scored.writer.final_dir)  # which keeps who scored what
    settings = JoinSettings(worlds.MAX_LEN)
    where = (tmp_path / "prepared", scored.writer.final_dir, tmp_path / "joined")
    span = TimeRange(worlds.FM_STOP + 1, worlds.STOP)
    joined = write_joined(*where, span, settings)
    assert [one["snapshot_id"] for one in joined.meta["teachers"]] == ["base", "one", "two"]
    requests = read_rows(ExampleSet.open(tmp_path / "joined", "requests").files())
    times = requests["event_ts"]
    expected = (times >= FIRST).astype(int) + (times >= SECOND)
    assert requests["teacher_snapshot"].tolist() == expected.tolist()
    assert (requests["score_ts"] == times + 3600 * MICROS_PER_S).all()
    assert joined.meta["num_late_scores"] == (requests["score_ts"] > requests["label_ts"]).sum() > 0
    report = audit(tmp_path / "joined", scored.writer.final_dir, tmp_path / "prepared", None)
    report.raise_if_leaking()


def test_teachers_that_saw_what_they_scored_are_refused():
    meta = {"snapshot_id": "a", "trained_until_ts": 9}
    assert teachers_of(meta) == (Teacher("a", 9, 10),)
    for wrong in ([("a", 10, 10)], [("a", 1, 10), ("b", 2, 5)], []):
        told = [dict(zip(("snapshot_id", "trained_until_ts", "from_ts"), one, strict=True)) for one in wrong]  # fmt: skip
        with pytest.raises(StoreError, match="scored what they had seen, or in no order"):
            teachers_of({**meta, "teachers": told})
    with pytest.raises(StoreError, match="does not tell who scored"):
        teachers_of({**meta, "teachers": [{"snapshot_id": "a"}]})
