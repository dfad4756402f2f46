"""Families' experts through hybrid_moe against Transformers' own, on tiny random models."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.formats.numbers import bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.table import BF16, DENSE_FORMATS, FORMATS
from hybrid_moe.formats.tensors import check_matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.experts_module import (
    common_format,
    expert_tensors,
    experts_spec,
    find_experts,
)
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.proof import recognise_activation
from hybrid_moe.integrations.transformers.registration import offload, register, register_or_warn
from tests.hybrid_moe.tiny_models import FAMILIES, build, greedy, logits, offload_experts, prompt
from tests.reference import assert_within, evaluate

FAMILY = pytest.mark.parametrize("family", FAMILIES)
METHOD = pytest.mark.parametrize("method", DENSE_FORMATS)

ACTIVATIONS = {
    "qwen3_moe": (0.0, 0.0),
    "mixtral": (0.0, 0.0),
    "gpt_oss": (0.5, 1.702),
    "deepseek_v4": (0.25, 0.0),
}
"""(limit, alpha) of each tiny model, from its config and its family's modeling file."""


def fused(module: torch.nn.Module) -> dict[str, Any]:
    """gate, up [E, I, H], down [E, H, I] and biases in float32, read off a Transformers module."""
    w = {n: p.detach().float() for n, p in module.named_parameters()}
    gate_up, down = w["gate_up_proj"], w["down_proj"]
    if "gate_up_proj_bias" not in w:
        gate, up = gate_up.chunk(2, dim=1)
        return {"gate": gate.numpy(), "up": up.numpy(), "down": down.numpy()}
    gate_up, bias = gate_up.transpose(1, 2), w["gate_up_proj_bias"]  # gpt-oss
    return {
        "gate": gate_up[:, ::2].numpy(), "up": gate_up[:, 1::2].numpy(),
        "down": down.transpose(1, 2).numpy(), "gate_bias": bias[:, ::2].numpy(),
        "up_bias": bias[:, 1::2].numpy(), "down_bias": w["down_proj_bias"].numpy(),
    }  # fmt: skip


def dequantize_in_place(model: Any, method: str, dtype: torch.dtype = torch.float32) -> None:
    """Round every expert of a Transformers model to what `method` can hold. In BF16, in which eager
    computes, values of INT8 are rounded once more; a reference takes them as they are."""
    fmt = DENSE_FORMATS[method]
    for module in find_experts(model).values():
        transposed = "gate_up_proj_bias" in dict(module.named_parameters())
        for name in ("gate_up_proj", "down_proj"):
            parameter = torch.nn.Parameter(getattr(module, name).to(dtype), requires_grad=False)
            setattr(module, name, parameter)
            for weight in parameter.data:
                rows = weight.t() if transposed else weight
                values = fmt.dequantize(*fmt.encode(np.ascontiguousarray(rows.float().numpy())))
                rows.copy_(torch.from_numpy(values))


