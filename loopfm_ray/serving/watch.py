"""Watching a replica: what it counts, tells and keeps of its requests, beside answering them.

A door, HTTP or gRPC, opens a `Trace` for each request (`Watch.begin`, `Watch.end`); the service adds to it what it scored
(`Watch.scored`), so nothing is passed through the layers between. Where nothing watches, nothing happens.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.logs import ParityLog, RequestLog
from loopfm_ray.serving.metrics import Metrics, ModelLabels
from loopfm_ray.serving.reference import DriftWindow
from loopfm_ray.serving.spans import Spans
from loopfm_ray.serving.states import Described, ServiceState

if TYPE_CHECKING:
    from loopfm_ray.serving.bundle import Bundle
    from loopfm_ray.serving.predictor import Scored

__all__ = ["CONTENT_TYPE", "Part", "Trace", "Transport", "Watch", "mark", "name_model"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MIXED = "mixed"
"""Variant and version of a batch that several bundles answered."""

Transport = Literal["http", "grpc"]


@dataclass(frozen=True)
class Part:
    """A stage of a request, on the clock of its trace."""

    stage: str
    started_s: float
    seconds: float


@dataclass
class Trace:
    """One request on its way through the process. Times are those of `time.perf_counter`."""

    route: str
    transport: Transport
    started_s: float
    last_s: float
    parts: list[Part] = field(default_factory=list)
    request_id: str = ""
    traceparent: str = ""
    """What the caller said of its own trace (W3C Trace Context), unchecked."""
    tracestate: str = ""
    status: int = 0
    model: str = ""
    """Name of a model that is served; empty for any other that was asked for."""
    variant: str = ""
    version: str = ""
    num_queries: int = 0
    num_rows: int = 0
    user: str = ""
    """Of a request for one user."""
    degraded: dict[str, int] = field(default_factory=dict)
    """Queries that were answered with less history than there could have been, by reason."""
    token: Token["Trace | None"] | None = None

    def stages(self) -> dict[str, float]:
        """Return the seconds of each stage; one that came several times, in a batch of several bundles, in sum."""
        found: dict[str, float] = {}
        for part in self.parts:
            found[part.stage] = found.get(part.stage, 0.0) + part.seconds
        return found


_CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)


def mark(stage: str) -> None:
    """Say that a stage of the request under way ends now."""
    trace = _CURRENT.get()
    if trace is not None:
        now_s = time.perf_counter()
        trace.parts.append(Part(stage, trace.last_s, now_s - trace.last_s))
        trace.last_s = now_s


def name_model(name: str) -> None:
    """Say that the request under way is for a model that is served."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.model = name


