"""Drivers -> LLVM IR: a small part of Python, over 64-bit integers and records.

A driver assigns to names, to fields of records (`jit.record`) and to items of their arrays, loops
(`while`, `for ... in range`), branches, returns, and calls `min`, `max`, intrinsics and other
drivers, not itself. Globals are integers, or modules that hold them. A value is an int64 that wraps
around, a truth value, or a reference to a record, an array or a shared word; `Job.at(address)` and
`i32.at(address)` make references of addresses, and `.address` the reverse. A name keeps the type of
what is first assigned to it, and is assigned to on every way to where it is read.

`and` and `or` of integers are conditions, not values. Quotients and remainders round down, as in
Python; dividing by zero gives 0, since compiled workers cannot raise. Shifts keep the sign, and by
64 or more (or less than 0) they shift out every bit: those by a constant are refused. Everything
else in a driver is an error that names the line.

Numba would take these sources too, but types and lowers them in 2.5 s, where this takes 0.2 s and a
cold start may take 5 (AMD EPYC, Zen 3).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.driver import I1, I64, VOID
from hybrid_moe.cpu_kernels.jit.expressions import AnyDriver, Expressions, Ref, type_of


def translate(entries: Mapping[str, AnyDriver]) -> str:
    """IR text of a module that exports each entry under its name, with all drivers they call.

    An entry takes int64, addresses of records among them, and returns int64: 0 for None, 0 or 1 for
    a truth value.
    """
    module = ir.Module(name="drivers")
    declared: dict[AnyDriver, ir.Function] = {}
    pending: list[AnyDriver] = []
    translated: dict[AnyDriver, _Translation] = {}

    def declare(driver: AnyDriver) -> ir.Function:
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
        translated[driver] = _Translation(driver, declared[driver], declare)
        translated[driver].run()
    _refuse_recursion(translated)
    return str(module)


def _refuse_recursion(translated: Mapping[AnyDriver, _Translation]) -> None:
    """Raise if a driver calls itself by whatever way: nothing would check a worker's stack."""
    under_way: list[AnyDriver] = []
    seen: set[AnyDriver] = set()

    def visit(driver: AnyDriver) -> None:
        seen.add(driver)
        under_way.append(driver)
        for callee, node in translated[driver].calls:
            if callee in under_way:
                raise translated[driver].error(node, f"{callee.__name__} ends up calling itself")
            if callee not in seen:
                visit(callee)
        under_way.pop()

    for driver in translated:
        if driver not in seen:
            visit(driver)


