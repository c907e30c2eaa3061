import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from loopfm_ray.analysis.scaling import fit_power_law, scaling_record
from loopfm_ray.errors import MetricError

SIZES = np.geomspace(1e4, 1e8, 7)


def law(x, offset, scale, exponent):
    return offset + scale * x**-exponent


def noisy(truth, x, seed, sd=0.002):
    return law(x, *truth) + np.random.default_rng(seed).normal(0, sd, len(x))


@pytest.mark.parametrize(
    ("form", "truth"),
    [
        ("pure", (0.0, 1.3, 0.04)),
        ("pure", (0.0, 0.5, -0.03)),
        ("pure", (0.0, 40.0, 2.5)),
        ("saturating", (0.8, 2.0, 0.3)),
        ("saturating", (0.79, -1.5, 0.25)),
        ("saturating", (-0.2, 0.6, 0.5)),
    ],
)
def test_a_law_without_noise_is_found_again_in_its_form(form, truth):
    fit = fit_power_law(SIZES, law(SIZES, *truth), num_bootstrap=20)
    assert fit.form == form
    assert (fit.offset, fit.scale, fit.exponent) == pytest.approx(truth, rel=1e-4, abs=1e-7)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.predict(3e9) == pytest.approx(law(3e9, *truth), rel=1e-5)
    assert fit.predict([[1e5], [1e6]]).shape == (2, 1)
    assert not fit.is_at_limit
    assert (fit.num_points, fit.num_sizes) == (7, 7)


def least(x, y, is_pure):
    """Return the parameters that SciPy finds from many starts: the slow twin."""
    found = []
    model = (lambda x, b, e: b * x**-e) if is_pure else (lambda x, a, b, e: a + b * x**-e)
    for start in (-0.4, -0.1, 0.05, 0.2, 0.5, 1.0, 2.0):
        first = (y.mean(), start) if is_pure else (y.min(), np.ptp(y), start)
        try:
            best, _ = curve_fit(model, x, y, p0=first, maxfev=20_000)
        except RuntimeError:
            continue
        found.append((((model(x, *best) - y) ** 2).sum(), tuple(best)))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_twin(seed):
    x = np.repeat([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], 2)
    truth = [(0.0, 0.9, 0.1), (0.7, 0.3, 0.8)][seed % 2]
    y = noisy(truth, x, seed, sd=0.003)
    fit = fit_power_law(x, y, num_bootstrap=5)
    error, best = least(x, y, fit.form == "pure")
    assert ((fit.predict(x) - y) ** 2).sum() <= error * (1 + 1e-9)
    mine = (fit.scale, fit.exponent) if fit.form == "pure" else (fit.offset, fit.scale, fit.exponent)  # fmt: skip
    assert mine == pytest.approx(best, rel=1e-3, abs=1e-6)
    assert fit.r2 == pytest.approx(1 - error / ((y - y.mean()) ** 2).sum())


def test_errors_on_sizes_left_out_equal_a_loop():
    x = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 2)
    y = noisy((0.7, 0.3, 0.8), x, 3, sd=0.003)
    fit = fit_power_law(x, y, num_bootstrap=5)
    for is_pure, found in ((True, fit.pure_error), (False, fit.saturating_error)):
        squares = []
        for size in np.unique(x):
            _, best = least(x[x != size], y[x != size], is_pure)
            squares += list((law(size, *((0.0, *best) if is_pure else best)) - y[x == size]) ** 2)
        assert found == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-3)
    assert fit.saturating_error < fit.pure_error
    assert fit.form == "saturating"


@pytest.mark.parametrize("num_per_size", [1, 3])
def test_intervals_hold_the_truth_about_as_often_as_they_say(num_per_size):
    truth, num_simulations = (0.8, 2.0, 0.3), 80
    x = np.repeat(np.geomspace(1e4, 1e8, 7 if num_per_size > 1 else 14), num_per_size)
    fits = [
        fit_power_law(x, noisy(truth, x, seed), num_bootstrap=200, level=0.9, seed=seed)
        for seed in range(num_simulations)
    ]
    hits = [fit.exponent_interval[0] <= truth[2] <= fit.exponent_interval[1] for fit in fits]
    assert 0.75 <= np.mean(hits) <= 0.98
    hits = [
        low <= law(size, *truth) <= high
        for fit in fits
        for size, _, low, high in (fit.curve[0], fit.curve[20], fit.curve[40])
    ]
    assert 0.75 <= np.mean(hits) <= 0.98


def test_more_noise_widens_the_intervals_and_a_lower_level_narrows_them():
    x = np.repeat(SIZES, 3)
    widths = []
    for sd, level in ((0.001, 0.95), (0.004, 0.95), (0.004, 0.5)):
        low, high = fit_power_law(x, noisy((0.8, 2, 0.3), x, 0, sd), level=level).exponent_interval
        widths.append(high - low)
    assert widths[1] > 2.5 * widths[0]
    assert widths[2] < 0.6 * widths[1]


