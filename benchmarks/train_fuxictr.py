"""FuxiCTR's side of `train_vm.py`: DCNv2 and DIN of its wheel, its training loop and its readers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.dataloaders.parquet_dataloader import ParquetDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from model_zoo.LongCTR.DCNv2 import DCNv2
from model_zoo.LongCTR.DIN import DIN
from torch import Tensor
from train_clock import EpochClock
from train_world import CROSS_LAYERS, DCN_HIDDEN, DIN_HIDDEN, UNIT_HIDDEN

Record = dict[str, Any]  # Any: JSON
LOADERS = ("npz", "npz_worker", "parquet")


class _Watched:
    """Mixed into a model: it takes rows of equal columns, and tells a clock when an epoch begins and ends.

    The models of the wheel want a history and its candidate one after another; their own reader of such rows looks each
    item up in a pandas table, and is slower than any of `LOADERS`.
    """

    clock: EpochClock
    feature_map: FeatureMap

    def get_inputs(self, inputs: dict[str, Tensor], feature_source: Any = None) -> Any:
        """Return the plain fields, items of history and candidate [B * (L + 1)], and the mask [B, L]."""
        del feature_source
        specs = self.feature_map.features
        items = [name for name, spec in specs.items() if spec["source"] == "item"]
        plain = {name: inputs[name] for name, spec in specs.items() if spec["source"] == ""}
        rows = {n: torch.cat([inputs[f"past_{n}"], inputs[n][:, None]], 1) for n in items}
        mask = (inputs[f"past_{items[0]}"] > 0).float()
        return plain, {name: of.flatten() for name, of in rows.items()}, mask

    def get_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return [B, 1]."""
        return inputs["label"].float().view(-1, 1)

    def train_epoch(self, data_generator: Any) -> None:
        """Train for an epoch."""
        self.clock.begin()
        super().train_epoch(data_generator)  # type: ignore[misc]  # the model's

    def eval_step(self) -> None:
        """Validate after an epoch."""
        self.clock.end()
        super().eval_step()  # type: ignore[misc]  # the model's


class WatchedDcnV2(_Watched, DCNv2):
    """DCNv2 on flat rows."""


class WatchedDin(_Watched, DIN):
    """DIN on flat rows."""


def read_features(folder: Path, embed_dim: int) -> FeatureMap:
    """Return the feature map that `train_world.export` wrote."""
    features = FeatureMap("benchmark", str(folder))
    features.load(str(folder / "feature_map.json"), {"embedding_dim": embed_dim})
    return features


def make_model(features: FeatureMap, sizes: Record, folder: Path) -> Any:
    """Return FuxiCTR's model with the layers of ours."""
    shared = {
        "feature_map": features,
        "learning_rate": sizes["lr"],
        "embedding_dim": sizes["embed_dim"],
        "optimizer": "adam",
        "loss": "binary_crossentropy",
        "metrics": ["AUC"],
        "early_stop_patience": sizes["epochs"],
        "reduce_lr_on_plateau": False,
        "verbose": 0,
        "model_root": str(folder),
    }
    if sizes["kind"] == "dcnv2":
        return WatchedDcnV2(
            model_structure="parallel",
            num_cross_layers=CROSS_LAYERS,
            parallel_dnn_hidden_units=list(DCN_HIDDEN),
            **shared,
        )
    return WatchedDin(
        dnn_hidden_units=list(DIN_HIDDEN),
        dnn_activations="prelu",
        attention_hidden_units=list(UNIT_HIDDEN),
        attention_hidden_activations="prelu",
        din_use_softmax=True,
        **shared,
    )


def make_loader(loader: str, features: FeatureMap, folder: Path, batch: int) -> Any:
    """Return a reader of the training rows; `npz_worker` is `npz` with a process that reads ahead, FuxiCTR's default."""
    if loader == "parquet":
        return ParquetDataLoader(features, str(folder / "train"), batch_size=batch, shuffle=True)
    num_workers = int(loader == "npz_worker")
    return _npz(features, folder, "train", batch, num_workers=num_workers, shuffle=True)


def _npz(features: FeatureMap, folder: Path, part: str, batch: int, **options: Any) -> Any:
    options = {"num_workers": 0, "shuffle": False, **options}
    return NpzDataLoader(features, str(folder / f"{part}.npz"), batch_size=batch, **options)


def train(loader: str, folder: Path, work: Path, sizes: Record) -> Record:
    """Train, and return what the epochs took, the parameters, and predictions and labels of the test rows."""
    seed_everything(sizes["seed"])
    features = read_features(folder, sizes["embed_dim"])
    (work / "benchmark").mkdir(parents=True)
    model = make_model(features, sizes, work)
    model.clock = clock = EpochClock()
    batch = sizes["batch"]
    rows = make_loader(loader, features, folder, batch)
    model.fit(rows, epochs=sizes["epochs"], validation_data=_npz(features, folder, "valid", 4096))
    test = _npz(features, folder, "test", 4096)
    return {
        **clock.spans(),
        "num_rows": rows.num_samples,
        "num_parameters": sum(value.numel() for value in model.parameters()),
        "prob": model.predict(test),
        "label": np.load(folder / "test.npz")["label"],
    }
