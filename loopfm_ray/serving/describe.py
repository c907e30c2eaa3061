"""What a predictor tells of itself: versions, the fields a request may carry, limits, and what it met."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loopfm_ray.data.schema import Field, Kind, Side
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import (
    MAX_BODY_BYTES,
    MAX_CONTEXT_FIELDS,
    MAX_ITEMS,
    MAX_KEY_CHARS,
)
from loopfm_ray.store.online import OnlineStore

__all__ = ["Counters", "describe"]


@dataclass
class Counters:
    """What a predictor met since it was made."""

    requests: int = 0
    rows: int = 0
    refused: int = 0
    unknown_items: int = 0
    unknown_users: int = 0
    unknown_values: int = 0
    default_values: int = 0
    history_misses: int = 0
    store_failures: int = 0
    reloads: int = 0
    reload_failures: int = 0


# Any: JSON.
def describe(
    bundle: Bundle, store: OnlineStore | None, request_fields: Sequence[str], counters: Counters
) -> dict[str, Any]:
    """Return versions, the fields a request may carry, limits and counters.

    Args:
        bundle: what scores.
        store: that histories are read from.
        request_fields: those that a caller may give.
        counters: what was met.
    """
    spec, pin = bundle.spec, bundle.spec.history
    return {
        "model": {"name": spec.name, "version": bundle.version, "task": spec.schema.tasks[0]},
        "features": {
            "version": store.version if pin and store else None,
            "trained_on": pin.latents_version if pin else None,
            "space": pin.space.id if pin else None,
            "snapshot_id": pin.snapshot_id if pin else None,
            "max_len": pin.max_len if pin else 0,
            "retention_us": pin.retention_us if pin else None,
            "watermark_ts": store.meta.get("watermark_ts") if store else None,
        },
        "fields": [_describe_field(bundle, field, request_fields) for field in spec.schema.fields],
        "limits": {
            "items": MAX_ITEMS,
            "key_chars": MAX_KEY_CHARS,
            "context_fields": MAX_CONTEXT_FIELDS,
            "sequence_len": spec.sequence_len,
            "body_bytes": MAX_BODY_BYTES,
        },
        "counters": asdict(counters),
    }


def _describe_field(bundle: Bundle, field: Field, request_fields: Sequence[str]) -> dict[str, Any]:
    default: str | float = "unknown id 0"
    if field.kind == Kind.NUMERIC:
        default = field.mean
    elif field.kind == Kind.SEQUENCE:
        default = "empty"
    source = "request" if field.name in request_fields else "bundle"
    if field.name in bundle.spec.derive:
        source = "request_ts"
    return {
        "name": field.name,
        "side": field.side.value,
        "kind": field.kind.value,
        "source": source,
        "per_item": field.side == Side.ITEM,
        "num_ids": field.cardinality,
        "default": default,
    }
