"""What drivers are made of: functions to compile, and the intrinsics that they may call."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from llvmlite import ir

from hybrid_moe.cpu_kernels.jit.record import Array, Kind, Record, Word, inline, with_article

I1, I64 = ir.IntType(1), ir.IntType(64)
VOID = ir.VoidType()

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ArrayType:
    """The type of arrays: of items of a kind, of any number of them (None) or in a table."""

    of: Kind[Any]
    shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"array of {self.of}"


RefType = type[Record] | type[Word] | ArrayType
"""What an address leads to. Other values of drivers are int64s and truth values."""


def name_of(what: RefType | None) -> str:
    """A type in messages; None is an integer."""
    if what is None:
        return "an integer"
    return with_article(what.__name__ if isinstance(what, type) else str(what))


class Intrinsic:
    """An operation on memory or the processor.

    `emit(builder, *values)` emits it for int64 values and returns an int64 or i1 value, or None.
    An atomic one takes a `Word` first, of which `emit` gets the address.
    """

    def __init__(self, emit: Callable[..., Any], atomic: bool = False) -> None:
        self.emit = emit
        self.atomic = atomic
        self.__name__ = emit.__name__
        self.__doc__ = emit.__doc__
        self._signature = inspect.signature(emit)

    def takes(self, count: int) -> bool:
        """Whether it takes so many values."""
        try:
            self._signature.bind(*[None] * (1 + count))
        except TypeError:
            return False
        return True

    def __call__(self, *arguments: Any) -> Any:
        raise RuntimeError(f"the intrinsic {self.__name__} exists in compiled drivers only")


def _reference(annotation: object) -> RefType | None:
    """What a parameter or result with this annotation leads to, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Record | Word):
        return annotation
    if typing.get_origin(annotation) is Array:
        (of,) = typing.get_args(annotation)
        if isinstance(of, type) and issubclass(of, Record):
            return ArrayType(inline(of))
    return None


class Driver(Generic[P, T]):
    """A function to be compiled. Parameters are int, or what an address leads to: a record, a word
    or an array of records. It returns int, bool, None or a record.

    Called from Python it runs as Python, so that tests can compare.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.symbol = f"{function.__module__}.{function.__qualname__}"
        signature = inspect.signature(function, eval_str=True)
        self.parameters: dict[str, RefType | None] = {}
        for name, parameter in signature.parameters.items():
            what = self.parameters[name] = _reference(parameter.annotation)
            if what is None and parameter.annotation is not int:
                raise TypeError(
                    f"{self.symbol}: {name} must be an int, a record, a Word or an array of "
                    f"records, not {_described(parameter.annotation)}"
                )
        result = signature.return_annotation
        self.result = _reference(result)
        kinds = {int: I64, bool: I1, None: VOID}
        if self.result is None and result not in kinds:
            raise TypeError(
                f"{self.symbol} must return int, bool, None or a record, not {_described(result)}"
            )
        kind = I64 if self.result is not None else kinds[result]
        self.kind = ir.FunctionType(kind, [I64] * len(self.parameters))
        self._body: list[ast.stmt] | None = None

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        return self.function(*arguments, **named)

    @property
    def body(self) -> list[ast.stmt]:
        """Its statements; line numbers are those of the file.

        Raises:
            ImportError: the package is installed without its sources.
        """
        if self._body is None:
            self._body = self._parse()
        return self._body

    def _parse(self) -> list[ast.stmt]:
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError) as error:
            module = self.function.__module__
            raise ImportError(
                f"hybrid_moe compiles its loops from their Python source, and this installation "
                f"lacks that of {module}: install the package with its .py files ({error})",
                name=module,
            ) from error
        tree = ast.parse(textwrap.dedent(source))
        ast.increment_lineno(tree, self.function.__code__.co_firstlineno - 1)
        (definition,) = tree.body
        assert isinstance(definition, ast.FunctionDef)
        return definition.body


def _described(annotation: object) -> str:
    if annotation is inspect.Parameter.empty:
        return "without an annotation"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
