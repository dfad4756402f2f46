"""Integers in JSON: long arrays as one string, base64 of zlib of little-endian words.

    {"shape": [16, 58, 256], "bits": 16, "zlib": "eJzt..."}

A profile's windows have a quarter of a million counts for a large model: as digits 1.2 MB, packed
some 0.3 MB. `bits` is the least of 8, 16, 32 and 64 that the largest value fits.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_WORDS = {8: "u1", 16: "<u2", 32: "<u4", 64: "<u8"}


def packed(values: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Values as JSON.

    Raises:
        ValueError: one is negative.
    """
    if values.size and values.min() < 0:
        raise ValueError(f"{values.min()} is negative, must be a count")
    largest = int(values.max(initial=0))
    bits = next(bits for bits in _WORDS if largest < 1 << bits)
    words = np.ascontiguousarray(values).astype(_WORDS[bits]).tobytes()
    text = base64.b64encode(zlib.compress(words, 9)).decode("ascii")
    return {"shape": list(values.shape), "bits": bits, "zlib": text}


def unpacked(given: Any, shape: tuple[int, ...], what: str) -> npt.NDArray[np.int64]:
    """The values of JSON.

    Args:
        given: of `packed`.
        shape: what its shape must be. Nothing larger is allocated, whatever the string holds.
        what: what messages call it.

    Raises:
        ValueError: it is not of that form or shape, or damaged.
    """
    if not isinstance(given, Mapping) or given.keys() != {"shape", "bits", "zlib"}:
        raise ValueError(f"{what} must be a table of shape, bits and zlib")
    if given["shape"] != list(shape):
        raise ValueError(f"{what} has shape {given['shape']}, must be {list(shape)}")
    word = _WORDS.get(given["bits"]) if type(given["bits"]) is int else None
    if word is None or not isinstance(given["zlib"], str):
        raise ValueError(f"{what} must have bits of {', '.join(map(str, _WORDS))} and a text")
    nbytes = math.prod(shape) * given["bits"] // 8
    try:
        inflate = zlib.decompressobj()
        words = inflate.decompress(base64.b64decode(given["zlib"], validate=True), nbytes + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"{what} is damaged: {error}") from error
    if len(words) != nbytes or not (inflate.eof or nbytes == 0):
        raise ValueError(f"{what} is damaged: it does not have {nbytes} bytes")
    values = np.frombuffer(words, word).reshape(shape)
    if word == "<u8" and values.size and int(values.max()) >= 1 << 63:
        raise ValueError(f"{what} has a count of {int(values.max())}, too large")
    return values.astype(np.int64)
