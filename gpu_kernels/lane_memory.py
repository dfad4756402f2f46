"""Small words of CuTe DSL that the kernels share: registers of a lane, and what it reads there.

Imported by kernels' builders only; the DSL is imported when one is called.
"""

from __future__ import annotations

from typing import Any


def registers(shape: tuple[int, ...], kind: Any) -> Any:
    """An uninitialized tensor in registers; it must be indexed with constants."""
    import cutlass.cute as cute

    return cute.make_rmem_tensor(cute.make_layout(shape), kind)


def part(tensor: Any, first: int, count: int) -> Any:
    """tensor[first : first + count]."""
    import cutlass.cute as cute

    return cute.make_tensor(tensor.iterator + first, cute.make_layout(count))


def at_address(kind: Any, address: Any, count: int, align: int) -> Any:
    """`count` elements of global memory at an address, an Int64, as a tensor."""
    import cutlass.cute as cute

    place = cute.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(place, cute.make_layout(count))


def element(pointer: Any, index: Any) -> Any:
    """pointer[index]."""
    import cutlass.cute as cute

    return cute.make_tensor(pointer + index, cute.make_layout(1))[0]


def load_words(to: Any, address: Any) -> None:
    """Fill `to`, uint32 [1, 2 or 4] in registers, by one load from a multiple of its size."""
    import cutlass.cute as cute
    from cutlass import Uint32

    count = cute.size(to)
    cute.autovec_copy(at_address(Uint32, address, count, 4 * count), to)


def request(address: Any) -> None:
    """Have the bytes at an address brought to L2; nothing waits for them."""
    from cutlass.cute.arch import inline_ptx

    inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once: a product beyond float32 may come back."""
    from cutlass import Float32
    from cutlass.cute.arch import inline_ptx

    return inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


def rounded(a: Any, b: Any) -> Any:
    """a * b in float32, rounded before anything is added: a plain product may become part of one
    operation with the sum behind it, in one kernel and not in another."""
    from cutlass import Float32
    from cutlass.cute.arch import inline_ptx

    return inline_ptx(
        "mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b]
    )


def divide(a: Any, b: Any) -> Any:
    """a // b of Int32 that are not negative, without the corrections for those that are."""
    from cutlass import Int32, Uint32

    return Int32(Uint32(a) // Uint32(b))


def vector(pointer: Any, count: int) -> Any:
    """`count` elements from `pointer` on, as a tensor."""
    import cutlass.cute as cute

    return cute.make_tensor(pointer, cute.make_layout(count))


def at(pointer: Any, index: Any) -> Any:
    """The element `index` places behind `pointer`, as a tensor of one: to be written, or read as
    its [0]."""
    return vector(pointer + index, 1)
