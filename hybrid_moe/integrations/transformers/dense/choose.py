"""Which linear layers of a model the CPU kernels compute, told from its modules alone.

Looked at are the language models around the experts, each the innermost `PreTrainedModel` that
holds some, and the output layers of the models around these. So vision and audio towers, and what
projects from them to the language model, are never touched.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.integrations.transformers.dense.embedding import why_not_tied
from hybrid_moe.integrations.transformers.dense.grouped import groups_of
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import GatedMLP, gated_mlp
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.text import format_bytes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of weights that can be packed."""

_MULTIPLIED = re.compile(r"\bself\.(\w+)\.weight\s*@")
"""A layer whose weight its parent multiplies by instead of calling it (Jamba's `dt_proj`): each
call would unpack it."""


@dataclass
class Choice:
    """What becomes of a model's linear layers, all by their names in the model.

    Attributes:
        linears: single layers that are taken.
        mlps: gated MLPs that are taken as a whole; their layers are not in `linears`.
        grouped: block-diagonal layers that are taken, with the number of their blocks.
        tied: of output layers among `linears` whose weight is an embedding's too, that embedding.
        kept: layers that stay with torch, and why.
    """

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    mlps: dict[str, GatedMLP] = field(default_factory=dict)
    grouped: dict[str, tuple[nn.Linear, int]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    kept: dict[str, tuple[nn.Linear, str]] = field(default_factory=dict)

    def weights(self) -> dict[str, nn.Linear]:
        """Every layer that is taken, those within MLPs too."""
        inner = {
            f"{name}.{child}": linear
            for name, mlp in self.mlps.items()
            for child, linear in mlp.linears.items()
        }
        return {**self.linears, **inner, **{n: linear for n, (linear, _) in self.grouped.items()}}

    def split(self, name: str) -> None:
        """Take the layers of an MLP one by one."""
        for child, linear in self.mlps.pop(name).linears.items():
            self.linears[f"{name}.{child}"] = linear

    def keep(self, name: str, reason: str) -> None:
        """Leave a layer with torch after all; an MLP of which it is a part is split."""
        parent = name.rpartition(".")[0]
        if parent in self.mlps:
            self.split(parent)
        linear = self.grouped.pop(name)[0] if name in self.grouped else self.linears.pop(name)
        self.tied.pop(name, None)
        self.kept[name] = (linear, reason)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what stays with torch."""
        return sum(_nbytes(linear) for linear, _ in self.kept.values())

    def report(self) -> str:
        """What stays with torch, in one line: layers of the same name together, with their bytes
        and the reason."""
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name, (linear, reason) in self.kept.items():
            alike[re.sub(r"\.\d+(?=\.|$)", ".*", name), reason].append(_nbytes(linear))
        return ", ".join(
            f"{len(sizes)} {name} ({reason}, {format_bytes(sum(sizes))})"
            for (name, reason), sizes in sorted(alike.items())
        )


def choose(
    model: nn.Module,
    experts: Mapping[str, ExpertsSpec],
    in_float32: Callable[[str], bool] = lambda name: False,
) -> Choice:
    """Choose among the linear layers of `model`.

    Args:
        model: weights on the CPU, or on meta while it is being built.
        experts: the sizes of its experts modules, by name.
        in_float32: whether the parameter of this name will be loaded in float32, though the model
            is not.
    """
    found = dict(_linears(model, experts))
    adapters = _adapters(model)
    routers = _routers(model, experts)
    common = _common_dtype(model)
    users = _users(model)

    def in_place(name: str, linear: nn.Linear) -> str | None:
        """Why a layer that could be taken is not, where it is."""
        if any(name.startswith(prefix) for prefix in routers):
            return "router"
        if common != linear.weight.dtype == torch.float32 or in_float32(f"{name}.weight"):
            return "kept in float32"
        parent, _, child = name.rpartition(".")
        kind: Any = type(model.get_submodule(parent))
        if child in _multiplied(kind):
            return f"{kind.__name__} reads its weight"
        return _shared(users[name])

    choice = Choice()
    for name, linear in found.items():
        if any(name.startswith(prefix) for prefix in adapters):
            continue
        groups = groups_of(linear)
        if type(linear) is not nn.Linear and not groups:
            reason: str | None = type(linear).__name__
        else:
            rows = linear.out_features // (groups or 1)
            reason = _objection(linear, rows) or in_place(name, linear)
        if reason:
            choice.kept[name] = (linear, reason)
        elif groups:
            choice.grouped[name] = (linear, groups)
        else:
            choice.linears[name] = linear
            if users[name]:  # one, see `_shared`
                choice.tied[name] = users[name][0][0]
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in choice.linears):
        mlp = gated_mlp(model.get_submodule(parent))
        names = [] if mlp is None else [f"{parent}.{child}" for child in mlp.linears]
        if mlp is not None and all(name in choice.linears for name in names):
            choice.mlps[parent] = mlp
            for name in names:
                del choice.linears[name]
    return choice


def _linears(
    model: nn.Module, experts: Mapping[str, ExpertsSpec]
) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the language models and their output layers."""
    inside, heads = _language_models(model, experts)
    for name, module in model.named_modules():
        within = any(name.startswith(prefix) for prefix in inside)
        packed = isinstance(module, HybridLinear)
        if isinstance(module, nn.Linear) and not packed and (within or id(module) in heads):
            yield name, module


def _language_models(
    model: nn.Module, experts: Mapping[str, ExpertsSpec]
) -> tuple[set[str], set[int]]:
    """What the names of their modules begin with, and the ids of their output layers."""
    from transformers import PreTrainedModel

    inside: set[str] = set()
    heads: set[int] = set()
    for name in experts:
        parts = name.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts))]
        models = [p for p in around if isinstance(model.get_submodule(p), PreTrainedModel)]
        innermost = (models or [""])[-1]
        inside.add(f"{innermost}." if innermost else "")
        for path in models:
            head = model.get_submodule(path).get_output_embeddings()  # type: ignore[operator]
            heads.add(id(head))
    return inside, heads


