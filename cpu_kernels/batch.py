"""The arrays of a forward pass, by address.

A pass reads its inputs where they are and needs them no longer once it has been launched: compiled
code routes, which reads ids, weights and mask, and then encodes the rows of x, or copies them if
they are many (`drivers.route`). So Python copies nothing, for one token or for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Where the arrays of a pass are: addresses of contiguous memory. Whoever makes a batch has
    checked shapes and dtypes. Inputs are read until the pass has been launched.

    Attributes:
        tokens, top_k: T and k.
        x: of bf16 [T, H]. ids: of int64 [T, k]. weights: of float32 [T, k].
        skip: of bool [E], experts that are computed elsewhere and contribute nothing here; or 0.
        out: of the output [T, H], written until the job is over.
        out_size: bytes of a value of the output: 2 for bf16, 4 for float32, which is not rounded.
    """

    tokens: int
    top_k: int
    x: int
    ids: int
    weights: int
    skip: int
    out: int
    out_size: int = 2

    def parts(self, most: int, hidden: int) -> Sequence[Batch]:
        """Its tokens, at most `most` at a time, of `hidden` inputs each."""
        if self.tokens <= most:
            return (self,)
        return [
            self._part(i, min(self.tokens, i + most), hidden) for i in range(0, self.tokens, most)
        ]

    def _part(self, begin: int, end: int, hidden: int) -> Batch:
        row, pairs = 2 * hidden * begin, begin * self.top_k
        return Batch(
            end - begin,
            self.top_k,
            self.x + row,
            self.ids + 8 * pairs,
            self.weights + 4 * pairs,
            self.skip,
            self.out + self.out_size * hidden * begin,
            self.out_size,
        )


def check_arrays(x: Any, ids: Any, weights: Any, skip: Any, hidden: int, experts: int) -> None:
    """Raise unless these are the arrays of a pass, see `ExpertLayer.submit`.

    Raises:
        TypeError: a dtype. ValueError: a shape.
    """
    for name, array, dtype in (
        ("x", x, np.uint16),
        ("ids", ids, np.int64),
        ("weights", weights, np.float32),
    ):
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {np.dtype(dtype)}, not {array.dtype}")
        if array.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, not shape {array.shape}")
    if x.shape[1] != hidden:
        raise ValueError(f"x has {x.shape[1]} columns, the layer's hidden size is {hidden}")
    if ids.shape != weights.shape or len(ids) != len(x):
        raise ValueError(
            f"ids {ids.shape} and weights {weights.shape} must both be [{len(x)} tokens, top-k]"
        )
    if skip is not None and (skip.shape != (experts,) or skip.dtype != np.bool_):
        raise ValueError(f"skip must be bool [{experts}]")
