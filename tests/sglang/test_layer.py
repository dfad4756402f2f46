"""SGLang's real `FusedMoE` and our `KTEPWrapperMethod` in one process, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed (make test-sglang installs it)")

from sglang.srt import runtime_context
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.plugins import load_plugins

from hybrid_moe.integrations.sglang import method as method_module
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError
from hybrid_moe.integrations.sglang.method import KTEPWrapperMethod
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

HOT = [(), (0,), (1, 3), (0, 1, 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    """As SGLang loads them in each of its processes: ours, and the shims."""
    load_plugins()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FamilyFixture:
    return write_family("qwen3_moe_mxfp4", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> FamilyFixture:
    return write_family("gpt_oss_mxfp4", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a placement profile for `LAYER` and points the environment at it."""

    def write(*hot: int) -> None:
        profile = tmp_path / "placement.json"
        profile.write_text(json.dumps({str(LAYER): list(hot)}))
        monkeypatch.setenv("HYBRID_MOE_PLACEMENT", str(profile))

    return write


@pytest.fixture
def options(qwen: FamilyFixture) -> Iterator[None]:
    with server_options(qwen, gpu_experts=2):
        yield


def test_the_plugin_takes_over_with_the_first_layer(qwen: FamilyFixture, options: None) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    layer = new_layer(qwen)
    assert type(layer.quant_method) is KTEPWrapperMethod
    assert fused_moe.KTEPWrapperMethod is KTEPWrapperMethod
    assert KTEPWrapperMethod.__name__ == "KTEPWrapperMethod"  # SGLang compares it
    assert hasattr(Scheduler.run_batch, "__wrapped__")


def test_models_do_not_take_the_method_for_upstreams(qwen: FamilyFixture, options: None) -> None:
    """Where it is an instance of upstream's class, models multiply by the factor themselves."""
    from sglang.srt.layers.moe import kt_ep_wrapper

    new_layer(qwen)
    assert kt_ep_wrapper.KTEPWrapperMethod is not KTEPWrapperMethod
    assert not issubclass(KTEPWrapperMethod, kt_ep_wrapper.KTEPWrapperMethod)
    assert kt_ep_wrapper.KTRANSFORMERS_AVAILABLE


