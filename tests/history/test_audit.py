import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.history import bucket
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.store import manifest as manifests
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.tables import code_bytes, code_column, map_ipc, write_ipc, write_parquet
from tests.oracles import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("audited")
    examples = worlds.make_examples(seed=5)
    worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples)
    write_joined(
        root / "prepared", root / "latents", root / "joined", worlds.REQUESTS, worlds.SETTINGS
    )
    return root


class Tampered:
    """A copy of the joined version, with one bucket's tables to change."""

    def __init__(self, root, tmp_path, bucket=1, period=3):
        self.latents = root / "latents"
        self.folder = tmp_path / "joined"
        shutil.copytree(root / "joined", self.folder)
        self.history_path = self.folder / f"history/bucket={bucket:03d}.arrow"
        self.request_path = (
            self.folder / f"requests/bucket={bucket:03d}/period={period:04d}.parquet"
        )
        self.history = map_ipc(self.history_path).to_pylist()
        self.requests = pq.read_table(self.request_path, partitioning=None).to_pylist()
        shards = sorted((root / "latents").glob("*/*.parquet"))
        rows = [
            row for path in shards for row in pq.read_table(path, partitioning=None).to_pylist()
        ]
        self.events = [row for row in rows if row["is_event"]]

    def request(self, min_length=3):
        """Return the last request with a history of some length."""
        return next(row for row in self.requests[::-1] if row["latent_len"] >= min_length)

    def window(self, row):
        return self.history[row["latent_start"] : row["latent_start"] + row["latent_len"]]

    def set_window(self, row, events):
        """Give one request another history, in rows of its own."""
        row["latent_start"], row["latent_len"] = len(self.history), len(events)
        names = bucket.HISTORY_COLUMNS
        self.history.extend({name: event[name] for name in names} for event in events)

    def audit(self):
        history_schema = map_ipc(self.history_path).schema
        request_schema = pq.read_schema(self.request_path)
        write_ipc(pa.Table.from_pylist(self.history, history_schema), self.history_path)
        write_parquet(pa.Table.from_pylist(self.requests, request_schema), self.request_path)
        return audit(self.folder, self.latents, sample=None)


@pytest.fixture
def tampered(world, tmp_path):
    return Tampered(world, tmp_path)


def own(case, row):
    return next((e for e in case.events if e["example_id"] == row["example_id"]), None)


def plant_own_event(case):
    row = next(r for r in case.requests[::-1] if r["latent_len"] > 2 and own(case, r))
    case.set_window(row, [*case.window(row)[1:], own(case, row)])


def plant_later_event(case):
    row = next(r for r in case.requests if r["latent_len"] > 2)
    later = [e for e in case.events if e["user"] == row["user"] and e["event_ts"] > row["event_ts"]]
    case.set_window(row, [*case.window(row)[1:], later[0]])


def plant_equal_timestamp(case):
    for row in case.requests:
        same = [
            e
            for e in case.events
            if e["user"] == row["user"]
            and e["event_ts"] == row["event_ts"]
            and e["example_id"] != row["example_id"]
        ]
        if same:
            case.set_window(row, [*case.window(row), same[0]][-7:])
            return
    raise AssertionError("the world has no equal timestamps")


def plant_not_yet_available(case):
    for row in case.requests:
        early = [
            e
            for e in case.events
            if e["user"] == row["user"] and e["event_ts"] < row["event_ts"] < e["available_ts"]
        ]
        if early:
            case.set_window(row, [*case.window(row), early[-1]][-7:])
            return
    raise AssertionError("the world has no late labels")


def plant_other_user(case):
    row = case.request()
    other = [
        e
        for e in case.events
        if e["user"] != row["user"]
        and e["user"] % worlds.NUM_BUCKETS == row["bucket"]
        and e["available_ts"] < row["event_ts"]
    ]
    case.set_window(row, [*case.window(row)[1:], other[-1]])


def plant_missing_newest(case):
    row = case.request()
    row["latent_len"] -= 1


def plant_missing_oldest(case):
    row = case.request()
    row["latent_start"] += 1
    row["latent_len"] -= 1


def plant_wrong_order(case):
    row = case.request()
    case.set_window(row, case.window(row)[::-1])


def plant_repeated_event(case):
    row = next(r for r in case.requests[::-1] if 2 <= r["latent_len"] < 7)
    case.set_window(row, [*case.window(row), case.window(row)[-1]])


def plant_outside_retention(case):
    for row in case.requests[::-1]:
        old = [
            e
            for e in case.events
            if e["user"] == row["user"] and row["event_ts"] - e["event_ts"] > 1500
        ]
        if old and row["latent_len"] < 7:
            case.set_window(row, [old[0], *case.window(row)])
            return
    raise AssertionError("the world has no old events")


def plant_too_long(case):
    for row in case.requests[::-1]:
        window = case.window(row)
        visible = [
            e
            for e in sorted(case.events, key=lambda e: (e["event_ts"], e["example_id"]))
            if e["user"] == row["user"]
            and e["event_ts"] < row["event_ts"]
            and e["available_ts"] <= row["event_ts"]
            and row["event_ts"] - e["event_ts"] <= 1500
        ]
        if len(visible) > len(window):
            case.set_window(row, visible[-8:])
            return
    raise AssertionError("the world has no long history")


def plant_tampered_code(case):
    row = case.request()
    event = case.history[row["latent_start"]]
    event["code"] = bytes([event["code"][0] ^ 1]) + event["code"][1:]


