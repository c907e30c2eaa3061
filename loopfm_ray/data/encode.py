"""The first pass over a log: rows of one period in, rows of ids out, with negatives and example ids.

Ids are given by first appearance in time, so nothing that comes later changes what was written.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.config import BaseDataConfig
from loopfm_ray.data.derive import derive_columns
from loopfm_ray.data.entities import EntityBuilder, Standard
from loopfm_ray.data.events import PeriodRows
from loopfm_ray.data.log import EventLog
from loopfm_ray.data.negatives import sample_negatives
from loopfm_ray.data.vocabulary import VocabularyBuilder
from loopfm_ray.types import MICROS_PER_S

__all__ = ["EncodedPeriod", "RowEncoder"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EncodedPeriod:
    """Rows of one period with ids, in example order, and the bucket of each row."""

    # Any: pyarrow ships no types.
    rows: Any
    bucket: NDArray[np.int16]


@dataclass
class _Moments:
    """Count, mean and sum of squared differences, added to period by period."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        if not len(values):
            return
        num, mean = len(values), float(values.mean())
        total, shift = self.num + num, mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + shift**2 * self.num * num / total
        self.mean += shift * num / total
        self.num = total

    def standard(self) -> Standard:
        std = float(np.sqrt(self.squares / self.num)) if self.num else 1.0
        return self.mean, std if std > 1e-12 * max(1.0, abs(self.mean)) else 1.0


