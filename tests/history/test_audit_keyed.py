"""Leaks that are planted in histories of items are found; honest ones raise no alarm."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, StoredSide, write_joined
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.tables import map_ipc, write_ipc, write_parquet
from tests.history.planting import rewrite
from tests.oracles import paths, worlds

SOURCE = "latent_by_item"
SETTINGS = replace(
    worlds.SETTINGS, keys=(("item",), ("user", "item")), side=StoredSide(label="label")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    examples = worlds.make_examples()
    examples["item"] %= 9
    prepared = worlds.write_prepared(root / "prepared", examples)
    worlds.write_latents(root / "latents", examples, inputs={"prepared": prepared.version})
    where = (root / "prepared", root / "latents", root / "joined")
    write_joined(*where, worlds.REQUESTS, SETTINGS)
    return root


class Case:
    """A copy of the joined version, the last request with a history of its item, and the table of that history."""

    def __init__(self, world, folder):
        self.world, self.joined = world, folder / "joined"
        shutil.copytree(world / "joined", self.joined)
        tables = {path: pq.read_table(path, partitioning=None) for path in self._files()}
        self.path, rows = next(
            (path, table.to_pylist())
            for path, table in tables.items()
            if any(row[f"{SOURCE}_len"] > 2 for row in table.to_pylist())
        )
        self.rows = rows
        self.row = [row for row in rows if row[f"{SOURCE}_len"] > 2][-1]
        self.history = self._history(self.row[f"{SOURCE}_bucket"]).to_pylist()

    def _files(self):
        return sorted(self.joined.glob("requests/*/*.parquet"))

    def _history_path(self, place):
        return self.joined / f"history/{SOURCE}/bucket={place:03d}.arrow"

    def _history(self, place):
        return map_ipc(self._history_path(place))

    @property
    def start(self):
        return self.row[f"{SOURCE}_start"]

    def all_events(self):
        for place in range(worlds.NUM_BUCKETS):
            yield from self._history(place).to_pylist()

    def give(self, events):
        self.row[f"{SOURCE}_start"] = len(self.history)
        self.row[f"{SOURCE}_len"] = len(events)
        self.history += events

    @property
    def window(self):
        return self.history[self.start : self.start + self.row[f"{SOURCE}_len"]]

    def audit(self, place=None):
        where = self._history_path(self.row[f"{SOURCE}_bucket"] if place is None else place)
        schema = map_ipc(where).schema
        write_ipc(pa.Table.from_pylist(self.history, schema), where)
        write_parquet(pa.Table.from_pylist(self.rows, pq.read_schema(self.path)), self.path)
        rewrite(self.joined)
        return audit(self.joined, self.world / "latents", self.world / "prepared", sample=None)


def event_of_another_item(case):
    other = [
        event
        for event in case.all_events()
        if event["item"] != case.row["item"] and event["available_ts"] < case.row["event_ts"]
    ]
    case.give([*case.window[1:], other[-1]])


def event_of_the_future(case):
    later = [
        event
        for event in case.history
        if event["item"] == case.row["item"] and event["event_ts"] > case.row["event_ts"]
    ]
    case.give([*case.window[1:], later[0]])


def event_before_its_label_was_known(case):
    def early(row):
        return [
            event
            for event in case.history
            if event["item"] == row["item"]
            and event["event_ts"] < row["event_ts"] < event["available_ts"]
        ]

    place = case.row[f"{SOURCE}_bucket"]
    case.row = next(row for row in case.rows if row[f"{SOURCE}_bucket"] == place and early(row))
    case.give([*case.window[1:], early(case.row)[0]])


def own_event(case):
    own = {event["example_id"]: event for event in case.history}
    place = case.row[f"{SOURCE}_bucket"]
    case.row = next(
        row for row in case.rows if row["example_id"] in own and row[f"{SOURCE}_bucket"] == place
    )
    case.give([*case.window[1:], own[case.row["example_id"]]])


def newest_event_missing(case):
    case.row[f"{SOURCE}_len"] -= 1


def history_forgotten(case):
    case.row |= {f"{SOURCE}_bucket": 0, f"{SOURCE}_start": 0, f"{SOURCE}_len": 0}


def order_turned_around(case):
    case.give(case.window[::-1])


def code_of_another_event(case):
    first, second = case.window[:2]
    case.give([{**first, "code": second["code"]}, *case.window[1:]])


def label_turned_around(case):
    first, *others = case.window
    case.give([{**first, "label": 1 - first["label"]}, *others])


def slice_outside(case):
    case.row[f"{SOURCE}_start"] = len(case.history)


PLANTS = {
    event_of_another_item: "belongs to another item",
    event_of_the_future: "is not before",
    event_before_its_label_was_known: "was available at",
    own_event: "history holds the request's own event",
    newest_event_missing: "lacks visible events",
    history_forgotten: "lacks visible events",
    order_turned_around: "order or number",
    code_of_another_event: r"differs from the latents version in ['code']",
    label_turned_around: "beside it, the prepared version gives",
    slice_outside: "lies outside of",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_leak_in_a_history_of_an_item_is_found(world, tmp_path, plant):
    case = Case(world, tmp_path)
    place = case.row[f"{SOURCE}_bucket"]
    plant(case)
    report = case.audit(place)
    assert report.num_leaks == 1
    assert f"example {case.row['example_id']}: {SOURCE}" in report.leaks[0]
    assert PLANTS[plant] in report.leaks[0]


def test_a_place_that_points_elsewhere_is_found(world, tmp_path):
    case = Case(world, tmp_path)
    place = case.row[f"{SOURCE}_bucket"]
    case.row[f"{SOURCE}_bucket"] = 77
    assert "lies outside of -1 rows" in case.audit(place).leaks[0]


def test_an_honest_world_has_no_leak_and_counts_its_entries(world, tmp_path):
    report = Case(world, tmp_path).audit()
    assert report.leaks == ()
    lengths = sum(
        row[name]
        for path in sorted((world / "joined").glob("requests/*/*.parquet"))
        for row in pq.read_table(path, partitioning=None).to_pylist()
        for name in ("latent_len", f"{SOURCE}_len", "latent_by_user_item_len")
    )
    assert report.num_entries == lengths > 1000
    assert report.margin_s["min"] >= 0


def test_lost_columns_are_found(world, tmp_path):
    case = Case(world, tmp_path)
    for path in case._files():
        table = pq.read_table(path, partitioning=None)
        write_parquet(table.drop_columns([f"{SOURCE}_start"]), path)
    rewrite(case.joined)
    report = audit(case.joined, world / "latents", world / "prepared", sample=20)
    assert report.num_leaks == report.num_checked == 20
    assert f"has no columns of {SOURCE}" in report.leaks[0]


def test_categories_are_looked_up_again(tmp_path):
    """Over the whole path; with the items' categories changed afterwards, histories are those of another key."""
    chosen = JoinSettings(5, keys=(("kind",), ("user", "kind")))
    past = {"count_fields": ("item",), "max_len": 4}
    found = paths.walk(tmp_path, paths.random_rows(seed=4, num_rows=250), join=chosen, past=past)
    where = (found.joined, found.latents, found.prepared)
    assert audit(*where, sample=None).leaks == ()
    path = found.prepared / "items.parquet"
    table = pq.read_table(path)
    turned = np.roll(table.column("kind").to_numpy(), 1)
    at = table.column_names.index("kind")
    write_parquet(table.set_column(at, table.schema.field("kind"), pa.array(turned)), path)
    content = rewrite(found.prepared)
    rewrite(found.joined, inputs={**read_manifest(found.joined).inputs, "prepared": content})
    report = audit(*where, sample=None)
    assert report.num_leaks > 20
    assert all("latent_by_kind" in leak for leak in report.leaks)
