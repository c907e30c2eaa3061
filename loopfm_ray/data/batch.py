"""What a model reads: one batch of tensors, with the histories that its rows share."""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Batch", "History"]

MovedT = TypeVar("MovedT", "History", "Batch")


@dataclass(frozen=True)
class History:
    """The histories of a batch: G distinct ones, and which of them each row reads.

    Attributes:
        row: [B] int64, the history of each row.
        mask: [G, L] bool; valid entries first, oldest to newest, padding after.
        age_s: [G, L] float32, seconds from the event to the request; 0 at padding.
        latents: [G, L, D] float32 or None; 0 at padding.
        item_ids: [G, L, F_item] int64 or None: the item and its categorical fields; 0 at padding.
        label: [G, L] int64 or None: 0 not known at the request, 1 negative, 2 positive; 0 at padding.
        event_type: [G, L] int64 or None: which kind of event it was; 0 is unknown, and padding.
    """

    row: Tensor
    mask: Tensor
    age_s: Tensor
    latents: Tensor | None = None
    item_ids: Tensor | None = None
    label: Tensor | None = None
    event_type: Tensor | None = None

    def to(self, device: torch.device | str) -> "History":
        """Return the same history on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """What a model reads.

    Attributes:
        ids: [B, F] int64, columns are `schema.categorical`.
        numeric: [B, F_num] float32, columns are `schema.numeric`.
        sequences: by name, [B, S] int64, 0 is padding.
        histories: by source: `raw`, `latent`, and `latent_by_item` and the like for other keys than the user.
        label: [B, T] float32, columns are `schema.tasks`.
        teacher_prob: [B] float32 or None: of the first task.
        teacher_more: [B, T - 1] float32 or None: of the further ones, where the FM has them.
        teacher_latent: [B, D] float32 or None: the FM's latent of the row itself. It takes a live FM, so only training
            and offline evaluation have it.
    """

    ids: Tensor
    numeric: Tensor
    sequences: dict[str, Tensor]
    histories: dict[str, History]
    label: Tensor
    teacher_prob: Tensor | None = None
    teacher_latent: Tensor | None = None
    teacher_more: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return _moved(self, device)


def _moved(value: MovedT, device: torch.device | str) -> MovedT:
    def move(part: Any) -> Any:  # Any: a tensor, a history, a dictionary of them or None
        if isinstance(part, dict):
            return {name: move(inner) for name, inner in part.items()}
        if isinstance(part, History):
            return part.to(device)
        return part if part is None else part.to(device, non_blocking=True)

    return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
