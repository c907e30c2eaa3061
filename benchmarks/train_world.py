"""What `train_vm.py` and `train_fm.py` train on, made by the library's own steps, and the same rows for FuxiCTR.

VMs read categorical fields alone, because FuxiCTR embeds numbers and ours does not, and the user's newest items as ids.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from materialize_loops import ours as materialize
from materialize_world import data_config, write_world

from loopfm_ray.config import config_hash, load_config, validate
from loopfm_ray.data.collate import Batch
from loopfm_ray.data.config import DataConfig
from loopfm_ray.data.examples import ExampleSet, Rows, read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Kind
from loopfm_ray.data.split import Splits
from loopfm_ray.data.windows import keep_learnable
from loopfm_ray.experiments import LearningConfig, PipelineConfig, VmStageConfig
from loopfm_ray.history.join import write_joined
from loopfm_ray.history.settings import JoinSettings
from loopfm_ray.jobs.train_fm import FmSettings, FmTraining
from loopfm_ray.jobs.training import file_blocks
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.types import TimeRange

Record = dict[str, Any]  # Any: JSON
KINDS = ("dcnv2", "din")
CROSS_LAYERS, DCN_HIDDEN = 2, (128, 64)
DIN_HIDDEN, UNIT_HIDDEN = (200, 80), (36,)
FM_CONFIG = Path(__file__).resolve().parents[1] / "configs/pipeline/complete_journey.yaml"
PARTS = ("train", "valid", "test")
_FILE_ROWS = 32_768


def write_joined_world(sizes: Record) -> None:
    """Write the prepared version, a snapshot with random weights, its latents and the joined set."""
    folder = Path(sizes["folder"])
    write_world(folder, sizes["data"], sizes["log_rows"], sizes["users"])
    materialize(folder / "prepared", folder / "snapshot", folder / "latents")
    splits = log_splits(sizes)
    write_joined(
        folder / "prepared",
        folder / "latents",
        folder / "joined",
        TimeRange(splits.vm.start_ts, splits.test.stop_ts),
        JoinSettings(sizes["max_len"]),
    )


def log_config(sizes: Record) -> DataConfig:
    """Return the config of the log."""
    return data_config(sizes["data"], sizes["log_rows"], sizes["users"])


def log_splits(sizes: Record) -> Splits:
    """Return the windows of the prepared log."""
    data = PreparedData.open(Path(sizes["folder"]) / "prepared")
    return log_config(sizes).split.ranges(*data.log_range)


def write_prepared(sizes: Record) -> Record:
    """Write the prepared version alone."""
    manifest = prepare(log_config(sizes), Path(sizes["folder"]) / "prepared")
    return {"num_rows": manifest.num_rows}


def model_tree(kind: str, embed_dim: int) -> Record:
    """Return the config of a VM that has the layers of FuxiCTR's of that name."""
    if kind == "dcnv2":
        tower: Record = {"structure": "parallel", "cross_layers": CROSS_LAYERS}
        tower["hidden"], encoder = DCN_HIDDEN, {"kind": "mean"}
    else:
        tower = {"activation": "prelu", "hidden": DIN_HIDDEN}
        encoder = {
            "kind": "din",
            "hidden": UNIT_HIDDEN,
            "activation": "prelu",
            "has_softmax": True,
        }
    history = {"user": {"kind": "raw", "encoder": encoder}}
    return {"kind": kind, "embed_dim": embed_dim, **tower, "history": history}


def learning_tree(sizes: Record) -> Record:
    """Return a constant learning rate, and one validation after each epoch."""
    return {
        "epochs": sizes["epochs"],
        "batch_rows": sizes["batch"],
        "num_workers": sizes["workers"],
        "evals_per_epoch": 1,
        "optim": {"lr": sizes["lr"], "warmup_steps": 0, "decay_share": 0.0},
    }


def vm_job(out_dir: Path, sizes: Record) -> VmJob:
    """Return a training of one VM, which keeps the best weights of its epochs."""
    folder, kind, config = Path(sizes["folder"]), sizes["kind"], log_config(sizes)
    data = PreparedData.open(folder / "prepared")
    learning = {**learning_tree(sizes), "patience": sizes["epochs"]}
    tree = {"model": model_tree(kind, sizes["embed_dim"]), "learning": learning}
    stage = validate(VmStageConfig, tree, "benchmark")
    return VmJob(
        name=kind,
        prepared=folder / "prepared",
        joined=folder / "joined",
        out_dir=out_dir,
        config=stage,
        splits=vm_splits(sizes),
        fields=tuple(field.name for field in config.vm_schema(data.schema).of(Kind.CATEGORICAL)),
        raw_max_len=sizes["max_len"],
        seed=sizes["seed"],
        config_hash=config_hash(stage, sizes["seed"]),
        inputs={"prepared": data.manifest.version},
    )


def fm_training(out_dir: Path, sizes: Record) -> tuple[Path, FmTraining]:
    """Return the prepared version, and a training of the FM of `configs/pipeline/complete_journey.yaml`."""
    prepared, config = Path(sizes["folder"]) / "prepared", log_config(sizes)
    stage = load_config(PipelineConfig, FM_CONFIG).fm
    learning = validate(LearningConfig, learning_tree(sizes), "benchmark")
    stage = stage.model_copy(update={"learning": learning})
    splits = log_splits(sizes)
    start_ts = _nth_time(PreparedData.open(prepared).examples, splits.fm_train, -sizes["rows"])
    settings = FmSettings(
        config=stage,
        splits=replace(
            splits,
            fm=TimeRange(start_ts, splits.fm.stop_ts),
            fm_train=TimeRange(start_ts, splits.fm_train.stop_ts),
        ),
        raw_max_len=config.past.max_len,
        seed=sizes["seed"],
        config_hash=config_hash(stage, sizes["seed"]),
    )
    return prepared, FmTraining(out_dir, settings)


