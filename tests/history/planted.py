"""The leaks that the audit must find: what each one does to the honest world of `planting`.

`PLANTS` maps the name of a leak to the function that plants it and to words of what the audit must say.
"""

import shutil

from loopfm_ray.errors import LeakError
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.space import Space
from tests.history.planting import DELAY_US, MAX_LEN, RETENTION_US, rewrite, write_snapshot
from tests.oracles import paths

PLANTS = {}


def plant(words):
    """Register a function that plants a leak, with the words that the audit must find for it."""

    def register(function):
        PLANTS[function.__name__] = (function, words)
        return function

    return register


# Histories that hold what was not visible.


@plant("own event")
def own_event(case):
    own = {e["example_id"]: e for e in case.stored if e["is_event"]}
    row = case.request(lambda row: row["example_id"] in own)
    case.add_event(row, own[row["example_id"]])
    case.save()


@plant("is not before")
def event_of_the_same_instant(case):
    case.add_event(
        *case.request_with(
            lambda e, r: e["event_ts"] == r["event_ts"] and e["example_id"] != r["example_id"]
        )
    )
    case.save()


@plant("is not before")
def event_of_the_future(case):
    row = case.request(lambda row: case.of(row, lambda e, r: e["event_ts"] > r["event_ts"]))
    case.add_event(row, case.of(row, lambda e, r: e["event_ts"] > r["event_ts"])[0])
    case.save()


@plant("was available at")
def event_within_the_delay(case):
    case.add_event(
        *case.request_with(
            lambda e, r: (
                e["label_ts"] <= r["event_ts"]
                and e["event_ts"] < r["event_ts"] < e["event_ts"] + DELAY_US
            )
        )
    )
    case.save()


@plant("was available at")
def event_before_its_label_was_known(case):
    case.add_event(
        *case.request_with(lambda e, r: e["event_ts"] + DELAY_US < r["event_ts"] < e["label_ts"])
    )
    case.save()


@plant("another user")
def event_of_another_user(case):
    row = case.request()
    other = [
        e
        for e in case.stored
        if e["user"] != row["user"] and e["is_event"] and e["available_ts"] < row["event_ts"]
    ]
    case.add_event(row, other[-1])
    case.save()


@plant("older than the retention")
def event_older_than_the_retention(case):
    row, _ = case.request_with(lambda e, r: r["event_ts"] - e["event_ts"] > RETENTION_US)
    old = case.of(row, lambda e, r: r["event_ts"] - e["event_ts"] > RETENTION_US)
    case.give(row, [old[-1], *case.window(row)][:MAX_LEN])
    case.save()


@plant("is no event of the latents")
def row_that_is_no_event(case):
    row = case.request(lambda row: case.of(row, lambda e, r: e["event_ts"] < r["event_ts"], False))
    case.add_event(row, case.of(row, lambda e, r: e["event_ts"] < r["event_ts"], False)[-1])
    case.save()


@plant("at most 6")
def longer_than_the_longest_history(case):
    def is_visible(e, r):
        age = r["event_ts"] - e["event_ts"]
        return 0 < age <= RETENTION_US and e["available_ts"] <= r["event_ts"]

    row = case.request(lambda row: len(case.of(row, is_visible)) > MAX_LEN)
    case.give(row, case.of(row, is_visible)[-MAX_LEN - 1 :])
    case.save()


@plant(r"label': 0.0.* beside it, the prepared version gives .*label': 1.0")
def label_of_an_event_turned_around(case):
    row = case.request()
    case.history[row["latent_start"]]["label"] = 0.0
    case.save()


@plant("beside it, the prepared version gives .*label_ts")
def label_known_earlier_than_it_was(case):
    for event in case.history:
        event["label_ts"] = event["event_ts"]
    case.save()


@plant("beside it, the prepared version gives .*event_type")
def event_of_another_kind(case):
    row = case.request()
    case.history[row["latent_start"]]["event_type"] += 1
    case.save()


# Histories that lack, repeat or mix up what was visible.


@plant("lacks visible")
def newest_visible_event_missing(case):
    case.request()["latent_len"] -= 1
    case.save()


@plant("lacks visible")
def oldest_visible_event_missing(case):
    row = case.request()
    row["latent_start"] += 1
    row["latent_len"] -= 1
    case.save()


