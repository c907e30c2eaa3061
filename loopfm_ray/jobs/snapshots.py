"""Make an FM and the snapshot of it, unless they are there: of the first window, and of each refresh."""

from dataclasses import asdict, dataclass

from loopfm_ray.config import config_hash
from loopfm_ray.data.split import Splits
from loopfm_ray.jobs.compress import CompressTask, compress, compress_inputs
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.train_fm import FmSettings, fm_inputs, train_fm
from loopfm_ray.store.filesystem import Location, absolute, remove_tree
from loopfm_ray.store.manifest import Manifest, code_version, read_manifest

__all__ = ["Making", "clear", "ensure_fm", "ensure_snapshots"]


@dataclass(frozen=True)
class Making:
    """One FM and its snapshot: where they lie, what they learn from, and what they go on from."""

    seed: int
    fm: Location
    snapshot: Location
    windows: Splits
    parent_fm: Location | None = None
    """The FM whose weights it begins with; None begins anew."""
    parent_snapshot: Location | None = None
    """The snapshot whose bottleneck it goes on from; None begins anew."""


def ensure_fm(context: Context, making: Making) -> Manifest:
    """Train the FM unless it is there, and return its manifest; a killed training goes on.

    Raises:
        LoopFMError: what a worker raised.
        JobError: the workers failed otherwise.
    """
    config, seed = context.config, making.seed
    prepared, max_len = absolute(config.paths.prepared), config.data.past.max_len
    settings = config_hash(*config.fm.learnt, asdict(making.windows), max_len, seed)
    inputs = fm_inputs(prepared, making.parent_fm)
    if context.find(making.fm, settings, inputs) is not None:
        return read_manifest(making.fm)
    key = f"fm-{seed}-{config_hash(settings, inputs, code_version())}"
    work, checkpoints = config.paths.work / key, config.paths.checkpoints(key)
    if context.fresh:
        clear(work, checkpoints)
    parent = None if making.parent_fm is None else absolute(making.parent_fm)
    train_fm(
        prepared,
        making.fm,
        work,
        checkpoints,
        FmSettings(config.fm, making.windows, max_len, seed, settings, parent),
        context.progress,
    )
    clear(work, checkpoints)
    return context.share(making.fm)


def ensure_snapshots(context: Context, makings: list[Making]) -> None:
    """Fit the bottlenecks of trained FMs side by side and write their snapshots, but for those that are there.

    Raises:
        LoopFMError: what a worker raised.
        JobError: the workers failed otherwise.
    """
    config, stage = context.config, context.config.fm
    prepared = absolute(config.paths.prepared)
    kept = (stage.bottleneck, stage.embedding_layers, stage.bits, stage.bottleneck_rows)
    todo = []
    for making in makings:
        settings = config_hash(*kept, asdict(making.windows), making.seed)
        parent = making.parent_snapshot
        inputs = compress_inputs(prepared, making.fm, parent)
        if context.find(making.snapshot, settings, inputs) is None:
            task = CompressTask(
                prepared,
                absolute(making.fm),
                absolute(making.snapshot),
                stage,
                making.windows,
                making.seed,
                settings,
                None if parent is None else absolute(parent),
            )
            todo.append(task)
    list(context.mapper("compress")(compress, todo))
    for task in todo:
        context.share(task.out_dir)


def clear(*places: Location) -> None:
    """Remove what a training kept while it ran."""
    for place in places:
        remove_tree(place)
