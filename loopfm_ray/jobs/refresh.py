"""Latents of several FM snapshots in one version: each event is embedded by the newest one that was trained before it.

The first snapshot gives the codes and the space. From the moment of each refresh on, the latents of the newer snapshot are
taken, mapped into the first one's space if `fm.refresh.align` says so, and stored in its codes. The teacher predictions are
those of the first one, which then embeds everything, or of each row those of the snapshot that embeds it, and then each
example goes through an FM once (`fm.refresh.teacher`). `records/refresh.json` tells how far each space is from the first, on events before the
refresh that both embedded for the purpose.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.analysis.alignment import ALIGNMENTS, Alignment
from loopfm_ray.analysis.drift import fit_alignments, measure_drift
from loopfm_ray.config import config_hash
from loopfm_ray.data.examples import concat_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits, format_ts
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import PipelineConfig, RefreshConfig, RunPaths
from loopfm_ray.jobs.compress import CompressTask, event_embeddings
from loopfm_ray.jobs.context import Context, splits_of
from loopfm_ray.jobs.materialize import Request, materialize_all
from loopfm_ray.jobs.snapshots import Making, ensure_fms, ensure_snapshots
from loopfm_ray.store.codes import CodeSpec, decode
from loopfm_ray.store.filesystem import Location, absolute
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import prob_column
from loopfm_ray.store.shards import Place
from loopfm_ray.store.space import Space
from loopfm_ray.store.tables import code_bytes, write_text
from loopfm_ray.store.teachers import Teacher
from loopfm_ray.train.snapshot import load_snapshot
from loopfm_ray.types import MICROS_PER_S, TimeRange

__all__ = ["SpliceTask", "plan_generations", "refreshed_latents", "splice_bucket"]

_PROBE_ROWS = 65_536
_HELD_OUT = 5
_COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event", "fm_prob")
"""What is spliced, beside the predictions of further tasks."""

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class _Generation:
    """One snapshot and what it embedded."""

    from_ts: int
    """Its first event."""
    fm: Location
    snapshot: Location
    latents: Location


@dataclass(frozen=True)
class _Newer:
    """The latents that take over from a moment on."""

    from_ts: int
    latents: Location
    align: Alignment


@dataclass(frozen=True)
class SpliceTask:
    """One bucket of a version that is put together."""

    base: Location
    newer: tuple[_Newer, ...]
    """In the order of their moments."""
    writer: LatentsWriter
    bucket: int
    periods: tuple[int, ...]
    teacher: str = "first"
    """Whose rows and predictions they are: the first snapshot's, or of each row those of the one that embedded it."""


def plan_generations(refresh: RefreshConfig, splits: Splits) -> list[tuple[int, Splits]]:
    """Return when each later snapshot takes over, and the windows that it learns from.

    With a warm start a snapshot learns from all that the one before has not learnt from, what that was validated on
    included.

    Raises:
        ConfigError: one lies outside of the time that is embedded, or has nothing to learn from.
    """
    moments = refresh.moments(splits)
    first, stop = splits.fm.stop_ts, splits.test.stop_ts
    if not moments or moments[0] <= first or moments[-1] >= stop:
        raise ConfigError(
            f"fm.refresh.at must lie between data.split.fm_stop ({format_ts(first)}) and the end of the test window"
            f" ({format_ts(stop)}), found {[format_ts(ts) for ts in moments]}"
        )
    valid_us = splits.fm_valid.stop_ts - splits.fm_valid.start_ts
    if refresh.valid_s is not None:
        valid_us = refresh.valid_s * MICROS_PER_S
    planned, learnt_ts = [], splits.fm_train.stop_ts
    for from_ts in moments:
        start_ts = learnt_ts if refresh.warm_start else splits.fm.start_ts
        stop_ts = from_ts - refresh.delay_s * MICROS_PER_S
        if stop_ts - valid_us <= start_ts:
            raise ConfigError(
                f"the refresh at {format_ts(from_ts)} has nothing to learn from: it may learn until {format_ts(stop_ts)}, of which the"
                f" last {valid_us / 1e6:.0f} s are for validation, and the snapshot before has learnt from what came"
                f" before {format_ts(start_ts)}; refresh later, or lower fm.refresh.delay_s or valid_s"
            )
        planned.append((from_ts, _windows(splits, start_ts, stop_ts, valid_us)))
        learnt_ts = stop_ts - valid_us
    return planned


