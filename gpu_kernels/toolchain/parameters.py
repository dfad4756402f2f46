"""Where the parameters of a kernel lie: as C would lay out a struct of them."""

from __future__ import annotations

import struct

from hybrid_moe.gpu_kernels.definition import SCALARS, KernelDefinition


def parameter_format(definition: KernelDefinition) -> str:
    """The `struct` format of all parameters: addresses and scalars, each aligned to its size."""
    kinds = ["Q" if argument.align else SCALARS[argument.type] for argument in definition.arguments]
    return "@" + "".join(kinds)


def parameter_places(definition: KernelDefinition) -> tuple[tuple[int, int], ...]:
    """(Offset, bytes) of each parameter."""
    kinds = parameter_format(definition)
    sizes = [struct.calcsize(kind) for kind in kinds[1:]]
    ends = [struct.calcsize(kinds[: count + 2]) for count in range(len(sizes))]
    return tuple((end - size, size) for end, size in zip(ends, sizes, strict=True))
