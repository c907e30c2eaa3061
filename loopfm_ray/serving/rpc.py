"""The gRPC face of a service: the contract, checks, keys and limits of HTTP, translated.

`ScoringServicer` works in a plain `grpc.server` and behind Ray Serve's gRPC proxy, which calls methods of the same names
with a context of its own. A refusal sets a status code; trailing metadata `problem-bin` holds the problem that HTTP would
answer. What protobuf drops silently elsewhere, a field that this version does not know, is refused.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from loopfm_ray.serving import scoring_pb2 as wire
from loopfm_ray.serving import scoring_pb2_grpc
from loopfm_ray.serving.answering import (
    Refusal,
    Scorer,
    admit,
    answer_batch,
    answer_score,
    check_contract,
    check_size,
    describe,
    is_ready,
    present,
    request_id_of,
)
from loopfm_ray.serving.contract import BatchRequest, ScoreRequest, ScoreResponse
from loopfm_ray.serving.keys import Gate
from loopfm_ray.serving.watch import Watch, mark

__all__ = ["METHODS", "SERVICE", "ScoringServicer", "add_health", "add_scoring"]

logger = logging.getLogger(__name__)

SERVICE = wire.DESCRIPTOR.services_by_name["Scoring"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
METHODS = ("Score", "Batch", "ListModels", "GetModel", "Check")
MAX_PROBLEM_BYTES = 4096
"""Of the JSON of a problem. Trailing metadata has to stay below 8 KB, where this takes a third more and the detail up to thrice."""
_MAX_DETAIL_BYTES = 500
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

SentT = TypeVar("SentT", bound=Message)
MadeT = TypeVar("MadeT", bound=Message)


class CallContext(Protocol):
    """What grpc's own context and Ray Serve's have in common."""

    def invocation_metadata(self) -> Iterable[Any]:
        """Return the caller's metadata: pairs of key and value."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status."""

    def set_details(self, details: str) -> None:
        """Set the message of the status."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set what is sent after the answer."""
        # Any: grpc takes any sequence of pairs, Serve a list.


class ScoringServicer:
    """Answers `loopfm.scoring.v1.Scoring` and `grpc.health.v1.Health/Check`. Threads may share it."""

    def __init__(
        self,
        scorer: Scorer | None,
        clock: Callable[[], int],
        gate: Gate | None = None,
        is_offered: bool = True,
        watch: Watch | None = None,
    ) -> None:
        """Take what scores.

        Args:
            scorer: None makes a service that is alive but not ready; the attribute may be set later.
            clock: microseconds UTC for requests that carry no time.
            gate: knows the keys that every method but the health check then asks for; None asks for none.
            is_offered: False answers every call that it is not implemented, whoever routes calls here.
            watch: told of every call but the health check; None watches nothing.
        """
        self.scorer, self._clock, self._gate = scorer, clock, gate
        self._is_offered = is_offered
        self.watch = watch

    # The names are those of the proto file.
    def Score(self, request: wire.ScoreRequest, context: CallContext) -> wire.ScoreResponse:  # noqa: N802
        """Score the items of one user."""
        return self._watched("score", request, context, self._score, wire.ScoreResponse)

    def Batch(self, request: wire.BatchRequest, context: CallContext) -> wire.BatchResponse:  # noqa: N802
        """Score the items of many users: all, or none."""
        return self._watched("batch", request, context, self._batch, wire.BatchResponse)

    def ListModels(  # noqa: N802
        self, request: wire.ListModelsRequest, context: CallContext
    ) -> wire.ListModelsResponse:
        """Tell names and versions."""
        return self._watched("models", request, context, self._list, wire.ListModelsResponse)

    def GetModel(  # noqa: N802
        self, request: wire.GetModelRequest, context: CallContext
    ) -> wire.GetModelResponse:
        """Tell versions, fields, limits and counters of one model."""
        return self._watched("models", request, context, self._get, wire.GetModelResponse)

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: CallContext
    ) -> health_pb2.HealthCheckResponse:
        """Tell whether a model is loaded; asks for no key, as the probes of HTTP."""
        if request.service not in ("", SERVICE):
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"there is the service {SERVICE}")
            return health_pb2.HealthCheckResponse()
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if is_ready(self.scorer) else states.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=state)

    def _score(
        self, scorer: Scorer, sent: wire.ScoreRequest, request_id: str
    ) -> wire.ScoreResponse:
        body = check_contract(partial(ScoreRequest.model_validate, _query_tree(sent.query)))
        mark("decode")
        found = answer_score(scorer, sent.model, body, self._clock(), request_id)
        return _score_message(found)

    def _batch(
        self, scorer: Scorer, sent: wire.BatchRequest, request_id: str
    ) -> wire.BatchResponse:
        tree = {"requests": [_query_tree(query) for query in sent.requests]}
        body = check_contract(partial(BatchRequest.model_validate, tree))
        mark("decode")
        found = answer_batch(scorer, sent.model, body, self._clock(), request_id)
        results = [_score_message(one) for one in found.results]
        return wire.BatchResponse(results=results, request_id=request_id)

    def _list(
        self, scorer: Scorer, sent: wire.ListModelsRequest, request_id: str
    ) -> wire.ListModelsResponse:
        del sent, request_id
        summary = scorer.summary()
        models = [
            wire.ListModelsResponse.Model(name=one["name"], version=one["version"])
            for one in summary["models"]
        ]
        return wire.ListModelsResponse(revision=summary["revision"], models=models)

    def _get(
        self, scorer: Scorer, sent: wire.GetModelRequest, request_id: str
    ) -> wire.GetModelResponse:
        del request_id
        made = wire.GetModelResponse()
        made.description.update(describe(scorer, sent.model))
        return made

    def _watched(
        self,
        route: str,
        sent: SentT,
        context: CallContext,
        answer: Callable[[Scorer, SentT, str], MadeT],
        empty: type[MadeT],
    ) -> MadeT:
        """Answer a call, and have it counted."""
        given = {str(item[0]): item[1] for item in context.invocation_metadata()}
        request_id = request_id_of(str(given.get("x-request-id", "")))
        if self.watch is None:
            return self._answer(sent, context, given, request_id, answer, empty)[0]
        trace = self.watch.begin(route, "grpc")
        trace.request_id = request_id
        trace.traceparent = str(given.get("traceparent", ""))
        trace.tracestate = str(given.get("tracestate", ""))
        try:
            made, trace.status = self._answer(sent, context, given, request_id, answer, empty)
            return made
        finally:
            self.watch.end(trace)

    def _answer(
        self,
        sent: SentT,
        context: CallContext,
        given: dict[str, Any],  # Any: text or bytes
        request_id: str,
        answer: Callable[[Scorer, SentT, str], MadeT],
        empty: type[MadeT],
    ) -> tuple[MadeT, int]:
        """Answer a call, or say what is wrong with it; with the status that HTTP would have answered."""
        trailing: list[tuple[str, str | bytes]] = [("x-request-id", request_id)]
        status = 200
        try:
            if not self._is_offered:
                raise Refusal(501, "not offered over gRPC; set grpc_port of the serve config")
            admit(self._gate, str(given.get("authorization", "")))
            check_size(sent.ByteSize())
            _check_known(sent)
            made = answer(present(self.scorer), sent, request_id)
        except Refusal as refusal:
            made, status = empty(), refusal.status
            trailing += _refuse(context, refusal, request_id)
        except Exception as error:  # the edge: a bug must not tell the caller of the inside
            logger.error("request %s failed: %s", request_id, type(error).__name__, exc_info=error)
            made, status = empty(), 500
            failure = Refusal(status, "the service failed; the log has the request id")
            trailing += _refuse(context, failure, request_id)
        context.set_trailing_metadata(trailing)
        return made, status


