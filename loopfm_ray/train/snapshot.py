"""An FM snapshot on disk: the FM, its bottleneck and all that is needed to embed events with them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loopfm_ray.config import config_hash
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import LoopFMError, StoreError
from loopfm_ray.models.bottleneck import Bottleneck, BottleneckConfig, build_bottleneck
from loopfm_ray.models.foundation import FmConfig, FoundationModel, build_fm
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, stage, verify
from loopfm_ray.train.weights import (
    BOTTLENECK_WEIGHTS,
    FM_WEIGHTS,
    FmSpec,
    load_weights,
    save_weights,
)

__all__ = ["Snapshot", "SnapshotSpec", "load_snapshot", "save_snapshot"]

_SPEC = "snapshot.json"


@dataclass(frozen=True)
class SnapshotSpec:
    """All of a snapshot but its weights."""

    trained_until_ts: int
    """The last moment that the FM may have seen; it embeds only later events."""
    schema: FeatureSchema
    item_fields: tuple[str, ...]
    """Columns of `History.item_ids` in the raw history."""
    max_len: int
    """Events of the raw history that the FM reads."""
    fm: FmConfig
    bottleneck: BottleneckConfig
    embedding_layers: tuple[str, ...]
    """The FM layers that are the FM embedding, side by side."""
    code_spec: CodeSpec

    @classmethod
    def of(
        cls,
        fm: FmSpec,
        bottleneck: BottleneckConfig,
        embedding_layers: tuple[str, ...],
        code_spec: CodeSpec,
    ) -> "SnapshotSpec":
        """Return the spec of a trained FM with a bottleneck."""
        return cls(
            fm.trained_until_ts,
            fm.schema,
            fm.item_fields,
            fm.max_len,
            fm.fm,
            bottleneck,
            embedding_layers,
            code_spec,
        )

    def to_tree(self) -> dict[str, Any]:  # Any: JSON
        """Return the spec as a JSON tree."""
        fm = FmSpec(
            self.trained_until_ts, self.schema, self.item_fields, self.max_len, self.fm
        ).to_tree()
        return {
            **fm,
            "bottleneck": self.bottleneck.model_dump(mode="json"),
            "embedding_layers": list(self.embedding_layers),
            "code_spec": self.code_spec.to_tree(),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "SnapshotSpec":  # Any: JSON, checked here
        """Read what `to_tree` gave.

        Raises:
            StoreError: the tree is no snapshot spec.
        """
        try:
            return cls.of(
                FmSpec.from_tree(tree),
                BottleneckConfig.model_validate(tree["bottleneck"]),
                tuple(tree["embedding_layers"]),
                CodeSpec.from_tree(tree["code_spec"]),
            )
        except (KeyError, TypeError, ValueError, LoopFMError) as error:
            raise StoreError(f"not a snapshot spec: {error}; write it with to_tree") from error


@dataclass(frozen=True)
class Snapshot:
    """A trained FM, its bottleneck, and how they are used."""

    fm: FoundationModel
    bottleneck: Bottleneck
    spec: SnapshotSpec
    snapshot_id: str = field(default="")
    """16 hex digits of weights and spec; filled in from them when not given."""
    version: str = ""
    """Version of the directory it was read from."""

    def __post_init__(self) -> None:
        if not self.snapshot_id:
            object.__setattr__(self, "snapshot_id", _identify(self.fm, self.bottleneck, self.spec))


def save_snapshot(
    snapshot: Snapshot,
    location: Location,
    *,
    inputs: Mapping[str, str],
    settings_hash: str = "",
    record: Mapping[str, Any] | None = None,  # Any: JSON
    num_rows: int = 0,
) -> Manifest:
    """Write a snapshot as a version of kind `snapshot`, in place of another one there.

    Args:
        snapshot: what to write.
        location: its final name, a directory or an `s3://` address.
        inputs: versions it was made from, by name.
        settings_hash: of all settings that shaped it; that of the model's configs if not given.
        record: JSON to keep with it, such as its speed and the channel report.
        num_rows: rows that the FM was trained on.
    """
    tree = {"format_version": 2, "snapshot_id": snapshot.snapshot_id, **snapshot.spec.to_tree()}
    with stage(location) as staged:
        save_weights(snapshot.fm, staged / FM_WEIGHTS)
        save_weights(snapshot.bottleneck, staged / BOTTLENECK_WEIGHTS)
        (staged / _SPEC).write_text(json.dumps(tree, indent=1, sort_keys=True), encoding="utf-8")
        return commit(
            staged,
            kind="snapshot",
            config_hash=settings_hash or config_hash(snapshot.spec.fm, snapshot.spec.bottleneck),
            inputs=inputs,
            meta={
                "snapshot_id": snapshot.snapshot_id,
                "trained_until_ts": snapshot.spec.trained_until_ts,
                "embedding_layers": list(snapshot.spec.embedding_layers),
                "code_spec": snapshot.spec.code_spec.to_tree(),
                "record": dict(record or {}),
            },
            num_rows=num_rows,
            replace_other=True,
        )


def load_snapshot(location: Location) -> Snapshot:
    """Read a snapshot, checksums checked, in evaluation mode on the CPU.

    Raises:
        StoreError: it is missing, damaged, or its weights do not fit its spec.
    """
    version = open_version(location, "snapshot")
    directory = version.fetch()
    verify(directory)
    tree = json.loads((directory / _SPEC).read_text(encoding="utf-8"))
    spec = SnapshotSpec.from_tree(tree)
    fm = build_fm(spec.fm, spec.schema, spec.item_fields)
    bottleneck = build_bottleneck(spec.bottleneck, fm.embedding_dim(spec.embedding_layers))
    load_weights(fm, directory / FM_WEIGHTS)
    load_weights(bottleneck, directory / BOTTLENECK_WEIGHTS)
    return Snapshot(fm, bottleneck, spec, tree["snapshot_id"], version.manifest.version)


def _identify(fm: nn.Module, bottleneck: nn.Module, spec: SnapshotSpec) -> str:
    digest = hashlib.sha256(json.dumps(spec.to_tree(), sort_keys=True).encode())
    for model in (fm, bottleneck):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