@plant("lacks visible")
def event_in_the_middle_missing(case):
    row = case.request()
    case.give(row, [*case.window(row)[:1], *case.window(row)[2:]])
    case.save()


@plant("order")
def wrong_order(case):
    row = case.request()
    case.give(row, case.window(row)[::-1])
    case.save()


@plant("order or number")
def repeated_event(case):
    row = case.request(lambda row: row["latent_len"] < MAX_LEN, min_len=1)
    case.give(row, [*case.window(row), case.window(row)[-1]])
    case.save()


@plant("outside")
def slice_out_of_bounds(case):
    case.request()["latent_start"] = len(case.history) - 1
    case.save()


@plant("lacks visible")
def slice_shifted_by_one(case):
    case.request(lambda row: row["latent_start"] > 0)["latent_start"] -= 1
    case.save()


# Entries that are not what was stored.


@plant(r"differs from the latents version in \['code'\]")
def code_changed_by_one_bit(case):
    event = case.history[case.request()["latent_start"]]
    event["code"] = bytes([event["code"][0] ^ 1]) + event["code"][1:]
    case.save()


@plant(r"differs from the latents version in \['code'\]")
def code_of_another_event(case):
    row = case.request()
    first, second = case.window(row)[:2]
    assert first["code"] != second["code"]
    first["code"] = second["code"]
    case.save()


@plant(r"differs from the latents version in \['available_ts'\]")
def entry_that_says_available_too_early(case):
    case.history[case.request()["latent_start"]]["available_ts"] -= 1
    case.save()


# Teacher predictions.


@plant("the snapshot gave")
def teacher_of_another_row(case):
    first, second = case.requests[:2]
    assert first["teacher_prob"] != second["teacher_prob"]
    first["teacher_prob"] = second["teacher_prob"]
    case.save()


@plant("teacher_code is not the code")
def own_latent_of_another_row(case):
    first, second = case.requests[:2]
    assert first["teacher_code"] != second["teacher_code"]
    first["teacher_code"] = second["teacher_code"]
    case.save()


@plant("the snapshot gave")
def teacher_of_another_snapshot(case):
    for row in case.requests:
        row["teacher_prob"] = 1 - row["teacher_prob"]
    case.save()


@plant("teacher_snapshot is 1, the row's time makes it 0")
def teacher_that_did_not_score_the_row(case):
    case.requests[0]["teacher_snapshot"] = 1
    case.save()


@plant("score_ts is")
def prediction_that_says_it_was_there_too_early(case):
    case.requests[0]["score_ts"] -= 1
    case.save()


@plant("the joined version says that .* scored its rows, its latents say")
def teachers_of_another_version(case):
    meta = read_manifest(case.joined).meta
    other = [{**one, "snapshot_id": "another"} for one in meta["teachers"]]
    rewrite(case.joined, meta={**meta, "teachers": other})


@plant("the snapshot was trained on this request")
def teacher_that_was_trained_on_the_row(case):
    until_ts = case.requests[0]["event_ts"]
    meta = {**read_manifest(case.latents).meta, "trained_until_ts": until_ts}
    case.rename("latents", rewrite(case.latents, meta=meta))
    rewrite(case.joined, meta={**read_manifest(case.joined).meta, "trained_until_ts": until_ts})
    write_snapshot(case.snapshot, until_ts)


@plant("was embedded by a snapshot trained until")
def event_embedded_by_a_snapshot_that_saw_it(case):
    teacher_that_was_trained_on_the_row(case)


@plant("latents say trained_until_ts .* the snapshot")
def snapshot_trained_longer_than_the_latents_say(case):
    write_snapshot(case.snapshot, paths.FM_STOP_TS + paths.DAY_US)


# Requests.


@plant("user or time or other columns differ .*'user'")
def request_of_another_user(case):
    row = case.request()
    row["user"] = next(e["user"] for e in case.stored if e["user"] != row["user"])
    case.save()


@plant("'event_ts'")
def request_moved_to_a_later_time(case):
    case.request()["event_ts"] += paths.HOUR_US
    case.save()


@plant("'label'")
def label_of_another_outcome(case):
    row = case.request()
    row["label"] = 1 - row["label"]
    case.save()


@plant("'item'")
def item_of_another_row(case):
    row = case.request()
    row["item"] = next(other["item"] for other in case.requests if other["item"] != row["item"])
    case.save()


