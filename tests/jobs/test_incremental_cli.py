"""A log that grows, through the command line: what is made again, what is taken over, and what is told of it."""

import json
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from loopfm_ray import cli
from loopfm_ray.config import dump_yaml
from loopfm_ray.data.prepare import serial
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import HistoryStageConfig, PipelineConfig
from loopfm_ray.jobs import materialize as job
from loopfm_ray.jobs import pipeline, stages
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.fitting import calibrate
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.publish import publish
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, save_snapshot
from loopfm_ray.types import MICROS_PER_DAY
from tests.oracles.worlds import tree_bytes
from tests.serial import embed_here
from tests.serving import world

FM = FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5))
NAMES = ("item", "category")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Run all tasks in this process."""
    monkeypatch.setattr(job, "_run", embed_here)
    monkeypatch.setattr(pipeline, "connect", lambda config: nullcontext())
    monkeypatch.setattr(stages.Context, "mapper", lambda self, stage, **more: serial)


class Run:
    """One run folder and the log it reads."""

    def __init__(self, folder):
        self.folder = folder
        self.data = world.write_log(folder, num_rows=1200)
        self.log = pq.read_table(folder / "log.parquet")
        self.ts = self.log.column("ts").to_numpy()
        self.save_config()

    def save_config(self, **more):
        config = PipelineConfig(name="r", run_dir=str(self.folder), data=self.data, **more)
        self.paths = config.paths
        self.latents = config.paths.latents(0)
        (self.folder / "c.yaml").write_text(dump_yaml(config))

    def write(self, rows):
        pq.write_table(self.log.filter(rows), self.folder / "log.parquet")

    def call(self, verb, *options, code=0):
        result = CliRunner().invoke(
            cli.app, [verb, str(self.folder / "c.yaml"), "--json", *options]
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        start = result.stdout.index("{")
        return json.loads(result.stdout[start:])

    def embed(self, *options):
        return self.call("materialize", *options)["seed=0"]

    def save_snapshot(self):
        schema = PreparedData.open(self.paths.prepared).schema_as_of(world.FM_STOP)
        torch.manual_seed(0)
        fm = build_fm(FM, schema, NAMES)
        shape = BottleneckConfig(latent_dim=4, prefixes=(2, 4))
        bottleneck = build_bottleneck(shape, fm.embedding_dim(["hidden_0"]))
        code = calibrate(bottleneck, torch.randn(50, fm.embedding_dim(["hidden_0"])), 4)
        until_ts = world.FM_STOP - 1
        spec = SnapshotSpec(until_ts, schema, NAMES, 5, FM, shape, ("hidden_0",), code)
        save_snapshot(
            Snapshot(fm.eval(), bottleneck.eval(), spec), self.paths.snapshot(0), inputs={}
        )


def day(number):
    return world.START + number * MICROS_PER_DAY


@pytest.fixture
def run(tmp_path):
    """A run whose log has its first 50 days, one moment of day 44 left out; embedded up to there."""
    run = Run(tmp_path)
    moment = run.ts[(run.ts > day(44)) & (run.log.column("label").to_numpy() > 0)][0]
    run.late = run.ts == moment
    run.write((run.ts < day(50)) & ~run.late)
    run.call("prepare")
    run.save_snapshot()
    run.first = run.embed()
    return run


def test_late_and_new_events_are_counted_and_the_result_is_that_of_a_fresh_run(run):
    assert run.first["reused"] == run.first["late_events"] == 0
    assert run.embed() == run.first
    run.write(run.ts < day(58))
    run.call("prepare")
    step = run.embed()
    assert min(step["reused"], step["redone"]) > 0
    labels = run.log.column("label").to_numpy()
    assert step["late_events"] == np.count_nonzero(run.late & (labels > 0)) > 0
    before = tree_bytes(run.latents)
    fresh = run.embed("--fresh")
    assert fresh["version"] == step["version"]
    assert (fresh["reused"], fresh["redone"]) == (0, step["reused"] + step["redone"])
    assert tree_bytes(run.latents) == before
    verify(run.latents)
    run.call("join")
    assert run.call("audit", "--all")["num_leaks"] == 0


def test_a_log_that_did_not_change_is_not_read_again(run, monkeypatch):
    monkeypatch.setattr(stages, "prepare", lambda *args, **more: pytest.fail("read again"))
    run.call("prepare")


def test_a_range_is_made_again_though_nothing_changed(run):
    before = tree_bytes(run.latents)
    again = run.embed("--from", "2024-02-12", "--to", str(day(49)))
    periods = {path.parent.name for path in run.latents.glob("period=*/*.parquet")}
    assert again["version"] == run.first["version"]
    assert again["reused"] > 0
    assert again["redone"] == len(list(run.latents.glob("period=0006/*.parquet"))) > 0
    assert len(periods) > 2
    assert tree_bytes(run.latents) == before


def test_a_range_mends_a_damaged_shard(run):
    before = tree_bytes(run.latents)
    path = next(run.latents.glob("period=0006/*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError):
        verify(run.latents)
    run.embed("--from", "2024-02-12", "--to", "2024-02-13T12:00")
    verify(run.latents)
    assert tree_bytes(run.latents) == before


def test_a_change_outside_of_the_range_is_refused_and_the_version_stays(run):
    run.write(run.ts < day(50))
    run.call("prepare")
    with pytest.raises(StoreError, match="widen the range"):
        run.embed("--from", "2024-02-19", "--to", "2024-02-20")
    assert read_manifest(run.latents).version == run.first["version"]
    verify(run.latents)


def test_a_range_without_anything_to_embed_is_a_mistake_in_the_command(run):
    with pytest.raises(ConfigError, match="holds no period that is embedded"):
        run.embed("--from", "2023-01-01", "--to", "2023-01-08")
    assert read_manifest(run.latents).version == run.first["version"]


def test_a_fresh_run_that_is_killed_leaves_the_old_version_and_goes_on(run, monkeypatch):
    written = []
    honest = LatentsWriter.write

    def die(self, *args, **more):
        if len(written) == 3:
            raise RuntimeError("killed")
        written.append(args[:2])
        return honest(self, *args, **more)

    monkeypatch.setattr(LatentsWriter, "write", die)
    with pytest.raises(RuntimeError, match="killed"):
        run.embed("--fresh")
    verify(run.latents)
    assert read_manifest(run.latents).version == run.first["version"]
    monkeypatch.setattr(
        LatentsWriter, "write", lambda self, *a, **m: written.append(a[:2]) or honest(self, *a, **m)
    )
    done = run.embed("--fresh")
    assert (done["reused"], done["redone"]) == (0, run.first["redone"])
    assert len(written) == len(set(written)) == run.first["redone"]
    assert not list(run.latents.parent.glob(".latents.*"))


def test_expired_periods_leave_and_the_audit_knows(run):
    run.save_config(history=HistoryStageConfig(keep_s=25 * 86_400.0, max_len=5))
    kept = run.embed()
    assert (kept["redone"], kept["reused"] < run.first["redone"]) == (0, True)
    meta = read_manifest(run.latents).meta
    assert day(20) < meta["kept_from_ts"] <= day(50) - 25 * MICROS_PER_DAY
    with pytest.raises(StoreError, match=r"history\.keep_s"):
        run.call("join")


def test_latents_kept_shorter_than_histories_reach_are_refused():
    with pytest.raises(ValueError, match="retention_s"):
        HistoryStageConfig(keep_s=10.0, retention_s=11.0)
    assert HistoryStageConfig(keep_s=10.0, retention_s=10.0).keep_us == 10_000_000


def test_freshness_prints_and_exits_with_1_on_an_alarm(run):
    joined = run.call("join")["seed=0"]
    good = run.call("freshness", "--now", "2024-03-01")
    assert good["alarms"] == joined["alarms"] == []
    assert good["published"] is None
    assert good["coverage_by_age"] == joined["coverage_by_age"]
    config = yaml.safe_load((run.folder / "c.yaml").read_text())
    config["freshness"] = {"min_coverage": 1.0, "max_published_age_s": 60.0}
    (run.folder / "c.yaml").write_text(yaml.safe_dump(config))
    bad = run.call("freshness", code=1)
    assert ["coverage is" in bad["alarms"][0], "nothing is published" in bad["alarms"][1]] == [
        True
    ] * 2
    assert len(run.call("join")["seed=0"]["alarms"]) == 1


def test_what_is_published_ages_with_the_clock(run):
    run.call("join")
    users = PreparedData.open(run.paths.prepared).users.keys
    publish(str(run.latents), users, run.paths.online)
    watermark_ts = read_manifest(run.latents).meta["watermark_ts"]
    limit = ("--set", "freshness.max_published_age_s=3600")
    now = str(watermark_ts + 3_600_000_000)
    found = run.call("freshness", "--now", now, *limit)
    assert found["published"]["age_s"] == 3600.0
    assert found["published"]["version"] == run.first["content"]
    late = run.call("freshness", "--now", str(int(now) + 1_000_000), *limit, code=1)
    assert "ago" in late["alarms"][0]
