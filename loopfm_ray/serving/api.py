"""The HTTP face of a service: a FastAPI application that knows nothing of Ray.

Every error is a problem+json body (RFC 9457) that names the fields at fault and never repeats what the caller sent as a
value. Scoring runs on the event loop: it is a few milliseconds of work on one thread, and a hop to a thread pool costs
more than it gives; a replica is one process.
"""

import logging
import time
from collections.abc import Callable, Collection

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from loopfm_ray.serving.answering import (
    BodyT,
    Refusal,
    Scorer,
    admit,
    answer_batch,
    answer_score,
    check_deadline,
    describe,
    is_ready,
    present,
)
from loopfm_ray.serving.bodies import deadline_of, read_body, request_id_for
from loopfm_ray.serving.contract import (
    BatchRequest,
    BatchResponse,
    ScoreRequest,
    ScoreResponse,
)
from loopfm_ray.serving.keys import Gate
from loopfm_ray.serving.openapi import add_contract, body_of, problems
from loopfm_ray.serving.page import Page
from loopfm_ray.serving.watch import CONTENT_TYPE, Watch
from loopfm_ray.serving.watching import Watching

__all__ = ["Scorer", "create_api", "now_ts"]

logger = logging.getLogger(__name__)

_PROBLEMS = problems((400, 401, 404, 413, 415, 422, 429, 500, 503, 504))

_OPEN_PATHS = ("/healthz", "/readyz")


def now_ts() -> int:
    """Return the time now in microseconds UTC; the only clock of the service, read at its edge."""
    return time.time_ns() // 1000


def create_api(
    scorer: Scorer | None = None,
    clock: Callable[[], int] = now_ts,
    gate: Gate | None = None,
    page: Page | None = None,
    watch: Watch | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        scorer: what scores; None makes a service that is alive but not ready. `app.state.scorer` sets it later.
        clock: microseconds UTC for requests that carry no time.
        gate: knows the keys that every path but the probes and the files of the page then asks for; None asks for none.
        page: the page at `/ui`; None serves none.
        watch: told of every request but the probes, and read at `/metrics`; None watches nothing.
    """
    app = FastAPI(title="loopfm_ray scoring", version="1", redoc_url=None)
    if gate is not None:
        open_paths = (*_OPEN_PATHS, *(page.open_paths if page else ()))
        app.add_middleware(_Guard, gate=gate, open_paths=open_paths)
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
        responses=problems((401, 404, 429, 500, 503)),
    )
    app.add_api_route(
        "/v1/models/{vm}:score",
        _score,
        methods=["POST"],
        summary="Calibrated probabilities of the items of one user",
        response_model=ScoreResponse,
        responses=_PROBLEMS,
        openapi_extra=body_of(ScoreRequest),
    )
    app.add_api_route(
        "/v1/models/{vm}:batch",
        _batch,
        methods=["POST"],
        summary="Calibrated probabilities of the items of many users",
        response_model=BatchResponse,
        responses=_PROBLEMS,
        openapi_extra=body_of(BatchRequest),
    )
    if page is not None:
        page.add_to(app)
    add_contract(app)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


class _Guard:
    """Lets a request with a key through to the application, as often as the key may ask."""

    def __init__(self, app: ASGIApp, gate: Gate, open_paths: Collection[str]) -> None:
        self._app, self._gate, self._open_paths = app, gate, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or have it answered."""
        # behind a prefix, such as the `route_prefix` of Serve, a path begins with it
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path not in self._open_paths:
            request = Request(scope)
            try:
                admit(self._gate, request.headers.get("authorization", ""))
            except Refusal as refusal:
                await _problem(request, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _metrics(request: Request) -> Response:
    watch: Watch = request.app.state.watch
    return Response(watch.exposition(), media_type=CONTENT_TYPE)


async def _healthz() -> dict[str, str]:
    return {"status": "alive"}


async def _readyz(request: Request) -> Response:
    if not is_ready(request.app.state.scorer):
        present(None)
    return JSONResponse({"status": "ready"})


async def _models(request: Request) -> Response:
    return JSONResponse(present(request.app.state.scorer).summary())


async def _model(request: Request, vm: str) -> Response:
    return JSONResponse(describe(present(request.app.state.scorer), vm))


async def _score(request: Request, vm: str) -> Response:
    sent, now = await _read(request, ScoreRequest)
    scorer, request_id = present(request.app.state.scorer), request_id_for(request)
    return _reply(answer_score(scorer, vm, sent, now, request_id), request_id)


async def _batch(request: Request, vm: str) -> Response:
    sent, now = await _read(request, BatchRequest)
    scorer, request_id = present(request.app.state.scorer), request_id_for(request)
    return _reply(answer_batch(scorer, vm, sent, now, request_id), request_id)


async def _read(request: Request, contract: type[BodyT]) -> tuple[BodyT, int]:
    """Return the checked body and the time now, if the caller still waits for an answer."""
    deadline_ts = deadline_of(request, request.app.state.clock())
    sent = await read_body(request, contract)
    now: int = request.app.state.clock()
    check_deadline(deadline_ts, now)
    return sent, now


def _reply(found: BaseModel, request_id: str) -> Response:
    headers = {"x-request-id": request_id}
    return Response(found.model_dump_json(), media_type="application/json", headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(request, Refusal(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _internal_error(request: Request, error: Exception) -> Response:
    request_id = request_id_for(request)
    logger.error("request %s failed: %s", request_id, type(error).__name__, exc_info=error)
    return _problem(request, Refusal(500, "the service failed; the log has the request id"))


def _problem(request: Request, refusal: Refusal) -> Response:
    request_id = request_id_for(request)
    headers = {"x-request-id": request_id}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(refusal.retry_after_s)
    return Response(
        refusal.problem(request_id).model_dump_json(),
        status_code=refusal.status,
        media_type="application/problem+json",
        headers=headers,
    )
