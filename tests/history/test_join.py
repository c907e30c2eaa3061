import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.history.join import (
    JoinSettings,
    JoinStats,
    join_bucket,
    merge_stats,
    plan_join,
    write_joined,
)
from loopfm_ray.store.codes import encode
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.tables import code_bytes, map_ipc
from loopfm_ray.types import TimeRange
from tests.oracles import worlds
from tests.oracles.asof import newest_visible_slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    examples = worlds.make_examples()
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples)
    write_joined(
        root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, worlds.SETTINGS
    )
    return root, examples


def read_requests(joined):
    for path in sorted(joined.glob("requests/*/*.parquet")):
        bucket = int(path.parent.name.removeprefix("bucket="))
        history = map_ipc(joined / f"history/bucket={bucket:03d}.arrow")
        for row in pq.read_table(path, partitioning=None).to_pylist():
            yield row, history


def expected_histories(examples, settings, delay_us=10):
    """Return example_id -> history as example ids, from the slow twin over the raw columns."""
    event = examples["is_event"] & (examples["event_ts"] >= worlds.PERIOD_US)
    rows = np.flatnonzero(event)
    rows = rows[np.lexsort([examples[n][rows] for n in ("example_id", "event_ts", "user")])]
    event_ts = examples["event_ts"][rows]
    available_ts = np.maximum(event_ts + delay_us, examples["label_ts"][rows])
    asked = np.flatnonzero(examples["event_ts"] >= worlds.REQUESTS.start_ts)
    answers = newest_visible_slow(
        (examples["user"][asked].tolist(), examples["event_ts"][asked].tolist()),
        (examples["user"][rows].tolist(), event_ts.tolist(), available_ts.tolist()),
        settings.max_len,
        settings.retention_us,
    )
    return {
        int(asked_row): examples["example_id"][rows[answer]].tolist()
        for asked_row, answer in zip(asked, answers, strict=True)
    }


def test_every_request_has_the_history_and_prediction_of_the_slow_twin(world):
    root, examples = world
    want = expected_histories(examples, worlds.SETTINGS)
    seen = 0
    for row, history in read_requests(root / "joined"):
        ids = history.column("example_id").to_numpy()
        window = slice(row["latent_start"], row["latent_start"] + row["latent_len"])
        assert ids[window].tolist() == want[row["example_id"]]
        latents, _ = worlds.latents_of(ids[window])
        codes = code_bytes(history.column("code"))[window]
        np.testing.assert_array_equal(codes, encode(latents, worlds.SPEC))
        own, prob = worlds.latents_of(np.array([row["example_id"]]))
        assert row["teacher_code"] == encode(own, worlds.SPEC).tobytes()
        assert row["teacher_prob"] == prob[0]
        assert row["label"] == examples["label"][row["example_id"]]
        seen += 1
    assert seen == len(want) > 200


def test_manifest_names_inputs_and_what_a_history_is(world):
    root, examples = world
    manifest = read_manifest(root / "joined")
    want = expected_histories(examples, worlds.SETTINGS)
    lengths = [len(ids) for ids in want.values()]
    assert manifest.inputs["latents"] == read_manifest(root / "latents").content
    assert manifest.inputs["prepared"] == read_manifest(root / "prepared").version
    assert manifest.num_rows == len(want)
    assert manifest.meta["max_len"] == 7
    assert manifest.meta["retention_us"] == 1500
    assert manifest.meta["coverage"] == pytest.approx(np.mean(np.array(lengths) > 0))
    assert manifest.meta["mean_length"] == pytest.approx(np.mean(lengths))
    assert 0 < manifest.meta["staleness_s"]["p50"] <= manifest.meta["staleness_s"]["p90"] < 0.002


def test_joining_again_gives_the_same_bytes(world, tmp_path):
    root, _ = world
    write_joined(
        root / "prepared", root / "latents", tmp_path / "again", worlds.REQUESTS, worlds.SETTINGS
    )
    assert worlds.tree_bytes(tmp_path / "again") == worlds.tree_bytes(root / "joined")


def test_mapping_buckets_in_any_order_changes_no_byte(world, tmp_path):
    root, _ = world

    def backwards(function, tasks):
        results = {task.bucket: pickle.loads(pickle.dumps(function))(task) for task in tasks[::-1]}
        return [results[task.bucket] for task in tasks]

    where = (root / "prepared", root / "latents", tmp_path / "joined")
    write_joined(*where, worlds.REQUESTS, worlds.SETTINGS, mapper=backwards)
    assert worlds.tree_bytes(tmp_path / "joined") == worlds.tree_bytes(root / "joined")


def test_without_late_labels_the_history_has_no_copies(world, tmp_path):
    root, examples = world
    worlds.write_latents(tmp_path / "latents", examples, waits_for_label=False)
    settings = JoinSettings(max_len=5)
    where = (root / "prepared", tmp_path / "latents", tmp_path / "joined")
    manifest = write_joined(*where, worlds.REQUESTS, settings)
    assert manifest.meta["num_extra_rows"] == 0
    late = read_manifest(root / "joined").meta
    assert late["num_extra_rows"] > 0


def test_requests_without_a_stored_prediction_are_counted(world, tmp_path):
    root, examples = world
    shards = [place for place in worlds.SHARDS if place != (3, 1)]
    worlds.write_latents(tmp_path / "latents", examples, shards=shards)
    num_asked = {period: len(worlds.shard_rows(examples, period, 1)["user"]) for period in (2, 3)}
    where = (root / "prepared", tmp_path / "latents", tmp_path / "joined")
    with pytest.raises(
        StoreError, match=f"{num_asked[3]} of {sum(num_asked.values())} requests of bucket 1"
    ):
        write_joined(*where, worlds.REQUESTS, worlds.SETTINGS)
    assert not (tmp_path / "joined").exists()


def test_requests_that_the_snapshot_was_trained_on_are_refused(world):
    root, _ = world
    with pytest.raises(LeakError, match="snap"):
        plan_join(
            root / "prepared", root / "latents", root / "x", TimeRange(500, 4000), worlds.SETTINGS
        )


def test_an_empty_time_range_is_refused(world):
    root, _ = world
    with pytest.raises(StoreError, match="no examples"):
        plan_join(
            root / "prepared", root / "latents", root / "x", TimeRange(9000, 9500), worlds.SETTINGS
        )


def test_a_time_range_inside_a_period_takes_only_its_rows(world, tmp_path):
    root, examples = world
    inside = TimeRange(2300, 2600)
    tasks = plan_join(root / "prepared", root / "latents", tmp_path, inside, worlds.SETTINGS)
    assert [task.bucket for task in tasks] == [0, 1, 2]
    assert all(len(task.examples) == 1 for task in tasks)
    stats = merge_stats([join_bucket(task) for task in tasks])
    event_ts = examples["event_ts"]
    assert stats.num_requests == np.count_nonzero((event_ts >= 2300) & (event_ts < 2600))


def test_stats_of_nothing_are_zero():
    stats = merge_stats([JoinStats()])
    assert stats.coverage == 0
    assert stats.mean_length == 0
    assert stats.staleness.quantiles() == {"p50": None, "p90": None}
