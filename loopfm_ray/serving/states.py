"""The metrics that tell what is served: read from the service when it is scraped, at no cost to requests."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loopfm_ray.serving.metrics import ModelLabels
from loopfm_ray.types import MICROS_PER_S

__all__ = ["Described", "ServiceState"]


class Described(Protocol):
    """What the metrics ask of a service; `Service` is one."""

    def describe(self, name: str) -> dict[str, Any]:  # Any: JSON
        """Return the body of `GET /v1/models/NAME`."""

    def summary(self) -> dict[str, Any]:  # Any: JSON
        """Return the body of `GET /v1/models`."""


_DRIFT = {
    "num_rows": ("loopfm_drift_rows", "Rows that the drift is measured on"),
    "psi_scores": ("loopfm_drift_psi_scores", "PSI of the scores against the reference"),
    "expected_psi": ("loopfm_drift_expected_psi", "PSI of the scores without a shift, about"),
    "psi_history_len": ("loopfm_drift_psi_history_len", "PSI of the lengths of histories"),
    "coverage_difference": ("loopfm_drift_coverage", "Share of rows with history, less reference"),
    "unknown_users_difference": ("loopfm_drift_unknown_users", "Share of rows, less reference"),
    "unknown_items_difference": ("loopfm_drift_unknown_items", "Share of rows, less reference"),
}
_SHADOW = {
    "requests": ("loopfm_shadow_requests", "Queries that the shadow scored along"),
    "rows": ("loopfm_shadow_rows", "Candidates that the shadow scored along"),
    "dropped": ("loopfm_shadow_dropped", "Queries left out because too many waited"),
    "failed": ("loopfm_shadow_failed", "Queries that the shadow failed on"),
    "sum_abs_diff": ("loopfm_shadow_abs_difference", "Sum of differences of probabilities"),
}


class ServiceState(Collector):
    """Tells what is served now; asks the service when it is scraped, not before."""

    def __init__(self, service: Described) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        """Return nothing: without this a registry collects once to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return models, versions, reloads, shadows and drift."""
        summary = self._service.summary()
        described = [self._service.describe(one["name"]) for one in summary["models"]]
        revision = GaugeMetricFamily("loopfm_revision", "Revision of the rollouts that is served")
        revision.add_metric([], summary["revision"])
        yield revision
        yield from _bundles(described)
        yield from _shadows(described)
        yield from _drifts(described)


_LABELS = ("model", "variant", "version")
Json = dict[str, Any]  # Any: JSON


def _variants(described: Sequence[Json]) -> Iterator[tuple[ModelLabels, Json]]:
    for one in described:
        for variant, found in one["variants"].items():
            yield (one["name"], variant, found["model"]["version"]), found


def _bundles(described: Sequence[Json]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "loopfm_model_info", "What is served", labels=[*_LABELS, "latents", "space"]
    )
    reloads = CounterMetricFamily("loopfm_reloads", "Newer histories taken", labels=_LABELS)
    failures = CounterMetricFamily("loopfm_reload_failures", "Newer ones refused", labels=_LABELS)
    watermark = GaugeMetricFamily(
        "loopfm_latents_watermark_seconds", "Time up to which events are published", labels=_LABELS
    )
    problem = GaugeMetricFamily(
        "loopfm_rollout_refused", "1 where the last change of a model was refused", labels=["model"]
    )
    for labels, found in _variants(described):
        features, counters = found["features"], found["counters"]
        info.add_metric([*labels, features["version"] or "", features["space"] or ""], 1)
        reloads.add_metric(labels, counters["reloads"])
        failures.add_metric(labels, counters["reload_failures"])
        if features["watermark_ts"] is not None:
            watermark.add_metric(labels, features["watermark_ts"] / MICROS_PER_S)
    for one in described:
        problem.add_metric([one["name"]], float(one["problem"] is not None))
    yield from (info, reloads, failures, watermark, problem)


def _shadows(described: Sequence[Json]) -> Iterator[Metric]:
    labels = ["model", "version"]
    families = {
        key: CounterMetricFamily(name, text, labels=labels) for key, (name, text) in _SHADOW.items()
    }
    worst = GaugeMetricFamily(
        "loopfm_shadow_abs_difference_max", "Largest difference of a probability", labels=labels
    )
    for one in described:
        shadow = one["shadow"]
        if shadow is not None:
            for key, family in families.items():
                family.add_metric([one["name"], shadow["version"]], shadow[key])
            worst.add_metric([one["name"], shadow["version"]], shadow["max_abs_diff"])
    yield from (*families.values(), worst)


def _drifts(described: Sequence[Json]) -> Iterator[Metric]:
    families = {
        key: GaugeMetricFamily(name, text, labels=_LABELS) for key, (name, text) in _DRIFT.items()
    }
    has = GaugeMetricFamily(
        "loopfm_drift_reference", "1 where the bundle has a reference", labels=_LABELS
    )
    for labels, found in _variants(described):
        has.add_metric(labels, float(found["reference"] is not None))
        for key, family in families.items():
            value = (found["drift"] or {}).get(key)
            if value is not None:
                family.add_metric(labels, value)
    yield from (has, *families.values())
