"""What the headers and `config.json` say about a model: bytes of each part, experts of each layer.

Nothing but headers is read. A model may lie in two checkpoints: one that the experts on the CPU
are read from, and a base from which the serving engine reads everything else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.table import AS_STORED, BF16, Method, chosen_method, methods_of
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.loaders import Checkpoint, ExpertSource, held_formats
from hybrid_moe.loaders.convert import CONFIG_KEY
from hybrid_moe.loaders.drafts import DRAFT
from hybrid_moe.loaders.expert_source import check_sizes
from hybrid_moe.loaders.gguf.ggml_types import TYPES_BY_NAME
from hybrid_moe.loaders.gguf.gguf_header import BlockTensor
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.inspect import part_of
from hybrid_moe.loaders.model_config import TOP_K
from hybrid_moe.placement.profile import PlacementProfile
from hybrid_moe.planning.kernel_shares import many_token_share, one_token_share
from hybrid_moe.planning.linear_layers import (
    DEFAULT,
    EMBEDDINGS,
    DenseLayers,
    dense_format,
    dense_layers,
    is_looked_up,
    is_tied,
)


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one layer.

    Attributes:
        layer: its number, dense layers counted.
        num_experts: E.
        top_k: experts of a token, k.
        formats: of the CPU's experts.
        packed: bytes of one expert in strips.
        bias: bytes of one expert's biases, held as float32, over all pools.
        on_gpu: bytes of one expert on a GPU: as the serving engine stores it, or in a slot.
        weights: of one expert; as many multiply-accumulates for a token.
    """

    layer: int
    num_experts: int
    top_k: int
    formats: LayerFormats
    packed: int
    bias: int
    on_gpu: int
    weights: int

    def rate(self, macs: Mapping[str, float]) -> float:
        """Multiply-accumulates in a second with many tokens of an expert, out of the peaks of each
        format."""
        return self._mean(macs, many_token_share)

    def token_rate(self, macs: Mapping[str, float]) -> float:
        """The same with one token: as many weights are decoded in a second at most."""
        return self._mean(macs, one_token_share)

    def _mean(self, macs: Mapping[str, float], share: Callable[[WeightFormat], float]) -> float:
        """Two of three products are gate's and up's."""
        gate_up, down = (macs[fmt.name] * share(fmt) for fmt in self.formats)
        return gate_up if gate_up == down else 3 / (2 / gate_up + 1 / down)


@dataclass(frozen=True)
class HotExperts:
    """How many experts of each layer are on the GPU, and which.

    Attributes:
        counts: layer -> number of its experts on the GPU.
        rule: how they were chosen.
        profile: the profile that says which; None for the first ids.
        use: layer -> float64 [E], the share of tokens that take each expert; None where nothing was
            measured, and all are taken to be equally likely.
    """

    counts: Mapping[int, int]
    rule: str
    profile: PlacementProfile | None = None
    use: Mapping[int, npt.NDArray[np.float64]] | None = field(default=None, compare=False)

    @cached_property
    def most(self) -> int:
        """Experts on the GPU in the layer that has the most."""
        return max(self.counts.values(), default=0)

    def cold(self, layer: LayerExperts) -> int:
        """Experts of a layer on the CPU."""
        return layer.num_experts - self.counts[layer.layer]

    def mask(self, layer: LayerExperts) -> npt.NDArray[np.bool_]:
        """bool [E], True for a layer's experts on the GPU."""
        mask = np.zeros(layer.num_experts, np.bool_)
        if self.profile is None:
            mask[: self.counts[layer.layer]] = True
        else:
            mask[list(self.profile.experts_of(layer.layer, layer.num_experts))] = True
        return mask

    def hit_rate(self, layers: Sequence[LayerExperts]) -> float:
        """Share of all pairs of a token and an expert that experts on the GPU take."""
        if self.use is None:
            hits = [layer.top_k * self.counts[layer.layer] / layer.num_experts for layer in layers]
        else:
            hits = [float(self.use[layer.layer][self.mask(layer)].sum()) for layer in layers]
        return sum(hits) / sum(layer.top_k for layer in layers)


