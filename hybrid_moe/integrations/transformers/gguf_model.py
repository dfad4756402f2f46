"""What of a GGUF model is not experts: configuration, tokenizer and weights, by Transformers.

Transformers knows what GGUF calls the tensors of some families, how their values differ, and what
becomes of metadata and vocabulary; all that is asked of it. What it would do with a whole file is
not: it dequantizes every tensor, experts included. So tensors are read here, one at a time, and
those of experts never.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.loading import (
    check_complete,
    model_class,
    with_hybrid_experts,
)
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.loaders.gguf.gguf_header import BlockTensor
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.loaders.gguf.metadata_config import ARCHITECTURE, config_of, rope_of
from hybrid_moe.logs import warn_once

logger = logging.getLogger(__name__)

ARCHITECTURES = ("gpt-oss", "minimax-m2", "qwen2moe", "qwen3moe")
"""GGUF's names of the families with experts whose tensors Transformers can name."""

COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that Transformers computes from the configuration."""

_FROM_METADATA = (
    "head_dim",
    "moe_intermediate_size",
    "num_key_value_heads",
    "shared_expert_intermediate_size",
    "sliding_window",
)
"""What Transformers' reader leaves to a family's defaults, which are those of one of its models."""

_SCORES = {1: "softmax", 2: "sigmoid"}
"""`expert_gating_func`."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def index_of(checkpoint: Checkpoint) -> GgufIndex | None:
    """The tensors and metadata of a GGUF model; None for another checkpoint."""
    return checkpoint.index if isinstance(checkpoint.index, GgufIndex) else None


def check_architecture(index: GgufIndex) -> str:
    """The architecture of a model.

    Raises:
        ValueError: Transformers cannot load what is not experts of such a model; the message says
            what can be done.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = [
        name
        for name in ARCHITECTURES
        if config_of({ARCHITECTURE: name})["model_type"] in GGUF_SUPPORTED_ARCHITECTURES
    ]
    architecture = index.metadata.get(ARCHITECTURE)
    if architecture not in known:
        raise ValueError(
            f"{index.files[0]}: of the architecture {architecture!r} Transformers "
            f"{transformers.__version__} does not read what is not experts (with experts it reads "
            f"{', '.join(known)}): load this model from its checkpoint of safetensors, or the "
            'experts alone by KTMoEWrapper(method="LLAMAFILE")'
        )
    return str(architecture)


def read_config(index: GgufIndex) -> Any:
    """Transformers' configuration of a model, from its metadata.

    Transformers' tables say what becomes of which key. Its reader is not called: it stumbles over
    gpt-oss's `rope.scaling` (5.23), and knows the tensors of the first file alone.

    Raises:
        ValueError: see `check_architecture`.
    """
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    architecture = check_architecture(index)
    family = config_of(index.metadata)["model_type"]
    stated: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(family, {}))
    for key, name in GGUF_CONFIG_MAPPING[family].items():
        value = index.metadata.get(f"{architecture}.{key}")
        if name is not None and isinstance(value, (int, float, str)):
            stated[name] = value
    if "scoring_func" in stated:
        stated["scoring_func"] = _SCORES.get(stated["scoring_func"], "softmax")
    own = config_of(index.metadata)
    stated.update({name: own[name] for name in _FROM_METADATA if name in own})
    stated.pop("rope_theta", None)
    stated["rope_parameters"] = rope_of(index.metadata)
    stated["tie_word_embeddings"] = "lm_head.weight" not in index.tensors
    stated["vocab_size"] = index.info("model.embed_tokens.weight").shape[0]
    for name in _TOKENS:
        key = "padding_token_id" if name == "pad_token_id" else name
        token = index.metadata.get(f"tokenizer.ggml.{key}")
        stated[name] = token if type(token) is int else None
    return AutoConfig.for_model(family, **stated)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of the GGUF model at `path`: what lies in its folder, or of the file itself.

    Raises:
        OSError, ValueError: Transformers cannot make one.
    """
    from transformers import AutoTokenizer

    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(path)
    file = GgufIndex.open_gguf(path).files[0]
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)


def load_gguf_skeleton(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> Any:
    """The model with all of its weights but the experts', which are empty: as `load_skeleton`.

    Args:
        checkpoint: a GGUF model.
        kwargs: for Transformers' `from_pretrained`.

    Raises:
        ValueError: Transformers does not know the architecture.
        CheckpointError: a tensor is missing, has no place in the model, or has another shape.
    """
    from transformers import AutoConfig

    index = index_of(checkpoint)
    assert index is not None
    architecture = check_architecture(index)
    kwargs = {name: v for name, v in kwargs.items() if name not in ("trust_remote_code", "variant")}
    config = kwargs.pop("config", None)
    if config is None and (index.path / "config.json").is_file():
        config = AutoConfig.from_pretrained(index.path)
    config = config or read_config(index)
    dtype = kwargs.pop("dtype", None)
    dtype = torch.bfloat16 if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    original = model_class(config, index.path, None)
    state = _dense_weights(checkpoint, index, architecture, original, config, dtype)
    hybrid = with_hybrid_experts(original, checkpoint.drafts.patterns, None)
    model, info = hybrid.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        experts_implementation="hybrid_moe",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        **kwargs,
    )
    model.__class__ = original
    check_complete(info, index.path)
    return model


def _dense_weights(
    checkpoint: Checkpoint,
    index: GgufIndex,
    architecture: str,
    original: Any,
    config: Any,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """All weights but those of experts and draft layers, by the model's names."""
    from transformers import modeling_gguf_pytorch_utils as reader

    with torch.device("meta"):
        blank = original(config)
    make = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
    processor = make(config=config.to_dict())
    names: dict[str, str] = reader.get_gguf_hf_weights_map(blank, processor)
    weights: dict[str, torch.Tensor] = {}
    homeless: list[BlockTensor] = []
    for key in index.tensors:
        tensor = index.info(key)
        name = tensor.stored_name
        if key in checkpoint.expert_keys or checkpoint.drafts.owns(key) or name in COMPUTED:
            continue
        # parameters that are no module's weight have no such ending in the model (sinks)
        place = names.get(name) or names.get(name.removesuffix(".weight"))
        if place is None:
            homeless.append(tensor)
            continue
        values = processor.process(weights=_values(index, tensor), name=name).weights
        kept = torch.from_numpy(np.ascontiguousarray(values))
        weights[place] = kept if tensor.dtype == "F32" else kept.to(dtype)
    if homeless:
        raise CheckpointError(
            f"{homeless[0].where}: Transformers' model has no place for it"
            + (f", nor for {len(homeless) - 1} more tensors" if len(homeless) > 1 else "")
        )
    return weights


def _values(index: GgufIndex, tensor: BlockTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor's values in float32.

    Raises:
        CheckpointError: a type that the `gguf` library does not dequantize, or no finite numbers.
    """
    from gguf import GGMLQuantizationType, quants

    raw = index.read(tensor.key)
    if tensor.dtype == "BF16":
        raw = raw.view(np.uint8)
    try:
        values: np.ndarray[Any, Any] = quants.dequantize(raw, GGMLQuantizationType[tensor.dtype])
    except NotImplementedError as error:
        raise CheckpointError(f"{tensor.where}: {error}") from error
    if not np.isfinite(values).all():
        warn_once(f"{tensor.where}: a weight is NaN or infinite")
    return values.reshape(tensor.shape)
