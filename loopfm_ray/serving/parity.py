"""Show that a served score is the offline score of the same row.

Requests of the joined set are put back together from their rows (one user, one time, the candidates), as a caller would
send them: keys instead of ids, numbers instead of standardised ones, and no history. They are scored by a predictor, or
over HTTP, and compared with the model on the joined rows themselves.
"""

import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.collate import Collator, HistorySource, LatentHistorySource
from loopfm_ray.data.examples import ExampleSet, Rows, concat_rows, iterate_rows
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import Kind, Side
from loopfm_ray.errors import BundleError, DataError, JobError
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import MAX_ITEMS, ContextValue, ScoreQuery
from loopfm_ray.serving.predictor import Predictor, score_probs
from loopfm_ray.serving.spec import HistoryPin
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.types import TimeRange

__all__ = [
    "OfflineRequests",
    "ParityReport",
    "Replay",
    "ask_service",
    "check_parity",
    "load_offline",
]

_SHOWN = 20
_UNKNOWN_KEY = "\x00unknown"
"""Stands for an id that has no key inside a sequence."""
_TIMEOUT_S = 30.0

Probs = NDArray[np.float64]


@dataclass(frozen=True)
class ParityReport:
    """How far served scores are from offline scores.

    `num_mismatches` counts rows above `tolerance`, `share` is their share, `mismatches` shows the first.
    """

    max_abs_diff: float
    num_requests: int
    num_rows: int
    num_mismatches: int
    share: float
    tolerance: float
    mismatches: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether every row is within the tolerance."""
        return self.num_mismatches == 0


@dataclass(frozen=True)
class Replay:
    """One request made of joined rows; `rows` are their positions in `OfflineRequests.rows`."""

    query: ScoreQuery
    rows: NDArray[np.intp]


@dataclass(frozen=True)
class OfflineRequests:
    """Sampled requests and the offline probability of each of their rows.

    `latents_version` is the one that was joined, None for a VM without history: late labels and late events make the
    histories of one request differ between versions of a space, so both sides have to read the same one.
    """

    rows: Rows
    probs: Probs
    replays: tuple[Replay, ...]
    latents_version: str | None


def check_parity(
    predictor: Predictor,
    offline: OfflineRequests,
    *,
    tolerance: float = 1e-5,
    url: str | None = None,
) -> ParityReport:
    """Score the requests of `offline` and compare; over HTTP when `url` is given.

    Raises:
        BundleError: the service at `url` serves another bundle, or histories are read from another latents version than
            the one that was joined.
        JobError: the service at `url` does not answer as it should.
    """
    queries = [replay.query for replay in offline.replays]
    if url is None:
        served = _ask_predictor(predictor, queries, offline.latents_version)
    else:
        served = ask_service(
            url,
            queries,
            predictor.bundle.spec.name,
            predictor.bundle.version,
            offline.latents_version,
        )
    worst, num_bad = 0.0, 0
    shown: list[str] = []
    for replay, probs in zip(offline.replays, served, strict=True):
        diff = np.abs(probs - offline.probs[replay.rows])
        worst = max(worst, float(diff.max()))
        bad = np.flatnonzero(~(diff <= tolerance))
        num_bad += len(bad)
        for index in bad[: _SHOWN - len(shown)]:
            example = int(offline.rows["example_id"][replay.rows[index]])
            shown.append(
                f"example {example}: served {probs[index]:.8f},"
                f" offline {offline.probs[replay.rows[index]]:.8f}"
            )
    num_rows = sum(len(replay.rows) for replay in offline.replays)
    return ParityReport(
        worst, len(queries), num_rows, num_bad, num_bad / num_rows, tolerance, tuple(shown)
    )


def load_offline(
    bundle: Bundle,
    prepared: PreparedData,
    joined: Location,
    time_range: TimeRange | None = None,
    num_requests: int = 200,
    seed: int = 0,
) -> OfflineRequests:
    """Sample requests of a joined version and score their rows offline.

    Args:
        bundle: whose model and calibration score; its tables and vocabularies are not used.
        prepared: the prepared version that was joined.
        joined: the joined version, of any latents version in the space of the bundle.
        time_range: requests outside are left out; None takes all.
        num_requests: how many are sampled, all if there are fewer.
        seed: of the sample.

    Raises:
        BundleError: the joined version is of another space, or has another history than the bundle.
        DataError: there are no requests in the range.
    """
    examples = ExampleSet.open(joined, "requests")
    sources = _sources(bundle, joined, prepared.num_buckets)
    collator = Collator(bundle.spec.schema, prepared.items, prepared.users, sources)
    columns = list(dict.fromkeys([*collator.columns, "example_id"]))
    chosen = _sample(examples, time_range, num_requests, seed)
    rows = _read_chosen(examples, time_range, columns, chosen)
    probs = score_probs(bundle, collator(rows))
    replays = tuple(_replays(bundle, prepared, rows))
    joined_from = read_manifest(joined).meta["latents_version"] if bundle.spec.history else None
    return OfflineRequests(rows, probs, replays, joined_from)


def _ask_predictor(
    predictor: Predictor, queries: Sequence[ScoreQuery], latents_version: str | None
) -> Iterator[Probs]:
    for scored in predictor.score_many(queries):
        _check_version("the predictor", scored.latents_version, latents_version)
        yield scored.probs


def _check_version(who: str, found: str | None, expected: str | None) -> None:
    if found != expected:
        raise BundleError(
            f"{who} reads latents {found}, the joined version was made of {expected}: late events and labels make them"
            " differ; join the live latents, or open the other version with open_version"
        )


def ask_service(
    url: str,
    queries: Sequence[ScoreQuery],
    name: str,
    version: str,
    latents_version: str | None = None,
) -> Iterator[Probs]:
    """Yield the scores that the service at `url` gives to each query.

    Args:
        url: base address of the service.
        queries: to ask, one after the other.
        name: of the model.
        version: of the bundle that has to answer.
        latents_version: that histories have to be read from; None for a VM without.

    Raises:
        BundleError: another bundle answers, or histories are read from other latents.
        JobError: it does not answer with scores.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise JobError(f"the service's address must be http://host:port, found {url!r}")
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        for query in queries:
            answer = _post(connection, url, name, query)
            found = answer["model"]["version"]
            if found != version:
                raise BundleError(
                    f"{url} serves bundle {found}, expected {version}; deploy that bundle, or check"
                    " the one that is served"
                )
            _check_version(url, answer["features"]["version"], latents_version)
            yield np.asarray(answer["scores"], dtype=np.float64)
    finally:
        connection.close()


