"""Latents as small codes: quantize, pack, unpack and back.

A code `c` of `b` bits stands for `c * scale / 2**(b - 1)`, with `c` from `-2**(b - 1)` to `2**(b - 1) - 1`; with 4 bits
and scale 1 that is `clamp(round(8 z), -8, 7) / 8`. Several codes share a byte, the first in the lowest bits. With 16 bits
the code is the IEEE half float itself.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.errors import ConfigError, DataError, ShapeError, StoreError

__all__ = [
    "CodeSpec",
    "calibrate_scale",
    "decode",
    "dequantize",
    "encode",
    "pack",
    "quantize",
    "unpack",
]

_BITS = (2, 4, 8, 16)
_CLIPS = tuple(0.5 + 0.125 * step for step in range(45))
"""Candidates for the clip of a dimension, in root mean squares: 0.5 to 6."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
# Any: int8 codes, or float16 for 16 bits.
Codes = NDArray[Any]


@dataclass(frozen=True)
class CodeSpec:
    """How a latent of `dim` numbers is stored: `bits` each, with one scale per dimension.

    `scale` None stands for 1 everywhere; half floats (16 bits) take none.
    """

    bits: int
    dim: int
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ConfigError(f"bits of a code must be one of {_BITS}, found {self.bits}")
        if self.dim < 1:
            raise ConfigError(f"dim of a code must be at least 1, found {self.dim}")
        if self.scale is None:
            return
        if self.bits == 16:
            raise ConfigError("codes of 16 bits are half floats and take no scale; give scale None")
        if len(self.scale) != self.dim:
            raise ConfigError(
                f"a code of {self.dim} dimensions needs as many scales, found {len(self.scale)}"
            )
        if not all(math.isfinite(value) and value > 0 for value in self.scale):
            raise ConfigError("scales of a code must be finite and positive; see calibrate_scale")

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of one packed latent."""
        return -(-self.dim * self.bits // 8)

    @cached_property
    def step(self) -> Floats:
        """Float32 [d], or one number: what a code of 1 stands for."""
        made: Floats = _scale(self) / np.float32(2 ** (self.bits - 1))
        made.setflags(write=False)
        return made

    def to_json(self) -> str:
        """Return the spec as JSON text; `from_json` reads it back exactly."""
        return json.dumps(self.to_tree(), sort_keys=True)

    # Any: a JSON tree.
    def to_tree(self) -> dict[str, Any]:
        """Return the spec as a JSON tree, as a manifest holds it."""
        scale = list(self.scale) if self.scale is not None else None
        return {"bits": self.bits, "dim": self.dim, "scale": scale}

    @classmethod
    def from_json(cls, text: str) -> "CodeSpec":
        """Read what `to_json` wrote.

        Raises:
            StoreError: the text is no code spec.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise StoreError(f"not a code spec: {error}; write it with to_json") from error
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: Any) -> "CodeSpec":  # Any: a JSON tree, checked here
        """Read what `to_tree` gave.

        Raises:
            StoreError: the tree is no code spec.
        """
        try:
            scale = tree["scale"]
            values = tuple(float(value) for value in scale) if scale is not None else None
            return cls(int(tree["bits"]), int(tree["dim"]), values)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"not a code spec: {error}; write it with to_tree") from error


def quantize(latents: ArrayLike, spec: CodeSpec) -> Codes:
    """Return [..., d] int8 codes (float16 for 16 bits) of float [..., d] latents; values out of range are clipped.

    Raises:
        ShapeError: the last axis is not `spec.dim`.
        DataError: a latent is not finite.
    """
    values = np.asarray(latents, dtype=np.float32)
    if values.ndim == 0 or values.shape[-1] != spec.dim:
        raise ShapeError(f"latents must be [..., {spec.dim}], found {list(values.shape)}")
    if not np.isfinite(values).all():
        raise DataError(
            "latents must be finite, found NaN or infinity; check the snapshot that embedded them"
        )
    if spec.bits == 16:
        return np.clip(values, -65504.0, 65504.0).astype(np.float16)
    top = 2 ** (spec.bits - 1)
    steps = np.rint(values * (np.float32(top) / _scale(spec)))
    return np.clip(steps, -top, top - 1, out=steps).astype(np.int8)


def dequantize(codes: Codes, spec: CodeSpec) -> Floats:
    """Return [..., d] float32 latents of unpacked codes."""
    values = codes.astype(np.float32)
    if spec.bits < 16:
        values *= spec.step
    return values


