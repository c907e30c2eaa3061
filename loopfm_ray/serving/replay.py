"""Score logged requests again, offline, and compare with what was answered.

Each record of a parity log names the bundle and the latents version that answered it. Its features are made again twice: by
the offline path (`serving/offline.py`) and by the serving path with the same store version. The offline score is compared with the
answer that was logged; the two sets of features with each other, to say where a difference comes from.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch, History
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import DataError, StoreError
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.features import FeatureBuilder, read_histories
from loopfm_ray.serving.lines import read_lines
from loopfm_ray.serving.logs import PARITY_FORMAT
from loopfm_ray.serving.offline import OfflineFeatures
from loopfm_ray.serving.predictor import score_probs
from loopfm_ray.store.online import OnlineStore
from loopfm_ray.store.reader import LatentsReader

__all__ = [
    "Logged",
    "ReplayReport",
    "Replayer",
    "StoreOpener",
    "feature_differences",
    "read_requests",
]

_SHOWN = 20
_AT_ONCE = 256
_BY_RULE = (None, "not_in_store", "nothing_visible", "cut_in_store")
"""Reasons for less history that a replay meets again; any other is a failure of that moment."""

StoreOpener = Callable[[str], OnlineStore]
"""Opens the online store of a latents version; raises StoreError where it is gone."""


@dataclass(frozen=True)
class Logged:
    """One query as it was answered."""

    request_id: str
    index: int
    version: str
    latents: str | None
    query: ScoreQuery
    scores: NDArray[np.float64]
    history_len: int
    reason: str | None


def read_requests(path: Path) -> Iterator[Logged | None]:
    """Yield the records of a parity log, a file or a folder of them; None for a last line that is not whole.

    Raises:
        StoreError: there is nothing, or it can not be read.
        DataError: a record is no such thing, or of another format.
    """
    files = sorted(path.glob("parity-*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise StoreError(f"{path} holds no parity-*.jsonl; give a parity log, or its folder")
    for file in files:
        for number, record in enumerate(read_lines(file), 1):
            yield None if record is None else _logged(file, number, record)


def _logged(file: Path, number: int, record: dict[str, Any]) -> Logged:  # Any: JSON
    found = record.get("format")
    if found != PARITY_FORMAT:
        raise DataError(
            f"{file}, line {number} has format {found!r}, this code reads {PARITY_FORMAT}; give a parity log that this code wrote"
        )
    try:
        query = ScoreQuery(
            record["user"], record["request_ts"], tuple(record["items"]), record["context"]
        )
        return Logged(
            record["request_id"],
            record["index"],
            record["model"]["version"],
            record["latents"],
            query,
            np.asarray(record["scores"], dtype=np.float64),
            record["history_len"],
            record["reason"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}, line {number} is no record of a parity log: {error!r}; take the line out"
        ) from error


@dataclass
class ReplayReport:
    """How far logged scores are from offline scores of the same requests."""

    tolerance: float
    num_requests: int = 0
    num_rows: int = 0
    num_mismatches: int = 0
    """Rows beyond the tolerance."""
    max_abs_diff: float = 0.0
    groups: dict[str, float] = field(default_factory=dict)
    """Largest difference of features between serving and offline by group, where both could be made: numbers in standard
    deviations, 1 for another id, `history` in units of a latent (1 for another event), `history_len` in events against the log."""
    histories: dict[str, int] = field(default_factory=dict)
    """Queries by where their offline history came from: `offline` latents, or the `online` version of the record."""
    not_replayed: dict[str, int] = field(default_factory=dict)
    """Records that could not be scored again, by why."""
    mismatches: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the rows that mismatch; 0 where none was replayed."""
        return self.num_mismatches / self.num_rows if self.num_rows else 0.0


