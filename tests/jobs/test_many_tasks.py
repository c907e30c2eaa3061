"""Two labels from the log to the VM: the FM predicts both, both predictions are stored and joined, both are distilled."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from loopfm_ray.data.config import TaskColumn
from loopfm_ray.data.examples import ExampleSet, read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.distill.heads import AdapterConfig, AuxiliaryConfig, AuxiliaryVm
from loopfm_ray.distill.stream import StreamWindow
from loopfm_ray.errors import DataError, LeakError
from loopfm_ray.experiments import LearningConfig, VmStageConfig
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs import materialize as job
from loopfm_ray.jobs.materialize import materialize
from loopfm_ray.jobs.streaming import StreamJob, _Stream, stream_one
from loopfm_ray.jobs.train_vm import trained_form
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.fitting import calibrate
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.registry import build_vm
from loopfm_ray.store.compact import compact
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.train.evaluate import (
    Predictions,
    binary_metrics,
    concat_predictions,
    task_metrics,
)
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, save_snapshot
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.serial import embed_here
from tests.serving import world

SPAN = TimeRange(world.FM_STOP, world.STOP)
FM = FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5))
SHAPE = BottleneckConfig(latent_dim=4, prefixes=(2, 4))


def with_amount(folder):
    """A log with a second label: whether more than 2.5 was paid."""
    config = world.write_log(folder, num_rows=1500)
    log = pq.read_table(folder / "log.parquet")
    amount = np.random.default_rng(4).exponential(2.0, log.num_rows)
    amount[log.column("label").to_numpy() == 0] = 0.0
    pq.write_table(log.append_column("amount", pa.array(amount)), folder / "log.parquet")
    tasks = {"large": TaskColumn(column="amount", above=2.5)}
    return config.model_copy(update={"columns": config.columns.model_copy(update={"tasks": tasks})})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a world up to its joined set."""
    root = tmp_path_factory.mktemp("tasks")
    prepare(with_amount(root), root / "prepared")
    schema = PreparedData.open(root / "prepared").schema_as_of(world.FM_STOP)
    torch.manual_seed(0)
    fm = build_fm(FM, schema, ())
    bottleneck = build_bottleneck(SHAPE, fm.embedding_dim(["hidden_0"]))
    code_spec = calibrate(bottleneck, torch.randn(50, fm.embedding_dim(["hidden_0"])), 4)
    spec = SnapshotSpec(world.FM_STOP - 1, schema, (), 5, FM, SHAPE, ("hidden_0",), code_spec)
    save_snapshot(Snapshot(fm.eval(), bottleneck.eval(), spec), root / "snapshot", inputs={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_run", embed_here)
        materialize(
            root / "prepared", root / "snapshot", root / "latents", delay_us=10, num_workers=1
        )
    where = (root / "prepared", root / "latents", root / "joined")
    write_joined(*where, SPAN, JoinSettings(world.MAX_LEN))
    return root


def requests_of(root, name="joined"):
    return read_rows(ExampleSet.open(root / name, "requests").files())


def test_both_labels_and_both_predictions_stand_beside_a_row(made):
    data = PreparedData.open(made / "prepared")
    assert data.schema.tasks == ("label", "large")
    rows = requests_of(made)
    assert set(rows["large"][rows["label"] == 0]) == {0.0}
    assert 0.1 < rows["large"][rows["label"] == 1].mean() < 0.6
    reader = LatentsReader(made / "latents")
    assert reader.tasks == ("large",)
    stored = {}
    for bucket in reader.buckets:
        table = reader.read_bucket(bucket).to_pydict()
        pairs = zip(table["fm_prob"], table["fm_prob_large"], strict=True)
        stored |= dict(zip(table["example_id"], pairs, strict=True))
    found = zip(rows["teacher_prob"].tolist(), rows["teacher_prob_large"].tolist(), strict=True)
    assert list(found) == [stored[number] for number in rows["example_id"].tolist()]
    assert not np.array_equal(rows["teacher_prob"], rows["teacher_prob_large"])


def test_compaction_keeps_the_predictions(made, tmp_path):
    reader = LatentsReader(made / "latents")
    before = [reader.read_bucket(bucket) for bucket in reader.buckets]
    content = reader.manifest.content
    assert compact(made / "latents").content == content
    reader = LatentsReader(made / "latents")
    after = [reader.read_bucket(bucket) for bucket in reader.buckets]
    for old, new in zip(before, after, strict=True):
        assert old.column_names == new.column_names
        for name in old.column_names:
            assert new.column(name).to_pylist() == old.column(name).to_pylist(), name


def test_the_audit_compares_every_prediction(made, tmp_path):
    where = (made / "latents", made / "prepared", made / "snapshot")
    assert audit(made / "joined", *where).num_leaks == 0
    file = max((made / "joined/requests").rglob("*.parquet"), key=lambda path: path.stat().st_size)
    honest = file.read_bytes()
    table = pq.read_table(file, partitioning=None)
    place = table.schema.get_field_index("teacher_prob_large")
    wrong = pa.array(1 - table.column(place).to_numpy(), pa.float32())
    pq.write_table(table.set_column(place, "teacher_prob_large", wrong), file)
    try:
        with pytest.raises(LeakError, match="teacher_prob_large is"):
            audit(made / "joined", *where).raise_if_leaking()
    finally:
        file.write_bytes(honest)


def test_a_vm_learns_both_labels_and_follows_both_predictions(made, tmp_path):
    config = VmStageConfig(
        model=DnnConfig(hidden=(8,)),
        learning=LearningConfig(batch_rows=32),
        auxiliary=AuxiliaryConfig(hidden=(4,), adapter=AdapterConfig()),
    )
    one = StreamJob(
        name="vm", vertical="all", where={}, prepared=made / "prepared", joined=made / "joined",
        out_dir=tmp_path / "vm", work=tmp_path / "work", predictions=tmp_path / "rows.parquet",
        config=config, window=StreamWindow(SPAN, world.VM_STOP, MICROS_PER_DAY), checkpoint_steps=50,
        fields=("item", "price", "device"), raw_max_len=5, seed=0, config_hash="c", inputs={},
    )  # fmt: skip
    stream = _Stream(one)
    assert stream.data.teacher_columns == ("teacher_prob", "teacher_prob_large")
    rows = next(stream.blocks(SPAN.start_ts, SPAN.stop_ts))
    batch = stream.collate(SPAN.stop_ts)(rows)
    assert batch.teacher_more.shape == (len(rows["item"]), 1)
    assert batch.teacher_more[:, 0].tolist() == rows["teacher_prob_large"].tolist()
    model = trained_form(build_vm(config.model, stream.schema), config, stream.data)
    assert isinstance(model, AuxiliaryVm)
    assert len(model.adapters) == model.head[-1].out_features == 2
    stream_one(one)
    trained = load_trained_vm(tmp_path / "vm")
    with torch.no_grad():
        prob = torch.sigmoid(trained.model(batch)).mean(0)
    # 0.4 of the rows are clicked, fewer are large
    assert prob[1] < prob[0] - 0.1
    kept = pq.read_table(tmp_path / "rows.parquet")
    large, found = trained.record["tasks"]["large"]["test"], trained.record["test"]
    is_test = kept.column("event_ts").to_numpy() >= world.VM_STOP
    label = kept.column("large").to_numpy()[is_test].astype(float)
    logit = kept.column("logit_large").to_numpy()[is_test].astype(float)
    logloss = np.mean(np.log1p(np.exp(-logit)) + (1 - label) * logit)
    base = label.mean()
    entropy = -base * np.log(base) - (1 - base) * np.log(1 - base)
    assert large["ne"] == pytest.approx(logloss / entropy, rel=1e-5)
    assert large["num_rows"] == found["num_rows"] == is_test.sum()
    assert trained.record["tasks"]["large"]["fm"]["ne"] > 0


def test_metrics_of_further_labels_are_theirs(made, tmp_path):
    rows = {"large": np.array([1.0, 0.0, 0.0, 1.0]), "label": np.array([1.0, 1.0, 0.0, 1.0])}
    user = np.array([1, 1, 2, 2])
    large = Predictions(np.array([2.0, -1.0, 0.5, 0.1]), rows["large"], user)
    first = Predictions(np.array([1.0, 1.0, 0.0, 1.0]), rows["label"], user, (large,))

    assert task_metrics(first, ("label", "large")) == {"large": binary_metrics(large)}
    assert concat_predictions([first, first]).further[0].logit.tolist() == 2 * large.logit.tolist()


def test_a_task_of_a_number_that_is_missing_names_the_cell(tmp_path):
    config = with_amount(tmp_path)
    log = pq.read_table(tmp_path / "log.parquet")
    values = log.column("amount").to_pylist()
    values[7] = None
    place = log.schema.get_field_index("amount")
    pq.write_table(log.set_column(place, "amount", pa.array(values)), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="column 'amount', row 7: the number is missing"):
        prepare(config, tmp_path / "prepared")
