"""What a Transformers experts module computes and what it holds, read from the module itself.

Transformers marks its experts modules with the facts that matter: `has_gate`, `has_bias`,
`is_transposed`, `is_concatenated`, and a method `_apply_gate` that is the activation. Names of
attributes alone would be a guess (`limit` is a clamp in two families and nothing elsewhere), so
the activation is read from the attributes and then proved, see `proof`. A module that nothing
explains is refused by its class's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.proof import recognise_activation
from hybrid_moe.loaders.quantize import encode

MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes that Transformers' `use_experts_implementation` puts on an experts module."""

WEIGHTS = tuple(
    f"{name}{suffix}"
    for name in ("gate_up_proj", "down_proj")
    for suffix in ("", "_bias", "_scale_inv")
)
"""Attributes of an experts module that hold what is packed."""


@dataclass(frozen=True)
class ExpertsSpec:
    """Sizes and arithmetic of one experts module.

    Attributes:
        where: the module's name in the model and its class, for messages.
        num_experts: experts that the module holds (those of this rank).
        hidden: H, inputs of gate and up, outputs of down.
        intermediate: I, outputs of gate and up.
        activation: the gated activation between them.
        transposed: weights are [E, inputs, outputs] rather than [E, outputs, inputs].
        concatenated: gate rows precede up rows; otherwise they alternate. Shapes, names and biases
            do not tell: the module's own `_apply_gate` does, see `proof`.
        biased: the module has `gate_up_proj_bias` and `down_proj_bias`.
    """

    where: str
    num_experts: int
    hidden: int
    intermediate: int
    activation: Activation
    transposed: bool
    concatenated: bool
    biased: bool


def find_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every experts module of `model` by its name.

    Raises:
        ValueError: there is none; where there are others, it names them.
    """
    found = {name: m for name, m in model.named_modules() if is_experts(m)}
    if not found:
        foreign = foreign_experts(model)
        if foreign:
            raise ValueError(unsupported(type(model).__name__, foreign))
        raise ValueError(
            f"{type(model).__name__} has no experts that Transformers dispatches "
            "(modules with an experts_implementation): it is no mixture of experts, "
            "or its experts have been moved already"
        )
    return found


def is_experts(module: torch.nn.Module) -> bool:
    """Whether Transformers dispatches `module` by `experts_implementation`."""
    return all(hasattr(module, mark) for mark in MARKS) or hasattr(module, "gate_up_proj_scale_inv")


def foreign_experts(model: torch.nn.Module) -> dict[str, str]:
    """Modules that look like routed experts, and that Transformers does not dispatch: the class of
    each by its name. By their looks: called `experts`, or of a class called so, with parameters."""
    foreign: dict[str, str] = {}
    for name, module in model.named_modules():
        kind, last = type(module).__name__, name.rpartition(".")[2]
        looks = last == "experts" or kind.endswith("Experts")
        if not looks or "shared" in f"{last} {kind}".lower() or is_experts(module):
            continue
        inner = any(is_experts(m) for m in module.modules())
        if not inner and any(True for _ in module.parameters()):
            one = next(iter(module.children()), module)
            foreign[name] = type(one).__name__ if type(module) is torch.nn.ModuleList else kind
    return foreign


def unsupported(model: str, foreign: Mapping[str, str]) -> str:
    """The sentence that refuses them."""
    names = ", ".join(sorted(set(foreign.values())))
    where = next(iter(foreign))
    return (
        f"{model}: {names} ({where}{', ...' if len(foreign) > 1 else ''}) is not supported. "
        "hybrid_moe runs experts that Transformers dispatches by experts_implementation: fused "
        "gate_up_proj and down_proj with SwiGLU, as in Qwen-MoE, Mixtral, DeepSeek, GLM, MiniMax "
        "and gpt-oss"
    )


def refuse_adapters(model: torch.nn.Module, found: Mapping[str, torch.nn.Module]) -> None:
    """Raise where packing would lose what is added to experts: LoRA and its like.

    Adapters come as modules around the experts (peft: `base_layer`), as parametrizations of their
    weights, or as parameters of their own inside.

    Args:
        model: the model.
        found: its experts modules by name.

    Raises:
        NotImplementedError: names the module and what is on it.
    """
    for name, module in found.items():
        parts = name.split(".")
        above = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        around = [m for m in above if isinstance(getattr(m, "base_layer", None), torch.nn.Module)]
        inside = [n for n, _ in module.named_parameters() if n not in WEIGHTS]
        what = None
        if around:
            what = f"is wrapped by {type(around[0]).__name__}"
        elif parametrize.is_parametrized(module):
            what = "has parametrized weights (LoRA with target_parameters does so)"
        elif any("lora" in n.lower() or "adapter" in n.lower() for n in inside):
            what = f"has adapters: {', '.join(inside[:3])}"
        if what:
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) {what}: adapters on experts are not supported, "
                "merge them into the weights first (peft: merge_and_unload)"
            )


def experts_spec(module: torch.nn.Module, name: str = "experts") -> ExpertsSpec:
    """Sizes and arithmetic of `module`, whose parameters may be on meta.

    Raises:
        NotImplementedError: the module computes something that this package does not.
    """
    where = f"{name} ({type(module).__name__})"
    if not getattr(module, "has_gate", True):
        raise NotImplementedError(f"{where}: experts without a gate projection are not supported")
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(f"{where}: a norm after each expert is not supported")
    others = [n for n, _ in module.named_parameters(recurse=False) if n not in WEIGHTS]
    if others:
        raise NotImplementedError(f"{where}: parameters {', '.join(others)} are not supported")
    for parameter in ("gate_up_proj", "down_proj"):
        weight = getattr(module, parameter, None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 3:
            raise NotImplementedError(f"{where}: {parameter} is not one tensor of three dimensions")
    gate_up, down = _parameter(module, "gate_up_proj"), _parameter(module, "down_proj")
    transposed = bool(getattr(module, "is_transposed", False))
    concatenated = bool(getattr(module, "is_concatenated", True))
    rows, inputs = (2, 1) if transposed else (1, 2)
    codes_per_byte = 2 if gate_up.dtype in (torch.int8, torch.uint8) else 1
    spec = ExpertsSpec(
        where=where,
        num_experts=gate_up.shape[0],
        hidden=gate_up.shape[inputs] * codes_per_byte,
        intermediate=down.shape[inputs] * codes_per_byte,
        activation=recognise_activation(module, where, concatenated),
        transposed=transposed,
        concatenated=concatenated,
        biased=bool(getattr(module, "has_bias", False)),
    )
    if gate_up.shape[rows] != 2 * spec.intermediate or down.shape[rows] != spec.hidden:
        raise NotImplementedError(
            f"{where}: gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} "
            "are not the two halves of one gated expert"
        )
    return spec


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights as it would use them now, [E, ...] each, by name; where they are
    computed (`torch.nn.utils.parametrize`, adapters), the results."""
    found = {name: getattr(module, name, None) for name in WEIGHTS}
    return {name: w.detach() for name, w in found.items() if isinstance(w, torch.Tensor)}


