"""SGLang's real `FusedMoE` with `--kt-*`, built in the test's process from a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt import runtime_context
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

from tests.families import FamilyFixture
from tests.reference import Evaluation, evaluate

LAYER = 1
PARTS = 3.0
"""Two BF16 roundings more than one CPU layer: the GPU's share, and the sum of both."""


def tensor_parallel(rank: int, of: int) -> dict[str, Any]:
    """SGLang's ranks in a group without processes behind it: nothing is communicated."""
    return {
        "tp_size": of, "tp_rank": rank, "attn_tp_size": of, "attn_tp_rank": rank,
        "moe_tp_size": of, "moe_tp_rank": rank, "moe_ep_size": 1, "moe_ep_rank": 0,
        "moe_dp_size": 1, "tp_group": None,
    }  # fmt: skip


@contextmanager
def server_options(
    fixture: FamilyFixture,
    gpu_experts: int | None,
    ranks: dict[str, Any] | None = None,
    method: str = "MXFP4",
    **options: Any,
) -> Iterator[None]:
    """SGLang configured as by a command line with `--kt-*` and `options`."""
    with ExitStack() as stack:
        stack.enter_context(
            runtime_context.get_context().override_server_args(
                model_path=str(fixture.directory),
                device="cpu",
                kt_weight_path=str(fixture.directory),
                kt_method=method,
                kt_num_gpu_experts=gpu_experts,
                **{"kt_cpuinfer": 1, "kt_threadpool_count": 1, **options},
            )
        )
        parallel = runtime_context.get_parallel()
        stack.enter_context(parallel.override(**(ranks or tensor_parallel(0, of=1))))
        yield


def new_layer(fixture: FamilyFixture, **options: Any) -> Any:
    """A `FusedMoE` for layer `LAYER` of the checkpoint; `options` go before these."""
    usual: dict[str, Any] = {
        "num_experts": fixture.num_experts,
        "hidden_size": fixture.hidden,
        "intermediate_size": fixture.intermediate,
        "layer_id": LAYER,
        "top_k": 2,
        "params_dtype": torch.bfloat16,
    }
    return fused_moe.FusedMoE(**{**usual, **options})


def gpt_oss_layer(fixture: FamilyFixture) -> Any:
    """As SGLang's gpt-oss builds it, loaded from stacked tensors."""
    layer = new_layer(
        fixture,
        quant_config=Mxfp4Config(is_checkpoint_mxfp4_serialized=True),
        gemm1_alpha=1.702,
        gemm1_clamp_limit=7.0,
        with_bias=True,
    )
    stored = load_file(fixture.directory / "model.safetensors")
    stem = f"model.layers.{LAYER}.mlp.experts."
    for name, source in (
        ("w13_weight", "gate_up_proj_blocks"),
        ("w13_weight_scale", "gate_up_proj_scales"),
        ("w13_weight_bias", "gate_up_proj_bias"),
        ("w2_weight", "down_proj_blocks"),
        ("w2_weight_scale", "down_proj_scales"),
        ("w2_weight_bias", "down_proj_bias"),
    ):
        param, tensor = getattr(layer, name), stored[stem + source]
        if source.endswith("_blocks"):
            tensor = tensor.flatten(2)
        param.weight_loader(param, tensor, weight_name=name, shard_id=None, expert_id=None)
    return layer


def load(layer: Any, fixture: FamilyFixture) -> None:
    """Hand every expert to the layer's loaders as SGLang's models do, then finish loading."""
    values = fixture.layers[LAYER]
    for shard, param, stacked in (
        ("w1", layer.w13_weight, values.gate),
        ("w3", layer.w13_weight, values.up),
        ("w2", layer.w2_weight, values.down),
    ):
        for expert, value in enumerate(stacked):
            tensor = torch.from_numpy(value).bfloat16()
            param.weight_loader(
                param, tensor, f"experts.{shard}_weight", shard_id=shard, expert_id=expert
            )
    finish(layer)


def finish(layer: Any) -> None:
    """What SGLang's model loader does after all weights."""
    layer.quant_method.process_weights_after_loading(layer)


@dataclass(frozen=True)
class Batch:
    """Inputs of a layer."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, fixture: FamilyFixture, tokens: int, seed: int = 0) -> Batch:
        """Distinct experts for each token; the last token is padding (id -1)."""
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(fixture.num_experts)[:2] for _ in range(tokens)])
        ids[-1] = -1
        x = torch.from_numpy(rng.standard_normal((tokens, fixture.hidden))).bfloat16()
        weights = torch.from_numpy(rng.random((tokens, 2))).float()
        return cls(x, torch.from_numpy(ids), weights)

    def through(self, layer: Any) -> torch.Tensor:
        """The layer's output. The batch itself stays as it is."""
        topk = StandardTopKOutput(self.weights.clone(), self.ids.clone(), torch.empty(0))
        output: torch.Tensor = layer(self.x.clone(), topk)
        return output

    def expected(self, fixture: FamilyFixture, **options: Any) -> Evaluation:
        """What all experts together must give."""
        v = fixture.layers[LAYER]
        return evaluate(
            self.x.double().numpy(), self.ids.numpy(), self.weights.numpy(), v.gate, v.up, v.down,
            gate_bias=v.gate_bias, up_bias=v.up_bias, down_bias=v.down_bias, **options,
        )  # fmt: skip


def assert_close(
    output: torch.Tensor, batch: Batch, fixture: FamilyFixture, **options: Any
) -> None:
    """Within what BF16 experts of SGLang, computed and rounded apart from ours, may differ by."""
    expected = batch.expected(fixture, **options)
    scale = np.abs(expected.value).max(axis=1, keepdims=True)
    error = np.abs(output.double().numpy() - expected.value)
    assert (error <= expected.bound + PARTS * 2**-8 * scale).all(), error.max()
    assert not output[-1].any()  # padding