def contract_experts(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts with the numerics contract's roundings and no others, in float64."""
    w, x = fused(module), hidden.double().numpy()
    limit, alpha = ACTIVATIONS[module.config.model_type]
    y = np.zeros_like(x)
    for e in range(len(w["gate"])):
        rows, slots = np.nonzero(ids.numpy() == e)
        g, u = (x[rows] @ w[n][e].T.astype(np.float64) for n in ("gate", "up"))
        if "gate_bias" in w:
            g, u = g + w["gate_bias"][e], u + w["up_bias"][e]
        if limit:
            g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        h = g / (1 + np.exp(-(alpha or 1.0) * g)) * (u + 1 if alpha else u)
        h = bf16_to_f32(f32_to_bf16(h.astype(np.float32))).astype(np.float64)
        out = h @ w["down"][e].T + w.get("down_bias", np.zeros(len(w["gate"])))[e]
        np.add.at(y, rows, weights.double().numpy()[rows, slots][:, None] * out)
    bits = f32_to_bf16(y.astype(np.float32))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.fixture
def contract_implementation() -> Any:
    """The name of `contract_experts` in Transformers' interface."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("contract", contract_experts)
    yield "contract"
    ExpertsInterface._global_mapping.pop("contract")


@FAMILY
def test_activation_and_sizes_are_recognised(family: str) -> None:
    model = build(family)
    for name, module in find_experts(model).items():
        spec = experts_spec(module, name)
        reference = fused(module)
        assert (spec.activation.limit, spec.activation.alpha) == ACTIVATIONS[family]
        assert (spec.num_experts, spec.intermediate, spec.hidden) == reference["gate"].shape
        assert name in spec.where and type(module).__name__ in spec.where


@FAMILY
@METHOD
def test_expert_tensors_hold_the_module_s_weights(family: str, method: str) -> None:
    fmt = DENSE_FORMATS[method]
    module = next(iter(find_experts(build(family)).values()))
    reference = fused(module)
    tensors = expert_tensors(module, experts_spec(module), 1, fmt)
    for name in ("gate", "up", "down"):
        matrix, expected = getattr(tensors, name), np.ascontiguousarray(reference[name][1])
        codes = np.ascontiguousarray(matrix.codes)
        np.testing.assert_array_equal(
            fmt.dequantize(codes, matrix.scales), fmt.dequantize(*fmt.encode(expected))
        )
        bias = reference.get(f"{name}_bias")
        assert (matrix.bias is None) == (bias is None)
        if bias is not None:
            np.testing.assert_array_equal(matrix.bias, bias[1])


@FAMILY
@METHOD
def test_every_layer_is_within_the_contract(family: str, method: str) -> None:
    model = build(family)
    exact = build(family)
    dequantize_in_place(exact, method)
    references = {name: fused(m) for name, m in find_experts(exact).items()}
    offload(model, method, threads=1, progress=False)
    limit, alpha = ACTIVATIONS[family]
    checked = []

    def check(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, ids, weights = (a.reshape(-1, a.shape[-1]) for a in args)
            expected = evaluate(
                x.float().numpy(), ids.numpy(), weights.float().numpy(),
                **references[name], limit=limit, alpha=alpha,
            )  # fmt: skip
            assert_within(output.reshape(x.shape).float().numpy(), expected)
            checked.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, HybridExperts):
            module.register_forward_hook(check(name))
    logits(model, prompt(12))
    assert checked == list(references)


@FAMILY
@METHOD
def test_greedy_text_equals_the_contract_token_for_token(
    family: str, method: str, contract_implementation: str
) -> None:
    model, exact = build(family), build(family)
    dequantize_in_place(exact, method)
    exact.set_experts_implementation(contract_implementation)
    offload(model, method, threads=1, progress=False)
    assert greedy(model, prompt()) == greedy(exact, prompt())


@FAMILY
@METHOD
def test_greedy_text_equals_eager_token_for_token(family: str, method: str) -> None:
    """Eager rounds to BF16 where the contract does not: gate, up, each expert's output, each
    addition of one. So logits may differ by a few roundings of BF16 (2^-8 relative to the largest):
    four in each layer. Tokens are the same, see `SEEDS`."""
    model, eager = build(family), build(family)
    dequantize_in_place(eager, method, torch.bfloat16)
    offload(model, method, threads=1, progress=False)
    tokens = greedy(eager, prompt())
    assert greedy(model, prompt()) == tokens
    ids = torch.cat([prompt(), torch.tensor([tokens])], dim=1)
    expected = logits(eager, ids)
    tolerance = 4 * eager.config.num_hidden_layers * 2.0**-8 * expected.abs().max()
    assert (logits(model, ids) - expected).abs().max() <= tolerance


@FAMILY
def test_registered_name_equals_offload_and_keeps_the_parameters(family: str) -> None:
    register()
    model = build(family)
    count = sum(p.numel() for p in model.parameters())
    model.set_experts_implementation("hybrid_moe")
    attached = logits(model, prompt())
    assert sum(p.numel() for p in model.parameters()) == count
    offload_experts(model, "BF16")
    torch.testing.assert_close(logits(model, prompt()), attached, rtol=0, atol=0)


def test_changed_weights_and_options_are_packed_again() -> None:
    register()
    model = build("qwen3_moe")
    model.set_experts_implementation("hybrid_moe")
    before = logits(model, prompt())
    with torch.no_grad():
        for module in find_experts(model).values():
            module.down_proj.mul_(-1)  # type: ignore[operator]
    after = logits(model, prompt())
    assert not torch.equal(before, after)
    offloaded = offload_experts(build("qwen3_moe"), "MXFP4")
    restored = build("qwen3_moe")
    restored.config.hybrid_moe_options = {"method": "MXFP4", "threads": 1}
    restored.set_experts_implementation("hybrid_moe")
    assert torch.equal(logits(restored, prompt()), logits(offloaded, prompt()))
    restored.config.hybrid_moe_options = {"method": "MXFP4", "thread": 1}
    with pytest.raises(ValueError, match=r"config\.hybrid_moe_options.*'threads'"):
        logits(restored, prompt())


def test_weights_as_the_model_holds_them() -> None:
    held = logits(offload_experts(build("qwen3_moe"), "auto"), prompt())
    assert torch.equal(held, logits(offload_experts(build("qwen3_moe"), "BF16"), prompt()))
    one, other = build("qwen3_moe"), find_experts(build("qwen3_moe"))
    assert common_format(other) is BF16
    first = next(iter(other.values()))
    first.gate_up_proj = torch.nn.Parameter(
        torch.zeros(1, 2, 2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="some experts of the model are MXFP4 and some BF16"):
        common_format(other)
    with pytest.raises(ValueError, match="unknown method 'nothing'"):
        offload(one, "nothing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", [FORMATS["FP8"], FORMATS["INT8_ROW_FLOAT32"]], ids=lambda f: f.name)
def test_a_module_s_weights_in_formats_of_blocks_and_rows(
    fmt: WeightFormat, dtype: torch.dtype
) -> None:
    """Gate and up are apart before they are quantized: neither shares a block with the other."""
    module = next(iter(find_experts(build("qwen3_moe")).values())).to(dtype)
    spec = experts_spec(module)
    tensors = expert_tensors(module, spec, 1, fmt)
    check_matrix(tensors.up, fmt, spec.intermediate, spec.hidden)
    up = module.gate_up_proj[1, spec.intermediate :].detach().float().numpy()  # type: ignore[index]
    codes, scales = fmt.encode(np.ascontiguousarray(up))
    assert np.array_equal(tensors.up.codes, codes) and np.array_equal(tensors.up.scales, scales)


def test_ids_beyond_the_experts_contribute_zero() -> None:
    model = build("qwen3_moe")
    name, module = next(iter(find_experts(model).items()))
    E = experts_spec(module).num_experts
    offload(model, "BF16", threads=1, progress=False)
    experts = model.get_submodule(name)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    weights = torch.full((3, 2), 0.5)
    with_sentinel = experts(x, torch.tensor([[0, E], [E, 1], [E, E]]), weights)
    alone = experts(x, torch.tensor([[0, -1], [-1, 1], [-1, -1]]), weights)
    assert torch.equal(with_sentinel, alone)
    assert not with_sentinel[2].any() and with_sentinel[:2].any()


@FAMILY
def test_offload_frees_the_parameters(family: str) -> None:
    import weakref

    model = build(family)
    experts = find_experts(model)
    gone = [weakref.ref(p) for module in experts.values() for p in module.parameters()]
    names = list(experts)
    del experts
    assert gone and all(ref() is not None for ref in gone)
    assert offload(model, "MXFP4", threads=1, progress=False) is model
    assert all(ref() is None for ref in gone)
    assert not any(key.startswith(name) for key in model.state_dict() for name in names)
    assert model.config._experts_implementation == "hybrid_moe"
    assert "MXFP4" in repr(model)


def test_backward_is_refused_by_name() -> None:
    model = offload(build("qwen3_moe"), "BF16", threads=1, progress=False)
    with pytest.raises(RuntimeError, match="inference only"):
        model(input_ids=prompt()).logits.sum().backward()


def test_copies_share_the_panels_and_are_not_pickled() -> None:
    model = offload(build("qwen3_moe"), "MXFP4", threads=1, progress=False)
    expected = logits(model, prompt())
    twin = copy.deepcopy(model)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    del model
    assert torch.equal(logits(twin, prompt()), expected)


def test_copies_of_a_packed_module_pack_their_own() -> None:
    register()
    model = build("qwen3_moe")
    model.set_experts_implementation("hybrid_moe")
    expected = logits(model, prompt())
    twin, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for module in find_experts(twin).values():
            module.down_proj.zero_()  # type: ignore[operator]
    assert not torch.equal(logits(twin, prompt()), expected)
    assert torch.equal(logits(model, prompt()), expected)
    assert torch.equal(logits(restored, prompt()), expected)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", "float"])
def test_fp4_experts_of_transformers_keep_their_bits(scale_fmt: str) -> None:
    """DeepSeek-V4's module for GPUs: int8 pairs of codes, scales of 32 inputs."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    if "expert_dtype" not in inspect.signature(FP8Experts.__init__).parameters:
        pytest.skip("this Transformers has no such experts")
    register()
    config = FAMILIES["deepseek_v4"]()
    config._experts_implementation = "hybrid_moe"
    config.hybrid_moe_options = {"method": "MXFP4", "threads": 1}
    dispatched = use_experts_implementation(
        experts_class=type("FP8Experts", (FP8Experts,), {}),
        experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
    )
    module = dispatched(config, (128, 128), scale_fmt=scale_fmt, expert_dtype="fp4")
    rng = np.random.default_rng(0)
    values = {}
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        codes = rng.integers(0, 256, weight.shape, dtype=np.uint8)
        exponents = rng.integers(119, 123, scale.shape, dtype=np.uint8)
        weight.data.copy_(torch.from_numpy(codes.view(np.int8)))
        if scale_fmt == "ue8m0":
            scale.data.view(torch.uint8).copy_(torch.from_numpy(exponents))
        else:
            scale.data.copy_(torch.from_numpy(np.exp2(exponents - 127.0)))
        values[name] = np.stack(
            [DENSE_FORMATS["MXFP4"].dequantize(c, s) for c, s in zip(codes, exponents, strict=True)]
        )
    gate, up = np.split(values["gate_up_proj"], 2, axis=1)
    x, ids = torch.randn(5, 64).bfloat16(), torch.randint(0, 8, (5, 2))
    weights = torch.rand(5, 2)
    expected = evaluate(
        x.float().numpy(), ids.numpy(), weights.numpy(), gate, up, values["down_proj"], limit=0.25
    )
    assert_within(module(x, ids, weights).float().numpy(), expected)


def test_fp8_experts_are_refused_by_dtype() -> None:
    module = Gelu()
    module._apply_gate = lambda gate_up: _silu_gate(gate_up)  # type: ignore[method-assign]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        offload(torch.nn.Sequential(module), "BF16", threads=1, progress=False)


def _silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_round_activations_to_bf16(dtype: torch.dtype) -> None:
    model = offload(build("mixtral", dtype), "MXFP4", threads=1, progress=False)
    experts = next(m for m in model.modules() if isinstance(m, HybridExperts))
    x = torch.randn(4, 64, dtype=dtype)
    ids, weights = torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    output = experts(x, ids, weights)
    assert output.dtype == dtype
    assert torch.equal(output.bfloat16(), experts(x.bfloat16(), ids, weights))


class Gelu(torch.nn.Module):
    """An experts module with another activation."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 64, 32))
        self.down_proj = torch.nn.Parameter(torch.zeros(2, 32, 32))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up


def test_unknown_activation_names_the_class() -> None:
    with pytest.raises(NotImplementedError, match=r"experts \(Gelu\): its activation"):
        recognise_activation(Gelu(), "experts (Gelu)")
    model = torch.nn.Sequential(Gelu())
    with pytest.raises(NotImplementedError, match=r"0 \(Gelu\)"):
        offload(model, "BF16", progress=False)
    assert isinstance(model[0], Gelu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_gate": False}, "without a gate"),
        ({"has_post_expert_norm": True}, "norm after each expert"),
        ({"down_proj": None}, "down_proj is not one tensor"),
    ],
)
def test_unknown_modules_are_refused(change: dict[str, Any], message: str) -> None:
    module = Gelu()
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(NotImplementedError, match=message):
        experts_spec(module)


def test_offload_refuses_bad_arguments() -> None:
    model = build("qwen3_moe")
    with pytest.raises(ValueError, match="unknown method 'INT3'"):
        offload(model, "INT3", progress=False)
    with pytest.raises(ValueError, match="threads"):
        offload(model, "BF16", threads=100_000, progress=False)
    with pytest.raises(ValueError, match="no experts"):
        offload(torch.nn.Linear(2, 2), "BF16", progress=False)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        offload(empty, "BF16", progress=False)
    assert find_experts(model)


def test_old_interfaces_are_told_apart(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "transformers.integrations.moe"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match=r"has no ExpertsInterface: transformers >= 5\.19"):
        register()
    with caplog.at_level(logging.WARNING):
        register_or_warn()
    assert "transformers >= 5.19" in caplog.text


def test_fp8_experts_under_the_name_are_refused_by_dtype() -> None:
    """The module has block scales, of which one expert's are fewer bytes than a word."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    register()
    config = FAMILIES["qwen3_moe"]()
    config._experts_implementation = "hybrid_moe"
    config.hybrid_moe_options = {"threads": 1}
    dispatched = use_experts_implementation(
        experts_class=type("FP8Experts", (FP8Experts,), {}),
        experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
    )
    module = dispatched(config, (128, 128))
    batch = torch.randn(2, 64).bfloat16(), torch.zeros(2, 2, dtype=torch.int64), torch.rand(2, 2)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        module(*batch)
