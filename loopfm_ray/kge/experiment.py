"""Experiments on knowledge graph embedding: models on graphs, each in several arms under several seeds, cell by cell.

A cell trains one model and ranks the test triples once, with the weights of its best validation MRR. Cells are named by a hash of all
that they depend on, and what is finished is kept: a killed experiment goes on, and arms share their teachers.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from safetensors.torch import load_file, save_file

from loopfm_ray.config import Config, config_hash, merge, validate
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import RayConfig
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.digest import graph_digest
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.models import AnyKgeConfig, build_kge, read_kge_config
from loopfm_ray.kge.ranking import summarize_ranks
from loopfm_ray.kge.runner import KgeRunner, LocalRunner, needs_cluster
from loopfm_ray.kge.training import KgeTrainConfig
from loopfm_ray.kge.triples import TripleSet, read_triples
from loopfm_ray.store.tables import write_text

__all__ = [
    "KgeArm",
    "KgeCell",
    "KgeExperimentConfig",
    "KgeExperimentModel",
    "KgeRoles",
    "plan_cells",
    "read_cell_record",
    "run_cell",
    "teacher_of",
    "waves",
    "write_cell_record",
]

# Any: a part of a config tree, checked when it is merged into the whole.
Tree = dict[str, Any]
_HERE = LocalRunner()
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class KgeExperimentModel(Config):
    """A backbone on a graph, with the recipe that was tuned for it without any distillation."""

    graph: str = Field(min_length=1)
    """Directory of the graph, in a layout of `triples`."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each arm is trained once for each of them."""
    backbone: Tree
    """Its `kind`, `dimension` and so on."""
    train: Tree = Field(default={})
    """How it is trained."""
    by_arm: dict[str, Tree] = Field(default={})
    """What an arm changes in `train` for this model alone."""
    wide: Tree = Field(default={})
    """What is changed in `train` at any other dimension than its own: for teachers, and arms with a `dimension`."""


class KgeArm(Config):
    """What is done with every model."""

    train: Tree = Field(default={})
    """What is changed in `train`, in general its `distillation`."""
    dimension: PositiveInt | None = None
    """Dimension of the model in this arm; null leaves its own."""
    teachers: tuple[PositiveInt, ...] = ()
    """Dimensions of a chain of teachers: the first is trained alone, each further one and the model itself learn from the one before,
    with `distillation.memory.kind: teacher`."""


class KgeRoles(Config):
    """Which arms are compared."""

    plain: str = "plain"
    """The model alone."""
    best: str = "csd"
    """The arm whose gain stands at the top of the summary."""
    wide: str | None = None
    """The plain model at a large dimension: the share of its lead that `best` recovers is told."""


class KgeExperimentConfig(Config):
    """Every model in every arm under every seed."""

    kind: Literal["kge_experiment"] = "kge_experiment"
    name: str = Field(pattern=_NAME, max_length=100)
    """Name of the experiment's folder."""
    run_dir: str = "runs"
    """Folder of all runs."""
    models: dict[str, KgeExperimentModel] = Field(min_length=1)
    arms: dict[str, KgeArm] = Field(min_length=1)
    roles: KgeRoles = KgeRoles()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for role, arm in self.roles.model_dump().items():
            if arm is not None and arm not in self.arms:
                raise ConfigError(
                    f"roles.{role} is {arm!r}, which is not among arms {sorted(self.arms)}"
                )
        for name, model in self.models.items():
            unknown = sorted(set(model.by_arm) - set(self.arms))
            if unknown:
                raise ConfigError(
                    f"models.{name}.by_arm has {unknown}, which are not among arms {sorted(self.arms)}"
                )
        for name, arm in self.arms.items():
            memory = arm.train.get("distillation", {}).get("memory", {}).get("kind")
            if bool(arm.teachers) != (memory == "teacher"):
                raise ConfigError(
                    f"arms.{name} has teachers {list(arm.teachers)} and distillation.memory.kind {memory}; a chain of teachers"
                    " goes with memory.kind teacher"
                )
        plan_cells(self)
        return self

    @property
    def root(self) -> Path:
        """The experiment's folder."""
        return Path(self.run_dir) / self.name


@dataclass(frozen=True)
class KgeCell:
    """One training."""

    model: str
    arm: str
    seed: int
    graph: Path
    backbone: AnyKgeConfig
    train: KgeTrainConfig
    first_train: KgeTrainConfig
    """Of the first of its teachers."""
    later_train: KgeTrainConfig
    """Of its further teachers."""
    teachers: tuple[int, ...]
    """Their dimensions, in the order in which they are trained."""
    root: Path
    """Folder of the records and weights of the experiment."""

    @property
    def key(self) -> str:
        """Hash of all that it depends on: the graph's content, the configs, its teacher.

        Raises:
            DataError, SchemaError: the graph can not be read.
        """
        teacher = teacher_of(self)
        return config_hash(
            _digest(self.graph),
            self.backbone,
            self.train.learnt,
            "" if teacher is None else teacher.key,
        )

    @property
    def is_spread(self) -> bool:
        """Whether its training or ranking, or that of one of its teachers, asks for workers."""
        teacher = teacher_of(self)
        return needs_cluster(self.train) or (teacher is not None and teacher.is_spread)

    @property
    def record_path(self) -> Path:
        """Where its record is, once it is finished."""
        return self.root / "cells" / f"{self.key}.json"

    @property
    def weights_path(self) -> Path:
        """Where its weights are, once it is finished."""
        return self.root / "weights" / f"{self.key}.safetensors"