def add_scoring(servicer: object, server: grpc.Server) -> None:
    """Give `server` the methods of `Scoring`; Ray Serve's proxy calls this by its import path."""
    add: Any = scoring_pb2_grpc.add_ScoringServicer_to_server  # Any: generated code has no types
    add(servicer, server)


def add_health(servicer: Any, server: grpc.Server) -> None:  # Any: Serve gives a stand-in
    """Give `server` the standard health check; `Watch` is left out, and so answered as not implemented."""
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(HEALTH, {"Check": check})
    server.add_generic_rpc_handlers((handler,))


def _refuse(
    context: CallContext, refusal: Refusal, request_id: str
) -> list[tuple[str, str | bytes]]:
    """Set the status of a refusal; return what belongs into its trailing metadata."""
    context.set_code(_CODES.get(refusal.status, grpc.StatusCode.INTERNAL))
    detail = refusal.detail.encode()[:_MAX_DETAIL_BYTES].decode(errors="ignore")
    context.set_details(detail)
    trailing: list[tuple[str, str | bytes]] = [
        ("problem-bin", _problem(refusal.status, detail, refusal.errors, request_id))
    ]
    if refusal.retry_after_s is not None:
        trailing.append(("retry-after", str(refusal.retry_after_s)))
    return trailing


def _problem(status: int, detail: str, errors: Sequence[dict[str, str]], request_id: str) -> bytes:
    """Return the JSON of a problem, with as many of its errors as metadata may hold."""
    body, kept = b"", list[dict[str, str]]()
    for error in (None, *errors):
        kept += [] if error is None else [error]
        longer = Refusal(status, detail, kept).problem(request_id).model_dump_json().encode()
        if error is not None and len(longer) > MAX_PROBLEM_BYTES:
            break
        body = longer
    return body


def _check_known(sent: Message) -> None:
    """Check that a message has no field that this version does not know, at any depth.

    Raises:
        Refusal: 422, it has.
    """
    known = type(sent)()
    known.CopyFrom(sent)
    known.DiscardUnknownFields()
    if known.ByteSize() != sent.ByteSize():
        detail = f"the request has fields that {SERVICE} does not have; make the client from the scoring.proto of this service"
        raise Refusal(422, detail)


def _query_tree(query: wire.Query) -> dict[str, Any]:  # Any: what `ScoreRequest` checks
    tree: dict[str, Any] = {
        "user": query.user,
        "items": list(query.items),
        "context": {name: _value(value) for name, value in query.context.items()},
    }
    when = query.WhichOneof("request_ts")
    if when is not None:
        tree["request_ts"] = getattr(query, when)
    return tree


def _value(value: wire.Value) -> Any:  # Any: None where nothing is set, which the contract refuses
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    found = getattr(value, kind)
    return list(found.values) if kind in ("texts", "numbers") else found


def _score_message(found: ScoreResponse) -> wire.ScoreResponse:
    features = found.features.model_dump(exclude_none=True)
    return wire.ScoreResponse(
        scores=found.scores,
        model=wire.ModelInfo(**found.model.model_dump()),
        features=wire.FeatureInfo(**features),
        unknown_items=found.unknown_items,
        request_id=found.request_id,
    )
