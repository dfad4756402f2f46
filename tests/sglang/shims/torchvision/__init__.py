"""Test shim: image processors of SGLang and Transformers import torchvision; a text model never
calls it.

PyPI's torchvision is built for CUDA and cannot be imported beside torch's CPU build. Every module
`torchvision.*` exists here, and every name in it is a class without anything.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0"


class _Empty(type):
    """Classes whose attributes are such classes again (`InterpolationMode.BICUBIC`)."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith("torchvision."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Empty(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]


sys.meta_path.insert(0, _Submodules())
