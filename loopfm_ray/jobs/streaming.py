"""Train VMs on the joined set as on a stream, several at a time: a Ray task for each VM, vertical and seed.

A task keeps its state after each chunk and every so many steps, and the predictions of each chunk; one that was killed goes on
at that row and ends in the same bits.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from loopfm_ray.analysis.cells import Cell
from loopfm_ray.analysis.progressive import measure_stream
from loopfm_ray.config import config_hash
from loopfm_ray.data.collate import Collator
from loopfm_ray.data.examples import Rows, concat_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.data.vertical import RowFilter
from loopfm_ray.distill.heads import AuxiliaryVm
from loopfm_ray.distill.stream import (
    LabelBuffer,
    StreamConfig,
    StreamTask,
    StreamWindow,
    run_stream,
)
from loopfm_ray.errors import ConfigError, LoopFMError
from loopfm_ray.experiment_grid import cell_name
from loopfm_ray.experiments import PipelineConfig, VmStageConfig
from loopfm_ray.jobs.context import Context, needed, splits_of
from loopfm_ray.jobs.evaluate import read_predictions
from loopfm_ray.jobs.stream_predictions import KEPT, make_keeper, merge_kept
from loopfm_ray.jobs.train_vm import trained_form
from loopfm_ray.jobs.training import adapter_step, file_blocks
from loopfm_ray.jobs.vm_data import VmData
from loopfm_ray.jobs.vm_inputs import vm_inputs
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.registry import build_vm
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location, absolute, remove_tree
from loopfm_ray.store.manifest import code_version, read_manifest
from loopfm_ray.store.tables import write_parquet
from loopfm_ray.train.loop import Hooks, LoopConfig
from loopfm_ray.train.optim import build_adapter_optimizer, build_optimizer
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import make_objective
from loopfm_ray.train.trained import TrainedVm, load_trained_vm, save_trained_vm
from loopfm_ray.types import TimeRange

__all__ = ["StreamJob", "predictions_file", "run_stream_stage", "stream_jobs", "stream_one"]

_STATE = "state"

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class StreamJob:
    """One VM on the stream of one vertical, as its task gets it."""

    name: str
    vertical: str
    where: Mapping[str, tuple[str, ...]]
    prepared: Location
    joined: Location
    out_dir: Location
    work: Path
    """Folder of the state and of the chunks' predictions while it runs; all workers that may take the task need it."""
    predictions: Path
    config: VmStageConfig
    window: StreamWindow
    checkpoint_steps: int
    fields: tuple[str, ...]
    raw_max_len: int
    seed: int
    config_hash: str
    inputs: Mapping[str, str]


class _Stream:
    """The data of one stream."""

    def __init__(self, job: StreamJob) -> None:
        self.job = job
        self.prepared = PreparedData.open(job.prepared)
        self.filter = RowFilter(self.prepared, job.where)
        self.schema = self._known(job.window.whole.stop_ts)
        config = job.config
        self.data = VmData(
            self.prepared,
            open_version(job.joined, "joined"),
            self.schema,
            config.model.history,
            config.needs_teacher_latent,
            job.raw_max_len,
        )
        self.sources = self.data.sources(range(self.prepared.num_buckets))
        self._last: tuple[int, Collator] | None = None

    def _known(self, ts: int) -> FeatureSchema:
        return self.prepared.schema_as_of(ts).select(self.job.fields)

    def collate(self, known_by_ts: int) -> Collator:
        """Return what makes batches with the ids that had been met by a moment; the last one is kept."""
        if self._last is None or self._last[0] != known_by_ts:
            made = self.data.collator_of(self.sources, self._known(known_by_ts))
            self._last = (known_by_ts, made)
        return self._last[1]

    def blocks(self, start_ts: int, stop_ts: int) -> Iterator[Rows]:
        """Yield the vertical's own rows from one moment to another, in order."""
        if stop_ts <= start_ts:
            return
        time_range = TimeRange(start_ts, stop_ts)
        own = self.collate(self.job.window.whole.start_ts).columns
        asked = (*KEPT, "label_ts", *self.filter.columns, *self.data.teacher_columns)
        columns = list(dict.fromkeys([*own, *asked]))
        files = self.data.requests.files(time_range)
        for rows in file_blocks(files, time_range, columns):
            kept = self.filter(rows)
            yield rows if kept.all() else {name: values[kept] for name, values in rows.items()}

    def waiting(self, ts: int) -> LabelBuffer:
        """Return the rows before a moment whose label was not known by then."""
        found = LabelBuffer()
        for rows in self.blocks(self.job.window.whole.start_ts, ts):
            late = rows["label_ts"] > ts
            if late.any():
                found.add({name: values[late] for name, values in rows.items()})
        return found


