"""A trained FM on disk: several snapshots may be made from one FM, unless a bottleneck was trained along with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import LoopFMError, StoreError
from loopfm_ray.models.bottleneck import Bottleneck, BottleneckConfig, build_bottleneck
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.foundation import FmConfig, FoundationModel, build_fm
from loopfm_ray.models.sharded.embeddings import ShardedEmbeddings
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, stage, verify
from loopfm_ray.train.curves import write_curves

__all__ = [
    "BOTTLENECK_WEIGHTS",
    "FM_WEIGHTS",
    "FmSpec",
    "JointBottleneck",
    "TrainedFm",
    "adopt_weights",
    "load_fm",
    "load_weights",
    "save_fm",
    "save_weights",
]

FM_WEIGHTS = "fm.safetensors"
BOTTLENECK_WEIGHTS = "bottleneck.safetensors"
_SPEC, _BOTTLENECK_SPEC = "fm.json", "bottleneck.json"


@dataclass(frozen=True)
class FmSpec:
    """All of a trained FM but its weights."""

    trained_until_ts: int
    """The last moment that the FM may have seen; it embeds only later events."""
    schema: FeatureSchema
    item_fields: tuple[str, ...]
    """Columns of `History.item_ids` in the raw history."""
    max_len: int
    """Events of the raw history that the FM reads."""
    fm: FmConfig

    def to_tree(self) -> dict[str, Any]:  # Any: JSON
        """Return the spec as a JSON tree."""
        return {
            "trained_until_ts": self.trained_until_ts,
            "schema": json.loads(self.schema.to_json()),
            "item_fields": list(self.item_fields),
            "max_len": self.max_len,
            "fm": self.fm.model_dump(mode="json"),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "FmSpec":  # Any: JSON, checked here
        """Read what `to_tree` gave; further keys are left to others.

        Raises:
            StoreError: the tree is no FM spec.
        """
        try:
            return cls(
                trained_until_ts=int(tree["trained_until_ts"]),
                schema=FeatureSchema.from_json(json.dumps(tree["schema"])),
                item_fields=tuple(tree["item_fields"]),
                max_len=int(tree["max_len"]),
                fm=FmConfig.model_validate(tree["fm"]),
            )
        except (KeyError, TypeError, ValueError, LoopFMError) as error:
            raise StoreError(f"not the spec of an FM: {error}; write it with to_tree") from error

    def build(self) -> FoundationModel:
        """Return the FM with fresh weights."""
        return build_fm(self.fm, self.schema, self.item_fields)


@dataclass(frozen=True)
class JointBottleneck:
    """A bottleneck that was trained along with an FM, and the FM's layers that it reads."""

    bottleneck: Bottleneck
    layers: tuple[str, ...]


@dataclass(frozen=True)
class TrainedFm:
    """A trained FM and what it is."""

    model: FoundationModel
    spec: FmSpec
    record: Mapping[str, Any]  # Any: JSON
    """Speed and seconds of its training, and its number of parameters."""
    version: str = ""
    """Version of the directory it was read from."""
    joint: JointBottleneck | None = None
    """The bottleneck that was trained along; none was, as a rule."""

    def bottleneck(self, config: BottleneckConfig, layers: tuple[str, ...]) -> Bottleneck:
        """Return the bottleneck that was trained along, which has to be of this config and read these layers.

        Raises:
            StoreError: it is not, or there is none.
        """
        joint = self.joint
        if joint is not None and (joint.bottleneck.config, joint.layers) == (config, layers):
            return joint.bottleneck
        has = "none" if joint is None else f"another one, of the layers {joint.layers}"
        raise StoreError(
            f"fm.bottleneck.fitted is jointly, but the FM of version {self.version} has {has} instead of this bottleneck"
            f" of {layers}; run `loopfm train-fm` with the same config, or set fitted to after"
        )


