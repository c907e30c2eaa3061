"""No label is read from a history before it was known, whatever the log, and the right one is read from then on."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.history_sources import LatentHistorySource
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.history.join import StoredSide, write_joined
from loopfm_ray.store.codes import decode
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.tables import code_bytes, map_ipc
from tests.oracles import worlds
from tests.oracles.asof import newest_visible_slow

SIDE = StoredSide(label="label", event_type="item")
SETTINGS = replace(worlds.SETTINGS, side=SIDE)


def what_is_told(joined):
    """Return example_id -> [(event, what is told of its label, kind)], as a VM gathers it."""
    told = {}
    for path in sorted(joined.glob("requests/*/*.parquet")):
        bucket = int(path.parent.name.removeprefix("bucket="))
        table = map_ipc(joined / f"history/bucket={bucket:03d}.arrow")
        source = LatentHistorySource(
            {bucket: table}, worlds.SPEC, worlds.SETTINGS.max_len, ("label", "event_type")
        )
        rows = pq.read_table(path, partitioning=None)
        start, length, request_ts, example_id = (
            rows.column(name).to_numpy()
            for name in ("latent_start", "latent_len", "event_ts", "example_id")
        )
        found = source.gather(np.full(len(start), bucket), start, length, request_ts)
        ids = table.column("example_id").to_pylist()
        latents = decode(code_bytes(table.column("code")), worlds.SPEC)
        for row, number in enumerate(example_id.tolist()):
            mask = found.mask[row]
            events = ids[start[row] : start[row] + length[row]]
            np.testing.assert_array_equal(
                found.latents[row][mask], latents[start[row] : start[row] + length[row]]
            )
            cells = (events, found.label[row][mask], found.event_type[row][mask])
            told[number] = list(zip(*cells, strict=True))
    return told


def slow_twin(examples, settings, delay_us, waits_for_label):
    """Return the same from the definition: visible events, and of each the label if it was known by then."""
    columns = {name: values.tolist() for name, values in examples.items()}
    num = len(columns["user"])
    rows = [n for n in range(num) if columns["is_event"][n] and columns["event_ts"][n] >= 1000]
    ready = {
        n: max(columns["event_ts"][n] + delay_us, columns["label_ts"][n] if waits_for_label else 0)
        for n in rows
    }
    asked = [n for n in range(num) if columns["event_ts"][n] >= worlds.REQUESTS.start_ts]
    answers = newest_visible_slow(
        ([columns["user"][n] for n in asked], [columns["event_ts"][n] for n in asked]),
        (
            [columns["user"][n] for n in rows],
            [columns["event_ts"][n] for n in rows],
            [ready[n] for n in rows],
        ),
        settings.max_len,
        settings.retention_us,
    )
    told = defaultdict(list)
    for request, answer in zip(asked, answers, strict=True):
        told[request] = []
        for place in answer:
            event, label = rows[place], 0
            if columns["label_ts"][event] <= columns["event_ts"][request]:
                label = 2 if columns["label"][event] == 1.0 else 1
            told[request].append((event, label, columns["item"][event]))
    return told


@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(50, 250),
    num_users=st.sampled_from([1, 3, 14]),
    waits_for_label=st.booleans(),
    delay_us=st.sampled_from([0, 10, 300]),
    block_rows=st.sampled_from([9, 40, 10_000]),
)
@settings(max_examples=12, deadline=None)
def test_labels_are_told_from_label_ts_on_and_never_before(
    seed, num_rows, num_users, waits_for_label, delay_us, block_rows, tmp_path_factory
):
    root = tmp_path_factory.mktemp("side")
    examples = worlds.make_examples(seed, num_rows, num_users)
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(
        root / "latents", examples, delay_us=delay_us, waits_for_label=waits_for_label
    )
    chosen = replace(SETTINGS, block_rows=block_rows)
    write_joined(root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, chosen)
    told = what_is_told(root / "joined")
    assert told == slow_twin(examples, chosen, delay_us, waits_for_label)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    examples = worlds.make_examples()
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples, waits_for_label=False)
    return root, examples


def join(root, target, settings):
    return write_joined(root / "prepared", root / "latents", target, worlds.REQUESTS, settings)


def test_labels_of_all_three_states_are_met(world, tmp_path):
    root, _ = world
    join(root, tmp_path / "joined", SETTINGS)
    told = what_is_told(tmp_path / "joined")
    labels = {label for history in told.values() for _, label, _ in history}
    assert labels == {0, 1, 2}


def test_what_is_kept_changes_no_history(world, tmp_path):
    root, _ = world
    plain = join(root, tmp_path / "plain", worlds.SETTINGS)
    rich = join(root, tmp_path / "rich", SETTINGS)
    assert (plain.meta["side"], rich.meta["side"]) == ({}, {"label": "label", "event_type": "item"})
    assert plain.config_hash != rich.config_hash
    for path in sorted((tmp_path / "plain").glob("history/*.arrow")):
        other = map_ipc(tmp_path / "rich/history" / path.name)
        names = map_ipc(path).column_names
        assert other.column_names == [*names, "label", "label_ts", "event_type"]
        assert other.select(names).equals(map_ipc(path))
    whole, more = (worlds.tree_bytes(tmp_path / name) for name in ("plain", "rich"))
    assert all(more[name] == whole[name] for name in whole if name.startswith("requests/"))
    assert read_manifest(tmp_path / "rich").num_rows == plain.num_rows


def test_a_column_that_the_examples_lack_is_named(world, tmp_path):
    root, _ = world
    with pytest.raises(ConfigError, match=r"history.side.event_type is 'kind', .* 'item'"):
        join(root, tmp_path / "joined", replace(SETTINGS, side=StoredSide(event_type="kind")))


def test_latents_of_other_examples_are_refused(world, tmp_path):
    root, examples = world
    fewer = {name: values[examples["example_id"] % 50 != 7] for name, values in examples.items()}
    worlds.write_prepared(tmp_path / "prepared", fewer)
    with pytest.raises(StoreError, match="rows of latents in bucket 0 have no example"):
        write_joined(
            tmp_path / "prepared",
            root / "latents",
            tmp_path / "joined",
            worlds.REQUESTS,
            SETTINGS,
        )
