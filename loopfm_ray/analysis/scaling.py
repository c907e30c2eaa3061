"""How a metric changes with size: power laws, with intervals from a bootstrap.

The law is `y = offset + scale * x ** -exponent`, in two forms. The pure one has offset 0. The saturating one has an
offset that y comes near to as x grows, from above (`scale` > 0, a loss) or from below (`scale` < 0, an AUC).

What is minimised is the sum of squared errors of y itself, every point with the same weight. A line through the
logarithms would weight the points by 1 / y ** 2 and can not have an offset. For a given exponent the rest is linear
least squares, so the search is over the exponent alone, for all bootstrap samples at once.

The bootstrap draws again within each x when every x has several points: their deviations from the mean of that x, widened
by sqrt(n / (n - 1)), since deviations from a mean of n points are too small. Else it draws whole points, and draws again
when fewer than three different x are left. All samples are fitted in the form that was chosen, so the intervals do not
hold the doubt about the form, and with few points they are rather too narrow: the tests count how often they hold the truth.

Source: Kaplan et al. 2020, arXiv 2001.08361, equation 1.1 (pure); Hoffmann et al. 2022, arXiv 2203.15556, equation 2 with
one of its two sizes (saturating). The latter minimise a Huber loss of the logarithm of the loss, not squares of the loss.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.errors import MetricError

__all__ = ["Form", "PowerLawFit", "fit_power_law", "scaling_record"]

Form = Literal["pure", "saturating"]
Floats = NDArray[np.float64]

_GRIDS: dict[Form, Floats] = {
    "pure": np.linspace(-5.0, 5.0, 401),
    "saturating": np.geomspace(0.01, 5.0, 200),
}
"""The exponents that are tried first; the ends are the limits of the search."""
_STEPS = np.linspace(0.0, 1.0, 9)
_NUM_ZOOMS = 14
_NUM_CURVE_POINTS = 41
_MIN_POINTS, _MIN_SIZES = 4, 3


@dataclass(frozen=True)
class PowerLawFit:
    """The fit of `y = offset + scale * x ** -exponent`.

    Attributes:
        form: "pure" (offset 0) or "saturating"; the one with the smaller error on sizes left out.
        offset: where y ends as x grows; 0 in the pure form.
        scale: what is above the offset at x = 1; negative when y rises to its offset.
        exponent: how fast; positive in the saturating form.
        offset_interval: low and high of `level`, percentiles of the bootstrap.
        scale_interval: the same of the scale.
        exponent_interval: the same of the exponent.
        level: of the intervals, such as 0.95.
        num_bootstrap: samples behind the intervals. All are fitted in the chosen form.
        r2: share of the variance of y that the fit explains.
        pure_error: root mean squared error on the points of one x, fitted to all others; None where y <= 0.
        saturating_error: the same of the saturating form; None with three different x, which leave two for three numbers.
        num_points: points.
        num_sizes: different x.
        is_at_limit: the exponent stands at an end of the search, so the points do not tell it.
        curve: (x, y, low, high) over the range of x: the fit and the interval of its value.
    """

    form: Form
    offset: float
    scale: float
    exponent: float
    offset_interval: tuple[float, float]
    scale_interval: tuple[float, float]
    exponent_interval: tuple[float, float]
    level: float
    num_bootstrap: int
    r2: float
    pure_error: float | None
    saturating_error: float | None
    num_points: int
    num_sizes: int
    is_at_limit: bool
    curve: tuple[tuple[float, float, float, float], ...]

    def predict(self, x: ArrayLike) -> Floats:
        """Return y of the fit at `x` (> 0), in its shape."""
        return np.asarray(
            self.offset + self.scale * np.asarray(x, np.float64) ** -self.exponent, np.float64
        )


@dataclass(frozen=True)
class _Laws:
    """One law for each sample, all [S]: `y = offset + scale * exp(-exponent * t)`, t the centred logarithm of x."""

    offset: Floats
    scale: Floats
    exponent: Floats

    def at(self, t: Floats) -> Floats:
        """Return [S, len(t)]."""
        growth = np.exp(-self.exponent[:, None] * t)
        return np.asarray(self.offset[:, None] + self.scale[:, None] * growth, np.float64)


def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    num_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PowerLawFit:
    """Fit both forms of the law to points and return the one that predicts a size it has not seen better.

    The order of the points changes nothing. One point far off moves the fit: leave diverged trainings out.

    Args:
        x: sizes, > 0; several points may share one.
        y: the metric, rising or falling with x.
        num_bootstrap: samples for the intervals.
        level: share of the samples inside an interval.
        seed: of the bootstrap.

    Raises:
        MetricError: fewer than four points or three different x, an x <= 0, a number that is not finite, y all
            equal, or three different x with a y <= 0, which no form can be tested on.
    """
    _check_settings(num_bootstrap, level)
    sizes, values = _checked(x, y)
    centre = float(np.log(sizes).mean())
    t = np.log(sizes) - centre
    errors = {form: _left_out_error(form, t, values) for form in _forms(sizes, values)}
    form = _choice(errors, float(values.std()))
    fit = _solve(form, t, values[None], np.ones((1, len(t))))
    samples = _solve(form, t, *_resampled(t, values, num_bootstrap, seed))
    ends = np.array([0.5 - level / 2, 0.5 + level / 2])
    return PowerLawFit(
        form=form,
        offset=float(fit.offset[0]),
        scale=_scale_at_one(fit, centre)[0].item(),
        exponent=float(fit.exponent[0]),
        offset_interval=_interval(samples.offset, ends),
        scale_interval=_interval(_scale_at_one(samples, centre), ends),
        exponent_interval=_interval(samples.exponent, ends),
        level=level,
        num_bootstrap=num_bootstrap,
        r2=1.0 - float(((values - fit.at(t)[0]) ** 2).mean() / values.var()),
        pure_error=errors.get("pure"),
        saturating_error=errors.get("saturating"),
        num_points=len(t),
        num_sizes=len(np.unique(t)),
        is_at_limit=_is_at_limit(form, float(fit.exponent[0])),
        curve=_curve(fit, samples, t, centre, ends),
    )


# Any: JSON of the summary of a sweep
def scaling_record(
    x_name: str, y_name: str, points: Sequence[tuple[float, float]], *, seed: int = 0
) -> dict[str, Any]:
    """Return what the summary of a sweep says of one metric by one size, as JSON.

    Returns:
        `x` and `y` (the names), `points`, `fit` (the fields of `PowerLawFit`) and `reason`: why there is no fit.
    """
    # Any: JSON
    record: dict[str, Any] = {
        "x": x_name,
        "y": y_name,
        "points": sorted([float(x), float(y)] for x, y in points),
        "fit": None,
        "reason": None,
    }
    try:
        fit = fit_power_law([x for x, _ in points], [y for _, y in points], seed=seed)
    except MetricError as error:
        return {**record, "reason": str(error)}
    return {**record, "fit": json.loads(json.dumps(asdict(fit)))}


def _check_settings(num_bootstrap: int, level: float) -> None:
    if num_bootstrap < 1 or not 0 < level < 1:
        raise MetricError(
            "a power law needs num_bootstrap >= 1 and a level between 0 and 1,"
            f" found {num_bootstrap} and {level}"
        )


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    """Return the points in order of x and y."""
    sizes, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if sizes.ndim != 1 or sizes.shape != values.shape:
        raise MetricError(
            f"a power law needs one y for every x, found shapes {sizes.shape} and {values.shape}"
        )
    if not (np.isfinite(sizes).all() and np.isfinite(values).all()):
        raise MetricError(
            "a power law needs finite numbers, found NaN or infinity; leave such points out"
        )
    num_sizes = len(np.unique(sizes))
    if len(sizes) < _MIN_POINTS or num_sizes < _MIN_SIZES:
        raise MetricError(
            f"a power law needs at least {_MIN_POINTS} points at {_MIN_SIZES} different x,"
            f" found {len(sizes)} at {num_sizes}; run more sizes"
        )
    if sizes.min() <= 0:
        raise MetricError(f"a power law needs x > 0, found {sizes.min():g}")
    if values.min() == values.max():
        raise MetricError(f"a power law needs a y that changes, found {values[0]:g} everywhere")
    order = np.lexsort((values, sizes))
    return sizes[order], values[order]


def _forms(sizes: Floats, values: Floats) -> list[Form]:
    """Return the forms whose error on a size left out can be measured."""
    forms: list[Form] = ["pure"] if values.min() > 0 else []
    if len(np.unique(sizes)) > _MIN_SIZES:
        forms.append("saturating")
    if not forms:
        raise MetricError(
            f"a power law needs y > 0 or more than {_MIN_SIZES} different x,"
            f" found y {values.min():g} and {_MIN_SIZES} different x; run more sizes"
        )
    return forms


def _choice(errors: dict[Form, float], spread: float) -> Form:
    """Return the form with the smaller error; of two as good the pure one, which has one number less."""
    if len(errors) == 1:
        return next(iter(errors))
    return "saturating" if errors["saturating"] < errors["pure"] - 1e-6 * spread else "pure"


def _left_out_error(form: Form, t: Floats, values: Floats) -> float:
    sizes = np.unique(t)
    is_left_out = t == sizes[:, None]
    fits = _solve(
        form, t, np.broadcast_to(values, is_left_out.shape), (~is_left_out).astype(np.float64)
    )
    return float(np.sqrt(((fits.at(t) - values)[is_left_out] ** 2).mean()))


def _solve(form: Form, t: Floats, y: Floats, weight: Floats) -> _Laws:
    """Return the law with the least squared error of every sample.

    Args:
        form: with or without offset.
        t: [n] logarithm of x, minus its mean.
        y: [S, n].
        weight: [S, n] how often a point counts; 0 leaves it out.
    """
    grid = _GRIDS[form]
    error, _, _ = _linear(form, grid[None], t, y, weight)
    best = error.argmin(axis=1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    rows = np.arange(len(y))
    for _ in range(_NUM_ZOOMS):
        exponents = low[:, None] + (high - low)[:, None] * _STEPS
        error, base, slope = _linear(form, exponents, t, y, weight)
        best = error.argmin(axis=1)
        low = exponents[rows, np.maximum(best - 1, 0)]
        high = exponents[rows, np.minimum(best + 1, len(_STEPS) - 1)]
    exponent, base, slope = exponents[rows, best], base[rows, best], slope[rows, best]
    if form == "pure":
        return _Laws(base, slope, exponent)
    return _Laws(base - slope / exponent, slope / exponent, exponent)


def _linear(
    form: Form, exponents: Floats, t: Floats, y: Floats, weight: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return the squared error, the constant and the slope of linear least squares at given exponents, each [S, K].

    The regressor is exp(-e t), or (exp(-e t) - 1) / e beside a constant: the same curves, but for a small e the
    second is near to -t and far from the constant, so that the sums below keep their digits.

    Args:
        form: with or without constant.
        exponents: [S, K], or [1, K] for all samples.
        t: [n].
        y: [S, n].
        weight: [S, n].
    """
    power = -exponents[..., None] * t
    is_pure = form == "pure"
    basis = np.exp(power) if is_pure else np.expm1(power) / exponents[..., None]
    total = weight.sum(axis=1)[:, None]
    middle = 0.0 if is_pure else float(y.mean())
    y = y - middle
    sum_b, sum_bb = _dot(basis, weight), _dot(basis**2, weight)
    sum_by = _dot(basis, weight * y)
    sum_y, sum_yy = (weight * y).sum(axis=1)[:, None], (weight * y**2).sum(axis=1)[:, None]
    if not is_pure:
        sum_bb = sum_bb - sum_b**2 / total
        sum_by = sum_by - sum_b * sum_y / total
        sum_yy = sum_yy - sum_y**2 / total
    slope = sum_by / sum_bb
    base = np.zeros_like(slope) if is_pure else (sum_y - slope * sum_b) / total + middle
    return sum_yy - slope * sum_by, base, slope