def plan_cells(config: KgeExperimentConfig) -> list[KgeCell]:
    """Return the cells of an experiment, in the order of its models, arms and seeds.

    Raises:
        ConfigError: the parts of a cell do not fit together.
    """
    cells = []
    for name, model in config.models.items():
        for arm_name, arm in config.arms.items():
            where = f"model {name}, arm {arm_name} of {config.name}"
            backbone = read_kge_config(_with_dimension(model.backbone, arm.dimension))
            is_wide = arm.dimension not in (None, model.backbone.get("dimension"))
            own = merge(model.train, model.wide) if is_wide else model.train
            changed = merge(own, merge(arm.train, model.by_arm.get(arm_name, {})))
            wide = merge(model.train, model.wide)
            for seed in model.seeds:
                first, later, last = (
                    validate(KgeTrainConfig, {**tree, "seed": seed}, where)
                    for tree in (wide, merge(wide, arm.train), changed)
                )
                cells.append(
                    KgeCell(
                        model=name,
                        arm=arm_name,
                        seed=seed,
                        graph=Path(model.graph),
                        backbone=backbone,
                        train=last,
                        first_train=first,
                        later_train=later,
                        teachers=arm.teachers,
                        root=config.root,
                    )
                )
    return cells


def teacher_of(cell: KgeCell) -> KgeCell | None:
    """Return the training that a cell's model learns from; None for one that learns alone, or from its own past."""
    if not cell.teachers:
        return None
    *before, dimension = cell.teachers
    tree = _with_dimension(cell.backbone.model_dump(mode="json"), dimension)
    return replace(
        cell,
        backbone=read_kge_config(tree),
        train=cell.later_train if before else cell.first_train,
        teachers=tuple(before),
    )


def run_cell(cell: KgeCell, *, needs_weights: bool = False, runner: KgeRunner = _HERE) -> Tree:
    """Train and rank one cell, unless that is done; return its record.

    Its teacher is trained first where its weights are not there. One thread computes in each process.

    Raises:
        DataError, SchemaError: the graph can not be read.
        MetricError: the training diverges.
        StoreError: a file of the experiment is damaged.
        ConfigError: workers are asked for that `runner` has not.
    """
    found = read_cell_record(cell)
    if found is not None and (cell.weights_path.is_file() or not needs_weights):
        return found
    torch.set_num_threads(1)
    graph = read_triples(cell.graph)
    source = teacher_of(cell)
    taught_by = None if source is None else run_cell(source, needs_weights=True, runner=runner)
    teacher = None if source is None else _load_weights(source, graph)
    checkpoint = cell.root / "checkpoints" / f"{cell.key}.pt"
    trained = runner.train(graph, cell.backbone, cell.train, checkpoint, teacher=teacher)
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    ranks = runner.rank(trained.model, graph.test, known, cell.train)
    best = next(point for point in trained.curve if point.epoch == trained.best_epoch)
    record = {
        "graph": _digest(cell.graph),
        "seed": cell.seed,
        "num_parameters": sum(value.numel() for value in trained.model.parameters()),
        "valid_mrr": trained.best_mrr,
        "test": asdict(summarize_ranks(ranks, graph.has_unseen("test"))),
        "best_epoch": trained.best_epoch,
        "num_epochs": trained.num_epochs,
        "train_s": trained.curve[-1].train_s,
        "train_s_to_best": best.train_s,
        "teacher_train_s": 0.0
        if taught_by is None
        else taught_by["train_s"] + taught_by["teacher_train_s"],
        "curve": [asdict(point) for point in trained.curve],
    }
    cell.weights_path.parent.mkdir(parents=True, exist_ok=True)
    staged = cell.weights_path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in trained.model.state_dict().items()}, staged)
    staged.replace(cell.weights_path)
    write_cell_record(cell, record)
    runner.forget(checkpoint)
    return record


def read_cell_record(cell: KgeCell) -> Tree | None:
    """Return the record of a finished cell, None of one that is not finished.

    Raises:
        StoreError: the record is damaged.
    """
    path = cell.record_path
    try:
        tree: Tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and run again") from error
    return tree


@cache
def _digest(graph: Path) -> str:
    return graph_digest(read_triples(graph))


def write_cell_record(cell: KgeCell, record: Tree) -> None:
    """Write the record of a finished cell, whole or not at all."""
    cell.record_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(cell.record_path, json.dumps(record, indent=1))


def _load_weights(cell: KgeCell, graph: TripleSet) -> KgeModel:
    model = build_kge(cell.backbone, graph.num_entities, graph.num_relations)
    try:
        model.load_state_dict(load_file(cell.weights_path))
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"{cell.weights_path} can not be loaded ({error}); remove it and {cell.record_path}, and run again"
        ) from error
    return model.eval()


def _with_dimension(backbone: Tree, dimension: int | None) -> Tree:
    return backbone if dimension is None else {**backbone, "dimension": dimension}


def waves(cells: list[KgeCell]) -> Iterator[list[KgeCell]]:
    """Give the trainings of an experiment, teachers before those they teach, each training once."""
    chains: list[list[KgeCell]] = []
    for cell in cells:
        chain = [cell]
        while (source := teacher_of(chain[0])) is not None:
            chain.insert(0, source)
        chains.append(chain)
    seen: set[str] = set()
    for depth in range(max(map(len, chains))):
        wave = {chain[depth].key: chain[depth] for chain in chains if len(chain) > depth}
        todo = [cell for key, cell in wave.items() if key not in seen]
        seen.update(wave)
        if todo:
            yield todo
