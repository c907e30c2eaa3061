"""Three windows in time, each learning window with a validation part at its end."""

from dataclasses import dataclass
from datetime import UTC, datetime

from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_S, TimeRange

__all__ = ["Splits", "format_ts", "make_splits"]


@dataclass(frozen=True)
class Splits:
    """The windows of one data set; `fm` is `fm_train` then `fm_valid`, `vm` is `vm_train` then `vm_valid`."""

    fm: TimeRange
    vm: TimeRange
    test: TimeRange
    fm_train: TimeRange
    fm_valid: TimeRange
    vm_train: TimeRange
    vm_valid: TimeRange


def format_ts(ts: int) -> str:
    """Return microseconds UTC as ISO text, for messages."""
    try:
        return datetime.fromtimestamp(ts / MICROS_PER_S, tz=UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{ts} us"


def make_splits(
    log: tuple[int, int],
    *,
    start_ts: int | None,
    fm_stop_ts: int,
    vm_stop_ts: int,
    test_stop_ts: int | None,
    valid_us: int,
) -> Splits:
    """Return the windows of a log whose first and last events are at `log`.

    Args:
        log: times of the first and the last event.
        start_ts: start of the FM window; None is the first event.
        fm_stop_ts: where the FM window ends and the VM window starts.
        vm_stop_ts: where the VM window ends and the test window starts.
        test_stop_ts: end of the test window; None is just after the last event.
        valid_us: length of the validation part of the FM window and of the VM window.

    Raises:
        ConfigError: a window would be empty or the log ends before the FM window does.
    """
    min_ts, max_ts = log
    start = min_ts if start_ts is None else start_ts
    stop = max_ts + 1 if test_stop_ts is None else test_stop_ts
    if fm_stop_ts > max_ts:
        raise ConfigError(
            f"data.split.fm_stop is {format_ts(fm_stop_ts)}: a snapshot trained until then is newer than the"
            f" events, the last is at {format_ts(max_ts)}; set fm_stop and vm_stop earlier"
        )
    if fm_stop_ts <= min_ts:
        raise ConfigError(
            f"data.split.fm_stop is {format_ts(fm_stop_ts)}, before the first event at {format_ts(min_ts)}:"
            " the FM has nothing to learn from; set fm_stop later"
        )
    if vm_stop_ts > max_ts:
        raise ConfigError(
            f"data.split.vm_stop is {format_ts(vm_stop_ts)}, after the last event at {format_ts(max_ts)}:"
            " the test window is empty; set vm_stop earlier"
        )
    return Splits(
        fm=_window("fm", start, fm_stop_ts),
        vm=_window("vm", fm_stop_ts, vm_stop_ts),
        test=_window("test", vm_stop_ts, stop),
        fm_train=_window("fm_train", start, fm_stop_ts - valid_us),
        fm_valid=_window("fm_valid", max(start, fm_stop_ts - valid_us), fm_stop_ts),
        vm_train=_window("vm_train", fm_stop_ts, vm_stop_ts - valid_us),
        vm_valid=_window("vm_valid", max(fm_stop_ts, vm_stop_ts - valid_us), vm_stop_ts),
    )


def _window(name: str, start_ts: int, stop_ts: int) -> TimeRange:
    if stop_ts <= start_ts:
        raise ConfigError(
            f"data.split: the {name} window would be empty, it runs from {format_ts(start_ts)} to"
            f" {format_ts(stop_ts)}; move fm_stop or vm_stop, or make valid_s smaller"
        )
    return TimeRange(start_ts, stop_ts)