def test_a_step_that_fails_on_the_gpu_leaves_nothing_behind(
    qwen: FamilyFixture, options: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(qwen)
    load(layer, qwen)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("the GPU is full")

    batch = Batch.random(qwen, 9)
    with monkeypatch.context() as patch:
        patch.setattr(layer.quant_method.gpu_method, "apply", fail)
        with pytest.raises(MemoryError):
            batch.through(layer)
    assert_close(batch.through(layer), batch, qwen)


@pytest.mark.parametrize("meets_it", ["submit_forward", "sync_forward"])
def test_a_fault_on_the_cpu_is_kept_for_the_scheduler(
    qwen: FamilyFixture, options: None, monkeypatch: pytest.MonkeyPatch, meets_it: str
) -> None:
    """A step may meet it in its own sync, or what the step before left behind in its submit."""
    layer = new_layer(qwen)
    load(layer, qwen)
    batch, fault = Batch.random(qwen, 9), RuntimeError("a worker")

    def fail(*args: object, **kwargs: object) -> None:
        layer.quant_method.wrapper.reset()
        raise fault

    kept: list[Exception] = []
    with monkeypatch.context() as patch:
        patch.setattr(layer.quant_method.wrapper, meets_it, fail)
        with pytest.raises(RuntimeError, match="a worker"):  # nobody schedules
            batch.through(layer)
        patch.setattr(method_module.STEP_FAULTS, "keep", kept.append)
        batch.through(layer)
    assert kept == [fault]
    assert_close(batch.through(layer), batch, qwen)


@pytest.mark.parametrize("hot", HOT, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_any_set_of_hot_experts(
    qwen: FamilyFixture, place: Any, hot: tuple[int, ...], tokens: int
) -> None:
    place(*hot)
    with server_options(qwen, gpu_experts=None):
        layer = new_layer(qwen)
        load(layer, qwen)
        assert layer.w13_weight.shape[0] == layer.w2_weight.shape[0] == len(hot)
        for slot, expert in enumerate(hot):
            down = torch.from_numpy(qwen.layers[LAYER].down[expert]).bfloat16()
            assert torch.equal(layer.w2_weight[slot], down)
        assert (layer.quant_method.wrapper is None) == (len(hot) == qwen.num_experts)
        batch = Batch.random(qwen, tokens)
        assert_close(batch.through(layer), batch, qwen)


def test_codes_are_not_taken_for_weights(qwen: FamilyFixture, options: None) -> None:
    layer = new_layer(qwen)
    codes = torch.zeros(qwen.intermediate, qwen.hidden // 2, dtype=torch.uint8)

    def give(expert: int) -> None:
        layer.w13_weight.weight_loader(
            layer.w13_weight, codes, "experts.w13_weight", shard_id="w1", expert_id=expert
        )

    give(3)  # a cold one: SGLang has no use for it
    with pytest.raises(ValueError, match=r"uint8 codes, .*--kt-num-gpu-experts 0"):
        give(1)


def test_the_first_experts_by_default(qwen: FamilyFixture, options: None) -> None:
    layer = new_layer(qwen)
    load(layer, qwen)
    assert layer.quant_method.experts.hot == (0, 1)
    assert layer.quant_method.wrapper.gpu_experts_mask.tolist() == [True, True, False, False]
    batch = Batch.random(qwen, 9)
    assert_close(batch.through(layer), batch, qwen)


def test_no_experts_on_the_gpu_is_the_default(qwen: FamilyFixture) -> None:
    with server_options(qwen, gpu_experts=None):
        assert new_layer(qwen).quant_method.experts.count == 0


def test_zero_hot_experts_skip_the_gpu_method(
    qwen: FamilyFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the GPU's method must not run")

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply", refuse)
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", refuse)
    with server_options(qwen, gpu_experts=0):
        layer = new_layer(qwen)
        load(layer, qwen)
        batch = Batch.random(qwen, 5)
        assert_close(batch.through(layer), batch, qwen)


def test_inputs_may_be_overwritten_and_ids_are_not(
    qwen: FamilyFixture, options: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU kernels write over x (inplace is their default); the router's ids are others' too."""
    layer = new_layer(qwen)
    load(layer, qwen)
    gpu_method = layer.quant_method.gpu_method
    original, seen = gpu_method.apply, []

    def overwriting(layer: Any, dispatch_output: Any) -> Any:
        combined = original(layer, dispatch_output)
        dispatch_output.hidden_states.fill_(7.0)
        seen.append(dispatch_output.topk_output.topk_ids)
        return combined

    monkeypatch.setattr(gpu_method, "apply", overwriting)
    batch = Batch.random(qwen, 9)
    assert_close(batch.through(layer), batch, qwen)
    (slots,) = seen
    assert torch.equal(slots, torch.where(batch.ids < 2, batch.ids, -1))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("hot", [(), (1, 3), (0, 1, 2, 3)], ids=str)
def test_routed_scaling_factor_is_applied_once(
    qwen: FamilyFixture,
    place: Any,
    monkeypatch: pytest.MonkeyPatch,
    folded: bool,
    hot: tuple[int, ...],
) -> None:
    """By the router where the GPU's method wants it in the weights, else by us; never by its
    runner. (On CUDA: on a CPU, SGLang's models always multiply themselves.)"""
    place(*hot)
    monkeypatch.setattr(method_module, "is_cuda", lambda: True)
    monkeypatch.setattr(
        UnquantizedFusedMoEMethod, "fuse_routed_scaling_factor_in_topk", folded, raising=False
    )
    with server_options(qwen, gpu_experts=None):
        layer = new_layer(qwen, routed_scaling_factor=2.5)
        load(layer, qwen)
        assert layer.should_fuse_routed_scaling_factor_in_topk == folded
        assert layer.moe_runner_config.routed_scaling_factor is None
        batch = Batch.random(qwen, 9)
        output = batch.through(layer)
        scaled = Batch(batch.x, batch.ids, batch.weights * (1.0 if folded else 2.5))
        assert_close(output, scaled, qwen)


def test_on_a_cpu_models_multiply(qwen: FamilyFixture, options: None) -> None:
    layer = new_layer(qwen, routed_scaling_factor=2.5)
    load(layer, qwen)
    batch = Batch.random(qwen, 9)
    assert_close(batch.through(layer), batch, qwen)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_swiglu_limit_reaches_the_cpu(qwen: FamilyFixture, limit: float) -> None:
    with server_options(qwen, gpu_experts=0):
        layer = new_layer(qwen, swiglu_limit=limit)
        load(layer, qwen)
        batch = Batch.random(qwen, 9)
        assert_close(batch.through(layer), batch, qwen, limit=limit)


@pytest.mark.parametrize("hot", HOT, ids=str)
def test_gpt_oss_allocates_and_fills_slots_only(
    gpt_oss: FamilyFixture, place: Any, hot: tuple[int, ...]
) -> None:
    from safetensors.torch import load_file

    place(*hot)
    with server_options(gpt_oss, gpu_experts=None):
        layer = gpt_oss_layer(gpt_oss)
    sizes = {name: param.shape[0] for name, param in layer.named_parameters()}
    assert set(sizes.values()) == {len(hot)}
    assert len(sizes) == 6
    stored = load_file(gpt_oss.directory / "model.safetensors")
    blocks = stored[f"model.layers.{LAYER}.mlp.experts.down_proj_blocks"].flatten(2)
    assert torch.equal(layer.w2_weight[:, :, : blocks.shape[2]], blocks[list(hot)])


def test_gpt_oss_arithmetic_on_the_cpu(gpt_oss: FamilyFixture) -> None:
    """Biases, slope and clamp, with every expert on the CPU."""
    with server_options(gpt_oss, gpu_experts=0):
        layer = gpt_oss_layer(gpt_oss)
        finish(layer)
        wrapper = layer.quant_method.wrapper
        assert (wrapper.activation.limit, wrapper.activation.alpha) == (7.0, 1.702)
        batch = Batch.random(gpt_oss, 9)
        assert_close(batch.through(layer), batch, gpt_oss, limit=7.0, alpha=1.702)


def test_padded_hidden_size(
    qwen: FamilyFixture, options: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some GPU kernels pad the hidden size; the CPU's experts have the checkpoint's."""
    layer = new_layer(qwen)
    load(layer, qwen)
    gpu_method = layer.quant_method.gpu_method
    original = gpu_method.apply

    def narrow(layer: Any, dispatch_output: Any) -> Any:
        x = dispatch_output.hidden_states
        combined = original(
            layer, dispatch_output._replace(hidden_states=x[:, : qwen.hidden].contiguous())
        )
        padded = torch.nn.functional.pad(combined.hidden_states, (0, x.shape[1] - qwen.hidden))
        return combined._replace(hidden_states=padded)

    monkeypatch.setattr(gpu_method, "apply", narrow)
    batch = Batch.random(qwen, 5)
    wide = Batch(torch.nn.functional.pad(batch.x, (0, 32)), batch.ids, batch.weights)
    output = wide.through(layer)
    assert not output[:, qwen.hidden :].any()
    assert_close(output[:, : qwen.hidden], batch, qwen)


def test_only_rank_0_has_a_cpu_side(qwen: FamilyFixture) -> None:
    for rank in (0, 2):
        with server_options(qwen, gpu_experts=2, ranks=tensor_parallel(rank, of=3)):
            layer = new_layer(qwen)
            wrapper = layer.quant_method.wrapper
            assert (wrapper is not None) == (rank == 0)
            if wrapper is not None:  # has the whole expert, not a third of it
                assert wrapper.moe_intermediate_size == qwen.intermediate
            else:
                load(layer, qwen)


def test_a_rank_without_experts_contributes_zero(qwen: FamilyFixture) -> None:
    with server_options(qwen, gpu_experts=0, ranks=tensor_parallel(1, of=3)):
        layer = new_layer(qwen)
        load(layer, qwen)
        assert not Batch.random(qwen, 4).through(layer).any()


def test_draft_models_stay_on_the_gpu(qwen: FamilyFixture) -> None:
    with (
        server_options(qwen, gpu_experts=0),
        runtime_context.get_flags().moe.override(in_speculative_scope=True),
    ):
        layer = new_layer(qwen)
        load(layer, qwen)
    assert layer.quant_method.wrapper is None
    assert layer.w13_weight.shape[0] == qwen.num_experts


@pytest.mark.parametrize(
    ("server", "layer_options", "message"),
    [
        ({"enable_eplb": True}, {}, "--enable-eplb"),
        ({"ep_num_redundant_experts": 2}, {}, "--ep-num-redundant-experts"),
        ({}, {"num_fused_shared_experts": 1}, "--disable-shared-experts-fusion"),
        ({}, {"activation": "gelu"}, 'activation "gelu"'),
        ({}, {"is_gated": False}, "without a gate"),
        ({}, {"apply_router_weight_on_input": True}, "routing weights on the input"),
        ({}, {"no_combine": True}, "no_combine"),
        ({}, {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0, "gemm1_beta": 2.0}, "gemm1_beta"),
        (
            {"ranks": tensor_parallel(0, of=2) | {"moe_tp_size": 1, "moe_ep_size": 2}},
            {},
            "--ep-size 2: use tensor parallelism only",
        ),
        (
            {"ranks": tensor_parallel(0, of=2) | {"moe_tp_size": 1, "moe_dp_size": 2}},
            {},
            "--moe-dp-size",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_wrong_is_refused(
    qwen: FamilyFixture, server: dict[str, Any], layer_options: dict[str, Any], message: str
) -> None:
    with server_options(qwen, 2, **server), pytest.raises(UnsupportedLayerError, match=message):
        new_layer(qwen, **layer_options)


def test_a_format_that_a_layer_does_not_become_is_refused_before_loading(
    qwen: FamilyFixture,
) -> None:
    refused = pytest.raises(ValueError, match="does not become BF16")
    with server_options(qwen, 2, method="BF16"), refused:
        new_layer(qwen)


def test_each_layer_in_its_stored_format(tmp_path: Path) -> None:
    fixture = write_family("qwen3_moe_mixed", tmp_path)
    with server_options(fixture, 2, method="STORED"):
        layer = new_layer(fixture)
        assert layer.quant_method.wrapper.method == fixture.methods[LAYER] == "BF16"


def test_routing_without_ids_is_refused(qwen: FamilyFixture, options: None) -> None:
    from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import TritonKernelTopKOutput

    layer = new_layer(qwen)
    load(layer, qwen)
    nothing = torch.empty(0)
    batch = StandardDispatchOutput(
        torch.zeros(1, qwen.hidden), None, TritonKernelTopKOutput(*[nothing] * 5)
    )
    with pytest.raises(UnsupportedLayerError, match="TritonKernelTopKOutput"):
        layer.quant_method.apply(layer, batch)


def test_weights_cannot_be_updated(qwen: FamilyFixture, options: None) -> None:
    from sglang.srt.model_executor.model_runner_components import weight_updater

    layer = new_layer(qwen)
    error = weight_updater._unsupported_derived_weight_cache_error(torch.nn.Sequential(layer))
    assert error is not None
    assert "cannot be updated" in str(error)


def test_too_many_gpu_experts(qwen: FamilyFixture) -> None:
    with server_options(qwen, 5), pytest.raises(ValueError, match="between 0 and the 4 experts"):
        new_layer(qwen)


def test_runner_configuration_has_what_is_read() -> None:
    """Defaults of a configuration are a plain SwiGLU."""
    from hybrid_moe.integrations.sglang.expert_layer import swiglu_of

    assert swiglu_of(MoeRunnerConfig()) == (0.0, 0.0)
