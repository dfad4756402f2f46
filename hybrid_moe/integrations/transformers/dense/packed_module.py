"""What modules with packed weights have in common: what they refuse, and how they are copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.integrations.transformers.dense.held import HeldMatrix
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight
from hybrid_moe.runtime import torch_op


def _refuse(where: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"{where} is packed by hybrid_moe: {what}. Change the model before its layers are packed, "
        'or load it with dense="torch"; load_state_dict takes a whole new weight'
    )


class _FixedParameters(dict[str, Any]):
    """Parameters by name, which are neither replaced nor removed, nor joined by others. Some write
    here past `__setattr__`: pruning, `functional_call`, accelerate. `torch.export` puts tensors
    without values in their place while it traces, and puts them back."""

    def __init__(self, parameters: dict[str, Any], where: str) -> None:
        super().__init__(parameters)
        self._own, self._where = parameters, where

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._own or not (value is self._own[name] or isinstance(value, FakeTensor)):
            _refuse(self._where, f"its {name} cannot be replaced or parametrized")
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        _refuse(self._where, f"its {name} cannot be removed or parametrized")


class PackedModule(torch.nn.Module):
    """A module whose parameters are `PackedWeight`s of one `HeldMatrix`, called at most `weight`
    and `bias`. It stays on the CPU and in its dtype, and its parameters stay what they are."""

    _held: HeldMatrix
    _handle: torch_op.Handle
    _is_hf_initialized = True
    """Transformers does not draw random weights for it."""

    def _take(self, held: HeldMatrix, run: torch_op.Run) -> None:
        """To be called by constructors, after `Module.__init__`."""
        self._held = held
        self._handle = torch_op.Handle(self, run)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda` and their kin. What leaves a tensor as it is passes."""
        probe = torch.empty(1, dtype=self._held.dtype, device="cpu")
        if fn(probe) is not probe or probe.is_shared():  # type: ignore[no-untyped-call]
            _refuse(self._held.where, "it cannot be converted, moved or shared")
        return self

    def _fix_parameters(self, **parameters: torch.Tensor | None) -> None:
        """Let these be its parameters from now on. To be called last by constructors."""
        self.__dict__["_parameters"] = _FixedParameters(parameters, self._held.where)

    def reset_parameters(self) -> None:
        """Refused: the weight is packed."""
        _refuse(self._held.where, "its weight cannot be drawn anew")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parameters:
            self._parameters[name] = value  # the same, or refused
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """`PackedWeight`s, which unpack when they are read; nothing while nothing is loaded, so
        that whoever loads the rest of a model does not look for them."""
        if self._held.matrix.loaded:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Pack what is given, see `HeldMatrix.load`. Packed weights of the same kind are shared,
        and so what is this module's own weight stays."""
        given: dict[str, torch.Tensor | None] = {}
        names = [name for name, parameter in self._parameters.items() if parameter is not None]
        for name in names:
            value = state_dict.get(prefix + name)
            if value is None and strict:
                missing_keys.append(prefix + name)
            given[name] = value
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key.removeprefix(prefix) not in names
            ]
        source = _source(given)
        if source is not None and self._held.share(source):
            return
        if any(value is not None for value in given.values()):
            try:
                self._held.load(given["weight"], given.get("bias"))
            except (ValueError, RuntimeError) as error:
                error_msgs.append(str(error))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Packed weights never change, so a copy of the model shares them."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        apart = ("_handle", "_parameters")
        own = {name: value for name, value in self.__dict__.items() if name not in apart}
        made.__dict__.update(copy.deepcopy(own, memo))
        made._fix_parameters(**copy.deepcopy(dict(self._parameters), memo))
        made._take(made._held, self._handle.run)
        return made

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{self._held.where}: weights packed by hybrid_moe cannot be pickled: save_pretrained "
            "writes them"
        )


def _source(given: Mapping[str, torch.Tensor | None]) -> PackedMatrix | None:
    """The matrix whose weight these are, with its bias if it has one; None for anything else."""
    found = None
    for name, value in given.items():
        if not (isinstance(value, PackedWeight) and value.whole and value.part == name):
            return None
        if found not in (None, value.held.matrix):
            return None
        found = value.held.matrix
    return found if found is not None and found.loaded else None
