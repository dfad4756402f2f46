"""Memory behind a pointer, inside a kernel of CuTe DSL."""

from __future__ import annotations

from typing import Any


def vector(pointer: Any, size: int) -> Any:
    """`size` elements from `pointer` on."""
    import cutlass.cute as cute

    return cute.make_tensor(pointer, cute.make_layout(size))


def at(pointer: Any, index: Any) -> Any:
    """The element `index` places behind `pointer`: read or write its [0]."""
    return vector(pointer + index, 1)