def save_fm(
    trained: TrainedFm,
    location: Location,
    *,
    settings_hash: str,
    inputs: Mapping[str, str],
    num_rows: int,
    curves: str = "",
) -> Manifest:
    """Write an FM, its learning curves and a bottleneck trained along as a version of kind `fm`, in place of another one there."""
    with stage(location) as staged:
        save_weights(trained.model, staged / FM_WEIGHTS)
        text = json.dumps(trained.spec.to_tree(), indent=1, sort_keys=True)
        (staged / _SPEC).write_text(text, encoding="utf-8")
        if trained.joint is not None:
            _write_joint(trained.joint, staged)
        write_curves(staged, curves)
        return commit(
            staged,
            kind="fm",
            config_hash=settings_hash,
            inputs=inputs,
            meta={
                "trained_until_ts": trained.spec.trained_until_ts,
                "record": dict(trained.record),
            },
            num_rows=num_rows,
            replace_other=True,
        )


def load_fm(location: Location) -> TrainedFm:
    """Read an FM, checksums checked, in evaluation mode on the CPU.

    Raises:
        StoreError: it is missing, damaged, or its weights do not fit its spec.
    """
    version = open_version(location, "fm")
    directory = version.fetch()
    verify(directory)
    spec = FmSpec.from_tree(json.loads((directory / _SPEC).read_text(encoding="utf-8")))
    model = spec.build()
    load_weights(model, directory / FM_WEIGHTS)
    manifest = version.manifest
    joint = _read_joint(directory, model)
    return TrainedFm(model, spec, manifest.meta["record"], manifest.version, joint)


def _write_joint(joint: JointBottleneck, directory: Path) -> None:
    save_weights(joint.bottleneck, directory / BOTTLENECK_WEIGHTS)
    tree = {
        "bottleneck": joint.bottleneck.config.model_dump(mode="json"),
        "embedding_layers": list(joint.layers),
    }
    text = json.dumps(tree, indent=1, sort_keys=True)
    (directory / _BOTTLENECK_SPEC).write_text(text, encoding="utf-8")


def _read_joint(directory: Path, fm: FoundationModel) -> JointBottleneck | None:
    path = directory / _BOTTLENECK_SPEC
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        layers = tuple(tree["embedding_layers"])
        config = BottleneckConfig.model_validate(tree["bottleneck"])
        bottleneck = build_bottleneck(config, fm.embedding_dim(layers))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is not the spec of a bottleneck: {error}; train the FM again"
        ) from error
    load_weights(bottleneck, directory / BOTTLENECK_WEIGHTS)
    return JointBottleneck(bottleneck, layers)


def adopt_weights(model: FoundationModel, parent: FoundationModel) -> None:
    """Begin with the weights of `parent`, an FM of the same shape that knew fewer ids; new ids keep their fresh rows.

    Ids are given in the order in which keys are first seen, so those of the parent are the first ones of each field.

    Raises:
        StoreError: the FMs differ in more than the ids that they know.
    """
    old = dict(parent.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            source = old.get(name)
            if isinstance(module, FieldEmbeddings | ShardedEmbeddings):
                if not isinstance(source, FieldEmbeddings) or not module.adopt(source):
                    raise StoreError(
                        f"the FM to begin with does not fit: its tables {name!r} have other fields, another width or more"
                        " ids; give one of the same config that was trained until an earlier time"
                    )
                continue
            for part, value in module.named_parameters(recurse=False):
                given = getattr(source, part, None)
                if not isinstance(given, Tensor) or given.shape != value.shape:
                    raise StoreError(
                        f"the FM to begin with does not fit in {name}.{part}, expected {list(value.shape)}; give one of"
                        " the same config"
                    )
                value.copy_(given)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a model."""
    weights = model.state_dict()
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into a model and set it to evaluation.

    Raises:
        StoreError: they do not fit.
    """
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, OSError) as error:
        raise StoreError(f"{path} does not fit its spec: {error}") from error
    model.eval()
