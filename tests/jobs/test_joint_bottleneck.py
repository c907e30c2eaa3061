"""The FM's training program with a bottleneck along, without Ray around it: from the log to the snapshot."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopfm_ray.config import load_config
from loopfm_ray.data.prepare import prepare
from loopfm_ray.errors import ConfigError, JobError, StoreError
from loopfm_ray.experiments import FmStageConfig, LearningConfig, PipelineConfig, RefreshConfig
from loopfm_ray.jobs import compress as compress_job
from loopfm_ray.jobs import materialize, stages
from loopfm_ray.jobs import train_fm as job
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.jobs.refresh import refreshed_latents
from loopfm_ray.jobs.training import Worker
from loopfm_ray.models.bottleneck import BottleneckConfig
from loopfm_ray.models.foundation import FmConfig
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.train.snapshot import load_snapshot
from loopfm_ray.train.weights import load_fm
from tests.serial import embed_here

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
AFTER = BottleneckConfig(metric="spread", latent_dim=4, prefixes=(2, 4), lr=0.01)
JOINT = BottleneckConfig(**{**AFTER.model_dump(), "fitted": "jointly", "lr": 0.03})
LEARNING = LearningConfig(epochs=2, batch_rows=64, checkpoint_steps=8, evals_per_epoch=2)
MODEL = FmConfig(embed_dim=3, history_dim=4, hidden=(12, 8), dropout=0.3)


class KilledError(RuntimeError):
    """The end of a worker that is killed."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that outlived its worker."""

    path: Path

    @contextmanager
    def as_directory(self):
        yield str(self.path)

    def get_metadata(self):
        return json.loads((self.path / ".metadata.json").read_text())


