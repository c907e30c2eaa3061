"""The bundle: all that serving loads for one VM, as one dataset version with checksums and no code in it.

`model.safetensors` (weights), `bundle.json` (what they mean and which history they were trained with), `vocab/*.parquet`,
`items.parquet` and `users.parquet` (row i = id i), `reference.json` (how scores were distributed before serving), and, if asked
for, the same model as `model.onnx`, or with 8-bit weights as `model_int8.onnx`. A bundle pins the embedding space that its VM was trained in:
`serving/predictor.py` takes any published version of that space and refuses all others.

Vocabularies are cut to the ids that the VM knows. Only the items and users whose own fields the VM reads are kept whole:
one that came after training has no embedding of its own, yet its price and category count, offline and online alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loopfm_ray.config import config_hash
from loopfm_ray.data.batch import Batch
from loopfm_ray.data.prepared import EntityTable, PreparedData, read_entities
from loopfm_ray.data.schema import FeatureSchema, Side
from loopfm_ray.data.vocabulary import Vocabulary
from loopfm_ray.errors import BundleError, ConfigError, LoopFMError
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.serving.contract import Backend
from loopfm_ray.serving.onnx import OnnxModel, export_onnx, quantize_onnx
from loopfm_ray.serving.reference import Reference
from loopfm_ray.serving.spec import BundleSpec, read_spec, spec_tree
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, stage, verify

__all__ = ["Bundle", "load_bundle", "save_bundle", "vocabulary_sizes"]

_SPEC, _WEIGHTS, _REFERENCE = "bundle.json", "model.safetensors", "reference.json"
_ONNX: dict[Backend, str] = {"onnx": "model.onnx", "onnx_int8": "model_int8.onnx"}


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; `version` names its content, `reference` is None where it was exported without."""

    spec: BundleSpec
    version: str
    model: VerticalModel
    vocabularies: dict[str, Vocabulary]
    items: EntityTable
    users: EntityTable
    reference: Reference | None = None
    onnx: OnnxModel | None = None
    """What scores in the place of `model`."""

    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """Return [B] logits of the first task, not calibrated."""
        if self.onnx is not None:
            return self.onnx.logits(batch)
        with torch.inference_mode():
            return self.model(batch)[:, 0].double().numpy()  # type: ignore[no-any-return]


def save_bundle(
    location: Location,
    spec: BundleSpec,
    model: VerticalModel,
    prepared: PreparedData,
    inputs: Mapping[str, str],
    reference: Reference | None = None,
    backends: Sequence[Backend] = ("torch",),
) -> Manifest:
    """Write a bundle as one version at `location`, replacing another one there.

    Args:
        location: its final name, a directory or an `s3://` address.
        spec: what the VM is.
        model: trained weights; has to fit `spec`.
        prepared: data the VM was trained on; its vocabularies and tables are cut to the VM's schema.
        inputs: versions of what the VM was made from, by name.
        reference: that drift is measured against while it serves; None measures none, and the service says so.
        backends: what the bundle can be run with; torch always.

    Raises:
        BundleError: the weights do not fit `spec`, or the model can not be exported to ONNX.
    """
    _check_weights(spec, model.state_dict())
    tree = spec_tree(spec)
    with stage(location) as staged:
        weights = {
            name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
        }
        save_file(weights, staged / _WEIGHTS)
        (staged / _SPEC).write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", "utf-8")
        if reference is not None:
            text = json.dumps(reference.to_tree(), indent=1, sort_keys=True)
            (staged / _REFERENCE).write_text(text + "\n", "utf-8")
        (staged / "vocab").mkdir()
        for name, size in vocabulary_sizes(spec.schema).items():
            vocabulary = prepared.vocabulary(name)
            cut = slice(0, len(vocabulary) if size is None else size - 1)
            Vocabulary(vocabulary.keys[cut], vocabulary.first_ts[cut]).write(
                staged / "vocab" / f"{name}.parquet"
            )
        for side in _table_sides(spec.schema):
            table = prepared.items if side == Side.ITEM else prepared.users
            _write_table(staged / f"{side.value}s.parquet", table, spec.schema, side)
        _write_onnx(staged, spec, model, backends)
        return commit(
            staged,
            kind="bundle",
            config_hash=config_hash(spec.vm, tree),
            inputs=dict(inputs),
            meta={"name": spec.name},
            num_rows=0,
            replace_other=True,
        )