def vm_splits(sizes: Record) -> Splits:
    """Return the windows with about the newest `rows` training rows and the oldest `test_rows` test rows."""
    requests = ExampleSet.open(Path(sizes["folder"]) / "joined", "requests")
    splits = log_splits(sizes)
    start_ts = _nth_time(requests, splits.vm_train, -sizes["rows"])
    stop_ts = _nth_time(requests, splits.test, sizes["test_rows"] - 1) + 1
    return replace(
        splits,
        vm=TimeRange(start_ts, splits.vm.stop_ts),
        vm_train=TimeRange(start_ts, splits.vm_train.stop_ts),
        test=TimeRange(splits.test.start_ts, stop_ts),
    )


def _nth_time(examples: ExampleSet, window: TimeRange, place: int) -> int:
    """Return the time of a row of a window, counted from its first (from 0) or last (from -1); the outermost if there are fewer."""
    times = read_rows(examples.files(window), window, columns=["event_ts"])["event_ts"]
    return int(times[max(place, -len(times)) if place < 0 else min(place, len(times) - 1)])


@dataclass(frozen=True)
class Columns:
    """The columns that FuxiCTR reads, by what they are."""

    plain: dict[str, int]
    """Field -> ids, without those of the item."""
    item: dict[str, int]
    """Item-side field -> ids; the history has a sequence of each."""
    max_len: int

    def tree(self) -> Record:
        """Return the feature map of FuxiCTR; histories share the tables of the item's fields."""
        spec = {"type": "categorical", "padding_idx": 0}
        shared = {
            "type": "sequence",
            "source": "past",
            "max_len": self.max_len,
            "emb_output_dim": 0,
        }
        features: list[Record] = [
            {name: {**spec, "source": "", "vocab_size": size}} for name, size in self.plain.items()
        ]
        features += [
            {name: {**spec, "source": "item", "vocab_size": size}}
            for name, size in self.item.items()
        ]
        features += [
            {f"past_{name}": {**shared, "share_embedding": name, "vocab_size": size}}
            for name, size in self.item.items()
        ]
        return {"dataset_id": "benchmark", "labels": ["label"], "features": features}


def column(field: str) -> str:
    """Return what FuxiCTR's column of a field is called: some names, such as `type`, it can not have."""
    return f"field_{field}"


def write_export(sizes: Record) -> Record:
    """Write the rows of all windows as FuxiCTR reads them: one .npz each, and the training rows as Parquet in some files."""
    folder = Path(sizes["folder"]) / "fuxictr"
    job = vm_job(folder / "none", {**sizes, "kind": KINDS[0]})
    data, num_rows = VmData.open(job), {}
    ids = {column(field.name): field.cardinality for field in data.schema.categorical}
    item = {name: ids[name] for name in map(column, data.item_fields)}
    plain = {name: size for name, size in ids.items() if name not in item}
    columns = Columns(plain, item, job.raw_max_len)
    folder.mkdir(parents=True)
    (folder / "feature_map.json").write_text(json.dumps(columns.tree()), encoding="utf-8")
    windows = (job.splits.vm_train, job.splits.vm_valid, job.splits.test)
    for part, window in zip(PARTS, windows, strict=True):
        parts = list(_parts(job, data, window, is_learnt=part == "train"))
        arrays = {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
        np.savez(folder / f"{part}.npz", **arrays)
        num_rows[f"{part}_rows"] = len(arrays["label"])
        if part == "train":
            _write_parquet(arrays, folder / part)
    return {**num_rows, "fields": len(ids), "item_fields": len(item)}


def _parts(
    job: VmJob, data: VmData, window: TimeRange, is_learnt: bool
) -> Iterator[dict[str, np.ndarray]]:
    collate = data.collator(range(data.prepared.num_buckets))
    columns = list(dict.fromkeys([*collate.columns, "example_id", "label_ts"]))
    blocks: Iterator[Rows] = file_blocks(data.requests.files(window), window, columns)
    if is_learnt:
        blocks = keep_learnable(blocks, data.prepared.learnable(window, job.splits.vm.stop_ts))
    for rows in blocks:
        yield flat(collate(rows), data, job.raw_max_len)


def flat(batch: Batch, data: VmData, max_len: int) -> dict[str, np.ndarray]:
    """Return the columns of a batch, a history for every row, padded with 0 to `max_len`."""
    ids = batch.ids.numpy().astype(np.int32)
    names = [column(field.name) for field in data.schema.categorical]
    out = {name: ids[:, place] for place, name in enumerate(names)}
    history = batch.histories["raw"]
    if history.item_ids is None:
        raise AssertionError("a raw history has item ids")
    past = np.zeros((len(ids), max_len, len(data.item_fields)), dtype=np.int32)
    found = history.item_ids.numpy()
    past[:, : found.shape[1]] = found[history.row.numpy()]
    items = map(column, data.item_fields)
    out |= {f"past_{name}": past[..., place] for place, name in enumerate(items)}
    out["label"] = batch.label[:, 0].numpy().astype(np.int32)
    return out


def _write_parquet(arrays: dict[str, np.ndarray], folder: Path) -> None:
    folder.mkdir()
    for number, begin in enumerate(range(0, len(arrays["label"]), _FILE_ROWS)):
        table = {
            name: pa.array(list(part)) if part.ndim == 2 else pa.array(part)
            for name, part in ((n, v[begin : begin + _FILE_ROWS]) for n, v in arrays.items())
        }
        pq.write_table(pa.table(table), folder / f"part-{number:04d}.parquet")
