"""Transformers models whose routed experts run on the CPU kernels.

Three ways in: `from_pretrained` (experts go from the checkpoint into strips and never pass through
torch), `offload` (experts of a loaded model move into strips), and the name "hybrid_moe" for
Transformers' own `experts_implementation` (experts stay where they are and are packed at use).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from hybrid_moe.formats.table import AS_STORED, AUTO, BF16, chosen_method
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import layer_formats
from hybrid_moe.integrations.transformers.guard import NAME, guard
from hybrid_moe.integrations.transformers.options import ExpertsOptions, dense_format
from hybrid_moe.loaders.find_model import find_model

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

logger = logging.getLogger(__name__)

DEFAULT_METHOD = "default"
"""Of `from_pretrained`: MXFP4, which is what most published experts are, and where a model is GGUF
whatever its layers are stored in."""

INTERFACES = {
    "transformers.integrations.moe": "ExpertsInterface",
    "transformers.integrations.finegrained_fp8": "FP8ExpertsInterface",
}
"""Module -> its class with `register(name, function)`; the second is for FP8 and FP4 experts."""

_NEEDED = "transformers >= 5.19 is needed"

MODELS = "transformers.modeling_utils"
"""The module whose `PreTrainedModel` is guarded, see `guard`."""


def experts_function(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What Transformers calls: (experts module, hidden [S, H], ids [S, k], weights [S, k]). The
    implementation is imported at its first call."""
    from hybrid_moe.integrations.transformers.dispatch import experts_forward

    return experts_forward(module, *args, **kwargs)


def register() -> None:
    """Register `experts_implementation="hybrid_moe"`, also for FP8 and FP4 experts. Idempotent.

    `import hybrid_moe` does so where Transformers has been imported before; `offload` and
    `from_pretrained` always do.

    Raises:
        ImportError: Transformers is absent or too old to have the interface.
    """
    for module_name, interface_name in INTERFACES.items():
        interface = getattr(import_module(module_name), interface_name, None)
        if interface is None:
            raise ImportError(f"{module_name} has no {interface_name}: {_NEEDED}")
        interface.register(NAME, experts_function)
    if not guard(import_module(MODELS)):
        raise ImportError(f"models of {MODELS} have no experts implementations: {_NEEDED}")


def register_or_warn() -> None:
    """`register` for `import hybrid_moe`, which must not fail where Transformers is too old or
    does not import."""
    try:
        register()
    except ImportError as error:
        logger.warning('experts_implementation="%s" is not registered: %s', NAME, error)


