"""One bundle and one online store: from a checked query to calibrated probabilities."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch, History
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.errors import BundleError, StoreError, UnreachableError
from loopfm_ray.metrics.binary import sigmoid
from loopfm_ray.serving.breaker import Breaker
from loopfm_ray.serving.bundle import Bundle, load_bundle
from loopfm_ray.serving.contract import (
    Backend,
    FeatureInfo,
    ModelInfo,
    RequestError,
    ScoreQuery,
    ScoreResponse,
)
from loopfm_ray.serving.describe import Counters, describe
from loopfm_ray.serving.features import FeatureBuilder, HistoryRead, RequestFeatures, read_histories
from loopfm_ray.serving.spec import HistoryPin
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.online import OnlineStore, UserHistory
from loopfm_ray.store.space import Space
from loopfm_ray.store.target import SpaceFollower

__all__ = [
    "Predictor",
    "Scored",
    "StoreSource",
    "Timing",
    "check_store",
    "load_predictor",
    "score_probs",
]

logger = logging.getLogger(__name__)

_MAX_ROWS = 8192
"""Rows of one pass through the model."""
STORE_FAILED = "store_failed"
"""Reason of a history that is missing because the store did not answer in time, or wrongly."""
STORE_PAUSED = "store_paused"
"""Reason of a history that is missing because the store was not asked: it had not answered several times before."""


@dataclass(frozen=True)
class Timing:
    """How long the parts of one pass took, from `began_s` of `time.perf_counter`; the queries of a pass share it."""

    began_s: float
    features_s: float
    store_s: float
    model_s: float


@dataclass(frozen=True)
class Scored:
    """The answer to one query: [B] probabilities in the order of its items, and what they were made from.

    `latents_version` is the version that the history was read from, None for a VM without.
    """

    probs: NDArray[np.float64]
    features: RequestFeatures
    history: HistoryRead | None
    latents_version: str | None
    timing: Timing = field(compare=False)

    @property
    def is_unknown_user(self) -> bool:
        """Whether the VM, or the store, does not know the user."""
        is_missing = self.history is not None and self.history.reason == "not_in_store"
        return self.features.is_unknown_user or is_missing


class StoreSource(Protocol):
    """Where newer versions of the predictor's space come from; `SpaceFollower` is one."""

    def poll(self) -> OnlineStore | None:
        """Return the live version if it is another one than this gave last, else None.

        Raises:
            StoreError: there is none, or it can not be opened.
        """
        ...


