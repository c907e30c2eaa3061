"""What a VM's config asks for is read from the joined set, or named as missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import ConfigError, SchemaError
from loopfm_ray.experiments import FitNetsConfig, VmStageConfig
from loopfm_ray.jobs.train_vm import VmData, VmJob, _trained_form
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.histories import PoolConfig
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    LatentHistoryConfig,
    RawHistoryConfig,
    SideConfig,
)
from loopfm_ray.models.registry import build_vm
from loopfm_ray.store.manifest import commit, read_manifest, stage
from loopfm_ray.store.tables import map_ipc, read_parquet, write_ipc, write_parquet
from loopfm_ray.train.step import make_objective
from loopfm_ray.types import TimeRange
from tests.serving.world import CODE, FIELDS, STOP, VM_STOP, make_world

ITEM_SOURCE = "latent_by_item"


def richer(joined: Path, target: Path) -> None:
    """Write the joined set again with labels of events, the rows' own codes, and histories by item."""
    rng = np.random.default_rng(0)
    with stage(target) as staged:
        for path in sorted(joined.rglob("*.arrow")):
            table = map_ipc(path)
            label = pa.array(rng.integers(0, 2, table.num_rows).astype(np.float32))
            table = table.append_column("label", label)
            table = table.append_column("label_ts", table.column("event_ts"))
            write_ipc(table, staged / path.relative_to(joined))
            if path.stem == "bucket=000":
                write_ipc(table, staged / "history" / ITEM_SOURCE / "bucket=000.arrow")
        for path in sorted(joined.rglob("*.parquet")):
            table = read_parquet(path)
            num = table.num_rows
            own = rng.integers(0, 256, (num, CODE.num_bytes), np.uint8)
            codes = pa.array([row.tobytes() for row in own], pa.binary(CODE.num_bytes))
            table = table.append_column("teacher_code", codes)
            for name, values in {"bucket": 0, "start": 1, "len": 2}.items():
                column = pa.array(np.full(num, values, np.int64))
                table = table.append_column(f"{ITEM_SOURCE}_{name}", column)
            write_parquet(table, staged / path.relative_to(joined))
        manifest = read_manifest(joined)
        meta = {**manifest.meta, "histories": {ITEM_SOURCE: {"key": ["item"], "max_len": 5}}}
        commit(staged, kind="joined", config_hash="c" * 16, inputs={}, meta=meta, num_rows=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder)
    richer(world.joined, folder / "richer")
    return world


def job(made, joined, config):
    window = TimeRange(VM_STOP, STOP)
    splits = Splits(*[window] * 7)
    return VmJob(
        "vm", made.prepared, joined, made.bundle, made.bundle, made.bundle,
        config, splits, FIELDS, 6, 0, "c", {}
    )  # fmt: skip


def data_of(made, config, is_rich=True):
    joined = made.joined.parent / "richer" if is_rich else made.joined
    return VmData.open(job(made, joined, config))


EVERYTHING = VmStageConfig(
    model=DnnConfig(
        hidden=(8,),
        reads_teacher_latent=True,
        history=HistoryInputs.of(
            user=LatentHistoryConfig(side=SideConfig(label=True)),
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
    rows = read_rows(data.requests.files(), columns=[*collate.columns, "teacher_prob"])
    rows = {name: values[:300] for name, values in rows.items()}
    batch = collate(rows)
    assert set(batch.histories) == {"latent", ITEM_SOURCE, "raw"}
    assert batch.teacher_latent.shape == (300, CODE.dim)
    user, item = batch.histories["latent"], batch.histories[ITEM_SOURCE]
    assert set(user.label[user.mask].tolist()) == {1, 2}
    assert (item.label, batch.histories["raw"].label) == (None, None)
    assert item.mask.sum(1).unique().tolist() == [2]

    torch.manual_seed(0)
    model = build_vm(EVERYTHING.model, data.schema, data.item_fields, data.latent_dim)
    trained = _trained_form(model, EVERYTHING, data)
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
    assert _trained_form(plain, VmStageConfig(), data) is plain
    hinted = replace(data, needs_teacher_latent=True)
    assert hinted.latent_dim == CODE.dim
