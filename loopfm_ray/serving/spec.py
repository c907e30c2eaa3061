"""What a bundle is beside its weights: the VM, its schema and calibration, and the history that it was trained with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.errors import BundleError
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.history_inputs import RawHistoryConfig
from loopfm_ray.models.registry import AnyVmConfig, read_vm_config
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import Manifest
from loopfm_ray.store.space import Space

__all__ = ["BundleSpec", "HistoryPin", "read_spec", "spec_tree", "why_not_servable"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class HistoryPin:
    """The history that a VM reads.

    Attributes:
        space: that the latents have to be of, online and offline.
        latents_version: that the VM was trained on; lineage, not a condition.
        max_len: the newest so many visible events.
        retention_us: older events are left out; None keeps all.
    """

    space: Space
    latents_version: str
    max_len: int
    retention_us: int | None = None

    @property
    def snapshot_id(self) -> str:
        """The snapshot that made the latents."""
        return self.space.snapshot_id

    @property
    def code_spec(self) -> CodeSpec:
        """How the codes are read."""
        return self.space.code_spec

    @classmethod
    def of_joined(cls, manifest: Manifest) -> "HistoryPin":
        """Return the pin of the joined version that a VM was trained on."""
        return cls.of_meta(manifest.meta)

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "HistoryPin":  # Any: JSON
        """Return the pin from the meta of a joined version, or from what `to_meta` gave.

        Raises:
            StoreError: the meta does not tell the space.
            KeyError: another part is missing.
        """
        return cls(
            Space.of_meta(meta), meta["latents_version"], int(meta["max_len"]), meta["retention_us"]
        )

    def to_meta(self) -> dict[str, Any]:  # Any: JSON
        """Return the pin as a JSON tree."""
        return {
            **self.space.to_meta(),
            "latents_version": self.latents_version,
            "max_len": self.max_len,
            "retention_us": self.retention_us,
        }


def why_not_servable(vm: AnyVmConfig) -> str | None:
    """Return what keeps a VM from being served: an input that neither a request nor the online store gives; or None."""
    if vm.reads_teacher_latent:
        return "reads the FM's latent of the row itself, which takes a live FM"
    for name, history in vm.history.sorted():
        if isinstance(history, RawHistoryConfig):
            return f"reads the raw history {name!r}, and the online store holds latents only"
        if history.source != "latent":
            return (
                f"reads the history {name!r} by {list(history.key)}, and the online store holds"
                " those of users only"
            )
        if history.side.columns:
            return (
                f"reads {list(history.side.columns)} of the events of history {name!r}, and the online"
                " store holds times and latents only"
            )
    return None


@dataclass(frozen=True)
class BundleSpec:
    """What a VM is, beside its weights.

    `derive` names the context fields that are computed from the request time, `sequence_len` is how many of the last keys
    of a sequence field count; `history` is None for a VM that reads none.
    """

    name: str
    vm: AnyVmConfig
    schema: FeatureSchema
    calibration: PlattScaling = field(default_factory=PlattScaling)
    history: HistoryPin | None = None
    derive: tuple[str, ...] = ()
    sequence_len: int = 50

    def __post_init__(self) -> None:
        reason = why_not_servable(self.vm)
        if reason is not None:
            raise BundleError(
                f"VM {self.name!r} {reason}; serve a VM that reads the users' latents, or no history"
            )
        sources = sorted(self.vm.history.sources)
        if bool(sources) != (self.history is not None):
            raise BundleError(
                f"VM {self.name!r} reads the histories {sources} and has a history pin: {self.history is not None};"
                " give the pin of the joined set exactly when the VM reads latents"
            )
        context = {item.name for item in self.schema.of(Kind.CATEGORICAL, Side.CONTEXT)}
        wrong = sorted(set(self.derive) - context)
        if wrong:
            raise BundleError(
                f"derived fields {wrong} are no categorical context fields of the VM, which has {sorted(context)}"
            )


# Any: JSON trees.
def spec_tree(spec: BundleSpec) -> dict[str, Any]:
    """Return the content of `bundle.json`."""
    pin = spec.history
    return {
        "format_version": FORMAT_VERSION,
        "name": spec.name,
        "vm": spec.vm.model_dump(mode="json"),
        "schema": json.loads(spec.schema.to_json()),
        "calibration": {"slope": spec.calibration.slope, "bias": spec.calibration.bias},
        "derive": list(spec.derive),
        "sequence_len": spec.sequence_len,
        "history": None if pin is None else pin.to_meta(),
    }


def read_spec(tree: dict[str, Any]) -> BundleSpec:
    """Read what `spec_tree` gave.

    Raises:
        BundleError: another format version.
        KeyError, ValueError: the tree is no bundle.
    """
    if tree["format_version"] != FORMAT_VERSION:
        raise BundleError(
            f"bundle.json has format_version {tree['format_version']}, this code reads {FORMAT_VERSION}; export the"
            " bundle again with this code"
        )
    pin = tree["history"]
    return BundleSpec(
        name=tree["name"],
        vm=read_vm_config(tree["vm"]),
        schema=FeatureSchema.from_json(json.dumps(tree["schema"])),
        calibration=PlattScaling(**tree["calibration"]),
        history=None if pin is None else HistoryPin.of_meta(pin),
        derive=tuple(tree["derive"]),
        sequence_len=int(tree["sequence_len"]),
    )