def load_bundle(location: Location, backend: Backend = "torch") -> Bundle:
    """Load a bundle after checking every file against its checksum.

    Args:
        location: a directory or an `s3://` address.
        backend: what runs the model.

    Raises:
        BundleError: it is missing, damaged, of another format, not made for `backend`, or its parts do not fit together.
    """
    try:
        version = open_version(location)
        manifest = version.manifest
        if manifest.kind != "bundle":
            raise BundleError(
                f"{location} is a dataset version of kind {manifest.kind!r}, expected a bundle; give the folder that"
                " holds bundle.json"
            )
        path = version.fetch()
        verify(path)
        spec = read_spec(json.loads((path / _SPEC).read_text("utf-8")))
        weights = load_file(path / _WEIGHTS)
        sizes = vocabulary_sizes(spec.schema)
        vocabularies = {name: Vocabulary.read(path / "vocab" / f"{name}.parquet") for name in sizes}
        items = _read_table(path, spec.schema, Side.ITEM, vocabularies)
        users = _read_table(path, spec.schema, Side.USER, vocabularies)
        reference = None
        if any(entry.path == _REFERENCE for entry in manifest.files):
            reference = Reference.of_tree(json.loads((path / _REFERENCE).read_text("utf-8")))
    except BundleError:
        raise
    except (
        LoopFMError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
        pa.ArrowException,
    ) as error:
        raise BundleError(
            f"bundle {location} can not be loaded: {error}; export it again from its training run"
        ) from error
    _check_sizes(location, vocabularies, sizes)
    model = _check_weights(spec, weights)
    model.eval()
    onnx = None if backend == "torch" else _read_onnx(path, spec, backend)
    return Bundle(spec, manifest.version, model, vocabularies, items, users, reference, onnx)


def _latent_dim(spec: BundleSpec) -> int | None:
    return spec.history.code_spec.dim if spec.history else None


def _write_onnx(
    folder: Path, spec: BundleSpec, model: VerticalModel, backends: Sequence[Backend]
) -> None:
    if not set(backends).intersection(_ONNX):
        return
    path = folder / _ONNX["onnx"]
    export_onnx(model, spec.schema, _latent_dim(spec), path)
    if "onnx_int8" in backends:
        quantize_onnx(path, folder / _ONNX["onnx_int8"])


def _read_onnx(folder: Path, spec: BundleSpec, backend: Backend) -> OnnxModel:
    path = folder / _ONNX[backend]
    if not path.is_file():
        raise BundleError(
            f"the bundle of VM {spec.name!r} has no {path.name} for the back end {backend!r}; name it in"
            " `online.backends` and publish again, or serve with torch"
        )
    return OnnxModel(path, spec.schema, _latent_dim(spec))


def vocabulary_sizes(schema: FeatureSchema) -> dict[str, int | None]:
    """Return the vocabularies that serving looks keys up in, and the ids each is cut to; None keeps it whole.

    Fields of the item and user tables hold ids already and are looked up by the id of the item or user.
    """
    own = {Side.ITEM.value, Side.USER.value}
    sizes: dict[str, int | None] = {
        item.name: item.cardinality
        for item in (*schema.categorical, *schema.sequences)
        if item.side not in own or item.name in own
    }
    return sizes | {side.value: None for side in _table_sides(schema)}


def _table_sides(schema: FeatureSchema) -> list[Side]:
    """Return the sides of which the VM reads more than the id."""
    return [
        side
        for side in (Side.ITEM, Side.USER)
        if any(item.side == side and item.name != side.value for item in schema.fields)
    ]


def _check_sizes(
    location: Location, vocabularies: Mapping[str, Vocabulary], sizes: Mapping[str, int | None]
) -> None:
    for name, size in sizes.items():
        if size is not None and len(vocabularies[name]) + 1 != size:
            raise BundleError(
                f"bundle {location}: field {name!r} has {len(vocabularies[name]) + 1} ids in its vocabulary and {size} in"
                " the schema; export it again"
            )


def _check_weights(spec: BundleSpec, weights: Mapping[str, torch.Tensor]) -> VerticalModel:
    """Return a model of `spec` with these weights."""
    try:
        model = build_vm(spec.vm, spec.schema, latent_dim=_latent_dim(spec))
        model.load_state_dict(weights)
    except (ConfigError, RuntimeError) as error:
        raise BundleError(
            f"weights of VM {spec.name!r} do not fit its config and schema: {error}; export the bundle from the run"
            " that trained it"
        ) from error
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise BundleError(f"weights {bad} of VM {spec.name!r} are not finite; train it again")
    return model


def _write_table(path: Path, table: EntityTable, schema: FeatureSchema, side: Side) -> None:
    names = {item.name for item in schema.fields if item.side == side}
    columns = {name: pa.array(values) for name, values in table.ids.items() if name in names}
    columns |= {name: pa.array(values) for name, values in table.numeric.items() if name in names}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _read_table(
    folder: Path, schema: FeatureSchema, side: Side, vocabularies: Mapping[str, Vocabulary]
) -> EntityTable:
    keys = vocabularies[side.value].keys if side.value in vocabularies else []
    if side not in _table_sides(schema):
        return EntityTable({}, {}, ["", *keys])
    return read_entities(folder / f"{side.value}s.parquet", keys, schema, side)
