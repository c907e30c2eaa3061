"""Turn a log into a prepared version: ids, tables, history events and examples with features from the past.

Two passes. The first goes through the log period by period in time order, gives ids, draws negatives and spills rows by
bucket of users. The second does each bucket on its own (`prepare_bucket`) and may run in other processes. Memory holds
one block, one period or one bucket, and the vocabularies. The same input gives the same bytes.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.config import config_hash
from loopfm_ray.data.bucket import BucketTask, prepare_bucket
from loopfm_ray.data.config import DataConfig
from loopfm_ray.data.encode import EncodedPeriod, RowEncoder
from loopfm_ray.data.entities import EntityBuilder, Standard
from loopfm_ray.data.events import iterate_periods
from loopfm_ray.data.log import EventLog, open_log
from loopfm_ray.data.past import past_names
from loopfm_ray.data.runs import runs
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.data.vocabulary import VocabularyBuilder
from loopfm_ray.errors import ConfigError
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, stage

__all__ = ["Mapper", "prepare", "serial", "write_prepared"]

T = TypeVar("T")
R = TypeVar("R")
_log = logging.getLogger(__name__)


class Mapper(Protocol):
    """Applies a picklable function to each task, in order; `serial`, or one that uses other processes."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
        """Yield `function(task)` for each of `tasks`, in order."""
        ...


def serial(function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
    """Apply `function` to each of `tasks` in this process."""
    return map(function, tasks)


def prepare(
    config: DataConfig, out_dir: Location, *, mapper: Mapper = serial, replace_other: bool = False
) -> Manifest:
    """Prepare the data of `config` as a version at `out_dir`.

    Args:
        config: which data, and how it is split and derived.
        out_dir: directory or `s3://` address where the version is to be; it must not hold another one unless `replace_other`.
        mapper: applies `prepare_bucket` to the buckets.
        replace_other: whether another version at `out_dir` gives way.

    Raises:
        ConfigError: the data is not there, or the split does not fit it.
        SchemaError, DataError: the data is wrong; the message says where.
        StoreError: `out_dir` holds something else.
    """
    with stage(out_dir) as staged:
        meta, num_examples = write_prepared(config, staged, mapper)
        return commit(
            staged,
            kind="prepared",
            config_hash=config_hash(config),
            inputs={},
            meta=meta,
            num_rows=num_examples,
            replace_other=replace_other,
        )


def write_prepared(
    config: DataConfig, out_dir: Path, mapper: Mapper = serial
) -> tuple[dict[str, Any], int]:
    """Write all files of a prepared version into `out_dir`; return the meta of its manifest and the examples."""
    log = open_log(config)
    encoder = RowEncoder(config, log)
    spill = out_dir / "_spill"
    buckets = _first_pass(config, log, encoder, spill)
    splits = config.split.ranges(encoder.min_ts, encoder.max_ts)
    _log.info(
        "read %d rows of %d users and %d items; %d examples",
        encoder.counts["rows"],
        len(encoder.users.vocabulary),
        len(encoder.items.vocabulary),
        encoder.num_examples,
    )
    fm_stop_ts = splits.fm.stop_ts
    standards = {
        Side.USER: encoder.users.standards(fm_stop_ts),
        Side.ITEM: encoder.items.standards(fm_stop_ts),
        Side.CONTEXT: encoder.numeric_standards(),
    }
    _write_entities(encoder.users, standards[Side.USER], out_dir / "users.parquet")
    _write_entities(encoder.items, standards[Side.ITEM], out_dir / "items.parquet")
    for name, vocabulary in _vocabularies(encoder).items():
        path = out_dir / "vocab" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        vocabulary.build().write(path)
    schema = _schema(config, log, encoder, standards)
    _check_names(config, schema)
    (out_dir / "schema.json").write_text(schema.to_json(), encoding="utf-8")

    tasks = [
        BucketTask(
            bucket=bucket,
            spill=file,
            out_dir=out_dir,
            origin_ts=config.period_origin_ts,
            period_us=config.period_us,
            count_fields=config.past.count_fields,
            recency=config.past.recency,
            max_len=config.past.max_len,
            are_events_positives=config.history_events == "positives",
            numeric=tuple(standards[Side.CONTEXT].items()),
        )
        for bucket, file in sorted(buckets.items())
    ]
    results = list(mapper(prepare_bucket, tasks))
    shutil.rmtree(spill)
    num_events = sum(result.num_events for result in results)
    return _meta(config, encoder, num_events), encoder.num_examples


def _first_pass(
    config: DataConfig, log: EventLog, encoder: RowEncoder, spill: Path
) -> dict[int, Path]:
    """Encode the log period by period and spill it by bucket; return the file of each bucket that has rows."""
    periods = iterate_periods(
        log.blocks(),
        spill / "periods",
        origin_ts=config.period_origin_ts,
        period_us=config.period_us,
        drop_duplicates=config.duplicates == "drop",
    )
    files: dict[int, Path] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[int, Any] = {}
        for period in periods:
            encoded = encoder.encode(period)
            for bucket, piece in _by_bucket(encoded):
                if bucket not in writers:
                    files[bucket] = spill / f"bucket={bucket:03d}.arrow"
                    sink = stack.enter_context(pa.OSFile(str(files[bucket]), "wb"))
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(sink, piece.schema))
                writers[bucket].write_table(piece)
    return files


