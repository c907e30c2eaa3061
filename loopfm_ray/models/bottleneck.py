"""The bottleneck: shortens an FM embedding to a latent that every prefix of stands for it, and that fits in few bits."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError, DataError

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "Fitted",
    "Metric",
    "Rotation",
    "Rounding",
    "build_bottleneck",
]

_MIN_STD = 1e-4
_MAX_NORMAL = 8.0
_ROTATION_SEED = 7

Fitted = Literal["after", "jointly"]
Metric = Literal["spread", "gradient"]
Rounding = Literal["none", "noise", "straight_through"]
Rotation = Literal["none", "random"]


class BottleneckConfig(Config):
    """A Matryoshka bottleneck: fitted to a trained FM from whitened principal components on, or trained along with the FM."""

    kind: Literal["matryoshka"] = "matryoshka"
    fitted: Fitted = "after"
    """When it learns. `after`: in a stage of its own, on the newest events of the trained FM, so that another bottleneck
    needs no new FM. `jointly`: at every step of the FM's training, on all rows of the batch, from a random start; the
    FM's weights are the same either way, but another bottleneck then needs the FM trained again. `lr` counts in both,
    `jointly` with the warm-up and fall of `learning.optim` and without weight decay; `epochs` and `init_rows` are of
    `after` alone. `jointly` takes the metric `spread`, by running mean and spread, and neither rounding nor rotation."""
    latent_dim: PositiveInt | None = 32
    """Numbers per latent; null takes as many as the embedding has, so that nothing is left out: the reference that shows
    what a bottleneck loses."""
    prefixes: tuple[PositiveInt, ...] = (8, 16, 32)
    """Leading parts of the latent that must be usable alone, rising; the last is `latent_dim`. Empty with `latent_dim` null."""
    hidden: NonNegativeInt = 0
    """Width of a hidden layer beside the linear encoder; 0 is linear."""
    metric: Metric = "gradient"
    """What a dimension of the embedding counts: `spread` counts all alike, `gradient` counts by how much the FM's
    logit moves with it."""
    spread: PositiveFloat = 2.5
    """Standard deviations of a component that the straight part of the tanh covers."""
    reconstruct_weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error of the decoded embedding."""
    predict_weight: NonNegativeFloat = 0.0
    """Weight of a term that asks every prefix to give the FM's prediction; with `reconstruct_weight` 0 the bottleneck
    is trained by prediction alone (IAT)."""
    predict_hidden: NonNegativeInt = 64
    """Width of the hidden layer from a prefix to that prediction; 0 is linear."""
    rounding: Rounding = "none"
    """How training meets the rounding to codes: not at all, as uniform noise of one step, or as it is with the
    gradient passed straight through."""
    rotation: Rotation = "none"
    """Whether components start rotated at random within each prefix, so that every number carries a like share."""
    init_rows: PositiveInt = 65_536
    """Rows from which mean, spread and principal components are taken; nothing with `fitted` jointly."""
    epochs: PositiveInt = 1
    """Passes over the embeddings; with `fitted` jointly those of the FM's `learning` count."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        last = () if self.latent_dim is None else (self.latent_dim,)
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1:] != last:
            expected = (
                f"end in latent_dim {self.latent_dim}" if last else "be empty: latent_dim is null"
            )
            raise ValueError(f"prefixes must rise and {expected}, found {self.prefixes}")
        if not self.reconstruct_weight and not self.predict_weight:
            raise ValueError("one of reconstruct_weight and predict_weight must be positive")
        if self.fitted == "jointly":
            self._check_jointly()
        return self

    def _check_jointly(self) -> None:
        """Refuse what needs a trained FM, or would draw random numbers that the FM's dropout shall get."""
        known = {"metric": "spread", "rounding": "none", "rotation": "none", "epochs": 1}
        for name, expected in known.items():
            found = getattr(self, name)
            if found != expected:
                raise ValueError(
                    f"fitted jointly takes {name} {expected} alone, found {found}; set {name} to {expected},"
                    " or fitted to after"
                )


