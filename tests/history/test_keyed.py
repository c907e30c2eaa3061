"""Histories of items, and of users within a category, are those of the slow twin over all users' events."""

import pickle
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.errors import ConfigError
from loopfm_ray.history.join import JoinSettings, StoredSide, write_joined
from loopfm_ray.history.keys import UNKNOWN_KEY, KeyReader, place_of
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.codes import encode
from loopfm_ray.store.manifest import read_manifest
from tests.oracles import paths, worlds
from tests.oracles.asof import newest_visible_slow

KEYED = replace(
    worlds.SETTINGS,
    keys=(("item",), ("user", "item")),
    side=StoredSide(label="label"),
    with_own_latent=False,
)


def write_world(root, examples, **options):
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples, **options)


def join(root, target, chosen, mapper=None):
    more = {} if mapper is None else {"mapper": mapper}
    where = (root / "prepared", root / "latents", target)
    return write_joined(*where, worlds.REQUESTS, chosen, **more)


def read_keyed(joined, source):
    """Return example_id -> the rows of its history, as the joined version gives them."""
    version = open_version(joined)
    tables = {
        bucket: table.to_pylist()
        for bucket, table in read_histories(version, f"history/{source}", range(64)).items()
    }
    seen = {}
    for path in sorted(joined.glob("requests/*/*.parquet")):
        for row in paths.pq.read_table(path, partitioning=None).to_pylist():
            start, length = row[f"{source}_start"], row[f"{source}_len"]
            table = tables[row[f"{source}_bucket"]]
            assert start + length <= len(table)
            seen[row["example_id"]] = table[start : start + length]
    return seen


def slow_twin(examples, keys, chosen, delay_us=10):
    """Return example_id -> history as example ids, by the definition; `keys` has a key for each example, None is unknown."""
    columns = {name: values.tolist() for name, values in examples.items()}
    ids, event_ts = columns["example_id"], columns["event_ts"]
    rows = [
        n
        for n in range(len(ids))
        if columns["is_event"][n] and event_ts[n] > worlds.TRAINED_UNTIL_TS and keys[n] is not None
    ]
    rows.sort(key=lambda n: (event_ts[n], ids[n]))
    asked = [n for n in range(len(ids)) if event_ts[n] >= worlds.REQUESTS.start_ts]
    answers = newest_visible_slow(
        ([keys[n] for n in asked], [event_ts[n] for n in asked]),
        (
            [keys[n] for n in rows],
            [event_ts[n] for n in rows],
            [max(event_ts[n] + delay_us, columns["label_ts"][n]) for n in rows],
        ),
        chosen.max_len,
        chosen.retention_us,
    )
    return {
        ids[request]: [ids[rows[place]] for place in answer]
        for request, answer in zip(asked, answers, strict=True)
    }


def keys_of(examples, source):
    """Return the key of each example: item 0 is unknown."""
    pairs = zip(examples["user"].tolist(), examples["item"].tolist(), strict=True)
    if source == "latent_by_item":
        return [item or None for _, item in pairs]
    return [(user, item) if item else None for user, item in pairs]


@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(40, 300),
    num_users=st.sampled_from([1, 5, 14]),
    num_items=st.sampled_from([2, 6, 40]),
    max_len=st.integers(1, 9),
    retention_us=st.sampled_from([None, 0, 700, 2500]),
    block_rows=st.sampled_from([6, 40, 10_000]),
)
@settings(max_examples=15, deadline=None)
def test_histories_of_any_key_are_those_of_the_slow_twin(
    seed, num_rows, num_users, num_items, max_len, retention_us, block_rows, tmp_path_factory
):
    root = tmp_path_factory.mktemp("keyed")
    examples = worlds.make_examples(seed, num_rows, num_users)
    examples["item"] %= num_items
    write_world(root, examples)
    chosen = replace(KEYED, max_len=max_len, retention_us=retention_us, block_rows=block_rows)
    manifest = join(root, root / "joined", chosen)
    for source in ("latent_by_item", "latent_by_user_item"):
        want = slow_twin(examples, keys_of(examples, source), chosen)
        seen = read_keyed(root / "joined", source)
        found = {n: [event["example_id"] for event in history] for n, history in seen.items()}
        assert found == want
        lengths = [len(history) for history in want.values()]
        meta = manifest.meta["histories"][source]
        assert meta["mean_length"] == pytest.approx(np.mean(lengths))
        assert meta["max_len"] == max_len
        for history in seen.values():
            for event in history:
                number = event["example_id"]
                latent, _ = worlds.latents_of(np.array([number]))
                assert event["code"] == encode(latent, worlds.SPEC).tobytes()
                assert event["label"] == examples["label"][number]
                assert event["label_ts"] == examples["label_ts"][number]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    examples = worlds.make_examples()
    examples["item"] %= 9
    write_world(root, examples)
    join(root, root / "joined", KEYED)
    return root, examples


def test_a_history_of_an_item_holds_other_users_events_and_never_its_own(world):
    root, examples = world
    seen = read_keyed(root / "joined", "latent_by_item")
    users = defaultdict(set)
    for number, history in seen.items():
        assert number not in [event["example_id"] for event in history]
        assert all(event["item"] == examples["item"][number] for event in history)
        users[number] |= {event["user"] for event in history}
    assert max(len(found) for found in users.values()) > 3


