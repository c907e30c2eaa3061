"""What is wrong with one request of a joined version, in plain loops over what was visible.

Nothing here is shared with the join or with the features: a mistake there would otherwise be made twice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from loopfm_ray.data.joined import teacher_prob_of
from loopfm_ray.history.evidence import Entry, Origin, Stored

__all__ = ["Bucket", "Owner", "Rules", "check_history", "check_request", "given_entries"]

# Any below: a row as Arrow gives it.
Row = dict[str, Any]

_YEAR_S = 365 * 86_400
_NEVER = 1.5
_FLOAT32 = 1e-6
"""Relative: features are kept as float32."""


class Rules(NamedTuple):
    """What a history is in this version, and from when on the latents version has events."""

    max_len: int
    retention_us: int | None
    trained_until_ts: int
    kept_from_ts: int
    delay_us: int
    with_own_latent: bool
    side: tuple[str, ...] = ()
    scored_from: tuple[int, ...] = ()
    """The first moment that each snapshot scored, in order."""


class Owner(NamedTuple):
    """Whose events a history holds: a name for messages, and the owner by user and item; None has no history."""

    name: str
    of: Callable[[int, int], Any]


_USER = Owner("user", lambda user, item: user)  # noqa: ARG005  as any owner


class Bucket(NamedTuple):
    """What is known of one bucket: the origin, the latents version, and the entries of the written histories."""

    origin: Origin
    stored: dict[int, Stored]
    entries: dict[int, Entry]
    num_rows: int
    """Rows of the table of histories."""

    def holds(self, start: int, length: int) -> bool:
        """Return whether a slice lies inside of the table of histories."""
        return start >= 0 and length >= 0 and start + length <= self.num_rows


def given_entries(request: Row, bucket: Bucket) -> list[Entry]:
    """Return the history that the joined version gives to a request; nothing where its slice is out of bounds."""
    start, length = request["latent_start"], request["latent_len"]
    if not bucket.holds(start, length):
        return []
    return [bucket.entries[row] for row in range(start, start + length)]


def check_request(request: Row, bucket: Bucket, rules: Rules) -> list[str]:
    """Return what is wrong with one request, in words; nothing when it is right."""
    start, length = request["latent_start"], request["latent_len"]
    if not bucket.holds(start, length):
        return [f"history slice {start}+{length} lies outside of {bucket.num_rows} rows"]
    given = given_entries(request, bucket)
    problems = [*_check_row(request, bucket), *_check_teacher(request, bucket, rules)]
    if request["event_ts"] <= rules.trained_until_ts:
        problems.append("the snapshot was trained on this request")
    problems += check_history(given, request, bucket, rules, _USER)
    seen = _seen_in_log(request, bucket.origin)
    past = _check_past(request, bucket.origin, seen)
    return [*problems, *past, *_check_raw(request, bucket.origin, seen)]


def check_history(
    given: list[Entry], request: Row, bucket: Bucket, rules: Rules, owner: Owner
) -> list[str]:
    """Return what is wrong with one history of a request, in words.

    Args:
        given: what the joined version gives.
        request: has example_id, user, item and event_ts.
        bucket: what is known of the events of the owner.
        rules: what a history is.
        owner: whose events it holds.
    """
    problems: list[str] = []
    for entry in given:
        problems += _check_entry(entry, request, bucket, rules, owner)
    known = bucket.origin.by_owner.get(owner.of(request["user"], request["item"]), [])
    return [*problems, *_check_choice(given, request, bucket, rules, known, is_clean=not problems)]


def _check_row(request: Row, bucket: Bucket) -> Iterator[str]:
    original = bucket.origin.requests.get(request["example_id"])
    if original is None:
        yield "the prepared version has no such example"
        return
    differing = [name for name, value in original.items() if not _is_same(request.get(name), value)]
    if differing:
        yield f"user or time or other columns differ from the prepared version: {differing}"


def _is_same(left: object, right: object) -> bool:
    return left == right or (left != left and right != right)  # NaN equals NaN here


def _check_teacher(request: Row, bucket: Bucket, rules: Rules) -> Iterator[str]:
    stored = bucket.stored.get(request["example_id"])
    if stored is None:
        yield "the latents version has no row of this example"
        return
    yield from _check_stored(request["example_id"], bucket, rules)
    if request["teacher_prob"] != stored.fm_prob:
        yield f"teacher_prob is {request['teacher_prob']}, the snapshot gave {stored.fm_prob}"
    for task, prob in stored.more_probs:
        found = request.get(teacher_prob_of(task))
        if found != prob:
            yield f"{teacher_prob_of(task)} is {found}, the snapshot gave {prob}"
    scored_by = [n for n, from_ts in enumerate(rules.scored_from) if from_ts <= request["event_ts"]]
    expected = scored_by[-1] if scored_by else 0
    if request["teacher_snapshot"] != expected:
        yield f"teacher_snapshot is {request['teacher_snapshot']}, the row's time makes it {expected}"
    if request["score_ts"] != request["event_ts"] + rules.delay_us:
        yield f"score_ts is {request['score_ts']}, expected {request['event_ts'] + rules.delay_us}"
    if rules.with_own_latent and request.get("teacher_code") != stored.entry.code:
        yield "teacher_code is not the code of the request's own row in the latents version"


def _check_stored(example_id: int, bucket: Bucket, rules: Rules) -> Iterator[str]:
    """Check one row of the latents version against its origin."""
    stored, fact = bucket.stored[example_id], bucket.origin.facts.get(example_id)
    if fact is None:
        yield f"example {example_id} of the latents version is none of the prepared version"
        return
    if stored.fact != fact:
        fields = [
            name for name in fact._fields if getattr(fact, name) != getattr(stored.fact, name)
        ]
        yield f"the latents version says of example {example_id} other {fields} than the prepared version"
    ready_ts = _ready_ts(example_id, bucket.origin, rules)
    if stored.entry.available_ts != ready_ts:
        yield (
            f"event {example_id} says available_ts {stored.entry.available_ts}, delay and label give {ready_ts}"
        )
    if fact.event_ts <= rules.trained_until_ts:
        yield (
            f"event {example_id} at {fact.event_ts} was embedded by a snapshot trained until {rules.trained_until_ts}"
        )


def _ready_ts(example_id: int, origin: Origin, rules: Rules) -> int:
    """Return when the latent of an event could first be read."""
    fact = origin.facts[example_id]
    ready_ts = fact.event_ts + rules.delay_us
    if origin.is_waiting and fact.label_ts > ready_ts:
        ready_ts = fact.label_ts
    return ready_ts


def _check_entry(
    entry: Entry, request: Row, bucket: Bucket, rules: Rules, owner: Owner
) -> Iterator[str]:
    """Check one entry of a history against the latents version, its origin and the rules."""
    number, request_ts = entry.example_id, request["event_ts"]
    stored = bucket.stored.get(number)
    if stored is None or not stored.fact.is_event:
        yield f"event {number} is no event of the latents version"
        return
    if entry._replace(side=()) != stored.entry:
        fields = [
            name
            for name in entry._fields
            if name != "side" and getattr(entry, name) != getattr(stored.entry, name)
        ]
        yield f"event {number} differs from the latents version in {fields}"
    yield from _check_stored(number, bucket, rules)
    fact = bucket.origin.facts.get(number)
    if fact is None:
        return
    yield from _check_side(entry, bucket, rules)
    if number == request["example_id"]:
        yield "history holds the request's own event"
    if owner.of(fact.user, fact.item) != owner.of(request["user"], request["item"]):
        yield f"event {number} belongs to another {owner.name}"
    if fact.event_ts >= request_ts:
        yield f"event {number} at {fact.event_ts} is not before {request_ts}"
    ready_ts = _ready_ts(number, bucket.origin, rules)
    if ready_ts > request_ts:
        yield f"event {number} was available at {ready_ts}, after {request_ts}"
    if rules.retention_us is not None and request_ts - fact.event_ts > rules.retention_us:
        yield f"event {number} is older than the retention"


def _check_side(entry: Entry, bucket: Bucket, rules: Rules) -> Iterator[str]:
    """Compare what stands beside an event with the prepared version; readers tell no label before `label_ts`."""
    expected = {name: bucket.origin.sides[entry.example_id][name] for name in rules.side}
    if "label" in expected:
        expected["label_ts"] = bucket.origin.facts[entry.example_id].label_ts
    found = dict(entry.side)
    if found != expected:
        yield f"event {entry.example_id} has {found} beside it, the prepared version gives {expected}"


def _check_choice(
    given: list[Entry],
    request: Row,
    bucket: Bucket,
    rules: Rules,
    known: list[tuple[int, int]],
    *,
    is_clean: bool,
) -> Iterator[str]:
    """Check that the entries are all of the newest that were visible, in order."""
    if len(given) > rules.max_len:
        yield f"history has {len(given)} events, at most {rules.max_len} are allowed"
    request_ts, origin = request["event_ts"], bucket.origin
    visible = []
    for event_ts, example_id in known:
        if event_ts >= request_ts or _ready_ts(example_id, origin, rules) > request_ts:
            continue
        if event_ts <= rules.trained_until_ts or event_ts < rules.kept_from_ts:
            continue
        if rules.retention_us is not None and request_ts - event_ts > rules.retention_us:
            continue
        visible.append(example_id)
    wanted = visible[-rules.max_len :]
    found = [entry.example_id for entry in given]
    missing = sorted(set(wanted) - set(found))
    if missing:
        yield f"lacks visible events {missing[:3]} ({len(missing)} in all)"
    elif is_clean and found != wanted:
        yield f"order or number of events is wrong, found {found[:5]}, expected {wanted[:5]}"


def _seen_in_log(request: Row, origin: Origin) -> list[int]:
    """Return the example ids of the user's events that the log itself had by the time of the request, oldest first."""
    seen = []
    for event_ts, example_id in origin.by_owner.get(request["user"], []):
        label_ts = origin.facts[example_id].label_ts
        if event_ts < request["event_ts"] and not (
            origin.is_waiting and label_ts > request["event_ts"]
        ):
            seen.append(example_id)
    return seen


