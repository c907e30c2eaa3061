"""The config of a sweep: what is tuned, over which values, for what, and within which budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from loopfm_ray.config import (
    Config,
    apply_overrides,
    find_config,
    read_sections,
    read_yaml,
    validate,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import PipelineConfig, RayConfig, default_vms
from loopfm_ray.kge.embed import KgeRunConfig
from loopfm_ray.sweep.space import (
    Parameter,
    apply_params,
    check_space,
    put_values,
)

__all__ = [
    "AshaConfig",
    "BudgetConfig",
    "ConfirmConfig",
    "Constraint",
    "Objective",
    "ScalingConfig",
    "SweepConfig",
    "load_sweep",
]

# Any: a part of a config tree, checked when the whole is built.
Tree = dict[str, Any]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
_VM = "vm"
_OF_VMS = ("ne", "auc", "gauc", "logloss", "calibration")
_COSTS = ("num_parameters", "train_s", "score_ms_p50", "score_ms_p99", "bytes_per_user")
_OF_FM = ("fm_ne", "fm_num_parameters", "baseline_ne", "transfer_ratio")
_OF_GRAPHS = ("mrr", "num_parameters", "train_s")
_RISE = {"auc", "gauc", "mrr", "transfer_ratio"}


class Objective(Config):
    """A metric that is made as small or as large as possible."""

    metric: str
    """Name of a metric, measured on the validation window (of a graph: the validation triples)."""
    direction: Literal["minimize", "maximize"] | None = None
    """null takes what is better: AUC, gAUC, MRR and the transfer ratio are maximized, all others minimized."""

    @property
    def is_maximized(self) -> bool:
        """Whether larger is better."""
        return self.metric in _RISE if self.direction is None else self.direction == "maximize"


class Constraint(Config):
    """What a metric has to keep to; a trial beyond it is never the best, and the sampler learns to stay away."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise ConfigError(f"the constraint on {self.metric} needs at_most, at_least or both")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"the constraint on {self.metric} can not be kept: at_least {low} is over at_most {high}"
            )
        return self

    def excess(self, value: float) -> float:
        """Return by how much a value is beyond the limits; 0 or less within them."""
        over = [] if self.at_most is None else [value - self.at_most]
        under = [] if self.at_least is None else [self.at_least - value]
        return max(over + under)


class _Sampler(Config):
    seed: NonNegativeInt = 0
    """Of the first driver; each further one of a study draws another stream of numbers."""


class TpeConfig(_Sampler):
    """Tree-structured Parzen estimators: the default. Bergstra et al., NIPS 2011."""

    kind: Literal["tpe"] = "tpe"
    num_startup_trials: PositiveInt = 10
    """Trials at random before it begins."""


class GpConfig(_Sampler):
    """A Gaussian process: better than TPE within few trials and dimensions, slower with many."""

    kind: Literal["gp"] = "gp"
    num_startup_trials: PositiveInt = 10
    """Trials at random before it begins."""


class RandomConfig(_Sampler):
    """Random search, the baseline of every other."""

    kind: Literal["random"] = "random"


class NsgaConfig(_Sampler):
    """NSGA-II, for several objectives. Deb et al., IEEE TEC 2002."""

    kind: Literal["nsga2"] = "nsga2"
    population_size: Annotated[int, Field(ge=2)] = 20
    """Trials of a generation."""


class GridConfig(_Sampler):
    """Every combination once; the space holds choices and ranges of whole numbers alone."""

    kind: Literal["grid"] = "grid"


SamplerConfig = Annotated[
    TpeConfig | GpConfig | RandomConfig | NsgaConfig | GridConfig, Field(discriminator="kind")
]


class AshaConfig(Config):
    """Asynchronous successive halving on the validation metric while training. Li et al., arXiv 1810.05934.

    It looks at the first objective alone; a trial that it ends has no values, and takes no part in a Pareto front.
    """

    grace: PositiveInt = 1
    """Validations before a trial may be ended."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0
    """At each rung the best 1/reduction_factor so far go on; rungs are at grace times its powers."""


class BudgetConfig(Config):
    """What a sweep may take; whatever is used up first ends it."""

    num_trials: PositiveInt = 30
    """Trials that are finished or ended early, of all drivers of the study; those that fail count as well."""
    time_s: PositiveFloat | None = None
    """Wall time of all commands that worked on the study. No trial begins after it; those that run end as they would."""
    cores: PositiveInt = 2
    """Trials side by side, each on one core."""


class ScalingConfig(Config):
    """Two metrics between which a power law is fitted over the finished trials."""

    x: str
    """Such as fm_num_parameters, or a parameter's path that holds numbers."""
    y: str
    """Such as ne."""
    best_per_x: bool = True
    """Whether only the best y of each x counts, as in a scaling law, where all else is tuned; else every trial."""


