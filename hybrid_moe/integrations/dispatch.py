"""`experts_implementation="hybrid_moe"`: experts that stay in their module and are packed at use.

The module keeps its parameters, so the memory is spent twice; in return any model that
Transformers has loaded can try the CPU experts and go back. `hybrid_moe.offload` and
`hybrid_moe.from_pretrained` are the ways that do not spend it twice.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.integrations.experts_module import ExpertsSpec, describe
from hybrid_moe.integrations.hybrid_experts import fill, new_layer, run_layer
from hybrid_moe.integrations.options import ExpertsOptions

_ATTRIBUTE = "_hybrid_moe_packed"


@dataclass(frozen=True)
class _State:
    """One parameter as it was: weakly held, since a successor may get its identity and address."""

    parameter: weakref.ReferenceType[torch.nn.Parameter]
    address: int
    version: int

    @classmethod
    def of(cls, p: torch.nn.Parameter) -> _State:
        return cls(weakref.ref(p), p.data_ptr(), -1 if p.is_inference() else p._version)

    def holds(self, p: torch.nn.Parameter) -> bool:
        """Whether `p` is still that parameter, neither moved nor written in place."""
        now = self.of(p)
        return self.parameter() is p and (self.address, self.version) == (now.address, now.version)


@dataclass(frozen=True)
class _Packed:
    """A module's parameters and options when they were packed, and the result.

    A copy of the module shares it, and finds it to be another module's; a pickle has None instead.
    """

    options: ExpertsOptions
    states: dict[str, _State]
    spec: ExpertsSpec
    layer: ExpertLayer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def is_current(
        self, options: ExpertsOptions, parameters: dict[str, torch.nn.Parameter]
    ) -> bool:
        return (
            options == self.options
            and parameters.keys() == self.states.keys()
            and all(self.states[name].holds(p) for name, p in parameters.items())
        )


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run an experts module of Transformers on the CPU kernels.

    The first call packs the module's weights, as does the first after they changed. Method,
    threads and pools come from `config.hybrid_moe_options` (a mapping such as
    `{"method": "MXFP4", "threads": 8}`), by default BF16 on every core.

    Args:
        module: the experts module.
        hidden_states: [S, H].
        top_k_index: [S, k]; ids outside the module's experts (expert parallel) contribute zero.
        top_k_weights: [S, k].

    Raises:
        NotImplementedError: the module computes something that this package does not.
    """
    options = ExpertsOptions.of(getattr(module, "config", None))
    parameters = dict(module.named_parameters(recurse=False))
    packed: _Packed | None = module.__dict__.get(_ATTRIBUTE)
    if packed is None or not packed.is_current(options, parameters):
        module.__dict__.pop(_ATTRIBUTE, None)  # frees the panels, unless a copy has them too
        packed = None
        spec = describe(module)
        layer = new_layer(spec, options)
        fill(layer, module, spec, options.fmt)
        states = {name: _State.of(p) for name, p in parameters.items()}
        packed = _Packed(options, states, spec, layer)
        module.__dict__[_ATTRIBUTE] = packed
    return run_layer(packed.layer, packed.spec, hidden_states, top_k_index, top_k_weights)
