"""Whether the plugin takes over, what it checks first, and which experts are where: no SGLang."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.integrations.sglang import contract, plugin, step_faults
from hybrid_moe.integrations.sglang.contract import ContractError, Requirement
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError, layer_spec, swiglu_of
from hybrid_moe.integrations.sglang.gpu_experts import PROFILE, GpuExperts, choose
from hybrid_moe.integrations.sglang.step_faults import StepFaults
from hybrid_moe.placement.profile import profile_of_masks, read_profile, write_profile
from hybrid_moe.placement.strategies import generate_gpu_experts_masks


@pytest.mark.parametrize(
    ("switch", "kt_kernel", "take_over"),
    [
        ("", None, True),
        ("", "kt-kernel", False),
        ("", "hybrid-moe-kt-compat", True),
        ("1", "kt-kernel", True),
        ("1", None, True),
        ("0", None, False),
        ("0", "kt-kernel", False),
    ],
)
def test_decision(switch: str, kt_kernel: str | None, take_over: bool) -> None:
    decision = plugin.decide({plugin.SWITCH: switch}, kt_kernel)
    assert decision.take_over == take_over
    assert (decision.reason == f"{plugin.SWITCH}={switch}") == bool(switch)
    assert plugin.decide({}, None).take_over


@pytest.mark.parametrize("switch", ["yes", "2", " 1"])
def test_a_wrong_switch_is_named(switch: str) -> None:
    with pytest.raises(ValueError, match=f"{plugin.SWITCH}='{switch}' must be 1"):
        plugin.decide({plugin.SWITCH: switch}, None)


# The contract's predicates ----------------------------------------------------------------------


@dataclass
class Options:
    layer_idx: int
    method: str


class Batch(NamedTuple):
    hidden_states: Any


class Upstream:
    def apply(self, layer: Any, dispatch_output: Any) -> None:
        callee(layer, weight_loader=dispatch_output)

    def _private(self) -> None: ...


def callee(layer: Any, weight_loader: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("path", "examine", "problem"),
    [
        ("Options", contract.has_fields("layer_idx", "method"), None),
        ("Options", contract.has_fields("layer_idx", "num_layers"), "no field num_layers"),
        ("Batch", contract.has_fields("hidden_states"), None),
        ("Batch", contract.has_fields("topk_output"), "no field topk_output"),
        ("Upstream.apply", contract.calls_with("layer", "dispatch_output"), None),
        ("Upstream.apply", contract.calls_with("layer"), "expected (layer)"),
        ("Upstream.apply", contract.called_with("layer", "dispatch_output"), None),
        ("Upstream.apply", contract.called_with("layer"), "missing a required argument"),
        ("callee", contract.called_with("layer"), None),
        ("callee", contract.called_with("layer", "stream"), "unexpected keyword argument"),
        ("Upstream.apply", contract.uses("callee", "weight_loader"), None),
        ("Upstream.apply", contract.uses("is_draft"), "no use of is_draft"),
        ("Upstream", contract.offers_only("apply", "submit"), None),
        ("Upstream", contract.offers_only("submit"), "methods that ours lacks: apply"),
        ("Downstream", None, "Downstream is gone"),
        ("Upstream.submit", None, "submit is gone"),
        ("Upstream", None, None),
    ],
)
def test_requirements(path: str, examine: Any, problem: str | None) -> None:
    requirement = Requirement(f"{__name__}:{path}", "a test", examine)
    (finding,) = contract.examine([requirement])
    if problem is None:
        assert finding.problem is None
        contract.check([requirement])
        return
    assert finding.problem is not None
    assert problem in finding.problem
    with pytest.raises(ContractError, match=path.replace(".", r"\.")) as raised:
        contract.check([requirement])
    assert contract.tested_range() in str(raised.value)


def test_a_module_that_is_gone() -> None:
    (finding,) = contract.examine([Requirement("no.such.module:X", "a test")])
    assert finding.problem is not None
    assert "cannot be imported" in finding.problem


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.5.23", False), ("0.5.22", True), ("0.5.24", True), ("0.6.0rc1", True), (None, True)],
)
def test_untested_versions_are_named(version: str | None, warned: bool) -> None:
    pytest.importorskip("packaging")
    warning = contract.untested(version)
    assert (warning is not None) == warned
    assert warning is None or "0.5.23" in warning


def doctor(*options: str) -> Any:
    return CliRunner().invoke(app, ["doctor", "--sglang", *options])


def test_doctor_reports_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    holds = Requirement(f"{__name__}:Upstream", "a test")
    gone = Requirement(f"{__name__}:Downstream", "a test")
    monkeypatch.setattr(contract, "is_installed", lambda: True)
    monkeypatch.setattr(contract, "installed_version", lambda: "0.5.23")
    monkeypatch.setattr(contract, "untested", lambda version: None)
    for requirements, code in (((holds,), 0), ((holds, gone), 1)):
        monkeypatch.setattr(contract.examine, "__defaults__", (requirements,))
        result = doctor("--json")
        assert result.exit_code == code
        problems = json.loads(result.stdout)["problems"]
        assert problems[holds.target] is None
        assert (problems.get(gone.target) is not None) == bool(code)
        assert doctor().exit_code == code
        assert "0.5.23" in doctor().stdout


def test_doctor_says_who_computes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "is_installed", lambda: True)
    monkeypatch.setattr(contract.examine, "__defaults__", ((),))
    for value, said in (
        ("", "SGLang (HYBRID_MOE_GPU is not set)"),
        ("cute", "=cute: this package"),
    ):
        monkeypatch.setenv("HYBRID_MOE_GPU", value)
        assert said in " ".join(doctor().stdout.split())
    monkeypatch.setenv("HYBRID_MOE_GPU", "cuda")
    result = doctor()
    assert result.exit_code == 2 and "HYBRID_MOE_GPU=cuda: choose" in result.output


def test_doctor_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "is_installed", lambda: False)
    result = doctor()
    assert result.exit_code == 2
    assert "SGLang is not installed" in result.output


# Which experts are where ------------------------------------------------------------------------


@given(data=st.data())
def test_slots_are_a_bijection_and_everything_else_is_minus_one(data: st.DataObject) -> None:
    E = data.draw(st.integers(1, 40))
    hot = tuple(sorted(data.draw(st.sets(st.integers(0, E - 1)))))
    experts = GpuExperts(E, hot)
    ids = torch.tensor(data.draw(st.lists(st.integers(-3, E + 3), min_size=1)))
    for dtype in (torch.int32, torch.int64):
        given_ids = ids.to(dtype)
        slots = experts.to_slots(given_ids, experts.slot_table(torch.device("cpu")))
        assert slots.dtype == dtype
        assert torch.equal(given_ids, ids.to(dtype))  # not in place
        expected = [hot.index(i) if i in hot else -1 for i in ids.tolist()]
        assert slots.tolist() == expected
    assert experts.mask.nonzero().flatten().tolist() == list(hot)
    assert experts.all_hot == (len(hot) == E)


def test_choice_without_a_profile() -> None:
    assert choose(3, 8, 2, {}).hot == (0, 1)
    assert choose(3, 8, None, {}).hot == ()
    for count in (-1, 9):
        with pytest.raises(ValueError, match="between 0 and the 8 experts of layer 3"):
            choose(3, 8, count, {})


def test_a_profile_goes_before_the_number(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, {3: [7, 1], 4: []})
    environ = {PROFILE: str(path)}
    assert choose(3, 8, 5, environ).hot == (1, 7)
    assert choose(4, 8, 5, environ).hot == ()
    with pytest.raises(ValueError, match="has no layer 5"):
        choose(5, 8, 5, environ)
    with pytest.raises(ValueError, match=r"expert 7, but .* experts 0\.\.3"):
        choose(3, 4, 5, environ)
    with pytest.raises(FileNotFoundError):
        choose(3, 8, 5, {PROFILE: str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a table of layers, not list"),
        ('{"x": []}', '"x" must be the index of a layer'),
        ('{"-1": []}', '"-1" must be the index of a layer'),
        ('{"0": 3}', "must have a list of expert ids, not 3"),
        ('{"0": [1.5]}', "has 1.5, must be an expert id"),
        ('{"0": [true]}', "has True, must be an expert id"),
        ('{"0": [-1]}', "has -1, must be an expert id"),
        ('{"0": [4, 2, 4]}', "has expert 4 twice"),
    ],
)
def test_damaged_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"profile\.json") as raised:
        read_profile(path)
    assert message in str(raised.value)


def test_profiles_are_what_masks_say(tmp_path: Path) -> None:
    frequencies = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    masks = generate_gpu_experts_masks(frequencies, 10)
    path = tmp_path / "profile.json"
    write_profile(path, profile_of_masks(masks, layers=[1, 2, 5]))
    assert set(json.loads(path.read_text())) == {"1", "2", "5"}
    profile = read_profile(path)
    for row, layer in enumerate((1, 2, 5)):
        assert list(profile.experts_of(layer, 16)) == masks[row].nonzero().flatten().tolist()
    with pytest.raises(ValueError, match=r"must be \[2 layers, experts\]"):
        profile_of_masks(masks, layers=[0, 1])


def test_a_rewritten_profile_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for experts in ((1,), (2, 3)):
        write_profile(path, {0: experts})
        os.utime(path, ns=(len(experts), len(experts)))
        assert read_profile(path).experts_of(0, 8) == experts


# What SGLang says about a layer -----------------------------------------------------------------

PLAIN = {
    "layer_id": 3, "activation": "silu", "is_gated": True, "apply_router_weight_on_input": False,
    "no_combine": False, "gemm1_alpha": None, "gemm1_beta": None, "gemm1_clamp_limit": None,
    "swiglu_limit": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "limit", "alpha"),
    [
        ({}, 0.0, 0.0),
        ({"swiglu_limit": 10}, 10.0, 0.0),  # DeepSeek-V4
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, 7.0, 1.702),  # gpt-oss
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gemm1_beta": 1.0}, 7.0, 1.702),
        ({"swiglu_limit": 7.0, "gemm1_clamp_limit": 7.0}, 7.0, 0.0),
    ],
)
def test_swiglu(said: dict[str, Any], limit: float, alpha: float) -> None:
    assert swiglu_of(SimpleNamespace(**PLAIN | said)) == (limit, alpha)


@pytest.mark.parametrize(
    "said",
    [
        {"activation": "situ"},
        {"is_gated": False},
        {"swiglu_limit": 10, "gemm1_clamp_limit": 7.0},
        {"gemm1_alpha": 1.702, "gemm1_beta": 0.5},
        {"gemm1_beta": 1.0},
    ],
)
def test_other_activations_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayerError, match="layer 3 has"):
        swiglu_of(SimpleNamespace(**PLAIN | said))


def fake_layer(**values: Any) -> Any:
    values = {
        "layer_id": 3, "top_k": 2, "hidden_size": 3072, "hidden_size_unpadded": 2880,
        "intermediate_size_per_partition": 1536, "moe_tp_size": 2,
        "moe_runner_config": SimpleNamespace(**PLAIN), **values,
    }  # fmt: skip
    return SimpleNamespace(**values)


def test_true_sizes_go_before_padded_ones() -> None:
    spec = layer_spec(fake_layer(), 32, 2880)
    assert (spec.hidden_size, spec.intermediate_size, spec.top_k) == (2880, 2880, 2)
    assert layer_spec(fake_layer(), 32, None).intermediate_size == 3072


def test_a_layer_must_know_its_top_k() -> None:
    with pytest.raises(UnsupportedLayerError, match="how many experts a token has"):
        layer_spec(fake_layer(top_k=None), 32, 2880)


# Faults of a step -------------------------------------------------------------------------------


def test_a_fault_without_a_scheduler_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a worker"):
        StepFaults().keep(RuntimeError("a worker"))


def steps(*iterations: int) -> list[Any]:
    return [
        SimpleNamespace(
            forward_iter=i, reqs=[SimpleNamespace(failed=None), SimpleNamespace(failed=None)]
        )
        for i in iterations
    ]


@pytest.mark.parametrize("replayed", [False, True])
def test_a_fault_fails_every_step_under_way(
    monkeypatch: pytest.MonkeyPatch, replayed: bool
) -> None:
    """Kept from an eager step, or found by the check after a graph's replay."""
    reported: list[Exception] = []

    def check() -> None:
        if reported:
            raise reported.pop()

    def end(request: Any, message: str) -> None:
        request.failed = message

    monkeypatch.setattr(step_faults, "end", end)
    faults = StepFaults(check)
    faults.alone = True
    before, first, second, after = batches = steps(4, 5, 6, 7)
    faults.before_results(SimpleNamespace(forward_ct=5), before, SimpleNamespace(copy_done=None))
    if replayed:
        reported.append(RuntimeError("a worker"))
    else:
        faults.keep(RuntimeError("a worker"))
    for batch, launched in ((first, 6), (second, 7), (after, 8)):
        faults.before_results(SimpleNamespace(forward_ct=launched), batch, SimpleNamespace())
    failed = [[request.failed for request in batch.reqs] for batch in batches]
    assert failed == [
        [None] * 2,
        ["hybrid_moe: a worker"] * 2,
        ["hybrid_moe: a worker"] * 2,
        [None] * 2,
    ]


def test_results_are_on_the_host_before_faults_are_looked_for() -> None:
    order: list[str] = []
    faults = StepFaults(lambda: order.append("check"))
    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=lambda: order.append("copied")))
    faults.before_results(SimpleNamespace(forward_ct=1), steps(1)[0], result)
    assert order == ["copied", "check"]


def test_ranks_of_a_group_do_not_go_on_alone() -> None:
    def check() -> None:
        raise RuntimeError("a worker")

    with pytest.raises(RuntimeError, match="a worker"):
        StepFaults(check).before_results(SimpleNamespace(), steps(1)[0], SimpleNamespace())