def pack(codes: Codes, spec: CodeSpec) -> Bytes:
    """Return uint8 [..., bytes] of codes [..., d]; bits left over in the last byte are 0."""
    if spec.bits == 16:
        return np.ascontiguousarray(codes, dtype="<f2").view(np.uint8)
    if spec.bits == 8:
        return np.ascontiguousarray(codes, dtype=np.int8).view(np.uint8)
    per_byte = 8 // spec.bits
    lead = codes.shape[:-1]
    padded = np.zeros((*lead, spec.num_bytes * per_byte), dtype=np.uint8)
    padded[..., : spec.dim] = codes.astype(np.int8).view(np.uint8) & (2**spec.bits - 1)
    packed = padded[..., 0::per_byte].copy()
    for part in range(1, per_byte):
        packed |= padded[..., part::per_byte] << (part * spec.bits)
    return packed


def unpack(packed: Bytes, spec: CodeSpec) -> Codes:
    """Return [..., d] codes of uint8 [..., bytes].

    Raises:
        ShapeError: the last axis is not `spec.num_bytes`.
    """
    _check_packed(packed, spec)
    if spec.bits == 16:
        return np.ascontiguousarray(packed).view("<f2")
    if spec.bits == 8:
        return np.ascontiguousarray(packed).view(np.int8)
    return _lookup(packed, _code_table(spec.bits), np.dtype(np.int8), spec.dim)


def encode(latents: ArrayLike, spec: CodeSpec) -> Bytes:
    """Return uint8 [..., bytes] of float [..., d] latents: `pack(quantize(latents))`."""
    return pack(quantize(latents, spec), spec)


def decode(packed: Bytes, spec: CodeSpec) -> Floats:
    """Return float32 [..., d] latents of uint8 [..., bytes]: `dequantize(unpack(packed))`.

    Raises:
        ShapeError: the last axis is not `spec.num_bytes`.
    """
    if spec.bits >= 8:
        return dequantize(unpack(packed, spec), spec)
    _check_packed(packed, spec)
    values = _lookup(packed, _float_table(spec.bits), np.dtype(np.float32), spec.dim)
    values *= spec.step
    return values


def calibrate_scale(latents: ArrayLike, bits: int = 4) -> tuple[float, ...]:
    """Return the scale per dimension that gives codes of `bits` the least mean squared error on float [N, d] latents.

    Scales are tried on a grid of multiples of the root mean square of the dimension; a dimension that is always 0
    gets scale 1.

    Raises:
        ConfigError: half floats (16 bits) have no scale.
        DataError: there are no rows.
    """
    values = np.asarray(latents, dtype=np.float32)
    if bits == 16:
        raise ConfigError("codes of 16 bits are half floats and take no scale; do not calibrate")
    if values.ndim != 2 or not len(values):
        raise DataError(
            f"calibration needs latents [N, d] with rows, found {list(values.shape)}; give embedded events"
        )
    dim = values.shape[1]
    spread = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=0))
    best = np.full(dim, np.inf)
    scale = np.ones(dim)
    for clip in _CLIPS:
        trial = (np.where(spread > 0, spread, 1.0) * clip).astype(np.float32)
        spec = CodeSpec(bits, dim, tuple(float(value) for value in trial))
        error = values - dequantize(quantize(values, spec), spec)
        cost = np.mean(np.square(error, dtype=np.float64), axis=0)
        better = cost < best
        best[better] = cost[better]
        scale[better] = trial[better]
    scale[spread == 0] = 1.0
    return tuple(float(value) for value in scale)


def _scale(spec: CodeSpec) -> Floats:
    return np.asarray(1.0 if spec.scale is None else spec.scale, dtype=np.float32)


def _check_packed(packed: Bytes, spec: CodeSpec) -> None:
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != spec.num_bytes:
        raise ShapeError(
            f"packed codes must be uint8 [..., {spec.num_bytes}], found {packed.dtype} {list(packed.shape)}"
        )


@cache
def _code_table(bits: int) -> NDArray[Any]:
    """Return [256]: the int8 codes that each byte holds, as one number as wide as they are together."""
    return _wide(_codes_of_bytes(bits))


@cache
def _float_table(bits: int) -> NDArray[Any]:
    """Return [256]: the same codes as float32."""
    return _wide(_codes_of_bytes(bits).astype(np.float32))


def _codes_of_bytes(bits: int) -> NDArray[np.int8]:
    """Return int8 [256, codes per byte]."""
    half = 2 ** (bits - 1)
    shifts = np.arange(0, 8, bits)
    codes = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    found: NDArray[np.int8] = ((codes + half) % (2 * half) - half).astype(np.int8)
    return found


def _wide(table: Codes) -> NDArray[Any]:
    # one number as wide as an entry, so that a look-up moves a whole entry at once
    width = table.dtype.itemsize * table.shape[1]
    whole = np.ascontiguousarray(table).view(f"u{width}" if width <= 8 else f"c{width}")[:, 0]
    whole.setflags(write=False)
    return whole


def _lookup(packed: Bytes, table: NDArray[Any], dtype: np.dtype[Any], dim: int) -> Codes:
    """Return [..., dim]: the entries of `table` for each byte, side by side."""
    flat = table.take(packed).view(dtype)
    return flat if flat.shape[-1] == dim else flat[..., :dim]
