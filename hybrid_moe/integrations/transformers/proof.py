"""The activation of an experts module, and the layout of its fused gate and up, proved.

Attributes suggest a formula; `_apply_gate` runs on a grid of values and must agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from hybrid_moe.formats.activation import Activation


def recognise_activation(
    module: torch.nn.Module, where: str, concatenated: bool = True
) -> Activation:
    """The `Activation` that equals `module._apply_gate` on `_probes`: see there for what it proves.

    Raises:
        NotImplementedError: none does.
    """
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        raise NotImplementedError(f"{where}: the class has no _apply_gate to read its activation")

    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        halves = [gate, up]
        gate_up = torch.cat(halves) if concatenated else torch.stack(halves, dim=-1).flatten()
        computed: torch.Tensor = apply_gate(gate_up[None])[0]
        return computed

    activation = agreeing_activation(module, apply)
    if activation is not None:
        return activation
    raise NotImplementedError(
        f"{where}: its activation is not one of silu(gate) * up, the same with both clamped, "
        "and clamped gate * sigmoid(alpha * gate) * (up + 1)"
    )


def agreeing_activation(
    module: torch.nn.Module, apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
) -> Activation | None:
    """The `Activation` that `module`'s attributes suggest and that equals `apply` on `_probes`.

    Args:
        apply: (gate, up), float32 [N] each -> [N]; None where it cannot be applied.
    """
    candidates = list(_candidates(module))
    gate, up = _probes({c.limit for c in candidates})
    with torch.no_grad():
        computed = apply(gate, up)
    if computed is None:
        return None
    for activation in candidates:
        if torch.allclose(computed, _swiglu(gate, up, activation), rtol=1e-5, atol=1e-30):
            return activation
    return None


def _candidates(module: torch.nn.Module) -> Iterator[Activation]:
    """Activations that the module's own attributes suggest, clamped before unclamped.

    The order does not decide: the probes reach beyond every limit, so a clamped and an unclamped
    candidate never both agree. It says which of them has to be disproved first.
    """

    def number(*names: str) -> float:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
                value = value.item()
            if isinstance(value, (int, float)) and 0 < value < math.inf:
                return float(value)
        return 0.0

    limit, alpha = number("limit", "swiglu_limit"), number("alpha", "swiglu_alpha")
    for clamp in dict.fromkeys((limit, 0.0)):
        for slope in dict.fromkeys((alpha, 0.0)):
            yield Activation(limit=clamp, alpha=slope)


FAR = 2.0**100
"""No clamp is beyond this: BF16 gates and ups of such a size belong to no model, and FAR times the
ordinary values beside it is still finite in float32."""


def _probes(limits: set[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (gate, up), float32 [N] each, on which candidates are held against a module.

    What agreement proves. Every candidate is smooth but for its clamps, which are at the limit that
    the module names. Ordinary values (-24 to 24 by 1, every gate with every up) fix the smooth
    part: which function of gate, its alpha, the offset of up, and which of the two is which.
    Values just inside, at and just outside of each named limit fix the place of the clamp and
    whether there is one, to 2^-8 of it, and that it is one-sided for gate. Powers of two up to
    `FAR`, each beside ordinary values of the other factor, meet any clamp that no attribute names,
    wherever it is. What remains unseen is a function that leaves the formula between two
    neighbouring points and returns to it; no experts module is like that.
    """

    def cpu(values: list[float]) -> torch.Tensor:  # Transformers builds models under other defaults
        return torch.tensor(values, device="cpu", dtype=torch.float32)

    ordinary = cpu([float(x) for x in range(-24, 25)])
    near = [limit * (1 + step) for limit in sorted(limits) for step in (-(2.0**-8), 0, 2.0**-8, 1)]
    far = [2.0**power for power in range(5, 101)]
    outer = cpu([sign * x for x in near + far for sign in (1, -1) if x <= FAR])
    few = cpu([-3.0, -1.0, 0.5, 2.0])
    meshes = ((ordinary, ordinary), (outer, few), (few, outer))
    pairs = [torch.cartesian_prod(*mesh) for mesh in meshes]
    gate, up = torch.cat(pairs).unbind(dim=1)
    return gate, up


def _swiglu(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The formula that `Activation` documents."""
    if activation.limit > 0:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
    if activation.alpha > 0:
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    return gate * torch.sigmoid(gate) * up