def refreshed_latents(context: Context) -> list[Manifest]:
    """Train and compress the later snapshots, embed with each, and write the latents of all as one version for each seed.

    What is there already is kept, stage by stage; a killed run goes on. The FMs of all seeds are trained in one run of Ray
    Train, and all snapshots embed in one job.

    Raises:
        ConfigError: a refresh does not fit the log or the split.
        LoopFMError: what a worker raised.
        JobError: the workers failed otherwise.
    """
    config, splits = context.config, splits_of(context.config)
    refresh = config.fm.refresh
    if refresh is None:
        raise ConfigError("fm.refresh is null: there are no later snapshots")
    planned = plan_generations(refresh, splits)
    is_newest = refresh.teacher == "newest"
    moments = [splits.fm.stop_ts, *(from_ts for from_ts, _ in planned)]
    by_seed = {
        seed: _generations(config.paths, seed, moments, "scored" if is_newest else "latents")
        for seed in config.seeds
    }
    later = {
        seed: _makings(refresh, seed, generations, [windows for _, windows in planned])
        for seed, generations in by_seed.items()
    }
    ensure_fms(context, [making for makings in later.values() for making in makings])
    # each snapshot may go on from the one before
    for same_moment in zip(*later.values(), strict=True):
        ensure_snapshots(context, same_moment)
    _embed(context, by_seed, is_newest=is_newest)
    return [_splice(context, seed, one, splits) for seed, one in by_seed.items()]


def _generations(
    paths: RunPaths, seed: int, moments: Sequence[int], part: str
) -> list[_Generation]:
    """Return where the snapshots of a seed lie, and what each embeds."""
    first = _Generation(
        moments[0], paths.fm(seed), paths.snapshot(seed), paths.generation(seed, 0, part)
    )
    later = [
        _Generation(
            from_ts, *(paths.generation(seed, number, name) for name in ("fm", "snapshot", part))
        )
        for number, from_ts in enumerate(moments[1:], 1)
    ]
    return [first, *later]


def _makings(
    refresh: RefreshConfig,
    seed: int,
    generations: Sequence[_Generation],
    windows: Sequence[Splits],
) -> list[Making]:
    """Return the later FMs and snapshots of a seed, each with what it goes on from."""
    return [
        Making(
            seed,
            one.fm,
            one.snapshot,
            learns_from,
            *((before.fm, before.snapshot) if refresh.warm_start else (None, None)),
        )
        for before, one, learns_from in zip(generations[:-1], generations[1:], windows, strict=True)
    ]


def _windows(splits: Splits, start_ts: int, stop_ts: int, valid_us: int) -> Splits:
    """Return the windows of an FM that learns from `start_ts` to `stop_ts`, the last `valid_us` for validation."""
    return replace(
        splits,
        fm=TimeRange(start_ts, stop_ts),
        fm_train=TimeRange(start_ts, stop_ts - valid_us),
        fm_valid=TimeRange(stop_ts - valid_us, stop_ts),
    )


def _embed(
    context: Context, by_seed: Mapping[int, Sequence[_Generation]], *, is_newest: bool
) -> None:
    """Embed with every snapshot; with one teacher a row, each example goes through an FM once."""
    config = context.config
    stop_ts = PreparedData.open(config.paths.prepared).log_range[1] + 1
    requests = []
    for seed, generations in by_seed.items():
        stops = [*(one.from_ts for one in generations[1:]), stop_ts]
        for one, until_ts in zip(generations, stops, strict=True):
            only = TimeRange(one.from_ts, until_ts) if is_newest else None
            scope = context.scope(seed, only=only)
            requests.append(Request(one.snapshot, one.latents, scope))
    materialize_all(
        config.paths.prepared,
        requests,
        delay_us=config.history.delay_us,
        num_workers=config.ray.parallel_tasks,
        progress=context.progress,
    )


