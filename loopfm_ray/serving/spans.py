"""Requests as OpenTelemetry traces, sent to a collector over OTLP: a server span for each request, and one for each of its stages.

A span is made when its request is answered, from the times that were taken for the metrics anyway, so a request that is not
sampled costs a look at its parent. What is asked and answered is not in it: the attributes are those of the request log, without
the user. Needs the packages of `loopfm-ray[otel]`.
"""

import time
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from loopfm_ray.serving.watch import Trace

__all__ = ["Spans", "SpansConfig", "make_provider"]

_SERVER_ERROR = 500
_NS_PER_S = 1_000_000_000
_NOT_INSTALLED = "spans needs OpenTelemetry, which is not installed ({error}); install `loopfm-ray[otel]`, or leave spans out"


class SpansConfig(Config):
    """Where the spans of requests go, and how many."""

    endpoint: Annotated[str, Field(pattern=r"https?://\S+")]
    """Address of the collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Of the requests whose caller does not say by `traceparent` whether they are sampled."""
    service: str = "loopfm"
    """Name of the service in the traces."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Deadline of one delivery; what can not be delivered is lost, and said in the log."""


class Spans:
    """Sends the spans of sampled requests. Threads may share it."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Send by a provider that `make_provider` made.

        Raises:
            ConfigError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(_NOT_INSTALLED.format(error=error)) from error
        self._provider = provider
        self._tracer = provider.get_tracer("loopfm_ray.serving")
        self._propagator = TraceContextTextMapPropagator()

    def put(self, trace: "Trace", ended_s: float) -> None:
        """Send the spans of a request, if it is sampled.

        Args:
            trace: of the request, whole.
            ended_s: when it was answered, on the clock of the trace.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        now_ns = time.time_ns()

        def moment(seconds: float) -> int:
            return now_ns - int((ended_s - seconds) * _NS_PER_S)

        parent = Context()
        if trace.traceparent:
            headers = {"traceparent": trace.traceparent, "tracestate": trace.tracestate}
            parent = self._propagator.extract(headers, context=parent)
        span = self._tracer.start_span(
            trace.route, parent, SpanKind.SERVER, start_time=moment(trace.started_s)
        )
        if not span.is_recording():
            return
        span.set_attributes(_attributes(trace))
        if trace.status >= _SERVER_ERROR:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span, parent)
        for part in trace.parts:
            child = self._tracer.start_span(part.stage, inside, start_time=moment(part.started_s))
            child.end(moment(part.started_s + part.seconds))
        span.end(now_ns)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def _attributes(trace: "Trace") -> dict[str, Any]:  # Any: strings and numbers
    found = {
        "loopfm.request_id": trace.request_id,
        "loopfm.transport": trace.transport,
        "loopfm.status": trace.status,
        "loopfm.model": trace.model,
        "loopfm.variant": trace.variant,
        "loopfm.version": trace.version,
        "loopfm.queries": trace.num_queries,
        "loopfm.rows": trace.num_rows,
    }
    found |= {f"loopfm.degraded.{reason}": count for reason, count in trace.degraded.items()}
    return {name: value for name, value in found.items() if value != ""}


def make_provider(
    config: SpansConfig, replica: str, exporter: "SpanExporter | None" = None
) -> "TracerProvider":
    """Return what samples, collects and delivers spans.

    Args:
        config: where to and how many.
        replica: who sends them.
        exporter: takes the spans at once; None delivers them to the endpoint in the background.

    Raises:
        ConfigError: OpenTelemetry, or its OTLP exporter, is not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(_NOT_INSTALLED.format(error=error)) from error
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.share)),
        resource=Resource.create({"service.name": config.service, "service.instance.id": replica}),
        shutdown_on_exit=False,
    )
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        sender = OTLPSpanExporter(config.endpoint, timeout=config.timeout_s)
        provider.add_span_processor(BatchSpanProcessor(sender))
    return provider
