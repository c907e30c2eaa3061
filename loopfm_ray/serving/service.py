"""Many VMs in one process: a name to a bundle, a user to stable or canary, and bundles that come and go under load."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from loopfm_ray.errors import LoopFMError
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import (
    BatchResponse,
    ModelInfo,
    RequestError,
    ScoreQuery,
    ScoreResponse,
    UnknownModelError,
)
from loopfm_ray.serving.predictor import Predictor, Scored
from loopfm_ray.serving.rollout import Rollouts, Served, is_canary_user
from loopfm_ray.serving.watch import Watch, name_model

__all__ = ["Opener", "Service", "ShadowReport"]

_log = logging.getLogger(__name__)
_MAX_WAITING_SHADOWS = 64

Opener = Callable[[Served], Predictor]
"""Loads a bundle and opens its store."""
Variant = Literal["stable", "canary"]


@dataclass
class ShadowReport:
    """How the scores of a shadow differ from those that were answered."""

    version: str
    requests: int = 0
    rows: int = 0
    dropped: int = 0
    """Requests that it did not score because too many waited."""
    failed: int = 0
    sum_abs_diff: float = 0.0
    max_abs_diff: float = 0.0

    def add(self, answered: Scored, shadow: Scored) -> None:
        """Add the scores of one request."""
        gap = np.abs(answered.probs - shadow.probs)
        self.requests += 1
        self.rows += len(gap)
        self.sum_abs_diff += float(gap.sum())
        self.max_abs_diff = max(self.max_abs_diff, float(gap.max(initial=0.0)))


@dataclass(frozen=True)
class _Slot:
    """What serves under one name."""

    served: Mapping[str, Served]
    """By role: stable, canary, shadow."""
    predictors: Mapping[str, Predictor]
    canary_share: float
    shadow: ShadowReport | None
    problem: str = ""
    """Why the last change of it was refused."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Service:
    """Scores with the VM of a name. Threads may share it.

    A request takes its slot once, so a change of the rollout never mixes two bundles in one answer.
    """

    def __init__(
        self,
        opener: Opener,
        source: Callable[[], Rollouts] | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Serve nothing yet; `apply` gives it models.

        Args:
            opener: loads what is new.
            source: asked by `reload` for the rollouts that count now; None changes by `apply` alone.
            watch: told of what is served and scored; None watches nothing.
        """
        self._watch = watch
        if watch is not None:
            watch.follow(self)
        self._open, self._source = opener, source
        self._last_failure = ""
        self._slots: Mapping[str, _Slot] = {}
        self._revision = -1
        self._apply_lock = threading.Lock()
        self._shadows = ThreadPoolExecutor(1, "shadow")
        self._waiting = threading.BoundedSemaphore(_MAX_WAITING_SHADOWS)

    @property
    def watch(self) -> Watch | None:
        """What watches it."""
        return self._watch

    @property
    def revision(self) -> int:
        """The revision that it serves, -1 before the first."""
        return self._revision

    @property
    def names(self) -> list[str]:
        """The models."""
        return sorted(self._slots)

    def apply(self, rollouts: Rollouts) -> dict[str, str]:
        """Serve these models from now on; return by name why one could not be changed, which then stays as it was.

        What is loaded already is kept; what is new is loaded before anything changes.
        """
        with self._apply_lock:
            slots, refused = {}, {}
            for name, rollout in rollouts.models.items():
                roles = {
                    "stable": rollout.stable,
                    "canary": rollout.canary,
                    "shadow": rollout.shadow,
                }
                served = {role: one for role, one in roles.items() if one is not None}
                before = self._slots.get(name)
                try:
                    slots[name] = self._slot(served, rollout.canary_share, before)
                except LoopFMError as error:
                    refused[name] = str(error)
                    _log.error("model %s stays as it is: %s", name, error)
                    if before is not None:
                        slots[name] = replace(before, problem=str(error))
            if self._watch is not None:
                self._watch.retain(_answering(slots))
            self._slots, self._revision = slots, rollouts.revision
            return refused

    def _slot(self, served: Mapping[str, Served], share: float, before: _Slot | None) -> _Slot:
        open_now = (
            {}
            if before is None
            else {before.served[role]: one for role, one in before.predictors.items()}
        )
        predictors = {role: open_now.get(one) or self._open(one) for role, one in served.items()}
        shadow = None
        if "shadow" in predictors:
            version = predictors["shadow"].bundle.version
            same = (
                before is not None
                and before.shadow is not None
                and before.shadow.version == version
            )
            shadow = before.shadow if same and before is not None else ShadowReport(version)
        # a report that goes on is guarded by the lock that it had
        lock = threading.Lock() if before is None else before.lock
        return _Slot(served, predictors, share, shadow, lock=lock)

    def respond(self, name: str, query: ScoreQuery, request_id: str) -> ScoreResponse:
        """Return the answer to one query as it goes over the wire.

        Raises:
            UnknownModelError: no model of that name is served.
            RequestError: the context does not fit the model.
        """
        slot = self._of(name)
        variant = _variant(slot, name, query.user)
        predictor = slot.predictors[variant]
        scored = predictor.score(query)
        if self._watch is not None:
            labels = (name, variant, predictor.bundle.version)
            self._watch.scored(labels, [query], [scored], request_id)
        self._score_along(slot, variant, [query], [scored])
        return predictor.answer(scored, request_id, name, variant)

    def respond_many(
        self, name: str, queries: Sequence[ScoreQuery], request_id: str
    ) -> BatchResponse:
        """Return the answers to many queries, in order; those of one variant take one pass through the model.

        Raises:
            UnknownModelError: no model of that name is served.
            RequestError: the context of a query does not fit the model; its `index` says of which.
        """
        slot = self._of(name)
        variants = [_variant(slot, name, query.user) for query in queries]
        answers: list[ScoreResponse | None] = [None] * len(queries)
        for variant in dict.fromkeys(variants):
            places = [n for n, other in enumerate(variants) if other == variant]
            chosen = [queries[n] for n in places]
            predictor = slot.predictors[variant]
            try:
                scored = predictor.score_many(chosen)
            except RequestError as error:
                raise RequestError(error.message, places[error.index or 0]) from None
            if self._watch is not None:
                labels = (name, variant, predictor.bundle.version)
                self._watch.scored(labels, chosen, scored, request_id, places)
            self._score_along(slot, variant, chosen, scored)
            for place, one in zip(places, scored, strict=True):
                answers[place] = predictor.answer(one, request_id, name, variant)
        return BatchResponse(
            results=[answer for answer in answers if answer is not None], request_id=request_id
        )

    def pick(self, name: str, user: str) -> tuple[Predictor, Variant]:
        """Return what answers a user under a name.

        Raises:
            UnknownModelError: no model of that name is served.
        """
        slot = self._of(name)
        variant = _variant(slot, name, user)
        return slot.predictors[variant], variant

    def describe(self, name: str) -> dict[str, Any]:  # Any: JSON
        """Return what is served under a name: its fields, versions and counters, by variant.

        Raises:
            UnknownModelError: no model of that name is served.
        """
        slot = self._of(name)
        with slot.lock:
            shadow = None if slot.shadow is None else asdict(slot.shadow)
        variants = {
            role: one.describe() | self._drift(name, role, one)
            for role, one in slot.predictors.items()
            if role != "shadow"
        }
        return {
            "name": name,
            "revision": self._revision,
            "canary_share": slot.canary_share,
            "variants": variants,
            "shadow": shadow,
            "problem": slot.problem or None,
        }

    def _drift(self, name: str, role: str, predictor: Predictor) -> dict[str, Any]:
        if self._watch is None:
            return {}
        return self._watch.drift((name, role, predictor.bundle.version))

    def summary(self) -> dict[str, Any]:  # Any: JSON
        """Return the models and their versions."""
        models = [
            ModelInfo(
                name=name, version=slot.predictors["stable"].bundle.version, variant="stable"
            ).model_dump()
            for name, slot in sorted(self._slots.items())
        ]
        return {"revision": self._revision, "models": models}

    def reload(self) -> bool:
        """Serve a newer revision if there is one, and look for newer histories; return whether anything was new."""
        is_new = self._follow()
        predictors = {id(p): p for slot in self._slots.values() for p in slot.predictors.values()}
        found = [predictor.reload() for predictor in predictors.values()]
        return is_new or any(found)

    def _follow(self) -> bool:
        if self._source is None:
            return False
        try:
            rollouts = self._source()
        except LoopFMError as error:
            if str(error) != self._last_failure:  # said once, not every few seconds
                self._last_failure = str(error)
                _log.warning("the models stay as they are: %s", error)
            return False
        self._last_failure = ""
        if rollouts.revision == self._revision:
            return False
        self.apply(rollouts)
        return True

    def close(self) -> None:
        """Let go of the thread that shadows score in, once what waits is scored."""
        self._shadows.shutdown()

    def _of(self, name: str) -> _Slot:
        slot = self._slots.get(name)
        if slot is None:
            raise UnknownModelError(f"no model {name!r} is served, there are {self.names}")
        name_model(name)
        return slot

    def _score_along(
        self,
        slot: _Slot,
        variant: Variant,
        queries: Sequence[ScoreQuery],
        answered: Sequence[Scored],
    ) -> None:
        """Let the shadow score what the stable bundle answered, later and elsewhere."""
        shadow, report = slot.predictors.get("shadow"), slot.shadow
        if shadow is None or report is None or variant != "stable":
            return
        if not self._waiting.acquire(blocking=False):
            with slot.lock:
                report.dropped += len(queries)
            return
        future = self._shadows.submit(_compare, slot, shadow, report, list(queries), list(answered))
        future.add_done_callback(partial(self._compared, slot, report, len(queries)))

    def _compared(
        self, slot: _Slot, report: ShadowReport, num_queries: int, future: Future[None]
    ) -> None:
        """A shadow harms nobody: what it does wrong is counted."""
        self._waiting.release()
        error = future.exception()
        if error is not None:
            _log.warning("the shadow failed: %s", error)
            with slot.lock:
                report.failed += num_queries


def _compare(
    slot: _Slot,
    shadow: Predictor,
    report: ShadowReport,
    queries: list[ScoreQuery],
    answered: list[Scored],
) -> None:
    scored = shadow.score_many(queries)
    with slot.lock:
        for one, other in zip(answered, scored, strict=True):
            report.add(one, other)


def _answering(slots: Mapping[str, _Slot]) -> dict[tuple[str, str, str], Bundle]:
    """Return what answers, by name, variant and version; a shadow does not."""
    return {
        (name, role, one.bundle.version): one.bundle
        for name, slot in slots.items()
        for role, one in slot.predictors.items()
        if role != "shadow"
    }


def _variant(slot: _Slot, name: str, user: str) -> Variant:
    is_canary = "canary" in slot.predictors and is_canary_user(name, user, slot.canary_share)
    return "canary" if is_canary else "stable"
