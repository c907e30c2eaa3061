"""Where the gain of the FM's history comes from, in nats, measured with fitted models on held-out rows.

Four models of the same architecture see the VM's own fields `x`; with them nothing else, the raw history `H`, the FM's
history `S`, or both. Their loglosses stand for the conditional entropies of the label, so that

```text
I_temporal = I(H; y | x)     = L(x)   - L(x,H)      what the raw history tells
I_loopfm   = I(S; y | x)     = L(x)   - L(x,S)      what the FM's history tells
I_cross    = I(S; y | x, H)  = L(x,H) - L(x,H,S)    what the FM adds to the raw history
I_residual = I(H; y | x, S)  = L(x,S) - L(x,H,S)    what the channel lost of the raw history
I_loopfm   = I_temporal + I_cross - I_residual      the chain rule, exact for any four loglosses
```

A model that learns badly makes a term too small, even negative: these are estimates of what models of this kind find.

Source: LoopFM, arXiv 2605.29280, theorem 1 and corollary 10.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import PROB_EPSILON, as_columns

__all__ = [
    "FM",
    "INPUTS",
    "Decomposition",
    "Estimate",
    "bootstrap_means",
    "decompose",
    "estimate_difference",
    "row_logloss",
]

INPUTS = ("x", "xh", "xs", "xhs")
"""What the four models see."""
LADDER = ("code", "latent", "embedding", "code_raw", "embedding_raw")
"""What the models of a ladder read."""
FM = "fm"
"""Where the losses of the FM are, if they are given."""
_NUM_DRAWS = 1000
_CHUNK = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure in nats with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Decomposition:
    """The four terms, and the bounds that follow from them.

    Attributes:
        temporal: I(H; y | x).
        cross: I(S; y | x, H).
        residual: I(H; y | x, S).
        loopfm: I(S; y | x).
        tau: residual / temporal: the share of the raw history's information that the channel lost; None where the
            raw history tells nothing.
        transfer_ratio: loopfm / (L(x) - L(FM)): the share of the FM's lead over the plain VM that its history carries over,
            in logloss; None without the FM's losses, or where the FM does not lead. By the chain rule it equals the
            lower bound of theorem 2, `((1 - tau) I_temporal + I_cross) / teacher gain`, with tau as estimated here.
        num_rows: rows measured on.
        num_users: users among them.
    """

    temporal: Estimate
    cross: Estimate
    residual: Estimate
    loopfm: Estimate
    tau: float | None
    transfer_ratio: Estimate | None
    num_rows: int
    num_users: int


@dataclass(frozen=True)
class Ladder:
    """What each step of the channel loses, in nats.

    Attributes:
        representation: L(x, E) - L(x, H, E): what the FM's embeddings E do not tell of the raw history H.
        autoencoder: L(x, Z) - L(x, E): what the latents Z lose of the embeddings.
        quantisation: L(x, S) - L(x, Z): what the stored codes S lose of the latents.
        total: their sum, L(x, S) - L(x, H, E): an upper bound of what the whole channel lost of the raw history,
            I(H; y | x, S), since S is made of E.
        residual: L(x, S) - L(x, H, S), that loss itself.
        num_rows: rows measured on.
        num_users: users among them.
    """

    representation: Estimate
    autoencoder: Estimate
    quantisation: Estimate
    total: Estimate
    residual: Estimate
    num_rows: int
    num_users: int


def ladder(losses: Mapping[str, Floats], user: NDArray[np.integer], seed: int = 0) -> Ladder:
    """Split what the channel lost of the raw history over its steps.

    Args:
        losses: [N] row loglosses, on the same rows in the same order, of the VMs that read the codes (`code`), the latents
            (`latent`), the embeddings (`embedding`), the raw history beside the codes (`code_raw`) and beside the embeddings
            (`embedding_raw`).
        user: [N] whose row it is; users are drawn with replacement for the intervals.
        seed: of the draws.

    Raises:
        MetricError: a model is missing, or rows do not fit.

    Source: LoopFM, arXiv 2605.29280, proposition 7.
    """
    stacked = _stack(losses, LADDER, user)
    whole, drawn = stacked.mean(0), bootstrap_means(stacked, np.asarray(user), seed)
    place = {name: index for index, name in enumerate(LADDER)}
    steps = {
        "representation": ("embedding", "embedding_raw"),
        "autoencoder": ("latent", "embedding"),
        "quantisation": ("code", "latent"),
        "total": ("code", "embedding_raw"),
        "residual": ("code", "code_raw"),
    }
    found = {
        name: estimate_difference(whole, drawn, place[before], place[after])
        for name, (before, after) in steps.items()
    }
    return Ladder(**found, num_rows=len(stacked), num_users=len(np.unique(user)))


def row_logloss(label: ArrayLike, prob: ArrayLike) -> Floats:
    """Return [N] the logloss of each row, natural log."""
    label, prob = as_columns(label, prob)
    clipped = np.clip(prob, PROB_EPSILON, 1.0 - PROB_EPSILON)
    loss: Floats = -(label * np.log(clipped) + (1.0 - label) * np.log1p(-clipped))
    return loss


def decompose(
    losses: Mapping[str, Floats], user: NDArray[np.integer], seed: int = 0
) -> Decomposition:
    """Return the terms from the row loglosses of the four models.

    Args:
        losses: [N] for each of `INPUTS`, and of `FM` where the transfer ratio is asked for, on the same rows in the same
            order; means over seeds are welcome.
        user: [N] whose row it is; users are drawn with replacement for the intervals.
        seed: of the draws.

    Raises:
        MetricError: a model is missing, or rows do not fit.
    """
    stacked = _stack(losses, [*INPUTS, FM] if FM in losses else INPUTS, user)
    whole = stacked.mean(0)
    drawn = bootstrap_means(stacked, np.asarray(user), seed)
    terms = {"temporal": (0, 1), "cross": (1, 3), "residual": (2, 3), "loopfm": (0, 2)}
    found = {name: estimate_difference(whole, drawn, *places) for name, places in terms.items()}
    temporal = found["temporal"].value
    return Decomposition(
        **found,
        tau=found["residual"].value / temporal if temporal > 0 else None,
        transfer_ratio=_transfer_ratio(whole, drawn),
        num_rows=len(stacked),
        num_users=len(np.unique(user)),
    )


def _stack(
    losses: Mapping[str, Floats], models: Sequence[str], user: NDArray[np.integer]
) -> Floats:
    """Return [N, M] the losses of `models`, checked."""
    lengths = {len(losses[name]) for name in models if name in losses} | {len(user)}
    if any(name not in losses for name in models) or len(lengths) != 1 or not len(user):
        raise MetricError(
            f"the decomposition needs loglosses of {tuple(models)} on the same rows, found {sorted(losses)} with lengths"
            f" {sorted(lengths)}; score all of them on the same test rows"
        )
    return np.stack([np.asarray(losses[name], np.float64) for name in models], axis=1)


def estimate_difference(whole: Floats, drawn: Floats, before: int, after: int) -> Estimate:
    """Return the mean of column `before` less that of `after`, from means [M] and drawn means [draws, M]."""
    low, high = np.quantile(drawn[:, before] - drawn[:, after], [0.025, 0.975])
    return Estimate(float(whole[before] - whole[after]), float(low), float(high))


def _transfer_ratio(whole: Floats, drawn: Floats) -> Estimate | None:
    """Return the share of the FM's lead that its history carries over, from mean losses of `INPUTS` and of the FM."""
    if len(whole) == len(INPUTS) or not whole[0] > whole[-1]:
        return None
    lead = drawn[:, 0] - drawn[:, -1]
    # a draw in which the FM does not lead says that any ratio may be
    ratios = np.where(lead > 0, (drawn[:, 0] - drawn[:, 2]) / np.where(lead > 0, lead, 1.0), np.inf)
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    value = (whole[0] - whole[2]) / (whole[0] - whole[-1])
    return Estimate(float(value), float(low), float(high))


def bootstrap_means(values: Floats, user: NDArray[np.integer], seed: int = 0) -> Floats:
    """Return [draws, M] means of [N, M] over users drawn with replacement, all rows of a drawn user along."""
    _, place = np.unique(user, return_inverse=True)
    count = np.bincount(place).astype(np.float64)
    sums = np.stack([np.bincount(place, column) for column in values.T], axis=1)
    generator = np.random.default_rng(seed)
    shares = np.full(len(count), 1.0 / len(count))
    drawn = []
    for begin in range(0, _NUM_DRAWS, _CHUNK):
        weight = generator.multinomial(len(count), shares, min(_CHUNK, _NUM_DRAWS - begin))
        drawn.append((weight @ sums) / (weight @ count)[:, None])
    return np.concatenate(drawn)
