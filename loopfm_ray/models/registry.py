"""The tables of models: config kind -> builder. A new model is a file, a line here, a test row and a YAML."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.autoint import AutoIntConfig, build_autoint
from loopfm_ray.models.bottleneck import build_bottleneck
from loopfm_ray.models.dcnv2 import DcnV2Config, build_dcnv2
from loopfm_ray.models.deepfm import DeepFmConfig, build_deepfm
from loopfm_ray.models.din import DinConfig, build_din
from loopfm_ray.models.dlrm import DlrmConfig, build_dlrm
from loopfm_ray.models.dnn import DnnConfig, build_dnn
from loopfm_ray.models.finalmlp import FinalMlpConfig, build_finalmlp
from loopfm_ray.models.foundation import build_fm
from loopfm_ray.models.histories import build_encoder
from loopfm_ray.models.vertical import VerticalModel

__all__ = [
    "BOTTLENECKS",
    "ENCODERS",
    "FMS",
    "VMS",
    "AnyVmConfig",
    "VmConfig",
    "build_vm",
    "read_vm_config",
]

# Any: each builder takes the config of its own kind, which the kind has already chosen.
Builder = Callable[..., Any]

FMS: Mapping[str, Builder] = {"fm": build_fm}
"""`(config, schema, item_fields) -> FoundationModel`"""

VMS: Mapping[str, Builder] = {
    "autoint": build_autoint,
    "dcnv2": build_dcnv2,
    "deepfm": build_deepfm,
    "din": build_din,
    "dlrm": build_dlrm,
    "dnn": build_dnn,
    "finalmlp": build_finalmlp,
}
"""`(config, schema, item_fields, latent_dim) -> VerticalModel`"""

BOTTLENECKS: Mapping[str, Builder] = {"matryoshka": build_bottleneck}
"""`(config, in_dim) -> Bottleneck`"""

ENCODERS: Mapping[str, Builder] = {
    "attention": build_encoder,
    "augru": build_encoder,
    "din": build_encoder,
    "gru": build_encoder,
    "hstu": build_encoder,
    "mean": build_encoder,
    "sum": build_encoder,
    "transformer": build_encoder,
}
"""`(config, query_dim, value_dim) -> HistoryEncoder`"""

AnyVmConfig = (
    AutoIntConfig | DcnV2Config | DeepFmConfig | DinConfig | DlrmConfig | DnnConfig | FinalMlpConfig
)


def _kind_of(value: Any) -> str:  # Any: what the user wrote, or a config
    """Return the kind; one that is left out is the default VM."""
    kind = value.get("kind", "dnn") if isinstance(value, Mapping) else getattr(value, "kind", "")
    return str(kind)


VmConfig = Annotated[
    Annotated[AutoIntConfig, Tag("autoint")]
    | Annotated[DcnV2Config, Tag("dcnv2")]
    | Annotated[DeepFmConfig, Tag("deepfm")]
    | Annotated[DinConfig, Tag("din")]
    | Annotated[DlrmConfig, Tag("dlrm")]
    | Annotated[DnnConfig, Tag("dnn")]
    | Annotated[FinalMlpConfig, Tag("finalmlp")],
    Discriminator(_kind_of),
]
"""The config of any VM, told apart by `kind`; one without a kind is `dnn`."""


_READER: TypeAdapter[AnyVmConfig] = TypeAdapter(VmConfig)


def read_vm_config(tree: Mapping[str, Any]) -> AnyVmConfig:  # Any: JSON
    """Return the config of a VM that was dumped as JSON.

    Raises:
        ValueError: a key or a value is not accepted.
    """
    return _READER.validate_python(dict(tree))


def build_vm(
    config: AnyVmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
) -> VerticalModel:
    """Build the VM of a schema.

    Args:
        config: which architecture, its widths, and which histories are read.
        schema: the VM's own fields and tasks.
        item_fields: the columns of `History.item_ids` in the raw history, if that is read.
        latent_dim: width of the stored latents, if those are read.

    Raises:
        ConfigError: the config asks for a field, a history or a width that is not there.
    """
    model: VerticalModel = VMS[config.kind](config, schema, item_fields, latent_dim)
    return model
