"""What a model costs: its parameters, and the arithmetic of one scored row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from loopfm_ray.data.batch import Batch, History
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.history_inputs import HistoryInputs, RawHistoryConfig
from loopfm_ray.models.vertical import VerticalModel

__all__ = ["ModelCost", "RequestShape", "fm_cost", "request_batch", "vm_cost"]


# Any: a size, and what else the operator takes
def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch leaves it untyped


_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What torch leaves out of its own count: fused attention on the CPU."""


@dataclass(frozen=True)
class RequestShape:
    """What is scored together: the candidates of one request, which share its histories.

    Histories by other keys than the user count as shared too: their cost is then a lower bound.
    """

    num_candidates: int = 50
    history_len: int = 100
    sequence_len: int = 20


@dataclass(frozen=True)
class ModelCost:
    """The cost of an FM or a VM."""

    num_parameters: int
    num_table_parameters: int
    """Of them in tables of ids, of which a row touches a few."""
    flops_per_row: float
    """Operations of matrix products in a forward pass, a multiply and an add counting two, over the candidates of a
    request. Look-ups and what is done number by number are left out."""

    @property
    def num_dense_parameters(self) -> int:
        """Parameters that every row touches."""
        return self.num_parameters - self.num_table_parameters


def vm_cost(
    model: VerticalModel,
    schema: FeatureSchema,
    history: HistoryInputs,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
    shape: RequestShape | None = None,
) -> ModelCost:
    """Return the cost of a VM, its operations counted while it scores one request.

    Args:
        model: any VM.
        schema: its fields and tasks.
        history: the histories it reads.
        item_fields: the columns of a raw history.
        latent_dim: width of the stored latents.
        shape: how many candidates and events the request has.
    """
    shape = shape or RequestShape()
    batch = request_batch(schema, history, item_fields, latent_dim, shape)
    was_training = model.training
    found = _cost(model.eval(), batch)
    model.train(was_training)
    return found


def fm_cost(
    config: FmConfig,
    schema: FeatureSchema,
    item_fields: Sequence[str] = (),
    shape: RequestShape | None = None,
) -> ModelCost:
    """Return the cost of an FM from its config alone: nothing is allocated, whatever its size.

    Args:
        config: the FM.
        schema: its fields and tasks.
        item_fields: the columns of its raw history; empty when there is none.
        shape: how many candidates and events a request has.

    Raises:
        ConfigError: a history field is not among `item_fields`.
    """
    shape = shape or RequestShape(num_candidates=1)
    with torch.device("meta"):
        model = build_fm(config, schema, item_fields).eval()
        raw = HistoryInputs.of(raw=RawHistoryConfig()) if model.events is not None else None
        batch = request_batch(schema, raw or HistoryInputs(), item_fields, None, shape)
    return _cost(model, batch)


def _cost(model: nn.Module, batch: Batch) -> ModelCost:
    """Return the cost of scoring a batch with a model in evaluation."""
    tables = [part for part in model.modules() if isinstance(part, FieldEmbeddings)]
    with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter, torch.no_grad():
        model(batch)
    return ModelCost(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_table_parameters=sum(table.weight.numel() for table in tables),
        flops_per_row=counter.get_total_flops() / len(batch),
    )


def request_batch(
    schema: FeatureSchema,
    history: HistoryInputs,
    item_fields: Sequence[str] = (),
    latent_dim: int | None = None,
    shape: RequestShape | None = None,
) -> Batch:
    """Return the batch of one request of a given shape, all ids and numbers 0, its histories full."""
    shape = shape or RequestShape()
    num, length = shape.num_candidates, shape.history_len
    ids = torch.zeros(1, length, dtype=torch.int64)
    shared = History(
        row=torch.zeros(num, dtype=torch.int64),
        mask=torch.ones(1, length, dtype=torch.bool),
        age_s=torch.arange(length, 0, -1, dtype=torch.float32)[None] * 3600,
        latents=torch.zeros(1, length, latent_dim or 0),
        item_ids=torch.zeros(1, length, len(item_fields), dtype=torch.int64),
        label=ids,
        event_type=ids,
    )
    return Batch(
        ids=torch.zeros(num, len(schema.categorical), dtype=torch.int64),
        numeric=torch.zeros(num, len(schema.numeric)),
        sequences={
            field.name: torch.zeros(num, shape.sequence_len, dtype=torch.int64)
            for field in schema.sequences
        },
        histories=dict.fromkeys(history.sources, shared),
        label=torch.zeros(num, len(schema.tasks)),
        teacher_latent=torch.zeros(num, latent_dim or 0),
    )
