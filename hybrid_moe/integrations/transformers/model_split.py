"""Which experts of a Transformers model are hot, and what computes them: chosen for the whole model
before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.loading import layer_index
from hybrid_moe.integrations.transformers.options import choose_backend
from hybrid_moe.integrations.transformers.split_experts import SplitSpec
from hybrid_moe.loaders import ExpertSource
from hybrid_moe.loaders.model_config import TOP_K, ModelConfig
from hybrid_moe.placement.hot_masks import LayerOfExperts, hot_masks
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.gpu_arguments import ACTIVATIONS
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule import streamed_prefill
from hybrid_moe.schedule.quality import deferral_depth, quality


class ModelSplit:
    """How a model's layers are split.

    Attributes:
        backend: what computes the hot experts, "cute" or "torch".
    """

    def __init__(
        self,
        backend: str,
        masks: Mapping[int, torch.Tensor],
        config: ModelConfig,
        activation: str | None = None,
        panels: str | None = None,
    ) -> None:
        """Args:
        backend: see above.
        masks: layer -> bool [E], True for hot experts.
        config: the model's.
        activation, panels: see `SplitSpec`.

        Raises:
            ValueError: the configuration does not say how many experts a token takes, or
                `HYBRID_MOE_STREAM_PREFILL` is no size, or `HYBRID_MOE_QUALITY` none of its names.
        """
        self._stream_memory, self._quality = streamed_prefill.stream_memory(), quality()
        self._streams: dict[torch.device, PrefillStream] = {}
        self._chains: dict[torch.device, DeferralChain] = {}
        self.backend, self._masks = backend, masks
        self._activation, self._panels = activation, panels
        self._top_k: dict[int, int] = {}
        for layer in masks:
            top_k = config.of_layer(TOP_K, layer)
            if top_k is None:
                raise ValueError(
                    f"gpu_experts: {config.where} does not say how many experts a token takes in "
                    f"layer {layer}"
                )
            self._top_k[layer] = top_k

    def of_layer(self, layer: int, device: torch.device) -> SplitSpec:
        """Of the layer with this index, on a device."""
        deferred = deferral_depth(self._quality, self._top_k[layer])
        return SplitSpec(
            layer,
            self._top_k[layer],
            self._masks[layer],
            self.backend,
            device,
            self._activation,
            self._panels,
            self._prefill_stream(device),
            self._chain(device) if deferred else None,
            deferred,
        )

    def _prefill_stream(self, device: torch.device) -> PrefillStream | None:
        """That of the model's layers on a device."""
        if self._stream_memory is None:
            return None
        if device not in self._streams:
            self._streams[device] = streamed_prefill.new_prefill_stream(self._stream_memory)
        return self._streams[device]

    def _chain(self, device: torch.device) -> DeferralChain:
        """That of the model's layers on a device: a sum does not travel to another one. Any thread
        may take a step of the model."""
        return self._chains.setdefault(device, DeferralChain(per_thread=True))


def split_of_model(
    model: torch.nn.Module,
    found: Mapping[str, torch.nn.Module],
    specs: Mapping[str, ExpertsSpec],
    fmt: WeightFormat,
    gpu_experts: Any,
    gpu_backend: str | None,
    gpu_activation: str | None = None,
    panels: str | None = None,
) -> dict[str, SplitSpec]:
    """How the layers of a loaded model are split, by the names of their experts modules; their
    slots are where they are now. Empty where `gpu_experts` is None.

    Args:
        model: of Transformers.
        found, specs: its experts modules and their sizes, by name.
        fmt: that they will be packed in.
        gpu_experts, gpu_backend, gpu_activation: see `offload`.
        panels: see `SplitSpec`.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `offload`.
        NotImplementedError: nothing says which layers these are.
    """
    if not _is_wanted(gpu_experts, gpu_backend, gpu_activation):
        return {}
    names = {layer_index(name): name for name in specs}
    if len(names) < len(specs):
        raise NotImplementedError(
            f"gpu_experts: {type(model).__name__} has {len(specs)} modules of experts in "
            f"{len(names)} layers"
        )
    layers = [
        _layer(layer, specs[name].num_experts, specs[name], fmt, specs[name].biased)
        for layer, name in sorted(names.items())
    ]
    devices = {name: next(module.parameters()).device for name, module in found.items()}
    own = getattr(model, "config", None)
    config = ModelConfig({} if own is None else own.to_dict(), "the configuration")
    masks = hot_masks(gpu_experts, layers, config.num_layers)
    on_gpu = all(device.type == "cuda" for device in devices.values())
    backend = choose_backend(gpu_backend, on_gpu)
    split = ModelSplit(backend, masks, config, gpu_activation, panels)
    return {name: split.of_layer(layer, devices[name]) for layer, name in names.items()}