# Any: the JSON of a ScoreResponse.
def _post(
    connection: http.client.HTTPConnection, url: str, name: str, query: ScoreQuery
) -> dict[str, Any]:
    body = {
        "user": query.user,
        "request_ts": query.request_ts,
        "items": list(query.items),
        "context": query.context,
    }
    try:
        connection.request(
            "POST",
            f"/v1/models/{name}:score",
            json.dumps(body),
            {"content-type": "application/json"},
        )
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise JobError(
            f"no answer from {url}: {error}; start the service, or correct the address"
        ) from error
    if response.status != 200:
        raise JobError(f"{url} answered {response.status}: {text[:500]}; see its log")
    answer: dict[str, Any] = json.loads(text)
    return answer


def _sources(bundle: Bundle, joined: Location, num_buckets: int) -> dict[str, HistorySource]:
    pin = bundle.spec.history
    if pin is None:
        return {}
    version = open_version(joined, "joined")
    found = HistoryPin.of_joined(version.manifest)
    difference = pin.space.difference(found.space)
    if (found.max_len, found.retention_us) != (pin.max_len, pin.retention_us):
        difference = difference or (
            f"max_len and retention_us are {found.max_len} and {found.retention_us}, expected {pin.max_len} and"
            f" {pin.retention_us}"
        )
    if difference is not None:
        raise BundleError(
            f"{joined} has not the history that the bundle was trained with: {difference}; give a joined version of the"
            " bundle's run"
        )
    tables = read_histories(version, "history", range(num_buckets))
    return {"latent": LatentHistorySource(tables, pin.code_spec, pin.max_len)}