@settings(max_examples=25)
@given(
    factor=st.floats(0.01, 100),
    stretch=st.floats(0.01, 100),
    seed=st.integers(0, 1000),
    is_repeated=st.booleans(),
)
def test_units_of_x_and_y_change_only_the_parameters_that_carry_them(
    factor, stretch, seed, is_repeated
):
    x = np.repeat([1.0, 3.0, 9.0, 27.0, 81.0], 2 if is_repeated else 1)
    y = noisy((0.7, 0.3, 0.6), x, seed, sd=0.002)
    fit = fit_power_law(x, y, num_bootstrap=20)
    scaled = fit_power_law(stretch * x, factor * y, num_bootstrap=20)
    assert scaled.form == fit.form
    assert scaled.exponent == pytest.approx(fit.exponent, rel=1e-4)
    assert scaled.exponent_interval == pytest.approx(fit.exponent_interval, rel=1e-4)
    assert scaled.offset == pytest.approx(factor * fit.offset, rel=1e-4)
    assert scaled.scale == pytest.approx(factor * fit.scale * stretch**fit.exponent, rel=1e-3)
    assert scaled.r2 == pytest.approx(fit.r2, abs=1e-8)
    assert scaled.predict(stretch * x) == pytest.approx(factor * fit.predict(x), rel=1e-5)


def test_the_order_of_the_points_changes_nothing_and_the_seed_only_the_intervals():
    x = np.repeat(SIZES, 2)
    y = noisy((0.8, 2, 0.3), x, 0)
    fit, turned = fit_power_law(x, y), fit_power_law(x[::-1], y[::-1])
    assert fit == turned
    other = fit_power_law(x, y, seed=1)
    assert other.exponent == fit.exponent
    assert other.exponent_interval != fit.exponent_interval


def test_whole_points_are_drawn_when_a_size_has_one_point_only():
    x = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0])
    y = law(x, 0.0, 1.0, 0.2) * np.array([1.01, 0.99, 1, 1, 1, 1.02, 0.99])
    fit = fit_power_law(x, y, num_bootstrap=300)
    assert np.isfinite([fit.scale_interval, fit.exponent_interval]).all()
    assert fit.exponent_interval[0] < fit.exponent < fit.exponent_interval[1]
    assert fit.saturating_error is None
    assert fit.form == "pure"


def test_points_that_do_not_tell_the_exponent_say_so():
    y = 0.7 + 0.02 * np.log(SIZES)
    fit = fit_power_law(SIZES, y - y.max(), num_bootstrap=10)
    assert (fit.form, fit.pure_error) == ("saturating", None)
    assert fit.is_at_limit
    assert fit.exponent == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2, 3], [3, 2, 1], "at least 4 points at 3 different x, found 3 at 3"),
        ([1, 1, 2, 2], [3, 2, 1, 0.5], "at least 4 points at 3 different x, found 4 at 2"),
        ([1, 2, 3, math.inf], [4, 3, 2, 1], "finite numbers, found NaN or infinity"),
        ([1, 2, 3, 4], [4, 3, 2, math.nan], "finite numbers, found NaN or infinity"),
        ([0, 1, 2, 3], [4, 3, 2, 1], "x > 0, found 0"),
        ([1, 2, 3, 4], [1, 1, 1, 1], "y that changes, found 1 everywhere"),
        ([1, 2, 3], [1, 2], r"one y for every x, found shapes \(3,\) and \(2,\)"),
        ([1, 2, 3, 3], [2, 1, 0, 0], "y > 0 or more than 3 different x, found y 0"),
    ],
)
def test_unfit_points_are_an_error(x, y, message):
    with pytest.raises(MetricError, match=message):
        fit_power_law(x, y)


@pytest.mark.parametrize("wrong", [{"num_bootstrap": 0}, {"level": 1.0}, {"level": 0.0}])
def test_unfit_settings_are_an_error(wrong):
    with pytest.raises(MetricError, match="num_bootstrap >= 1 and a level between 0 and 1"):
        fit_power_law([1, 2, 3, 4], [4, 3, 2.5, 2.2], **wrong)


def test_a_record_is_json_with_the_fit_or_the_reason_why_there_is_none():
    points = [(size, law(size, 0.8, 2.0, 0.3)) for size in SIZES[::-1].tolist()]
    record = scaling_record("fm_num_parameters", "ne", points)
    assert json.loads(json.dumps(record)) == record
    assert record["points"] == [list(point) for point in points[::-1]]
    assert record["fit"]["exponent"] == pytest.approx(0.3, rel=1e-4)
    assert len(record["fit"]["curve"]) == 41
    assert record["fit"]["curve"][-1][:2] == pytest.approx([1e8, law(1e8, 0.8, 2.0, 0.3)])
    assert record["reason"] is None
    poor = scaling_record("fm_num_parameters", "ne", points[:2])
    assert poor["fit"] is None
    assert "found 2 at 2" in poor["reason"]
