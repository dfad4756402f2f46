"""Acting on modules when they are imported, without importing them.

The modules are other packages', and so is the import: it sees nothing of this. An act that fails is
logged, and the module is there as if nobody had waited for it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

Act = Callable[[ModuleType], object]


def when_imported(names: tuple[str, ...], act: Act) -> None:
    """Call `act` with each module of `names`: now if it is loaded, and whenever it is executed from
    now on. Idempotent for the same names and function."""
    for name in names:
        if name in sys.modules:
            _try(act, sys.modules[name])
    watch = _Watch(names, act)
    if watch not in sys.meta_path:
        sys.meta_path.insert(0, watch)


def _try(act: Act, module: ModuleType) -> None:
    try:
        act(module)
    except Exception:
        _log.exception("hybrid_moe could not hook into %s and does without", module.__name__)


class _Watch(NamedTuple):
    """A meta path finder that finds nothing itself: it lets those behind it find the module, and
    appends to its execution."""

    names: tuple[str, ...]
    act: Act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        finders = iter(sys.meta_path)
        for finder in finders:
            if finder is self:
                break
        for finder in finders:  # those behind: another watch of the same module among them
            find_spec = getattr(finder, "find_spec", None)  # absent from finders of old
            spec: ModuleSpec | None = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.act)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Stands for a module's loader until the module is executed."""

    def __init__(self, loader: Any, act: Act) -> None:
        self._loader, self._act = loader, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _try(self._act, module)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: somebody copies this object
            raise AttributeError(name)
        return getattr(self._loader, name)
