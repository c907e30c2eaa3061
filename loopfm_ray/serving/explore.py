"""What the page at `/ui` shows beyond the scoring contract: a query scored with and without its history, and some known keys.

For people who look at a model, not for programs: nothing here is counted, and it is served only where the page is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from loopfm_ray.data.past import NEVER
from loopfm_ray.data.schema import Side
from loopfm_ray.errors import StoreError
from loopfm_ray.serving.answering import Refusal
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import RequestError, ScoreQuery, ScoreResponse, UnknownModelError
from loopfm_ray.serving.predictor import Predictor
from loopfm_ray.store.online import OnlineStore, UserHistory, visible_slice
from loopfm_ray.types import MICROS_PER_S

__all__ = ["Explored", "Explorer", "Samples", "explore", "sample"]

MAX_USERS, MAX_ITEMS = 12, 60
"""Keys that `sample` gives."""
_MAX_LOOKED_AT = 200
"""Users whose history is looked up to choose some of different lengths."""

Variant = Literal["stable", "canary"]
AnyT = TypeVar("AnyT")
_RECENCY = "past_recency_"


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KnownUser(_Shown):
    """A user that the model or its store knows."""

    user: str
    history_len: int = Field(description="Events in the store, visible or not.")


class Samples(_Shown):
    """Answer of `GET /v1/models/{vm}/samples`."""

    users: list[KnownUser] = Field(description="Some known users, the longest history first.")
    items: list[str] = Field(description="Some known items, evenly from first to last seen.")
    context: dict[str, float] = Field(
        description="Values of fields that have no default, as of a user who never met the items."
    )


class Explored(_Shown):
    """Answer of `POST /v1/models/{vm}:explore`."""

    request_ts: int
    with_history: ScoreResponse = Field(description="What `:score` answers.")
    without_history: ScoreResponse | None = Field(
        description="As if the store did not know the user; null for a model that reads no history."
    )
    events_age_s: list[float] = Field(
        description="Ages of the events that the model reads, the newest first."
    )
    watermark_ts: int | None = Field(description="Until when events are published.")


class Explorer(Protocol):
    """What this needs of a service."""

    def pick(self, name: str, user: str) -> tuple[Predictor, Variant]:
        """Return what answers a user under a name."""


class _Held:
    """An online store that answers with what was read already, so that two scores see one version and one look-up."""

    def __init__(self, store: OnlineStore, found: UserHistory | None) -> None:
        self._store, self._found = store, found

    @property
    def version(self) -> str:
        return self._store.version

    @property
    def meta(self) -> Mapping[str, Any]:
        return self._store.meta

    def get_many(self, keys: Sequence[str]) -> list[UserHistory | None]:
        return [self._found] * len(keys)

    def close(self) -> None:
        """It holds nothing."""


def explore(explorer: Explorer, name: str, query: ScoreQuery, request_id: str) -> Explored:
    """Score a query with its history and as if there were none.

    Raises:
        Refusal: 404 for an unknown model, 422 when the model refuses the context, 503 when the store fails.
    """
    try:
        predictor, variant = explorer.pick(name, query.user)
        store, pin = predictor.store, predictor.bundle.spec.history
        if pin is None or store is None:
            plain = predictor.answer(predictor.score_from(query, None), request_id, name, variant)
            return Explored(
                request_ts=query.request_ts,
                with_history=plain,
                without_history=None,
                events_age_s=[],
                watermark_ts=None,
            )
        (found,) = store.get_many([query.user])
        both = [predictor.score_from(query, _Held(store, history)) for history in (found, None)]
    except UnknownModelError as error:
        raise Refusal(404, str(error)) from None
    except RequestError as error:
        raise Refusal(422, str(error)) from None
    except StoreError as error:
        raise Refusal(503, f"the history store failed: {error}", retry_after_s=1) from None
    with_history, without = (predictor.answer(one, request_id, name, variant) for one in both)
    ages: list[float] = []
    if found is not None:
        rows = visible_slice(found, query.request_ts, pin.max_len, pin.retention_us)
        ages = ((query.request_ts - found.event_ts[rows[::-1]]) / MICROS_PER_S).tolist()
    return Explored(
        request_ts=query.request_ts,
        with_history=with_history,
        without_history=without,
        events_age_s=ages,
        watermark_ts=store.meta.get("watermark_ts"),
    )


def sample(explorer: Explorer, name: str) -> Samples:
    """Return some users and items that a model knows, the same at every call.

    Raises:
        Refusal: 404 for an unknown model, 503 when the store fails.
    """
    try:
        predictor, _ = explorer.pick(name, "")
    except UnknownModelError as error:
        raise Refusal(404, str(error)) from None
    bundle, store = predictor.bundle, predictor.store
    users = _spread(_keys(bundle, "user"), _MAX_LOOKED_AT)
    lengths = [0] * len(users)
    if store is not None and users:
        try:
            lengths = [0 if one is None else len(one) for one in store.get_many(users)]
        except StoreError as error:
            raise Refusal(503, f"the history store failed: {error}", retry_after_s=1) from None
    known = [
        KnownUser(user=user, history_len=length)
        for length, user in sorted(
            zip(lengths, users, strict=True), key=lambda one: (-one[0], one[1])
        )
    ]
    return Samples(
        users=_spread(known, MAX_USERS),
        items=_spread(_keys(bundle, "item"), MAX_ITEMS),
        context={
            field.name: NEVER if field.name.startswith(_RECENCY) else 0.0
            for field in bundle.spec.schema.fields
            if field.side == Side.PAST
        },
    )


def _keys(bundle: Bundle, name: str) -> list[str]:
    vocabulary = bundle.vocabularies.get(name)
    return [] if vocabulary is None else vocabulary.keys


def _spread(values: Sequence[AnyT], count: int) -> list[AnyT]:
    """Return at most `count` of the values, evenly from the first to the last."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[place] for place in places]
