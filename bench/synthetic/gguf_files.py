"""A checkpoint's weights as the GGUF files that llama.cpp reads, for gpt-oss and Qwen3-MoE.

Experts are the same MXFP4 bits in ggml's order; linear layers, embeddings and `lm_head` are BF16 as
stored, or Q8_0; norms, biases and routers are float32, as llama.cpp's own converter writes them.
There is no vocabulary: tokens are ids. Experts lie in a file of their own, which checkpoints of
either `dense` share.

    python -m synthetic.gguf_files CHECKPOINT TARGET bf16     # prints the names of the files
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from problem import bf16_values

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.loaders import Checkpoint, LayerSource
from hybrid_moe.loaders.safetensors import ReadBuffers
from synthetic.ggml_blocks import ggml_blocks

ARCHITECTURES: Mapping[str, str] = {"gpt_oss": "gpt-oss", "qwen3_moe": "qwen3moe"}
"""By `model_type`: GGUF's names of what can be written."""

DENSE: Mapping[str, GgmlType] = {
    "bf16": GgmlType.BF16,
    "torch": GgmlType.BF16,
    "int8": GgmlType.Q8_0,
}
"""By our name of what linear layers are; torch has them in BF16."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: GGUF's name, numbers of elements (outermost first), and how to get
    its bytes."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    data: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


def write_gguf(folder: Path, target: Path, dense: str) -> list[Path]:
    """The GGUF files of the checkpoint in `folder`, in the order in which llama.cpp takes them;
    written below `target` where they are not there.

    Raises:
        ValueError: no architecture or no `dense` that can be written.
        OSError: too little room on the disk.
    """
    checkpoint = Checkpoint.open(folder)
    family = str(checkpoint.config["model_type"])
    if family not in ARCHITECTURES or dense not in DENSE:
        raise ValueError(f"GGUF of {family} with dense={dense} is not written here")
    target.mkdir(parents=True, exist_ok=True)
    files = [target / f"{DENSE[dense].name.lower()}.gguf", target / "experts.gguf"]
    names = gguf.get_tensor_name_map(_architecture(family), checkpoint.config["num_hidden_layers"])
    first = list(_dense_tensors(checkpoint, names, DENSE[dense]))
    second = list(_expert_tensors(checkpoint))
    for part, tensors in enumerate((first, second)):
        if not files[part].exists():
            _write(files[part], part, len(first) + len(second), tensors, checkpoint.config)
    checkpoint.close()
    return files


def _write(
    file: Path, part: int, total: int, tensors: list[Planned], config: Mapping[str, Any]
) -> None:
    """One of two files; it has its name only when it is complete."""
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        raise OSError(f"{file}: {needed} bytes will be written, {free} are free")
    writer = gguf.GGUFWriter(None, ARCHITECTURES[config["model_type"]])
    if part == 0:
        _add_configuration(writer, config)
    writer.add_uint16("split.no", part)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", total)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type
        )
    partial_file = file.with_suffix(".partial")
    writer.write_header_to_file(partial_file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
    writer.close()
    partial_file.replace(file)


def _architecture(family: str) -> gguf.MODEL_ARCH:
    name = ARCHITECTURES[family]
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _dense_tensors(
    checkpoint: Checkpoint, names: gguf.TensorNameMap, linear: GgmlType
) -> Iterator[Planned]:
    """Everything but the experts."""
    for key, tensor in checkpoint.index.tensors.items():
        if key in checkpoint.expert_keys:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"GGUF has no name for {key}")
        if key.endswith(".sinks"):
            name += ".weight"
        plain = len(tensor.shape) == 1 or "ffn_gate_inp" in name
        kind = GgmlType.F32 if plain else linear
        read = partial(_encoded, checkpoint, key, kind)
        yield Planned(name, tensor.shape, kind, read)


def _encoded(checkpoint: Checkpoint, key: str, kind: GgmlType) -> Array:
    bits = np.asarray(checkpoint.index.read(key)).view(np.uint16)
    if kind == GgmlType.BF16:
        return bits
    if kind == GgmlType.F32:
        return bf16_values(bits)
    rows = max(1, (64 << 20) // (4 * bits.shape[1]))  # float32 is twice the size of the whole
    parts = [
        gguf.quants.quantize(bf16_values(bits[start : start + rows]), kind)
        for start in range(0, len(bits), rows)
    ]
    return np.concatenate(parts)


def _expert_tensors(checkpoint: Checkpoint) -> Iterator[Planned]:
    for number, source in checkpoint.sources().items():
        E, H, I = source.num_experts, source.hidden, source.intermediate
        for name, N, K in (("gate", I, H), ("up", I, H), ("down", H, I)):
            stem = f"blk.{number}.ffn_{name}_exps"
            blocks = partial(_expert_blocks, source, name)
            yield Planned(f"{stem}.weight", (E, N, K), GgmlType.MXFP4, blocks)
            if source.has_bias:
                biases = partial(_expert_biases, source, name)
                yield Planned(f"{stem}.bias", (E, N), GgmlType.F32, biases)


def _expert_blocks(source: LayerSource, name: str) -> Array:
    buffers = ReadBuffers()
    experts = range(source.num_experts)
    return np.stack([ggml_blocks(_matrix(source, e, name, buffers)) for e in experts])


def _expert_biases(source: LayerSource, name: str) -> Array:
    buffers, biases = ReadBuffers(), []
    for expert in range(source.num_experts):
        bias = _matrix(source, expert, name, buffers).bias
        assert bias is not None
        biases.append(bias.copy())
    return np.stack(biases)


def _matrix(source: LayerSource, expert: int, name: str, buffers: ReadBuffers) -> Matrix:
    matrix: Matrix = getattr(source.expert(expert, MXFP4, buffers.mine), name)
    return matrix


def _add_configuration(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What llama.cpp asks for, by the names of `config.json`."""
    experts = config.get("num_experts") or config["num_local_experts"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(
        config.get("moe_intermediate_size") or config["intermediate_size"]
    )
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


if __name__ == "__main__":
    for file in write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]):
        print(file)