class Predictor:
    """Scores queries with one bundle. Threads may share it.

    A request takes the store once and reads all of its history from it, so `reload` in another thread never mixes two
    versions in one answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: OnlineStore | None = None,
        source: StoreSource | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        """Take a loaded bundle and, for a VM that reads a history, a store of its space.

        Args:
            bundle: what scores.
            store: any version of the space that the VM was trained in.
            source: asked by `reload` for a newer one; None keeps `store` for good.
            breaker: holds requests back from a store that does not answer; None makes one.

        Raises:
            BundleError: the store is missing or of another space.
        """
        check_store(bundle, store)
        self.bundle = bundle
        self._store = store
        self._source = source
        self._breaker = breaker or Breaker(time.monotonic)
        self._builder = FeatureBuilder(bundle)
        self._lock = threading.Lock()
        self._reload_lock = threading.Lock()
        self._last_failure = ""
        self.counters = Counters()

    @property
    def latents_version(self) -> str | None:
        """The version that histories are read from now, None for a VM without."""
        return self._store.version if self._store and self.bundle.spec.history else None

    @property
    def store(self) -> OnlineStore | None:
        """The store that requests read from now."""
        return self._store

    def reload(self) -> bool:
        """Switch to the live version of the space if it is another one; return whether it was.

        Call it from time to time, outside of requests: `jobs/serving.py` does. A failure leaves the present version in
        place and is logged and counted; requests under way end with the version they began with.
        """
        if self._source is None:
            return False
        with self._reload_lock:
            try:
                store = self._source.poll()
                if store is not None:
                    check_store(self.bundle, store)
            except (StoreError, BundleError) as error:
                self._note_failure(str(error))
                return False
            self._last_failure = ""
            if store is None:
                return False
            # the store before is not closed: a request may be reading it, and it goes with its last reader
            self._store = store
            with self._lock:
                self.counters.reloads += 1
        logger.info("histories are read from latents %s now", store.version)
        return True

    def _note_failure(self, message: str) -> None:
        with self._lock:
            self.counters.reload_failures += 1
        if message != self._last_failure:  # said once, not every few seconds
            self._last_failure = message
            logger.warning(
                "the histories stay as they are, the live version is no use: %s", message
            )

    def score(self, query: ScoreQuery) -> Scored:
        """Return the probabilities of one query.

        Raises:
            RequestError: the context does not fit the model.
        """
        (scored,) = self.score_many([query])
        return scored

    def score_many(self, queries: Sequence[ScoreQuery]) -> list[Scored]:
        """Return the answer to each query, in order; all of them read one version of the histories.

        One pass through the model takes many queries, which costs a fraction of as many passes.

        Raises:
            RequestError: the context of a query does not fit the model; its `index` says of which. None is answered then.
        """
        store, found = self._store, list[Scored]()
        try:
            for begin, part in _pieces(queries):
                try:
                    found += self._score_part(part, store)
                except RequestError as error:
                    raise RequestError(error.message, begin + (error.index or 0)) from None
        except RequestError:
            with self._lock:
                self.counters.refused += 1
            raise
        for scored in found:
            self._count(scored)
        return found

    def score_from(self, query: ScoreQuery, store: OnlineStore | None) -> Scored:
        """Return the probabilities of one query with the histories of `store`, uncounted; for `serving/explore.py`.

        Raises:
            RequestError: the context does not fit the model.
        """
        (scored,) = self._score_part([query], store)
        return scored

    def _score_part(self, queries: Sequence[ScoreQuery], store: OnlineStore | None) -> list[Scored]:
        began_s = time.perf_counter()
        batch, features = self._builder.build(queries)
        built_s = time.perf_counter()
        pin, version = self.bundle.spec.history, None
        reads: list[HistoryRead | None] = [None] * len(queries)
        if pin is not None and store is not None:
            version = store.version
            history, read = self._read_histories(store, queries, pin)
            reads = [*read]
            batch = replace(batch, histories={USER_SOURCE: history})
        read_s = time.perf_counter()
        probs = score_probs(self.bundle, batch)
        model_s = time.perf_counter() - read_s
        timing = Timing(began_s, built_s - began_s, read_s - built_s, model_s)
        ends = np.cumsum([len(query.items) for query in queries])
        parts = np.split(probs, ends[:-1])
        for index, part in enumerate(parts):
            if not np.isfinite(part).all():
                raise RequestError("the context gives no finite score; check its numbers", index)
        return [Scored(*one, version, timing) for one in zip(parts, features, reads, strict=True)]

    def respond(self, query: ScoreQuery, request_id: str) -> ScoreResponse:
        """Return the answer to one query under the name of the bundle.

        Raises:
            RequestError: the context does not fit the model.
        """
        return self.answer(self.score(query), request_id, self.bundle.spec.name, "stable")

    def answer(
        self, scored: Scored, request_id: str, name: str, variant: Literal["stable", "canary"]
    ) -> ScoreResponse:
        """Return what `score` found as it goes over the wire, under the name that was asked for."""
        features, read, pin = scored.features, scored.history, self.bundle.spec.history
        reason = read.reason if read else None
        return ScoreResponse(
            scores=scored.probs.tolist(),
            model=ModelInfo(name=name, version=self.bundle.version, variant=variant),
            features=FeatureInfo(
                version=scored.latents_version,
                snapshot_id=pin.snapshot_id if pin else None,
                age_s=read.age_s if read else None,
                history_len=read.length if read else 0,
                degraded=reason is not None,
                reason=reason,
                unknown_user=scored.is_unknown_user,
                unknown_fields=list(features.unknown_fields),
                default_fields=list(features.default_fields),
            ),
            unknown_items=features.num_unknown_items,
            request_id=request_id,
        )

    def describe(self) -> dict[str, Any]:  # Any: JSON
        """Return versions, the fields a request may carry, limits and counters."""
        with self._lock:
            counters = replace(self.counters)
        return describe(self.bundle, self._store, self._builder.request_fields, counters)

    def _read_histories(
        self, store: OnlineStore, queries: Sequence[ScoreQuery], pin: HistoryPin
    ) -> tuple[History, list[HistoryRead]]:
        found, failure = self._find([query.user for query in queries], store)
        history, reads = read_histories(
            found,
            pin,
            [query.request_ts for query in queries],
            [len(query.items) for query in queries],
        )
        if failure is not None:
            reads = [HistoryRead(0, None, failure)] * len(queries)
        return history, reads

    def _find(
        self, users: Sequence[str], store: OnlineStore
    ) -> tuple[list[UserHistory | None], str | None]:
        """Return what the store has of each user, and why it has nothing of anyone, if it failed."""
        nothing: list[UserHistory | None] = [None] * len(users)
        if not self._breaker.allows():
            return nothing, STORE_PAUSED
        try:
            found = store.get_many(users)
        except StoreError as error:
            if isinstance(error, UnreachableError):
                self._breaker.failed()
            logger.warning("no history for %d requests, the store failed: %s", len(users), error)
            return nothing, STORE_FAILED
        self._breaker.succeeded()
        return found, None

    def _count(self, scored: Scored) -> None:
        features, reason = scored.features, scored.history.reason if scored.history else None
        with self._lock:
            counters = self.counters
            counters.requests += 1
            counters.rows += len(scored.probs)
            counters.unknown_items += features.num_unknown_items
            counters.unknown_users += scored.is_unknown_user
            counters.unknown_values += len(features.unknown_fields)
            counters.default_values += len(features.default_fields)
            counters.history_misses += reason is not None
            counters.store_failures += reason in (STORE_FAILED, STORE_PAUSED)


def _pieces(queries: Sequence[ScoreQuery]) -> Iterator[tuple[int, Sequence[ScoreQuery]]]:
    """Cut queries into pieces of bounded rows; gives where each begins."""
    begin = rows = 0
    for place, query in enumerate(queries):
        if rows and rows + len(query.items) > _MAX_ROWS:
            yield begin, queries[begin:place]
            begin, rows = place, 0
        rows += len(query.items)
    if begin < len(queries):
        yield begin, queries[begin:]


def score_probs(bundle: Bundle, batch: Batch) -> NDArray[np.float64]:
    """Return [B] calibrated probabilities of the first task."""
    return np.asarray(sigmoid(bundle.spec.calibration.apply(bundle.logits(batch))))


def check_store(bundle: Bundle, store: OnlineStore | None) -> None:
    """Check that `store` holds histories of the space that the VM of `bundle` was trained in.

    Raises:
        BundleError: there is none, or it is of another space.
    """
    pin = bundle.spec.history
    if pin is None:
        return
    name = bundle.spec.name
    if store is None:
        raise BundleError(
            f"VM {name!r} reads latents of space {pin.space.id}; give the online store they are published in"
        )
    try:
        found = Space.of_meta(store.meta)
    except StoreError as error:
        raise BundleError(f"the online store does not match VM {name!r}: {error}") from error
    difference = pin.space.difference(found)
    if difference is not None:
        raise BundleError(
            f"the online store does not match VM {name!r}: it holds latents of space {found.id}, the VM was trained in"
            f" {pin.space.id}; {difference}; open that space, or load a bundle trained in this one"
        )


def load_predictor(
    bundle: Location,
    online: str | Path | None = None,
    history_timeout_s: float = 0.05,
    backend: Backend = "torch",
) -> Predictor:
    """Load the bundle at `bundle` and open the live version of its space in the online store at `online`.

    `reload` of the predictor follows what is published in that space later.

    Args:
        bundle: folder or `s3://` address of the bundle.
        online: a directory or `redis://` address; not opened for a VM without history.
        history_timeout_s: deadline of one look-up in a store behind a network.
        backend: what runs the model.

    Raises:
        BundleError: the bundle is damaged, or the store is not of its space.
        StoreError: nothing is published at `online` in the space of the bundle.
    """
    loaded = load_bundle(bundle, backend)
    pin = loaded.spec.history
    if pin is None or online is None:
        return Predictor(loaded)
    source = SpaceFollower(online, pin.space.id, timeout_s=history_timeout_s)
    return Predictor(loaded, source.poll(), source)
