"""`HYBRID_MOE_GPU` in SGLang's real `FusedMoE`: the wrapper has both halves, SGLang no expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed (make test-sglang installs it)")

from sglang.srt import runtime_context
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, Phase
from sglang.srt.plugins import load_plugins

from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.integrations.sglang import method as method_module
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError, check_graphs
from hybrid_moe.integrations.sglang.step_faults import StepFaults
from hybrid_moe.runtime.gpu_faults import GpuMemoryError
from tests.families import FamilyFixture, write_family
from tests.sglang.layers import (
    LAYER,
    Batch,
    assert_close,
    finish,
    gpt_oss_layer,
    load,
    new_layer,
    server_options,
    tensor_parallel,
)


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    load_plugins()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FamilyFixture:
    return write_family("qwen3_moe_mxfp4", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MOE_GPU", "torch")


def through_ranks(
    fixture: FamilyFixture, hot: int, ranks: int, batch: Batch
) -> list[tuple[Any, torch.Tensor]]:
    """(layer, output) of each rank, with the first `hot` experts on GPUs."""
    results = []
    for rank in range(ranks):
        with server_options(fixture, hot, ranks=tensor_parallel(rank, of=ranks)):
            layer = new_layer(fixture)
            load(layer, fixture)
            results.append((layer, batch.through(layer)))
    return results


@pytest.mark.parametrize(
    ("hot", "ranks"), [(0, 1), (3, 1), (4, 1), (0, 2), (1, 2), (3, 2), (4, 2), (4, 3)]
)
def test_ranks_give_parts_of_one_sum(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch, hot: int, ranks: int
) -> None:
    """Each expert is computed once, by one rank, which has it in a slot or is the first one."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("SGLang's method must not run")

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply", refuse)
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", refuse)
    batch = Batch.random(qwen, 9)
    parts = through_ranks(qwen, hot, ranks, batch)
    assert_close(torch.stack([part for _, part in parts]).sum(dim=0), batch, qwen)
    slots = cold = 0
    for rank, (layer, output) in enumerate(parts):
        assert {param.shape[0] for param in layer.parameters()} == {0}
        wrapper = layer.quant_method.wrapper
        if wrapper is None:
            assert not output.any()
            continue
        on_gpu, on_cpu = wrapper.pairs
        assert rank == 0 or not on_cpu
        slots, cold = slots + on_gpu, cold + on_cpu
        # The fullest GPU has one expert more than the emptiest.
        assert 0 <= int(wrapper.gpu_experts_mask.sum()) - hot // ranks <= 1
    chosen = batch.ids[batch.ids >= 0]
    assert (slots, cold) == (int((chosen < hot).sum()), int((chosen >= hot).sum()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_long_prompts_are_streamed(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """With memory for it: on the first rank, which has the cold experts."""
    monkeypatch.setenv("HYBRID_MOE_STREAM_PREFILL", "1MiB")
    batch = Batch.random(qwen, 300)
    parts = through_ranks(qwen, 1, ranks, batch)
    assert_close(torch.stack([part for _, part in parts]).sum(dim=0), batch, qwen)
    for rank, (layer, _) in enumerate(parts):
        wrapper = layer.quant_method.wrapper
        if wrapper is not None:
            assert (wrapper._prefill_stream is not None) == (rank == 0)
    stream = parts[0][0].quant_method.wrapper._prefill_stream
    stream.learn()
    assert stream.sent_bytes and stream.planner.link.known, "it has learned from the batch"


def test_quality_is_the_default_of_deferral(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SGLang's own option says nothing; the last layer has nobody to defer to."""
    for value, given, share in (
        ("balanced", None, 1 / 4),
        ("balanced", 1, None),
        ("exact", None, 0),
    ):
        monkeypatch.setenv("HYBRID_MOE_QUALITY", value)
        options = {} if given is None else {"kt_max_deferred_experts_per_token": given}
        with server_options(qwen, gpu_experts=1, **options):
            wrapper = new_layer(qwen, layer_id=0, top_k=4).quant_method.wrapper
        expected = given if share is None else int(share * wrapper.num_experts_per_tok)
        assert wrapper.max_deferred_experts_per_token == expected


def test_inputs_of_8_bits_are_those_of_the_rank_with_the_workers(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots have no use for them."""
    monkeypatch.setenv("HYBRID_MOE_CPU_ACTIVATION", "int8")
    for rank, bits in ((0, 8), (1, 16)):
        with server_options(qwen, gpu_experts=3, ranks=tensor_parallel(rank, of=2)):
            layer = new_layer(qwen)
            load(layer, qwen)
            assert layer.quant_method.wrapper._activation_bits == bits


def test_only_the_first_rank_has_the_workers(qwen: FamilyFixture) -> None:
    """SGLang may have bound the others to a part of the machine, which has not so many cores."""
    for rank in (0, 1):
        ranks = tensor_parallel(rank, of=2)
        with server_options(qwen, gpu_experts=3, ranks=ranks, kt_cpuinfer=10_000):
            if rank:
                load(new_layer(qwen), qwen)
                continue
            with pytest.raises(ValueError, match="10000 threads, but this process may use"):
                new_layer(qwen)


def test_slots_are_allocated_before_anything_is_loaded(qwen: FamilyFixture) -> None:
    """SGLang gives its cache what is free after loading, and measures before that too."""
    with server_options(qwen, gpu_experts=3):
        wrapper = new_layer(qwen).quant_method.wrapper
    slot = packed_nbytes(wrapper.format, qwen.hidden, qwen.intermediate)
    assert wrapper.gpu_nbytes == 3 * slot and not wrapper.loaded


def test_any_set_of_experts_of_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, slope and clamp in slots; SGLang's loaders are given the stacked codes of all."""
    fixture = write_family("gpt_oss_mxfp4", tmp_path)
    profile = tmp_path / "placement.json"
    profile.write_text(json.dumps({str(LAYER): [1, 3]}))
    monkeypatch.setenv("HYBRID_MOE_PLACEMENT", str(profile))
    with server_options(fixture, gpu_experts=None):
        layer = gpt_oss_layer(fixture)
        finish(layer)
        assert {param.shape[0] for param in layer.parameters()} == {0}
        assert layer.quant_method.wrapper.gpu_experts_mask.tolist() == [False, True, False, True]
        batch = Batch.random(fixture, 9)
        assert_close(batch.through(layer), batch, fixture, limit=7.0, alpha=1.702)


def test_sglang_has_no_use_for_codes(qwen: FamilyFixture) -> None:
    """So it may be given the quantized checkpoint, which it could not read an expert from."""
    codes = torch.zeros(qwen.intermediate, qwen.hidden // 2, dtype=torch.uint8)
    with server_options(qwen, gpu_experts=2):
        param = new_layer(qwen).w13_weight
    for expert in range(qwen.num_experts):
        param.weight_loader(param, codes, "experts.w13_weight", shard_id="w1", expert_id=expert)


@pytest.mark.parametrize("block", [[32, 32], None], ids=["blocks", "tensors"])
def test_parameters_of_fp8_are_there_and_take_nothing(
    qwen: FamilyFixture, block: list[int] | None
) -> None:
    """Models look their names up, scales included, and call their loaders with every expert."""
    scheme = "dynamic" if block else "static"
    fp8 = Fp8Config(True, activation_scheme=scheme, weight_block_size=block)
    with server_options(qwen, gpu_experts=2):
        layer = new_layer(qwen, quant_config=fp8)
        found = dict(layer.named_parameters())
        assert {"w13_weight", "w13_weight_scale_inv" if block else "w2_input_scale"} <= set(found)
        for name, param in found.items():
            for expert in range(qwen.num_experts):
                param.weight_loader(param, torch.ones(3), name, shard_id="w1", expert_id=expert)
            assert not param.numel()
        finish(layer)
        batch = Batch.random(qwen, 5)
        assert_close(batch.through(layer), batch, qwen)


@pytest.mark.parametrize("folded", [False, True])
def test_routed_scaling_factor_is_applied_once(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch, folded: bool
) -> None:
    """On CUDA; by the router where SGLang's method wants it in the weights, else by ours."""
    monkeypatch.setattr(method_module, "is_cuda", lambda: True)
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod, "fuse_routed_scaling_factor_in_topk", folded, raising=False
    )
    with server_options(qwen, gpu_experts=2):
        layer = new_layer(qwen, routed_scaling_factor=2.5)
        load(layer, qwen)
        assert layer.should_fuse_routed_scaling_factor_in_topk == folded
        batch = Batch.random(qwen, 9)
        scaled = Batch(batch.x, batch.ids, batch.weights * (1.0 if folded else 2.5))
        assert_close(batch.through(layer), scaled, qwen)


def test_draft_models_are_sglangs(qwen: FamilyFixture) -> None:
    with (
        server_options(qwen, gpu_experts=0),
        runtime_context.get_flags().moe.override(in_speculative_scope=True),
    ):
        layer = new_layer(qwen)
    assert layer.quant_method.wrapper is None
    assert layer.w13_weight.shape[0] == qwen.num_experts


def test_references_and_graphs_do_not_mix(qwen: FamilyFixture) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for graphs in ("full", "disabled"):
        phases = {phase: {"backend": graphs} for phase in Phase.ALL}
        with server_options(qwen, 2, cuda_graph_config=CudaGraphConfig.from_dict(phases)):
            for backend, device in (("torch", cpu), ("cute", gpu), (None, gpu)):
                check_graphs(backend, device)
            if graphs == "disabled":
                check_graphs("torch", gpu)
                continue
            with pytest.raises(UnsupportedLayerError, match="HYBRID_MOE_GPU=torch runs without"):
                check_graphs("torch", gpu)


def test_an_unknown_back_end_is_refused(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_MOE_GPU", "cuda")
    with server_options(qwen, 2), pytest.raises(ValueError, match=r"=cuda: choose cute .*, torch"):
        new_layer(qwen)


def test_a_full_gpu_fails_a_step(qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Met in the slots' kernels while the CPU is at its part; the next step is as any other."""
    batch, faults = Batch.random(qwen, 9), StepFaults()
    faults.alone = True
    monkeypatch.setattr(method_module, "STEP_FAULTS", faults)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with server_options(qwen, gpu_experts=2):
        layer = new_layer(qwen)
        load(layer, qwen)
        with monkeypatch.context() as patch:
            patch.setattr(SlotExperts, "rows", fail)
            batch.through(layer)
        kept = faults._take()
        assert isinstance(kept, GpuMemoryError) and "--mem-fraction-static" in str(kept)
        assert_close(batch.through(layer), batch, qwen)


def test_slots_that_do_not_fit(qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("hybrid_moe.runtime.hot_half.SlotExperts", fail)
    with (
        server_options(qwen, gpu_experts=2),
        pytest.raises(GpuMemoryError, match=r"layer 1: .* slots: .*--kt-num-gpu-experts"),
    ):
        new_layer(qwen)
