import numpy as np
import pytest

from loopfm_ray.errors import ConfigError
from loopfm_ray.history.times import available_from, delay_to_us, is_visible, visible_from


def test_availability_waits_for_delay_and_label():
    event_ts = np.array([10, 20, 30])
    assert available_from(event_ts, None, 5).tolist() == [15, 25, 35]
    assert available_from(event_ts, np.array([10, 40, 36]), 5).tolist() == [15, 40, 36]


def test_visible_is_strict_in_event_time_and_not_in_availability():
    event_ts, available_ts = np.array([10, 10, 10]), np.array([10, 11, 12])
    assert is_visible(event_ts, available_ts, 10).tolist() == [False, False, False]
    assert is_visible(event_ts, available_ts, 11).tolist() == [True, True, False]


def test_visible_from_is_the_first_instant_of_visibility():
    event_ts, available_ts = np.array([10, 10, 10]), np.array([10, 11, 15])
    first = visible_from(event_ts, available_ts)
    assert is_visible(event_ts, available_ts, first).all()
    assert not is_visible(event_ts, available_ts, first - 1).any()


def test_delay_is_rounded_to_microseconds_and_not_negative():
    assert delay_to_us(0.0000015) == 2
    with pytest.raises(ConfigError, match="found -1"):
        delay_to_us(-1)
    with pytest.raises(ConfigError):
        delay_to_us(float("nan"))
