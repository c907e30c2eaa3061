"""One VM on one vertical's stream, without a cluster: its rows, its files, and a kill in the middle."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from loopfm_ray.analysis.progressive import measure_stream
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.vertical import RowFilter
from loopfm_ray.distill.heads import AdapterConfig, AuxiliaryConfig
from loopfm_ray.distill.stream import StreamWindow
from loopfm_ray.errors import ConfigError, MetricError
from loopfm_ray.experiments import LearningConfig, VmStageConfig
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs import streaming
from loopfm_ray.jobs.streaming import StreamJob, stream_one
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.history_inputs import HistoryInputs, LatentHistoryConfig, RawHistoryConfig
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.serving.world import FIELDS, FM_STOP, MAX_LEN, STOP, VM_STOP, make_world

WINDOW = StreamWindow(TimeRange(FM_STOP + MICROS_PER_DAY, STOP), VM_STOP, MICROS_PER_DAY)
WHERE = {"category": ("c1", "c2", "c5")}
VM = VmStageConfig(
    model=DnnConfig(
        hidden=(8,),
        dropout=0.1,
        history=HistoryInputs.of(user=LatentHistoryConfig(), own=RawHistoryConfig()),
    ),
    learning=LearningConfig(batch_rows=16),
    auxiliary=AuxiliaryConfig(hidden=(4,), adapter=AdapterConfig()),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    span = TimeRange(FM_STOP + MICROS_PER_DAY, STOP)
    settings = JoinSettings(MAX_LEN, 25 * MICROS_PER_DAY)
    write_joined(world.prepared, world.latents, world.joined.parent / "longer", span, settings)
    return world


def job(made, folder, config=VM, where=WHERE, **more) -> StreamJob:
    settings = {
        "name": "vm", "vertical": "some", "where": where, "prepared": made.prepared,
        "joined": made.joined.parent / "longer", "out_dir": folder / "vm", "work": folder / "work",
        "predictions": folder / "rows.parquet", "config": config, "window": WINDOW,
        "checkpoint_steps": 3, "fields": FIELDS, "raw_max_len": 6, "seed": 1, "config_hash": "c",
        "inputs": {},
    }  # fmt: skip
    return StreamJob(**{**settings, **more})


def categories(made, item):
    prepared = PreparedData.open(made.prepared)
    keys = ["", *prepared.vocabulary("category").keys]
    return [keys[number] for number in prepared.items.ids["category"][item]]


def test_a_filter_keeps_the_rows_with_the_values(made):
    data = PreparedData.open(made.prepared)
    rows = read_rows(data.examples.files())
    kept = RowFilter(data, {"category": ["c1", "c3"], "device": ["d0"]})
    category, devices = categories(made, rows["item"]), ["", *data.vocabulary("device").keys]
    expected = [
        c in ("c1", "c3") and devices[d] == "d0"
        for c, d in zip(category, rows["device"], strict=True)
    ]
    assert kept(rows).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert set(kept.columns) == {"item", "device"}
    towns = ["", *data.vocabulary("city").keys]
    by_user = RowFilter(data, {"city": ["town3"]})
    assert by_user(rows).tolist() == [towns[n] == "town3" for n in data.users.ids["city"][rows["user"]]]  # fmt: skip
    assert RowFilter(data, {})(rows).all()
    with pytest.raises(ConfigError, match="told apart by 'shop': the log has the categorical"):
        RowFilter(data, {"shop": ["x"]})
    with pytest.raises(ConfigError, match=r"no category \['c9'\]; it has 7: 'c"):
        RowFilter(data, {"category": ["c9"]})
    with pytest.raises(ConfigError, match="none is given"):
        RowFilter(data, {"category": []})


def test_a_vertical_is_predicted_row_by_row_and_its_vm_is_kept(made, tmp_path):
    one = job(made, tmp_path)
    record = stream_one(one)
    table = pq.read_table(one.predictions)
    rows = {name: table.column(name).to_numpy() for name in table.column_names}
    joined = read_rows(
        streaming._Stream(one).data.requests.files(), WINDOW.whole,
        columns=["example_id", "item", "event_ts", "label", "teacher_prob"],
    )  # fmt: skip
    own = np.isin(categories(made, joined["item"]), WHERE["category"])
    assert rows["example_id"].tolist() == joined["example_id"][own].tolist()
    assert rows["teacher_prob"].tolist() == joined["teacher_prob"][own].tolist()
    assert len(set(rows["example_id"].tolist())) == own.sum() > 500
    assert record == measure_stream(rows, VM_STOP)
    is_test = rows["event_ts"] >= VM_STOP
    prob = 1 / (1 + np.exp(-rows["logit"].astype(np.float64)))
    assert record["test"]["num_rows"] == is_test.sum()
    assert record["test"]["calibration"] == pytest.approx(
        prob[is_test].mean() / rows["label"][is_test].mean(), rel=1e-5
    )
    assert record["fm"]["calibration"] == pytest.approx(
        rows["teacher_prob"][is_test].mean() / rows["label"][is_test].mean(), rel=1e-5
    )
    assert sum(chunk["num_rows"] for chunk in record["chunks"]) == len(rows["label"])
    trained = load_trained_vm(one.out_dir)
    plain = {name for name, _ in trained.model.named_parameters()}
    assert not any("adapt" in name or name.startswith("head.") for name in plain)
    assert trained.calibration.apply(np.array([0.3])) == pytest.approx(0.3)


def test_a_killed_stream_of_real_files_ends_in_the_same_bits(made, tmp_path, monkeypatch):
    whole = job(made, tmp_path / "whole")
    stream_one(whole)
    other = job(made, tmp_path / "killed")
    save, count = streaming.save_state, [0]

    def dying(state, folder):
        count[0] += 1
        if count[0] in (1, 9, 10, 40):
            raise KeyboardInterrupt
        save(state, folder)

    monkeypatch.setattr(streaming, "save_state", dying)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            stream_one(other)
    stream_one(other)
    ours, theirs = (load_trained_vm(one.out_dir).model.state_dict() for one in (other, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert pq.read_table(other.predictions).equals(pq.read_table(whole.predictions))


def test_an_item_that_nobody_had_met_is_unknown_on_its_first_day(made, tmp_path):
    stream = streaming._Stream(job(made, tmp_path))
    data = PreparedData.open(made.prepared)
    field = [f.name for f in stream.schema.categorical].index("item")
    first_ts = data.vocabulary("item").first_ts
    seen = 0
    for number in range(5, WINDOW.num_chunks, 7):
        span = WINDOW.chunk(number)
        for rows in stream.blocks(span.start_ts, span.stop_ts):
            before = stream.collate(span.start_ts)(rows).ids[:, field].numpy()
            after = stream.collate(span.stop_ts)(rows).ids[:, field].numpy()
            is_new = first_ts[rows["item"] - 1] >= span.start_ts
            assert (before[is_new] == 0).all()
            assert (before[~is_new] == rows["item"][~is_new]).all()
            assert (after == rows["item"]).all()
            seen += is_new.sum()
    assert seen > 0


def test_a_vertical_without_rows_and_one_of_one_label_are_told(made, tmp_path):
    window = replace(WINDOW, whole=TimeRange(STOP - 2, STOP), measure_from_ts=STOP - 1)
    with pytest.raises(ConfigError, match="VM 'vm' of vertical 'some', seed 1: the vertical has"):
        stream_one(job(made, tmp_path / "none", window=window))
    rows = {name: np.zeros(3) for name in ("event_ts", "user", "label", "logit", "chunk")}
    rows["teacher_prob"] = np.full(3, 0.5)
    with pytest.raises(MetricError):
        measure_stream(rows, 0)
    with pytest.raises(MetricError, match="no rows to measure"):
        measure_stream(rows, 1)
