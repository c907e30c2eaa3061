"""From events to what is stored of them: the FM's embedding, its latent, and the FM's prediction."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch
from loopfm_ray.models.fitting import EmbeddingChunk
from loopfm_ray.models.foundation import FoundationModel
from loopfm_ray.store.rows import prob_column
from loopfm_ray.train.snapshot import Snapshot

__all__ = ["Embedded", "Embedder", "embedding_chunks", "length_order"]

_SENSITIVITY_BATCHES = 8


@dataclass(frozen=True)
class Embedded:
    """What is stored of B events."""

    latents: NDArray[np.float32]
    """[B, d] latents; the store makes codes of them."""
    fm_probs: NDArray[np.float32]
    """[B, T] the FM's probability of each task: the teacher predictions."""

    def columns(self, tasks: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return [B] columns of the predictions by their stored names; `tasks` are all, the first one included."""
        names = ["fm_prob", *(prob_column(task) for task in tasks[1:])]
        return {name: self.fm_probs[:, place] for place, name in enumerate(names)}


class Embedder:
    """Embeds batches with one snapshot."""

    def __init__(self, snapshot: Snapshot, device: torch.device | str = "cpu") -> None:
        self.snapshot = snapshot
        self._device = device
        self._fm = snapshot.fm.to(device).eval()
        self._bottleneck = snapshot.bottleneck.to(device).eval()

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Embedded:
        """Return latents and predictions of a batch."""
        spec = self.snapshot.spec
        output = self._fm(batch.to(self._device))
        latent = self._bottleneck.encode(output.embedding(spec.embedding_layers))
        probs = torch.sigmoid(output.logit).float().cpu().numpy()
        return Embedded(latent.float().cpu().numpy(), probs)


def length_order(rows: Mapping[str, NDArray[Any]], max_len: int) -> NDArray[np.intp]:
    """Return an order of rows in which neighbours read raw histories of like length, so that batches carry little padding.

    Among equal lengths the order stays, so that rows of one request, which share a history, stay together.
    """
    return np.argsort(np.minimum(rows["raw_len"], max_len), kind="stable")


def embedding_chunks(
    fm: FoundationModel, layers: Sequence[str], batches: Iterable[Batch]
) -> Iterator[EmbeddingChunk]:
    """Yield embeddings and FM probabilities of batches: what a bottleneck is fitted on.

    The first few also tell how sensitive the FM is to each number of the layers. Give the rows that will be stored
    (events), of the time that the FM was trained on.
    """
    fm.eval()
    for index, batch in enumerate(batches):
        slopes = fm.sensitivity(batch, layers) if index < _SENSITIVITY_BATCHES else None
        with torch.no_grad():
            output = fm(batch)
        yield EmbeddingChunk(output.embedding(layers), torch.sigmoid(output.logit[:, 0]), slopes)
