"""What the expressions of a driver are: values, references, calls. See `jit.translate`."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.driver import (
    I1,
    I64,
    VOID,
    ArrayType,
    Driver,
    Intrinsic,
    RefType,
    name_of,
)
from hybrid_moe.cpu_kernels.jit.record import (
    ArrayPointer,
    Field,
    Inline,
    Kind,
    Pointer,
    Record,
    Scalar,
    Shared,
    Table,
    Word,
)

_COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
}

AnyDriver = Driver[..., Any]


@dataclass(frozen=True)
class Ref:
    """A reference: what lies at an address. Other values are LLVM's own, int64 or i1."""

    what: RefType
    address: Any


def type_of(value: Any) -> RefType | None:
    return value.what if isinstance(value, Ref) else None


def _code(node: ast.AST) -> str:
    return f"`{ast.unparse(node).splitlines()[0]}`"


class Expressions:
    """The expressions of one driver. Variables live in stack slots, which LLVM turns into
    registers."""

    def __init__(
        self,
        driver: AnyDriver,
        function: ir.Function,
        declare: Callable[[AnyDriver], ir.Function],
    ) -> None:
        self.driver = driver
        self.function = function
        self.declare = declare
        code = driver.function.__code__
        self.file: str = code.co_filename
        self.locals = frozenset(code.co_varnames)
        self.enclosing = frozenset(code.co_freevars)
        self.globals = driver.function.__globals__
        self.entry = self.block("entry")
        self.builder = ir.IRBuilder(self.block("body"))
        self.slots: dict[str, tuple[Any, RefType | None]] = {}
        self.assigned: set[str] = set()
        """Names that have a value, whatever way led here."""
        self.calls: list[tuple[AnyDriver, ast.Call]] = []

    def error(self, node: ast.AST, what: str) -> SyntaxError:
        line = getattr(node, "lineno", "?")
        return SyntaxError(f"{self.file}:{line}: {what} (in driver {self.driver.__name__})")

    def block(self, name: str) -> ir.Block:
        return self.function.append_basic_block(name)

    # names

    def assign(self, node: ast.AST, name: str, value: Any) -> None:
        what = type_of(value)
        if name not in self.slots:
            slot = ir.IRBuilder(self.entry).alloca(I64, name=name)
            self.slots[name] = slot, what
        slot, before = self.slots[name]
        if before != what:
            raise self.error(node, f"`{name}` is {name_of(before)}, and becomes {name_of(what)}")
        self.builder.store(value.address if isinstance(value, Ref) else self.widen(value), slot)
        self.assigned.add(name)

    def variable(self, node: ast.AST, name: str) -> Any:
        if name not in self.assigned:
            raise self.error(node, f"`{name}` may be read before it is assigned")
        slot, what = self.slots[name]
        value = self.builder.load(slot)
        return value if what is None else Ref(what, value)

    def widen(self, value: Any) -> Any:
        return self.builder.zext(value, I64) if value.type == I1 else value

    # values

    def scalar(self, node: ast.expr) -> Any:
        """An int64 or a truth value."""
        value = self.value(node)
        if isinstance(value, Ref):
            hint = ", which threads share: use the atomics" if value.what is Word else ""
            what = f"{name_of(value.what)}{hint}, not an integer"
            raise self.error(node, f"{_code(node)} is {what}")
        return value

    def integer(self, node: ast.expr) -> Any:
        return self.widen(self.scalar(node))

    def reference(self, node: ast.expr, what: RefType, role: str) -> Any:
        """The address of what must be a `what`."""
        value = self.value(node)
        found = type_of(value)
        if isinstance(found, ArrayType) and what == ArrayType(found.of):
            found = what  # a table is an array
        if not isinstance(value, Ref) or found != what:
            wanted = f"{role} must be {name_of(what)}"
            raise self.error(node, f"{wanted}, and {_code(node)} is {name_of(found)}")
        return value.address

    def truth(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            return self.short_circuit(isinstance(node.op, ast.And), node.values, self.truth)
        value = self.scalar(node)
        if value.type == I1:
            return value
        return self.builder.icmp_signed("!=", value, ir.Constant(I64, 0))

    def flag(self, node: ast.expr) -> Any:
        """A truth value; not an integer, of which Python's `and` and `or` return either one."""
        value = self.scalar(node)
        if value.type != I1:
            raise self.error(node, f"{_code(node)} is not a truth value")
        return value

    def value(self, node: ast.expr) -> Any:
        """An LLVM value or a `Ref`."""
        match node:
            case ast.Name(id=name) if name in self.locals:
                return self.variable(node, name)
            case ast.Attribute(value=owner, attr="address") if not self.is_global(owner):
                value = self.value(owner)
                if not isinstance(value, Ref):
                    raise self.error(node, f"{_code(owner)} is an integer and has no address")
                return value.address
            case ast.Attribute(value=owner) if not self.is_global(owner):
                return self.read(*self.place(node))
            case ast.Subscript():
                return self.read(*self.place(node))
            case ast.Constant() | ast.Name() | ast.Attribute():
                return self.constant(node)
            case ast.BinOp(left=left, op=how, right=right):
                return self.binary(node, how, self.integer(left), self.integer(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.builder.not_(self.truth(operand))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
                return ir.Constant(I64, -self.constant(operand).constant)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.builder.neg(self.integer(operand))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.builder.not_(self.integer(operand))
            case ast.Compare(left=left, ops=[how], comparators=[right]) if type(how) in _COMPARE:
                operands = self.integer(left), self.integer(right)
                return self.builder.icmp_signed(_COMPARE[type(how)], *operands)
            case ast.BoolOp(op=how, values=values):
                return self.short_circuit(isinstance(how, ast.And), values, self.flag)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                branches = (lambda: self.integer(body)), (lambda: self.integer(orelse))
                return self.choose(self.truth(test), *branches)
            case ast.Call():
                result = self.call(node)
                if result is None:
                    raise self.error(node, f"{_code(node)} has no value")
                return result
        raise self.error(node, f"drivers have no {_code(node)}")

    def is_global(self, node: ast.expr) -> bool:
        """Whether this is a name from outside the driver, or an attribute of one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id not in self.locals

    # records

    def place(self, node: ast.expr) -> tuple[Kind[Any], Any]:
        """What a field or an item holds, and its address."""
        match node:
            case ast.Attribute(value=owner, attr=name):
                value = self.value(owner)
                what = type_of(value)
                fields: Mapping[str, Field[Any]] = {}
                if isinstance(what, type) and issubclass(what, Record):
                    fields = what.fields
                if name not in fields:
                    raise self.error(
                        node, f"{_code(owner)} is {name_of(what)}, which has no field `{name}`"
                    )
                offset = ir.Constant(I64, fields[name].offset)
                return fields[name].kind, self.builder.add(value.address, offset)
            case ast.Subscript(value=owner, slice=index):
                value = self.value(owner)
                what = type_of(value)
                if not isinstance(what, ArrayType):
                    raise self.error(node, f"{_code(owner)} is {name_of(what)}, not an array")
                flat = self.flat_index(node, what.shape or (1,), index)
                step = ir.Constant(I64, what.of.nbytes)
                return what.of, self.builder.add(value.address, self.builder.mul(flat, step))
        raise self.error(node, f"drivers have no {_code(node)}")

    def flat_index(self, node: ast.AST, shape: tuple[int, ...], index: ast.expr) -> Any:
        """Items before the one at an index, in C order."""
        indices = index.elts if isinstance(index, ast.Tuple) else [index]
        if len(indices) != len(shape):
            raise self.error(node, f"{_code(node)} takes {len(shape)} indices")
        flat = self.integer(indices[0])
        for size, other in zip(shape[1:], indices[1:], strict=True):
            flat = self.builder.mul(flat, ir.Constant(I64, size))
            flat = self.builder.add(flat, self.integer(other))
        return flat

    def pointer(self, kind: Kind[Any], address: Any) -> Any:
        kind_of_item = ir.IntType(8 * kind.nbytes) if isinstance(kind, Scalar) else I64
        return self.builder.inttoptr(address, kind_of_item.as_pointer())

    def read(self, kind: Kind[Any], address: Any) -> Any:
        """What lies at an address: an int64, or a reference."""
        match kind:
            case Scalar():
                value = self.builder.load(self.pointer(kind, address), align=kind.nbytes)
                if value.type == I64:
                    return value
                return (self.builder.sext if kind.signed else self.builder.zext)(value, I64)
            case Shared():
                return Ref(Word, address)
            case Inline(record=record):
                return Ref(record, address)
            case Table(of=of, shape=shape):
                return Ref(ArrayType(of, shape), address)
            case Pointer(to=record):
                return Ref(record, self.builder.load(self.pointer(kind, address), align=8))
            case ArrayPointer(of=of):
                return Ref(ArrayType(of), self.builder.load(self.pointer(kind, address), align=8))
        raise AssertionError(kind)

    def write(self, kind: Kind[Any], address: Any, value: Any) -> None:
        """Store a value of the kind's type."""
        if isinstance(value, Ref):
            value = value.address
        elif isinstance(kind, Scalar) and kind.nbytes < 8:
            value = self.builder.trunc(value, ir.IntType(8 * kind.nbytes))
        align = min(8, kind.nbytes)
        self.builder.store(value, self.pointer(kind, address), align=align)

    def value_for(self, node: ast.expr, target: ast.expr, kind: Kind[Any]) -> Any:
        """The value of `node` as it is stored in a field or item `target`."""
        match kind:
            case Scalar():
                return self.integer(node)
            case Pointer(to=record):
                return Ref(record, self.reference(node, record, _code(target)))
            case ArrayPointer(of=of):
                return Ref(ArrayType(of), self.reference(node, ArrayType(of), _code(target)))
        raise self.error(target, f"{_code(target)} is {kind}, and is not assigned to")

    # operators

    def choose(
        self, condition: Any, when_true: Callable[[], Any], when_false: Callable[[], Any]
    ) -> Any:
        """The value of one of two branches; the other is not evaluated."""
        then, orelse, end = self.block("then"), self.block("else"), self.block("end")
        self.builder.cbranch(condition, then, orelse)
        incoming = []
        for start, evaluate in ((then, when_true), (orelse, when_false)):
            self.builder.position_at_end(start)
            incoming.append((evaluate(), self.builder.block))
            self.builder.branch(end)
        self.builder.position_at_end(end)
        result = self.builder.phi(incoming[0][0].type)
        for value, block in incoming:
            result.add_incoming(value, block)
        return result

    def short_circuit(
        self, conjunction: bool, values: list[ast.expr], evaluate: Callable[[ast.expr], Any]
    ) -> Any:
        """`and`, `or` as a truth value: a later operand is evaluated only if it matters."""
        first = evaluate(values[0])
        if len(values) == 1:
            return first

        def rest() -> Any:
            return self.short_circuit(conjunction, values[1:], evaluate)

        def known() -> Any:
            return ir.Constant(I1, not conjunction)

        return self.choose(first, *((rest, known) if conjunction else (known, rest)))

    def binary(self, node: ast.AST, how: ast.operator, left: Any, right: Any) -> Any:
        if type(how) in _BINARY:
            return getattr(self.builder, _BINARY[type(how)])(left, right)
        if isinstance(how, ast.LShift | ast.RShift):
            return self.shift(node, isinstance(how, ast.LShift), left, right)
        if not isinstance(how, ast.FloorDiv | ast.Mod):
            raise self.error(node, f"drivers have no {type(how).__name__}")
        return self.divide(left, right)[isinstance(how, ast.Mod)]

    def shift(self, node: ast.AST, up: bool, left: Any, right: Any) -> Any:
        b, most = self.builder, ir.Constant(I64, 63)
        if isinstance(right, ir.Constant):
            if not 0 <= right.constant < 64:
                raise self.error(node, f"{_code(node)} shifts by {right.constant}: 0 to 63 can")
            return b.shl(left, right) if up else b.ashr(left, right)
        beyond = b.icmp_unsigned(">", right, most)
        if not up:
            return b.ashr(left, b.select(beyond, most, right))
        return b.select(beyond, ir.Constant(I64, 0), b.shl(left, b.and_(right, most)))

    def divide(self, left: Any, right: Any) -> tuple[Any, Any]:
        """Quotient rounded down and remainder. Dividing by 0 traps, and so may dividing by -1; for
        both the quotient is the product."""
        b, zero = self.builder, ir.Constant(I64, 0)
        easy = b.icmp_unsigned("<", b.add(right, ir.Constant(I64, 1)), ir.Constant(I64, 2))
        divisor = b.select(easy, ir.Constant(I64, 1), right)
        quotient, rest = b.sdiv(left, divisor), b.srem(left, divisor)
        opposite = b.icmp_signed("<", b.xor(rest, divisor), zero)
        down = b.and_(b.icmp_signed("!=", rest, zero), opposite)
        quotient = b.sub(quotient, b.zext(down, I64))
        rest = b.add(rest, b.select(down, divisor, zero))
        return b.select(easy, b.mul(left, right), quotient), b.select(easy, zero, rest)

    # constants and calls

    def constant(self, node: ast.expr) -> Any:
        """A literal, or a global that holds an integer."""
        value = self.known(node)
        if not isinstance(value, int):
            raise self.error(node, f"{_code(node)} is not an integer")
        if not -(2**63) <= value < 2**63:
            raise self.error(node, f"{_code(node)} takes more than 64 bits")
        return ir.Constant(I1 if isinstance(value, bool) else I64, int(value))

    def known(self, node: ast.expr) -> Any:
        """The Python object that a literal, a global or its attribute is."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in self.enclosing:
                raise self.error(node, f"`{name}` is a variable of the enclosing function")
            case ast.Name(id=name) if name in self.locals:
                pass
            case ast.Name(id=name) if name in self.globals:
                return self.globals[name]
            case ast.Name(id=name) if hasattr(builtins, name):
                return getattr(builtins, name)
            case ast.Attribute(value=owner, attr=name) if hasattr(self.known(owner), name):
                return getattr(self.known(owner), name)
        raise self.error(node, f"{_code(node)} is not known")

    def call(self, node: ast.Call) -> Any:
        """The value of a call, or None if it has none."""
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self.error(node, "arguments go by position")
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr="at"), args=[address]):
                what = self.known(owner)
                if isinstance(what, Kind):
                    return Ref(ArrayType(what), self.integer(address))
                if isinstance(what, type) and issubclass(what, Record):
                    return Ref(what, self.integer(address))
        callee = self.known(node.func)
        if isinstance(callee, Driver):
            return self.call_driver(node, callee)
        if isinstance(callee, Intrinsic):
            return self.call_intrinsic(node, callee)
        if callee not in (min, max):
            raise self.error(node, f"{_code(node.func)} is neither driver nor intrinsic")
        best, *others = [self.integer(argument) for argument in node.args]
        for other in others:
            better = self.builder.icmp_signed("<" if callee is min else ">", other, best)
            best = self.builder.select(better, other, best)
        return best

    def call_driver(self, node: ast.Call, callee: AnyDriver) -> Any:
        if len(node.args) != len(callee.parameters):
            raise self.error(node, f"{callee.__name__} takes {len(callee.parameters)} values")
        arguments = [
            self.integer(argument)
            if what is None
            else self.reference(argument, what, f"`{name}` of {callee.__name__}")
            for argument, (name, what) in zip(node.args, callee.parameters.items(), strict=True)
        ]
        self.calls.append((callee, node))
        result = self.builder.call(self.declare(callee), arguments)
        if callee.result is not None:
            return Ref(callee.result, result)
        return None if result.type == VOID else result

    def call_intrinsic(self, node: ast.Call, callee: Intrinsic) -> Any:
        if not callee.takes(len(node.args)):
            raise self.error(node, f"{callee.__name__} does not take {len(node.args)} values")
        arguments = []
        for place, argument in enumerate(node.args):
            if callee.atomic and place == 0:
                role = f"the first value of {callee.__name__}"
                arguments.append(self.reference(argument, Word, role))
            else:
                arguments.append(self.integer(argument))
        return callee.emit(self.builder, *arguments)
