"""Gated MLPs (shared experts, dense layers) as one job: an `ExpertLayer` of one expert.

Which module is one is proved on its own `forward`: it runs with its three layers replaced by what
gives fixed values for gate and up and passes on what goes into down.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import nn

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.hybrid_experts import run_layer
from hybrid_moe.integrations.transformers.proof import agreeing_activation
from hybrid_moe.runtime import torch_op

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatedMLP:
    """A module that computes down(activation(gate(x), up(x))).

    Attributes:
        kind: the module's class, for messages.
        names: its children's names for gate, up and down.
        linears: these children, in that order.
        activation: what is between them.
    """

    kind: str
    names: tuple[str, str, str]
    linears: dict[str, nn.Linear]
    activation: Activation

    @property
    def hidden(self) -> int:
        """Inputs of gate and up, outputs of down."""
        return self.linears[self.names[0]].in_features

    @property
    def intermediate(self) -> int:
        """Outputs of gate and up."""
        return self.linears[self.names[0]].out_features

    @property
    def biased(self) -> bool:
        """Whether any of the three has a bias."""
        return any(linear.bias is not None for linear in self.linears.values())


def gated_mlp(module: nn.Module) -> GatedMLP | None:
    """What `module` is as a gated MLP; None where it is none, or cannot be proved to be one."""
    children = {n: m for n, m in module.named_children() if type(m) is nn.Linear}
    parameters = sum(len(m._parameters) for m in children.values())
    if len(children) != 3 or sum(len(m._parameters) for m in module.modules()) != parameters:
        return None
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    for one, other, last in permutations(children):
        names = (one, other, last)
        gate, up, down = (children[name] for name in names)
        sizes = (gate.in_features, gate.out_features)
        if (up.in_features, up.out_features) != sizes or sizes != (
            down.out_features, down.in_features,
        ):  # fmt: skip
            continue
        activation = agreeing_activation(module, partial(_run_on, module, names))
        if activation is not None:
            linears = {name: children[name] for name in names}
            return GatedMLP(type(module).__name__, names, linears, activation)
    return None


class _Gives(nn.Module):
    """Stands for gate or up."""

    def __init__(self, given: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.given, self.values = given, values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.given and not torch.equal(x, self.given):
            raise _OtherInputError
        return self.values


class _Passes(nn.Module):
    """Stands for down; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.got: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.got = x.clone()
        return x


class _OtherInputError(Exception):
    """A layer is not given the module's own input."""


def _run_on(
    module: nn.Module, names: tuple[str, str, str], gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor | None:
    """What goes into down where gate and up have these values, [N] each; None where that is not
    what the module returns, or where it does not run."""
    x, passes = torch.tensor([[[1.0, -2.0]]], device="cpu"), _Passes()
    stand_in = copy.copy(module)
    layers = (_Gives(x, gate[None, None]), _Gives(x, up[None, None]), passes)
    replaced = {**module._modules, **dict(zip(names, layers, strict=True))}
    stand_in.__dict__["_modules"] = replaced
    try:
        with torch.no_grad():
            result = type(module).forward(stand_in, x)
    except Exception as error:  # whatever a foreign `forward` may raise: it is no gated MLP then
        _log.debug("%s is not taken as a gated MLP: %r", type(module).__name__, error)
        return None
    if passes.got is None or not isinstance(result, torch.Tensor):
        return None
    if result.shape != (1, 1, len(gate)) or not torch.equal(result, passes.got):
        return None
    return result[0, 0]


class HybridMLP(nn.Module):
    """A gated MLP, packed for the CPU. It has no parameters.

    Attributes:
        layer: one expert, which is loaded later; `forward` before that raises.
        names: what the module that it replaces called gate, up and down.
        where: that module's name in the model and its class, for messages.
        dtype: that of its weights.
    """

    def __init__(
        self, mlp: GatedMLP, fmt: WeightFormat, pool: PoolConfig, where: str, dtype: torch.dtype
    ) -> None:
        """Describe it and take memory for it; nothing is resident before it is loaded."""
        super().__init__()
        spec = ExpertsSpec(
            where=where,
            num_experts=1,
            hidden=mlp.hidden,
            intermediate=mlp.intermediate,
            activation=mlp.activation,
            transposed=False,
            concatenated=True,
            biased=mlp.biased,
        )
        layer = ExpertLayer(
            fmt, 1, mlp.hidden, mlp.intermediate, pool=pool, activation=mlp.activation, name=where
        )
        layer.allocate(np.ones(1, np.bool_), biases=mlp.biased)
        biased = tuple(mlp.linears[name].bias is not None for name in mlp.names)
        self._describe(spec, layer, mlp.names, biased, dtype)

    def _describe(
        self,
        spec: ExpertsSpec,
        layer: ExpertLayer,
        names: tuple[str, str, str],
        biased: tuple[bool, ...],
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.layer, self.names, self.dtype = spec, layer, names, dtype
        self.biased = biased
        self._handle = torch_op.Handle(self, _run)
        self._routing = _every_token(1)

    def load(self, tensors: ExpertTensors) -> None:
        """Pack its three matrices; the arrays may be reused afterwards."""
        self.layer.load(0, tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> like x."""
        if torch_op.is_traced(x):
            rows = x.reshape(-1, x.shape[-1]).shape[0]
            return torch_op.experts(x, *_every_token(rows, x.device), self._handle.value)
        return self._compute(x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.spec.hidden
        ids, weights = self._routing
        if len(ids) < rows:  # a single store: threads may replace each other's
            ids, weights = self._routing = _every_token(rows)
        return run_layer(self.layer, self.spec, x, ids[:rows], weights[:rows])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A state dict may hold nothing of it: it is never part of `state_dict()`."""
        given = [key for key in state_dict if key.startswith(prefix)]
        if given:
            raise RuntimeError(
                f"{given[0]}: the weights of {self.spec.where} are packed and cannot be replaced: "
                "load them before offload, or into a checkpoint for from_pretrained"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridMLP:
        """Packed weights never change, so a copy of the model shares them."""
        copied = HybridMLP.__new__(HybridMLP)
        nn.Module.__init__(copied)
        copied._describe(self.spec, self.layer, self.names, self.biased, self.dtype)
        return copied.train(self.training)

    def __getstate__(self) -> Any:
        raise TypeError(f"{self.spec.where}: weights packed by hybrid_moe cannot be pickled")

    def extra_repr(self) -> str:
        s = self.spec
        return f"hidden={s.hidden}, intermediate={s.intermediate}, {self.layer.fmt.name}"


def _every_token(
    rows: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [rows, 1] that route every token to the one expert, with weight 1."""
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    return ids, torch.ones(rows, 1, dtype=torch.float32, device=device)


def _run(
    module: HybridMLP,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    return run_layer(module.layer, module.spec, hidden, ids, weights)
