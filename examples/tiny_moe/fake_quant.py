"""MXFP4 rounding in torch, fast enough to run in every training step.

`fake_quantize` gives the values that `hybrid_moe.formats.table.MXFP4` would store, bit for bit on
float64 input; the last part of the training runs on them (straight-through: the gradient of the
rounded weight moves the weight beneath), so that the model that is stored in 4 bits loses little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hybrid_moe.formats.mx import MXFP4


@torch.no_grad()
def fake_quantize(w: Tensor) -> Tensor:
    """`w` [..., K], float32 or float64, rounded to MXFP4 in groups of 32 along K.

    As the format's encoder: of the exponents floor(log2(max)) - 2 and the next one the closer
    fit of each group. In float32 a tie of the two errors may fall the other way.
    """
    groups = w.reshape(*w.shape[:-1], -1, 32)
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    scale = torch.exp2((exponent - 3).clamp(-127, 126).to(w.dtype))
    low, high = _round_e2m1(groups, scale), _round_e2m1(groups, 2 * scale)
    low_error = (low - groups).square_().sum(-1, keepdim=True)
    high_error = (high - groups).square_().sum(-1, keepdim=True)
    return torch.where(high_error < low_error, high, low).view_as(w)


def _round_e2m1(groups: Tensor, scale: Tensor) -> Tensor:
    """`groups` in the steps of E2M1 at `scale`: 0.5 below 2, 1 below 4, 2 up to the largest, 6.

    An even multiple of a step is an even code, so `round` breaks ties as the format does.
    """
    x = groups / scale
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return (x / step).round_().mul_(step).clamp_(-6, 6).mul_(scale)


@contextmanager
def quantized(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters hold their MXFP4 values; afterwards their own again.

    Each is rounded to bfloat16 first, as the saved checkpoint is before it is converted. A
    backward pass in the block leaves the gradient of the rounded weights: straight-through.
    """
    kept = [w.data for w in weights]
    for w in weights:
        w.data = fake_quantize(w.data.bfloat16().float())
    try:
        yield
    finally:
        for w, own in zip(weights, kept, strict=True):
            w.data = own


def assert_equals_format(weight: Tensor) -> None:
    """Raises AssertionError unless `fake_quantize` and the format agree on `weight` [E, N, K]."""
    matrix = weight.detach().bfloat16().float().flatten(0, -2)
    codes, scales = MXFP4.encode(matrix.numpy())
    expected = MXFP4.dequantize(codes, scales)
    exact = fake_quantize(matrix.double()).float().numpy()
    np.testing.assert_array_equal(exact, expected)
    differ = np.mean(fake_quantize(matrix).numpy() != expected)
    assert differ < 1e-4, f"{differ:.2%} of the float32 roundings differ from the format's"
