"""What the handlers read of an HTTP request: its id, its deadline, and its body with the size and type that the contract allows."""

import re
from functools import partial

from fastapi import Request

from loopfm_ray.serving.answering import (
    BodyT,
    Refusal,
    check_contract,
    check_size,
    present,
    request_id_of,
)
from loopfm_ray.serving.watch import mark
from loopfm_ray.types import MICROS_PER_S

__all__ = ["deadline_of", "read_body", "request_id_for"]

TIMEOUT, STARTED = "x-timeout-ms", "x-request-start"
_WHOLE_MS = re.compile(r"[0-9]{1,6}")
_MOMENT = re.compile(r"(?:t=)?([0-9]{10})(?:\.([0-9]{1,6}))?|(?:t=)?([0-9]{13})|(?:t=)?([0-9]{16})")


def deadline_of(request: Request, now_ts: int) -> int | None:
    """Return when the caller no longer waits, in microseconds UTC; None where it does not say.

    `x-timeout-ms` is how long it waits, from `x-request-start` if a proxy or the caller gives that (`t=` and the seconds,
    milliseconds or microseconds since 1970, as nginx, HAProxy and others write it), else from now.

    Raises:
        Refusal: 400, a header is not of this form.
    """
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    if not _WHOLE_MS.fullmatch(given) or not int(given):
        raise Refusal(400, f"{TIMEOUT} must be whole milliseconds from 1 to 999999")
    return _started(request.headers.get(STARTED), now_ts) + int(given) * 1000


def _started(text: str | None, now_ts: int) -> int:
    if text is None:
        return now_ts
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise Refusal(400, f"{STARTED} must be `t=` and seconds, milli- or microseconds since 1970")
    seconds, part, millis, micros = found.groups()
    if seconds is not None:
        return int(seconds) * MICROS_PER_S + int((part or "0").ljust(6, "0"))
    return int(millis) * 1000 if millis is not None else int(micros)


async def read_body(request: Request, contract: type[BodyT]) -> BodyT:
    """Read a body and check it against its contract.

    Raises:
        Refusal: there is no model yet, or the body is of another type, too long, or does not fit.
    """
    present(request.app.state.scorer)
    content_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        raise Refusal(415, "send application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        check_size(len(body))
    mark("body")
    sent = check_contract(partial(contract.model_validate_json, bytes(body)))
    mark("decode")
    return sent


def request_id_for(request: Request) -> str:
    """Return the caller's `x-request-id` when it is short and plain, else a new one; the same for one request."""
    known: str | None = getattr(request.state, "request_id", None)
    if known is None:
        known = request_id_of(request.headers.get("x-request-id", ""))
        request.state.request_id = known
    return known