def _adapters(model: nn.Module) -> list[str]:
    """What the names of layers begin with that adapters (LoRA) add: they are small, and trained."""
    return [
        f"{name}.{child}."
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        for child, _ in module.named_children()
        if child != "base_layer"
    ]


def _routers(model: nn.Module, experts: Mapping[str, ExpertsSpec]) -> list[str]:
    """What the names of routers' layers begin with.

    Of what stands beside the experts in their block, a router is what gives no hidden states: a
    module of whose layers none has that many outputs, or a layer of other outputs that no layer
    beside it maps back (as `down_proj` does those of `up_proj`).
    """
    found = []
    for name, spec in experts.items():
        parent = name.rpartition(".")[0]
        stem = f"{parent}." if parent else ""
        block = dict(model.get_submodule(parent).named_children())
        layers = [m for m in block.values() if isinstance(m, nn.Linear)]
        for child, module in block.items():
            if f"{stem}{child}" == name:
                continue
            if isinstance(module, nn.Linear):
                sizes = (module.out_features, module.in_features)
                back = any((m.in_features, m.out_features) == sizes for m in layers)
                if module.out_features != spec.hidden and not back:
                    found.append(f"{stem}{child}")
            else:
                inner = [m for m in module.modules() if isinstance(m, nn.Linear)]
                if inner and all(m.out_features != spec.hidden for m in inner):
                    found.append(f"{stem}{child}.")
    return found


def _nbytes(linear: nn.Linear) -> int:
    return sum(p.numel() * p.element_size() for p in linear.parameters(recurse=False))


def _common_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of the weights of linear layers, packed ones too."""
    numbers: dict[torch.dtype, int] = defaultdict(int)
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None:
            numbers[weight.dtype] += weight.numel()
    return max(numbers, key=lambda dtype: numbers[dtype], default=None)


def _users(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Of every module's `weight`, by the module's name, the other modules that have the same, as
    they are or as Transformers will tie them once it has loaded them."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[str | int, list[tuple[str, nn.Module]]] = defaultdict(list)
    identity: dict[str, str | int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if module._parameters.get("weight") is not None:
            key = f"{name}.weight"
            identity[name] = id(parameters[ties.get(key, key)])
            owners[identity[name]].append((name, module))
    return {
        name: [(other, module) for other, module in owners[one] if other != name]
        for name, one in identity.items()
    }


def _objection(linear: nn.Linear, rows: int) -> str | None:
    """Why a layer cannot be taken, by itself; `rows` are the outputs of one of its blocks."""
    if linear.weight.dtype not in FLOATS:
        return f"weights of {linear.weight.dtype}"
    if linear.weight.device.type not in ("cpu", "meta"):
        return f"on {linear.weight.device}"
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)
    if any(hooks) or hasattr(linear, "_hf_hook") or "forward" in vars(linear):
        return "has hooks"
    if rows < STRIP_ROWS:
        return "small"
    if linear.in_features % GROUP:
        return f"{linear.in_features} inputs are no multiple of {GROUP}"
    return None


def _shared(others: Sequence[tuple[str, nn.Module]]) -> str | None:
    """Why a layer's weight cannot be taken, by who else has it. One plain embedding may."""
    for other, module in others:
        obstacle = why_not_tied(module) or ("has others" if len(others) > 1 else None)
        if obstacle:
            return f"shares its weight with {other}, which {obstacle}"
    return None


@lru_cache(maxsize=256)
def _multiplied(kind: type[nn.Module]) -> frozenset[str]:
    """The children whose weights a module's class multiplies by; none where its source is not to be
    had."""
    try:
        return frozenset(_MULTIPLIED.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()
