"""An FM and its bottleneck in one module, so that both are trained at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from loopfm_ray.data.batch import Batch
from loopfm_ray.models.bottleneck import Bottleneck, BottleneckConfig, build_bottleneck
from loopfm_ray.models.foundation import FoundationModel

__all__ = ["JointFm", "JointOutput", "RunningMoments", "build_joint"]

_MOMENTUM = 0.05


@dataclass(frozen=True)
class JointOutput:
    """What an FM and its bottleneck give while they are trained together."""

    logit: Tensor
    """[B, T] of the FM."""
    bottleneck_sum: Tensor
    """[] the bottleneck's loss, summed over rows; its gradient ends at the FM embedding."""


class RunningMoments(nn.Module):
    """Mean and variance of a stream that moves: of all batches at first, then with old batches fading.

    A batch is that of all workers together: every one of them has the same moments after every step.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in the rows [B, D] of this worker; with several workers, all have to call it."""
        # Around the mean so far, the difference of the square and the mean loses no digits.
        moved = values.double() - self.mean
        sums = torch.cat([moved.sum(0), moved.square().sum(0), moved.new_tensor([len(values)])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        shift, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = (square - shift.square()).clamp_min(0.0)
        self.num_batches += 1
        share = (1.0 / self.num_batches.double()).clamp_min(_MOMENTUM)
        # of the mixture of what was seen and this batch, whose means differ too
        mixed = (1 - share) * self.variance + share * variance
        self.variance.copy_(mixed + share * (1 - share) * shift.square())
        self.mean.add_(share * shift)


class JointFm(nn.Module):
    """An FM whose embedding trains a bottleneck at every step, while the FM learns from its own loss alone.

    The embedding is standardised by running moments, which take in the batch first: as it moves with the FM, what was
    measured once would not do.

    Source: LoopFM, arXiv 2605.29280, stage 2: an autoencoder behind a stop-gradient, trained jointly with the FM.
    """

    def __init__(self, fm: FoundationModel, bottleneck: Bottleneck, layers: Sequence[str]) -> None:
        super().__init__()
        self.fm, self.bottleneck, self.layers = fm, bottleneck, tuple(layers)
        self.moments = RunningMoments(bottleneck.in_dim)
        if not bottleneck.config.reconstruct_weight:
            # data parallelism waits for the gradient of every parameter that takes one
            bottleneck.decoders.requires_grad_(False)

    def forward(self, batch: Batch) -> JointOutput:
        """Score a batch, and say how well the bottleneck does on its embeddings."""
        output = self.fm(batch)
        embedding = output.embedding(self.layers).detach()
        if self.training:
            self.moments.update(embedding)
            self.bottleneck.set_moments(self.moments.mean, self.moments.variance)
        prob = torch.sigmoid(output.logit[:, 0].detach())
        loss = self.bottleneck.loss(embedding, prob)
        return JointOutput(output.logit, loss * len(embedding))


def build_joint(fm: FoundationModel, config: BottleneckConfig, layers: Sequence[str]) -> JointFm:
    """Put a bottleneck with a random start behind the named layers of an FM.

    The random numbers that the FM's training draws later stay what they would be without it.

    Raises:
        ConfigError: the FM has no such layers, or they are narrower than the latent.
    """
    with torch.random.fork_rng(devices=[]):
        bottleneck = build_bottleneck(config, fm.embedding_dim(layers))
        bottleneck.initialise_at_random()
    return JointFm(fm, bottleneck, layers)
