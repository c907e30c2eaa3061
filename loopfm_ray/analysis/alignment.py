"""Maps from the latents of one FM snapshot into the space of another, fitted on events that both embedded."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.errors import ShapeError

__all__ = ["ALIGNMENTS", "Alignment", "AlignmentKind", "explained", "fit_alignment"]

AlignmentKind = Literal["none", "orthogonal", "linear"]
ALIGNMENTS: tuple[AlignmentKind, ...] = get_args(AlignmentKind)
_RIDGE = 1e-4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """An affine map `z W + b` from latents [N, d_new] to latents [N, d_old]."""

    kind: AlignmentKind
    weight: Floats
    """[d_new, d_old]"""
    offset: Floats
    """[d_old]"""

    def __call__(self, latents: ArrayLike) -> NDArray[np.float32]:
        """Return [N, d_old] float32 of latents [N, d_new].

        Raises:
            ShapeError: the latents have another width.
        """
        values = np.asarray(latents, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.weight):
            raise ShapeError(
                f"an alignment maps latents [N, {len(self.weight)}], found {list(values.shape)}"
            )
        return (values @ self.weight + self.offset).astype(np.float32)


def fit_alignment(kind: AlignmentKind, new: ArrayLike, old: ArrayLike) -> Alignment:
    """Fit the map that brings `new` closest to `old` in mean square.

    `none` leaves numbers as they are: the first of them where `new` is wider, zeros behind where it is narrower.
    `orthogonal` moves the centroid, then only turns and mirrors (Procrustes): distances between events stay.
    `linear` is least squares, with a ridge of 1e-4 of the mean variance of `new`.

    Args:
        kind: of map.
        new: [N, d_new] latents of N events.
        old: [N, d_old] latents of the same events.

    Raises:
        ShapeError: the rows do not match, or there are fewer than two.

    Source: P. Schoenemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 31 (1966).
    """
    x, y = _pair(new, old)
    if kind == "none":
        return Alignment(kind, np.eye(x.shape[1], y.shape[1]), np.zeros(y.shape[1]))
    centre_x, centre_y = x.mean(0), y.mean(0)
    x, y = x - centre_x, y - centre_y
    if kind == "orthogonal":
        left, _, right = np.linalg.svd(x.T @ y, full_matrices=False)
        weight = left @ right
    else:
        covariance = x.T @ x
        ridge = _RIDGE * max(float(np.trace(covariance)) / len(covariance), 1e-12)
        weight = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), x.T @ y)
    return Alignment(kind, weight, centre_y - centre_x @ weight)


def explained(mapped: ArrayLike, old: ArrayLike) -> float:
    """Return the share of the variance of `old` [N, d] that `mapped` [N, d] gives back: 1 is all, below 0 is worse than the centroid.

    Raises:
        ShapeError: the rows do not match, or there are fewer than two.
    """
    x, y = _pair(mapped, old)
    total = np.square(y - y.mean(0)).sum()
    return float(1.0 - np.square(x - y).sum() / max(total, 1e-300))


def _pair(new: ArrayLike, old: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(new, np.float64), np.asarray(old, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ShapeError(
            f"two spaces are compared on the same events, at least 2, found {list(x.shape)} and {list(y.shape)}"
        )
    return x, y