class Ray:
    """What the training program asks of Ray, in this process.

    May be killed at a step, in the first training that gets there or in the one that comes after `kill_in` others of its run.
    """

    def __init__(self, folder):
        self.folder, self.kept, self.trainings = folder, None, 0
        self.kill_at = self.kill_in = None

    def report(self, metrics, checkpoint=None):
        if checkpoint is not None:
            # a checkpoint's folder is gone when the report returns
            [(name, count)] = metrics.items()
            self.kept = self.folder / f"{len(list(self.folder.glob('*')))}-{name}-{count}"
            shutil.copytree(checkpoint.path, self.kept)
            is_there = self.kill_in in (None, len(self.checkpoint().get_metadata()["finished"]))
            if is_there and name == "step" and count == self.kill_at:
                raise KilledError

    def checkpoint(self):
        return None if self.kept is None else Kept(self.kept)

    def trainer(self, loop, *, train_loop_config, **_):
        ray = self

        class Trainer:
            def fit(self):
                ray.trainings += 1
                loop(train_loop_config)
                ray.kept = None

        return Trainer()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of a prepared log, and the config of its data."""
    folder = tmp_path_factory.mktemp("log")
    settings = ["data.num_rows=12000", "data.num_users=60"]
    config = load_config(PipelineConfig, SYNTHETIC, settings).data
    prepare(config, folder / "prepared")
    return folder, config


@pytest.fixture
def ray(prepared, tmp_path, monkeypatch):
    found = Ray(tmp_path / "checkpoints")

    monkeypatch.setattr(job, "TorchTrainer", found.trainer)
    monkeypatch.setattr(job, "scaling_config", lambda *_, **__: None)
    monkeypatch.setattr(materialize, "_run", embed_here)
    monkeypatch.setattr(Worker, "current", classmethod(lambda cls: cls(0, 1)))
    monkeypatch.setattr("ray.train.get_checkpoint", found.checkpoint)
    monkeypatch.setattr("ray.train.report", found.report)
    monkeypatch.setattr(
        Context, "mapper", lambda *_, **__: lambda call, tasks: [call(task) for task in tasks]
    )
    return found


@pytest.fixture
def run(prepared, tmp_path):
    """Return a way to make the context of a run with these settings of the FM."""
    folder, data = prepared

    def make(name, bottleneck, seeds=(0,), **settings):
        stage = FmStageConfig(
            model=MODEL,
            learning=LEARNING,
            bottleneck=bottleneck,
            **{"embedding_layers": ("embedding", "hidden_1"), **settings},
        )
        config = PipelineConfig(name=name, run_dir=str(tmp_path), seeds=seeds, data=data, fm=stage)
        if not config.paths.prepared.exists():
            shutil.copytree(folder / "prepared", config.paths.prepared)
        return Context(config, silent, any_code=True)

    return make


def weights(path, name="fm.safetensors"):
    return load_file(path / name)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_fm_is_the_same_and_its_version_holds_the_bottleneck(ray, run):
    after, jointly = run("after", AFTER), run("jointly", JOINT)
    for context in (after, jointly):
        stages.run_train_fm(context)
    plain, along = after.config.paths.fm(0), jointly.config.paths.fm(0)
    assert_same_bits(weights(plain), weights(along))
    verify(along)
    assert load_fm(plain).joint is None
    loaded = load_fm(along)
    assert loaded.joint.layers == ("embedding", "hidden_1")
    assert loaded.joint.bottleneck.config == JOINT
    assert not loaded.joint.bottleneck.training
    names = {file.path for file in read_manifest(along).files}
    assert names - {file.path for file in read_manifest(plain).files} == {
        "bottleneck.safetensors", "bottleneck.json",
    }  # fmt: skip


def test_compress_takes_the_bottleneck_and_only_chooses_its_codes(ray, run, monkeypatch):
    after, context = run("after", AFTER), run("jointly", JOINT)
    stages.run_train_fm(after)
    rival = stages.run_compress(after)["seed=0"]["variance_explained"]
    monkeypatch.setattr(compress_job, "fit_bottleneck", None)  # whoever fits it fails
    stages.run_train_fm(context)
    result = stages.run_compress(context)["seed=0"]
    paths = context.config.paths
    trained = weights(paths.fm(0), "bottleneck.safetensors")
    assert_same_bits(trained, weights(paths.snapshot(0), "bottleneck.safetensors"))
    snapshot = load_snapshot(paths.snapshot(0))
    assert snapshot.spec.bottleneck == JOINT
    assert (snapshot.spec.code_spec.bits, snapshot.spec.code_spec.dim) == (4, 4)
    assert {"latent", "code", "prefix_2", "prefix_4"} == set(result["variance_explained"])
    explained = result["variance_explained"]
    # a random start keeps about as much as 4 of the embedding's dimensions hold; the rival starts as principal components
    assert explained["latent"] > 3 * 4 / result["embedding_dim"]
    assert explained["latent"] > 0.5 * rival["latent"]
    assert explained["code"] > 0.8 * explained["latent"]
    assert 0 < result["share_clipped_codes"] < 0.3
    assert set(result["probe_logloss"]) == {"none", "embedding", "latent", "code", "fm"}


def test_a_killed_training_goes_on_with_the_same_bits(ray, run):
    whole, killed = run("whole", JOINT), run("killed", JOINT)
    stages.run_train_fm(whole)
    ray.kill_at = 16
    with pytest.raises(JobError, match="train-fm") as caught:
        stages.run_train_fm(killed)
    assert isinstance(caught.value.__cause__, KilledError)
    assert ray.kept.name.endswith("-step-16")
    assert not killed.config.paths.fm(0).exists()
    ray.kill_at = None
    stages.run_train_fm(killed)
    for name in ("fm.safetensors", "bottleneck.safetensors"):
        assert_same_bits(
            weights(whole.config.paths.fm(0), name), weights(killed.config.paths.fm(0), name)
        )


@pytest.mark.parametrize("is_removed", [False, True])
def test_seeds_share_a_run_and_a_killed_one_goes_on_in_the_seed_where_it_was(ray, run, is_removed):
    alone = [run(f"seed{seed}", JOINT, seeds=(seed,)) for seed in (0, 1)]
    for context in alone:
        stages.run_train_fm(context)
    both, ray.trainings = run("both", JOINT, seeds=(0, 1)), 0
    ray.kill_at = 16
    for ray.kill_in in (0, 1):
        assert not both.config.paths.fm(0).exists()
        with pytest.raises(JobError):
            stages.run_train_fm(both)
    first = read_manifest(both.config.paths.fm(0))
    assert not both.config.paths.fm(1).exists()
    if is_removed:
        shutil.rmtree(both.config.paths.fm(0))
    ray.kill_at = None
    stages.run_train_fm(both)
    assert ray.trainings == 3
    if not is_removed:
        assert read_manifest(both.config.paths.fm(0)) == first
    for seed, context in enumerate(alone):
        assert_same_bits(
            weights(context.config.paths.fm(seed)), weights(both.config.paths.fm(seed))
        )


REFRESH = {"every_s": 7 * 86_400, "delay_s": 86_400, "valid_s": 3 * 86_400, "teacher": "newest"}


@pytest.mark.parametrize("settings", [REFRESH, {**REFRESH, "warm_start": False}])
def test_later_fms_of_all_seeds_are_trained_in_one_run_as_if_alone(ray, run, settings):
    chosen = {"refresh": RefreshConfig(**settings)}
    both = run("both", AFTER, seeds=(0, 1), **chosen)
    alone = [run(f"seed{seed}", AFTER, seeds=(seed,), **chosen) for seed in (0, 1)]
    for context in (*alone, both):
        stages.run_train_fm(context)
        stages.run_compress(context)
    ray.trainings = 0
    made = stages.run_materialize(both)
    assert ray.trainings == 1
    paths = both.config.paths
    numbers = [number for number in range(1, 9) if paths.generation(0, number, "fm").exists()]
    assert len(numbers) > 1
    for seed, context in enumerate(alone):
        assert stages.run_materialize(context)[f"seed={seed}"] == made[f"seed={seed}"]
        for number in numbers:
            for part in ("fm", "snapshot"):
                owners = (context.config.paths, paths)
                places = [each.generation(seed, number, part) for each in owners]
                assert_same_bits(*map(weights, places))
    assert stages.run_materialize(both) == made
    assert ray.trainings == 3


def test_a_refresh_that_is_killed_goes_on_in_the_fm_where_it_was(ray, run):
    chosen = {"refresh": RefreshConfig(**REFRESH)}
    whole, killed = (run(name, AFTER, **chosen) for name in ("whole", "killed"))
    for context in (whole, killed):
        stages.run_train_fm(context)
        stages.run_compress(context)
    made = stages.run_materialize(whole)
    paths = killed.config.paths
    ray.kill_at = 8
    for ray.kill_in in (1, 2):
        with pytest.raises(JobError):
            stages.run_materialize(killed)
        assert paths.generation(0, ray.kill_in, "fm").exists()
        assert not paths.generation(0, ray.kill_in + 1, "fm").exists()
    ray.kill_at = None
    assert stages.run_materialize(killed) == made


def test_a_run_without_later_snapshots_has_no_refresh(run):
    with pytest.raises(ConfigError, match="no later snapshots"):
        refreshed_latents(run("one", AFTER))


def test_only_what_is_trained_along_makes_another_fm(ray, run):
    wider = BottleneckConfig(**{**AFTER.model_dump(), "spread": 4.0})
    for context in (
        run("after", AFTER),
        run("after", wider),
        run("after", AFTER, embedding_layers=("hidden_0",), bits=8),
    ):
        stages.run_train_fm(context)
    assert ray.trainings == 1
    joint_wider = BottleneckConfig(**{**JOINT.model_dump(), "spread": 4.0})
    expected = 1
    for context, is_new in (
        (run("after", JOINT), True),
        (run("after", JOINT, bits=8), False),  # the codes are chosen afterwards
        (run("after", joint_wider), True),
        (run("after", joint_wider, embedding_layers=("hidden_0",)), True),
    ):
        stages.run_train_fm(context)
        expected += is_new
        assert ray.trainings == expected


@pytest.mark.parametrize(
    ("trained", "settings", "found"),
    [
        (AFTER, {}, "has none"),
        (JOINT, {"embedding_layers": ("hidden_0",)}, r"another one, of the layers \('embedding'"),
    ],
)
def test_an_fm_without_this_bottleneck_is_an_error(ray, run, trained, settings, found):
    stages.run_train_fm(run("one", trained))
    with pytest.raises(StoreError, match=f"{found}.*loopfm train-fm"):
        stages.run_compress(run("one", JOINT, **settings))
    assert not run("one", JOINT).config.paths.snapshot(0).exists()


def test_a_later_fm_goes_on_with_the_bottleneck_of_the_one_before(ray, run, monkeypatch):
    first, plain = run("first", JOINT), run("plain", AFTER)
    for context in (first, plain):
        stages.run_train_fm(context)
    begun = {}

    def begin(task, worker):
        begun.update(task.model.state_dict())
        raise KilledError

    monkeypatch.setattr(job, "train", begin)
    paths = run("second", JOINT).config.paths

    def train_from(parent):
        splits = stages.splits_of(first.config)
        config, max_len = first.config.fm, first.config.data.past.max_len
        settings = job.FmSettings(config, splits, max_len, 0, "", parent.config.paths.fm(0))
        training = job.FmTraining(paths.fm(0), settings)
        job.train_fms(paths.prepared, [training], paths.work, paths.checkpoints("fm"))

    with pytest.raises(JobError):
        train_from(first)
    for part in ("fm", "bottleneck"):
        own = {name: value for name, value in begun.items() if name.startswith(f"{part}.")}
        saved = weights(first.config.paths.fm(0), f"{part}.safetensors")
        assert_same_bits(own, {f"{part}.{name}": value for name, value in saved.items()})
    with pytest.raises(StoreError, match="has none instead of this bottleneck"):
        train_from(plain)


def test_a_damaged_bottleneck_is_an_error(ray, run):
    context = run("one", JOINT)
    stages.run_train_fm(context)
    path = context.config.paths.fm(0) / "bottleneck.json"
    path.write_text(path.read_text().replace("hidden_1", "hidden_9"))
    with pytest.raises(StoreError, match=r"bottleneck\.json"):
        load_fm(context.config.paths.fm(0))
