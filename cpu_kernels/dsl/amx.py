"""Tile ops as Intel AMX instructions.

Registers are LLVM's physical ones: with its own allocation LLVM would load a configuration in
every function. LDTILECFG runs once per job and thread, in the kernel that `tiles.configure` makes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llvmlite import ir

from hybrid_moe.cpu_kernels.dsl.emit import I8, Emit, Val
from hybrid_moe.cpu_kernels.dsl.ops import Lowering
from hybrid_moe.cpu_kernels.dsl.tiles import Tiles

logger = logging.getLogger(__name__)

_SYS_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023  # ARCH_REQ_XCOMP_PERM
_TILE_DATA = 18  # XFEATURE_XTILEDATA


@functools.lru_cache(maxsize=1)
def permitted() -> bool:
    """Ask the kernel for tile registers, once: it must be before this process starts threads.

    Linux gives them on request only (Documentation/arch/x86/xstate.rst), since they enlarge the
    signal frames of every thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    request = [ctypes.c_long(n) for n in (_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)]
    if libc.syscall(*request) == 0:
        return True
    logger.warning(
        "the processor has AMX, but the system refuses its tile registers (arch_prctl: error %d); "
        "AVX-512 is used instead",
        ctypes.get_errno(),
    )
    return False


def _call(emit: Emit, name: str, *operands: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    emit.call(f"llvm.x86.{name}", kind, operands)


def _number(n: int) -> ir.Constant:
    return ir.Constant(I8, n)


def _pointer(emit: Emit, address: Val) -> Any:
    return emit.builder.inttoptr(address.ir, ir.PointerType())


def _configure(tiles: Tiles) -> None:
    module = tiles.emit.builder.module
    kind = ir.ArrayType(I8, 64)
    palette = ir.GlobalVariable(module, kind, "palette")
    palette.linkage = "internal"
    palette.global_constant = True
    palette.align = 64
    palette.initializer = ir.Constant(kind, bytearray(tiles.config.palette))
    _call(tiles.emit, "ldtilecfg", palette.bitcast(ir.PointerType()))


def _release(emit: Emit) -> None:
    _call(emit, "tilerelease")


def _zero(tiles: Tiles, n: int) -> None:
    _call(tiles.emit, "tilezero", _number(n))


def _load(tiles: Tiles, n: int, address: Val, stride: Val) -> None:
    _call(tiles.emit, "tileloadd64", _number(n), _pointer(tiles.emit, address), stride.ir)


def _store(tiles: Tiles, n: int, address: Val, stride: Val) -> None:
    _call(tiles.emit, "tilestored64", _number(n), _pointer(tiles.emit, address), stride.ir)


def _dot_bytes(tiles: Tiles, c: int, a: int, b: int) -> None:
    _call(tiles.emit, "tdpbssd", *map(_number, (c, a, b)))


def _dot_pairs(tiles: Tiles, c: int, a: int, b: int) -> None:
    _call(tiles.emit, "tdpbf16ps", *map(_number, (c, a, b)))


LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        "tile_configure": _configure,
        "tile_release": _release,
        "tile_zero": _zero,
        "tile_load": _load,
        "tile_store": _store,
        "tile_dot_bytes": _dot_bytes,
        "tile_dot_pairs": _dot_pairs,
    }
)
