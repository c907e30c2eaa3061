"""What a VM's config asks for is read from the joined set, or named as missing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import ConfigError, SchemaError
from loopfm_ray.experiments import FitNetsConfig, LearningConfig, VmStageConfig
from loopfm_ray.history.join import JoinSettings, StoredSide, write_joined
from loopfm_ray.jobs.train_vm import _worker, trained_form
from loopfm_ray.jobs.training import Worker
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.histories import PoolConfig
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    LatentHistoryConfig,
    RawHistoryConfig,
    SideConfig,
)
from loopfm_ray.models.registry import build_vm
from loopfm_ray.store.codes import decode, encode
from loopfm_ray.train.step import make_objective
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.serving.world import CODE, FIELDS, MAX_LEN, STOP, VM_STOP, make_world

ITEM_SOURCE = "latent_by_item"


RICH = JoinSettings(
    MAX_LEN,
    25 * MICROS_PER_DAY,
    with_own_latent=True,
    side=StoredSide(label="label", event_type="device"),
    keys=(("item",), ("user", "category")),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder)
    where = (world.prepared, world.latents, folder / "richer")
    write_joined(*where, TimeRange(VM_STOP, STOP), RICH)
    return world


def job(made, joined, config):
    window = TimeRange(VM_STOP, STOP)
    splits = Splits(*[window] * 7)
    return VmJob(
        "vm", made.prepared, joined, made.bundle, config, splits, FIELDS, 6, 0, "c", {}
    )  # fmt: skip


def data_of(made, config, is_rich=True):
    joined = made.joined.parent / "richer" if is_rich else made.joined
    return VmData.open(job(made, joined, config))


EVERYTHING = VmStageConfig(
    model=DnnConfig(
        hidden=(8,),
        reads_teacher_latent=True,
        history=HistoryInputs.of(
            user=LatentHistoryConfig(side=SideConfig(label=True, num_event_types=4)),
            within=LatentHistoryConfig(key=("user", "category")),
            item=LatentHistoryConfig(key=("item",), encoder=PoolConfig(), in_query=True),
            own=RawHistoryConfig(),
        ),
    ),
    kd_weight=1.0,
    fitnets=FitNetsConfig(weight=2.0),
)


def test_all_inputs_at_once_are_read_and_trained_on(made):
    data = data_of(made, EVERYTHING)
    collate = data.collator(range(PreparedData.open(made.prepared).num_buckets))
    columns = [*collate.columns, "teacher_prob", "example_id"]
    rows = read_rows(data.requests.files(), columns=columns)
    rows = {name: values[:300] for name, values in rows.items()}
    batch = collate(rows)
    assert set(batch.histories) == {"latent", ITEM_SOURCE, "latent_by_user_category", "raw"}
    # what the snapshot said of the row itself
    latents = np.random.default_rng(7).normal(0, 0.5, (10_000, CODE.dim))[rows["example_id"]]
    own = decode(encode(latents.astype(np.float32), CODE), CODE)
    np.testing.assert_array_equal(batch.teacher_latent.numpy(), own)
    user, item = batch.histories["latent"], batch.histories[ITEM_SOURCE]
    # of positives the log tells the label, and they are not there before
    assert set(user.label[user.mask].tolist()) == {2}
    assert len(user.event_type[user.mask].unique()) > 3
    assert (item.label, batch.histories["raw"].label) == (None, None)
    assert item.mask.sum(1)[item.row].tolist() == rows[f"{ITEM_SOURCE}_len"].tolist()
    assert rows[f"{ITEM_SOURCE}_len"].max() > 5

    torch.manual_seed(0)
    model = build_vm(EVERYTHING.model, data.schema, data.item_fields, data.latent_dim)
    trained = trained_form(model, EVERYTHING, data)
    objective = make_objective(trained, kd_weight=1.0, hint_weight=2.0)
    optimizer, losses = torch.optim.Adam(trained.parameters(), lr=0.01), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(batch).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not any("regressor" in name for name in model.state_dict())


def test_a_vm_that_reads_everything_is_trained_by_the_workers_program(made, tmp_path, monkeypatch):
    """The whole program of a worker, without Ray around it."""
    reports = []
    monkeypatch.setattr(Worker, "current", classmethod(lambda cls: cls(0, 1)))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    monkeypatch.setattr("ray.train.report", lambda metrics, **_: reports.append(metrics))
    learning = LearningConfig(epochs=2, batch_rows=128)
    config = EVERYTHING.model_copy(update={"learning": learning})
    joined = made.joined.parent / "richer"
    one = replace(job(made, joined, config), out_dir=tmp_path / "vm")
    _worker({"jobs": (one,)})
    assert reports[-1] == {"finished": 1}
    trained = load_trained_vm(tmp_path / "vm")
    assert set(trained.config.history.sources) == {
        "latent", ITEM_SOURCE, "latent_by_user_category", "raw",
    }  # fmt: skip
    assert trained.record["valid"]["ne"] < 1.1
    assert trained.record["valid"]["auc"] > 0.5


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            VmStageConfig(
                model=DnnConfig(history=HistoryInputs.of(it=LatentHistoryConfig(key=("item",))))
            ),
            ConfigError,
            r"'latent_by_item', the joined set .* has \['latent'\]",
        ),
        (VmStageConfig(fitnets=FitNetsConfig()), ConfigError, "teacher_code"),
        (
            VmStageConfig(
                model=DnnConfig(
                    history=HistoryInputs.of(u=LatentHistoryConfig(side=SideConfig(label=True)))
                )
            ),
            SchemaError,
            "no columns .*label",
        ),
    ],
)
def test_what_the_joined_set_lacks_is_named(made, config, error, message):
    with pytest.raises(error, match=message):
        data_of(made, config, is_rich=False).collator([0, 1])


def test_a_plain_vm_reads_no_history(made):
    data = data_of(made, VmStageConfig(), is_rich=False)
    assert (data.item_fields, data.latent_dim) == ((), None)
    assert "latent_start" not in data.collator([0]).columns
    plain = build_vm(DnnConfig(), data.schema)
    assert trained_form(plain, VmStageConfig(), data) is plain
    hinted = replace(data, needs_teacher_latent=True)
    assert hinted.latent_dim == CODE.dim
