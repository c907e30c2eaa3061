"""The metrics of a replica, as Prometheus reads them.

Labels are bounded by what is served: models and versions that are loaded, two variants, and words of this code. No user,
item or request id, and no name that only a caller gave, becomes one. Series of a version that is no longer served go.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

__all__ = ["STAGES", "Metrics", "ModelLabels", "ModelMetrics", "ScoreCounts"]

STAGES = ("body", "decode", "features", "store", "model", "total")
"""What a request spends its time on. `body` is waiting for its bytes, and for the requests that the process scores
meanwhile; `total` is from its first byte here to the last of its answer."""

_LATENCY_S = (
    0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
_AGE_S = (60, 600, 3600, 6 * 3600, *(day * 86_400 for day in (1, 2, 4, 7, 14, 30, 90, 365)))
_SCORES = np.asarray(
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
)
_FOLD = 64

ModelLabels = tuple[str, str, str]
"""Name, variant (stable or canary) and version of what answers."""
_MODEL = ("model", "variant", "version")


@dataclass
class _Waiting:
    """Scores of one bundle: those counted, and those that wait to be."""

    counts: NDArray[np.int64]
    total: float
    parts: list[NDArray[np.float64]]


class ScoreCounts(Collector):
    """The histogram of scores. Fifty at a time take as long as one does in the client library."""

    def __init__(self) -> None:
        self._of: dict[ModelLabels, _Waiting] = {}

    def add(self, labels: ModelLabels, probs: NDArray[np.float64]) -> None:
        """Count scores in [0, 1]."""
        found = self._of.get(labels)
        if found is None:
            found = self._of.setdefault(
                labels, _Waiting(np.zeros(len(_SCORES) + 1, np.int64), 0.0, [])
            )
        found.parts.append(probs)  # atomic, as is taking them all
        if len(found.parts) >= _FOLD:
            self._fold(found)

    @staticmethod
    def _fold(found: _Waiting) -> None:
        parts, found.parts = found.parts, []
        if parts:
            scores = np.concatenate(parts)
            places = np.searchsorted(_SCORES, scores, side="left")
            found.counts = found.counts + np.bincount(places, minlength=len(_SCORES) + 1)
            found.total += float(scores.sum())

    def forget(self, name: str, version: str) -> None:
        """Let go of a bundle's scores."""
        self._of = {k: v for k, v in self._of.items() if (k[0], k[2]) != (name, version)}

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the histogram in the form of the client library."""
        family = HistogramMetricFamily("loopfm_scores", "Scores that were answered", labels=_MODEL)
        for labels, found in list(self._of.items()):
            self._fold(found)
            bounds = [*(f"{edge:g}" for edge in _SCORES), "+Inf"]
            cumulated = np.cumsum(found.counts).tolist()
            buckets = list(zip(bounds, cumulated, strict=True))
            family.add_metric(labels, buckets, sum_value=found.total)
        return [family]


class ModelMetrics:
    """The series of one bundle under one name, looked up once."""

    def __init__(self, metrics: "Metrics", labels: ModelLabels) -> None:
        self._metrics, self._labels = metrics, labels
        self._rows = metrics.rows.labels(*labels)
        self._queries = metrics.queries.labels(*labels)
        self._age = metrics.history_age.labels(labels[0])
        self._outcomes: dict[str, Counter] = {}
        self._unknown: dict[str, Counter] = {}

    def count(self, num_queries: int, num_rows: int) -> None:
        """Count queries that were answered, and their rows."""
        self._queries.inc(num_queries)
        self._rows.inc(num_rows)

    def count_history(self, outcome: str, age_s: float | None) -> None:
        """Count one look-up; `outcome` is `hit` or why there was less than there could have been."""
        found = self._outcomes.get(outcome)
        if found is None:
            found = self._metrics.histories.labels(*self._labels, outcome)
            self._outcomes[outcome] = found
        found.inc()
        if age_s is not None:
            self._age.observe(age_s)

    def count_unknown(self, kind: str, number: int) -> None:
        """Count what the model did not know; of the kinds item, user, value and left_out."""
        found = self._unknown.get(kind)
        if found is None:
            found = self._metrics.unknown.labels(*self._labels, kind)
            self._unknown[kind] = found
        found.inc(number)

    def count_scores(self, probs: NDArray[np.float64]) -> None:
        """Count scores."""
        self._metrics.scores.add(self._labels, probs)


class Metrics:
    """What is counted while requests are answered. Threads may share it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "loopfm_requests",
            "Requests that were answered, by the door that they came through and the HTTP status that they got or that stands for theirs",
            [*_MODEL, "route", "transport", "status"],
            registry=self.registry,
        )
        self.stages = Histogram(
            "loopfm_stage_seconds",
            "Time of a scoring request by stage",
            ["model", "stage"],
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.queries = self._counter("loopfm_queries", "Users that candidates were scored for")
        self.rows = self._counter("loopfm_rows", "Candidates that were scored")
        self.histories = self._counter(
            "loopfm_histories", "Look-ups of a history; any but hit is a degraded answer", "outcome"
        )
        self.unknown = self._counter(
            "loopfm_unknown", "Items, users, values and fields replaced by a default", "kind"
        )
        self.history_age = Histogram(
            "loopfm_history_age_seconds",
            "Age of the newest event of a history at the request",
            ["model"],
            buckets=_AGE_S,
            registry=self.registry,
        )
        self.scores = ScoreCounts()
        self.registry.register(self.scores)
        self._models: dict[ModelLabels, ModelMetrics] = {}
        self._stages: dict[tuple[str, str], Histogram] = {}
        self._requests: dict[tuple[str, str, str, str, str, str], Counter] = {}

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(name, text, [*_MODEL, *more], registry=self.registry)

    def of(self, labels: ModelLabels) -> ModelMetrics:
        """Return the series of one bundle."""
        found = self._models.get(labels)
        return (
            self._models.setdefault(labels, ModelMetrics(self, labels)) if found is None else found
        )

    def count_request(self, labels: ModelLabels, door: tuple[str, str], status: int) -> None:
        """Count one request by its door, route and transport; a model that did not answer has no variant and no version."""
        key = (*labels, *door, str(status))
        found = self._requests.get(key)
        if found is None:
            found = self._requests.setdefault(key, self.requests.labels(*key))
        found.inc()

    def observe_stages(self, model: str, seconds: Mapping[str, float]) -> None:
        """Note how long the stages of one request took."""
        for stage, value in seconds.items():
            found = self._stages.get((model, stage))
            if found is None:
                found = self._stages.setdefault((model, stage), self.stages.labels(model, stage))
            found.observe(value)

    def retain(self, served: Iterable[ModelLabels]) -> None:
        """Let go of the series of every bundle that is not served any more."""
        kept = {(name, version) for name, _, version in served}
        known = [*self._models, *(key[:3] for key in self._requests if key[2])]
        for name, version in {(name, version) for name, _, version in known} - kept:
            wanted = {"model": name, "version": version}
            for metric in (self.requests, self.queries, self.rows, self.histories, self.unknown):
                metric.remove_by_labels(wanted)
            self.scores.forget(name, version)
        self._models = {k: v for k, v in self._models.items() if (k[0], k[2]) in kept}
        self._requests = {
            k: v for k, v in self._requests.items() if not k[2] or (k[0], k[2]) in kept
        }