class Replayer:
    """Scores records again for one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        prepared: PreparedData,
        latents: LatentsReader | None,
        open_store: StoreOpener,
    ) -> None:
        """Take both paths.

        Args:
            bundle: records of other versions are not replayed.
            prepared: the data that its VM was trained on.
            latents: of the run; histories of other versions come from the online store.
            open_store: opens that of a record.
        """
        self._bundle, self._open = bundle, open_store
        self._served = FeatureBuilder(bundle)
        self._plain = OfflineFeatures(bundle, prepared)
        self._offline = OfflineFeatures(bundle, prepared, latents)
        self._offline_version = None if latents is None else latents.manifest.content
        self._stores: dict[str, OnlineStore | None] = {}

    def replay(self, records: Iterator[Logged | None], tolerance: float = 1e-5) -> ReplayReport:
        """Score records again and compare; what can not be is counted by why."""
        report, skipped = ReplayReport(tolerance), Counter[str]()
        histories = Counter[str]()
        waiting: dict[str | None, list[Logged]] = {}
        for record in records:
            why = "the line is not whole" if record is None else self._why_not(record)
            if why is not None or record is None:
                skipped[why or ""] += 1
                continue
            part = waiting.setdefault(record.latents, [])
            part.append(record)
            if len(part) == _AT_ONCE:
                histories[self._compare(report, waiting.pop(record.latents))] += len(part)
        for part in waiting.values():
            histories[self._compare(report, part)] += len(part)
        report.not_replayed, report.histories = dict(skipped), dict(histories)
        return report

    def _why_not(self, record: Logged) -> str | None:
        if record.version != self._bundle.version:
            return f"bundle {record.version} answered, {self._bundle.version} is here"
        if record.reason not in _BY_RULE:
            return f"answered without its history: {record.reason}"
        latents = record.latents
        if latents in (None, self._offline_version) or self._store(str(latents)) is not None:
            return None
        return f"latents {latents} are gone"

    def _store(self, version: str) -> OnlineStore | None:
        if version not in self._stores:
            try:
                self._stores[version] = self._open(version)
            except StoreError:
                self._stores[version] = None
        return self._stores[version]

    def _compare(self, report: ReplayReport, part: Sequence[Logged]) -> str:
        """Add records of one latents version; return where their histories came from."""
        queries, version = [record.query for record in part], part[0].latents
        store = None if version is None else self._store(version)
        served = self._serve(queries, store)
        if version == self._offline_version or version is None:
            offline, source = self._offline.build(queries), "offline"
        else:
            offline = replace(self._plain.build(queries), histories=served.histories)
            source = "online"
        _add_groups(report.groups, feature_differences(self._bundle.spec.schema, served, offline))
        self._add_lengths(report, part, offline)
        probs = score_probs(self._bundle, offline)
        begin = 0
        for record in part:
            stop = begin + len(record.query.items)
            _add_scores(report, record, probs[begin:stop])
            begin = stop
        return source if version is not None else "none"

    def _serve(self, queries: Sequence[ScoreQuery], store: OnlineStore | None) -> Batch:
        batch, _ = self._served.build(queries)
        pin = self._bundle.spec.history
        if pin is None or store is None:
            return batch
        history, _ = read_histories(
            store.get_many([query.user for query in queries]),
            pin,
            [query.request_ts for query in queries],
            [len(query.items) for query in queries],
        )
        return replace(batch, histories={USER_SOURCE: history})

    def _add_lengths(self, report: ReplayReport, part: Sequence[Logged], offline: Batch) -> None:
        history = offline.histories.get(USER_SOURCE)
        if history is None:
            return
        lengths = history.mask.sum(dim=1).numpy()
        starts = np.cumsum([0, *(len(record.query.items) for record in part[:-1])])
        mine = lengths[history.row.numpy()[starts]]
        logged = np.asarray([record.history_len for record in part])
        _add_groups(report.groups, {"history_len": float(np.abs(mine - logged).max())})


def _add_groups(groups: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        groups[name] = max(groups.get(name, 0.0), value)


def _add_scores(report: ReplayReport, record: Logged, probs: NDArray[np.float64]) -> None:
    report.num_requests += 1
    report.num_rows += len(probs)
    diff = np.abs(probs - record.scores)
    report.max_abs_diff = max(report.max_abs_diff, float(diff.max()))
    bad = np.flatnonzero(~(diff <= report.tolerance))
    report.num_mismatches += len(bad)
    for row in bad[: _SHOWN - len(report.mismatches)]:
        report.mismatches.append(
            f"request {record.request_id}, query {record.index}, item {row}: served {record.scores[row]:.8f}, offline"
            f" {probs[row]:.8f}"
        )


def feature_differences(schema: FeatureSchema, left: Batch, right: Batch) -> dict[str, float]:
    """Return the largest difference of two batches of the same rows by side of the fields, and of their histories."""
    found: dict[str, float] = {}
    for column, one in enumerate(schema.categorical):
        differs = (left.ids[:, column] != right.ids[:, column]).any()
        _add_groups(found, {one.side.value: float(differs)})
    for column, one in enumerate(schema.numeric):
        gap = (left.numeric[:, column] - right.numeric[:, column]).abs().max()
        _add_groups(found, {one.side.value: float(gap)})
    for one in schema.sequences:
        first, second = left.sequences[one.name].numpy(), right.sequences[one.name].numpy()
        width = max(first.shape[1], second.shape[1])
        is_other = (_widen(first, width) != _widen(second, width)).any()
        _add_groups(found, {one.side.value: float(is_other)})
    if USER_SOURCE in left.histories and USER_SOURCE in right.histories:
        history = (left.histories[USER_SOURCE], right.histories[USER_SOURCE])
        found["history"] = _history_difference(*history)
    return found


def _widen(values: NDArray[Any], width: int) -> NDArray[Any]:
    more = [(0, 0)] * values.ndim
    more[1] = (0, width - values.shape[1])
    return np.pad(values, more)


def _history_difference(left: History, right: History) -> float:
    width = max(left.mask.shape[1], right.mask.shape[1])
    masks, ages, latents = (
        [_widen(np.asarray(getattr(one, name))[one.row.numpy()], width) for one in (left, right)]
        for name in ("mask", "age_s", "latents")
    )
    both = masks[0] & masks[1]
    worst = float((masks[0] != masks[1]).any() or (ages[0] != ages[1])[both].any())
    gaps = np.abs(latents[0] - latents[1])[both]
    return max(worst, float(gaps.max(initial=0.0)))