def _sample(
    examples: ExampleSet, time_range: TimeRange | None, num_requests: int, seed: int
) -> NDArray[np.int64]:
    """Return [n, 2] sampled pairs of user and request time, sorted."""
    keys = [
        np.stack([rows["user"].astype(np.int64), rows["event_ts"]], axis=1)
        for rows in iterate_rows(
            examples.files(time_range), time_range, columns=["user", "event_ts"], batch_rows=65_536
        )
    ]
    if not keys:
        raise DataError("no requests to replay in the time range; check data.split")
    pairs = np.unique(np.concatenate(keys), axis=0)
    size = min(num_requests, len(pairs))
    index = np.random.default_rng(seed).choice(len(pairs), size, replace=False)
    return np.asarray(pairs[np.sort(index)])


def _read_chosen(
    examples: ExampleSet,
    time_range: TimeRange | None,
    columns: Sequence[str],
    chosen: NDArray[np.int64],
) -> Rows:
    wanted = {(int(user), int(ts)) for user, ts in chosen}
    parts: list[Rows] = []
    for rows in iterate_rows(
        examples.files(time_range), time_range, columns=columns, batch_rows=65_536
    ):
        pairs = zip(rows["user"].tolist(), rows["event_ts"].tolist(), strict=True)
        keep = np.fromiter((pair in wanted for pair in pairs), bool, len(rows["user"]))
        if keep.any():
            parts.append({name: values[keep] for name, values in rows.items()})
    return concat_rows(parts)


def _replays(bundle: Bundle, prepared: PreparedData, rows: Rows) -> Iterator[Replay]:
    """Put requests together: rows of one user, time and context, at most `MAX_ITEMS` each."""
    schema, derived = bundle.spec.schema, set(bundle.spec.derive)
    shared = [
        field.name
        for field in (*schema.of(Kind.CATEGORICAL, Side.CONTEXT), *schema.sequences)
        if field.name not in derived
    ]
    groups: dict[tuple[object, ...], list[int]] = {}
    columns = [rows[name].tolist() for name in ("user", "event_ts", *shared)]
    for index, values in enumerate(zip(*columns, strict=True)):
        key = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        groups.setdefault(key, []).append(index)
    for members in groups.values():
        for part in _chunks(members):
            places = np.asarray(part, dtype=np.intp)
            yield Replay(_query(bundle, prepared, rows, places), places)


def _chunks(members: list[int]) -> Iterator[list[int]]:
    for begin in range(0, len(members), MAX_ITEMS):
        yield members[begin : begin + MAX_ITEMS]


def _query(
    bundle: Bundle, prepared: PreparedData, rows: Rows, index: NDArray[np.intp]
) -> ScoreQuery:
    """Return what a caller would have sent for these rows of one request."""
    first = index[0]
    context: dict[str, ContextValue] = {}
    for field in bundle.spec.schema.fields:
        if field.side not in (Side.CONTEXT, Side.PAST) or field.name in bundle.spec.derive:
            continue
        values = rows[field.name]
        if field.kind == Kind.NUMERIC:
            numbers = (values[index].astype(np.float64) * field.std + field.mean).tolist()
            is_same = len(set(numbers)) == 1
            context[field.name] = numbers[0] if is_same else numbers
        elif field.kind == Kind.SEQUENCE:
            keys = ["", *prepared.vocabulary(field.name).keys]
            ids = np.trim_zeros(values[first], "b").tolist()
            context[field.name] = [keys[value] if value else _UNKNOWN_KEY for value in ids]
        elif values[first]:
            context[field.name] = prepared.vocabulary(field.name).keys[int(values[first]) - 1]
    items = prepared.items.keys
    return ScoreQuery(
        user=prepared.users.keys[int(rows["user"][first])],
        request_ts=int(rows["event_ts"][first]),
        items=tuple(items[int(item)] for item in rows["item"][index]),
        context=context,
    )
