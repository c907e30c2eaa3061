"""Fit a bottleneck to a stream of FM embeddings, and choose the codes of its latents."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from loopfm_ray.errors import DataError
from loopfm_ray.models.bottleneck import Bottleneck
from loopfm_ray.store.codes import CodeSpec, calibrate_scale

__all__ = ["EmbeddingChunk", "calibrate", "fit_bottleneck", "start_bottleneck"]

_CALIBRATION_ROWS = 16_384


class EmbeddingChunk(NamedTuple):
    """One piece of the stream that a bottleneck is fitted on."""

    embedding: Tensor
    """[B, D] FM embeddings."""
    target: Tensor | None = None
    """[B] FM probabilities; needed with `predict_weight`."""
    sensitivity: Tensor | None = None
    """[D] from `FoundationModel.sensitivity`; needed with the metric `gradient` on some chunk."""


def start_bottleneck(bottleneck: Bottleneck, chunks: Sequence[EmbeddingChunk], bits: int) -> None:
    """Initialise from all rows of `chunks`, for codes of `bits`.

    Raises:
        DataError: there are no rows, or no sensitivity where the metric needs it.
    """
    if not chunks:
        raise DataError("a bottleneck needs a stream of embeddings, found none; check the split")
    slopes = [chunk.sensitivity for chunk in chunks if chunk.sensitivity is not None]
    by_gradient = bottleneck.config.metric == "gradient"
    if by_gradient and not slopes:
        raise DataError(
            "bottleneck.metric gradient needs the FM's sensitivity, found none; set it to spread"
        )
    sample = torch.cat([chunk.embedding for chunk in chunks])
    bottleneck.initialise(sample, torch.stack(slopes).mean(0) if by_gradient else None)
    _take_step(bottleneck, sample, bits)


def fit_bottleneck(
    bottleneck: Bottleneck,
    stream: Iterable[EmbeddingChunk],
    *,
    bits: int = 4,
    is_started: bool = False,
) -> list[float]:
    """Initialise from the first `init_rows` rows, then take one Adam step per chunk, those rows included.

    With more than one epoch the whole stream is kept in memory.

    Args:
        bottleneck: what to fit; its config says for how long and how fast.
        stream: the embeddings.
        bits: of the codes that the latents will be stored in, which `rounding` trains for.
        is_started: whether it goes on from the weights that it has, instead of being initialised.

    Returns:
        The loss of each step, before the step.

    Raises:
        DataError: the stream holds fewer than two rows.
    """
    config = bottleneck.config
    chunks, buffered, num_rows = iter(stream), list[EmbeddingChunk](), 0
    for chunk in chunks:
        buffered.append(chunk)
        num_rows += len(chunk.embedding)
        if num_rows >= config.init_rows:
            break
    if not is_started:
        start_bottleneck(bottleneck, buffered, bits)
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=config.lr)
    source: Iterable[EmbeddingChunk] = chain(buffered, chunks)
    if config.epochs > 1:
        source = list(source)
    bottleneck.train()
    losses = []
    for _ in range(config.epochs):
        for chunk in source:
            optimizer.zero_grad()
            loss = bottleneck.loss(chunk.embedding, chunk.target)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            losses.append(float(loss.detach()))
        _take_step(bottleneck, torch.cat([chunk.embedding for chunk in buffered]), bits)
    bottleneck.eval()
    return losses


@torch.no_grad()
def calibrate(bottleneck: Bottleneck, embedding: Tensor, bits: int) -> CodeSpec:
    """Return the code whose scale per dimension suits the latents of embeddings [N, D] best."""
    if bits == 16:
        return CodeSpec(bits, bottleneck.latent_dim)
    latents = bottleneck.encode(embedding).cpu().numpy()
    return CodeSpec(bits, bottleneck.latent_dim, calibrate_scale(latents, bits))


def _take_step(bottleneck: Bottleneck, sample: Tensor, bits: int) -> None:
    """Tell the bottleneck the codes that its latents would get now."""
    spec = calibrate(bottleneck, sample[-_CALIBRATION_ROWS:], bits)
    if spec.scale is not None:
        bottleneck.set_step(spec.scale, bits)