def stream_one(job: StreamJob) -> Json:
    """Run one stream from where it stands to its end, write the VM and its predictions, and return its metrics.

    Raises:
        LoopFMError: it can not be trained; the message names the VM and the vertical.
    """
    try:
        return _stream_one(job)
    except LoopFMError as error:
        raise type(error)(
            f"VM {job.name!r} of vertical {job.vertical!r}, seed {job.seed}: {error}"
        ) from error


def _stream_one(job: StreamJob) -> Json:
    set_up_process()
    started = time.perf_counter()
    stream = _Stream(job)
    torch.manual_seed(job.seed)
    data = stream.data
    model = build_vm(job.config.model, stream.schema, data.item_fields, data.latent_dim)
    trained = trained_form(model, job.config, data)
    learning = job.config.learning
    loop = LoopConfig(
        batch_rows=learning.batch_rows,
        optim=learning.optim,
        log_every=1000,
        checkpoint_every=job.checkpoint_steps,
    )
    state = TrainState(
        trained,
        build_optimizer(loop.optim, trained),
        adapter_optimizer=build_adapter_optimizer(trained),
    )
    job.work.mkdir(parents=True, exist_ok=True)
    if (job.work / _STATE).exists():
        load_state(state, job.work / _STATE)
    fitnets = job.config.fitnets
    auxiliary = trained if isinstance(trained, AuxiliaryVm) else None
    task = StreamTask(
        state=state,
        objective=make_objective(
            trained,
            kd_weight=job.config.kd_weight,
            hint_weight=fitnets.weight if fitnets is not None else 0.0,
            auxiliary=auxiliary,
        ),
        window=job.window,
        loop=loop,
        hooks=Hooks(
            on_checkpoint=lambda now: save_state(now, job.work / _STATE),
            before_step=adapter_step(state),
        ),
        collate=stream.collate,
        keep=make_keeper(job.work, data.schema.tasks),
        seed=job.seed,
    )
    whole, chunk = job.window.whole, state.counters.chunk
    if chunk < job.window.num_chunks:
        at_ts = job.window.chunk(chunk).start_ts
        run_stream(task, stream.blocks(at_ts, whole.stop_ts), stream.waiting(at_ts))
    rows = _kept_rows(job)
    record = measure_stream(rows, job.window.measure_from_ts, data.schema.tasks[1:])
    write_parquet(pa.table(dict(rows)), job.predictions)
    save_trained_vm(
        job.out_dir,
        TrainedVm(
            model,
            job.config.model,
            stream.schema,
            data.item_fields,
            data.latent_dim,
            PlattScaling(1.0, 0.0),  # a stream serves what it predicts
            {
                **record,
                "train_rows_per_s": state.counters.num_rows / (time.perf_counter() - started),
            },
        ),
        config_hash=job.config_hash,
        inputs=job.inputs,
        num_rows=state.counters.num_rows,
    )
    return record


def _kept_rows(job: StreamJob) -> Rows:
    rows = merge_kept(job.work)
    if rows is None:
        raise ConfigError(
            f"the vertical has no rows in the stream (stream.verticals.{job.vertical} is"
            f" {dict(job.where)}); widen it or take it out"
        )
    return rows


def predictions_file(config: PipelineConfig, seed: int, vertical: str, name: str) -> Path:
    """Return where the progressive predictions of one stream are kept."""
    return config.paths.seed(seed) / "stream" / vertical / f"{name}.parquet"


def stream_jobs(config: PipelineConfig) -> list[StreamJob]:
    """Return the stream of every VM on every vertical under every seed.

    Raises:
        ConfigError: the run has no stream, or names a VM or a vertical that is not there.
    """
    stream = _stream(config)
    data, splits = PreparedData.open(config.paths.prepared), splits_of(config)
    for where in stream.verticals.values():
        RowFilter(data, where)  # what is not in the log is told before anything runs
    fields = tuple(field.name for field in config.data.vm_schema(data.schema).fields)
    window = stream.window(splits)
    jobs = []
    for seed in config.seeds:
        joined = needed(config.paths.joined(seed), "join")
        for vertical, where in stream.verticals.items():
            for name in stream.vms or config.vms:
                stage = config.vms[name]
                settings = config_hash(
                    stage, asdict(window), dict(where), fields, config.data.past.max_len, seed
                )
                inputs = vm_inputs(config, stage, seed, data.manifest, joined)
                # the FM is measured on the same rows, whatever the VM reads
                inputs["fm"] = joined.meta["latents_version"]
                jobs.append(
                    StreamJob(
                        name=name,
                        vertical=vertical,
                        where=where,
                        prepared=absolute(config.paths.prepared),
                        joined=absolute(config.paths.joined(seed)),
                        out_dir=absolute(config.paths.stream(seed, vertical, name)),
                        work=_work(config, settings, inputs),
                        predictions=predictions_file(config, seed, vertical, name).absolute(),
                        config=stage,
                        window=window,
                        checkpoint_steps=stream.checkpoint_steps,
                        fields=fields,
                        raw_max_len=config.data.past.max_len,
                        seed=seed,
                        config_hash=settings,
                        inputs=inputs,
                    )
                )
    return jobs