def plant_tampered_time(case):
    row = case.request()
    case.history[row["latent_start"]]["available_ts"] -= 1


def plant_other_rows_teacher(case):
    first, second = case.requests[0], case.requests[1]
    first["teacher_prob"] = second["teacher_prob"]


def plant_slice_outside(case):
    case.request()["latent_start"] = len(case.history)


def plant_other_user_on_request(case):
    row = case.request()
    row["user"] += 3


PLANTS = {
    plant_own_event: "own event",
    plant_later_event: "is not before",
    plant_equal_timestamp: "is not before",
    plant_not_yet_available: "was available at",
    plant_other_user: "another user",
    plant_missing_newest: "lacks visible",
    plant_missing_oldest: "lacks visible",
    plant_wrong_order: "order",
    plant_repeated_event: "order or number",
    plant_outside_retention: "retention",
    plant_too_long: "at most 7",
    plant_tampered_code: r"differs from the latents version in \['code'\]",
    plant_tampered_time: r"\['available_ts'\]",
    plant_other_rows_teacher: "teacher_prob",
    plant_slice_outside: "outside",
    plant_other_user_on_request: "user or time differ",
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_leak_is_found(tampered, plant):
    plant(tampered)
    report = tampered.audit()
    assert report.num_leaks >= 1
    with pytest.raises(LeakError, match=PLANTS[plant]):
        report.raise_if_leaking()


def test_an_honest_join_passes_and_tells_its_margins(world):
    report = audit(world / "joined", world / "latents", sample=None)
    assert report.num_checked == read_manifest(world / "joined").num_rows
    assert report.num_leaks == 0
    assert report.leaks == ()
    report.raise_if_leaking()
    assert 0 <= report.margin_s["min"] <= report.margin_s["p10"] <= report.margin_s["p90"]
    assert report.num_entries > report.num_checked


def test_a_sample_is_drawn_by_the_seed(world):
    first = audit(world / "joined", world / "latents", sample=40, seed=1)
    assert first == audit(world / "joined", world / "latents", sample=40, seed=1)
    assert first.num_checked == 40
    assert first.num_leaks == 0
    assert (
        first.num_entries
        != audit(world / "joined", world / "latents", sample=40, seed=2).num_entries
    )


def test_a_join_without_events_has_no_margins(world, tmp_path):
    examples = worlds.make_examples(seed=5)
    examples["is_event"][:] = False
    worlds.write_latents(tmp_path / "latents", examples)
    where = (world / "prepared", tmp_path / "latents", tmp_path / "joined")
    write_joined(*where, worlds.REQUESTS, JoinSettings(3))
    report = audit(tmp_path / "joined", tmp_path / "latents")
    assert (report.num_leaks, report.margin_s) == (0, {})


def test_other_latents_than_those_joined_are_refused(world, tmp_path):
    worlds.write_latents(tmp_path / "latents", worlds.make_examples(seed=5), snapshot_id="other")
    with pytest.raises(StoreError, match="was made from latents"):
        audit(world / "joined", tmp_path / "latents")


def rewrite(folder, change_shard=None, change_meta=None):
    """Change a latents version and its manifest alike, so that only the audit can tell; return its version."""
    manifest = read_manifest(folder)
    path = folder / "period=0001/bucket=001.parquet"
    table = pq.read_table(path, partitioning=None)
    if change_shard is not None:
        write_parquet(change_shard(table), path)
    meta = {**manifest.meta, **(change_meta or {})}
    draft = manifests.draft(
        kind="latents",
        config_hash=manifest.config_hash,
        inputs=manifest.inputs,
        meta=meta,
        num_rows=manifest.num_rows,
    )
    (folder / "manifest.json").unlink()
    return manifests.write_manifest(folder, draft).version


def point_to(joined, version):
    """Make the joined version name other latents as its input."""
    tree = json.loads((joined / "manifest.json").read_text())
    tree["inputs"]["latents"] = version
    manifest = manifests.Manifest(
        **{**tree, "files": tuple(manifests.FileEntry(**item) for item in tree["files"])}
    )
    (joined / "manifest.json").unlink()
    manifests.write_manifest(joined, manifest)


def test_latents_that_call_events_available_too_early_are_found(tampered, world, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")

    def hurry(table):
        times = np.maximum(table.column("available_ts").to_numpy() - 5, 0)
        at = table.schema.get_field_index("available_ts")
        return table.set_column(at, "available_ts", pa.array(times))

    point_to(tampered.folder, rewrite(tmp_path / "latents", change_shard=hurry))
    with pytest.raises(LeakError, match="delay and label give"):
        audit(tampered.folder, tmp_path / "latents", sample=None).raise_if_leaking()


def test_latents_that_a_later_snapshot_embedded_are_found(tampered, world, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")
    version = rewrite(tmp_path / "latents", change_meta={"trained_until_ts": 2500})
    point_to(tampered.folder, version)
    with pytest.raises(LeakError, match="trained") as caught:
        audit(tampered.folder, tmp_path / "latents", sample=None).raise_if_leaking()
    assert "embedded by a snapshot trained until 2500" in str(caught.value)


def test_codes_survive_as_a_column():
    packed = np.arange(12, dtype=np.uint8).reshape(4, 3)
    column = pa.chunked_array([code_column(packed[:2]), code_column(packed[2:])])
    np.testing.assert_array_equal(code_bytes(column), packed)
    np.testing.assert_array_equal(code_bytes(code_column(packed).slice(1, 2)), packed[1:3])
    assert code_bytes(code_column(packed[:0])).shape == (0, 3)
