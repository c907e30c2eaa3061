"""The vectors of a trained graph embedding as a dataset version, and back.

| file | holds |
| --- | --- |
| `embeddings.safetensors` | every parameter and buffer of the model: `entity` [E, D], those of the relations, biases |
| `entities.parquet` | `entity`, `embedding` (fixed-size list of D float32), in order of ids; complex vectors are real parts, then imaginary parts |
| `model.json` | the backbone's config, names of relations, sizes, digest of the graph, how it was trained and what it scored |

The manifest is written last; a version appears at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loopfm_ray.config import config_hash
from loopfm_ray.errors import StoreError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.digest import graph_digest
from loopfm_ray.kge.models import AnyKgeConfig, build_kge, read_kge_config
from loopfm_ray.kge.training import KgeTrainConfig, TrainedKge
from loopfm_ray.kge.triples import TripleSet
from loopfm_ray.store.manifest import Manifest, commit, read_manifest, stage, verify
from loopfm_ray.store.tables import write_parquet, write_text

__all__ = ["KgeEmbeddings", "export_kge", "load_kge"]

_KIND = "kge"
_FORMAT_VERSION = 1
_WEIGHTS, _ENTITIES, _MODEL = "embeddings.safetensors", "entities.parquet", "model.json"


@dataclass(frozen=True, eq=False)
class KgeEmbeddings:
    """What `export_kge` wrote, read back."""

    version: str
    """Of the dataset version."""
    entities: tuple[str, ...]
    """[E] names, in order of ids."""
    relations: tuple[str, ...]
    """[R] names, in order of ids, without reciprocal ones."""
    vectors: NDArray[np.float32]
    """[E, D] one row an entity; of those without a training triple it is what the training began with."""
    num_train_entities: int
    """Entities with a training triple; their ids are 0 up to here."""
    backbone: AnyKgeConfig
    """Config of the model."""
    model: KgeModel
    """With the weights of the best validation MRR, in evaluation."""
    graph: str
    """`graph_digest` of the graph."""
    metrics: Mapping[str, float]
    """What the model scored."""


def export_kge(
    trained: TrainedKge,
    graph: TripleSet,
    backbone: AnyKgeConfig,
    config: KgeTrainConfig,
    directory: Path,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Write the vectors of a trained model as the version `directory`, in place of another one there.

    Args:
        trained: from `train_kge`.
        graph: that it was trained on.
        backbone: of the model.
        config: of the training.
        directory: of the version.
        metrics: beside `valid_mrr`, `best_epoch` and `num_epochs`, such as those of the test triples.

    Raises:
        StoreError: the disk is full, or `directory` holds something that is no version.
    """
    model = trained.model
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    digest = graph_digest(graph)
    record = {
        "format_version": _FORMAT_VERSION,
        "backbone": backbone.model_dump(mode="json"),
        "train": config.learnt,
        "dimension": model.dimension,
        "num_entities": graph.num_entities,
        "num_train_entities": graph.num_train_entities,
        "relations": list(graph.relations),
        "graph": digest,
        "metrics": {
            "valid_mrr": trained.best_mrr,
            "best_epoch": trained.best_epoch,
            "num_epochs": trained.num_epochs,
            **(metrics or {}),
        },
    }
    values = pa.array(weights["entity"].numpy().ravel(), pa.float32())
    table = pa.table(
        {
            "entity": pa.array(graph.entities, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, model.dimension),
        }
    )
    with stage(directory) as staged:
        save_file(weights, staged / _WEIGHTS)
        write_parquet(table, staged / _ENTITIES)
        write_text(staged / _MODEL, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return commit(
            staged,
            kind=_KIND,
            config_hash=config_hash(backbone, config.learnt),
            inputs={"graph": digest},
            meta={"backbone": backbone.kind, "dimension": model.dimension},
            num_rows=graph.num_entities,
            replace_other=True,
        )


def load_kge(directory: Path) -> KgeEmbeddings:
    """Read what `export_kge` wrote, every file checked against the manifest.

    Raises:
        StoreError: there is no such version, it is of another kind or format, or a file is damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.kind != _KIND:
        raise StoreError(
            f"{directory} is a version of kind {manifest.kind!r}, expected {_KIND!r}; give a folder of `loopfm export-kge`"
        )
    verify(directory)
    record = json.loads((directory / _MODEL).read_text(encoding="utf-8"))
    if record["format_version"] != _FORMAT_VERSION:
        raise StoreError(
            f"{directory} has format_version {record['format_version']}, this code reads {_FORMAT_VERSION}; export it again"
        )
    table = pq.read_table(directory / _ENTITIES)
    values = table["embedding"].combine_chunks().flatten().to_numpy()
    backbone = read_kge_config(record["backbone"])
    return KgeEmbeddings(
        version=manifest.version,
        entities=tuple(table["entity"].to_pylist()),
        relations=tuple(record["relations"]),
        vectors=values.reshape(-1, record["dimension"]),
        num_train_entities=record["num_train_entities"],
        backbone=backbone,
        model=_model(directory, backbone, record),
        graph=record["graph"],
        metrics=record["metrics"],
    )


def _model(directory: Path, backbone: AnyKgeConfig, record: dict[str, Any]) -> KgeModel:
    with torch.random.fork_rng(devices=[]):
        model = build_kge(backbone, record["num_entities"], len(record["relations"]))
    try:
        model.load_state_dict(load_file(directory / _WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise StoreError(
            f"{directory / _WEIGHTS} does not fit the backbone of {_MODEL} ({error}); it was written by other code, export it"
            " again"
        ) from error
    return model.eval()
