"""Open the log that a data config names: canonical blocks, entity tables and the names of its fields."""

from collections.abc import Callable
from typing import Any

from loopfm_ray.data.config import (
    CompleteJourneyConfig,
    DataConfig,
    EventsConfig,
    MovieLensConfig,
    SyntheticConfig,
)
from loopfm_ray.data.datasets.amazon_electronics import amazon_electronics_log
from loopfm_ray.data.datasets.complete_journey import complete_journey_events
from loopfm_ray.data.datasets.kuaivideo import kuaivideo_log
from loopfm_ray.data.datasets.movielens import movielens_log
from loopfm_ray.data.datasets.open_bandit import open_bandit_log
from loopfm_ray.data.datasets.published import folder_files
from loopfm_ray.data.datasets.taobao_ad import taobao_ad_log
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.events import open_files, read_blocks
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.data.synthetic import generate
from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_S

__all__ = ["READERS", "EventLog", "LogFields", "log_files", "open_log"]


def open_log(config: DataConfig) -> EventLog:
    """Return the log of any kind of data config.

    Raises:
        ConfigError: the data is not there.
        SchemaError, DataError: an entity table is wrong.
    """
    log = READERS[config.kind](config)
    countable = {"item", "user", *(log.items.categorical if log.items else ())}
    unknown = sorted(set(config.past.count_fields) - countable)
    if unknown:
        raise ConfigError(
            f"data.past.count_fields {unknown} are not categorical fields of the item table; expected some of"
            f" {sorted(countable)}"
        )
    return log


def log_files(config: DataConfig) -> dict[str, list[int]]:
    """Return size and time of change (ns) of each file that the data is read from; empty for data that no user keeps.

    Of a published data set these are all the files of its folder, or the archive that holds them.

    Raises:
        ConfigError: the data is not there.
    """
    if isinstance(config, CompleteJourneyConfig | SyntheticConfig):
        return {}
    if not isinstance(config, EventsConfig):
        items = config.items if isinstance(config, MovieLensConfig) else None
        return {**folder_files(config.path), **(_table_files(items.path) if items else {})}
    tables = [table.path for table in (config.items, config.users) if table]
    return {
        name: info for path in (config.path, *tables) for name, info in _table_files(path).items()
    }


def _table_files(path: str) -> dict[str, list[int]]:
    files = {}
    for fragment in open_files(path):
        info = fragment.filesystem.get_file_info(fragment.path)
        files[str(fragment.path)] = [int(info.size), int(info.mtime_ns)]
    return files


def _open_synthetic(config: SyntheticConfig) -> EventLog:
    made = generate(config)
    items = EntitySource.from_table(made.items, "item", ("topic",), ("price",))
    users = EntitySource.from_table(made.users, "user", ("taste",), ())
    columns = made.rows.drop_columns(["true_prob"])
    return EventLog(lambda: iter([columns]), LogFields(categorical=("surface",)), items, users)


def _open_complete_journey(config: CompleteJourneyConfig) -> EventLog:
    return _open_events(complete_journey_events(config))


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


# Any: each reader takes the config of its own kind.
READERS: dict[str, Callable[[Any], EventLog]] = {
    "events": _open_events,
    "complete_journey": _open_complete_journey,
    "synthetic": _open_synthetic,
    "movielens": movielens_log,
    "taobao_ad": taobao_ad_log,
    "kuaivideo": kuaivideo_log,
    "amazon_electronics": amazon_electronics_log,
    "open_bandit": open_bandit_log,
}
"""How each kind of data is opened."""
