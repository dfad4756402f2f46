"""The tables: every weight format, and what `method=` stands for.

A `WeightFormat` is one row of `FORMATS`: how a checkpoint stores a matrix and how memory holds it.
From the row come the reference dequantizer, the quantizer, the sizes that the packer and the
planner use, and (through `cpu_kernels` and `gpu_kernels`) the decode step of the kernels. A
`Method` is what a user asks for; several stand for a family of formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hybrid_moe.formats.float8 import FP8, FP8_PERCHANNEL
from hybrid_moe.formats.ggml import GGML
from hybrid_moe.formats.integers import (
    GPTQ_FIRST,
    GPTQ_SYMMETRIC,
    INT4_ROW,
    INT4_SLICE,
    INT8,
    INT8_ROW,
    INT8_SLICE,
    RAW_INT4,
    ZERO_POINTS,
)
from hybrid_moe.formats.mx import MXFP4, MXFP8, NVFP4
from hybrid_moe.formats.numbers import f32_to_bf16
from hybrid_moe.formats.weight_format import BF16_CODE, LayerFormats, WeightFormat, code_plane

BF16 = WeightFormat(
    name="BF16",
    code=BF16_CODE,
    code_plane=code_plane(BF16_CODE, "uint16"),
    group=0,
    scale=None,
    scale_plane=None,
    more=(),
    scaling="none",
    factors=None,
    encode=lambda w: (f32_to_bf16(w), None),
)

FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        f.name: f
        for f in (
            *(MXFP4, INT8, BF16, NVFP4, MXFP8, FP8, FP8_PERCHANNEL),
            *(
                INT8_ROW,
                INT8_SLICE,
                INT4_ROW,
                INT4_SLICE,
                *RAW_INT4,
                *GPTQ_SYMMETRIC,
                *GPTQ_FIRST,
                *ZERO_POINTS,
            ),
            *GGML,
        )
    }
)
"""Every format by its name. A new format is a new row here and a row in the tests."""

DENSE_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {f.name: f for f in (MXFP4, INT8, BF16)}
)
"""Those in which the linear layers of a model may be held, see `dense=`."""


@dataclass(frozen=True)
class Method:
    """What `method=` stands for.

    Attributes:
        name: the argument, in any case.
        formats: in which a layer may be stored for it.
        made: the format that weights of 16 bits (and FP8) become under it; None where nothing is
            quantized to it.
    """

    name: str
    formats: tuple[WeightFormat, ...]
    made: WeightFormat | None

    def format_for(self, stored: WeightFormat) -> WeightFormat | None:
        """What weights stored so become under it; None if they do not: 16-bit weights are
        quantized, and FP8 to integers, which need no wider memory."""
        if stored in self.formats:
            return stored
        from_float8 = stored in (FP8, FP8_PERCHANNEL) and self.made in (INT4_ROW, INT8_ROW)
        return self.made if stored is BF16 or from_float8 else None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        m.name: m
        for m in (
            Method("MXFP4", (MXFP4,), MXFP4),
            Method("NVFP4", (NVFP4,), None),
            Method("MXFP8", (MXFP8,), MXFP8),
            Method("FP8", (FP8,), FP8),
            Method("FP8_PERCHANNEL", (FP8_PERCHANNEL,), FP8_PERCHANNEL),
            Method("BF16", (BF16,), BF16),
            Method("INT8", (INT8,), INT8),
            Method("AMXINT4", (INT4_ROW, INT4_SLICE), INT4_ROW),
            Method("AMXINT8", (INT8_ROW, INT8_SLICE), INT8_ROW),
            Method("MOE_INT4", (INT4_ROW,), INT4_ROW),
            Method("MOE_INT8", (INT8_ROW,), INT8_ROW),
            Method("AWQ", ZERO_POINTS, None),
            Method("GPTQ_INT4", (*GPTQ_SYMMETRIC, *GPTQ_FIRST, *ZERO_POINTS), GPTQ_SYMMETRIC[2]),
            Method("RAWINT4", (*RAW_INT4, *GPTQ_SYMMETRIC, INT4_ROW), RAW_INT4[0]),
            Method("LLAMAFILE", (*GGML, GPTQ_SYMMETRIC[0], INT8, MXFP4, BF16), None),
        )
    }
)
"""Every method by its name. Q4_0 of GGUF is GPTQ_SYMMETRIC[0]: nibbles less 8 with fp16 scales for
32 inputs."""

AS_STORED = "STORED"
"""Stands for no method where a name is needed: every layer stays in the format that its checkpoint
stores, which need not be the same for all."""
AUTO = "AUTO"
"""The same, as users write it."""


def method_named(method: str) -> Method:
    """The method of that name, in any case.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    found = METHODS.get(str(method).upper())
    if found is None:
        raise ValueError(
            f"unknown method {method!r}: available methods are {', '.join(sorted(METHODS))}"
        )
    return found


def chosen_method(method: str | None) -> Method | None:
    """The method of that name; None for None, "auto" or "STORED", which leave it to the checkpoint.

    Raises:
        ValueError: as `method_named`.
    """
    if method is None or str(method).upper() in (AS_STORED, AUTO):
        return None
    return method_named(method)


def methods_of(fmt: WeightFormat) -> tuple[str, ...]:
    """Names of the methods that stand for a format."""
    return tuple(method.name for method in METHODS.values() if fmt in method.formats)


def format_named(method: str) -> WeightFormat:
    """The one format that weights become under `method`, or the format of that name, in any case.

    Raises:
        ValueError: there is none; the message lists the methods.
    """
    name = str(method).upper()
    if name in FORMATS:
        return FORMATS[name]
    found = method_named(method)
    if found.made is None:
        raise ValueError(
            f"method {found.name} stands for {', '.join(f.name for f in found.formats)}: "
            "what a layer is depends on its checkpoint"
        )
    return found.made


def methods_for(stored: Sequence[LayerFormats]) -> tuple[str, ...]:
    """Names of the methods that load layers stored so; of those that come to the same, the first.

    Args:
        stored: formats of each layer.
    """
    found: dict[tuple[WeightFormat | None, ...], str] = {}
    for method in METHODS.values():
        held = tuple(method.format_for(fmt) for formats in stored for fmt in formats)
        if None not in held:
            found.setdefault(held, method.name)
    return tuple(found.values())


def formats_under(method: Method | None, stored: LayerFormats, where: str) -> LayerFormats:
    """The formats in which a layer's experts are held.

    Args:
        method: what the user asks for; None for what is stored.
        stored: the layer's.
        where: layer and checkpoint, for the message.

    Raises:
        ValueError: weights stored so do not become that.
    """
    if method is None:
        return stored
    held = [method.format_for(fmt) for fmt in stored]
    if held[0] is None or held[1] is None:
        fitting = [*methods_for([stored]), '"auto"']
        raise ValueError(
            f"{where} stores its experts as {stored.name}, which does not become {method.name}: "
            f"use {' or '.join(fitting)}, which takes each layer as it is stored"
        )
    return LayerFormats(held[0], held[1])
