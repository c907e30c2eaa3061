"""The bottleneck: shortens an FM embedding to a latent that every prefix of stands for it, and that fits in few bits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, Self

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.store.codes import CodeSpec, calibrate_scale, dequantize, quantize

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "ChannelReport",
    "EmbeddingChunk",
    "build_bottleneck",
    "calibrate",
    "channel_report",
    "fit_bottleneck",
]

_MIN_STD = 1e-4
_MAX_NORMAL = 8.0


Metric = Literal["spread", "gradient"]


class BottleneckConfig(Config):
    """A Matryoshka autoencoder that starts as whitened principal components."""

    kind: Literal["matryoshka"] = "matryoshka"
    latent_dim: PositiveInt = 32
    """Numbers per latent."""
    prefixes: tuple[PositiveInt, ...] = (8, 16, 32)
    """Leading parts of the latent that must be usable alone, rising; the last is `latent_dim`."""
    hidden: NonNegativeInt = 0
    """Width of a hidden layer beside the linear encoder; 0 is linear."""
    metric: Metric = "gradient"
    """What a dimension of the embedding counts: `spread` counts all alike, `gradient` counts by how much the FM's
    logit moves with it."""
    spread: PositiveFloat = 2.5
    """Standard deviations of a component that the straight part of the tanh covers."""
    predict_weight: NonNegativeFloat = 0.0
    """Weight of a term that asks the latent to give the FM's prediction, not only its embedding."""
    init_rows: PositiveInt = 65_536
    """Rows from which mean, spread and principal components are taken."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam in `fit_bottleneck`."""

    @model_validator(mode="after")
    def _check_prefixes(self) -> Self:
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1:] != (
            self.latent_dim,
        ):
            raise ValueError(
                f"prefixes must rise and end in latent_dim {self.latent_dim}, found {self.prefixes}"
            )
        return self


class EmbeddingChunk(NamedTuple):
    """One piece of the stream that a bottleneck is fitted on."""

    embedding: Tensor
    """[B, D] FM embeddings."""
    target: Tensor | None = None
    """[B] FM probabilities; needed with `predict_weight`."""
    sensitivity: Tensor | None = None
    """[D] from `FoundationModel.sensitivity`; needed with the metric `gradient` on some chunk."""


class Bottleneck(nn.Module):
    """Standardise, weigh, linear map (plus a hidden layer), tanh; one linear decoder per prefix.

    The embedding's gradient is stopped: a bottleneck never trains the FM. Each decoder gives the standardised and
    weighted embedding, so that what the FM does not use takes no room in the latent.

    Source: LoopFM, arXiv 2605.29280, stage 2. The start from principal components and the weighing by the logit's
    slope are ours; the paper is silent on both.
    """

    def __init__(
        self,
        in_dim: int,
        latent_dim: int,
        prefixes: Sequence[int],
        hidden: int = 0,
        spread: float = 2.5,
        predict_weight: float = 0.0,
        metric: Metric = "spread",
    ) -> None:
        super().__init__()
        if latent_dim > in_dim:
            raise ConfigError(
                f"bottleneck.latent_dim must be at most the embedding's {in_dim}, found {latent_dim};"
                " lower it or take a wider embedding_layer"
            )
        self.in_dim, self.latent_dim, self.prefixes = in_dim, latent_dim, tuple(prefixes)
        self.spread, self.predict_weight, self.metric = spread, predict_weight, metric
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.register_buffer("weight", torch.ones(in_dim))
        self.encoder = nn.Linear(in_dim, latent_dim)
        self.hidden = (
            nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
            if hidden
            else None
        )
        self.decoders = nn.ModuleDict({str(p): nn.Linear(p, in_dim) for p in self.prefixes})
        self.predictor = nn.Linear(latent_dim, 1) if predict_weight else None

    mean: Tensor
    std: Tensor
    weight: Tensor

    def standardise(self, embedding: Tensor) -> Tensor:
        """Return [B, D] with mean 0 and the weight of each dimension as its spread, without gradient."""
        normal = (embedding.detach().float() - self.mean) / self.std
        return normal.clamp(-_MAX_NORMAL, _MAX_NORMAL) * self.weight

    def encode(self, embedding: Tensor) -> Tensor:
        """Return latents [B, latent_dim] in [-1, 1] of FM embeddings [B, D]."""
        normal = self.standardise(embedding)
        code = self.encoder(normal)
        if self.hidden is not None:
            code = code + self.hidden(normal)
        return torch.tanh(code)

    def decode(self, latent: Tensor, prefix: int | None = None) -> Tensor:
        """Return standardised embeddings [B, D] from the first `prefix` numbers of latents [B, >= prefix]."""
        width = prefix if prefix is not None else self.latent_dim
        decoded: Tensor = self.decoders[str(width)](latent[..., :width])
        return decoded

    def loss(self, embedding: Tensor, target: Tensor | None = None) -> Tensor:
        """Return [] the sum over prefixes of the mean squared error, plus the weighted prediction term.

        Args:
            embedding: [B, D] FM embeddings; take no gradient.
            target: [B] FM probabilities; needed with `predict_weight`.
        """
        normal, latent = self.standardise(embedding), self.encode(embedding)
        total = torch.stack(
            [functional.mse_loss(self.decode(latent, prefix), normal) for prefix in self.prefixes]
        ).sum()
        if self.predictor is not None:
            if target is None:
                raise DataError("bottleneck.predict_weight needs the FM's predictions, found none")
            logit = self.predictor(latent)[:, 0]
            total = total + self.predict_weight * functional.binary_cross_entropy_with_logits(
                logit, target.detach()
            )
        return total

    @torch.no_grad()
    def initialise(self, sample: Tensor, sensitivity: Tensor | None = None) -> None:
        """Set mean, spread and weights, and start as whitened principal components.

        Args:
            sample: [N, D] embeddings.
            sensitivity: [D] mean square slope of the FM's logit; none weighs all dimensions alike.

        Raises:
            DataError: fewer than two rows, or a logit that does not depend on the embedding.
        """
        if len(sample) < 2:
            raise DataError(f"a bottleneck starts from at least 2 embeddings, found {len(sample)}")
        sample = sample.float()
        self.mean.copy_(sample.mean(0))
        std = sample.std(0)
        self.std.copy_(torch.where(std > _MIN_STD, std, 1.0))
        if sensitivity is not None:
            self.weight.copy_(_weights(std, sensitivity))
        normal = self.standardise(sample).double()
        values, vectors = torch.linalg.eigh(normal.T @ normal / len(normal))
        components = vectors.flip(1)[:, : self.latent_dim]
        # The sign of an eigenvector is free: fix it, so that every machine starts alike.
        largest = components.abs().argmax(0)
        components = components * components[largest, torch.arange(self.latent_dim)].sign()
        variance = values.flip(0)[: self.latent_dim].clamp_min(_MIN_STD**2)
        reach = self.spread * variance.sqrt()
        self.encoder.weight.copy_((components / reach).T)
        self.encoder.bias.zero_()
        if self.hidden is not None:
            for parameter in self.hidden[-1].parameters():
                parameter.zero_()
        for prefix in self.prefixes:
            decoder = self.decoders[str(prefix)]
            decoder.get_parameter("weight").copy_((components * reach)[:, :prefix])
            decoder.get_parameter("bias").zero_()


