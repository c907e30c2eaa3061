"""Which rows of a shared set are a vertical's own: those whose fields have given values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.examples import Rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Field, Kind, Side
from loopfm_ray.errors import ConfigError

__all__ = ["RowFilter"]

_SHOWN = 12


class RowFilter:
    """Keeps the rows whose categorical fields, each of them, have one of the values that are given for it."""

    def __init__(self, data: PreparedData, where: Mapping[str, Sequence[str]]) -> None:
        """Look the values up.

        Args:
            data: where the fields and their vocabularies come from.
            where: by field, the values that a row may have; none keeps all rows.

        Raises:
            ConfigError: there is no such field, or no such value in the log.
        """
        self._wanted: list[tuple[str, NDArray[np.bool_]]] = []
        fields = {field.name: field for field in data.schema.of(Kind.CATEGORICAL)}
        for name, values in where.items():
            if name not in fields:
                raise ConfigError(
                    f"rows can not be told apart by {name!r}: the log has the categorical fields {sorted(fields)}"
                )
            self._wanted.append(_wanted(data, fields[name], values))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that a call reads."""
        return tuple(dict.fromkeys(name for name, _ in self._wanted))

    def __call__(self, rows: Rows) -> NDArray[np.bool_]:
        """Return [n] which rows are kept."""
        kept = np.ones(len(next(iter(rows.values()))) if rows else 0, dtype=bool)
        for name, is_wanted in self._wanted:
            found = rows[name]
            kept &= is_wanted[np.where(found < len(is_wanted), found, 0)]
        return kept


def _wanted(
    data: PreparedData, field: Field, values: Sequence[str]
) -> tuple[str, NDArray[np.bool_]]:
    """Return the column that tells, and by its id whether a row is kept; id 0, the unknown, never is."""
    keys: list[Any] = data.vocabulary(field.name).keys
    ids = {key: number for number, key in enumerate(keys, start=1)}
    unknown = [value for value in values if value not in ids]
    if unknown or not values:
        shown = ", ".join(map(repr, keys[:_SHOWN])) + (" ..." if len(keys) > _SHOWN else "")
        raise ConfigError(
            f"the log has no {field.name} {unknown or '(none is given)'}; it has {len(keys)}: {shown}"
        )
    of_value = np.zeros(len(keys) + 1, dtype=bool)
    of_value[[ids[value] for value in values]] = True
    if field.side not in (Side.ITEM, Side.USER) or field.name == field.side.value:
        return field.name, of_value
    table = data.items if field.side == Side.ITEM else data.users
    return field.side.value, of_value[table.ids[field.name]]
