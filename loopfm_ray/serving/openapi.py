"""The OpenAPI description of the HTTP contract, so that generated clients and fuzzers know what there is."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loopfm_ray.serving.contract import BatchRequest, Problem, ScoreRequest

__all__ = ["add_contract", "body_of", "problems"]

Json = dict[str, Any]  # Any: JSON
_REF = "#/components/schemas/{model}"
_REASONS = {
    400: "The body is not JSON.",
    401: "No key, or none that the service knows.",
    404: "No model of that name is served.",
    413: "The body is too long.",
    415: "The body is of another type than JSON.",
    422: "The request does not fit the contract, or the model.",
    429: "The key asks too often; `Retry-After` says when to come back.",
    500: "The service failed; its log has the request id.",
    503: "Too many wait, or no model is loaded yet; `Retry-After` says when to come back.",
    504: "The caller's deadline passed before the request was scored.",
}


def problems(codes: Iterable[int]) -> dict[int | str, Json]:
    """Return the descriptions of error answers, for FastAPI's `responses`."""
    content = {"application/problem+json": {"schema": {"$ref": _ref(Problem)}}}
    return {code: {"description": _REASONS[code], "content": content} for code in codes}


def body_of(contract: type[BaseModel]) -> Json:
    """Return the description of a body that the application reads itself, for FastAPI's `openapi_extra`."""
    content = {"application/json": {"schema": {"$ref": _ref(contract)}}}
    return {"requestBody": {"required": True, "content": content}}


def add_contract(app: FastAPI) -> None:
    """Let the description of `app` hold the types that `problems` and `body_of` refer to."""

    def describe() -> Json:
        if app.openapi_schema is None:
            tree = get_openapi(title=app.title, version=app.version, routes=app.routes)
            asked = [(kind, "validation") for kind in (Problem, ScoreRequest, BatchRequest)]
            _, own = models_json_schema(asked, ref_template=_REF)  # type: ignore[arg-type]  # the mode is a literal
            tree.setdefault("components", {}).setdefault("schemas", {}).update(own["$defs"])
            app.openapi_schema = tree
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way


def _ref(kind: type[BaseModel]) -> str:
    return _REF.format(model=kind.__name__)
