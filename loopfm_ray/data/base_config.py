"""What every data set says about itself: how time is split, what is sampled, what is derived and how rows are stored."""

from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic import Field as Setting

from loopfm_ray.config import Config
from loopfm_ray.data.schema import FeatureSchema, Side
from loopfm_ray.data.split import Splits, make_splits
from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_S

__all__ = [
    "BaseDataConfig",
    "DerivedName",
    "Moment",
    "NegativesConfig",
    "PastConfig",
    "SplitConfig",
    "to_ts",
]

DerivedName = Literal["hour", "weekday"]


def to_ts(moment: int | str) -> int:
    """Return a time as microseconds UTC: an ISO date or date and time (UTC without a zone), or microseconds.

    Raises:
        ConfigError: the text is not an ISO date or time.
    """
    if isinstance(moment, int):
        return moment
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError as error:
        raise ConfigError(
            f"a time must be an ISO date like 2017-06-26T04:00 or integer microseconds, found {moment!r}"
        ) from error
    moment_utc = parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    delta = moment_utc - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * MICROS_PER_S + delta.microseconds


def _check_moment(value: object) -> object:
    if isinstance(value, datetime):
        value = value.isoformat()
    elif hasattr(value, "isoformat"):  # YAML reads a bare date as datetime.date
        value = str(value)
    if isinstance(value, str):
        to_ts(value)
    return value


Moment = Annotated[int | str, BeforeValidator(_check_moment)]
"""A time in a config: ISO text (UTC without a zone) or integer microseconds UTC."""


class SplitConfig(Config):
    """Three windows in time: the FM learns in the first, the VMs in the second, both are tested on the third."""

    fm_stop: Moment
    """End of the FM window and start of the VM window."""
    vm_stop: Moment
    """End of the VM window and start of the test window."""
    fm_start: Moment | None = None
    """Start of the FM window; the first event if not given."""
    test_stop: Moment | None = None
    """End of the test window; just after the last event if not given."""
    valid_s: PositiveFloat = 604_800.0
    """Seconds at the end of the FM window and of the VM window that are held out for validation."""

    @property
    def fm_stop_ts(self) -> int:
        """The end of the FM window in microseconds UTC."""
        return to_ts(self.fm_stop)

    @property
    def cut_ts(self) -> tuple[int, ...]:
        """The moments where a window starts or ends, in time order; sampled negatives never cross one."""
        valid_us = round(self.valid_s * MICROS_PER_S)
        fm_stop, vm_stop = to_ts(self.fm_stop), to_ts(self.vm_stop)
        return tuple(sorted({fm_stop - valid_us, fm_stop, vm_stop - valid_us, vm_stop}))

    def ranges(self, min_ts: int, max_ts: int) -> Splits:
        """Return the windows for a log whose first and last events are at `min_ts` and `max_ts`.

        Raises:
            ConfigError: a window is empty, or the log ends before the FM window does.
        """
        return make_splits(
            (min_ts, max_ts),
            start_ts=None if self.fm_start is None else to_ts(self.fm_start),
            fm_stop_ts=to_ts(self.fm_stop),
            vm_stop_ts=to_ts(self.vm_stop),
            test_stop_ts=None if self.test_stop is None else to_ts(self.test_stop),
            valid_us=round(self.valid_s * MICROS_PER_S),
        )


class NegativesConfig(Config):
    """Rows with label 0 for a log that has none: items drawn by their popularity in the same period."""

    kind: Literal["none", "popularity"] = "none"
    per_positive: PositiveInt = 1
    """Negatives for every positive."""
    period_s: PositiveFloat | None = None
    """Length of a popularity period in seconds; it must divide the storage period. Not given: the storage period."""
    seed: NonNegativeInt = 0
    max_tries: PositiveInt = 10
    """How often an item is drawn again when the user took it in the same request."""


class PastConfig(Config):
    """Features computed from the user's earlier history events, point in time."""

    count_fields: tuple[str, ...] = ("item",)
    """`item`, `user` (all events), or categorical fields of the item table: how often the user met the same value."""
    recency: bool = True
    """Whether each count comes with the time since the last such event."""
    max_len: PositiveInt = 100
    """Events in the raw history of a row."""


class BaseDataConfig(Config):
    """What all data sets have in common."""

    split: SplitConfig
    negatives: NegativesConfig = NegativesConfig()
    past: PastConfig = PastConfig()
    derive: tuple[DerivedName, ...] = ("hour", "weekday")
    """Context fields computed from `event_ts`, in UTC."""
    num_buckets: PositiveInt = Setting(default=8, le=4096)
    """Users are spread over this many buckets; one bucket must fit in memory."""
    period_s: PositiveFloat = 604_800.0
    """Rows are stored by periods of this many seconds; one period must fit in memory."""
    period_origin: Moment = "1970-01-05T00:00:00"
    """Start of period 0."""
    history_events: Literal["positives", "all"] = "positives"
    """Which rows of the log become history."""
    duplicates: Literal["error", "drop"] = "error"
    """What to do with a row of the same user, item, time and label as another."""
    label_delay_s: float = Setting(default=0.0, ge=0)
    """Seconds from an event to its label where the log does not say."""
    vm_fields: tuple[str, ...] | None = None
    """Fields that a vertical model may read; not given means all but `user` and the fields from the past."""
    vertical: str | None = None
    """The categorical field that says which vertical a row belongs to."""
    sequence_len: PositiveInt = 50
    """The last so many keys of a sequence field are kept."""

    @property
    def period_us(self) -> int:
        """Length of a storage period in microseconds."""
        return round(self.period_s * MICROS_PER_S)

    @property
    def period_origin_ts(self) -> int:
        """Start of period 0 in microseconds UTC."""
        return to_ts(self.period_origin)

    def vm_schema(self, schema: FeatureSchema) -> FeatureSchema:
        """Return the part of `schema` that a vertical model may read.

        Raises:
            SchemaError: `vm_fields` names what is not a field.
        """
        if self.vm_fields is not None:
            return schema.select(self.vm_fields)
        return schema.select(
            field.name
            for field in schema.fields
            if field.name != Side.USER.value and field.side != Side.PAST
        )

    @model_validator(mode="after")
    def _periods_fit(self) -> Self:
        negatives_us = round((self.negatives.period_s or self.period_s) * MICROS_PER_S)
        if self.period_us % negatives_us:
            raise ConfigError(
                f"data.negatives.period_s must divide data.period_s, found {self.negatives.period_s}"
                f" and {self.period_s}"
            )
        return self
