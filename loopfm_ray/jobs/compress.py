"""Fit the bottleneck of a trained FM, or take the one trained along, choose its codes, measure the channel, write the snapshot."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from loopfm_ray.data.batch import Batch
from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.examples import Rows, iterate_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.data.windows import keep_learnable
from loopfm_ray.errors import DataError
from loopfm_ray.experiments import FmStageConfig
from loopfm_ray.models.bottleneck import Bottleneck, build_bottleneck
from loopfm_ray.models.channel import ChannelRows, channel_report
from loopfm_ray.models.fitting import EmbeddingChunk, calibrate, fit_bottleneck
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.train.embed import embedding_chunks
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, load_snapshot, save_snapshot
from loopfm_ray.train.weights import TrainedFm, load_fm
from loopfm_ray.types import TimeRange

__all__ = ["CompressTask", "compress", "compress_inputs", "event_embeddings"]

_BATCH_ROWS = 2048
_HELD_OUT_SHARE = 8  # every eighth chunk of embeddings calibrates the codes
_CHANNEL_ROWS = 32_768


@dataclass(frozen=True)
class CompressTask:
    """One snapshot to make of a trained FM."""

    prepared: Location
    fm: Location
    out_dir: Location
    config: FmStageConfig
    splits: Splits
    seed: int
    config_hash: str
    """Of all settings above that shape the bottleneck and its codes."""
    parent: Location | None = None
    """The snapshot whose bottleneck this one goes on from; None begins anew."""


def compress(task: CompressTask) -> str:
    """Write the snapshot of `task` and return its id.

    The bottleneck is fitted on the newest history events of the FM's window, the codes are chosen on embeddings that it
    did not see, and the channel is measured on the FM's validation rows. A bottleneck that was trained along with the FM
    is taken as it is; it saw nothing of the FM's validation window, so the codes are chosen on events of that.

    Raises:
        ConfigError: the FM has no such layers, or they are narrower than the latent.
        DataError: there are no events to fit on, or to choose the codes on.
        StoreError: the bottleneck was to be trained along with the FM, and this FM has another one or none.
    """
    set_up_process()
    torch.manual_seed(task.seed)
    data, trained = PreparedData.open(task.prepared), load_fm(task.fm)
    rows = _Embeddings(task, data, trained)
    if task.config.is_joint:
        bottleneck, code_spec = _take(task, trained, rows)
    else:
        bottleneck, code_spec = _fit(task, trained, list(rows.events(task.splits.fm)))
    channel = channel_report(bottleneck, rows.channel(), code_spec)
    layers = task.config.embedding_layers
    spec = SnapshotSpec.of(trained.spec, task.config.bottleneck, layers, code_spec)
    snapshot = Snapshot(trained.model, bottleneck, spec)
    save_snapshot(
        snapshot,
        task.out_dir,
        settings_hash=task.config_hash,
        inputs=compress_inputs(task.prepared, task.fm, task.parent),
        record={**trained.record, "channel": asdict(channel)},
        num_rows=read_manifest(task.fm).num_rows,
    )
    return snapshot.snapshot_id


def compress_inputs(prepared: Location, fm: Location, parent: Location | None) -> dict[str, str]:
    """Return the versions that a snapshot depends on."""
    inputs = {"prepared": read_manifest(prepared).version, "fm": read_manifest(fm).version}
    return inputs if parent is None else {**inputs, "parent": read_manifest(parent).version}


def event_embeddings(task: CompressTask) -> Iterator[EmbeddingChunk]:
    """Yield the FM's embeddings of the newest history events of `task.splits.fm`, whatever the FM was trained on.

    They are those of about `bottleneck_rows` rows of the log, the same ones for every FM over the same log.
    """
    rows = _Embeddings(task, PreparedData.open(task.prepared), load_fm(task.fm))
    return rows.events(task.splits.fm)


def _fit(
    task: CompressTask, trained: TrainedFm, chunks: list[EmbeddingChunk]
) -> tuple[Bottleneck, CodeSpec]:
    config = task.config
    held_out = chunks[::_HELD_OUT_SHARE]
    fitted = [chunk for index, chunk in enumerate(chunks) if index % _HELD_OUT_SHARE] or chunks
    in_dim = trained.model.embedding_dim(config.embedding_layers)
    bottleneck = build_bottleneck(config.bottleneck, in_dim)
    if task.parent is not None:
        bottleneck.load_state_dict(load_snapshot(task.parent).bottleneck.state_dict())
    fit_bottleneck(bottleneck, fitted, bits=config.bits, is_started=task.parent is not None)
    unseen = torch.cat([chunk.embedding for chunk in held_out])
    return bottleneck, calibrate(bottleneck, unseen, config.bits)


def _take(
    task: CompressTask, trained: TrainedFm, rows: "_Embeddings"
) -> tuple[Bottleneck, CodeSpec]:
    config = task.config
    bottleneck = trained.bottleneck(config.bottleneck, config.embedding_layers)
    window = task.splits.fm_valid
    unseen = [chunk.embedding for chunk in rows.events(window, _HELD_OUT_SHARE)]
    if not unseen:
        raise DataError(
            f"codes are chosen on events of the FM's validation window {window}, found none; check the split"
        )
    return bottleneck, calibrate(bottleneck, torch.cat(unseen), config.bits)


class _Embeddings:
    """The FM's embeddings of rows of its own window."""

    def __init__(self, task: CompressTask, data: PreparedData, trained: TrainedFm) -> None:
        self._task, self._data, self._trained = task, data, trained
        spec, sources = trained.spec, {}
        if spec.item_fields:
            sources["raw"] = RawHistorySource(
                data.all_events(), data.items, spec.item_fields, spec.max_len
            )
        self._collate = Collator(spec.schema, data.items, data.users, sources)
        self._columns = list(
            dict.fromkeys([*self._collate.columns, "example_id", "label_ts", "is_event", "user"])
        )

    def events(self, window: TimeRange, divisor: int = 1) -> Iterator[EmbeddingChunk]:
        """Yield the newest history events of a window, about `bottleneck_rows / divisor` rows of the log long."""
        config = self._task.config
        num_rows = self._data.examples.num_rows(window)
        share = min(1.0, config.bottleneck_rows / divisor / max(num_rows, 1))
        start_ts = window.stop_ts - max(1, round((window.stop_ts - window.start_ts) * share))
        batches = (
            self._batch({name: values[rows["is_event"]] for name, values in rows.items()})
            for rows in self._rows(TimeRange(start_ts, window.stop_ts))
            if rows["is_event"].any()
        )
        return embedding_chunks(self._trained.model, config.embedding_layers, batches)

    def channel(self) -> ChannelRows:
        """Return rows of the FM's validation window, events or not.

        The FM did not learn from them. A bottleneck that is fitted after it has met the embeddings of those that are events,
        but no label.
        """
        window = self._task.splits.fm_valid
        learnable = self._data.learnable(window, self._task.splits.fm.stop_ts)
        known = keep_learnable(self._rows(window), learnable)
        blocks = [rows for rows in known if len(rows["user"])]
        # evenly over the window, whose rows come in time order
        every = max(1, -(-len(blocks) * _BATCH_ROWS // _CHANNEL_ROWS))
        batches = [self._batch(rows) for rows in blocks[::every]]
        layers = self._task.config.embedding_layers
        chunks = list(embedding_chunks(self._trained.model, layers, batches))
        return ChannelRows(
            torch.cat([chunk.embedding for chunk in chunks]),
            torch.cat([batch.label[:, 0] for batch in batches]),
            torch.cat([chunk.target for chunk in chunks if chunk.target is not None]),
        )

    def _rows(self, window: TimeRange) -> Iterator[Rows]:
        files = self._data.examples.files(window)
        return iterate_rows(files, window, columns=self._columns, batch_rows=_BATCH_ROWS)

    def _batch(self, rows: Rows) -> Batch:
        return self._collate(rows)
