"""Open Bandit, small: 60,000 real impressions of a fashion site with clicks, one week of November 2019, as Parquet.

There is no user id. The reader takes the four hashed features of a person together as the user: a cohort of people who look alike
to the log, 337 of them. A history is then what the cohort was shown before, not what one person was. The published data have 287
clicks in all, so this set shows that a model can be trained and served on impressions; it can not tell two models apart.
Saito et al., arXiv 2008.07146.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from loopfm_ray.data.canonical import canonical_block, float_column, key_column
from loopfm_ray.data.config import ColumnsConfig, OpenBanditConfig
from loopfm_ray.data.datasets.published import missing_files
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.events import read_raw_blocks
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.types import MICROS_PER_S

__all__ = ["open_bandit_log"]

# Any: pyarrow ships no types.
Table = Any
_LOG = "open_bandit_small.parquet"
_ITEMS = "item_context.parquet"
_WHERE = "expected the small Open Bandit Dataset as Parquet (research.zozo.com/data.html), docs/datasets.md gives its columns"
_PERSON = tuple(f"user_feature_{n}" for n in range(4))
_CONTEXT = ("policy", "campaign", "position", *_PERSON)
_COLUMNS = ColumnsConfig(
    user="cohort",
    item="item",
    event_ts="timestamp",
    label="click",
    categorical={name: name for name in _CONTEXT},
    sequence={"affinity": "affinity_items"},
)
_ITEM_FIELDS = tuple(f"item_feature_{n}" for n in range(1, 4))


def open_bandit_log(config: OpenBanditConfig) -> EventLog:
    """Return the log in the directory `config.path`; an item is `CAMPAIGN/ITEM_ID`, as ids begin anew in each campaign.

    Raises:
        ConfigError: files are missing.
        SchemaError, DataError: a file is wrong.
    """
    folder = Path(config.path)
    missing = [name for name in (_LOG, _ITEMS) if not (folder / name).is_file()]
    if missing:
        raise missing_files(config.path, missing, _WHERE)
    return EventLog(
        lambda: _blocks(folder / _LOG, config),
        LogFields(categorical=_CONTEXT, sequence=("affinity",)),
        _items(folder / _ITEMS),
        None,
    )


def _blocks(path: Path, config: OpenBanditConfig) -> Iterator[Table]:
    names = ["timestamp", "item_id", "click", "affinity_items", *_CONTEXT]
    for place, block in read_raw_blocks(str(path), names, config.block_rows):
        people = [block.column(name).cast(pa.string()) for name in _PERSON]
        rows = block.append_column("item", _item_key(block))
        rows = rows.append_column("cohort", pc.binary_join_element_wise(*people, "|"))
        yield canonical_block(rows, _COLUMNS, place, round(config.label_delay_s * MICROS_PER_S))


def _items(path: Path) -> EntitySource:
    names = ["campaign", "item_id", "item_feature_0", *_ITEM_FIELDS]
    blocks = []
    for place, block in read_raw_blocks(str(path), names, 65_536):
        columns = {"item": _item_key(block)}
        columns |= {name: key_column(block, name, place) for name in _ITEM_FIELDS}
        columns["item_feature_0"] = float_column(block, "item_feature_0", place)
        blocks.append(pa.table(columns))
    return EntitySource.from_table(
        pa.concat_tables(blocks), "item", _ITEM_FIELDS, ("item_feature_0",)
    )


def _item_key(table: Table) -> Any:
    parts = [table.column(name).cast(pa.string()) for name in ("campaign", "item_id")]
    return pc.binary_join_element_wise(*parts, "/")
