"""What the handlers read of an HTTP request: its id, and its body with the size and type that the contract allows."""

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

__all__ = ["read_body", "request_id_for"]


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
    return check_contract(partial(contract.model_validate_json, bytes(body)))


def request_id_for(request: Request) -> str:
    """Return the caller's `x-request-id` when it is short and plain, else a new one; the same for one request."""
    known: str | None = getattr(request.state, "request_id", None)
    if known is None:
        known = request_id_of(request.headers.get("x-request-id", ""))
        request.state.request_id = known
    return known
