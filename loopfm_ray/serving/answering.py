"""What every door of the service does with a request, whatever it came by: ask for the key, check, answer, or refuse.

HTTP (`serving/api.py`) and gRPC (`serving/rpc.py`) read bytes and write bytes; all that is decided is decided here, once.
A refusal is a `Problem` (RFC 9457) that names the fields at fault and never repeats what the caller sent as a value.
"""

import math
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

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

__all__ = [
    "BodyT",
    "Refusal",
    "Scorer",
    "admit",
    "answer_batch",
    "answer_score",
    "check_contract",
    "check_deadline",
    "check_size",
    "describe",
    "is_ready",
    "present",
    "request_id_of",
]

BodyT = TypeVar("BodyT", ScoreRequest, BatchRequest)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_AFTER_S = 1
_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class Scorer(Protocol):
    """What the doors need of a service."""

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


class Refusal(Exception):  # noqa: N818 - it is an answer, not a failure
    """The answer to a request that is not served: an HTTP status, which other doors translate, and what is wrong."""

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[dict[str, str]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.retry_after_s = None if retry_after_s is None else math.ceil(retry_after_s)
        """Whole seconds to wait before the next try; None where waiting does not help."""

    def problem(self, request_id: str) -> Problem:
        """Return the error body."""
        return Problem(
            title=_TITLES.get(self.status, "Error"),
            status=self.status,
            detail=self.detail,
            errors=self.errors,
            request_id=request_id,
        )


def request_id_of(given: str) -> str:
    """Return the caller's request id when it is short and plain, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def admit(gate: Gate | None, authorization: str) -> None:
    """Let a request with a key through, as often as the key may ask.

    Args:
        gate: knows the keys; None asks for none.
        authorization: what the header or metadata of that name holds.

    Raises:
        Refusal: 401 without a key, 429 beyond its rate.
    """
    if gate is None:
        return
    scheme, _, secret = authorization.partition(" ")
    verdict = gate.check(secret.strip()) if scheme.lower() == "bearer" else Verdict(None)
    if verdict.name is None:
        raise Refusal(401, "send `Authorization: Bearer KEY` with a key of this service")
    if verdict.retry_after_s > 0:
        detail = f"key {verdict.name!r} asks too often; wait and try again"
        raise Refusal(429, detail, retry_after_s=verdict.retry_after_s)


def present(scorer: Scorer | None) -> Scorer:
    """Return the scorer.

    Raises:
        Refusal: 503, there is none yet.
    """
    if scorer is None:
        raise Refusal(503, "no model is loaded yet; try again soon", retry_after_s=_RETRY_AFTER_S)
    return scorer


def is_ready(scorer: Scorer | None) -> bool:
    """Return whether a model is loaded."""
    return scorer is not None and bool(scorer.summary()["models"])


def describe(scorer: Scorer, name: str) -> dict[str, Any]:  # Any: JSON
    """Return what is served under a name.

    Raises:
        Refusal: 404, nothing is.
    """
    try:
        return scorer.describe(name)
    except UnknownModelError as error:
        raise Refusal(404, str(error)) from None


def check_size(num_bytes: int) -> None:
    """Check the bytes of a request, which are counted before anything is made of them.

    Raises:
        Refusal: 413, they are too many.
    """
    if num_bytes > MAX_BODY_BYTES:
        raise Refusal(413, f"the body is over {MAX_BODY_BYTES} bytes; send fewer items")


def check_deadline(deadline_ts: int | None, now_ts: int) -> None:
    """Check that the caller still waits: a request that came too late is not scored for nobody.

    Args:
        deadline_ts: when it no longer does; None waits.
        now_ts: the time now.

    Raises:
        Refusal: 504, it does not.
    """
    if deadline_ts is not None and now_ts > deadline_ts:
        raise Refusal(504, "the deadline passed before the request was scored")


def check_contract(parse: Callable[[], BodyT]) -> BodyT:
    """Return what `parse` makes of a body with one of the contract's types.

    Raises:
        Refusal: 400 when it is not JSON, 422 when it does not fit the contract, with the fields at fault.
    """
    try:
        return parse()
    except ValidationError as error:
        raise _misfit(error) from None


def answer_score(
    scorer: Scorer, name: str, sent: ScoreRequest, now_ts: int, request_id: str
) -> ScoreResponse:
    """Score one request.

    Raises:
        Refusal: 404 for an unknown model, 422 when the model refuses the context.
    """
    try:
        return scorer.respond(name, sent.to_query(now_ts), request_id)
    except UnknownModelError as error:
        raise Refusal(404, str(error)) from None
    except RequestError as error:
        raise Refusal(422, str(error)) from None


def answer_batch(
    scorer: Scorer, name: str, sent: BatchRequest, now_ts: int, request_id: str
) -> BatchResponse:
    """Score many requests: all, or none.

    Raises:
        Refusal: 404 for an unknown model, 422 when the model refuses the context of one, which is named.
    """
    try:
        queries = [one.to_query(now_ts) for one in sent.requests]
        return scorer.respond_many(name, queries, request_id)
    except UnknownModelError as error:
        raise Refusal(404, str(error)) from None
    except RequestError as error:
        where = [] if error.index is None else [_entry(f"requests.{error.index}", str(error))]
        raise Refusal(422, str(error), where) from None


def _misfit(error: ValidationError) -> Refusal:
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
        return Refusal(400, "the body is not JSON", errors)
    return Refusal(422, "the request does not fit the contract; see errors", errors)


def _entry(name: str, message: str) -> dict[str, str]:
    return {"field": name, "message": message}


def _field(loc: Sequence[int | str]) -> str:
    """Return the path of a field; what is inside a value is left out."""
    begin = 2 if len(loc) > 1 and loc[0] == "requests" else 0
    depth = begin + (2 if loc[begin : begin + 1] in (("context",), ("items",)) else 1)
    text = ".".join(str(part) for part in loc[:depth]) or "(body)"
    return text if len(text) <= 160 else f"{text[:157]}..."