@dataclass(frozen=True)
class Model:
    """A model as its headers describe it. Sizes are in bytes.

    Attributes:
        path: checkpoint of the CPU's experts.
        base: checkpoint of everything else; `path` where no other was given.
        family: `model_type` of `config.json`.
        config: the language model's part of `config.json`, as Transformers reads it.
        gpu_backend: who computes experts on a GPU: None for the serving engine, else what
            `HYBRID_MOE_GPU` is to be.
        engine_format: format of the experts that the engine finds in `base`; "STORED" where layers
            differ.
        hidden, intermediate: H and I.
        layers: experts of each layer that has some.
        parts: part -> bytes, without routed experts.
        read_per_token: bytes of these that every token reads.
        output_layer: bytes of these that are the output layer, which is not part of a layer.
        weights_per_token: weights that each token of a prompt meets: those, without the output
            layer, which only its last token needs.
        dense: linear layers that are held in strips where there is no GPU.
        torch_bytes: then, of what torch holds: all the rest, draft layers left out, where a runtime
            turns smaller floats into BF16.
        torch_read: of these, what every token reads.
        torch_weights: of these, as `weights_per_token`.
        has_bias: experts have biases.
        hot_possible: experts can be on the GPU. A serving engine reads them from `base`: not from
            what `hybrid-moe convert` wrote, for no engine knows that format; and not where layers
            differ in format: an engine has one kernel for all. Slots hold what the CPU holds.
    """

    path: Path
    base: Path
    family: str
    config: Mapping[str, Any]
    gpu_backend: str | None
    engine_format: str
    hidden: int
    intermediate: int
    layers: tuple[LayerExperts, ...]
    parts: Mapping[str, int]
    read_per_token: int
    output_layer: int
    weights_per_token: int
    dense: DenseLayers
    torch_bytes: int
    torch_read: int
    torch_weights: int
    has_bias: bool
    hot_possible: bool

    @property
    def num_experts(self) -> int:
        """E of the first layer; layers agree in every known model."""
        return self.layers[0].num_experts

    @property
    def top_k(self) -> int:
        """Experts of a token in the layer that has the most."""
        return max(layer.top_k for layer in self.layers)

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """Formats of the CPU's experts, each once."""
        return tuple(dict.fromkeys(fmt for layer in self.layers for fmt in layer.formats))

    @property
    def method(self) -> str:
        """Name of a method that holds them so; "STORED" where layers, or projections, differ."""
        found = methods_of(self.formats[0]) if len(self.formats) == 1 else ()
        return found[0] if found else AS_STORED

    @property
    def gpu_format(self) -> str:
        """Name of the format of experts on a GPU; "STORED" where layers differ."""
        return self.engine_format if self.gpu_backend is None else self.method

    @property
    def max_context(self) -> int | None:
        """Tokens that the model was made for."""
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None