class Bottleneck(nn.Module):
    """Standardise, weigh, linear map (plus a hidden layer), tanh; one linear decoder and one predictor per prefix.

    The embedding's gradient is stopped: a bottleneck never trains the FM. Each decoder gives the standardised and
    weighted embedding, so that what the FM does not use takes no room in the latent.

    Source: LoopFM, arXiv 2605.29280, stage 2; training by prediction alone: IAT, arXiv 2604.08933. The start from
    principal components and the weighing by the logit's slope are ours; the papers are silent on both. Trained along
    with the FM, as LoopFM does it: `loopfm_ray.models.joint`.
    """

    def __init__(self, config: BottleneckConfig, in_dim: int) -> None:
        super().__init__()
        latent_dim = in_dim if config.latent_dim is None else config.latent_dim
        if latent_dim > in_dim:
            raise ConfigError(
                f"bottleneck.latent_dim must be at most the embedding's {in_dim}, found {latent_dim};"
                " lower it or take wider embedding_layers"
            )
        self.config, self.in_dim = config, in_dim
        self.latent_dim, self.prefixes = latent_dim, config.prefixes or (latent_dim,)
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.register_buffer("weight", torch.ones(in_dim))
        self.register_buffer("step", torch.zeros(latent_dim))
        self.encoder = nn.Linear(in_dim, latent_dim)
        self.hidden = _mlp(in_dim, config.hidden, latent_dim) if config.hidden else None
        self.decoders = nn.ModuleDict({str(p): nn.Linear(p, in_dim) for p in self.prefixes})
        self.predictors = nn.ModuleDict(
            {str(p): _mlp(p, config.predict_hidden, 1) for p in self.prefixes}
            if config.predict_weight
            else {}
        )

    mean: Tensor
    std: Tensor
    weight: Tensor
    step: Tensor
    """[latent_dim] distance of two codes, which rounding in training knows; 0 until `set_step`."""

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
        """Return [] the sum over prefixes of the weighted reconstruction and prediction terms.

        Args:
            embedding: [B, D] FM embeddings; take no gradient.
            target: [B] FM probabilities; needed with `predict_weight`.
        """
        config, normal = self.config, self.standardise(embedding)
        latent = self._rounded(self.encode(embedding))
        terms = []
        if config.reconstruct_weight:
            terms += [
                config.reconstruct_weight * functional.mse_loss(self.decode(latent, prefix), normal)
                for prefix in self.prefixes
            ]
        if config.predict_weight:
            if target is None:
                raise DataError("bottleneck.predict_weight needs the FM's predictions, found none")
            terms += [
                config.predict_weight * self._prediction_loss(latent, prefix, target.detach())
                for prefix in self.prefixes
            ]
        return torch.stack(terms).sum()

    def set_step(self, scale: Sequence[float], bits: int) -> None:
        """Take over how far apart codes of `bits` lie, from the scale of each dimension."""
        self.step.copy_(torch.tensor(scale) / 2 ** (bits - 1))

    def _prediction_loss(self, latent: Tensor, prefix: int, target: Tensor) -> Tensor:
        logit = self.predictors[str(prefix)](latent[..., :prefix])[:, 0]
        return functional.binary_cross_entropy_with_logits(logit, target)

    def _rounded(self, latent: Tensor) -> Tensor:
        """Return latents as training shall meet them after the store."""
        if self.config.rounding == "none" or not self.training:
            return latent
        if self.config.rounding == "noise":
            return latent + (torch.rand_like(latent) - 0.5) * self.step
        step = self.step.clamp_min(1e-12)
        stored = torch.where(self.step > 0, torch.round(latent / step) * step, latent)
        return latent + (stored - latent).detach()

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
        self._set_std(std)
        if sensitivity is not None:
            self.weight.copy_(_weights(std, sensitivity))
        components, variance = self._components(self.standardise(sample).double())
        turn = self._turn()
        reach = self.config.spread * variance.sqrt()
        self._start((components / reach) @ turn, (components * reach) @ turn)

    @torch.no_grad()
    def initialise_at_random(self) -> None:
        """Start as random directions at right angles, for embeddings of which nothing is known yet.

        A standardised embedding has a spread of 1 along a random direction, so `spread` reaches as far as it does along
        principal components. Each decoder gives the embedding's projection on the directions of its prefix.
        """
        directions = nn.init.orthogonal_(torch.empty(self.in_dim, self.latent_dim))
        self._start(directions / self.config.spread, directions * self.config.spread)

    def _start(self, encoder: Tensor, decoder: Tensor) -> None:
        """Set weights from [D, latent_dim] columns that encode and that decode; a hidden layer adds nothing yet."""
        self.encoder.weight.copy_(encoder.T)
        self.encoder.bias.zero_()
        if self.hidden is not None:
            for parameter in self.hidden[-1].parameters():
                parameter.zero_()
        for prefix in self.prefixes:
            layer = self.decoders[str(prefix)]
            layer.get_parameter("weight").copy_(decoder[:, :prefix])
            layer.get_parameter("bias").zero_()

    @torch.no_grad()
    def set_moments(self, mean: Tensor, variance: Tensor) -> None:
        """Standardise by mean and variance [D] from now on."""
        self.mean.copy_(mean)
        self._set_std(variance.sqrt())

    def _set_std(self, std: Tensor) -> None:
        self.std.copy_(torch.where(std > _MIN_STD, std, 1.0))

    def _components(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Return [D, latent_dim] the principal components of [N, D] and [latent_dim] their variance."""
        values, vectors = torch.linalg.eigh(normal.T @ normal / len(normal))
        components = vectors.flip(1)[:, : self.latent_dim]
        # The sign of an eigenvector is free: fix it, so that every machine starts alike.
        largest = components.abs().argmax(0)
        components = components * components[largest, torch.arange(self.latent_dim)].sign()
        return components, values.flip(0)[: self.latent_dim].clamp_min(_MIN_STD**2)

    def _turn(self) -> Tensor:
        """Return [latent_dim, latent_dim] an orthogonal map that mixes no two prefixes' own numbers."""
        turn = torch.eye(self.latent_dim, dtype=torch.float64)
        if self.config.rotation == "none":
            return turn
        generator = torch.Generator().manual_seed(_ROTATION_SEED)
        start = 0
        for stop in self.prefixes:
            size = stop - start
            square = torch.randn(size, size, generator=generator, dtype=torch.float64)
            turn[start:stop, start:stop] = torch.linalg.qr(square)[0]
            start = stop
        return turn


def build_bottleneck(config: BottleneckConfig, in_dim: int) -> Bottleneck:
    """Build the bottleneck of embeddings [B, in_dim]."""
    return Bottleneck(config, in_dim)


def _mlp(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    if not hidden:
        return nn.Sequential(nn.Linear(in_dim, out_dim))
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


def _weights(std: Tensor, sensitivity: Tensor) -> Tensor:
    """Return [D] how far the logit moves when a dimension moves by its spread, scaled to a mean square of 1."""
    reach = std * sensitivity.float().sqrt()
    size = reach.square().mean().sqrt()
    if not bool(size > 0):
        raise DataError("the FM's logit does not depend on the embedding_layers; choose others")
    return reach / size
