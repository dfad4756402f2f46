"""Acts on a module of SGLang when SGLang imports it, without importing it.

The import itself is SGLang's and sees nothing of this: an act that fails is logged, and the module
is there as if nobody had waited for it.
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


def when_imported(name: str, act: Act) -> None:
    """Call `act` with the module `name`: now if it is loaded, and whenever it is executed from now
    on. Idempotent for the same name and function."""
    if name in sys.modules:
        _try(act, sys.modules[name])
    watch = _Watch(name, act)
    if watch not in sys.meta_path:
        sys.meta_path.insert(0, watch)


def _try(act: Act, module: ModuleType) -> None:
    try:
        act(module)
    except Exception:
        _log.exception("hybrid_moe could not hook into %s and does without", module.__name__)


class _Watch(NamedTuple):
    """A meta path finder that finds nothing itself: it asks the finders behind it, and appends
    `act` to the execution of what they find."""

    name: str
    act: Act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]  # other watches among them
        finds = (getattr(finder, "find_spec", None) for finder in behind)  # old finders have none
        specs = (find(name, path, target) for find in finds if find is not None)
        spec: ModuleSpec | None = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            _append(spec.loader, self.act)
        return spec


def _append(loader: Any, act: Act) -> None:
    """Let `loader`, which is this one module's, call `act` once it has executed the module."""
    execute = loader.exec_module

    def execute_and_act(module: ModuleType) -> None:
        loader.exec_module = execute
        execute(module)
        _try(act, module)

    loader.exec_module = execute_and_act
