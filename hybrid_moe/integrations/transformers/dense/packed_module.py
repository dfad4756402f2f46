"""What modules with packed weights have in common: what they refuse, and how they are copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from hybrid_moe.integrations.transformers.dense.held import HeldMatrix
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight
from hybrid_moe.runtime import torch_op


class PackedModule(torch.nn.Module):
    """A module whose parameters are `PackedWeight`s of one `HeldMatrix`, called at most `weight`
    and `bias`. It stays on the CPU and in its dtype, and its parameters stay what they are."""

    _held: HeldMatrix
    _handle: torch_op.Handle
    _is_hf_initialized = True
    """Transformers does not draw random weights for it."""

    def _take(self, held: HeldMatrix, run: torch_op.Run) -> None:
        """To be called by constructors, between `Module.__init__` and setting parameters."""
        self._held = held
        self._handle = torch_op.Handle(self, run)

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{self._held.where}: {what}, but its weight is packed by hybrid_moe: change the model "
            'before its layers are packed, or load it with dense="torch"; load_state_dict takes a '
            "whole new weight"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda` and their kin. What leaves a tensor as it is passes."""
        probe = torch.empty(1, dtype=self._held.dtype, device="cpu")
        if fn(probe) is not probe or probe.is_shared():  # type: ignore[no-untyped-call]
            self._refuse("it cannot be converted, moved or shared")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_parameters", ()) and value is not self._parameters[name]:
            self._refuse(f"its {name} cannot be replaced")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            self._refuse(f"its {name} cannot be removed or parametrized")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        if "_held" in self.__dict__ and not (param is None or isinstance(param, PackedWeight)):
            self._refuse(f"no parameter {name} can be added to it")
        super().register_parameter(name, param)

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
        """Pack what is given, see `HeldMatrix.load`; what is this module's own weight stays."""
        given: dict[str, torch.Tensor | None] = {}
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if value is None and parameter is not None and strict:
                missing_keys.append(prefix + name)
            same = isinstance(value, PackedWeight) and value.held.matrix is self._held.matrix
            given[name] = None if same else value
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key.removeprefix(prefix) not in self._parameters
            ]
        if any(value is not None for value in given.values()):
            try:
                self._held.load(given["weight"], given.get("bias"))
            except (ValueError, RuntimeError) as error:
                error_msgs.append(str(error))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Packed weights never change, so a copy of the model shares them."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        own = {name: value for name, value in self.__dict__.items() if name != "_handle"}
        made.__dict__.update(copy.deepcopy(own, memo))
        made.__dict__["_handle"] = torch_op.Handle(made, self._handle.run)
        return made

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{self._held.where}: weights packed by hybrid_moe cannot be pickled: save_pretrained "
            "writes them"
        )
