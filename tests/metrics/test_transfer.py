import pytest

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.transfer import (
    gain,
    relative_gain,
    transfer_ratio_first_launch,
    transfer_ratio_upgrade,
)


def test_gain_is_positive_when_better():
    assert gain(0.9, 0.8, is_lower_better=True) == pytest.approx(0.1)
    assert gain(0.7, 0.8, is_lower_better=False) == pytest.approx(0.1)
    assert relative_gain(0.598, 0.6344, is_lower_better=False) == pytest.approx(0.0609, abs=1e-4)


def test_transfer_ratio_of_a_first_launch():
    assert transfer_ratio_first_launch(ne_vm=0.9, ne_vm_transfer=0.85, ne_fm=0.8) == pytest.approx(
        0.5
    )


def test_transfer_ratio_of_an_upgrade():
    ratio = transfer_ratio_upgrade(ne_vm_old=0.9, ne_vm_new=0.88, ne_fm_old=0.8, ne_fm_new=0.76)
    assert ratio == pytest.approx(0.5)


def test_undefined_ratios_are_errors():
    with pytest.raises(MetricError, match="lower NE"):
        transfer_ratio_first_launch(ne_vm=0.8, ne_vm_transfer=0.8, ne_fm=0.8)
    with pytest.raises(MetricError, match="new FM"):
        transfer_ratio_upgrade(ne_vm_old=0.9, ne_vm_new=0.8, ne_fm_old=0.7, ne_fm_new=0.8)
    with pytest.raises(MetricError):
        relative_gain(0.0, 1.0, is_lower_better=False)
