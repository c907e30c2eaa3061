"""The whole config tree of a pipeline run, and where each part of a run lies on disk."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from loopfm_ray.analysis.alignment import AlignmentKind
from loopfm_ray.config import Config
from loopfm_ray.data.base_config import Moment, to_ts
from loopfm_ray.data.config import CompleteJourneyConfig, DataConfig
from loopfm_ray.data.split import Splits
from loopfm_ray.distill.heads import AuxiliaryConfig
from loopfm_ray.distill.stream import StreamConfig
from loopfm_ray.errors import ConfigError
from loopfm_ray.history.config import HistoryStageConfig
from loopfm_ray.history.freshness import FreshnessConfig
from loopfm_ray.models.bottleneck import BottleneckConfig
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.foundation import FmConfig
from loopfm_ray.models.history_inputs import HistoryInputs, LatentHistoryConfig, RawHistoryConfig
from loopfm_ray.models.registry import VmConfig
from loopfm_ray.models.sharded.config import EmbeddingConfig, LocalConfig, ShardedConfig
from loopfm_ray.serving.contract import Backend
from loopfm_ray.serving.spec import why_not_servable
from loopfm_ray.store.filesystem import CACHE_BYTES, CACHE_DIR, Location, join, locate
from loopfm_ray.train.loop import LoopConfig
from loopfm_ray.train.optim import OptimConfig
from loopfm_ray.types import MICROS_PER_S

__all__ = [
    "AuditConfig",
    "FitNetsConfig",
    "FmStageConfig",
    "HistoryStageConfig",
    "LearningConfig",
    "OnlineConfig",
    "PipelineConfig",
    "RayConfig",
    "RefreshConfig",
    "RunPaths",
    "VmStageConfig",
    "default_vms",
]

MODEL_FM = "fm"


class RayConfig(Config):
    """Where the Ray programs run."""

    address: str | None = None
    """Address of a running cluster, such as `auto`; none starts a local one on loopback."""
    num_cpus: PositiveInt = 8
    """Logical CPUs of a local cluster. Ray's data and training programs wait for ever on fewer than about six,
    so this is not the number of cores."""
    object_store_bytes: NonNegativeInt = 600 * 1024 * 1024
    """Size of a local cluster's object store; 0 lets Ray choose 30 % of the memory."""
    parallel_tasks: PositiveInt = 2
    """Tasks and single-worker trainings that run side by side; on one machine, its number of cores."""
    fm_reader: Literal["files", "ray_data"] = "files"
    """Who reads the rows that an FM learns from: each worker itself, file by file, or Ray Data, which reads ahead and puts blocks through its
    object store. The batches are the same; a worker has a file open at once, a pipeline of Ray Data takes seconds to start."""