@pytest.mark.parametrize("block_rows", [10, 37])
def test_blocks_of_any_size_give_the_same_bytes(world, tmp_path, block_rows):
    root, _ = world
    join(root, tmp_path / "joined", replace(KEYED, block_rows=block_rows))
    assert worlds.tree_bytes(tmp_path / "joined") == worlds.tree_bytes(root / "joined")


def test_tasks_in_any_order_and_other_processes_change_no_byte(world, tmp_path):
    root, _ = world

    def backwards(function, tasks):
        call = pickle.loads(pickle.dumps(function))
        found = [call(pickle.loads(pickle.dumps(task))) for task in tasks[::-1]]
        return found[::-1]

    join(root, tmp_path / "joined", KEYED, backwards)
    assert worlds.tree_bytes(tmp_path / "joined") == worlds.tree_bytes(root / "joined")


def test_keys_change_nothing_else_and_leave_nothing_behind(world, tmp_path):
    root, _ = world
    join(root, tmp_path / "plain", replace(KEYED, keys=()))
    plain, keyed = (worlds.tree_bytes(folder) for folder in (tmp_path / "plain", root / "joined"))
    assert not [name for name in keyed if "dealt" in name]
    assert set(keyed) - set(plain) == {
        f"history/{source}/bucket={place:03d}.arrow"
        for source in ("latent_by_item", "latent_by_user_item")
        for place in range(worlds.NUM_BUCKETS)
    }
    assert all(keyed[name] == plain[name] for name in plain if name.startswith("history/"))
    for path in (tmp_path / "plain").glob("requests/*/*.parquet"):
        other = root / "joined" / path.relative_to(tmp_path / "plain")
        table, more = (paths.pq.read_table(p, partitioning=None) for p in (path, other))
        assert more.select(table.column_names).equals(table)
    assert read_manifest(root / "joined").num_rows == read_manifest(tmp_path / "plain").num_rows


def test_events_of_users_without_requests_are_seen(tmp_path):
    examples = worlds.make_examples(num_rows=200)
    # users of bucket 0 are there before the requests only
    is_kept = (examples["bucket"] != 0) | (examples["event_ts"] < worlds.REQUESTS.start_ts)
    examples = {name: values[is_kept] for name, values in examples.items()}
    examples["example_id"] = np.arange(is_kept.sum())
    examples["item"] = examples["item"] % 3 + 1
    write_world(tmp_path, examples)
    join(tmp_path, tmp_path / "joined", KEYED)
    seen = read_keyed(tmp_path / "joined", "latent_by_item")
    want = slow_twin(examples, keys_of(examples, "latent_by_item"), KEYED)
    assert {n: [e["example_id"] for e in history] for n, history in seen.items()} == want
    assert any(event["user"] % 3 == 0 for history in seen.values() for event in history)


def test_fields_of_the_tables_are_parts_of_keys(tmp_path):
    """The whole path, with a category from the item table; a row is its own key in plain Python."""
    keys = (("kind",), ("user", "kind"))
    chosen = JoinSettings(5, keys=keys)
    found = paths.walk(tmp_path, paths.random_rows(seed=3, num_rows=300), join=chosen)
    data = PreparedData.open(found.prepared)
    rows = read_rows(data.examples.files(), columns=["example_id", *paths.COLUMNS[1:]])
    kind = data.items.ids["kind"]
    by_id = {
        int(number): (int(user), int(kind[item]))
        for number, user, item in zip(rows["example_id"], rows["user"], rows["item"], strict=True)
    }
    num_met = 0
    for source, size in (("latent_by_kind", 1), ("latent_by_user_kind", 2)):
        for number, history in read_keyed(found.joined, source).items():
            for event in history:
                assert by_id[event["example_id"]][-size:] == by_id[number][-size:]
                num_met += 1
    assert num_met > 500


def test_keys_of_unknown_values_are_unknown():
    reader = KeyReader("nowhere", ("item",))
    keys = reader.keys_of(np.array([1, 2, 3]), np.array([0, 2**31 - 1, 1]))
    assert keys.tolist() == [UNKNOWN_KEY, 2**31 - 1, 1]
    pair = KeyReader("nowhere", ("user", "item")).keys_of(np.array([5, 0]), np.array([7, 7]))
    assert pair.tolist() == [5 * 2**31 + 7, UNKNOWN_KEY]


def test_places_share_the_keys_about_evenly():
    counts = np.bincount(place_of(np.arange(-1, 9999), 8))
    assert counts.sum() == 10_000
    assert counts.min() > 1100


def test_an_unknown_part_of_a_key_is_named(tmp_path):
    data = paths.prepare_rows(tmp_path, paths.random_rows(num_rows=50))
    where = data.version.location
    with pytest.raises(ConfigError, match=r"part 'shape', .* there are \['user', 'item', .*'kind'"):
        KeyReader(where, ("shape",))
    with pytest.raises(ConfigError, match=r"more than 4\.61e"):
        KeyReader(where, ("user", "item", "kind"))
