"""The config of an experiment: models, arms and variants of one pipeline, each cell over several seeds."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from loopfm_ray.config import Config, merge, validate
from loopfm_ray.data.config import CompleteJourneyConfig, DataConfig
from loopfm_ray.distill.stream import StreamConfig
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import (
    AuditConfig,
    FmStageConfig,
    HistoryStageConfig,
    PipelineConfig,
    RayConfig,
)

__all__ = ["ExperimentConfig", "LadderVariants", "Roles", "cell_name"]

# Any: a part of a config tree, checked when it is merged into the whole.
Tree = dict[str, Any]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class Roles(Config):
    """Which arms are compared."""

    baseline: str = "none"
    """The arm without any transfer: gains and transfer ratios are measured from it."""
    kd: str = "kd"
    """The arm with distillation alone."""
    best: str = "kd_loopfm"
    """The arm whose gain over `kd` stands at the top of the summary."""


class LadderVariants(Config):
    """Which variants differ by one step of the channel alone."""

    code: str
    """Stored codes."""
    latent: str
    """The same latents in half floats."""
    embedding: str
    """No bottleneck: `fm.bottleneck.latent_dim` null, in half floats."""


class ExperimentConfig(Config):
    """Every model in every arm, in every variant of the pipeline, under every seed.

    A cell is one VM: the tree of its model, overlaid by that of its arm, overlaid by the `vm` part of its variant. The other
    parts of a variant (`data`, `fm`, `history`) overlay the experiment's own. A model may have a part `histories` beside
    those of a VM's stage: what each history of an arm takes (`encoder`, `side`) where the arm leaves it open.
    """

    kind: Literal["experiment"] = "experiment"
    name: str = Field(pattern=_NAME, max_length=100)
    """Name of the experiment's folder."""
    run_dir: str = "runs"
    """Folder of all runs."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """Everything that is trained is trained once for each seed."""
    data: DataConfig = CompleteJourneyConfig()
    fm: FmStageConfig = FmStageConfig()
    history: HistoryStageConfig = HistoryStageConfig()
    models: dict[str, Tree] = Field(min_length=1)
    """Parts of a VM's stage (`model`, `learning`, `kd_weight`), and `histories`, by name of the model."""
    arms: dict[str, Tree] = Field(min_length=1)
    """What an arm changes in every model."""
    variants: dict[str, Tree] = Field(default={"main": {}}, min_length=1)
    """What a variant changes in the pipeline, and under `vm` in every VM; the first one stands at the top of the summary."""
    roles: Roles = Roles()
    ladder: LadderVariants | None = None
    """The variants from which `loopfm analyze --ladder` tells what each step of the channel loses."""
    any_code: bool = False
    """Whether what other code made is kept: a long experiment goes on after a commit. The summary lists all code versions."""
    keep_data: bool = False
    """Whether latents and joined sets of a finished variant stay on disk."""
    pool: str | None = None
    """Folder of versions that several experiments share, so that an FM of the same config and data is trained once; on the file system of
    `run_dir`, and never cleared. null keeps one for this experiment alone."""
    stream: StreamConfig | None = None
    """Trains every cell on the stream of every vertical, in place of the VM window, and measures it progressively; a vertical then stands
    in the summary as a model of its own."""
    audit: AuditConfig = AuditConfig(sample=2_000)
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for role, arm in self.roles.model_dump().items():
            if arm not in self.arms:
                raise ConfigError(
                    f"roles.{role} is {arm!r}, which is not among arms {sorted(self.arms)}"
                )
        steps = self.ladder.model_dump() if self.ladder is not None else {}
        for step, variant in steps.items():
            if variant not in self.variants:
                raise ConfigError(
                    f"ladder.{step} is {variant!r}, which is not among variants {sorted(self.variants)}"
                )
        for name in (*self.models, *self.arms, *self.variants):
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(
                    f"names of models, arms and variants become file names, found {name!r}; use letters, digits,"
                    " underscores and hyphens"
                )
        for variant in self.variants:
            self.pipeline(variant)
        return self

    @property
    def root(self) -> Path:
        """The experiment's folder."""
        return Path(self.run_dir) / self.name

    @property
    def pool_dir(self) -> Path:
        """Where versions are that its variants share."""
        return self.root / "pool" if self.pool is None else Path(self.pool)

    def pipeline(self, variant: str) -> PipelineConfig:
        """Return the pipeline of one variant, with all cells as its VMs.

        Raises:
            ConfigError: the parts do not fit together; the message names the variant.
        """
        changed = dict(self.variants[variant])
        of_vms = changed.pop("vm", {})
        base: Tree = {
            name: getattr(self, name).model_dump(mode="json")
            for name in ("data", "fm", "history", "audit", "ray")
        }
        if self.stream is not None:
            base["stream"] = self.stream.model_dump(mode="json")
        unknown = sorted(set(changed).difference(base))
        if unknown:
            raise ConfigError(
                f"variants.{variant} has {unknown}, expected some of {sorted([*base, 'vm'])}"
            )
        vms = {
            cell_name(model, arm): _vm_tree(of_model, of_arm, of_vms)
            for model, of_model in self.models.items()
            for arm, of_arm in self.arms.items()
        }
        first = next(iter(self.models))
        tree = {
            **merge(base, changed),
            "name": variant,
            "run_dir": str(self.root / "variants"),
            "seeds": list(self.seeds),
            "vms": vms,
            "baseline": cell_name(first, self.roles.baseline),
            "kd": cell_name(first, self.roles.kd),
            "online": {"model": cell_name(first, self.roles.baseline)},
        }
        return validate(PipelineConfig, tree, f"variants.{variant} of experiment {self.name}")


def _vm_tree(of_model: Tree, of_arm: Tree, of_variant: Tree) -> Tree:
    tree = merge(merge(of_model, of_arm), of_variant)
    defaults = tree.pop("histories", {})
    model = tree.get("model")
    if defaults and isinstance(model, dict) and model.get("history"):
        filled = {name: merge(defaults, own) for name, own in model["history"].items()}
        tree["model"] = {**model, "history": filled}
    return tree


def cell_name(model: str, arm: str) -> str:
    """Return how the VM of one cell is called in its pipeline."""
    return f"{model}.{arm}"
