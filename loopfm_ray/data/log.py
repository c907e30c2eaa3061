"""Open the log that a data config names: canonical blocks, entity tables and the names of its fields."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loopfm_ray.data.config import CompleteJourneyConfig, DataConfig, EventsConfig
from loopfm_ray.data.datasets.complete_journey import complete_journey_events
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.events import open_files, read_blocks
from loopfm_ray.data.synthetic import generate
from loopfm_ray.types import MICROS_PER_S

__all__ = ["EventLog", "LogFields", "log_files", "open_log"]


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


def log_files(config: DataConfig) -> dict[str, list[int]]:
    """Return size and time of change (ns) of each file that the data is read from; empty for data that no user keeps.

    Raises:
        ConfigError: the data is not there.
    """
    if not isinstance(config, EventsConfig):
        return {}
    tables = [table.path for table in (config.items, config.users) if table]
    files = {}
    for path in (config.path, *tables):
        for fragment in open_files(path):
            info = fragment.filesystem.get_file_info(fragment.path)
            files[str(fragment.path)] = [int(info.size), int(info.mtime_ns)]
    return files


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
