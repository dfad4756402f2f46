"""Drivers -> LLVM IR: a small part of Python, over 64-bit integers.

A driver assigns to names, loops (`while`, `for ... in range`), branches, returns, and calls `min`,
`max`, intrinsics and other drivers. Globals are integers, or modules that hold them. A value is an
int64 that wraps around, or a truth value; `and` and `or` of integers are conditions, not values.
Quotients and remainders round down, as in Python; dividing by zero gives 0, since compiled workers
cannot raise. Shifts are by 0 to 63, the right one keeps the sign. Everything else in a driver is an
error that names the line.

Numba would take these sources too, but types and lowers them in 2.5 s, where this takes 0.2 s and a
cold start may take 5 (AMD EPYC, Zen 3).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.driver import I1, I64, VOID, Driver, Intrinsic

_COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.LShift: "shl",
    ast.RShift: "ashr",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
}


def translate(entries: Mapping[str, Driver]) -> str:
    """IR text of a module that exports each entry under its name, with all drivers they call.

    An entry takes int64 and returns int64: 0 for None, 0 or 1 for a truth value.
    """
    module = ir.Module(name="drivers")
    declared: dict[Driver, ir.Function] = {}
    pending: list[Driver] = []

    def declare(driver: Driver) -> ir.Function:
        if driver not in declared:
            function = declared[driver] = ir.Function(module, driver.kind, driver.symbol)
            function.linkage = "internal"
            function.attributes.add("nounwind")
            pending.append(driver)
        return declared[driver]

    for name, driver in entries.items():
        function = ir.Function(module, ir.FunctionType(I64, driver.kind.args), name)
        builder = ir.IRBuilder(function.append_basic_block())
        result = builder.call(declare(driver), function.args)
        builder.ret(ir.Constant(I64, 0) if result.type == VOID else builder.zext(result, I64))
    while pending:
        driver = pending.pop()
        _Translation(driver, declared[driver], declare).run()
    return str(module)


def _assignments(node: ast.Assign) -> list[tuple[str, ast.expr]]:
    """(name, value) of `a = x` and of `a, b = x, y`; nothing of other targets."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return [(name, value)]
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if len(names) == len(targets) == len(values):
                return list(zip(names, values, strict=True))
    return []


@dataclass
class _Loop:
    """Where `continue` and `break` go, and whether anything goes to the end."""

    again: ir.Block
    end: ir.Block
    ends: bool


