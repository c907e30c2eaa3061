"""Slow twin of store/codes.py: one number at a time."""

import math

import numpy as np


def encode_slow(latent, spec):
    """Return the bytes of one latent."""
    if spec.bits == 16:
        return b"".join(np.float16(min(max(float(v), -65504.0), 65504.0)).tobytes() for v in latent)
    top = 2 ** (spec.bits - 1)
    number = 0
    for position, value in enumerate(latent):
        scale = 1.0 if spec.scale is None else spec.scale[position]
        step = np.float32(value) * (np.float32(top) / np.float32(scale))
        code = min(max(round(float(step)), -top), top - 1)  # round() takes ties to even, as rint
        number |= (code % (2 * top)) << (position * spec.bits)
    return number.to_bytes(math.ceil(spec.dim * spec.bits / 8), "little")


def decode_slow(data, spec):
    """Return the numbers of one latent."""
    if spec.bits == 16:
        return [float(v) for v in np.frombuffer(data, "<f2")]
    top = 2 ** (spec.bits - 1)
    number = int.from_bytes(data, "little")
    values = []
    for position in range(spec.dim):
        scale = 1.0 if spec.scale is None else spec.scale[position]
        code = (number >> (position * spec.bits)) % (2 * top)
        code = code - 2 * top if code >= top else code
        values.append(float(np.float32(code) * (np.float32(scale) / np.float32(top))))
    return values
