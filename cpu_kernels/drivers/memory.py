"""Raw memory, atomics and system calls as Numba intrinsics. Addresses are int64."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _pointer(builder: Any, address: Any, kind: ir.Type = _I64) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load64(typing_context: Any, address: Any) -> Any:
    """int64 at address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _I64), align=8)

    return types.int64(types.int64), codegen


@intrinsic
def store64(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0]), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load32(typing_context: Any, address: Any) -> Any:
    """int32 at address, sign-extended."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(_pointer(builder, args[0], _I32), align=4), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def store32(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.trunc(args[1], _I32)
        builder.store(low, _pointer(builder, args[0], _I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load8(typing_context: Any, address: Any) -> Any:
    """uint8 at address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(_pointer(builder, args[0], _I8), align=1), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def store8(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.trunc(args[1], _I8)
        builder.store(low, _pointer(builder, args[0], _I8), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_acquire(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0])
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Sequentially consistent; returns the old value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_swap(typing_context: Any, address: Any, expected: Any, desired: Any) -> Any:
    """True if the word was `expected` and is now `desired`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def fence(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a spin loop."""
    x86 = platform.machine() == "x86_64"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [] if x86 else [_I32])
        name = "llvm.x86.sse2.pause" if x86 else "llvm.aarch64.hint"
        module = builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        builder.call(function, [] if x86 else [ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def system_call(typing_context: Any, number: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """libc's syscall(number, a, b, c, d, 0, 0)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64] * 7)
        module = builder.module
        function = module.globals.get("syscall") or ir.Function(module, kind, "syscall")
        zero = ir.Constant(_I64, 0)
        return builder.call(function, [*args, zero, zero])

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def nanoseconds(typing_context: Any) -> Any:
    """CLOCK_MONOTONIC."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [_I32, _I64.as_pointer()])
        module = builder.module
        name = "clock_gettime"
        function = module.globals.get(name) or ir.Function(module, kind, name)
        with builder.goto_entry_block():
            timespec = builder.alloca(_I64, 2)
        builder.call(function, [ir.Constant(_I32, 1), timespec])
        seconds = builder.load(timespec)
        rest = builder.load(builder.gep(timespec, [ir.Constant(_I32, 1)]))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, 10**9)), rest)

    return types.int64(), codegen


def _mxcsr(builder: Any, name: str, slot: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [slot.type])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    builder.call(function, [slot])


@intrinsic
def set_float_environment(typing_context: Any) -> Any:
    """Round to nearest, keep subnormals, mask exceptions; returns the former control word.

    A caller may have set flush-to-zero (torch.set_flush_denormal); E8M0 scale 0 is a subnormal.
    """
    x86 = platform.machine() == "x86_64"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not x86:
            return ir.Constant(_I64, 0)
        with builder.goto_entry_block():
            slot = builder.alloca(_I32)
        _mxcsr(builder, "llvm.x86.sse.stmxcsr", slot)
        before = builder.zext(builder.load(slot), _I64)
        builder.store(ir.Constant(_I32, 0x1F80), slot)
        _mxcsr(builder, "llvm.x86.sse.ldmxcsr", slot)
        return before

    return types.int64(), codegen


@intrinsic
def restore_float_environment(typing_context: Any, word: Any) -> Any:
    x86 = platform.machine() == "x86_64"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x86:
            with builder.goto_entry_block():
                slot = builder.alloca(_I32)
            builder.store(builder.trunc(args[0], _I32), slot)
            _mxcsr(builder, "llvm.x86.sse.ldmxcsr", slot)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _call_kernel(arity: int) -> Any:
    """Typing and code of call_kernel(address, a0, ..., a[arity - 1]): void kernel(int64, ...)."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * arity)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (arity + 1)), codegen


@intrinsic
def call2(typing_context: Any, kernel: Any, a: Any, b: Any) -> Any:
    return _call_kernel(2)


@intrinsic
def call3(typing_context: Any, kernel: Any, a: Any, b: Any, c: Any) -> Any:
    return _call_kernel(3)


@intrinsic
def call4(typing_context: Any, kernel: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return _call_kernel(4)


@intrinsic
def call6(typing_context: Any, kernel: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    return _call_kernel(6)


@intrinsic
def call7(
    typing_context: Any, kernel: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any
) -> Any:
    return _call_kernel(7)


@intrinsic
def call9(
    typing_context: Any,
    kernel: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    e: Any,
    f: Any,
    g: Any,
    h: Any,
    i: Any,
) -> Any:
    return _call_kernel(9)


_RETURNS = {"int": types.int64, "bool": types.boolean, "None": types.void}


def driver(function: Callable[..., Any]) -> Any:
    """Decorator of drivers: no interpreter, no reference counts, no exceptions.

    The signature comes from the annotations (every parameter an int64). Left to itself, Numba
    would compile a function anew for each combination of literal arguments.
    """
    parameters = inspect.signature(function).parameters
    returns = _RETURNS[function.__annotations__["return"]]
    signature = returns(*[types.int64] * len(parameters))
    return njit(
        [signature],
        nogil=True,
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,
        boundscheck=False,
    )(function)