def _dot(basis: Floats, weight: Floats) -> Floats:
    """Return the sums over points of `basis` [S or 1, K, n] times `weight` [S, n]: [S, K]."""
    return np.asarray((basis @ weight[:, :, None])[..., 0], np.float64)


def _resampled(
    t: Floats, values: Floats, num_samples: int, seed: int
) -> tuple[Floats, NDArray[np.float64]]:
    """Return y and weights of the bootstrap samples, each [S, n]."""
    generator = np.random.default_rng(seed)
    sizes, group, counts = np.unique(t, return_inverse=True, return_counts=True)
    if counts.min() > 1:
        drawn = np.empty((num_samples, len(t)))
        for number, count in enumerate(counts):
            mine = values[group == number]
            deviation = (mine - mine.mean()) * math.sqrt(count / (count - 1))
            picks = generator.integers(count, size=(num_samples, count))
            drawn[:, group == number] = mine.mean() + deviation[picks]
        return drawn, np.ones_like(drawn)
    is_of_size = (group[:, None] == np.arange(len(sizes))).astype(np.int64)
    chance = np.full(len(t), 1 / len(t))
    weight = generator.multinomial(len(t), chance, size=num_samples)
    while (is_poor := ((weight @ is_of_size > 0).sum(axis=1) < _MIN_SIZES)).any():
        weight[is_poor] = generator.multinomial(len(t), chance, size=int(is_poor.sum()))
    return np.broadcast_to(values, weight.shape), weight.astype(np.float64)


def _scale_at_one(laws: _Laws, centre: float) -> Floats:
    return np.asarray(laws.scale * np.exp(laws.exponent * centre), np.float64)


def _is_at_limit(form: Form, exponent: float) -> bool:
    low, high = _GRIDS[form][0], _GRIDS[form][-1]
    return bool(min(exponent - low, high - exponent) < 1e-6)


def _interval(samples: Floats, ends: Floats) -> tuple[float, float]:
    low, high = np.quantile(samples, ends)
    return float(low), float(high)


def _curve(
    fit: _Laws, samples: _Laws, t: Floats, centre: float, ends: Floats
) -> tuple[tuple[float, float, float, float], ...]:
    steps = np.linspace(t.min(), t.max(), _NUM_CURVE_POINTS)
    low, high = np.quantile(samples.at(steps), ends, axis=0)
    table = np.stack([np.exp(steps + centre), fit.at(steps)[0], low, high], axis=1)
    return tuple((row[0], row[1], row[2], row[3]) for row in table.tolist())