class Watch:
    """Counts, tells and keeps. Threads may share it."""

    def __init__(
        self,
        request_log: RequestLog | None = None,
        parity_log: ParityLog | None = None,
        replica: str = "",
        spans: Spans | None = None,
    ) -> None:
        """Count from zero, write to these logs and send these spans; `replica` tells whose metrics a scrape met."""
        self.replica = replica
        self._spans = spans
        self.metrics = Metrics()
        self._request_log, self._parity_log = request_log, parity_log
        self._windows: Mapping[ModelLabels, DriftWindow] = {}
        self.metrics.registry.register(_OwnState(self))

    @property
    def logs(self) -> dict[str, RequestLog | ParityLog]:
        """The logs that are written, by name."""
        found = {"requests": self._request_log, "parity": self._parity_log}
        return {name: log for name, log in found.items() if log is not None}

    def begin(self, route: str, transport: Transport) -> Trace:
        """Open the trace of a request; `route` is one of few words."""
        now_s = time.perf_counter()
        trace = Trace(route, transport, now_s, now_s)
        trace.token = _CURRENT.set(trace)
        return trace

    def end(self, trace: Trace) -> None:
        """Count and tell a request that is answered; its status and request id are set by now."""
        if trace.token is not None:
            _CURRENT.reset(trace.token)
            trace.token = None
        now_s = time.perf_counter()
        stages = {**trace.stages(), "total": now_s - trace.started_s}
        labels = (trace.model, trace.variant, trace.version)
        self.metrics.count_request(labels, (trace.route, trace.transport), trace.status)
        if trace.num_rows:
            self.metrics.observe_stages(trace.model, stages)
        log = self._request_log
        if log is not None and log.wants(trace.request_id):
            log.put(_line(trace, stages, log))
        if self._spans is not None:
            self._spans.put(trace, now_s)

    def scored(
        self,
        labels: ModelLabels,
        queries: Sequence[ScoreQuery],
        found: Sequence["Scored"],
        request_id: str,
        places: Sequence[int] = (0,),
    ) -> None:
        """Count what one bundle answered, and keep it if it is sampled.

        Args:
            labels: of the bundle.
            queries: that were asked.
            found: their answers.
            request_id: of the request they came with.
            places: of the queries in it.
        """
        self._count(labels, found)
        trace = _CURRENT.get()
        if trace is not None:
            _add(trace, labels, queries, found)
        log = self._parity_log
        if log is not None and log.wants(request_id):
            model = dict(zip(("name", "variant", "version"), labels, strict=True))
            for place, query, one in zip(places, queries, found, strict=True):
                log.put(request_id, place, model, query, one)

    def _count(self, labels: ModelLabels, found: Sequence["Scored"]) -> None:
        series, window = self.metrics.of(labels), self._windows.get(labels)
        series.count(len(found), sum(len(one.probs) for one in found))
        for one in found:
            features, read = one.features, one.history
            series.count_scores(one.probs)
            if read is not None:
                series.count_history(read.reason or "hit", read.age_s)
            for kind, number in (
                ("item", features.num_unknown_items),
                ("user", int(one.is_unknown_user)),
                ("value", len(features.unknown_fields)),
                ("left_out", len(features.default_fields)),
            ):
                if number:
                    series.count_unknown(kind, number)
            if window is not None:
                window.add(
                    one.probs,
                    read.length if read else 0,
                    features.is_unknown_user,
                    features.num_unknown_items,
                )

    def retain(self, served: Mapping[ModelLabels, "Bundle"]) -> None:
        """Watch these bundles from now on and forget all others; what goes on being served keeps its counts."""
        self._windows = {
            labels: self._windows.get(labels) or DriftWindow(bundle.reference)
            for labels, bundle in served.items()
            if bundle.reference is not None
        }
        self.metrics.retain(served)

    def drift(self, labels: ModelLabels) -> dict[str, Any]:  # Any: JSON
        """Return how far a bundle's scores and histories are from its reference; says where there is none."""
        window = self._windows.get(labels)
        if window is None:
            return {"reference": None, "drift": None}
        reference, found = window.reference, window.drift()
        return {
            "reference": {
                "start_ts": reference.start_ts,
                "stop_ts": reference.stop_ts,
                "num_rows": reference.num_rows,
                "coverage": reference.coverage,
            },
            "drift": None if found is None else asdict(found),
        }

    def follow(self, service: Described) -> None:
        """Let the metrics tell what `service` serves, too."""
        self.metrics.registry.register(ServiceState(service))

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus (`CONTENT_TYPE`)."""
        return generate_latest(self.metrics.registry)

    def close(self) -> None:
        """Write what waits for the logs, and send what waits of the spans."""
        for log in self.logs.values():
            log.lines.close()
        if self._spans is not None:
            self._spans.close()


def _add(
    trace: Trace, labels: ModelLabels, queries: Sequence[ScoreQuery], found: Sequence["Scored"]
) -> None:
    name, variant, version = labels
    trace.model = name
    trace.variant = variant if trace.variant in ("", variant) else _MIXED
    trace.version = version if trace.version in ("", version) else _MIXED
    trace.num_queries += len(found)
    trace.num_rows += sum(len(one.probs) for one in found)
    if trace.route == "score":
        trace.user = queries[0].user
    for timing in {id(one.timing): one.timing for one in found}.values():
        read_s = timing.began_s + timing.features_s
        trace.parts += [
            Part("features", timing.began_s, timing.features_s),
            Part("store", read_s, timing.store_s),
            Part("model", read_s + timing.store_s, timing.model_s),
        ]
    for one in found:
        reason = one.history.reason if one.history else None
        if reason is not None:
            trace.degraded[reason] = trace.degraded.get(reason, 0) + 1


# Any: JSON
def _line(trace: Trace, stages: Mapping[str, float], log: RequestLog) -> dict[str, Any]:
    return {
        "ts": time.time_ns() // 1000,
        "request_id": trace.request_id,
        "route": trace.route,
        "transport": trace.transport,
        "status": trace.status,
        "model": trace.model or None,
        "variant": trace.variant or None,
        "version": trace.version or None,
        "user": log.hash_user(trace.user) if trace.user else None,
        "queries": trace.num_queries,
        "rows": trace.num_rows,
        "ms": {stage: round(1000 * value, 3) for stage, value in stages.items()},
        "degraded": trace.degraded,
    }


class _OwnState(Collector):
    """Tells who is watched, and what became of the records for the logs."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        """Return the replica, and written and dropped records by log."""
        written = CounterMetricFamily("loopfm_log_records", "Records written", labels=["log"])
        dropped = CounterMetricFamily("loopfm_log_dropped", "Records lost", labels=["log"])
        for name, log in self._watch.logs.items():
            written.add_metric([name], log.lines.written)
            dropped.add_metric([name], log.lines.dropped)
        replica = GaugeMetricFamily("loopfm_replica_info", "Who answers", labels=["replica"])
        replica.add_metric([self._watch.replica], 1)
        return [replica, written, dropped]
