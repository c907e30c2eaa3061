"""What a caller may send to the scoring service and what it gets back, closed to everything else.

A request is checked once, here: after `ScoreRequest.model_validate_json` every string has a bounded length, every number
is finite and the time is in microseconds. What only the model's schema can decide (which context fields exist) is checked
in `serving/features.py`.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loopfm_ray.errors import DataError

__all__ = [
    "MAX_BATCH",
    "MAX_BATCH_ITEMS",
    "MAX_BODY_BYTES",
    "MAX_CONTEXT_FIELDS",
    "MAX_ITEMS",
    "MAX_KEY_CHARS",
    "MAX_REQUEST_TS",
    "MAX_SEQUENCE_VALUES",
    "Backend",
    "BatchRequest",
    "BatchResponse",
    "ContextValue",
    "FeatureInfo",
    "ModelInfo",
    "Problem",
    "RequestError",
    "ScoreQuery",
    "ScoreRequest",
    "ScoreResponse",
    "UnknownModelError",
    "parse_request_ts",
]

MAX_ITEMS = 1000
"""Candidate items in one request."""
MAX_BATCH = 256
"""Requests in one batch."""
MAX_BATCH_ITEMS = 32_768
"""Candidate items in one batch."""
MAX_KEY_CHARS = 256
"""Characters of a user, an item or a categorical value."""
MAX_CONTEXT_FIELDS = 256
MAX_SEQUENCE_VALUES = 1000
"""Keys of one sequence field."""
MAX_BODY_BYTES = 4 * 2**20
"""A full request with every limit above in use fits; more is refused unread."""
MAX_REQUEST_TS = 253_402_300_799_999_999
"""The last microsecond of the year 9999."""

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Backend = Literal["torch", "onnx", "onnx_int8"]
"""What runs a model: torch, or ONNX Runtime with the weights as they are or in 8 bits."""
Key = Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)]
FieldName = Annotated[str, Field(min_length=1, max_length=128)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Text = Annotated[str, Field(max_length=MAX_KEY_CHARS)]
Moment = (
    Annotated[int, Field(ge=0, le=MAX_REQUEST_TS)]
    | Annotated[str, Field(json_schema_extra={"format": "date-time"})]
)
ContextValue = Annotated[
    Text
    | Integer
    | float
    | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_SEQUENCE_VALUES)]
    | Annotated[list[float], Field(fail_fast=True, max_length=MAX_ITEMS)],
    # each value fits one of them at most, but for whole numbers, so the first that fits is it
    Field(union_mode="left_to_right"),
]
"""A key, a number, the keys of a sequence field, or one number for each item."""


class RequestError(DataError):
    """A request does not fit the model that serves; the caller has to change it.

    `index` says which of several requests it was, None where there is one.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class UnknownModelError(RequestError):
    """No model of the asked name is served."""


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ScoreQuery:
    """One checked request: the time is given, nothing in it is optional any more."""

    user: str
    request_ts: int
    items: tuple[str, ...]
    context: dict[str, ContextValue]


class ScoreRequest(_Wire):
    """Body of `POST /v1/models/{vm}:score`."""

    user: Key = Field(
        description="Key of the user; one that is not known scores with the default user."
    )
    items: Annotated[list[Key], Field(min_length=1, max_length=MAX_ITEMS)] = Field(
        description="Keys of the candidates, scored in this order; repeats are allowed."
    )
    request_ts: Moment | None = Field(
        default=None,
        description="When the score is asked: RFC 3339 with an offset, or microseconds UTC; now when left out.",
    )
    context: Annotated[dict[FieldName, ContextValue], Field(max_length=MAX_CONTEXT_FIELDS)] = Field(
        default_factory=dict,
        description="Field name to value, as GET /v1/models/{vm} lists them; a field left out takes its default.",
    )

    @field_validator("request_ts")
    @classmethod
    def _to_micros(cls, value: int | str | None) -> int | None:
        if isinstance(value, str):
            return parse_request_ts(value)
        if value is not None and not 0 <= value <= MAX_REQUEST_TS:
            raise ValueError(f"must be microseconds UTC from 0 to {MAX_REQUEST_TS}")
        return value

    def to_query(self, default_ts: int) -> ScoreQuery:
        """Return the query with `default_ts` where the caller gave no time."""
        ts = default_ts if self.request_ts is None else int(self.request_ts)
        return ScoreQuery(self.user, ts, tuple(self.items), dict(self.context))


class ModelInfo(_Wire):
    """Which model scored."""

    name: str = Field(description="Name that was asked for.")
    version: str = Field(description="Version of the bundle.")
    variant: Literal["stable", "canary"] = Field(
        description="Which of the bundles under the name; it hangs on the user."
    )


class FeatureInfo(_Wire):
    """What the model read besides the request."""

    version: str | None = Field(
        description="Latents version that the history was read from; null without one."
    )
    snapshot_id: str | None = Field(description="FM snapshot that made the history.")
    age_s: float | None = Field(description="Age of the newest history item at the request time.")
    history_len: int
    degraded: bool = Field(
        description="The history that the model was trained with is missing or cut."
    )
    reason: str | None
    unknown_user: bool
    unknown_fields: list[str] = Field(
        description="Context fields whose value the model does not know."
    )
    default_fields: list[str] = Field(
        description="Context fields left out: unknown id, mean or empty."
    )


class ScoreResponse(_Wire):
    """Answer of `POST /v1/models/{vm}:score`."""

    scores: list[float] = Field(
        description="Calibrated probability of each item, in request order."
    )
    model: ModelInfo
    features: FeatureInfo
    unknown_items: int = Field(
        description="Candidates the model does not know; they share one default."
    )
    request_id: str


class BatchRequest(_Wire):
    """Body of `POST /v1/models/{vm}:batch`."""

    requests: Annotated[list[ScoreRequest], Field(min_length=1, max_length=MAX_BATCH)] = Field(
        description="As many requests for one model, of any users; all are scored, or none."
    )

    @field_validator("requests")
    @classmethod
    def _not_too_many_items(cls, value: list[ScoreRequest]) -> list[ScoreRequest]:
        num_items = sum(len(request.items) for request in value)
        if num_items > MAX_BATCH_ITEMS:
            raise ValueError(f"must have at most {MAX_BATCH_ITEMS} items in all, found {num_items}")
        return value


class BatchResponse(_Wire):
    """Answer of `POST /v1/models/{vm}:batch`."""

    results: list[ScoreResponse] = Field(description="One for each request, in their order.")
    request_id: str


class Problem(_Wire):
    """Error body, RFC 9457 (`application/problem+json`)."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default_factory=list, description="`field` and `message`.")
    request_id: str


def parse_request_ts(text: str) -> int:
    """Return the microseconds UTC of an RFC 3339 time; digits below a microsecond are dropped.

    Raises:
        ValueError: not RFC 3339 with an offset, or before 1970 or after 9999.
    """
    if not _RFC3339.fullmatch(text):
        raise ValueError("must be an RFC 3339 time with an offset, like 2026-01-31T12:00:00Z")
    try:
        moment = datetime.fromisoformat(text.upper())
        ts = (moment - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"is no time of the calendar: {error}") from error
    if not 0 <= ts <= MAX_REQUEST_TS:
        raise ValueError("must lie in the years 1970 to 9999")
    return ts