@plant("past_count_item")
def feature_changed_after_it_was_prepared(case):
    case.request()["past_count_item"] += 0.5
    case.save()


@plant("has 1 requests twice")
def request_twice(case):
    case.requests.append(case.requests[-1])
    case.save()


@plant("lacks 1 requests")
def request_dropped(case):
    del case.requests[0]
    case.save()


@plant("the bucket is not there")
def bucket_of_requests_dropped(case):
    shutil.rmtree(case.request_path.parent)
    case.history_path.unlink()
    rewrite(case.joined)


# Latents that are wrong, joined as if they were right.


@plant("delay and label give")
def available_ts_earlier_in_the_latents(case):
    def hurry(row):
        row["available_ts"] -= DELAY_US

    case.edit("latents", "*/bucket=*.parquet", hurry)
    case.join_again()


@plant(r"other \['label_ts'\] than the prepared version")
def label_ts_earlier_in_the_latents(case):
    """Consistent in itself: only the prepared data knows better."""

    def forget(row):
        row["label_ts"] = row["event_ts"]
        row["available_ts"] = row["event_ts"] + DELAY_US

    case.edit("latents", "*/bucket=*.parquet", forget)
    case.join_again()


@plant(r"other \['event_ts'\] than the prepared version")
def event_ts_earlier_in_the_latents(case):
    request_ids = {row["example_id"] for row in case.requests}
    chosen = next(e for e in case.stored if e["is_event"] and e["example_id"] not in request_ids)

    def move(row):
        if row["example_id"] == chosen["example_id"]:
            row["event_ts"] -= 1
            row["available_ts"] -= 1

    case.edit("latents", "*/bucket=*.parquet", move)
    for row in case.history:
        move(row)
    case.save()


@plant("lacks visible")
def event_hidden_in_the_latents(case):
    hidden = case.window(case.request())[0]["example_id"]

    def hide(row):
        row["is_event"] = row["is_event"] and row["example_id"] != hidden

    case.edit("latents", "*/bucket=*.parquet", hide)
    case.join_again()


@plant(r"other \['is_event'\] than the prepared version")
def unclicked_rows_as_events_in_the_latents(case):
    case.edit("latents", "*/bucket=*.parquet", lambda row: row.update(is_event=True))
    case.join_again()


@plant("waits_for_label False, the prepared data needs True")
def latents_that_do_not_wait_for_labels(case):
    meta = {**read_manifest(case.latents).meta, "waits_for_label": False}
    meta |= Space.of_meta({name: meta[name] for name in meta if name != "space"}).to_meta()

    def hurry(row):
        row["available_ts"] = row["event_ts"] + DELAY_US

    case.edit("latents", "*/bucket=*.parquet", hurry, meta=meta)
    case.join_again()


@plant("the joined version says delay_us 0")
def joined_with_another_delay_than_it_says(case):
    rewrite(case.joined, meta={**read_manifest(case.joined).meta, "delay_us": 0})


# Features of the prepared data itself, joined as they are.


@plant("feature past_count_item is .* the visible past gives")
def feature_that_counts_its_own_event(case):
    case.edit(
        "prepared",
        "examples/*/*.parquet",
        lambda row: row.update(past_count_item=row["past_count_item"] + row["label"] * 0.3),
    )
    case.join_again()


@plant("feature past_recency_kind is .* the visible past gives")
def feature_of_the_time_since_a_later_event(case):
    case.edit("prepared", "examples/*/*.parquet", lambda row: row.update(past_recency_kind=0.0))
    case.join_again()


@plant("raw history is")
def raw_history_shifted_by_one(case):
    def shift(row):
        row["raw_start"] += row["raw_len"] > 1
        row["raw_len"] -= row["raw_len"] > 1

    case.edit("prepared", "examples/*/*.parquet", shift)
    case.join_again()


@plant("raw event .* says")
def raw_event_available_too_early(case):
    def hurry(row):
        row["available_ts"] = row["event_ts"]

    case.edit("prepared", "events/*.arrow", hurry)
    case.join_again()


def find(case, name):
    """Plant one leak and return what the audit says of it."""
    PLANTS[name][0](case)
    try:
        case.audit().raise_if_leaking()
    except LeakError as error:
        return str(error)
    return ""
