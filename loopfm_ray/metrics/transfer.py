"""How much of one model's improvement reaches another."""

from loopfm_ray.errors import MetricError

__all__ = ["gain", "relative_gain", "transfer_ratio_first_launch", "transfer_ratio_upgrade"]


def gain(baseline: float, value: float, *, is_lower_better: bool) -> float:
    """Return the improvement of `value` over `baseline`, positive when better.

    Both are the same metric on the same rows.
    """
    return baseline - value if is_lower_better else value - baseline


def relative_gain(baseline: float, value: float, *, is_lower_better: bool) -> float:
    """Return `gain` as a share of the baseline.

    Raises:
        MetricError: the baseline is not positive.
    """
    if baseline <= 0:
        raise MetricError(f"relative gain needs a positive baseline, found {baseline}")
    return gain(baseline, value, is_lower_better=is_lower_better) / baseline


def transfer_ratio_first_launch(*, ne_vm: float, ne_vm_transfer: float, ne_fm: float) -> float:
    """Return the share of the FM's lead over the plain VM that transfer gives to the VM.

    `(ne_vm - ne_vm_transfer) / (ne_vm - ne_fm)`, all on the same test rows.

    Raises:
        MetricError: the FM does not beat the plain VM.
    """
    return _ratio(ne_vm - ne_vm_transfer, ne_vm - ne_fm, "the FM must have a lower NE than the VM")


def transfer_ratio_upgrade(
    *, ne_vm_old: float, ne_vm_new: float, ne_fm_old: float, ne_fm_new: float
) -> float:
    """Return the share of an FM upgrade's improvement that reaches the VM.

    `(NE of the VM under FM1 - under FM2) / (NE of FM1 - of FM2)`, all on the same test rows.

    Raises:
        MetricError: the new FM does not beat the old one.
    """
    return _ratio(
        ne_vm_old - ne_vm_new, ne_fm_old - ne_fm_new, "the new FM must have a lower NE than the old"
    )


def _ratio(numerator: float, denominator: float, expected: str) -> float:
    if not denominator > 0:
        raise MetricError(
            f"transfer ratio is undefined: {expected}, found a difference of {denominator};"
            " train the FM longer or with more features"
        )
    return numerator / denominator