class LearningConfig(Config):
    """How a model is trained."""

    epochs: PositiveInt = 1
    """Passes over the training window; click models overfit when they see a row again."""
    batch_rows: PositiveInt = 512
    """Rows of a step, over all workers together."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    window_rows: PositiveInt = 262_144
    """Rows in memory at a time; inside such a stretch of time requests are shuffled."""
    evals_per_epoch: PositiveInt = 4
    """How often in an epoch the validation NE is measured."""
    patience: PositiveInt | None = None
    """Measurements without a better validation NE before training stops and the best weights return; none never stops."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints."""
    num_workers: PositiveInt = 1
    """Data-parallel training processes."""
    use_gpu: bool = False
    """Whether each worker gets a GPU."""

    def loop(self, steps_per_epoch: int) -> LoopConfig:
        """Return the settings of the training loop for epochs of so many steps."""
        return LoopConfig(
            batch_rows=self.batch_rows,
            epochs=self.epochs,
            optim=self.optim,
            log_every=max(1, min(100, steps_per_epoch // 4)),
            eval_every=max(1, -(-steps_per_epoch // self.evals_per_epoch)),
            checkpoint_every=self.checkpoint_steps,
            patience=self.patience,
        )


class RefreshConfig(Config):
    """Later snapshots of the FM that take over the embedding of events, one after another."""

    at: tuple[Moment, ...] = ()
    """When each takes over; it embeds the events from then on. Rising, after `data.split.fm_stop`."""
    every_s: PositiveInt | None = None
    """In place of `at`: one takes over every so many seconds after `data.split.fm_stop`, to the end of the test window."""
    delay_s: NonNegativeInt = 0
    """How long before it takes over a snapshot has stopped learning."""
    valid_s: PositiveInt | None = None
    """The last part of what a snapshot may learn from, kept for validation; null is `data.split.valid_s`. With a warm start the next one
    learns from it."""
    warm_start: bool = True
    """Whether each begins with the weights of the one before, and learns from what that one has not; else it learns from everything anew."""
    align: AlignmentKind = "none"
    """How its latents are mapped into the space of the first: not at all, turned (`orthogonal`) or by a `linear` map."""
    teacher: Literal["first", "newest"] = "first"
    """Whose predictions the VMs follow. With `newest` each event is scored by the snapshot that embeds it, and by no other."""

    @property
    def at_ts(self) -> tuple[int, ...]:
        """The moments of `at` in microseconds UTC."""
        return tuple(to_ts(moment) for moment in self.at)

    def moments(self, splits: Splits) -> tuple[int, ...]:
        """Return when snapshots take over, in microseconds UTC."""
        if self.every_s is None:
            return self.at_ts
        step = self.every_s * MICROS_PER_S
        return tuple(range(splits.fm.stop_ts + step, splits.test.stop_ts, step))

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if bool(self.at) == (self.every_s is not None):
            raise ConfigError(
                f"fm.refresh takes either at or every_s, found at {list(self.at)} and every_s {self.every_s}; set one"
            )
        if list(self.at_ts) != sorted(set(self.at_ts)):
            raise ConfigError(f"fm.refresh.at must rise, found {list(self.at)}")
        return self


class FmStageConfig(Config):
    """The foundation model: what it is, how it learns, and what is kept of it."""

    model: FmConfig = FmConfig()
    learning: LearningConfig = LearningConfig(batch_rows=2048, num_workers=2)
    embedding: EmbeddingConfig = LocalConfig()
    """Where the rows of its embedding tables lie while it learns; the written FM is the same kind of file either way."""
    bottleneck: BottleneckConfig = BottleneckConfig()
    embedding_layers: tuple[str, ...] = Field(default=("embedding",), min_length=1)
    """The FM layers whose activations, side by side, are the FM embedding: `embedding`, `sequence`, `hidden_0`, ..."""
    bits: Annotated[int, Field(ge=2, le=16)] = 4
    """Bits of each number of a stored latent: 2, 4, 8 or 16."""
    bottleneck_rows: PositiveInt = 200_000
    """The newest rows of the FM's training window: on their embeddings the bottleneck is fitted and, on an eighth that it
    does not see, its codes are chosen. Of one that is trained along with the FM, an eighth of so many rows of the
    validation window choose the codes."""
    refresh: RefreshConfig | None = None
    """Later snapshots; null keeps one for all events, so that all latents lie in one space."""

    @property
    def is_joint(self) -> bool:
        """Whether the FM's training also trains the bottleneck."""
        return self.bottleneck.fitted == "jointly"

    @property
    def learnt(self) -> tuple[Config | tuple[str, ...], ...]:
        """What shapes the FM's training: a bottleneck only where it is trained along."""
        along = (self.bottleneck, self.embedding_layers) if self.is_joint else ()
        # FMs that were trained before there was a choice keep their hash
        tables = (self.embedding,) if self.embedding != LocalConfig() else ()
        return (self.model, self.learning, *tables, *along)

    @model_validator(mode="after")
    def _check_patience(self) -> "FmStageConfig":
        if isinstance(self.embedding, ShardedConfig) and self.learning.patience is not None:
            raise ConfigError(
                "fm.learning.patience keeps a copy of the best weights, which sharded tables have not; found"
                f" {self.learning.patience} with fm.embedding.kind sharded, set one of them back"
            )
        return self


class FitNetsConfig(Config):
    """Feature matching, the baseline of LoopFM beside distillation of the prediction. arXiv 1412.6550."""

    weight: PositiveFloat = 1.0
    """Weight of the mean square error of the mapped hidden layer against the latent."""
    layer: str = "hidden_0"
    """The VM's layer that is mapped and pulled."""


class VmStageConfig(Config):
    """One vertical model: what it is, how it learns and what it learns from."""

    model: VmConfig = DnnConfig()
    learning: LearningConfig = LearningConfig(epochs=2)
    kd_weight: NonNegativeFloat = 0.0
    """Weight of the cross entropy against the FM's prediction, beside that against the label; 0 is no distillation."""
    fitnets: FitNetsConfig | None = None
    """Pulls a hidden layer to the FM's latent of the row, while training only; none does not."""
    auxiliary: AuxiliaryConfig | None = None
    """Follows the FM's prediction with a head that is not served, in place of `kd_weight`; none has one head."""

    @model_validator(mode="after")
    def _follows_once(self) -> Self:
        if self.auxiliary is None:
            return self
        given = [
            name for name in ("kd_weight", "fitnets") if getattr(self, name) not in (0.0, None)
        ]
        if given:
            raise ConfigError(
                f"auxiliary and {given[0]} are both set: the served head would follow the FM after all, or two ways of"
                f" training the same layer mix; leave {given[0]} out"
            )
        return self

    @property
    def follows_fm(self) -> bool:
        """Whether training reads the FM's prediction of the rows."""
        return self.kd_weight > 0 or self.auxiliary is not None

    @property
    def needs_teacher_latent(self) -> bool:
        """Whether training reads the rows' own latents."""
        return self.fitnets is not None or self.model.reads_teacher_latent


class OnlineConfig(Config):
    """What is published for serving, and which VM is served."""

    model: str = "vm_kd_loopfm"
    """The VM whose bundle the demo serves."""
    target: str | None = None
    """Directory or `redis://` address that histories are published to, next to those of other snapshots; none is the
    folder `online` of the run."""
    max_events_per_user: PositiveInt | None = None
    """Newest events kept for a user; none keeps all within the retention."""
    backends: tuple[Backend, ...] = ("torch",)
    """What the bundle can be run with; `onnx` scores the same about three times as fast, `onnx_int8` with rounded weights."""
    int8_max_ne_loss: NonNegativeFloat = 0.001
    """Most that 8-bit weights may add to the validation NE; publishing ends with an error when they add more."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the scoring service on loopback while the demo scores one request; 0 takes a free one."""
    parity_requests: PositiveInt = 200
    """Test requests that are replayed through the service and compared with offline scores."""
    parity_tolerance: PositiveFloat = 1e-5
    """Largest difference of a probability that still counts as equal."""


class AuditConfig(Config):
    """How much of the joined set is proved free of leaks."""

    sample: PositiveInt | None = 20_000
    """Requests that are recomputed; none checks all."""


def default_vms() -> dict[str, VmStageConfig]:
    """Return the four forms of one VM, and the one with its own raw history as the honest rival."""
    latent = DnnConfig(history=HistoryInputs.of(user=LatentHistoryConfig()))
    raw = DnnConfig(history=HistoryInputs.of(user=RawHistoryConfig()))
    return {
        "vm": VmStageConfig(),
        "vm_kd": VmStageConfig(kd_weight=1.0),
        "vm_loopfm": VmStageConfig(model=latent),
        "vm_kd_loopfm": VmStageConfig(model=latent, kd_weight=1.0),
        "vm_raw": VmStageConfig(model=raw),
    }


def _not_joined(vm: VmStageConfig, history: HistoryStageConfig) -> str | None:
    """Return what a VM reads that the join does not write, and where to ask for it; or None."""
    if vm.needs_teacher_latent and not history.with_own_latent:
        return "reads the latents of the rows themselves; set history.with_own_latent to true"
    for name, config in vm.model.history.sorted():
        if isinstance(config, RawHistoryConfig):
            continue
        if config.key != ("user",) and config.key not in history.keys:
            return (
                f"reads the history {name!r} by {list(config.key)}, history.keys has"
                f" {[list(key) for key in history.keys]}; add it there"
            )
        missing = [column for column in config.side.columns if column not in history.side.stored]
        if missing:
            return (
                f"reads {missing} of the events of history {name!r}; set history.side.{missing[0]}"
            )
    return None


class PipelineConfig(Config):
    """One run of the whole loop: events in, FM, histories, VMs with and without them, a served score, a report."""

    name: str = Field(default="demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Name of the run's folder."""
    run_dir: str = "runs"
    """Folder of all runs."""
    store: str | None = None
    """Folder or `s3://bucket/prefix` in which a folder of the run's name holds its versions (prepared data, snapshots,
    latents, joined sets, VMs, bundle); none keeps them in the run's folder. Records, evaluations, online store and report
    stay in the run's folder. Credentials come from the environment, the profile or the instance, never from here."""
    cache_dir: str = CACHE_DIR
    """Folder on each machine for what it reads from and writes to a store on S3."""
    cache_bytes: PositiveInt = CACHE_BYTES
    """What that folder may hold before the versions that nobody reads are removed, the longest unread first."""
    scratch_dir: str | None = None
    """Folder that all Ray workers share, where shards of latents wait for the upload to S3; none takes the run's folder,
    and then only the machine of this command embeds."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1)
    """Everything that is trained is trained once for each seed; figures are means over them."""
    data: DataConfig = CompleteJourneyConfig()
    fm: FmStageConfig = FmStageConfig()
    history: HistoryStageConfig = HistoryStageConfig()
    vms: dict[str, VmStageConfig] = Field(default_factory=default_vms, min_length=1)
    """The vertical models by name."""
    baseline: str = "vm"
    """The VM that gains and transfer ratios are measured from."""
    kd: str = "vm_kd"
    """The VM with distillation alone, which LoopFM has to beat."""
    online: OnlineConfig = OnlineConfig()
    audit: AuditConfig = AuditConfig()
    freshness: FreshnessConfig = FreshnessConfig()
    stream: StreamConfig | None = None
    """Trains VMs on the joined set as on a stream, beside or in place of `train-vm`; null does not."""
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        named = {"baseline": self.baseline, "kd": self.kd, "online.model": self.online.model}
        for key, name in named.items():
            if name not in self.vms:
                raise ConfigError(f"{key} is {name!r}, which is not among vms {sorted(self.vms)}")
        if MODEL_FM in self.vms:
            raise ConfigError(f"a vertical model can not be called {MODEL_FM!r}: that is the FM")
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must differ, found {list(self.seeds)}")
        if self.store and "://" in self.store and not re.match(r"s3://[^/]", self.store):
            raise ConfigError(f"store must be a folder or s3://bucket/prefix, found {self.store!r}")
        streamed = (self.stream.vms if self.stream is not None else None) or ()
        unknown = sorted(set(streamed).difference(self.vms))
        if unknown:
            raise ConfigError(
                f"stream.vms names {unknown}, which are not among vms {sorted(self.vms)}"
            )
        reason = why_not_servable(self.vms[self.online.model].model)
        if reason is not None:
            raise ConfigError(
                f"online.model {self.online.model!r} {reason}; serve a VM that reads the users' latents, or no history"
            )
        return self

    @model_validator(mode="after")
    def _join_gives_what_is_read(self) -> Self:
        for name, stage in self.vms.items():
            lacking = _not_joined(stage, self.history)
            if lacking is not None:
                raise ConfigError(f"vms.{name} {lacking}")
        return self

    @property
    def paths(self) -> "RunPaths":
        """Where the parts of this run lie."""
        root = Path(self.run_dir) / self.name
        if self.store is None:
            return RunPaths(root, root)
        store = locate(self.store, self.cache_dir, self.cache_bytes)
        return RunPaths(root, join(store, self.name))

    def scratch(self, seed: int) -> Path:
        """Return where shards of latents wait for their upload to S3."""
        if self.scratch_dir is None:
            return (self.paths.work / f"latents-{seed}").absolute()
        return Path(self.scratch_dir).absolute() / self.name / f"latents-{seed}"

    @property
    def online_target(self) -> str:
        """Where histories are published: a directory, absolute, or a `redis://` address."""
        target = self.online.target or str(self.paths.online)
        return target if "://" in target else str(Path(target).absolute())

    @property
    def latent_vms(self) -> Mapping[str, VmStageConfig]:
        """The VMs that read the FM's latents."""
        return {
            name: stage
            for name, stage in self.vms.items()
            if stage.model.history.kind in ("latent", "both")
        }


class RunPaths:
    """Where the parts of one run lie: what only this run reads under `root`, the versions under `versions`."""

    def __init__(self, root: Path, versions: Location) -> None:
        self.root = root
        self.versions = versions
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.summary = root / "summary.json"
        self.report = root / "report.html"
        self.prepared = join(versions, "prepared")
        self.online = root / "online"
        self.bundle = join(versions, "bundle")
        self.records = root / "records"
        self.work = root / "work"

    def seed(self, seed: int) -> Path:
        """Folder of what depends on a seed and is no version."""
        return self.root / f"seed={seed}"

    def fm(self, seed: int) -> Location:
        """The trained FM."""
        return join(self.versions, f"seed={seed}", "fm")

    def snapshot(self, seed: int) -> Location:
        """The FM with its bottleneck and codes."""
        return join(self.versions, f"seed={seed}", "snapshot")

    def generation(self, seed: int, number: int, part: str) -> Location:
        """The `fm`, `snapshot` or `latents` of a later snapshot; of the first one, 0, the latents where it does not stand alone."""
        return join(self.versions, f"seed={seed}", "refresh", str(number), part)

    def latents(self, seed: int) -> Location:
        """The offline history store."""
        return join(self.versions, f"seed={seed}", "latents")

    def joined(self, seed: int) -> Location:
        """What the VMs train on."""
        return join(self.versions, f"seed={seed}", "joined")

    def vm(self, seed: int, name: str) -> Location:
        """One trained VM."""
        return join(self.versions, f"seed={seed}", "vm", name)

    def stream(self, seed: int, vertical: str, name: str) -> Location:
        """One VM as the end of a vertical's stream left it."""
        return join(self.versions, f"seed={seed}", "stream", vertical, name)

    def checkpoints(self, key: str) -> Location:
        """Where the training of this key keeps its checkpoints while it runs."""
        return join(self.versions, "work", key)
