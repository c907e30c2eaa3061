"""How far earlier knowledge is to be trusted: a weight in [0, 1] for each question and each of its candidates.

The candidates of a question are those that its earlier self scored best. The semantic module is a small network that reads only
what does not depend on the scale of scores, so it goes with any backbone. Beside the model it learns to tell the known answers
from the other candidates by what the earlier self said; where it is in doubt, that knowledge is filtered out.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.config import Config

__all__ = [
    "AnyConfidenceConfig",
    "ConfidenceConfig",
    "EvenConfig",
    "RuleConfig",
    "SemanticConfig",
    "SemanticModule",
    "Views",
    "answer_confidence",
    "gate_confidence",
    "gate_loss",
    "standardized",
]

_SMALLEST = 1e-6
"""Standard deviations below it count as it: a new model scores all candidates alike."""
_NUM_FEATURES = 4


class EvenConfig(Config):
    """All knowledge counts alike."""

    kind: Literal["even"] = "even"


class RuleConfig(Config):
    """A question counts as much as its earlier self knew the known answers; its candidates count alike."""

    kind: Literal["probability", "rank"] = "probability"
    """`probability`: the softmax over the candidates, summed over the known answers; `rank`: 1 / rank of the best of them."""


class SemanticConfig(Config):
    """A learned gate."""

    kind: Literal["semantic"] = "semantic"
    hidden: PositiveInt = 16
    """Width of its one hidden layer."""
    lr: PositiveFloat = 0.01
    """Learning rate of its Adam."""
    sharpness: NonNegativeFloat = 1.0
    """Power of a candidate's confidence `|2 g - 1|`, g the gate's probability; 0 lets all candidates pass."""


AnyConfidenceConfig = EvenConfig | RuleConfig | SemanticConfig
ConfidenceConfig = Annotated[AnyConfidenceConfig, Field(discriminator="kind")]
"""The config of the confidence, told by its `kind`."""


@dataclass(frozen=True, eq=False)
class Views:
    """What the earlier and the present self say of the same candidates, without gradient."""

    earlier: Tensor
    """[B, K] scores of the earlier self."""
    present: Tensor
    """[B, K] scores of the present self."""
    is_answer: Tensor
    """[B, K] bool: known answers from training."""

    def features(self) -> Tensor:
        """Return [B, K, 4]: standardised earlier score, its log share of the softmax, standardised present score, and their distance."""
        earlier, present = standardized(self.earlier), standardized(self.present)
        share = torch.log_softmax(self.earlier, -1)
        return torch.stack([earlier, share, present, (earlier - present).abs()], -1)


class SemanticModule(nn.Module):
    """Probability of each candidate to be a known answer, by what the two selves say of it."""

    def __init__(self, hidden: int) -> None:
        """Begin at random."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(_NUM_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, views: Views) -> Tensor:
        """Return [B, K] logits."""
        logits: Tensor = self.layers(views.features())[..., 0]
        return logits


def gate_loss(logits: Tensor, is_answer: Tensor) -> Tensor:
    """Return [] what a semantic module learns by: the binary cross entropy of the known answers [B, K], from its logits."""
    return functional.binary_cross_entropy_with_logits(logits, is_answer.to(logits.dtype))


@torch.no_grad()
def gate_confidence(logits: Tensor, is_answer: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return the confidence in questions [B] and in their candidates [B, K], without gradient.

    With g the gate's probability: of a question, the mean of g over its known answers among the candidates, 0 without one; of
    a candidate, `|2 g - 1|` to the power of `sharpness`, which is 0 where the gate can not tell and 1 where it is sure.
    """
    gate = torch.sigmoid(logits)
    num = is_answer.sum(-1)
    of_question = (gate * is_answer).sum(-1) / num.clamp_min(1)
    return of_question, (2.0 * gate - 1.0).abs() ** sharpness


def answer_confidence(views: Views, kind: Literal["probability", "rank"]) -> Tensor:
    """Return [B] the confidence in questions by a rule of `RuleConfig`; 0 without a known answer among the candidates."""
    if kind == "probability":
        return (torch.softmax(views.earlier, -1) * views.is_answer).sum(-1)
    best = views.earlier.masked_fill(~views.is_answer, -torch.inf).amax(-1, keepdim=True)
    rank = 1 + (views.earlier > best).sum(-1)
    return torch.where(views.is_answer.any(-1), 1.0 / rank, 0.0)


def standardized(scores: Tensor) -> Tensor:
    """Return [B, K] scores less their mean over the row, in units of its standard deviation (divided by K)."""
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).clamp_min(_SMALLEST**2).sqrt()