def offload(
    model: Model,
    method: str | None = "MXFP4",
    threads: int | None = None,
    pools: int | None = None,
    *,
    dense: str = "bf16",
    gpu_experts: Any = None,
    gpu_backend: str | None = None,
    gpu_activation: str | None = None,
    cpu_activation: str | None = None,
    router: str | None = None,
    dynamic: Any = False,
    progress: bool = True,
) -> Model:
    """Move the routed experts and the linear layers of a loaded model into packed strips.

    Each experts module is replaced by a `HybridExperts` without parameters, which frees its
    memory: `state_dict()` lacks the experts from then on. Linear layers (attention's projections,
    shared experts, the output layer) become `HybridLinear`s, gated MLPs `HybridMLP`s; see
    `dense.choose` for which. Weights in another format than `method` and `dense` are quantised
    (nearest, see `WeightFormat.encode`). Inference only.

    Args:
        model: a Transformers model with experts on any device (not meta).
        method: weight format of the strips; "auto" (or None) for the one that the model holds.
        threads: worker threads over all pools; None for one per available core.
        pools: worker pools; None for one per NUMA node.
        dense: weight format of linear layers ("bf16", "int8", "mxfp4"), or "torch" to leave them
            as they are, which they also are on a GPU that gets experts.
        gpu_experts: experts that are packed into slots of the device where their layer is, and
            computed there, while the CPU computes the others: a share of all experts (0.25 or
            "25%"), GPU memory ("24GB": as many as it holds), bool masks [layers, experts] as of
            `generate_gpu_experts_masks`, a mapping of layers to expert ids, the path of a placement
            profile, or that of a routing profile with an amount ("profile.json@25%"). None for
            none.
        gpu_backend: what computes them: "cute", or "torch", which needs no GPU. None for "cute"
            where it can be used, else "torch" (logged once, with the reason).
        gpu_activation: "fp8" for a W8A8 prefill of these experts, see `KTMoEWrapper`; else None.
        cpu_activation: "int8" for inputs of 8 bits where the CPU multiplies experts whose weights
            are integers, see `KTMoEWrapper`; else None.
        router: "cute" lets routers choose experts by one kernel of ours on a GPU, and by its
            reference on a CPU; the same experts but where values tie, see `gpu_kernels.gating`.
            None for the model's own.
        dynamic: True lets experts change places between steps, so that those which the text uses
            are on the GPU: as many as `gpu_experts` put there. "2GB" is how much may move in a
            second, "keep" leaves them in the CPU's memory as well ("2GB,keep"), see
            `placement.online.OnlineOptions`. `transformers.moving.online_report` tells what it did.
        progress: show a progress bar on stderr.

    Returns:
        `model` itself.

    Raises:
        ValueError, TypeError: unknown method, impossible threads, no experts or such as
            Transformers does not dispatch, experts on meta; GPU experts that the model does not
            have, a back end that cannot be used here; another `router`.
        FileNotFoundError: there is no such profile.
        NotImplementedError: an experts module computes something that this package does not;
            adapters (LoRA) on the experts, which would be lost: merge them first; `router="cute"`
            and a router that is not known. Nothing has been moved then.
    """
    from hybrid_moe.integrations.transformers.experts_module import (
        common_format,
        experts_spec,
        find_experts,
        refuse_adapters,
    )
    from hybrid_moe.integrations.transformers.hybrid_experts import experts_nbytes, pack_module
    from hybrid_moe.integrations.transformers.loading import replace_module
    from hybrid_moe.integrations.transformers.model_split import split_of_model
    from hybrid_moe.integrations.transformers.moving import let_experts_move, moving_options
    from hybrid_moe.integrations.transformers.packing_bar import PackingBar
    from hybrid_moe.integrations.transformers.step.router_gating import (
        check_router,
        gate_routers,
        plan_routers,
    )

    dense_fmt = dense_format(dense)
    moving = moving_options(dynamic, gpu_experts)
    as_held = method is None or method.upper() in (AS_STORED, AUTO)
    options = _checked(
        BF16.name if method is None or as_held else method, threads, pools, cpu_activation
    )
    check_router(router)
    found = find_experts(model)
    if as_held:
        options = replace(options, method=common_format(found).name)
    options.check_activation([layer_formats(options.fmt)])
    refuse_adapters(model, found)
    specs = {name: experts_spec(module, name) for name, module in found.items()}
    for name, module in found.items():
        if any(p.is_meta for p in module.parameters()):
            raise ValueError(
                f"{specs[name].where} is on the meta device: it has no weights to move"
            )
    routers = plan_routers(model, found) if router else {}
    panels = None if moving is None else moving.panels
    splits = split_of_model(
        model, found, specs, options.fmt, gpu_experts, gpu_backend, gpu_activation, panels
    )
    if any(split.device.type != "cpu" for split in splits.values()):
        dense_fmt = None  # a GPU that gets experts keeps what it has, which every token needs
    with PackingBar("Packing weights", progress) as bar:
        bar.expect(sum(experts_nbytes(spec, options.fmt) for spec in specs.values()))
        for name, spec in specs.items():
            experts = pack_module(found.pop(name), spec, options, splits.get(name))
            replace_module(model, name, experts)
            bar.add(experts_nbytes(spec, options.fmt))
        if dense_fmt is not None:
            from hybrid_moe.integrations.transformers.dense.dense_loading import (
                DenseOptions,
                offload_dense,
            )

            offload_dense(model, specs, DenseOptions(dense_fmt, options.pool_config()), bar)
    gate_routers(routers)
    if moving is not None:
        let_experts_move(model, moving)
    register()
    select = getattr(model, "set_experts_implementation", None)
    if select is not None:
        select(NAME)
    _save_from_strips(model)
    _prepare_steps(model, options)
    return model


