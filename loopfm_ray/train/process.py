"""What a process that trains or scores sets up for itself once."""

import ctypes
import sys

import torch

__all__ = ["set_up_process"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGEST = 1 << 30


def set_up_process() -> None:
    """Take one thread, and keep memory that tensors give back instead of returning it to the system.

    By default glibc maps each large tensor anew, so that a step spends a fifth of its time on the first touch of its pages.
    The process keeps the most memory that it ever had until it ends.
    """
    torch.set_num_threads(1)
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
