"""What drivers are made of: functions to compile, and the intrinsics that they may call."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from llvmlite import ir

I1, I64 = ir.IntType(1), ir.IntType(64)
VOID = ir.VoidType()

_RESULTS = {"int": I64, "bool": I1, "None": VOID}


class Intrinsic:
    """An operation on memory or the processor.

    `emit(builder, *values)` emits it for int64 values and returns an int64 or i1 value, or None.
    """

    def __init__(self, emit: Callable[..., Any]) -> None:
        self.emit = emit
        self.__name__ = emit.__name__
        self.__doc__ = emit.__doc__

    def __call__(self, *arguments: int) -> Any:
        raise RuntimeError(f"the intrinsic {self.__name__} exists in compiled drivers only")


class Driver:
    """A function to be compiled: every parameter an int64, the result as annotated.

    Called from Python it runs as Python, so that tests can compare.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.symbol = f"{function.__module__}.{function.__qualname__}"
        self.parameters = tuple(inspect.signature(function).parameters)
        result = function.__annotations__.get("return")
        if result not in _RESULTS:
            raise TypeError(f"{self.symbol} must return one of {', '.join(_RESULTS)}, not {result}")
        self.kind = ir.FunctionType(_RESULTS[result], [I64] * len(self.parameters))
        self._body: list[ast.stmt] | None = None

    def __call__(self, *arguments: int) -> Any:
        return self.function(*arguments)

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
