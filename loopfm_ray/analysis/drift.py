"""How far apart the embedding spaces of two FM snapshots are, on events that both embedded."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.analysis.alignment import (
    ALIGNMENTS,
    Alignment,
    AlignmentKind,
    explained,
    fit_alignment,
)
from loopfm_ray.errors import ShapeError

__all__ = ["SpaceDrift", "fit_alignments", "linear_cka", "measure_drift"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SpaceDrift:
    """What changed from the latents of one set of events to those of another.

    The unit of lengths is the spread of the old latents: the root mean square distance of an event from the centroid.

    Attributes:
        centroid: distance of the centroids.
        centroid_cosine: 1 - cosine of the centroids.
        covariance: Frobenius norm of the difference of the covariances, over that of the old one.
        displacement: root mean square distance between the two latents of an event; None when the events differ.
        cka: linear centred kernel alignment, 1 for spaces that differ by turning, mirroring and scaling alone; None when
            the events differ.
    """

    centroid: float
    centroid_cosine: float
    covariance: float
    displacement: float | None
    cka: float | None


def measure_drift(new: ArrayLike, old: ArrayLike, *, same_events: bool = True) -> SpaceDrift:
    """Compare latents `new` [N, d] with `old` [M, d]; with `same_events` rows are paired.

    Raises:
        ShapeError: the widths differ, rows do not pair, or there are fewer than two.
    """
    x, y = np.asarray(new, np.float64), np.asarray(old, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ShapeError(
            f"drift needs latents of one width and at least 2 events, found {list(x.shape)} and {list(y.shape)}"
        )
    if same_events and len(x) != len(y):
        raise ShapeError(
            f"drift of the same events needs as many rows, found {len(x)} and {len(y)}"
        )
    centre_x, centre_y = x.mean(0), y.mean(0)
    spread = max(float(np.sqrt(np.square(y - centre_y).sum(1).mean())), 1e-12)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    norms = np.linalg.norm(centre_x) * np.linalg.norm(centre_y)
    return SpaceDrift(
        centroid=float(np.linalg.norm(centre_x - centre_y)) / spread,
        centroid_cosine=float(1.0 - centre_x @ centre_y / max(norms, 1e-300)),
        covariance=float(np.linalg.norm(cov_x - cov_y) / max(float(np.linalg.norm(cov_y)), 1e-300)),
        displacement=float(np.sqrt(np.square(x - y).sum(1).mean())) / spread
        if same_events
        else None,
        cka=linear_cka(x, y) if same_events else None,
    )


def linear_cka(x: Floats, y: Floats) -> float:
    """Return the linear centred kernel alignment of x [N, d] and y [N, e].

    Source: S. Kornblith et al., Similarity of Neural Network Representations Revisited, arXiv 1905.00414, equation 4.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    shared = np.square(x.T @ y).sum()
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / max(float(own), 1e-300))


def fit_alignments(
    new: Floats, old: Floats, is_held_out: NDArray[np.bool_]
) -> Mapping[AlignmentKind, tuple[Alignment, float]]:
    """Return every kind of map, fitted on some events, with the variance that it explains on those held out."""
    fitted = {
        kind: fit_alignment(kind, new[~is_held_out], old[~is_held_out]) for kind in ALIGNMENTS
    }
    return {
        kind: (one, explained(one(new[is_held_out]), old[is_held_out]))
        for kind, one in fitted.items()
    }