def _splice(
    context: Context, seed: int, generations: Sequence[_Generation], splits: Splits
) -> Manifest:
    config, first = context.config, generations[0]
    base = read_manifest(first.latents)
    space = Space.of_meta(base.meta)
    contents = [read_manifest(one.latents).content for one in generations]
    snapshots = [read_manifest(one.snapshot).meta["snapshot_id"] for one in generations]
    moments = [one.from_ts for one in generations]
    refresh = config.fm.refresh
    align, teacher = ("none", "first") if refresh is None else (refresh.align, refresh.teacher)
    teachers = [_teacher(one) for one in generations]
    writer = LatentsWriter(
        final_dir=absolute(config.paths.latents(seed)),
        snapshot_id=config_hash(snapshots, moments, align, teacher),
        trained_until_ts=base.meta["trained_until_ts"],
        spec=space.code_spec,
        delay_us=space.delay_us,
        waits_for_label=space.waits_for_label,
        inputs={
            "prepared": read_manifest(config.paths.prepared).version,
            **{f"latents_{number}": content for number, content in enumerate(contents)},
        },
        scratch=config.scratch(seed),
        period_us=base.meta["period_us"],
        period_origin_ts=base.meta["period_origin_ts"],
        teachers=tuple(teachers if teacher == "newest" else teachers[:1]),
        tasks=tuple(base.meta.get("tasks", ())),
    )
    readers = [LatentsReader(one.latents) for one in generations]
    places: list[Place] = sorted({place for reader in readers for place in reader.shards})
    finished = writer.begin(places)
    if finished is not None:
        return finished
    newer, record = _maps(config, seed, generations, splits)
    tasks = [
        SpliceTask(
            absolute(first.latents),
            tuple(newer),
            writer,
            bucket,
            tuple(period for period, other in places if other == bucket),
            teacher,
        )
        for bucket in sorted({bucket for _, bucket in places})
    ]
    list(context.mapper("materialize", writes=True)(splice_bucket, tasks))
    record["num_scored"] = [read_manifest(one.latents).num_rows for one in generations]
    write_text(config.paths.records / f"refresh-{seed}.json", json.dumps(record, indent=1))
    manifest = writer.finish(
        places,
        watermark_ts=base.meta["watermark_ts"],
        kept_from_ts=base.meta["kept_from_ts"],
        replace_other=True,
    )
    if teacher == "newest" and sum(record["num_scored"]) != manifest.num_rows:
        raise AssertionError(
            f"{record['num_scored']} rows were scored, the version has {manifest.num_rows}"
        )
    return manifest


def _maps(
    config: PipelineConfig, seed: int, generations: Sequence[_Generation], splits: Splits
) -> tuple[list[_Newer], Json]:
    """Return what takes over when, and how far each space is from the first."""
    chosen = "none" if config.fm.refresh is None else config.fm.refresh.align
    newer: list[_Newer] = []
    told: list[Json] = []
    for one in generations[1:]:
        valid_us = splits.fm_valid.stop_ts - splits.fm_valid.start_ts
        windows = _windows(splits, splits.fm.start_ts, one.from_ts, valid_us)
        old, new = (_probe(config, seed, each, windows) for each in (generations[0], one))
        # every fifth event measures the maps: the events of a user say nothing of the map that others do not
        is_held_out = np.arange(len(old)) % _HELD_OUT == 0
        maps = fit_alignments(new, old, is_held_out)
        newer.append(_Newer(one.from_ts, absolute(one.latents), maps[chosen][0]))
        told.append(
            {
                "from_ts": one.from_ts,
                "num_events": len(old),
                "space": asdict(measure_drift(new, old)),
                "explained": {kind: maps[kind][1] for kind in ALIGNMENTS},
            }
        )
    return newer, {"align": chosen, "generations": told}


