"""What GGUF calls a tensor, and what the rest of this package calls it.

A part of a model is told from a tensor's name (`inspect`, `plan`, draft layers, missing layers), as
Transformers spells it. So tensors of GGUF files get such names where the table has one; what it
has not keeps its own behind `model.layers.N.`. Messages name a tensor as its file does.

Source: `gguf.constants.TENSOR_NAMES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

PREFIX = "model."
"""What stands before `layers.` in all keys."""

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(\w+)")
_OLD_EXPERTS = re.compile(r"blk\.\d{1,6}\.ffn_(gate|up|down)\.\d{1,6}\.\w+")

_MODEL: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
    }
)
_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_sinks": "self_attn.sinks",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b_proj",
        "attn_v_b": "self_attn.v_b_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "exp_probs_b": "mlp.gate.e_score_correction_bias",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_exps": "mlp.experts.gate_exps",
        "ffn_up_exps": "mlp.experts.up_exps",
        "ffn_down_exps": "mlp.experts.down_exps",
        "ffn_gate_up_exps": "mlp.experts.gate_up_exps",
    }
)


def key_of(name: str) -> str:
    """What the package calls the tensor `name` of a GGUF file."""
    stem, _, ending = name.rpartition(".")
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{ending}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    stem, dot, ending = match[2].rpartition(".")
    return f"{PREFIX}layers.{match[1]}.{_LAYER.get(stem, stem)}{dot}{ending}"


def expert_tensor(name: str) -> tuple[int, str, str] | None:
    """Layer, projection and ending of a tensor of all of a layer's experts: (3, "up", "bias") of
    "blk.3.ffn_up_exps.bias"; None for any other."""
    block = _BLOCK.fullmatch(name)
    experts = block and _EXPERTS.fullmatch(block[2])
    return (int(block[1]), experts[1], experts[2]) if block and experts else None


def is_one_expert(name: str) -> bool:
    """Whether a tensor is one expert's, as files had them until March 2024."""
    return _OLD_EXPERTS.fullmatch(name) is not None
