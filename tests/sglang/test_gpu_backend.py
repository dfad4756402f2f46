"""Which rank has which experts, who computes them, and faults on the GPU; no SGLang."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.integrations.sglang import cpu_activation, gpu_backend
from hybrid_moe.integrations.sglang.gpu_experts import GpuExperts, RankExperts
from hybrid_moe.integrations.sglang.step_faults import StepFaults, named_options
from hybrid_moe.placement.ranks import experts_of_rank
from hybrid_moe.runtime.gpu_arguments import BACKENDS
from hybrid_moe.runtime.gpu_faults import GpuLostError, GpuMemoryError, explained

E = 12
GPU = torch.device("cuda", 0)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("cute", "cute")])
def test_back_ends(value: str | None, expected: str | None) -> None:
    assert gpu_backend.chosen({} if value is None else {gpu_backend.VARIABLE: value}) == expected


def test_they_are_the_wrappers() -> None:
    assert set(gpu_backend.BACKENDS) == set(BACKENDS)


@pytest.mark.parametrize("value", ["Cute", "1", " torch"])
def test_an_unknown_back_end_is_refused_with_the_choices(value: str) -> None:
    with pytest.raises(ValueError, match=f"HYBRID_MOE_GPU={value}: choose cute .*, torch .*leave"):
        gpu_backend.chosen({gpu_backend.VARIABLE: value})


def test_inputs_of_8_bits_are_asked_for_by_name() -> None:
    assert cpu_activation.chosen({}) is cpu_activation.chosen({cpu_activation.VARIABLE: ""}) is None
    assert cpu_activation.chosen({cpu_activation.VARIABLE: "int8"}) == "int8"
    with pytest.raises(ValueError, match="HYBRID_MOE_CPU_ACTIVATION: cpu_activation is 'fp8', "):
        cpu_activation.chosen({cpu_activation.VARIABLE: "fp8"})


@given(st.sets(st.integers(0, E - 1)), st.integers(0, 60), st.integers(1, 8))
def test_each_expert_is_computed_by_one_rank(hot: set[int], layer: int, ranks: int) -> None:
    experts = GpuExperts(E, tuple(sorted(hot)))
    shares = [RankExperts.of(experts, layer, rank, ranks) for rank in range(ranks)]
    slots = [share.hot.hot for share in shares]
    assert sorted(expert for own in slots for expert in own) == sorted(hot)
    assert max(map(len, slots)) - min(map(len, slots)) <= 1
    cold = [~(share.hot.mask | share.elsewhere) for share in shares]
    assert torch.equal(cold[0], ~experts.mask)
    assert not any(bool(rest.any()) for rest in cold[1:])
    assert not any(bool((share.hot.mask & share.elsewhere).any()) for share in shares)
    assert [share.any_cold for share in shares] == [len(hot) < E] + [False] * (ranks - 1)
    busy = [bool(own) or bool(rest.any()) for own, rest in zip(slots, cold, strict=True)]
    assert [share.any for share in shares] == busy


def test_no_gpu_gets_the_remainder_of_every_layer() -> None:
    counts = Counter(
        {rank: sum(len(experts_of_rank(range(9), layer, rank, 4)) for layer in range(8))
         for rank in range(4)}
    )  # fmt: skip
    assert set(counts.values()) == {18}


@pytest.mark.parametrize(
    ("error", "kind", "cure"),
    [(FULL, GpuMemoryError, "--kt-num-gpu-experts"), (LOST, GpuLostError, "restart the process")],
)
def test_a_fault_on_the_gpu_is_one_error_with_its_cure(
    error: RuntimeError, kind: type[Exception], cure: str
) -> None:
    refused = pytest.raises(kind, match="layer 3: cuda:0 ")
    with refused as raised, named_options(), explained(3, GPU):
        raise error
    assert cure in str(raised.value) and str(error) in str(raised.value)


def test_other_errors_stay_as_they_are() -> None:
    other = RuntimeError("a worker failed")
    with pytest.raises(RuntimeError) as raised, named_options(), explained(3, GPU):
        raise other
    assert raised.value is other


def test_a_full_gpu_fails_a_step_and_a_lost_one_the_server() -> None:
    faults = StepFaults(check=lambda: None)
    faults.alone = True
    faults.keep(GpuMemoryError("no room"))
    assert "--mem-fraction-static" in str(faults._take())
    with pytest.raises(GpuLostError, match="HYBRID_MOE_GPU"):
        faults.keep(GpuLostError("gone"))


def test_a_replayed_graph_meets_its_fault_when_results_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def synchronize() -> None:
        raise LOST

    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=synchronize))
    for backend, kind in (("cute", GpuLostError), ("", torch.AcceleratorError)):
        monkeypatch.setenv(gpu_backend.VARIABLE, backend)
        with pytest.raises(kind):
            StepFaults(check=lambda: None).before_results(None, None, result)
