"""Random matrices of every weight format, with finite factors of ordinary size."""

from __future__ import annotations

import numpy as np

from hybrid_moe.formats.ggml import SUPER
from hybrid_moe.formats.numbers import Array, f32_to_bf16, f32_to_e4m3
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import Plane, WeightFormat


def _numbers(rng: np.random.Generator, plane: Plane, shape: tuple[int, int], size: float) -> Array:
    """Positive numbers around `size` in a plane of scales."""
    values = (size * rng.uniform(0.5, 2.0, shape)).astype(np.float32)
    if plane.dtype.kind == "f":
        return values.astype(plane.dtype)
    return f32_to_bf16(values)


def random_matrix(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Matrix:
    """An N x K matrix whose weights are of magnitude K^-1/2 or so; every code, every sub-scale and
    both signs of an offset occur."""
    planes: dict[str, Array] = {}
    largest = (
        {"int8": 127.0, "e4m3": 448.0, "bf16": 1.0}[fmt.code.name]
        if fmt.code.values is None
        else max(map(abs, fmt.code.values))
    )
    size = 2.0 / (largest * K**0.5)
    for plane in fmt.planes:
        shape = plane.shape(N, K)
        if fmt.code.name == "bf16":
            planes[plane.name] = f32_to_bf16(rng.normal(0, K**-0.5, shape).astype(np.float32))
        elif fmt.code.name == "e4m3" and plane.name == "codes":
            planes[plane.name] = f32_to_e4m3(
                np.clip(rng.normal(0, 150, shape), -448, 448).astype(np.float32)
            )
        elif fmt.scale is not None and plane.name == "scales" and fmt.scale.name == "ue8m0":
            exponent = int(np.floor(np.log2(size)))
            planes[plane.name] = rng.integers(126 + exponent, 129 + exponent, shape, np.uint8)
        elif fmt.scale is not None and plane.name == "scales" and fmt.scale.name == "e4m3":
            planes[plane.name] = f32_to_e4m3(rng.uniform(16, 448, shape).astype(np.float32))
            size /= 200.0  # of the row's factor
        elif plane.name in ("codes", "high") or (plane.dtype.kind in "iu" and plane.per == SUPER):
            # all bits of codes; sub-scales of superblocks, which `factors` bring to size
            raw = rng.integers(0, 256, (*shape, plane.dtype.itemsize), np.uint8)
            planes[plane.name] = raw.view(plane.dtype)[..., 0]
        elif plane.name == "minima" and plane.dtype == np.uint8:
            planes[plane.name] = rng.integers(0, 256, shape, np.uint8)
        elif plane.name == "minima":
            minima = _numbers(rng, plane, shape, size)
            planes[plane.name] = minima * plane.dtype.type(-largest / 2)
        elif plane.name == "factors" and plane.per == SUPER:
            factors = _numbers(rng, plane, shape, size / 20)
            if plane.count == 2:  # minima of half the codes' range: weights have both signs
                factors[:, 1::2] *= plane.dtype.type(largest / 2)
            planes[plane.name] = factors
        else:
            planes[plane.name] = _numbers(rng, plane, shape, size)
    return Matrix(**planes, scale_rows=fmt.scale_rows)  # type: ignore[arg-type]