class ConfirmConfig(Config):
    """Trains the best trials and the base config anew, with seeds that the sweep has not seen; the test window is looked at here alone, once."""

    top: PositiveInt = 3
    """Best trials that are trained again; of several objectives, those of the front with the best first one."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(100, 101, 102, 103, 104), min_length=2)


class SweepConfig(Config):
    """One sweep."""

    kind: Literal["sweep"] = "sweep"
    name: str = Field(pattern=_NAME, max_length=100)
    """Name of the sweep's folder and of its study."""
    run_dir: str = "runs"
    """Folder of all runs."""
    base: Tree
    """The config that is changed: a pipeline, or an embedding of a graph (`kind: kge`). A file is named from the sweep's folder."""
    vm: str = "vm_kd_loopfm"
    """Of a pipeline: the VM that is tuned. Paths of the space that begin with `vm.` are of it."""
    set: Tree = Field(default={})
    """Values by dotted path that are put into the base before anything else."""
    space: dict[str, Parameter]
    """By dotted path into the base config, the values that are searched."""
    first: tuple[Tree, ...] = ()
    """Params that are tried before the sampler is asked, such as those in use today; paths that are missing are sampled."""
    objectives: tuple[Objective, ...] = Field(default=(Objective(metric="ne"),), min_length=1)
    """What is sought; with several, a Pareto front."""
    constraints: tuple[Constraint, ...] = ()
    record: tuple[str, ...] = ()
    """Further metrics that are measured and shown."""
    scaling: tuple[ScalingConfig, ...] = ()
    sampler: SamplerConfig = TpeConfig()
    scheduler: AshaConfig | None = None
    """null lets every trial end."""
    budget: BudgetConfig = BudgetConfig()
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1)
    """Each trial is trained once for each; its metrics are the means."""
    confirm: ConfirmConfig | None = None
    """null does not look at the test window at all."""
    storage: str | None = None
    """Where the study is kept: a file of a journal (.log), sqlite:///FILE or postgresql://...; null is `study.log` in the sweep's folder.
    Drivers on several machines share a study through PostgreSQL."""
    pool: str | None = None
    """Folder of versions that several sweeps and experiments share, so that an FM of the same config and data is trained once; on the
    file system of `run_dir`, and never cleared. null keeps one for this sweep alone."""
    keep_data: bool = False
    """Whether latents and joined sets stay on disk when the sweep is over."""
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_of_graphs and (self.confirm is not None or len(self.seeds) > 1):
            raise ConfigError(
                "confirm and several seeds are of a pipeline; leave them out, and compare the best with the base by a kge_experiment"
            )
        check_space(self.space, self.resolve)
        for params in self.first:
            unknown = sorted(set(params) - set(self.space))
            if unknown:
                raise ConfigError(f"first names {unknown}; expected paths of {sorted(self.space)}")
        known = set(_OF_GRAPHS if self.is_of_graphs else (*_OF_VMS, *_COSTS, *_OF_FM))
        for one in self.scaling:
            strange = [name for name in (one.x, one.y) if name not in known | set(self.space)]
            if strange:
                raise ConfigError(
                    f"scaling names {strange}; expected metrics, {sorted(known)}, or paths of the space"
                )
        for name in self.metrics:
            if name not in known:
                raise ConfigError(f"there is no metric {name!r}; expected one of {sorted(known)}")
        names = [one.metric for one in self.objectives]
        if len(set(names)) != len(names):
            raise ConfigError(f"objectives must differ, found {names}")
        if self.sampler.kind == "grid" and any(
            item.kind == "float" or item.when for item in self.space.values()
        ):
            raise ConfigError(
                "a grid takes choices and whole numbers without conditions; take tpe, or list the values as choices"
            )
        return self

    @property
    def is_of_graphs(self) -> bool:
        """Whether a knowledge graph embedding is tuned, not a pipeline."""
        return bool(self.base.get("kind") == "kge")

    @property
    def root(self) -> Path:
        """The sweep's folder."""
        return Path(self.run_dir) / self.name

    @property
    def work(self) -> Path:
        """Where its trials work."""
        return self.root / "work"

    @property
    def pool_dir(self) -> Path:
        """Where versions are that its trials share."""
        return self.work / "pool" if self.pool is None else Path(self.pool)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that is asked for."""
        asked = [
            *(one.metric for one in self.objectives),
            *(one.metric for one in self.constraints),
            *self.record,
            *(name for one in self.scaling for name in (one.x, one.y) if name not in self.space),
        ]
        return tuple(dict.fromkeys(asked))

    def is_rising(self, metric: str) -> bool:
        """Return whether a larger value of a metric is better."""
        asked = {one.metric: one.is_maximized for one in self.objectives}
        return asked.get(metric, metric in _RISE)

    @property
    def study_settings(self) -> Tree:
        """What a study can not change once it has begun."""
        fixed = {"base", "vm", "set", "space", "objectives", "constraints", "seeds"}
        return self.model_dump(mode="json", include=fixed)

    def resolve(self, params: Mapping[str, Any]) -> PipelineConfig | KgeRunConfig:
        """Return the config of a trial: the base with its params.

        Raises:
            ConfigError: they do not fit together.
        """
        if self.is_of_graphs:
            tree = apply_params(put_values(self.base, self.set), self.space, params)
            return validate(KgeRunConfig, tree, f"sweep {self.name}")
        return self._pipeline(params)

    def pipeline(self, params: Mapping[str, Any]) -> PipelineConfig:
        """Return the pipeline of a trial; its VMs are the tuned one and the baseline.

        Raises:
            ConfigError: the params do not fit together, or graphs are tuned.
        """
        if self.is_of_graphs:
            raise ConfigError(f"sweep {self.name} tunes a graph's embedding, not a pipeline")
        return self._pipeline(params)

    def graph_run(self, params: Mapping[str, Any]) -> KgeRunConfig:
        """Return the embedding of a graph of a trial.

        Raises:
            ConfigError: the params do not fit together, or a pipeline is tuned.
        """
        found = self.resolve(params)
        if not isinstance(found, KgeRunConfig):
            raise ConfigError(f"sweep {self.name} tunes a pipeline, not a graph's embedding")
        if found.train.num_workers != 1:
            raise ConfigError(
                f"train.num_workers is {found.train.num_workers}; a trial trains on one core, several trials run side by side: set"
                " it to 1"
            )
        return found

    def _pipeline(self, params: Mapping[str, Any]) -> PipelineConfig:
        tree = dict(self.base)
        vms = tree.get("vms") or {
            name: stage.model_dump(mode="json") for name, stage in default_vms().items()
        }
        if self.vm not in vms:
            raise ConfigError(
                f"vm is {self.vm!r}, which is not among vms {sorted(vms)} of the base config; write the VM there"
            )
        baseline = tree.get("baseline", "vm")
        own = put_values({**tree, _VM: vms[self.vm]}, self.set)
        own = apply_params(own, self.space, params)
        tuned = own.pop(_VM)
        learning = tuned.get("learning", {}) if isinstance(tuned, dict) else {}
        if learning.get("num_workers", 1) != 1:
            raise ConfigError(
                f"vm.learning.num_workers is {learning['num_workers']}; a trial trains its VM on one core, several trials run side by side"
            )
        kept = {name: vms[name] for name in (baseline, tree.get("kd", "vm_kd")) if name in vms}
        return validate(
            PipelineConfig,
            {
                **own,
                "run_dir": str(self.work / "upstream"),
                "seeds": list(self.seeds),
                "vms": kept | {self.vm: tuned},
                "online": {**own.get("online", {}), "model": self.vm},
                "ray": self.ray.model_dump(mode="json"),
            },
            f"sweep {self.name}",
        )


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Return the sweep of a YAML file.

    Its `base` is the tree of a config, a file that is named from the sweep's folder, or the name of a config of the package,
    such as complete_journey or kge/movielens.

    Raises:
        ConfigError: a file is missing, or a key or value is not accepted.
    """
    tree = apply_overrides(read_yaml(path), overrides)
    base = tree.get("base")
    if isinstance(base, str):
        tree["base"] = read_sections(PipelineConfig, _base_path(base, path.parent))
    return validate(SweepConfig, tree, str(path))


def _base_path(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return folder / name
    kind, _, last = name.rpartition("/")
    return find_config(last, kind or "pipeline")
