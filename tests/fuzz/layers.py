"""Layers of experts in memory, whole and damaged, through naming, description and reading.

What is whole must be described with its sizes and be read; what is damaged may only be refused by
`CheckpointError`. Data is zeros that no file holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.header import STORAGE_TYPES, TensorInfo
from hybrid_moe.loaders.naming import SCHEMES, NamingScheme
from hybrid_moe.loaders.safetensors import ReadBuffer, SafetensorsIndex

FILE = Path("memory.safetensors")
_DTYPES = tuple(STORAGE_TYPES)
_PREFIXES = ("", "model.", "model.language_model.", "language_model.model.", "thinker.model.")
_SIZES = (0, 1, 2, 3, 16, 31, 32, 33, 64, 96, 128, 1 << 20, 1 << 40)
_ENDINGS = (
    ".weight", ".weight_scale", ".weight_scale_inv", ".scale", ".bias", "_bias", "_blocks",
    "_scales", "_scale_inv", ".weight_packed", ".qweight", ".k_scale", ".scales", ".qzeros",
    ".g_idx", ".weight_scale_2", ".weight_shape", ".weight_zero_point", "",
)  # fmt: skip
_CONFIG_NAMES = (
    "num_experts", "num_local_experts", "n_routed_experts", "num_hidden_layers", "text_config",
    "mlp_layer_types", "mlp_only_layers", "first_k_dense_replace", "decoder_sparse_step",
    "moe_layer_freq", "layers_block_type", "num_nextn_predict_layers", "model_type",
)  # fmt: skip
_CONFIG_VALUES = (
    None, 0, 1, 2, 3, 4, -1, 10**30, 1.5, True, "x", [], [0], [0, 1, "dense"], {}, {"a": 1},
    float("inf"),
)  # fmt: skip


_QUANTIZED = ("fp8", "fp8 rows", "mxfp8", "nvfp4", "compressed-tensors", "gptq", "awq")
"""How experts may be stored one by one, beside MXFP4 and floats."""


def _planes(kind: str, N: int, K: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> dtype and shape of a matrix that is stored so, with groups of 32."""
    blocks = (-(-N // 128), -(-K // 128))
    return {
        "fp8": {".weight": ("F8_E4M3", (N, K)), ".weight_scale_inv": ("F32", blocks)},
        "fp8 rows": {".weight": ("F8_E4M3", (N, K)), ".weight_scale": ("F32", (N, 1))},
        "mxfp8": {".weight": ("F8_E4M3", (N, K)), ".weight_scale_inv": ("U8", (N, K // 32))},
        "nvfp4": {
            ".weight": ("U8", (N, K // 2)),
            ".weight_scale": ("F8_E4M3", (N, K // 16)),
            ".weight_scale_2": ("F32", ()),
        },
        "compressed-tensors": {
            ".weight_packed": ("I32", (N, K // 8)),
            ".weight_scale": ("BF16", (N, K // 32)),
        },
        "gptq": {
            ".qweight": ("I32", (K // 8, N)),
            ".scales": ("F16", (K // 32, N)),
            ".qzeros": ("I32", (K // 32, N // 8)),
        },
        "awq": {
            ".qweight": ("I32", (K, N // 8)),
            ".scales": ("F16", (K // 32, N)),
            ".qzeros": ("I32", (K // 32, N // 8)),
        },
    }[kind]


@dataclass(frozen=True)
class Case:
    """A checkpoint in memory.

    Attributes:
        tensors: its tensors by key.
        config: what `config.json` says.
        sizes: (experts, hidden, intermediate) of every layer, None where it is damaged.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, object]
    sizes: tuple[int, int, int] | None


class _ZeroIndex(SafetensorsIndex):
    """Tensors whose values are zeros."""

    def _read_into(self, tensor: TensorInfo, offset: int, target: npt.NDArray[np.uint8]) -> None:
        target[:] = 0


def generate(rng: Random) -> Case:
    """One checkpoint of one to three layers: whole, or with a few damages."""
    scheme = rng.choice(SCHEMES)
    E, H, I = rng.choice((1, 2, 3)), rng.choice((32, 64, 96)), rng.choice((32, 64, 96))
    mxfp4 = rng.random() < 0.5 or scheme.weights == ("_blocks",)
    quantized = None if scheme.fused or rng.random() < 0.4 else rng.choice(_QUANTIZED)
    biased = rng.random() < 0.3 and (scheme.fused or rng.random() < 0.3)
    prefix, layers = rng.choice(_PREFIXES), rng.choice((1, 1, 2, 3))
    tensors: dict[str, TensorInfo] = {}
    for layer in range(layers):
        stem = f"{prefix}layers.{layer}."
        if quantized is None:
            _add_layer(rng, tensors, scheme, stem, (E, H, I), mxfp4, biased)
        else:
            _add_quantized(tensors, scheme, stem, (E, H, I), quantized)
    config: dict[str, object] = {"num_hidden_layers": layers}
    for name in rng.sample(("num_experts", "num_local_experts", "n_routed_experts"), 1):
        config[name] = E
    if quantized in ("gptq", "awq", "compressed-tensors"):
        config["quantization_config"] = {"quant_method": quantized, "bits": 4}
    if scheme.fused:  # whose experts say where gate and up lie
        config["model_type"] = "gpt_oss"
    damages = rng.choice((0, 0, 1, 1, 2, 3))
    for _ in range(damages):
        if rng.random() < 0.15:
            config[rng.choice(_CONFIG_NAMES)] = rng.choice(_CONFIG_VALUES)
        else:
            _damage(rng, tensors)
    return Case(tensors, config, None if damages else (E, H, I))


def check(case: Case) -> bool:
    """Describe and read every layer; returns whether all of it was possible."""
    index = _ZeroIndex(FILE, case.tensors)
    try:
        checkpoint = Checkpoint(index, case.config)
        assert checkpoint.expert_keys <= set(case.tensors)
        sources = [checkpoint.layer(number) for number in checkpoint.layers]
        complete = not checkpoint.missing_layers
        for source in sources:
            assert min(source.num_experts, source.hidden, source.intermediate) > 0
            assert all(t.key in case.tensors for s in source.stacks for p in s for t in p.tensors)
            if source.expert_nbytes > 1 << 20:
                continue  # a damage of sizes that is consistent by chance
            gate_up, down = source.formats  # which damage may make differ
            tensors = source.expert(source.num_experts - 1, None, ReadBuffer())
            N, K = source.intermediate, source.hidden
            assert tensors.gate.codes.shape == tensors.up.codes.shape == gate_up.code_shape(N, K)
            assert tensors.down.codes.shape == down.code_shape(K, N)
            assert source.nbytes_as(MXFP4) > 0
    except CheckpointError:
        assert case.sizes is None, "a whole checkpoint was refused"
        return False
    if case.sizes is not None:
        assert sources and complete
        for source in sources:
            assert (source.num_experts, source.hidden, source.intermediate) == case.sizes
    return bool(sources)


def _add(tensors: dict[str, TensorInfo], key: str, dtype: str, shape: tuple[int, ...]) -> None:
    bits = STORAGE_TYPES[dtype].bits
    if bits < 8 and (not shape or shape[-1] * bits % 8):
        return  # no header that is read has such a tensor
    nbytes = math.prod(shape) * bits // 8
    tensors[key] = TensorInfo(key, dtype, shape, FILE, 0, nbytes)


def _add_layer(
    rng: Random,
    tensors: dict[str, TensorInfo],
    scheme: NamingScheme,
    stem: str,
    sizes: tuple[int, int, int],
    mxfp4: bool,
    biased: bool,
) -> None:
    E, H, I = sizes
    codes, scales = rng.choice((("U8", "U8"), ("I8", "F8_E8M0"), ("U8", "F8_E8M0")))
    floats = rng.choice(("BF16", "BF16", "F16", "F32"))
    weight, scale = scheme.weights[0], rng.choice(scheme.scales)
    fused = scheme.fused
    projections = [(scheme.gate, I, H), (scheme.up, I, H), (scheme.down, H, I)]
    if fused:
        projections = [(scheme.gate, 2 * I, H), (scheme.down, H, I)]
    for expert in (None,) if fused else range(E):
        inner = f"{stem}{scheme.block}." + ("" if expert is None else f"{expert}.")
        lead = (E,) if fused else ()
        for name, N, K in projections:
            if mxfp4:
                blocks = scheme.weights == ("_blocks",)
                shape = (N, K // 32, 16) if blocks else (N, K // 2)
                _add(tensors, f"{inner}{name}{weight}", codes, (*lead, *shape))
                _add(tensors, f"{inner}{name}{scale}", scales, (*lead, N, K // 32))
            else:
                _add(tensors, f"{inner}{name}{weight}", floats, (*lead, N, K))
            if biased or (scheme.markers and weight == ""):
                _add(tensors, f"{inner}{name}{scheme.bias}", "BF16", (*lead, N))
    _add(tensors, f"{stem}self_attn.q_proj.weight", "BF16", (H, H))
    _add(tensors, f"{stem}mlp.gate.weight", "BF16", (E, H))


def _add_quantized(
    tensors: dict[str, TensorInfo],
    scheme: NamingScheme,
    stem: str,
    sizes: tuple[int, int, int],
    kind: str,
) -> None:
    E, H, I = sizes
    for expert in range(E):
        for name, N, K in ((scheme.gate, I, H), (scheme.up, I, H), (scheme.down, H, I)):
            for suffix, (dtype, shape) in _planes(kind, N, K).items():
                _add(tensors, f"{stem}{scheme.block}.{expert}.{name}{suffix}", dtype, shape)


def _damage(rng: Random, tensors: dict[str, TensorInfo]) -> None:
    if not tensors:
        return
    key = rng.choice(list(tensors))
    tensor = tensors[key]
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        _add(tensors, key, rng.choice(_DTYPES), tensor.shape)
    elif kind == 2 and tensor.shape:
        at = rng.randrange(len(tensor.shape))
        shape = (*tensor.shape[:at], rng.choice(_SIZES), *tensor.shape[at + 1 :])
        _add(tensors, key, tensor.dtype, shape)
    elif kind == 3:
        shape = rng.choice(((), (0,), tensor.shape[1:], tensor.shape[::-1], (1, *tensor.shape)))
        _add(tensors, key, tensor.dtype, shape)
    elif kind == 4:  # another name, beside it or in its place
        words = key.split(".")
        at = rng.randrange(len(words))
        other = rng.choice(list(tensors)).split(".")
        words[at] = rng.choice((*other, "", "0", "999999", "1000000", "00", "٣", "mtp", "\n"))
        renamed = ".".join(words)
        tensors[renamed] = replace(tensors.pop(key) if rng.random() < 0.5 else tensor, key=renamed)
    elif kind == 5:
        end = next((e for e in _ENDINGS if e and key.endswith(e)), "")
        renamed = key.removesuffix(end) + rng.choice(_ENDINGS)
        tensors[renamed] = replace(tensors.pop(key) if rng.random() < 0.5 else tensor, key=renamed)
    elif kind == 6:  # a layer of another family beside it
        sizes = (rng.choice((1, 2)), 32, 32)
        stem = f"{rng.choice(_PREFIXES)}layers.{rng.choice((0, 1, 7))}."
        _add_layer(rng, tensors, rng.choice(SCHEMES), stem, sizes, rng.random() < 0.5, False)
    else:  # a whole group of tensors is lost
        part = rng.choice(key.split("."))
        for other in [name for name in tensors if part in name.split(".")]:
            del tensors[other]
