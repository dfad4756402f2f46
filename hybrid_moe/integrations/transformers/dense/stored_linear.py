"""Linear layers as a checkpoint stores them, where their tensors can be read without Transformers.

That is where Transformers would do no more than rename a tensor's key, and its values are floats,
or FP8 (E4M3) in blocks that share a scale, which are dequantised to BF16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from hybrid_moe.formats.numbers import F32, Array, f32_to_bf16, ue8m0_to_float
from hybrid_moe.integrations.transformers.dense.packing import PART_BYTES, Weight
from hybrid_moe.loaders import SafetensorsIndex
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.quantize import to_float32
from hybrid_moe.loaders.safetensors import ReadBuffers

FLOATS = ("BF16", "F16", "F32")
FP8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "scale", "weight_scale", "qscale_weight")
"""What the scales of a weight in FP8 blocks may be called beside it."""


@dataclass(frozen=True)
class StoredLinear:
    """The tensors of one linear layer.

    Attributes:
        weight, bias: its tensors; None for no bias.
        scale: one for each block of an FP8 weight, [ceil(N / rows), ceil(K / columns)].
        block: rows and columns of a block.
    """

    weight: TensorInfo
    bias: TensorInfo | None = None
    scale: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def tensors(self) -> list[TensorInfo]:
        """All that there are."""
        return [t for t in (self.weight, self.bias, self.scale) if t is not None]


def direct_keys(
    model: Any, keys: Iterable[str], key_mapping: Mapping[str, str] | None
) -> dict[str, str]:
    """The checkpoint's key of every parameter of `model` whose tensor Transformers only renames.

    Args:
        model: a Transformers model, which may be on meta.
        keys: those of the checkpoint.
        key_mapping: renamings that the user gives Transformers, if any.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model, key_mapping and dict(key_mapping))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    several: set[str] = set()
    for key in sorted(keys):
        name, converted = rename_source_key(key, renamings, converters, prefix, places)
        if name not in places and key in places:  # as Transformers does
            name, converted = rename_source_key(key, [], [], prefix, places)
        if converted is None and name in places:
            if name in found:
                several.add(name)
            found[name] = key
    return {name: key for name, key in found.items() if name not in several}


def find_stored(
    index: SafetensorsIndex,
    keys: Mapping[str, str],
    name: str,
    linear: nn.Linear,
    fp8_block: tuple[int, int] | None,
) -> StoredLinear | None:
    """The tensors of a layer; None if they are not all there, or are stored in another way.

    Args:
        index: the checkpoint's.
        keys: see `direct_keys`.
        name, linear: the layer.
        fp8_block: rows and columns of an FP8 block; None where the checkpoint has none.
    """
    weight = index.tensors.get(keys.get(f"{name}.weight", ""))
    bias = index.tensors.get(keys.get(f"{name}.bias", ""))
    N, K = linear.out_features, linear.in_features
    if weight is None or weight.shape != (N, K):
        return None
    if linear._parameters.get("bias") is None:
        bias = None
    elif bias is None or bias.shape != (N,) or bias.dtype not in FLOATS:
        return None
    if weight.dtype in FLOATS:
        return StoredLinear(weight, bias)
    if weight.dtype != FP8 or fp8_block is None:
        return None
    stem = weight.key.removesuffix("weight")
    scale = next((index.tensors[stem + s] for s in SCALES if stem + s in index.tensors), None)
    rows, columns = fp8_block
    blocks = (-(-N // rows), -(-K // columns))
    if scale is None or scale.shape != blocks or scale.dtype not in (*FLOATS, "F8_E8M0", "U8"):
        return None
    return StoredLinear(weight, bias, scale, fp8_block)


class StoredReader:
    """Reads layers of one checkpoint, from any thread."""

    def __init__(self, index: SafetensorsIndex) -> None:
        self._index = index
        self._buffers = ReadBuffers()

    def weight(self, stored: StoredLinear) -> Weight:
        """A layer's values. Its bias and scales are read now, its rows when they are asked for."""
        index, info = self._index, stored.weight
        N, K = info.shape
        bias = None if stored.bias is None else to_float32(index.read(stored.bias.key))
        factors = None if stored.scale is None else self._factors(stored.scale)

        def read(start: int, stop: int) -> Array:
            nbytes = (stop - start) * (info.nbytes // N)
            self._buffers.mine.reset([nbytes])
            raw = index.read(info.key, slice(start, stop), self._buffers.mine.take(nbytes))
            if factors is None:
                return raw
            rows, columns = stored.block
            scales = factors[np.arange(start, stop) // rows]
            values = e4m3_values()[raw] * np.repeat(scales, columns, axis=1)[:, :K]
            return f32_to_bf16(values)

        return Weight(N, K, read, bias, info.where)

    def _factors(self, scale: TensorInfo) -> F32:
        raw = self._index.read(scale.key)
        return ue8m0_to_float(raw) if raw.dtype == np.uint8 else to_float32(raw)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, read a few rows at a time."""
        left, right = self._index.info(one), self._index.info(other)
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        rows = left.shape[0]
        step = max(1, PART_BYTES * rows // max(1, left.nbytes))
        return all(
            np.array_equal(self._index.read(one, part), self._index.read(other, part))
            for part in (slice(start, start + step) for start in range(0, rows, step))
        )


@lru_cache(maxsize=1)
def e4m3_values() -> npt.NDArray[np.float32]:
    """The values of the 256 codes of E4M3 (FN): 4 bits of exponent with bias 7, 3 of mantissa,
    subnormals, no infinity; only 0x7f and 0xff are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
