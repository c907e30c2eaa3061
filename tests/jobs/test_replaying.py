"""A run's parity log on the command line, and the reference that publishing puts into its bundle."""

import json
import shutil

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from loopfm_ray.cli import app
from loopfm_ray.config import dump_yaml
from loopfm_ray.data.examples import ExampleSet, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, ConfigError, JobError, StoreError
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs.context import Context, splits_of
from loopfm_ray.jobs.publishing import export_bundle, run_publish
from loopfm_ray.jobs.replaying import replay_requests
from loopfm_ray.metrics.binary import normalized_entropy
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.logs import ParityLog, ParityLogConfig
from loopfm_ray.serving.parity import load_offline
from loopfm_ray.serving.predictor import load_predictor
from loopfm_ray.serving.rollout import Rollouts, Served, promote
from loopfm_ray.serving.service import Service
from loopfm_ray.serving.watch import Watch
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.space import Space
from loopfm_ray.train.trained import TrainedVm, save_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.jobs.test_upgrade import pipeline
from tests.serving import world as worlds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything in its place, but for what trains."""
    folder = tmp_path_factory.mktemp("run")
    config = pipeline(folder, "run")
    config.paths.root.mkdir()
    worlds.make_world(config.paths.root)
    (config.paths.root / "latents").rename(_made(config.paths.latents(0)))
    (config.paths.root / "joined").rename(_made(config.paths.joined(0)))
    config.paths.config.write_text(dump_yaml(config))
    return config


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def serve(config, folder, change=None):
    predictor = load_predictor(config.paths.bundle, config.online_target)
    if change is not None:
        change(predictor.bundle.model)
    watch = Watch(parity_log=ParityLog(ParityLogConfig(path=str(folder), sample=1.0)))
    service = Service(lambda _: predictor, watch=watch)
    service.apply(promote(Rollouts(), "vm", Served(bundle="b")))
    client = TestClient(create_api(service, watch=watch))
    for n in range(30):
        body = {
            "user": f"u{n}",
            "items": ["i1", f"i{n}"],
            "request_ts": worlds.STOP - n * MICROS_PER_DAY // 10,
            "context": {"past_count_item": [0.0, 2.0], "past_recency_item": 0.5},
        }
        assert client.post("/v1/models/vm:score", json=body).status_code == 200
    service.close()
    watch.close()
    return folder


def test_the_log_of_a_run_is_replayed_on_the_command_line(run, tmp_path):
    log = serve(run, tmp_path / "log")
    result = CliRunner().invoke(
        app, ["parity", str(run.paths.config), "--requests", str(log), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["num_requests"], found["num_rows"], found["num_mismatches"]) == (30, 60, 0)
    assert found["histories"] == {"offline": 30}
    assert found["max_abs_diff"] < 1e-6


def test_scores_that_differ_fail_beyond_the_threshold(run, tmp_path):
    def change(model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.05)

    log = serve(run, tmp_path / "log", change)
    with pytest.raises(JobError, match=r"of 60 logged scores .* allowed 0\.00%") as caught:
        replay_requests(run, log)
    assert "'history': 0.0" in str(caught.value)
    found = replay_requests(run, log, threshold=1.0)
    assert found["share"] > 0.3
    result = CliRunner().invoke(app, ["parity", str(run.paths.config), "--requests", str(log)])
    assert isinstance(result.exception, JobError)
    result = CliRunner().invoke(app, ["parity", str(run.paths.config), "--threshold", "0.1"])
    assert isinstance(result.exception, ConfigError)


def test_a_log_of_which_nothing_can_be_replayed_is_no_success(run, tmp_path):
    (tmp_path / "parity-0.jsonl").write_text("")
    with pytest.raises(JobError, match=r"no request .* it is empty"):
        replay_requests(run, tmp_path)
    with pytest.raises(StoreError, match="holds no parity"):
        replay_requests(run, _made(tmp_path / "empty" / "log").parent)


def test_publishing_measures_the_reference_on_the_validation_window(run):
    bundle = load_bundle(run.paths.bundle)
    assert bundle.reference is None
    window = splits_of(run).vm_valid
    settings = JoinSettings(worlds.MAX_LEN, bundle.spec.history.retention_us)
    shutil.rmtree(run.paths.joined(0))  # it begins after the window
    write_joined(
        run.paths.prepared, run.paths.latents(0), run.paths.joined(0),
        TimeRange(window.start_ts - MICROS_PER_DAY, worlds.STOP), settings,
    )  # fmt: skip
    trained = TrainedVm(
        bundle.model, bundle.spec.vm, bundle.spec.schema, (), worlds.CODE.dim, PlattScaling(1.2, -0.3), {},
    )  # fmt: skip
    inputs = {
        "prepared": read_manifest(run.paths.prepared).version,
        "joined": "j",
        "latents": bundle.spec.history.latents_version,
        "space": bundle.spec.history.space.id,
    }
    path = run.paths.vm(0, run.online.model)
    save_trained_vm(path, trained, config_hash="0", inputs=inputs, num_rows=1)
    first, int8_loss = export_bundle(run, bundle.spec.history.space)
    assert int8_loss is None
    reference = load_bundle(run.paths.bundle).reference
    assert (reference.start_ts, reference.stop_ts) == (window.start_ts, window.stop_ts)
    examples = ExampleSet.open(run.paths.joined(0), "requests")
    assert reference.num_rows == examples.num_rows(window) > 50
    lengths = read_rows(examples.files(window), window, columns=["latent_len"])["latent_len"]
    assert reference.coverage == (lengths > 0).mean()
    assert reference.history_len.counts[-1] == (lengths >= 9).sum() > 50
    # the same bytes again
    assert export_bundle(run, bundle.spec.history.space)[0].version == first.version


def test_8_bit_weights_that_cost_too_much_are_not_published(run):
    """Goes on from the test before, which trained the VM."""
    pytest.importorskip("onnxscript")
    before, space = (
        load_bundle(run.paths.bundle),
        Space.of_meta(read_manifest(run.paths.latents(0)).meta),
    )
    online = run.online.model_copy(
        update={"backends": ("torch", "onnx", "onnx_int8"), "int8_max_ne_loss": 1.0}
    )
    allowed = run.model_copy(update={"online": online})
    context = Context(allowed, lambda *_: None)
    found = run_publish(context)
    exact = load_offline(load_bundle(run.paths.bundle), *_sample_of(run)).probs
    sample = load_offline(load_bundle(run.paths.bundle, "onnx_int8"), *_sample_of(run))
    label = sample.rows["label"]
    loss = normalized_entropy(label, sample.probs) - normalized_entropy(label, exact)
    assert found["int8_ne_loss"] == pytest.approx(loss, abs=1e-9)
    assert loss != 0
    published = read_manifest(run.paths.bundle).version
    assert published == found["bundle"] != before.version
    strict = online.model_copy(update={"int8_max_ne_loss": loss - 1e-9})
    with pytest.raises(BundleError, match=r"8-bit weights add .* nothing was published"):
        export_bundle(run.model_copy(update={"online": strict}), space)
    assert read_manifest(run.paths.bundle).version == published


def _sample_of(run):
    """All rows of the validation window, as `load_offline` takes them."""
    return (
        PreparedData.open(run.paths.prepared),
        run.paths.joined(0),
        splits_of(run).vm_valid,
        10**6,
    )