def split_of_checkpoint(
    sources: Mapping[int, ExpertSource],
    config: ModelConfig,
    formats: Mapping[int, LayerFormats],
    gpu_experts: Any,
    gpu_backend: str | None,
    kwargs: dict[str, Any],
    gpu_activation: str | None = None,
    panels: str | None = None,
) -> ModelSplit | None:
    """How the layers of a checkpoint are split; None where `gpu_experts` is.

    Args:
        sources: its layers by index.
        config: the model's, which may have fewer layers.
        formats: that each will be packed in.
        gpu_experts, gpu_backend, gpu_activation: see `from_pretrained`.
        kwargs: for Transformers' `from_pretrained`. CuTe kernels bring the model to the GPU, where
            no `device_map` says otherwise.
        panels: see `SplitSpec`.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `from_pretrained`.
    """
    if not _is_wanted(gpu_experts, gpu_backend, gpu_activation):
        return None
    end = config.num_layers
    layers = [
        _layer(layer, source.num_experts, source, formats[layer], source.has_bias)
        for layer, source in sorted(sources.items())
        if end is None or layer < end
    ]
    if not layers:
        return None  # a model without experts, which is refused when it is built
    masks = hot_masks(gpu_experts, layers, end)
    backend = choose_backend(gpu_backend, _on_gpu(kwargs))
    split = ModelSplit(backend, masks, config, gpu_activation, panels)
    if split.backend == "cute" and kwargs.get("device_map") is None:
        kwargs["device_map"] = "cuda"
    return split


def _is_wanted(gpu_experts: Any, gpu_backend: str | None, gpu_activation: str | None) -> bool:
    if gpu_activation not in ACTIVATIONS:
        raise ValueError(f"gpu_activation is {gpu_activation!r}, must be None or 'fp8'")
    for name, given in (("gpu_backend", gpu_backend), ("gpu_activation", gpu_activation)):
        if gpu_experts is None and given is not None:
            raise ValueError(
                f"{name} is {given!r}, but no expert is to be on a GPU: give gpu_experts"
            )
    return gpu_experts is not None


def _layer(
    layer: int,
    num_experts: int,
    sizes: ExpertsSpec | ExpertSource,
    formats: WeightFormat | LayerFormats,
    biased: bool,
) -> LayerOfExperts:
    """What a placement asks: a slot has the strips of an expert, and its biases."""
    nbytes = packed_nbytes(formats, sizes.hidden, sizes.intermediate)
    if biased:
        nbytes += bias_nbytes(sizes.hidden, sizes.intermediate)
    return LayerOfExperts(layer, num_experts, nbytes)


def _on_gpu(kwargs: Mapping[str, Any]) -> bool | None:
    """Whether `device_map` has a GPU; None where it says nothing."""
    placed = kwargs.get("device_map")
    if placed is None:
        return None
    devices = placed.values() if isinstance(placed, Mapping) else [placed]
    return any(str(device).partition(":")[0] != "cpu" for device in devices)


def surrounding_device(model: torch.nn.Module, name: str) -> torch.device:
    """The device of the weights nearest to the module `name`, which has none itself: the router's,
    if it has any."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent = model.get_submodule(".".join(parts[:depth]))
        for tensor in chain(parent.parameters(), parent.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")
