"""Values and control flow of the vector language, emitted as LLVM IR.

A kernel is a Python function over an `Emit`. It works on `Val`s (scalars and vectors of 16, 32 or
64 lanes) with Python's operators; Python numbers become constants and scalars broadcast when they
meet a vector. Addresses are 64-bit integers. What an op computes is stated in `ops`; how it
becomes instructions is the tier's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from llvmlite import ir

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.dsl.tiers import Tier

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()

Operand = Union["Val", int, float]


@functools.lru_cache(maxsize=256)
def vector(element: ir.Type, lanes: int) -> ir.Type:
    """Type of a vector; one lane is the scalar type itself."""
    return ir.VectorType(element, lanes) if lanes > 1 else element


@functools.lru_cache(maxsize=4096)
def _constant(kind: ir.Type, spelled: str, value: Any) -> ir.Constant:
    return ir.Constant(kind, value)


def constant(kind: ir.Type, value: Any) -> ir.Constant:
    """A number (in every lane), a tuple of one for each lane, or `ir.Undefined`, as an operand.

    Operands of 16 to 64 lanes are most of a module's text, and the same few again and again, so
    modules share them. 0.0 and -0.0 are equal; what tells them apart is how they are spelled.
    """
    return _constant(kind, repr(value), value)


@dataclass(frozen=True)
class Val:
    """An SSA value with operators. Integers are signless; `>>` is the logical shift."""

    emit: Emit
    ir: Any

    @property
    def element(self) -> ir.Type:
        kind = self.ir.type
        return kind.element if isinstance(kind, ir.VectorType) else kind

    @property
    def lanes(self) -> int:
        kind = self.ir.type
        return int(kind.count) if isinstance(kind, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        return bool(self.element == F32)

    def _binary(self, other: Operand, on_float: str | None, on_int: str | None) -> Val:
        left, right = self.emit.match(self, other)
        opcode = on_float if self.is_float else on_int
        if opcode is None:
            raise TypeError(f"{left.ir.type} has no such operator")
        return Val(self.emit, getattr(self.emit.builder, opcode)(left.ir, right.ir))

    def __add__(self, other: Operand) -> Val:
        return self._binary(other, "fadd", "add")

    def __sub__(self, other: Operand) -> Val:
        return self._binary(other, "fsub", "sub")

    def __mul__(self, other: Operand) -> Val:
        return self._binary(other, "fmul", "mul")

    def __truediv__(self, other: Operand) -> Val:
        return self._binary(other, "fdiv", None)

    def __and__(self, other: Operand) -> Val:
        return self._binary(other, None, "and_")

    def __or__(self, other: Operand) -> Val:
        return self._binary(other, None, "or_")

    def __lshift__(self, other: Operand) -> Val:
        return self._binary(other, None, "shl")

    def __rshift__(self, other: Operand) -> Val:
        return self._binary(other, None, "lshr")

    def sar(self, other: Operand) -> Val:
        """Arithmetic shift right."""
        return self._binary(other, None, "ashr")

    def __neg__(self) -> Val:
        if self.is_float:
            return Val(self.emit, self.emit.builder.fneg(self.ir))
        return self.emit.splat(0, self.element, self.lanes) - self

    def __lt__(self, other: Operand) -> Val:
        """Lane mask; false for NaN, signed for integers."""
        return self._compare("<", other)

    def __gt__(self, other: Operand) -> Val:
        return self._compare(">", other)

    def equals(self, other: Operand) -> Val:
        """Lane mask of equality; false for NaN."""
        return self._compare("==", other)

    def _compare(self, how: str, other: Operand) -> Val:
        left, right = self.emit.match(self, other)
        compare = "fcmp_ordered" if self.is_float else "icmp_signed"
        return Val(self.emit, getattr(self.emit.builder, compare)(how, left.ir, right.ir))

    def select(self, when_true: Operand, when_false: Operand) -> Val:
        """self is a mask: lane-wise choice."""
        if isinstance(when_true, Val):
            yes, no = self.emit.match(when_true, when_false)
        else:
            assert isinstance(when_false, Val)
            no, yes = self.emit.match(when_false, when_true)
        return Val(self.emit, self.emit.builder.select(self.ir, yes.ir, no.ir))

    def bits(self, element: ir.Type) -> Val:
        """The same bits seen as lanes of `element`."""
        width = 32 if self.is_float else self.element.width
        new_width = 32 if element == F32 else element.width
        kind = vector(element, self.lanes * width // new_width)
        return Val(self.emit, self.emit.builder.bitcast(self.ir, kind))

    def zext(self, element: ir.Type) -> Val:
        return Val(self.emit, self.emit.builder.zext(self.ir, vector(element, self.lanes)))

    def sext(self, element: ir.Type) -> Val:
        return Val(self.emit, self.emit.builder.sext(self.ir, vector(element, self.lanes)))

    def trunc(self, element: ir.Type) -> Val:
        return Val(self.emit, self.emit.builder.trunc(self.ir, vector(element, self.lanes)))

    def to_float(self) -> Val:
        """Signed integers to float32, round to nearest even."""
        return Val(self.emit, self.emit.builder.sitofp(self.ir, vector(F32, self.lanes)))

    def shuffle(self, indices: Sequence[int], other: Val | None = None) -> Val:
        """Lanes `indices` of (self, other)."""
        mask = constant(ir.VectorType(I32, len(indices)), tuple(indices))
        second = other.ir if other is not None else constant(self.ir.type, ir.Undefined)
        return Val(self.emit, self.emit.builder.shuffle_vector(self.ir, second, mask))

    def halves(self) -> tuple[Val, Val]:
        """Lower and upper half of the lanes."""
        n = self.lanes
        return self.shuffle(range(n // 2)), self.shuffle(range(n // 2, n))

    def concat(self, other: Val) -> Val:
        """self's lanes, then other's."""
        return self.shuffle(range(2 * self.lanes), other)


def pieces(value: Val, count: int) -> list[Val]:
    """Split into `count` (a power of two) vectors of equal length."""
    if count == 1:
        return [value]
    low, high = value.halves()
    return pieces(low, count // 2) + pieces(high, count // 2)


def join(values: list[Val]) -> Val:
    """The lanes of all, in order; a power of two of vectors of equal length."""
    while len(values) > 1:
        values = [values[i].concat(values[i + 1]) for i in range(0, len(values), 2)]
    return values[0]


class Var:
    """A mutable variable; LLVM turns it back into SSA form."""

    def __init__(self, emit: Emit, initial: Val) -> None:
        self._emit = emit
        with emit.builder.goto_entry_block():
            self._slot = emit.builder.alloca(initial.ir.type)
        self._type = initial.ir.type
        self.set(initial)

    def set(self, value: Val) -> None:
        self._emit.builder.store(value.ir, self._slot)

    def get(self) -> Val:
        return Val(self._emit, self._emit.builder.load(self._slot, typ=self._type))


class Emit:
    """Emits one function for one tier."""

    def __init__(self, builder: ir.IRBuilder, tier: Tier) -> None:
        self.builder = builder
        self.tier = tier

    # values

    def splat(self, value: float, element: ir.Type, lanes: int = 1) -> Val:
        """A constant in every lane."""
        return Val(self, constant(vector(element, lanes), value))

    def constant(self, values: Sequence[int], element: ir.Type) -> Val:
        return Val(self, constant(ir.VectorType(element, len(values)), tuple(values)))

    def broadcast(self, scalar: Val, lanes: int) -> Val:
        """A scalar in every lane."""
        if scalar.lanes == lanes:
            return scalar
        empty = constant(vector(scalar.element, lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar.ir, constant(I32, 0))
        return Val(self, first).shuffle([0] * lanes)

    def match(self, left: Val, right: Operand) -> tuple[Val, Val]:
        """Bring two operands to one shape: constants and scalars broadcast."""
        if not isinstance(right, Val):
            return left, self.splat(right, left.element, left.lanes)
        lanes = max(left.lanes, right.lanes)
        return self.broadcast(left, lanes), self.broadcast(right, lanes)

    def i64(self, value: int) -> Val:
        return self.splat(value, I64)

    # memory

    def load(self, address: Val, element: ir.Type, lanes: int = 1, align: int = 1) -> Val:
        pointer = self.builder.inttoptr(address.ir, ir.PointerType())
        return Val(self, self.builder.load(pointer, align=align, typ=vector(element, lanes)))

    def store(self, address: Val, value: Val, align: int = 1, *, past_caches: bool = False) -> None:
        """`past_caches`: the memory is not read soon; whole cache lines go there without being
        fetched first. `order_stores` belongs behind such stores."""
        pointer = self.builder.inttoptr(address.ir, ir.PointerType())
        stored = self.builder.store(value.ir, pointer, align=align)
        if past_caches:
            stored.set_metadata("nontemporal", self.builder.module.add_metadata([I32(1)]))

    def order_stores(self) -> None:
        """All stores so far are seen before any later one, those past caches included."""
        self.builder.fence("seq_cst")

    def prefetch(self, address: Val, locality: int = 3) -> None:
        """Hint that the cache line at `address` is read soon: to all cache levels, or with locality
        2 to all but the first."""
        pointer = self.builder.inttoptr(address.ir, ir.PointerType())
        hint = [constant(I32, n) for n in (0, locality, 1)]  # read, keep, data cache
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), I32, I32, I32])
        self.call("llvm.prefetch.p0", kind, [pointer, *hint])

    def touch(self, address: Val) -> None:
        """Load the 64 bytes at `address`, a cache line, for nothing but to have it come now.

        The order in which lines are first met is what the processor's prefetchers go by. They go by
        loads: a prefetch instruction is no substitute, nor is a load of a part of the line (Zen 4:
        Q6_K is read at 93 % of memory's speed with whole lines, 83 % with 16 bytes of each, 61 %
        with 8).
        """
        lanes = min(512, self.tier.vector_bits) // 32
        register = "w" if self.tier.machine == "aarch64" else "v"
        kind = ir.FunctionType(ir.VoidType(), [vector(I32, lanes)])
        for part in range(0, 16, lanes):
            value = self.load(address + 4 * part, I32, lanes, align=4 * lanes)
            self.builder.asm(kind, "", f"{register},~{{memory}}", [value.ir], True)

    def scratch(self, nbytes: int, align: int = 64) -> Val:
        """Address of memory on the stack, for the duration of the kernel's call."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(I8, nbytes))
            slot.align = align
            return Val(self, self.builder.ptrtoint(slot, I64))

    def fence(self) -> None:
        """No load or store moves across this point, and none is merged with one beyond it. Emits
        nothing; within a straight piece of code the compiler else chooses the order."""
        kind = ir.FunctionType(ir.VoidType(), [])
        self.builder.asm(kind, "", "~{memory}", [], True)

    def barrier(self) -> None:
        """No instruction at all moves across this point; it emits none either. A fence, and a label
        that nothing jumps to: LLVM's machine scheduler works between labels."""
        self.fence()
        module = self.builder.module
        name = module.add_metadata([ir.MetaDataString(module, "barrier")])
        kind = ir.FunctionType(ir.VoidType(), [ir.MetaDataType()])
        self.call("llvm.codeview.annotation", kind, [name])

    # control flow

    def var(self, initial: Val) -> Var:
        return Var(self, initial)

    @contextmanager
    def loop(self, start: Operand, stop: Val, step: int = 1) -> Iterator[Val]:
        """`for i in range(start, stop, step)` over 64-bit integers."""
        index = self.var(start if isinstance(start, Val) else self.i64(int(start)))
        test = self.builder.append_basic_block("test")
        body = self.builder.append_basic_block("body")
        done = self.builder.append_basic_block("done")
        self.builder.branch(test)
        self.builder.position_at_end(test)
        self.builder.cbranch((index.get() < stop).ir, body, done)
        self.builder.position_at_end(body)
        yield index.get()
        index.set(index.get() + step)
        self.builder.branch(test)
        self.builder.position_at_end(done)

    @contextmanager
    def when(self, condition: Val) -> Iterator[None]:
        """Run the block if the scalar condition holds."""
        with self.builder.if_then(condition.ir):
            yield

    # calls

    def call(self, name: str, kind: ir.FunctionType, args: Sequence[Any]) -> Any:
        """Call an LLVM intrinsic."""
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, args)

    def intrinsic(self, name: str, result: ir.Type, *args: Val) -> Val:
        """A target's intrinsic over vectors."""
        kind = ir.FunctionType(result, [a.ir.type for a in args])
        return Val(self, self.call(name, kind, [a.ir for a in args]))

    def reduce(self, how: str, value: Val) -> Val:
        """Horizontal `add`, `umax` of integer lanes."""
        element = value.element
        name = f"llvm.vector.reduce.{how}.v{value.lanes}i{element.width}"
        return self.intrinsic(name, element, value)

    def op(self, name: str, *args: Any) -> Val:
        """An op whose lowering belongs to the tier; `ops` states what it means."""
        value: Val = self.tier.lowering(name)(self, *args)
        return value


KernelBody = Callable[..., None]


def build_module(functions: Sequence[tuple[str, int, KernelBody]], tier: Tier, label: str) -> str:
    """IR text of a module.

    Args:
        functions: (name, arity, body); every parameter is an int64 and `body` is called as
            body(emit, *parameters). The function returns nothing.
    """
    module = ir.Module(name=label)
    for name, arity, body in functions:
        kind = ir.FunctionType(ir.VoidType(), [I64] * arity)
        function = ir.Function(module, kind, name)
        function.attributes.add("nounwind")
        emit = Emit(ir.IRBuilder(function.append_basic_block("entry")), tier)
        body(emit, *[Val(emit, argument) for argument in function.args])
        emit.builder.ret_void()
    return tier.finish(str(module))
