"""Atomics, system calls and calls of kernels as intrinsics of drivers."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.driver import I64, VOID, Driver, Intrinsic, P, T

_I32 = ir.IntType(32)
_X86 = platform.machine() == "x86_64"


def intrinsic(emit: Callable[..., Any]) -> Any:
    """Decorator: `emit(builder, *int64)` emits the operation and returns its value or None."""
    return Intrinsic(emit)


def atomic(emit: Callable[..., Any]) -> Any:
    """Decorator: an intrinsic whose first operand is a `Word`, the address of 64 shared bits."""
    return Intrinsic(emit, atomic=True)


def driver(function: Callable[P, T]) -> Driver[P, T]:
    """Decorator of drivers: no interpreter, no objects, no exceptions. See `jit.translate`."""
    return Driver(function)


def _pointer(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    """Call a function of libc or LLVM by its name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return builder.call(function, arguments)


def _stack(builder: ir.IRBuilder, kind: ir.Type, count: int = 1) -> Any:
    """Room on the stack, once per call of the driver."""
    with builder.goto_block(builder.function.entry_basic_block):
        return builder.alloca(kind, count)


@atomic
def load_acquire(builder: ir.IRBuilder, word: Any) -> Any:
    return builder.load_atomic(_pointer(builder, word), "acquire", 8)


@atomic
def load_ordered(builder: ir.IRBuilder, word: Any) -> Any:
    """Sequentially consistent: not before an earlier `fetch_add` of this thread is seen."""
    return builder.load_atomic(_pointer(builder, word), "seq_cst", 8)


@atomic
def store_release(builder: ir.IRBuilder, word: Any, value: Any) -> None:
    builder.store_atomic(value, _pointer(builder, word), "release", 8)


@atomic
def fetch_add(builder: ir.IRBuilder, word: Any, value: Any) -> Any:
    """Sequentially consistent; returns the old value."""
    return builder.atomic_rmw("add", _pointer(builder, word), value, "seq_cst")


@atomic
def compare_swap(builder: ir.IRBuilder, word: Any, expected: Any, desired: Any) -> Any:
    """True if the word was `expected` and is now `desired`."""
    pair = builder.cmpxchg(_pointer(builder, word), expected, desired, "seq_cst", "seq_cst")
    return builder.extract_value(pair, 1)


@intrinsic
def fence(builder: ir.IRBuilder) -> None:
    builder.fence("seq_cst")


@intrinsic
def pause(builder: ir.IRBuilder) -> None:
    """Tell the processor that this is a spin loop."""
    if _X86:
        _call(builder, "llvm.x86.sse2.pause", VOID, [])
    else:
        _call(builder, "llvm.aarch64.hint", VOID, [ir.Constant(_I32, 1)])


@intrinsic
def system_call(builder: ir.IRBuilder, number: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """libc's syscall(number, a, b, c, d, 0, 0)."""
    zero = ir.Constant(I64, 0)
    return _call(builder, "syscall", I64, [number, a, b, c, d, zero, zero])


@intrinsic
def nanoseconds(builder: ir.IRBuilder) -> Any:
    """CLOCK_MONOTONIC."""
    timespec = _stack(builder, I64, 2)
    _call(builder, "clock_gettime", _I32, [ir.Constant(_I32, 1), timespec])
    seconds = builder.load(timespec)
    rest = builder.load(builder.gep(timespec, [ir.Constant(_I32, 1)]))
    return builder.add(builder.mul(seconds, ir.Constant(I64, 10**9)), rest)


@intrinsic
def set_float_environment(builder: ir.IRBuilder) -> Any:
    """Round to nearest, keep subnormals, mask exceptions; returns the former control word.

    A caller may have set flush-to-zero (torch.set_flush_denormal); E8M0 scale 0 is a subnormal.
    """
    if not _X86:
        before = _call(builder, "llvm.aarch64.get.fpcr", I64, [])
        _call(builder, "llvm.aarch64.set.fpcr", VOID, [ir.Constant(I64, 0)])
        return before
    slot = _stack(builder, _I32)
    _call(builder, "llvm.x86.sse.stmxcsr", VOID, [slot])
    before = builder.zext(builder.load(slot), I64)
    builder.store(ir.Constant(_I32, 0x1F80), slot)
    _call(builder, "llvm.x86.sse.ldmxcsr", VOID, [slot])
    return before


@intrinsic
def restore_float_environment(builder: ir.IRBuilder, word: Any) -> None:
    if _X86:
        slot = _stack(builder, _I32)
        builder.store(builder.trunc(word, _I32), slot)
        _call(builder, "llvm.x86.sse.ldmxcsr", VOID, [slot])
    else:
        _call(builder, "llvm.aarch64.set.fpcr", VOID, [word])


@intrinsic
def call(builder: ir.IRBuilder, kernel: Any, *arguments: Any) -> None:
    """Call a kernel by its address: void kernel(int64, ...)."""
    kind = ir.FunctionType(VOID, [I64] * len(arguments))
    builder.call(builder.inttoptr(kernel, kind.as_pointer()), arguments)
