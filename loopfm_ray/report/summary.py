"""The records of one run as the report reads them: `summary.json`, checked at the edge.

Only the name of the run, its data kind and the test NE and AUC of every model are demanded. Everything else may be
missing, and the page leaves it out. Keys that the report does not know are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loopfm_ray.errors import DataError

__all__ = [
    "Audit",
    "CalibrationBin",
    "Channel",
    "CurvePoint",
    "DataRecord",
    "Gain",
    "HistoryRecord",
    "Metrics",
    "ModelRecord",
    "Parity",
    "ScoredRequest",
    "SeedModel",
    "SeedRecord",
    "Sizes",
    "Spread",
    "Summary",
    "read_summary",
]


@dataclass(frozen=True)
class Metrics:
    """Metrics of one model on one split; gAUC is None when no user has both labels."""

    ne: float
    auc: float
    gauc: float | None = None
    gauc_share: float | None = None
    logloss: float | None = None
    calibration: float | None = None


@dataclass(frozen=True)
class Spread:
    """Standard deviation of each metric over the seeds."""

    ne: float | None = None
    auc: float | None = None
    gauc: float | None = None
    gauc_share: float | None = None
    logloss: float | None = None
    calibration: float | None = None


@dataclass(frozen=True)
class ModelRecord:
    """One model: its metrics as means over the seeds, its size and its cost."""

    test: Metrics
    test_sd: Spread = field(default_factory=Spread)
    valid: Metrics | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    train_rows_per_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class DataRecord:
    """What the run was trained and tested on."""

    kind: str
    num_events: int | None = None
    num_examples: int | None = None
    num_users: int | None = None
    num_items: int | None = None


@dataclass(frozen=True)
class Gain:
    """Improvement over the plain VM on the same rows; positive is better; `auc_relative` is a fraction."""

    ne: float | None = None
    auc: float | None = None
    auc_relative: float | None = None


@dataclass(frozen=True)
class SeedModel:
    """One model under one seed."""

    test: Metrics


@dataclass(frozen=True)
class SeedRecord:
    """All models of one seed."""

    models: dict[str, SeedModel]
    transfer_ratio: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """One number that was logged while a model trained."""

    run: str
    split: str
    name: str
    step: int
    value: float | None
    seed: int = 0


@dataclass(frozen=True)
class CalibrationBin:
    """Rows with similar predictions: their mean prediction, mean label and number."""

    mean_prediction: float
    mean_label: float
    count: float


@dataclass(frozen=True)
class Channel:
    """What the way from the FM embedding to the stored code keeps; shares are fractions."""

    embedding_dim: int | None = None
    latent_dim: int | None = None
    bits: int | None = None
    variance_explained: dict[str, float | None] = field(default_factory=dict)
    share_zero_codes: float | None = None
    probe_logloss: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HistoryRecord:
    """How many requests had a history, how long it was and how old its newest event was.

    `coverage_by_age` counts requests whose newest event is not older than the age in seconds that is its key; `alarms` are
    the limits of the config that were broken.
    """

    coverage: float | None = None
    mean_length: float | None = None
    staleness_s: dict[str, float | None] = field(default_factory=dict)
    coverage_by_age: dict[float, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """How many joined rows were computed again, how many saw too much, and how early entries of histories were readable.

    `margin_s` holds quantiles of `request_ts - available_ts` over `num_entries` entries.
    """

    num_checked: int
    num_leaks: int
    num_entries: int | None = None
    margin_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parity:
    """The largest difference between served and offline scores of the same requests."""

    max_abs_diff: float
    num_requests: int | None = None
    num_rows: int | None = None


@dataclass(frozen=True)
class ScoredRequest:
    """One request as it was sent and the answer that came back, both JSON."""

    request: Any  # Any: the serving contract owns the shape; the page shows it as it is
    response: Any


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk."""

    latents_bytes: int | None = None
    bytes_per_event: float | None = None
    online_bytes: int | None = None
    joined_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """Everything that a run says about itself."""

    name: str
    data: DataRecord
    models: dict[str, ModelRecord]
    code_version: str = ""
    seeds: tuple[int, ...] = (0,)
    transfer_ratio: dict[str, float | None] = field(default_factory=dict)
    transfer_ratio_kind: str = ""
    gain: dict[str, Gain] = field(default_factory=dict)
    relative_auc_gain_over_kd: float | None = None
    per_seed: dict[str, SeedRecord] = field(default_factory=dict)
    curves: tuple[CurvePoint, ...] = ()
    calibration_bins: dict[str, tuple[CalibrationBin, ...]] = field(default_factory=dict)
    channel: Channel | None = None
    history: HistoryRecord | None = None
    audit: Audit | None = None
    parity: Parity | None = None
    scored_request: ScoredRequest | None = None
    sizes: Sizes | None = None
    seconds: dict[str, float | None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # Any: the tree of the whole config


_SUMMARY = TypeAdapter(Summary)


def read_summary(tree: Mapping[str, Any]) -> Summary:
    """Check the parsed `summary.json`; an optional part that is null counts as missing.

    Raises:
        DataError: a demanded key is missing or a value has the wrong type; the message names each.
    """
    present = {key: value for key, value in tree.items() if value is not None}
    try:
        summary = _SUMMARY.validate_python(present)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: "
            + ("missing" if item["type"] == "missing" else item["msg"])
            for item in error.errors()
        )
        raise DataError(
            f"summary.json is not a summary of a run: {problems}; run the pipeline again to write it"
        ) from error
    if not summary.models:
        raise DataError(
            "summary.json is not a summary of a run: models: empty; run the pipeline again to write it"
        )
    return summary