def _by_bucket(encoded: EncodedPeriod) -> Iterator[tuple[int, Any]]:
    order = np.argsort(encoded.bucket, kind="stable")
    rows = encoded.rows.take(pa.array(order))
    for value, start, stop in runs(encoded.bucket[order]):
        yield value, rows.slice(start, stop - start)


def _write_entities(builder: EntityBuilder, standards: dict[str, Standard], path: Path) -> None:
    columns: dict[str, Any] = {**builder.ids(), **builder.numeric(standards)}
    if not columns:  # keep the number of entities even where there are no fields
        columns = {"_row": np.arange(len(builder.vocabulary) + 1, dtype=np.int32)}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _vocabularies(encoder: RowEncoder) -> dict[str, VocabularyBuilder]:
    return {
        "user": encoder.users.vocabulary,
        "item": encoder.items.vocabulary,
        **encoder.users.fields,
        **encoder.items.fields,
        **encoder.context,
        **encoder.sequences,
    }


def _schema(
    config: DataConfig,
    log: EventLog,
    encoder: RowEncoder,
    standards: dict[Side, dict[str, Standard]],
) -> FeatureSchema:
    sizes = {name: len(builder) + 1 for name, builder in _vocabularies(encoder).items()}
    sides = {Side.USER: encoder.users.fields, Side.ITEM: encoder.items.fields}
    fields = [
        Field("user", Side.USER, Kind.CATEGORICAL, sizes["user"]),
        Field("item", Side.ITEM, Kind.CATEGORICAL, sizes["item"]),
    ]
    for side, categorical in [*sides.items(), (Side.CONTEXT, encoder.context)]:
        fields += [Field(name, side, Kind.CATEGORICAL, sizes[name]) for name in categorical]
        fields += [
            Field(name, side, Kind.NUMERIC, mean=mean, std=std)
            for name, (mean, std) in standards[side].items()
        ]
    fields += [Field(name, Side.CONTEXT, Kind.SEQUENCE, sizes[name]) for name in encoder.sequences]
    fields += [
        Field(name, Side.PAST, Kind.NUMERIC)
        for name in past_names(config.past.count_fields, config.past.recency)
    ]
    return FeatureSchema(tuple(fields), ("label", *log.fields.tasks))


def _check_names(config: DataConfig, schema: FeatureSchema) -> None:
    known = [field.name for field in schema.fields]
    unknown = sorted(set(config.vm_fields or ()).difference(known))
    if unknown:
        raise ConfigError(f"data.vm_fields {unknown} are no fields of the data; it has {known}")
    categorical = [field.name for field in schema.categorical]
    if config.vertical is not None and config.vertical not in categorical:
        raise ConfigError(
            f"data.vertical must be a categorical field, found {config.vertical!r}; the data has {categorical}"
        )


def _meta(config: DataConfig, encoder: RowEncoder, num_events: int) -> dict[str, Any]:
    return {
        "num_buckets": config.num_buckets,
        "period_us": config.period_us,
        "period_origin_ts": config.period_origin_ts,
        "min_ts": encoder.min_ts,
        "max_ts": encoder.max_ts,
        "num_users": len(encoder.users.vocabulary),
        "num_items": len(encoder.items.vocabulary),
        "num_events": num_events,
        "num_examples": encoder.num_examples,
        "history_events": config.history_events,
        "raw_max_len": config.past.max_len,
        "counts": {
            **encoder.counts,
            "users_without_row": encoder.users.num_missing,
            "items_without_row": encoder.items.num_missing,
        },
    }