def _stream(config: PipelineConfig) -> StreamConfig:
    if config.stream is None:
        raise ConfigError("the config has no stream; add one, `stream: {}` takes the defaults")
    return config.stream


def _work(config: PipelineConfig, settings: str, inputs: Mapping[str, str]) -> Path:
    """Return a folder that no stream of other settings, inputs or code goes on in."""
    key = config_hash(settings, dict(inputs), code_version())
    return (config.paths.work / f"stream-{key}").absolute()


def run_stream_stage(context: Context) -> Json:
    """Train every VM of the stream, several side by side, and return their progressive metrics.

    Returns:
        by `seed=N`, vertical and VM the `test`, `valid` and `fm` parts of `measure_stream`.

    Raises:
        ConfigError: the stream does not fit the log.
        LoopFMError: what a task raised.
    """
    config = context.config
    jobs = stream_jobs(config)
    todo = [job for job in jobs if not _is_done(context, job)]
    if context.fresh:
        for job in todo:
            shutil.rmtree(job.work, ignore_errors=True)
    for job, _ in zip(todo, context.mapper("stream", writes=True)(stream_one, todo), strict=True):
        remove_tree(job.work)
    result: Json = {}
    for job in jobs:
        record = _record(job.out_dir)
        record.pop("chunks")
        result.setdefault(f"seed={job.seed}", {}).setdefault(job.vertical, {})[job.name] = record
    return result


def stream_cells(
    config: PipelineConfig, variant: str, models: Sequence[str], arms: Sequence[str]
) -> list[Cell]:
    """Return the cells of an experiment's variant: every vertical in every arm, under the name of the vertical.

    Several models are told apart as `vertical-model`.
    """
    cells = []
    for vertical in _stream(config).verticals:
        for model in models:
            for arm in arms:
                name = cell_name(model, arm)
                records = [_cell_record(config, seed, vertical, name) for seed in config.seeds]
                shown = vertical if len(models) == 1 else f"{vertical}-{model}"
                fm = tuple({"seed": one["seed"], "test": one["fm"]} for one in records)
                cells.append(Cell(variant, shown, arm, tuple(records), fm, has_own_fm=True))
    return cells


def _cell_record(config: PipelineConfig, seed: int, vertical: str, name: str) -> Json:
    location = config.paths.stream(seed, vertical, name)
    manifest, record = read_manifest(location), _record(location)
    return {
        **{part: record[part] for part in ("test", "valid", "fm", "tasks", "train_rows_per_s")},
        "seed": seed,
        "num_parameters": manifest.meta["num_parameters"],
    }


def stream_fm(config: PipelineConfig) -> Json:
    """Return the FM's progressive test metrics by seed, on the rows of all verticals, each row once."""
    stream = _stream(config)
    from_ts = stream.window(splits_of(config)).measure_from_ts
    name = next(iter(stream.vms or config.vms))
    per_seed = {}
    for seed in config.seeds:
        files = [predictions_file(config, seed, vertical, name) for vertical in stream.verticals]
        rows = concat_rows([read_predictions(path) for path in files])
        _, once = np.unique(rows["example_id"], return_index=True)
        rows = {name: values[once] for name, values in rows.items()}
        per_seed[str(seed)] = measure_stream(rows, from_ts)["fm"]
    manifest = read_manifest(config.paths.snapshot(config.seeds[0]))
    record = manifest.meta["record"]
    return {
        "num_parameters": record["num_parameters"],
        "per_seed": per_seed,
        "train_rows_per_s": record["rows_per_s"],
        "train_s": record["train_s"],
    }


def _is_done(context: Context, job: StreamJob) -> bool:
    """Return whether a stream is finished: its VM and its predictions are there."""
    found = context.current(job.out_dir, job.config_hash, job.inputs)
    return found is not None and job.predictions.is_file()


def _record(location: Location) -> Json:
    """Return what `measure_stream` found for a finished stream, and the speed of its training."""
    return dict(load_trained_vm(location).record)
