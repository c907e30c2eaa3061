"""What a model reads: named fields, where each comes from and how many ids it has."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from loopfm_ray.errors import SchemaError

__all__ = ["FeatureSchema", "Field", "Kind", "Side"]


class Side(StrEnum):
    """Where the value of a field is found."""

    USER = "user"
    """In the user table; the same for all of a user's rows."""
    ITEM = "item"
    """In the item table; the same for all of an item's rows."""
    CONTEXT = "context"
    """In the row itself, known when the score is asked."""
    PAST = "past"
    """Computed from the user's earlier events, point in time."""


class Kind(StrEnum):
    """What the values of a field are."""

    CATEGORICAL = "categorical"
    NUMERIC = "numeric"
    SEQUENCE = "sequence"


@dataclass(frozen=True)
class Field:
    """One input of a model.

    `cardinality` counts the ids of a categorical or sequence field with id 0, the unknown value; a numeric field has 0.
    A numeric value enters the models as `(value - mean) / std`.
    """

    name: str
    side: Side
    kind: Kind
    cardinality: int = 0
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class FeatureSchema:
    """The ordered fields of a model and the tasks it predicts; the order is the order of the columns in a batch."""

    fields: tuple[Field, ...]
    tasks: tuple[str, ...] = ("label",)

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SchemaError(f"field names must be unique, found {repeated} more than once")

    def of(self, kind: Kind, side: Side | None = None) -> tuple[Field, ...]:
        """Return the fields of one kind, and of one side if given, in schema order."""
        return tuple(
            field for field in self.fields if field.kind == kind and side in (None, field.side)
        )

    @property
    def categorical(self) -> tuple[Field, ...]:
        """The categorical fields in schema order: the columns of `Batch.ids`."""
        return self.of(Kind.CATEGORICAL)

    @property
    def numeric(self) -> tuple[Field, ...]:
        """The numeric fields in schema order: the columns of `Batch.numeric`."""
        return self.of(Kind.NUMERIC)

    @property
    def sequences(self) -> tuple[Field, ...]:
        """The sequence fields in schema order."""
        return self.of(Kind.SEQUENCE)

    def select(self, names: Iterable[str]) -> "FeatureSchema":
        """Return the schema cut to `names`, keeping this schema's order.

        Raises:
            SchemaError: a name is not a field.
        """
        wanted = set(names)
        known = [field.name for field in self.fields]
        missing = sorted(wanted.difference(known))
        if missing:
            raise SchemaError(f"fields {missing} are not in the data; it has {known}")
        return replace(self, fields=tuple(field for field in self.fields if field.name in wanted))

    def to_json(self) -> str:
        """Return the schema as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSchema":
        """Read what `to_json` wrote.

        Raises:
            SchemaError: the text is not a schema.
        """
        try:
            tree = json.loads(text)
            fields = tuple(
                Field(**{**item, "side": Side(item["side"]), "kind": Kind(item["kind"])})
                for item in tree["fields"]
            )
            return cls(fields, tuple(tree["tasks"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaError(f"not a feature schema: {error}; write it with to_json") from error
