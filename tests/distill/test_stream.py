"""Streams: cut at the right moments, each row predicted before and learnt from once, and killed without a trace."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.config import validate
from loopfm_ray.data.batch import Batch
from loopfm_ray.data.split import make_splits
from loopfm_ray.distill.heads import AdapterConfig, AuxiliaryConfig, AuxiliaryVm
from loopfm_ray.distill.stream import (
    LabelBuffer,
    StreamConfig,
    StreamTask,
    StreamWindow,
    cut_chunks,
    run_stream,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.train.loop import Hooks, LoopConfig
from loopfm_ray.train.optim import OptimConfig, build_adapter_optimizer, build_optimizer
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import make_adapter_step, make_objective
from loopfm_ray.types import TimeRange
from tests.model_inputs import BARE_SCHEMA

WINDOW = StreamWindow(TimeRange(100, 195), 150, 10)
OPTIM = OptimConfig(lr=0.05, warmup_steps=3)


def make_rows(num=300, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    event_ts = np.sort(rng.integers(100, 195, num))
    event_ts[(event_ts >= 120) & (event_ts < 140)] = 119  # two chunks without rows
    return {
        "example_id": rng.permutation(num),
        "event_ts": event_ts,
        "label_ts": event_ts + rng.integers(0, longest, num),
        "user": rng.integers(0, 20, num),
        "item": rng.integers(1, 11, num),
        "label": (rng.random(num) < 0.3).astype(np.float32),
        "teacher_prob": rng.random(num).astype(np.float32),
    }


def take(rows, mask):
    return {name: values[mask] for name, values in rows.items()}


def blocks_of(rows, cuts):
    edges = sorted({0, len(rows["user"]), *cuts})
    return [take(rows, slice(a, b)) for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 300)), st.integers(0, 9), st.integers(0, 5))
def test_chunks_hold_the_rows_of_their_time(cuts, first, seed):
    rows = make_rows(seed=seed)
    rest = take(rows, rows["event_ts"] >= WINDOW.chunk(first).start_ts)
    found = list(cut_chunks(blocks_of(rest, cuts), WINDOW, first))
    assert len(found) == WINDOW.num_chunks - first == 10 - first
    for number, chunk in enumerate(found, first):
        span = WINDOW.chunk(number)
        inside = (rows["event_ts"] >= span.start_ts) & (rows["event_ts"] < span.stop_ts)
        assert list(chunk.get("example_id", [])) == list(rows["example_id"][inside])


@given(st.integers(0, 20), st.lists(st.integers(100, 260), min_size=1))
def test_a_row_waits_until_its_label_is_known_and_comes_out_once(seed, moments):
    rows, buffer = make_rows(60, seed), LabelBuffer()
    out = Counter()
    for number, now in enumerate(sorted(moments)):
        arrived = take(rows, np.arange(60) % len(moments) == number)
        buffer.add(arrived)
        known = buffer.release(now)
        if known:
            assert (known["label_ts"] <= now).all()
            pairs = list(zip(known["event_ts"], known["example_id"], strict=True))
            assert pairs == sorted(pairs)
            out.update(known["example_id"].tolist())
    last = buffer.release(1000)
    out.update(last.get("example_id", np.zeros(0)).tolist())
    assert out == Counter(range(60))


class Spy:
    """What a stream was given, in order."""

    def __init__(self):
        self.events = []
        self.kept = {}

    def collate(self, known_by_ts):
        def make(rows):
            item = np.where(rows["item"] <= known_by_ts // 10, rows["item"], 0)
            batch = Batch(
                ids=torch.from_numpy(item)[:, None],
                numeric=torch.zeros(len(item), 0),
                sequences={},
                histories={},
                label=torch.from_numpy(rows["label"])[:, None],
                teacher_prob=torch.from_numpy(rows["teacher_prob"]),
            )
            kind = "learn" if torch.is_grad_enabled() else "predict"
            self.events.append((kind, known_by_ts, rows["example_id"].tolist()))
            return batch

        return make

    def keep(self, number, rows, predicted):
        logit = predicted.logit
        assert len(logit) == len(rows["example_id"])
        if number in self.kept:
            assert np.array_equal(self.kept[number], logit)
        self.kept[number] = logit


class KilledError(Exception):
    pass


def start(spy, rows, kill_after=None, folder=None, auxiliary=True):
    """Run a stream from where `folder` holds it; die at a checkpoint."""
    torch.manual_seed(0)
    vm = build_vm(DnnConfig(embed_dim=3, hidden=(5,), dropout=0.2), BARE_SCHEMA)
    config = AuxiliaryConfig(hidden=(3,), adapter=AdapterConfig())
    model = AuxiliaryVm(vm, config) if auxiliary else vm
    adapter = build_adapter_optimizer(model)
    state = TrainState(model, build_optimizer(OPTIM, model), adapter_optimizer=adapter)
    if folder is not None and folder.exists():
        load_state(state, folder)
    left = [kill_after]

    def checkpoint(now):
        if left[0] == 0:
            raise KilledError
        if left[0] is not None:
            left[0] -= 1
        if folder is not None:
            save_state(now, folder)

    heads = model if auxiliary else None
    step = {} if adapter is None else {"before_step": make_adapter_step(model, adapter)}
    task = StreamTask(
        state=state,
        objective=make_objective(model, auxiliary=heads),
        window=WINDOW,
        loop=LoopConfig(batch_rows=16, optim=OPTIM, checkpoint_every=2),
        hooks=Hooks(on_checkpoint=checkpoint, **step),
        collate=spy.collate,
        keep=spy.keep,
        seed=3,
    )
    at_ts = WINDOW.chunk(state.counters.chunk).start_ts
    waiting = LabelBuffer()
    waiting.add(take(rows, (rows["event_ts"] < at_ts) & (rows["label_ts"] > at_ts)))
    run_stream(task, [take(rows, rows["event_ts"] >= at_ts)], waiting)
    return state


def test_every_row_is_predicted_first_and_learnt_from_once_its_label_is_known():
    rows, spy = make_rows(), Spy()
    start(spy, rows)
    at = {number: n for n, number in enumerate(rows["example_id"].tolist())}
    predicted, learnt, latest = Counter(), Counter(), 0
    starts = {known_by_ts for kind, known_by_ts, _ in spy.events if kind == "predict"}
    for kind, known_by_ts, ids in spy.events:
        for number in ids:
            event_ts, label_ts = rows["event_ts"][at[number]], rows["label_ts"][at[number]]
            assert known_by_ts == WINDOW.chunk(int(WINDOW.number(event_ts))).start_ts <= event_ts
            if kind == "predict":
                assert number not in learnt
                predicted[number] += 1
                latest = max(latest, known_by_ts)
            else:
                assert number in predicted
                assert label_ts <= min((start for start in starts if start > latest), default=195)
                assert label_ts > latest or event_ts >= latest
                learnt[number] += 1
    assert set(predicted.values()) == set(learnt.values()) == {1}
    assert set(predicted) == set(at)
    in_time = rows["label_ts"] <= 195
    assert set(learnt) == set(rows["example_id"][in_time].tolist())
    assert not in_time.all()


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("kills", [(0,), (3, 4, 1), (11, 2)])
def test_a_killed_stream_ends_in_the_same_bits(tmp_path, kills, auxiliary):
    rows, spy = make_rows(), Spy()
    whole = start(spy, rows, auxiliary=auxiliary)
    again = Spy()
    for kill_after in kills:
        with pytest.raises(KilledError):
            start(again, rows, kill_after, tmp_path / "state", auxiliary)
    resumed = start(again, rows, None, tmp_path / "state", auxiliary)
    assert resumed.counters.step == whole.counters.step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert again.kept.keys() == spy.kept.keys()
    assert all(np.array_equal(again.kept[n], spy.kept[n]) for n in spy.kept)


def test_times_outside_the_joined_set_are_refused():
    day = 86_400_000_000
    splits = make_splits((0, 99 * day), start_ts=None, fm_stop_ts=40 * day, vm_stop_ts=80 * day, test_stop_ts=None, valid_us=day)  # fmt: skip
    window = StreamConfig().window(splits)
    assert (window.whole, window.measure_from_ts) == (TimeRange(40 * day, 99 * day + 1), 80 * day)
    assert window.num_chunks == 60
    with pytest.raises(ConfigError, match="expected a stretch inside the VM and test windows"):
        StreamConfig(start=39 * day).window(splits)
    with pytest.raises(ConfigError, match=r"stream\.measure_from is 1970-03-02"):
        StreamConfig(measure_from=60 * day, stop=50 * day).window(splits)
    with pytest.raises(ConfigError, match="names become file names, found 'a/b'"):
        validate(StreamConfig, {"verticals": {"a/b": {}}}, "test")
