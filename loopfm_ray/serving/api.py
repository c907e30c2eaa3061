"""The HTTP face of a service: a FastAPI application that knows nothing of Ray.

Every error is a problem+json body (RFC 9457) that names the fields at fault and never repeats what the caller sent as a
value. Scoring runs on the event loop: it is a few milliseconds of work on one thread, and a hop to a thread pool costs
more than it gives; a replica is one process.
"""

import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from loopfm_ray.serving.contract import (
    MAX_BODY_BYTES,
    BatchRequest,
    BatchResponse,
    Problem,
    RequestError,
    ScoreQuery,
    ScoreRequest,
    ScoreResponse,
    UnknownModelError,
)
from loopfm_ray.serving.keys import Gate, Verdict
from loopfm_ray.serving.watch import CONTENT_TYPE, Watch, mark
from loopfm_ray.serving.watching import Watching

__all__ = ["Scorer", "create_api", "now_ts"]

logger = logging.getLogger(__name__)

BodyT = TypeVar("BodyT", ScoreRequest, BatchRequest)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_AFTER_S = "1"
_OPEN_PATHS = ("/healthz", "/readyz")


class Scorer(Protocol):
    """What the application needs of a service."""

    def respond(self, name: str, query: ScoreQuery, request_id: str) -> ScoreResponse:
        """Score one query with the model of a name."""

    def respond_many(
        self, name: str, queries: Sequence[ScoreQuery], request_id: str
    ) -> BatchResponse:
        """Score many queries with the model of a name."""

    def describe(self, name: str) -> dict[str, Any]:
        """Return the body of `GET /v1/models/NAME`."""
        # Any: JSON for people and monitors, described in docs/.

    def summary(self) -> dict[str, Any]:
        """Return the body of `GET /v1/models`."""

    def reload(self) -> bool:
        """Read newer versions of the histories if there are some; called outside of requests."""


def now_ts() -> int:
    """Return the time now in microseconds UTC; the only clock of the service, read at its edge."""
    return time.time_ns() // 1000


