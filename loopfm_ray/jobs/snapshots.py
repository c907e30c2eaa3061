"""Make FMs and the snapshots of them, unless they are there: of the first window, and of each refresh."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loopfm_ray.config import config_hash
from loopfm_ray.data.split import Splits
from loopfm_ray.jobs.compress import CompressTask, compress, compress_inputs
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.train_fm import FmSettings, FmTraining, fm_inputs, train_fms
from loopfm_ray.store.filesystem import Location, absolute, remove_tree
from loopfm_ray.store.manifest import Manifest, code_version

__all__ = ["Making", "clear", "ensure_fms", "ensure_snapshots"]


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


def ensure_fms(context: Context, makings: Sequence[Making]) -> list[Manifest]:
    """Train the FMs that are not there, in one run, and return the manifests of all; a killed run goes on.

    Args:
        context: of the run.
        makings: parents before those that begin with their weights.

    Raises:
        LoopFMError: what a worker raised.
        JobError: the workers failed otherwise.
    """
    config = context.config
    prepared, max_len = absolute(config.paths.prepared), config.data.past.max_len
    hashes = [
        config_hash(*config.fm.learnt, asdict(one.windows), max_len, one.seed) for one in makings
    ]
    todo: list[FmTraining] = []
    for one, settings in zip(makings, hashes, strict=True):
        parent = None if one.parent_fm is None else absolute(one.parent_fm)
        begins_with_new = any(training.out_dir == one.parent_fm for training in todo)
        # the version of a parent that is still to be trained is not known, and so not whether this one is there
        if begins_with_new or (
            context.find(one.fm, settings, fm_inputs(prepared, one.parent_fm)) is None
        ):
            shaped = FmSettings(config.fm, one.windows, max_len, one.seed, settings, parent)
            todo.append(FmTraining(one.fm, shaped))
    if todo:
        key = f"fms-{config_hash(*hashes, fm_inputs(prepared, None), code_version())}"
        work, checkpoints = config.paths.work / key, config.paths.checkpoints(key)
        if context.fresh:
            clear(work, checkpoints)
        reads_files = config.ray.fm_reader == "files"
        train_fms(prepared, todo, work, checkpoints, context.progress, reads_files=reads_files)
        clear(work, checkpoints)
    # all of them: a killed run did not come to it
    return [context.share(one.fm) for one in makings]


def ensure_snapshots(context: Context, makings: Sequence[Making]) -> None:
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
