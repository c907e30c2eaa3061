"""Numbers that depend on a key alone: where it belongs and what its row begins with, however many processes there are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["fill_rows", "initial_rows", "mix"]

_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The multipliers of splitmix64 as signed numbers: 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB."""
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK_ROWS = 1 << 16


def mix(keys: Tensor) -> Tensor:
    """Return int64 of the same shape: a bijection that spreads keys evenly.

    Source: the finalizer of splitmix64, Steele, Lea and Flood, OOPSLA 2014.
    """
    keys = (keys ^ _shift(keys, 30)) * _FACTORS[0]
    keys = (keys ^ _shift(keys, 27)) * _FACTORS[1]
    return keys ^ _shift(keys, 31)


def initial_rows(keys: NDArray[np.int64], dim: int, std: float, seed: int) -> Tensor:
    """Return [n, dim] float32: normal noise that depends on key and seed alone.

    Args:
        keys: [n] one of each row.
        dim: width.
        std: standard deviation; 0 gives zeros.
        seed: another seed, other noise.
    """
    if std == 0:
        return torch.zeros(len(keys), dim)
    pairs = -(-dim // 2)
    with np.errstate(over="ignore"):
        start = _mix(keys.astype(np.uint64) + np.uint64((seed * _GOLDEN) % 2**64))
        places = np.arange(1, pairs + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mix(start[:, None] + places)
    # Box and Muller: two uniform numbers of 32 bits each give two normal ones
    first = ((bits >> np.uint64(32)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2**-32)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.minimum(first, np.float32(1.0)))) * np.float32(
        std
    )
    result = np.empty((len(keys), 2 * pairs), np.float32)
    np.multiply(radius, np.cos(angle), out=result[:, :pairs])
    np.multiply(radius, np.sin(angle), out=result[:, pairs:])
    return torch.from_numpy(result[:, :dim])


def fill_rows(table: Tensor, first: int, stride: int, std: float, seed: int) -> None:
    """Fill a table [n, D] whose row i has the key `first + i * stride` with its initial rows, block by block."""
    for start in range(0, len(table), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(table))
        keys = first + np.arange(start, stop, dtype=np.int64) * stride
        table[start:stop] = initial_rows(keys, table.shape[1], std, seed)


def _shift(keys: Tensor, bits: int) -> Tensor:
    """Shift right as if unsigned."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return what `mix` returns."""
    mixed = torch.from_numpy(np.ascontiguousarray(keys).view(np.int64))
    return mix(mixed).numpy().view(np.uint64)