def create_api(
    scorer: Scorer | None = None,
    clock: Callable[[], int] = now_ts,
    gate: Gate | None = None,
    watch: Watch | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        scorer: what scores; None makes a service that is alive but not ready. `app.state.scorer` sets it later.
        clock: microseconds UTC for requests that carry no time.
        gate: knows the keys that every path but the probes then asks for; None asks for none.
        watch: told of every request but the probes, and read at `/metrics`; None watches nothing.
    """
    app = FastAPI(title="loopfm_ray scoring", version="1", redoc_url=None)
    if gate is not None:
        app.add_middleware(_Guard, gate=gate)
    if watch is not None:  # around the guard, so that what it refuses is counted
        app.add_middleware(Watching, watch=watch)
        app.add_api_route("/metrics", _metrics, methods=["GET"], summary="For Prometheus")
    app.state.watch = watch
    app.state.scorer = scorer
    app.state.clock = clock
    app.add_api_route("/healthz", _healthz, methods=["GET"], summary="The process answers")
    app.add_api_route("/readyz", _readyz, methods=["GET"], summary="A model is loaded")
    app.add_api_route("/v1/models", _models, methods=["GET"], summary="Names and versions")
    app.add_api_route(
        "/v1/models/{vm}",
        _model,
        methods=["GET"],
        summary="Versions, fields, limits and counters of one model",
        responses={code: {"model": Problem} for code in (404, 503)},
    )
    app.add_api_route(
        "/v1/models/{vm}:score",
        _score,
        methods=["POST"],
        summary="Calibrated probabilities of the items of one user",
        response_model=ScoreResponse,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": {"required": True, "content": _content(ScoreRequest)}},
    )
    app.add_api_route(
        "/v1/models/{vm}:batch",
        _batch,
        methods=["POST"],
        summary="Calibrated probabilities of the items of many users",
        response_model=BatchResponse,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": {"required": True, "content": _content(BatchRequest)}},
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


class _Guard:
    """Lets a request with a key through to the application, as often as the key may ask."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or have it answered."""
        refusal = None
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            refusal = self._refusal(Request(scope))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        verdict = self._gate.check(secret.strip()) if is_bearer else Verdict(None)
        if verdict.name is None:
            response = _problem(
                request, 401, "send `Authorization: Bearer KEY` with a key of this service"
            )
            response.headers["www-authenticate"] = "Bearer"
            return response
        if verdict.retry_after_s > 0:
            response = _problem(
                request, 429, f"key {verdict.name!r} asks too often; wait and try again"
            )
            response.headers["retry-after"] = str(math.ceil(verdict.retry_after_s))
            return response
        return None


async def _metrics(request: Request) -> Response:
    watch: Watch = request.app.state.watch
    return Response(watch.exposition(), media_type=CONTENT_TYPE)


async def _healthz() -> dict[str, str]:
    return {"status": "alive"}


async def _readyz(request: Request) -> Response:
    scorer: Scorer | None = request.app.state.scorer
    if scorer is None or not scorer.summary()["models"]:
        return _not_ready(request)
    return JSONResponse({"status": "ready"})


async def _models(request: Request) -> Response:
    scorer: Scorer | None = request.app.state.scorer
    return _not_ready(request) if scorer is None else JSONResponse(scorer.summary())


async def _model(request: Request, vm: str) -> Response:
    scorer: Scorer | None = request.app.state.scorer
    if scorer is None:
        return _not_ready(request)
    try:
        return JSONResponse(scorer.describe(vm))
    except UnknownModelError as error:
        return _problem(request, 404, str(error))


async def _score(request: Request, vm: str) -> Response:
    def answer(scorer: Scorer, sent: ScoreRequest, request_id: str) -> BaseModel:
        return scorer.respond(vm, sent.to_query(request.app.state.clock()), request_id)

    return await _answer(request, ScoreRequest, answer)


async def _batch(request: Request, vm: str) -> Response:
    def answer(scorer: Scorer, sent: BatchRequest, request_id: str) -> BaseModel:
        now = request.app.state.clock()
        queries = [one.to_query(now) for one in sent.requests]
        return scorer.respond_many(vm, queries, request_id)

    return await _answer(request, BatchRequest, answer)


async def _answer(
    request: Request,
    contract: type[BodyT],
    answer: Callable[[Scorer, BodyT, str], BaseModel],
) -> Response:
    """Read a body, check it against its contract, and answer it or say what is wrong."""
    scorer: Scorer | None = request.app.state.scorer
    if scorer is None:
        return _not_ready(request)
    content_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        return _problem(request, 415, "send application/json")
    body = await _read_body(request)
    if body is None:
        return _problem(request, 413, f"the body is over {MAX_BODY_BYTES} bytes; send fewer items")
    mark("body")
    try:
        sent = contract.model_validate_json(body)
    except ValidationError as error:
        return _invalid(request, error)
    mark("decode")
    request_id = _request_id(request)
    try:
        found = answer(scorer, sent, request_id)
    except UnknownModelError as error:
        return _problem(request, 404, str(error))
    except RequestError as error:
        where = [] if error.index is None else [_entry(f"requests.{error.index}", str(error))]
        return _problem(request, 422, str(error), where if contract is BatchRequest else [])
    headers = {"x-request-id": request_id}
    return Response(found.model_dump_json(), media_type="application/json", headers=headers)


async def _read_body(request: Request) -> bytes | None:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _invalid(request: Request, error: ValidationError) -> Response:
    """Return one error entry for each field; a union reports every type it tried, that is one field here."""
    found: dict[str, list[str]] = {}
    is_json = True
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        is_json = is_json and item["type"] != "json_invalid"
        found.setdefault(_field(item["loc"]), []).append(
            item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        )
    errors = [
        _entry(name, " or ".join(dict.fromkeys(messages)))
        for name, messages in sorted(found.items())
    ]
    if not is_json:
        return _problem(request, 400, "the body is not JSON", errors)
    return _problem(request, 422, "the request does not fit the contract; see errors", errors)


def _entry(name: str, message: str) -> dict[str, str]:
    return {"field": name, "message": message}


def _field(loc: Sequence[int | str]) -> str:
    """Return the path of a field; what is inside a value is left out."""
    begin = 2 if len(loc) > 1 and loc[0] == "requests" else 0
    depth = begin + (2 if loc[begin : begin + 1] in (("context",), ("items",)) else 1)
    text = ".".join(str(part) for part in loc[:depth]) or "(body)"
    return text if len(text) <= 160 else f"{text[:157]}..."


def _not_ready(request: Request) -> Response:
    response = _problem(request, 503, "no model is loaded yet; try again soon")
    response.headers["retry-after"] = _RETRY_AFTER_S
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = str(error.detail) if isinstance(error, HTTPException) else "see the log"
    response = _problem(request, status, detail)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


async def _internal_error(request: Request, error: Exception) -> Response:
    request_id = _request_id(request)
    logger.error("request %s failed: %s", request_id, type(error).__name__, exc_info=error)
    return _problem(request, 500, "the service failed; the log has the request id")


def _problem(
    request: Request, status: int, detail: str, errors: Sequence[dict[str, str]] = ()
) -> Response:
    request_id = _request_id(request)
    problem = Problem(
        title=_TITLES.get(status, "Error"),
        status=status,
        detail=detail,
        errors=list(errors),
        request_id=request_id,
    )
    return Response(
        problem.model_dump_json(),
        status_code=status,
        media_type="application/problem+json",
        headers={"x-request-id": request_id},
    )


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem} for code in (400, 401, 404, 413, 415, 422, 429, 503)
}
_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def _request_id(request: Request) -> str:
    """Return the caller's `x-request-id` when it is short and plain, else a new one; the same for one request."""
    known: str | None = getattr(request.state, "request_id", None)
    if known is None:
        given = request.headers.get("x-request-id", "")
        known = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.request_id = known
    return known


def _content(model: type[BaseModel]) -> dict[str, Any]:
    # Any: a JSON schema is whatever pydantic makes of the type.
    return {"application/json": {"schema": model.model_json_schema()}}
