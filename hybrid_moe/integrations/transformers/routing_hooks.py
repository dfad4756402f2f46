"""Recording the routing of a Transformers model while it runs.

    with recorded_routing(model) as recorder:
        model.generate(...)
    profile = recorder.profile("my prompts")

Every module of experts gets the ids that its router chose, whatever the family calls the router.
That holds for models of this package (`offload`, `from_pretrained`), for plain ones, and for those
that run their experts by `experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hybrid_moe.integrations.transformers.experts_module import experts_spec, is_experts
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.loading import layer_index
from hybrid_moe.loaders.model_config import TOP_K, ModelConfig
from hybrid_moe.placement.routing_profile import RoutedModel
from hybrid_moe.placement.routing_recorder import WINDOW_TOKENS, RoutingRecorder


def routed_model(model: torch.nn.Module) -> RoutedModel:
    """What a profile says about a Transformers model.

    Raises:
        ValueError: it has no experts that Transformers dispatches, or its configuration does not
            say how many a token takes.
    """
    return _described(model, _experts(model))


def _experts(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Its modules of experts by layer, ascending."""
    found = {
        layer_index(name): module
        for name, module in model.named_modules()
        if isinstance(module, HybridExperts) or is_experts(module)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that Transformers dispatches: no routing to "
            "record"
        )
    return dict(sorted(found.items()))


def _described(model: torch.nn.Module, experts: Mapping[int, torch.nn.Module]) -> RoutedModel:
    own = getattr(model, "config", None)
    config = ModelConfig({} if own is None else own.to_dict(), "the configuration")
    specs = {
        layer: module.spec if isinstance(module, HybridExperts) else experts_spec(module)
        for layer, module in experts.items()
    }
    top_k = [config.of_layer(TOP_K, layer) for layer in experts]
    known = [k for k in top_k if k is not None]
    if len(known) < len(top_k):
        layer = list(experts)[top_k.index(None)]
        raise ValueError(
            f"{config.where} of {type(model).__name__} does not say how many experts a token takes "
            f"in layer {layer}"
        )
    return RoutedModel(
        str(config.raw.get("model_type", "")),
        next(iter(specs.values())).hidden,
        max(spec.num_experts for spec in specs.values()),
        max(known),
        tuple(experts),
    )


@contextmanager
def recorded_routing(
    model: torch.nn.Module, *, pairs: bool = True, window_tokens: int = WINDOW_TOKENS
) -> Iterator[RoutingRecorder]:
    """Count what the routers of `model` choose inside the `with`.

    A call with one new token for each sequence is decode, any other is prefill.

    Args:
        model: a Transformers model with experts.
        pairs: whether to count pairs of experts too.
        window_tokens: tokens of a window of time at first, see `RoutingRecorder`.

    Raises:
        ValueError: as `routed_model`.
    """
    experts = _experts(model)
    recorder = RoutingRecorder(_described(model, experts), pairs=pairs, window_tokens=window_tokens)
    since_mark = 0

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.set_phase("decode" if _new_tokens(args, kwargs) == 1 else "prefill")

    def count(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal since_mark
        ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
        recorder.add(layer, ids)
        if layer == recorder.model.layers[0]:
            since_mark += len(ids)

    def end(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
        nonlocal since_mark
        if since_mark >= recorder.window_tokens:
            recorder.mark()
            since_mark = 0

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
    ]
    for layer, module in experts.items():

        def hook(
            module: torch.nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            layer: int = layer,
        ) -> None:
            count(layer, args, kwargs)

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield recorder
    finally:
        for handle in hooks:
            handle.remove()


def _new_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Of each sequence in a call of a model; None where it does not say."""
    for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, torch.Tensor) and given.dim() > 1:
            return given.shape[1]
    return None