def expert_tensors(
    module: torch.nn.Module, spec: ExpertsSpec, expert: int, fmt: WeightFormat
) -> ExpertTensors:
    """The matrices of one expert in `fmt`, quantised if the module holds something else.

    BF16 weights are views on the module's memory in BF16; FP4 weights likewise in MXFP4.

    Raises:
        NotImplementedError: the module's weights are neither floating point nor FP4.
    """
    gate_up = _stored(module, spec, "gate_up_proj", expert)
    down = _stored(module, spec, "down_proj", expert)
    gate, up = gate_up.matrix.split(interleaved=not spec.concatenated)
    stored = (_Stored(gate_up.fmt, gate), _Stored(gate_up.fmt, up), down)
    return ExpertTensors(*(_in_format(matrix, fmt) for matrix in stored))


def common_format(found: Mapping[str, torch.nn.Module]) -> WeightFormat:
    """The format in which experts modules hold their weights; wider floats are rounded to BF16.

    Raises:
        ValueError: they differ.
    """
    formats = {
        MXFP4 if _parameter(module, "gate_up_proj").dtype in (torch.int8, torch.uint8) else BF16
        for module in found.values()
    }
    if len(formats) > 1:
        raise ValueError(
            "some experts of the model are MXFP4 and some BF16: name one method for all"
        )
    return formats.pop()


@dataclass(frozen=True)
class _Stored:
    """A matrix and the format that it is in; None for codes that are float32 weights."""

    fmt: WeightFormat | None
    matrix: Matrix


def _stored(module: torch.nn.Module, spec: ExpertsSpec, name: str, expert: int) -> _Stored:
    """One parameter of one expert as [outputs, inputs]: in the bits that the module has, or in
    float32 if it has another float type, so that weights are rounded once."""
    weight = _parameter(module, name)[expert].detach().cpu()
    bias = None
    if spec.biased:
        bias = _parameter(module, f"{name}_bias")[expert].detach().float().cpu().numpy()
    where = f"{spec.where}.{name}[{expert}]"
    if spec.transposed:
        weight = weight.t()
    if weight.dtype in (torch.int8, torch.uint8):
        scale = _parameter(module, f"{name}_scale_inv")[expert].detach().cpu()
        codes = weight.view(torch.uint8).numpy()
        return _Stored(MXFP4, Matrix(codes, _ue8m0(scale, where), bias, where))
    if weight.dtype == torch.bfloat16:
        bits = weight.view(torch.int16).numpy().view(np.uint16)
        return _Stored(BF16, Matrix(bits, None, bias, where))
    if weight.dtype in (torch.float32, torch.float16):
        return _Stored(None, Matrix(weight.float().contiguous().numpy(), None, bias, where))
    raise NotImplementedError(f"{where}: weights of {weight.dtype} are not supported")


def _in_format(stored: _Stored, fmt: WeightFormat) -> Matrix:
    if stored.fmt is fmt:
        return stored.matrix
    m = stored.matrix
    plain = stored.fmt is None or stored.fmt is BF16
    raw = m.codes if plain or stored.fmt is None else m.dequantize(stored.fmt)
    codes, scales = encode(fmt, raw)
    return Matrix(codes, scales, m.bias, m.where, scale_rows=fmt.scale_rows)


def _ue8m0(scale: torch.Tensor, where: str) -> Array:
    """E8M0 bytes of scales stored as float8_e8m0fnu, as bytes, or as float32 powers of two."""
    if scale.element_size() == 1:
        return scale.view(torch.uint8).numpy()
    mantissa, exponent = np.frexp(scale.float().numpy())
    if not (mantissa == 0.5).all():
        raise NotImplementedError(f"{where}: FP4 scales that are not powers of two")
    return np.asarray(exponent - 1 + 127, dtype=np.uint8)


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    value: Any = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value