def read_model(
    path: Path,
    base: Path | None = None,
    method: str | None = None,
    dense: str = DEFAULT,
    gpu_backend: str | None = None,
) -> Model:
    """Describe the model at `path`.

    Args:
        path: checkpoint of the experts for the CPU (with a `gpu_backend`, for the GPU as well).
        base: checkpoint of everything else and of the experts for the GPU; None is `path` itself,
            unless that was converted.
        method: format for the CPU; None (or "STORED") is what `path` stores, layer by layer.
        dense: format of linear layers where there is no GPU; "torch" leaves them to torch.
        gpu_backend: who computes experts on a GPU, see `Model`.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a checkpoint is damaged, has no experts or fewer than a token takes, or the
            two differ.
        ValueError: the experts do not become `method`, there is no format `dense`, or `config.json`
            lacks something.
    """
    checkpoint = Checkpoint.open(path)
    rest = checkpoint if base is None else Checkpoint.open(base)
    if not checkpoint.config:
        raise ValueError(f"{path} has no config.json: without it nothing can be planned")
    sources = list(checkpoint.sources().values())
    problem = checkpoint.routing_problem(sources)
    if problem is not None:
        raise CheckpointError(problem)
    first, chosen = sources[0], chosen_method(method)
    for source in sources:
        held_formats(source, chosen)
        source.check_layout()
    stored = sources if base is None else [rest.layer(source.layer) for source in sources]
    readable = CONFIG_KEY not in rest.config
    engine_format = _name([source.formats for source in stored]) if readable else BF16.name
    tensors = {k: t for k, t in rest.index.tensors.items() if k not in rest.expert_keys}
    part = {key: part_of(rest, key) for key in tensors}
    parts: Counter[str] = Counter()
    for key, tensor in tensors.items():
        parts[part[key]] += tensor.nbytes
    kept = {key: tensor for key, tensor in tensors.items() if part[key] != DRAFT}
    read = _read_by_a_token(kept, part)
    linear = dense_layers(kept, part, dense_format(dense))
    left = [tensor for tensor in read if tensor.key not in linear.keys]
    return Model(
        path=path,
        base=base or path,
        family=str(checkpoint.config.get("model_type", "unknown")),
        config=checkpoint.model.full,
        gpu_backend=gpu_backend,
        engine_format=engine_format,
        hidden=first.hidden,
        intermediate=first.intermediate,
        layers=tuple(
            _layer(*pair, chosen, checkpoint, slots=gpu_backend is not None)
            for pair in zip(sources, stored, strict=True)
        ),
        parts=dict(parts.most_common()),
        read_per_token=sum(t.nbytes for t in read),
        output_layer=sum(t.nbytes for t in read if part[t.key] == EMBEDDINGS),
        weights_per_token=_weights(read, part),
        dense=linear,
        torch_bytes=sum(_in_16_bits(t) for key, t in kept.items() if key not in linear.keys),
        torch_read=sum(map(_in_16_bits, left)),
        torch_weights=_weights(left, part),
        has_bias=first.has_bias,
        hot_possible=gpu_backend is not None or (readable and engine_format != AS_STORED),
    )


def _layer(
    source: ExpertSource,
    base: ExpertSource,
    chosen: Method | None,
    checkpoint: Checkpoint,
    *,
    slots: bool,
) -> LayerExperts:
    H, I = source.hidden, source.intermediate
    check_sizes(base, source.num_experts, H, I)
    top_k = checkpoint.model.of_layer(TOP_K, source.layer)
    if top_k is None:
        raise ValueError(
            f"config.json of {checkpoint.index.path} lacks num_experts_per_tok of layer "
            f"{source.layer}"
        )
    formats = held_formats(source, chosen)
    packed = packed_nbytes(formats, H, I)
    bias = bias_nbytes(H, I) if source.has_bias else 0
    return LayerExperts(
        layer=source.layer,
        num_experts=source.num_experts,
        top_k=top_k,
        formats=formats,
        packed=packed,
        bias=bias,
        on_gpu=packed + bias if slots else base.expert_nbytes,
        weights=3 * H * I,
    )


def _name(formats: list[LayerFormats]) -> str:
    """The one format's name; "STORED" for several."""
    names = {fmt.name for fmt in formats}
    return names.pop() if len(names) == 1 else AS_STORED


def _read_by_a_token(
    tensors: Mapping[str, TensorInfo], part: Mapping[str, str]
) -> list[TensorInfo]:
    """The tensors that a token reads whole. Tied embeddings are also the output layer."""
    tied = is_tied(tensors)
    return [
        tensor
        for key, tensor in tensors.items()
        if part[key] != "vision and audio" and (tied or not is_looked_up(key))
    ]


def _weights(tensors: list[TensorInfo], part: Mapping[str, str]) -> int:
    """Weights of these that each token of a prompt meets."""
    met = (t for t in tensors if not _is_scale(t) and part[t.key] != EMBEDDINGS)
    return sum(math.prod(t.shape) for t in met)


def _is_scale(tensor: TensorInfo) -> bool:
    return tensor.key.endswith(("scale", "scale_inv"))


def _in_16_bits(tensor: TensorInfo) -> int:
    """Bytes where 8-bit floats and ggml's blocks become BF16 and scales disappear."""
    if isinstance(tensor, BlockTensor) and TYPES_BY_NAME[tensor.dtype].weights > 1:
        return 2 * math.prod(tensor.shape)
    if tensor.dtype.startswith("F8") or tensor.dtype == "F4":
        return 0 if _is_scale(tensor) else 2 * math.prod(tensor.shape)
    return tensor.nbytes