def _check_past(request: Row, origin: Origin, seen: list[int]) -> Iterator[str]:
    """Count the user's earlier events again and compare with the features from the past."""
    names = [name for name in request if name.startswith("past_count_")]
    for name in names:
        field = name.removeprefix("past_count_")
        value = _value(field, request["user"], request["item"], origin)
        times = [
            fact.event_ts
            for fact in map(origin.facts.__getitem__, seen)
            if value != 0 and _value(field, fact.user, fact.item, origin) == value
        ]
        expected = {name: math.log1p(len(times))}
        recency = f"past_recency_{field}"
        if recency in request:
            age_s = (request["event_ts"] - max(times)) / 1e6 if times else 0.0
            expected[recency] = math.log1p(age_s) / math.log1p(_YEAR_S) if times else _NEVER
        for feature, number in expected.items():
            if not math.isclose(request[feature], number, rel_tol=_FLOAT32, abs_tol=_FLOAT32):
                yield f"feature {feature} is {request[feature]}, the visible past gives {number:.7g}"


def _value(field: str, user: int, item: int, origin: Origin) -> int:
    if field == "user":
        return user
    return item if field == "item" else origin.item_values[field][item]


def _check_raw(request: Row, origin: Origin, seen: list[int]) -> Iterator[str]:
    """Compare the raw history of a request with what the log had by then."""
    if origin.raw_max_len is None:
        return
    start, length = request["raw_start"], request["raw_len"]
    if start < 0 or length < 0 or start + length > len(origin.raw_ids):
        yield f"raw history slice {start}+{length} lies outside of {len(origin.raw_ids)} rows"
        return
    found = origin.raw_ids[start : start + length]
    yield from (origin.raw_faults[number] for number in found if number in origin.raw_faults)
    wanted = seen[-origin.raw_max_len :]
    if found != wanted:
        yield f"raw history is {found[-5:]}, the visible past gives {wanted[-5:]} (newest last)"