def _probe(
    config: PipelineConfig, seed: int, one: _Generation, windows: Splits
) -> NDArray[np.float64]:
    """Return the latents of the newest events of a window by one snapshot."""
    stage = config.fm.model_copy(update={"bottleneck_rows": _PROBE_ROWS})
    task = CompressTask(
        absolute(config.paths.prepared),
        absolute(one.fm),
        absolute(one.snapshot),
        stage,
        windows,
        seed,
        "",
    )
    bottleneck = load_snapshot(one.snapshot).bottleneck
    with torch.no_grad():
        parts = [bottleneck.encode(chunk.embedding).numpy() for chunk in event_embeddings(task)]
    return np.concatenate(parts).astype(np.float64)


def splice_bucket(task: SpliceTask) -> int:
    """Write the shards of one bucket: the first snapshot's, with the latents of later ones from their moments on.

    Returns:
        how many events a later snapshot embedded.
    """
    if task.teacher == "newest":
        return _splice_scored(task)
    base = LatentsReader(task.base)
    others = [LatentsReader(one.latents) for one in task.newer]
    num_replaced = 0
    for period in task.periods:
        if task.writer.completed(period, task.bucket) is not None:
            continue
        names = _names(base)
        table = base.read_bucket(task.bucket, columns=[*names, "code"], periods=[period])
        rows = {name: table.column(name).to_numpy() for name in names}
        latents = decode(code_bytes(table.column("code")), base.spec)
        generation = np.searchsorted([one.from_ts for one in task.newer], rows["event_ts"], "right")
        for number in np.unique(generation[generation > 0]):
            mine = np.flatnonzero(generation == number)
            reader, align = others[number - 1], task.newer[number - 1].align
            latents[mine] = align(
                _latents_of(reader, task.bucket, period, rows["example_id"][mine])
            )
            num_replaced += len(mine)
        task.writer.write(period, task.bucket, rows, latents)
    return num_replaced


def _splice_scored(task: SpliceTask) -> int:
    """Write the shards of one bucket of which each snapshot embedded and scored the rows of its own time alone."""
    parts: list[tuple[LatentsReader, Alignment | None]] = [(LatentsReader(task.base), None)]
    parts += [(LatentsReader(one.latents), one.align) for one in task.newer]
    num_later = 0
    for period in task.periods:
        if task.writer.completed(period, task.bucket) is not None:
            continue
        rows, latents = [], []
        for reader, align in parts:
            if (period, task.bucket) not in reader.shards:
                continue
            names = _names(reader)
            table = reader.read_bucket(task.bucket, columns=[*names, "code"], periods=[period])
            found = decode(code_bytes(table.column("code")), reader.spec)
            latents.append(found if align is None else align(found))
            rows.append({name: table.column(name).to_numpy() for name in names})
            num_later += 0 if align is None else len(found)
        task.writer.write(period, task.bucket, concat_rows(rows), np.concatenate(latents))
    return num_later


def _names(reader: LatentsReader) -> list[str]:
    return [*_COLUMNS, *map(prob_column, reader.tasks)]


def _teacher(one: _Generation) -> Teacher:
    meta = read_manifest(one.snapshot).meta
    return Teacher(meta["snapshot_id"], meta["trained_until_ts"], one.from_ts)


def _latents_of(
    reader: LatentsReader, bucket: int, period: int, example_id: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return [N, d] the latents of these examples of one shard."""
    table = reader.read_bucket(bucket, columns=["example_id", "code"], periods=[period])
    there = table.column("example_id").to_numpy()
    order = np.argsort(there)
    place = order[np.searchsorted(there, example_id, sorter=order).clip(max=len(there) - 1)]
    if not np.array_equal(there[place], example_id):
        raise AssertionError(f"period {period} of bucket {bucket} lacks events that both embed")
    spec: CodeSpec = reader.spec
    return decode(code_bytes(table.column("code"))[place], spec)