def from_pretrained(
    directory: str | Path,
    method: str | None = DEFAULT_METHOD,
    threads: int | None = None,
    pools: int | None = None,
    *,
    dense: str = "bf16",
    gpu_experts: Any = None,
    gpu_backend: str | None = None,
    gpu_activation: str | None = None,
    cpu_activation: str | None = None,
    router: str | None = None,
    dynamic: Any = False,
    cache: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a causal language model with its routed experts and linear layers in packed strips.

    Both go from the checkpoint's files straight into the strips, so the memory needed is that of
    what is packed and of everything else, once. `state_dict()` lacks the experts. See `offload`
    for what becomes of the linear layers.

    Args:
        directory: a checkpoint in Transformers' layout, or in its family's published one; or the
            id of one in the Hugging Face hub's cache; or a GGUF file (any one of a split model's),
            whose configuration and other weights Transformers must know how to read.
        method: how the strips hold the weights, see `formats.table.METHODS`; "auto" (or None) for
            what the checkpoint stores, layer by layer. BF16 experts are quantised while loading if
            it is something else. The default is MXFP4, and "auto" for a GGUF model.
        threads: worker threads over all pools; None for one per available core.
        pools: worker pools; None for one per NUMA node.
        dense: weight format of linear layers ("bf16", "int8", "mxfp4"; F16 and F32 are rounded and
            FP8 is dequantised on the way), or "torch" to leave them to Transformers, as where they
            are on another device than the CPU or are quantised by it.
        gpu_experts, gpu_backend, gpu_activation: experts that are packed for a GPU, see
            `offload`. With "cute" the whole model is loaded onto the GPU, unless `device_map` says
            otherwise.
        cpu_activation, router, dynamic: see `offload`.
        cache: a directory where packed experts are kept, see `loaders.packed_cache`: what is there
            is read as it is, and what is not is left there. None for none.
        progress: show a progress bar on stderr.
        **kwargs: for Transformers' `from_pretrained` (dtype, attn_implementation, ...; `variant`
            and `subfolder` choose the files of experts too).

    Raises:
        FileNotFoundError: no such directory, or no such profile.
        CheckpointError: the checkpoint is damaged or does not fit the model; names the tensor. Or
            a token takes more experts than there are.
        ValueError, TypeError: unknown method, a layer whose stored weights do not become it, a
            `cache` that cannot be used, impossible threads, no experts; GPU experts, a back end or
            a router as for `offload`.
        NotImplementedError: an experts module computes something that this package does not, or
            with `router="cute"` a router does.
    """
    from hybrid_moe.integrations.transformers.checkpoint_files import (
        open_checkpoint,
        take_subfolder,
    )
    from hybrid_moe.integrations.transformers.dense.dense_loading import (
        DenseOptions,
        dense_layers,
        offload_dense,
    )
    from hybrid_moe.integrations.transformers.expert_loading import ExpertsPart, load_experts
    from hybrid_moe.integrations.transformers.gguf_model import index_of, load_gguf_skeleton
    from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts, experts_nbytes
    from hybrid_moe.integrations.transformers.loading import experts_source, load_skeleton
    from hybrid_moe.integrations.transformers.model_split import (
        split_of_checkpoint,
        surrounding_device,
    )
    from hybrid_moe.integrations.transformers.moving import let_experts_move, moving_options
    from hybrid_moe.integrations.transformers.packing_bar import PackingBar
    from hybrid_moe.integrations.transformers.step.router_gating import (
        check_router,
        gate_routers,
        plan_routers,
    )
    from hybrid_moe.loaders.expert_source import held_formats
    from hybrid_moe.loaders.model_config import ModelConfig
    from hybrid_moe.runtime.packed_layers import cache_at

    dense_fmt = dense_format(dense)
    moving = moving_options(dynamic, gpu_experts)
    panels = None if moving is None else moving.panels
    check_router(router)
    path = check_directory(take_subfolder(directory, kwargs))
    if "experts_implementation" in kwargs:
        raise ValueError(
            "hybrid_moe.from_pretrained always runs experts through hybrid_moe: "
            "leave experts_implementation out"
        )
    checkpoint = open_checkpoint(path, kwargs)
    stored = checkpoint.sources()
    config = kwargs.get("config")
    given = None if config is None else ModelConfig(config.to_dict(), "the configuration")
    problem = checkpoint.routing_problem(stored.values(), given)
    if problem is not None:
        raise CheckpointError(problem)
    gguf = index_of(checkpoint) is not None
    if method == DEFAULT_METHOD:
        method = AUTO if gguf else "MXFP4"
    chosen = chosen_method(method)
    # all of them before anything is loaded
    formats = {layer: held_formats(source, chosen) for layer, source in stored.items()}
    options = _checked(BF16.name, threads, pools, cpu_activation)
    options.check_activation(formats.values())
    packed = cache_at(cache)
    split = split_of_checkpoint(
        stored, given or checkpoint.model, formats, gpu_experts, gpu_backend, kwargs,
        gpu_activation, panels,
    )  # fmt: skip
    register()
    try:
        layers = None
        if dense_fmt is not None and not gguf:
            layers = dense_layers(
                checkpoint, DenseOptions(dense_fmt, options.pool_config()), kwargs
            )
        model = (
            load_gguf_skeleton(checkpoint, kwargs)
            if gguf
            else load_skeleton(checkpoint, kwargs, layers)
        )
        experts = {n: m for n, m in model.named_modules() if isinstance(m, HybridExperts)}
        gate_routers(plan_routers(model, experts) if router else {})
        sources = [experts_source(stored, checkpoint, n, m.spec) for n, m in experts.items()]
        with PackingBar("Loading weights", progress) as bar:
            for source, module in zip(sources, experts.values(), strict=True):
                bar.expect(experts_nbytes(module.spec, held_formats(source, chosen)))
            if layers is not None:
                layers.load(model, {n: m.spec for n, m in experts.items()}, bar)
            if gguf and dense_fmt is not None and model.device.type == "cpu":
                specs = {n: m.spec for n, m in experts.items()}
                offload_dense(model, specs, DenseOptions(dense_fmt, options.pool_config()), bar)
            parts = []
            for source, (name, module) in zip(sources, experts.items(), strict=True):
                held, of_layer = held_formats(source, chosen), None
                if split is not None:
                    of_layer = split.of_layer(source.layer, surrounding_device(model, name))
                each = bar.each(experts_nbytes(module.spec, held))
                parts.append(ExpertsPart(source, module, held, of_layer, each))
            load_experts(parts, options, packed)
        if moving is not None:
            let_experts_move(model, moving)
        _save_from_strips(model)
        chosen_by_user = kwargs.get("attn_implementation") is not None
        _prepare_steps(model, options, attention=not chosen_by_user)
    finally:
        checkpoint.close()
    return model


def check_directory(directory: str | Path) -> Path:
    """The model's folder, or GGUF file, see `find_model`, before Transformers opens files in it.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it has a pipe.
    """
    from hybrid_moe.loaders.gguf.gguf_layers import is_gguf
    from hybrid_moe.loaders.regular import check_no_pipes

    path = find_model(directory)
    if path.is_file() and is_gguf(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a directory: pass the folder of a downloaded checkpoint, or a GGUF file"
        )
    check_no_pipes(path)
    return path


def _checked(
    method: str, threads: int | None, pools: int | None, cpu_activation: str | None
) -> ExpertsOptions:
    """The options, refused here rather than after a model has been loaded."""
    options = ExpertsOptions(method, threads, pools, cpu_activation)
    options.pool_config()
    return replace(options, method=options.fmt.name)


def _save_from_strips(model: Any) -> None:
    """Transformers' own `save_pretrained` would write a checkpoint without what is packed."""
    from hybrid_moe.integrations.transformers.dense.saving import save_pretrained

    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(save_pretrained, model)


def _prepare_steps(model: Any, options: ExpertsOptions, *, attention: bool = True) -> None:
    from hybrid_moe.integrations.transformers.step.prepare import prepare_steps

    prepare_steps(model, options.pool_config(), attention=attention)