def build_bottleneck(config: BottleneckConfig, in_dim: int) -> Bottleneck:
    """Build the bottleneck of embeddings [B, in_dim]."""
    return Bottleneck(
        in_dim,
        config.latent_dim,
        config.prefixes,
        config.hidden,
        config.spread,
        config.predict_weight,
        config.metric,
    )


def _weights(std: Tensor, sensitivity: Tensor) -> Tensor:
    """Return [D] how far the logit moves when a dimension moves by its spread, scaled to a mean square of 1."""
    reach = std * sensitivity.float().sqrt()
    size = reach.square().mean().sqrt()
    if not bool(size > 0):
        raise DataError("the FM's logit does not depend on the embedding_layer; choose another one")
    return reach / size


def fit_bottleneck(
    bottleneck: Bottleneck,
    stream: Iterable[EmbeddingChunk],
    *,
    init_rows: int = 65_536,
    lr: float = 1e-3,
) -> list[float]:
    """Initialise from the first `init_rows` rows, then take one Adam step per chunk, those rows included.

    Returns:
        The loss of each step, before the step.

    Raises:
        DataError: the stream holds fewer than two rows.
    """
    chunks, buffered, num_rows = iter(stream), list[EmbeddingChunk](), 0
    for chunk in chunks:
        buffered.append(chunk)
        num_rows += len(chunk.embedding)
        if num_rows >= init_rows:
            break
    if not buffered:
        raise DataError("a bottleneck needs a stream of embeddings, found none; check the split")
    slopes = [chunk.sensitivity for chunk in buffered if chunk.sensitivity is not None]
    if bottleneck.metric == "gradient" and not slopes:
        raise DataError(
            "bottleneck.metric gradient needs the FM's sensitivity, found none; set it to spread"
        )
    bottleneck.initialise(
        torch.cat([chunk.embedding for chunk in buffered]),
        torch.stack(slopes).mean(0) if bottleneck.metric == "gradient" else None,
    )
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=lr)
    losses = []
    for chunk in chain(buffered, chunks):
        optimizer.zero_grad()
        loss = bottleneck.loss(chunk.embedding, chunk.target)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def calibrate(bottleneck: Bottleneck, embedding: Tensor, bits: int) -> CodeSpec:
    """Return the code whose scale per dimension suits the latents of embeddings [N, D] best."""
    if bits == 16:
        return CodeSpec(bits, bottleneck.latent_dim)
    latents = bottleneck.encode(embedding).cpu().numpy()
    return CodeSpec(bits, bottleneck.latent_dim, calibrate_scale(latents, bits))


@dataclass(frozen=True)
class ChannelReport:
    """What the way from FM embedding to stored code keeps."""

    embedding_dim: int
    latent_dim: int
    bits: int
    variance_explained: dict[str, float]
    """Share of the standardised and weighted embedding's variance kept by `latent`, by its `code`, and by `prefix_<n>`."""
    share_zero_codes: float
    """Share of codes that are 0: near 1, the code's range is too wide for the latents."""


@torch.no_grad()
def channel_report(bottleneck: Bottleneck, embedding: Tensor, spec: CodeSpec) -> ChannelReport:
    """Measure the channel on embeddings [N, D], best not those it was fitted on."""
    normal, latent = bottleneck.standardise(embedding), bottleneck.encode(embedding)
    codes = quantize(latent.cpu().numpy(), spec)
    stored = torch.from_numpy(dequantize(codes, spec)).to(latent)
    explained = {
        "latent": _explained(normal, bottleneck.decode(latent)),
        "code": _explained(normal, bottleneck.decode(stored)),
    }
    for prefix in bottleneck.prefixes:
        explained[f"prefix_{prefix}"] = _explained(normal, bottleneck.decode(latent, prefix))
    return ChannelReport(
        bottleneck.in_dim, bottleneck.latent_dim, spec.bits, explained, float((codes == 0).mean())
    )


def _explained(target: Tensor, decoded: Tensor) -> float:
    residual = (target - decoded).square().sum()
    total = (target - target.mean(0)).square().sum().clamp_min(1e-12)
    return float(1.0 - residual / total)
