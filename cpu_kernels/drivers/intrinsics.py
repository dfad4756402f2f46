"""Raw memory, atomics and system calls as intrinsics of drivers. Addresses are int64."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.driver import I64, VOID, Driver, Intrinsic

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_X86 = platform.machine() == "x86_64"


def intrinsic(emit: Callable[..., Any]) -> Any:
    """Decorator: `emit(builder, *int64)` emits the operation and returns its value or None."""
    return Intrinsic(emit)


def driver(function: Callable[..., Any]) -> Any:
    """Decorator of drivers: no interpreter, no objects, no exceptions. See `jit.translate`."""
    return Driver(function)


def _pointer(builder: ir.IRBuilder, address: Any, kind: ir.Type = I64) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


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


@intrinsic
def load64(builder: ir.IRBuilder, address: Any) -> Any:
    """int64 at address."""
    return builder.load(_pointer(builder, address), align=8)


@intrinsic
def store64(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address), align=8)


@intrinsic
def load32(builder: ir.IRBuilder, address: Any) -> Any:
    """int32 at address, sign-extended."""
    return builder.sext(builder.load(_pointer(builder, address, _I32), align=4), I64)


@intrinsic
def store32(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, _I32), _pointer(builder, address, _I32), align=4)


@intrinsic
def load8(builder: ir.IRBuilder, address: Any) -> Any:
    """uint8 at address."""
    return builder.zext(builder.load(_pointer(builder, address, _I8), align=1), I64)


@intrinsic
def store8(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, _I8), _pointer(builder, address, _I8), align=1)


@intrinsic
def load_acquire(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.load_atomic(_pointer(builder, address), "acquire", 8)


@intrinsic
def load_ordered(builder: ir.IRBuilder, address: Any) -> Any:
    """Sequentially consistent: not before an earlier `fetch_add` of this thread is seen."""
    return builder.load_atomic(_pointer(builder, address), "seq_cst", 8)


@intrinsic
def store_release(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store_atomic(value, _pointer(builder, address), "release", 8)


@intrinsic
def fetch_add(builder: ir.IRBuilder, address: Any, value: Any) -> Any:
    """Sequentially consistent; returns the old value."""
    return builder.atomic_rmw("add", _pointer(builder, address), value, "seq_cst")


@intrinsic
def compare_swap(builder: ir.IRBuilder, address: Any, expected: Any, desired: Any) -> Any:
    """True if the word was `expected` and is now `desired`."""
    pair = builder.cmpxchg(_pointer(builder, address), expected, desired, "seq_cst", "seq_cst")
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


def _kernel_call(arity: int) -> Any:
    """call<arity>(address, a0, ..., a[arity - 1]): void kernel(int64, ...)."""

    def emit(builder: ir.IRBuilder, kernel: Any, *arguments: Any) -> None:
        kind = ir.FunctionType(VOID, [I64] * arity)
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), arguments)

    emit.__name__ = f"call{arity}"
    return Intrinsic(emit)


call0, call1, call2, call3, call4, call5, call6, call7, call8, call9 = map(_kernel_call, range(10))