class RowEncoder:
    """Holds what grows over the log: vocabularies, entity tables, moments, counts and the next example id."""

    def __init__(self, config: BaseDataConfig, log: EventLog) -> None:
        self._config = config
        self._log = log
        self.users = EntityBuilder(log.users)
        self.items = EntityBuilder(log.items)
        self.context = {
            name: VocabularyBuilder() for name in (*log.fields.categorical, *config.derive)
        }
        self.sequences = {name: VocabularyBuilder() for name in log.fields.sequence}
        self._moments = {name: _Moments() for name in log.fields.numeric}
        self._buckets = np.zeros(0, dtype=np.int16)
        self.counts = {"rows": 0, "positives": 0, "duplicates_dropped": 0, "negatives": 0}
        self.counts |= {"negatives_given_up": 0, "missing_numeric": 0}
        self.num_examples = 0
        self.min_ts = 0
        self.max_ts = 0

    def encode(self, period: PeriodRows) -> EncodedPeriod:
        """Return the rows of the next period; periods must come in time order."""
        frame = period.rows
        event_ts = frame["event_ts"].to_numpy()
        if not self.counts["rows"]:
            self.min_ts = int(event_ts[0])
        self.max_ts = int(event_ts[-1])
        self.counts["rows"] += frame.height
        self.counts["duplicates_dropped"] += period.num_dropped
        user = self.users.encode(frame["user"].to_arrow(), event_ts)
        item = self.items.encode(frame["item"].to_arrow(), event_ts)
        self._add_buckets()
        columns = self._context_columns(frame, event_ts)
        label = frame["label"].to_numpy()
        source, new_item = self._with_negatives(user, item, event_ts, label)
        is_sampled = new_item > 0
        table = self._assemble(frame, columns, source, is_sampled)
        user = user[source]
        item = np.where(is_sampled, new_item, item[source]).astype(np.int32)
        table["user"], table["item"] = user, item
        self.num_examples += len(source)
        return EncodedPeriod(pa.table(table), self._buckets[user - 1])

    def numeric_standards(self) -> dict[str, Standard]:
        """Return mean and deviation of each numeric context field over the rows before the FM window's end."""
        return {name: moments.standard() for name, moments in self._moments.items()}

    def _add_buckets(self) -> None:
        keys = self.users.vocabulary.keys_from(len(self._buckets))
        new = [zlib.crc32(key.encode()) % self._config.num_buckets for key in keys]
        self._buckets = np.concatenate([self._buckets, np.asarray(new, dtype=np.int16)])

    def _context_columns(self, frame: pl.DataFrame, event_ts: Ints) -> dict[str, Any]:
        """Return the encoded context, numeric and sequence columns of the log rows as Arrow arrays."""
        fields, config = self._log.fields, self._config
        out: dict[str, Any] = {}
        for name in fields.categorical:
            out[name] = pa.array(self.context[name].encode(frame[name].to_arrow(), event_ts))
        for name, values in derive_columns(event_ts, config.derive).items():
            out[name] = pa.array(
                self.context[name].encode(pa.array(values).cast(pa.string()), event_ts)
            )
        is_past = event_ts < config.split.fm_stop_ts
        for name in fields.numeric:
            numbers = frame[name].to_numpy().astype(np.float64)  # null becomes NaN
            is_known = ~np.isnan(numbers)
            self.counts["missing_numeric"] += int((~is_known).sum())
            self._moments[name].add(numbers[is_past & is_known])
            out[name] = pa.array(numbers)
        for name in fields.sequence:
            out[name] = self._encode_lists(frame[name], name, event_ts)
        return out

    def _encode_lists(self, lists: pl.Series, name: str, event_ts: Ints) -> Any:
        kept = lists.list.tail(self._config.sequence_len).fill_null([])
        lengths = kept.list.len().to_numpy().astype(np.int64)
        flat = kept.explode(empty_as_null=False).to_arrow()
        ids = self.sequences[name].encode(flat.cast(pa.string()), np.repeat(event_ts, lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))

    def _with_negatives(
        self,
        user: NDArray[np.int32],
        item: NDArray[np.int32],
        event_ts: Ints,
        label: NDArray[np.float32],
    ) -> tuple[Ints, NDArray[np.int32]]:
        """Return [n] the log row each example copies, and the item it was given (0 for the log's own)."""
        config = self._config.negatives
        positives = np.flatnonzero(label > 0)
        self.counts["positives"] += len(positives)
        if config.kind == "none" or not len(positives):
            return np.arange(len(user)), np.zeros(len(user), dtype=np.int32)
        sampled = sample_negatives(
            (user[positives], item[positives], event_ts[positives]),
            self._negative_group(event_ts[positives]),
            per_positive=config.per_positive,
            max_tries=config.max_tries,
            seed=config.seed,
        )
        self.counts["negatives"] += len(sampled.source)
        self.counts["negatives_given_up"] += sampled.num_given_up
        source = np.concatenate([np.arange(len(user)), positives[sampled.source]])
        new_item = np.concatenate([np.zeros(len(user), dtype=np.int32), sampled.item])
        order = np.argsort(source, kind="stable")
        return source[order], new_item[order]

    def _negative_group(self, event_ts: Ints) -> Ints:
        """Number the popularity periods; a window of the split never draws from another one."""
        config = self._config
        period_us = round((config.negatives.period_s or config.period_s) * MICROS_PER_S)
        cuts = np.asarray(config.split.cut_ts, dtype=np.int64)
        period = (event_ts - config.period_origin_ts) // period_us
        section: Ints = np.searchsorted(cuts, event_ts, side="right").astype(np.int64)
        return np.asarray(period * (len(cuts) + 1) + section)

    def _assemble(
        self,
        frame: pl.DataFrame,
        columns: dict[str, Any],
        source: Ints,
        is_sampled: NDArray[np.bool_],
    ) -> dict[str, Any]:
        """Copy what an example takes from its log row, with the labels of negatives set to 0."""
        example_id = np.arange(self.num_examples, self.num_examples + len(source), dtype=np.int64)
        out: dict[str, Any] = {
            "example_id": example_id,
            "user": None,
            "item": None,
            "event_ts": frame["event_ts"].to_numpy()[source],
            "label_ts": frame["label_ts"].to_numpy()[source],
        }
        for name in ("label", *self._log.fields.tasks):
            out[name] = np.where(is_sampled, np.float32(0), frame[name].to_numpy()[source])
        is_history = out["label"] > 0 if self._config.history_events == "positives" else True
        out["is_event"] = ~is_sampled & is_history
        if len(source) == frame.height:
            return out | columns
        index = pa.array(source)
        return out | {name: values.take(index) for name, values in columns.items()}