def _assignments(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of `a = x` and of `a, b = x, y`; nothing of other statements."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            if len(targets) == len(values) and all(isinstance(t, ast.Name) for t in targets):
                return list(zip(targets, values, strict=True))
        case ast.Assign(targets=[ast.Name() | ast.Attribute() | ast.Subscript() as target]):
            return [(target, node.value)]
    return []


@dataclass
class _Loop:
    """Where `continue` and `break` go, and what has been assigned on each way to the end."""

    again: ir.Block
    end: ir.Block
    ways: list[set[str]] = field(default_factory=list)


class _Translation(Expressions):
    """The statements of one driver."""

    def run(self) -> None:
        self.loops: list[_Loop] = []
        parameters = self.driver.parameters.items()
        for (name, what), argument in zip(parameters, self.function.args, strict=True):
            value = argument if what is None else Ref(what, argument)
            self.assign(self.driver.body[0], name, value)
        self.statements(self.driver.body)
        if not self.builder.block.is_terminated:
            if self.driver.kind.return_type != VOID:
                raise self.error(self.driver.body[-1], "the driver may end without a value")
            self.builder.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

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
                self.store(pairs)
            case ast.AugAssign(target=target, op=how, value=value):
                self.augment(node, target, how, value)
            case ast.If():
                self.branch(node)
            case ast.While(test=test, body=body, orelse=[]):
                self.repeat(test, body)
            case ast.For(
                target=ast.Name(id=name),
                iter=ast.Call(func=ast.Name(id="range") as called, args=[*bounds], keywords=[]),
                body=body,
                orelse=[],
            ) if len(bounds) in (1, 2):
                if called.id in self.locals or self.known(called) is not range:
                    raise self.error(node, "`range` is not Python's here")
                self.count(node, name, bounds, body)
            case ast.Break():
                self.loops[-1].ways.append(self.assigned)
                self.builder.branch(self.loops[-1].end)
            case ast.Continue():
                self.builder.branch(self.loops[-1].again)
            case ast.Return(value=value) if (value is None) == (
                self.driver.kind.return_type == VOID
            ):
                self.leave(value)
            case _:
                raise self.error(node, f"drivers have no `{ast.unparse(node).splitlines()[0]}`")

    def store(self, pairs: list[tuple[ast.expr, ast.expr]]) -> None:
        """Assign to names, all values first; or to one field or item."""
        ((target, value), *_) = pairs
        if not isinstance(target, ast.Name):
            kind, address = self.place(target)
            self.write(kind, address, self.value_for(value, target, kind))
            return
        values = [self.value(value) for _, value in pairs]
        for (name, _), new in zip(pairs, values, strict=True):
            assert isinstance(name, ast.Name)
            self.assign(name, name.id, new)

    def augment(self, node: ast.stmt, target: ast.expr, how: ast.operator, by: ast.expr) -> None:
        """`target += by` and the like: where the target lies is found once."""
        if isinstance(target, ast.Name):
            old = self.integer(ast.Name(target.id, ast.Load(), lineno=node.lineno))
            self.assign(node, target.id, self.binary(node, how, old, self.integer(by)))
            return
        kind, address = self.place(target)
        old = self.read(kind, address)
        if type_of(old) is not None:
            raise self.error(node, f"`{ast.unparse(target)}` is {kind}, not an integer")
        self.write(kind, address, self.binary(node, how, old, self.integer(by)))

    def leave(self, value: ast.expr | None) -> None:
        what, kind = self.driver.result, self.driver.kind.return_type
        if value is None:
            self.builder.ret_void()
        elif what is not None:
            self.builder.ret(self.reference(value, what, f"what {self.driver.__name__} returns"))
        else:
            self.builder.ret(self.truth(value) if kind == I1 else self.integer(value))

    def branch(self, node: ast.If) -> None:
        then, orelse, end = self.block("then"), self.block("else"), None
        self.builder.cbranch(self.truth(node.test), then, orelse)
        before, ways = self.assigned, []
        for start, body in ((then, node.body), (orelse, node.orelse)):
            self.builder.position_at_end(start)
            self.assigned = set(before)
            self.statements(body)
            if not self.builder.block.is_terminated:
                end = end or self.block("end")
                self.builder.branch(end)
                ways.append(self.assigned)
        if end is not None:
            self.builder.position_at_end(end)
            self.assigned = set.intersection(*ways)

    def repeat(self, condition: ast.expr, statements: list[ast.stmt]) -> None:
        """A `while` loop."""
        test, body, end = (self.block(name) for name in ("test", "body", "end"))
        loop = _Loop(test, end)
        self.builder.branch(test)
        self.builder.position_at_end(test)
        if isinstance(condition, ast.Constant) and condition.value is True:
            self.builder.branch(body)
        else:
            self.builder.cbranch(self.truth(condition), body, end)
            loop.ways.append(self.assigned)
        self.loop(loop, body, statements)

    def count(
        self, node: ast.For, name: str, bounds: list[ast.expr], statements: list[ast.stmt]
    ) -> None:
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
        loop = _Loop(step, end, [self.assigned])
        self.assigned = set(self.assigned)
        self.assign(node, name, index)
        self.loop(loop, body, statements)

    def loop(self, loop: _Loop, start: ir.Block, body: list[ast.stmt]) -> None:
        """The body of a loop, and on behind it."""
        self.loops.append(loop)
        self.builder.position_at_end(start)
        self.assigned = set(self.assigned)
        self.statements(body)
        if not self.builder.block.is_terminated:
            self.builder.branch(loop.again)
        self.loops.pop()
        self.builder.position_at_end(loop.end)
        if loop.ways:
            self.assigned = set.intersection(*loop.ways)
        else:
            self.builder.unreachable()
