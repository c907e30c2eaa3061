"""The config of histories: how long latents are kept, what the join makes of them and what it keeps beside them."""

from typing import Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError
from loopfm_ray.history.settings import BLOCK_ROWS, JoinSettings, StoredSide
from loopfm_ray.history.times import delay_to_us
from loopfm_ray.store.compact import TARGET_ROWS
from loopfm_ray.types import MICROS_PER_S

__all__ = ["HistoryStageConfig", "StoredSideConfig"]


class StoredSideConfig(Config):
    """What the histories hold of an event beside its latent. A VM reads it with `side` of its own histories."""

    label: str | None = None
    """The task whose label is kept, with the time at which it was known; readers do not tell it earlier."""
    event_type: str | None = None
    """The categorical field of the request's context that is kept as the kind of event."""

    @property
    def stored(self) -> tuple[str, ...]:
        """The side information that is kept."""
        return tuple(StoredSide(self.label, self.event_type).origins)


class HistoryStageConfig(Config):
    """What a history is."""

    max_len: PositiveInt = 100
    """The newest so many visible events."""
    retention_s: PositiveFloat | None = None
    """Older events are left out; none keeps all."""
    delay_s: NonNegativeFloat = 0.0
    """Seconds from an event to when its latent can be read."""
    keep_s: PositiveFloat | None = None
    """How long latents are kept: whole periods older than this before the last event are not materialized any more;
    none keeps all. Requests whose teacher prediction was not kept can not be joined."""
    compact_rows: PositiveInt = TARGET_ROWS
    """Rows of a file of latents that `loopfm compact` makes, about."""
    block_rows: PositiveInt = BLOCK_ROWS
    """Rows that a task of the join holds at once, which bounds its memory; no byte of the answer depends on it."""
    with_own_latent: bool = False
    """Whether requests get the latent of their own row, as a code of `bits` a number, in memory and on disk. `fitnets` and
    `reads_teacher_latent` read it; nothing that serves can."""
    side: StoredSideConfig = StoredSideConfig()
    """What the histories hold of an event beside its latent."""
    keys: tuple[tuple[str, ...], ...] = ()
    """Whose histories are joined beside the user's: `[[item], [user, category]]` gives `latent_by_item` and
    `latent_by_user_category`. Parts are `user`, `item` and categorical fields of their tables."""

    @model_validator(mode="after")
    def _keys_are_others(self) -> Self:
        wrong = [list(k) for k in self.keys if not k or k == ("user",) or len(set(k)) < len(k)]
        if wrong or len(set(self.keys)) < len(self.keys):
            raise ConfigError(
                f"history.keys must list different keys of different parts, and not [user], which is always there; found"
                f" {[list(k) for k in self.keys]}"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_histories_reach(self) -> Self:
        if self.keep_s is not None and (self.retention_s or 0.0) > self.keep_s:
            raise ConfigError(
                f"history.keep_s must be at least history.retention_s, found {self.keep_s} and {self.retention_s}:"
                " a history would lack events that it may hold"
            )
        return self

    @property
    def join(self) -> JoinSettings:
        """What the join is asked for."""
        return JoinSettings(
            max_len=self.max_len,
            retention_us=self.retention_us,
            block_rows=self.block_rows,
            with_own_latent=self.with_own_latent,
            side=StoredSide(self.side.label, self.side.event_type),
            keys=self.keys,
        )

    @property
    def retention_us(self) -> int | None:
        """The retention in microseconds."""
        return None if self.retention_s is None else round(self.retention_s * MICROS_PER_S)

    @property
    def keep_us(self) -> int | None:
        """How long latents are kept, in microseconds."""
        return None if self.keep_s is None else round(self.keep_s * MICROS_PER_S)

    @property
    def delay_us(self) -> int:
        """The delay in microseconds."""
        return delay_to_us(self.delay_s)
