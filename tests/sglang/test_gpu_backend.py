"""Which rank has which experts, who computes them, and faults on the GPU; no SGLang."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.integrations.sglang import gpu_backend
from hybrid_moe.integrations.sglang.gpu_experts import GpuExperts, RankExperts
from hybrid_moe.integrations.sglang.gpu_faults import (
    GpuLostError,
    GpuMemoryError,
    explained,
    explaining,
)
from hybrid_moe.integrations.sglang.step_faults import StepFaults
from hybrid_moe.placement.ranks import experts_of_rank

E = 12
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGeneral advice")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nAdvice")


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("cute", "cute")])
def test_back_ends(value: str | None, expected: str | None) -> None:
    assert gpu_backend.chosen({} if value is None else {gpu_backend.VARIABLE: value}) == expected


@pytest.mark.parametrize("value", ["Cute", "1", " torch"])
def test_an_unknown_back_end_is_refused_with_the_choices(value: str) -> None:
    with pytest.raises(ValueError, match=f"HYBRID_MOE_GPU={value}: choose cute .*, torch .*leave"):
        gpu_backend.chosen({gpu_backend.VARIABLE: value})


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
    [(FULL, GpuMemoryError, "--kt-num-gpu-experts"), (LOST, GpuLostError, "restart the server")],
)
def test_a_fault_on_the_gpu_is_one_error_with_its_cure(
    error: RuntimeError, kind: type[Exception], cure: str
) -> None:
    told = explained(error, "cute", "layer 3")
    assert type(told) is kind and told.__cause__ is error
    assert str(told).startswith("layer 3: ") and cure in str(told)
    assert "dvice" not in str(told)  # the driver's
    with pytest.raises(kind), explaining("cute", "layer 3"):
        raise error


def test_other_errors_stay_as_they_are() -> None:
    other = RuntimeError("a worker failed")
    assert explained(other, "cute", "layer 3") is other
    assert explained(FULL, None, "layer 3") is FULL  # SGLang's own
    with pytest.raises(RuntimeError, match="a worker failed"), explaining("cute", "layer 3"):
        raise other


def test_a_lost_gpu_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its step: found by the experts, or when the results of a replayed graph arrive."""
    faults = StepFaults(check=lambda: None)
    faults.alone = True
    with pytest.raises(GpuLostError):
        faults.keep(explained(LOST, "cute", "layer 3"))

    def synchronize() -> None:
        raise LOST

    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=synchronize))
    for backend, kind in (("cute", GpuLostError), ("", torch.AcceleratorError)):
        monkeypatch.setenv(gpu_backend.VARIABLE, backend)
        with pytest.raises(kind):
            faults.before_results(None, None, result)