class _Translation:
    """One driver. Variables live in stack slots, which LLVM turns into registers."""

    def __init__(
        self, driver: Driver, function: ir.Function, declare: Callable[[Driver], ir.Function]
    ) -> None:
        self.driver = driver
        self.function = function
        self.declare = declare
        self.locals = frozenset(driver.function.__code__.co_varnames)
        self.globals = driver.function.__globals__
        self.entry = self.block("entry")
        self.builder = ir.IRBuilder(self.block("body"))
        self.slots: dict[str, Any] = {}
        self.loops: list[_Loop] = []

    def run(self) -> None:
        for name, argument in zip(self.driver.parameters, self.function.args, strict=True):
            self.builder.store(argument, self.slot(name))
        self.statements(self.driver.body)
        if not self.builder.block.is_terminated:
            if self.driver.kind.return_type != VOID:
                raise self.error(self.driver.body[-1], "the driver may end without a value")
            self.builder.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

    def error(self, node: ast.AST, what: str) -> SyntaxError:
        path = self.driver.function.__code__.co_filename
        line = getattr(node, "lineno", "?")
        return SyntaxError(f"{path}:{line}: {what} (in driver {self.driver.__name__})")

    def block(self, name: str) -> ir.Block:
        return self.function.append_basic_block(name)

    def slot(self, name: str) -> Any:
        """The variable's slot; a variable that is read before it is set is 0."""
        if name not in self.slots:
            builder = ir.IRBuilder(self.entry)
            self.slots[name] = builder.alloca(I64, name=name)
            builder.store(ir.Constant(I64, 0), self.slots[name])
        return self.slots[name]

    # statements

    def statements(self, body: list[ast.stmt]) -> None:
        for node in body:
            if self.builder.block.is_terminated:
                raise self.error(node, "this is never reached")
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.Expr(value=ast.Call() as call):
                self.call(call)
            case ast.Assign() if pairs := _assignments(node):
                values = [self.integer(value) for _, value in pairs]
                for (name, _), new in zip(pairs, values, strict=True):
                    self.builder.store(new, self.slot(name))
            case ast.AugAssign(target=ast.Name(id=name), op=how, value=value):
                old = self.builder.load(self.slot(name))
                new = self.binary(node, how, old, self.integer(value))
                self.builder.store(new, self.slot(name))
            case ast.If():
                self.branch(node)
            case ast.While(test=test, body=body, orelse=[]):
                self.repeat(test, body)
            case ast.For(
                target=ast.Name(id=name),
                iter=ast.Call(func=ast.Name(id="range"), args=[*bounds], keywords=[]),
                body=body,
                orelse=[],
            ) if len(bounds) in (1, 2):
                self.count(name, bounds, body)
            case ast.Break():
                self.loops[-1].ends = True
                self.builder.branch(self.loops[-1].end)
            case ast.Continue():
                self.builder.branch(self.loops[-1].again)
            case ast.Return(value=value) if (value is None) == (
                self.driver.kind.return_type == VOID
            ):
                self.leave(value)
            case _:
                raise self.error(node, f"drivers have no `{ast.unparse(node).splitlines()[0]}`")

    def leave(self, value: ast.expr | None) -> None:
        if value is None:
            self.builder.ret_void()
        elif self.driver.kind.return_type == I1:
            self.builder.ret(self.truth(value))
        else:
            self.builder.ret(self.integer(value))

    def branch(self, node: ast.If) -> None:
        then, orelse, end = self.block("then"), self.block("else"), None
        self.builder.cbranch(self.truth(node.test), then, orelse)
        for start, body in ((then, node.body), (orelse, node.orelse)):
            self.builder.position_at_end(start)
            self.statements(body)
            if not self.builder.block.is_terminated:
                end = end or self.block("end")
                self.builder.branch(end)
        if end is not None:
            self.builder.position_at_end(end)

    def repeat(self, condition: ast.expr, statements: list[ast.stmt]) -> None:
        """A `while` loop."""
        test, body, end = (self.block(name) for name in ("test", "body", "end"))
        self.builder.branch(test)
        self.builder.position_at_end(test)
        endless = isinstance(condition, ast.Constant) and condition.value is True
        if endless:
            self.builder.branch(body)
        else:
            self.builder.cbranch(self.truth(condition), body, end)
        self.loop(_Loop(test, end, not endless), body, statements)

    def count(self, name: str, bounds: list[ast.expr], statements: list[ast.stmt]) -> None:
        """A `for` loop: bounds are evaluated once, and assigning to the index changes nothing."""
        *start, stop = (self.integer(bound) for bound in bounds)
        counter = ir.IRBuilder(self.entry).alloca(I64)
        self.builder.store(start[0] if start else ir.Constant(I64, 0), counter)
        test, body, step, end = (self.block(name) for name in ("test", "body", "step", "end"))
        self.builder.branch(test)
        self.builder.position_at_end(test)
        index = self.builder.load(counter)
        self.builder.cbranch(self.builder.icmp_signed("<", index, stop), body, end)
        self.builder.position_at_end(step)
        self.builder.store(self.builder.add(index, ir.Constant(I64, 1)), counter)
        self.builder.branch(test)
        self.builder.position_at_end(body)
        self.builder.store(index, self.slot(name))
        self.loop(_Loop(step, end, True), body, statements)

    def loop(self, loop: _Loop, start: ir.Block, body: list[ast.stmt]) -> None:
        """The body of a loop, and on behind it."""
        self.loops.append(loop)
        self.builder.position_at_end(start)
        self.statements(body)
        if not self.builder.block.is_terminated:
            self.builder.branch(loop.again)
        self.loops.pop()
        self.builder.position_at_end(loop.end)
        if not loop.ends:
            self.builder.unreachable()

    # expressions

    def integer(self, node: ast.expr) -> Any:
        value = self.value(node)
        return self.builder.zext(value, I64) if value.type == I1 else value

    def truth(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            return self.short_circuit(isinstance(node.op, ast.And), node.values, self.truth)
        value = self.value(node)
        if value.type == I1:
            return value
        return self.builder.icmp_signed("!=", value, ir.Constant(I64, 0))

    def flag(self, node: ast.expr) -> Any:
        """A truth value; not an integer, of which Python's `and` and `or` return either one."""
        value = self.value(node)
        if value.type != I1:
            raise self.error(node, f"`{ast.unparse(node)}` is not a truth value")
        return value

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in self.locals:
                return self.builder.load(self.slot(name))
            case ast.Constant() | ast.Name() | ast.Attribute():
                return self.constant(node)
            case ast.BinOp(left=left, op=how, right=right):
                return self.binary(node, how, self.integer(left), self.integer(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.builder.not_(self.truth(operand))
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
                if result is None or result.type == VOID:
                    raise self.error(node, f"`{ast.unparse(node)}` has no value")
                return result
        raise self.error(node, f"drivers have no `{ast.unparse(node)}`")

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
        if not isinstance(how, ast.FloorDiv | ast.Mod):
            raise self.error(node, f"drivers have no {type(how).__name__}")
        return self.divide(left, right)[isinstance(how, ast.Mod)]

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

    def constant(self, node: ast.expr) -> Any:
        """A literal, or a global that holds an integer."""
        value = self.known(node)
        if not isinstance(value, int):
            raise self.error(node, f"`{ast.unparse(node)}` is not an integer")
        if not -(2**63) <= value < 2**63:
            raise self.error(node, f"`{ast.unparse(node)}` takes more than 64 bits")
        return ir.Constant(I1 if isinstance(value, bool) else I64, int(value))

    def known(self, node: ast.expr) -> Any:
        """The Python object that a literal, a global or its attribute is."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in self.locals:
                pass
            case ast.Name(id=name) if name in self.globals:
                return self.globals[name]
            case ast.Name(id=name) if hasattr(builtins, name):
                return getattr(builtins, name)
            case ast.Attribute(value=owner, attr=name) if hasattr(self.known(owner), name):
                return getattr(self.known(owner), name)
        raise self.error(node, f"`{ast.unparse(node)}` is not known")

    def call(self, node: ast.Call) -> Any:
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self.error(node, "arguments go by position")
        callee = self.known(node.func)
        arguments = [self.integer(argument) for argument in node.args]
        if isinstance(callee, Intrinsic):
            return callee.emit(self.builder, *arguments)
        if isinstance(callee, Driver):
            if len(arguments) != len(callee.parameters):
                raise self.error(node, f"{callee.__name__} takes {len(callee.parameters)} values")
            return self.builder.call(self.declare(callee), arguments)
        if callee not in (min, max):
            raise self.error(node, f"`{ast.unparse(node.func)}` is neither driver nor intrinsic")
        best = arguments[0]
        for other in arguments[1:]:
            better = self.builder.icmp_signed("<" if callee is min else ">", other, best)
            best = self.builder.select(better, other, best)
        return best
