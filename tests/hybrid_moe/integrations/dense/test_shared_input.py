"""q, k and v as one job: always the bits of layers alone, and one job where it can be."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.job import Job
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense import shared_input
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear, share_inputs
from tests.hybrid_moe.integrations.dense.linear_cases import Case, K, inputs

ROWS = {"q": 192, "k": 64, "v": 70, "o": 96}


class Attention(torch.nn.Module):
    """Four linear layers of equal inputs, of which three take the same one."""

    def __init__(self, fmt: WeightFormat = DENSE_FORMATS["BF16"], **options: Any) -> None:
        super().__init__()
        self.between: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, x: x
        for seed, (name, rows) in enumerate(ROWS.items()):
            case = Case.random(fmt, rows=rows, bias=name == "k", seed=seed, where=name, **options)
            self.add_module(name, case.layer)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = {name: self.get_submodule(name)(self.between(name, x)) for name in "qkv"}
        out["o"] = self.o(self.between("o", out["q"][..., :K].contiguous()))
        return out


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrices of each job."""
    started: list[int] = []
    start = DenseLayer.start

    def counted(self: DenseLayer, *args: Any) -> Any:
        started.append(len(self.rows))
        return start(self, *args)

    monkeypatch.setattr(DenseLayer, "start", counted)
    return started


def learned(
    fmt: WeightFormat = DENSE_FORMATS["BF16"], **options: Any
) -> tuple[Attention, Attention]:
    """A parent that has learned, and one that computes apart."""
    apart = Attention(fmt, **options)
    model = copy.deepcopy(apart)
    share_inputs(model)
    for seed in (100, 101):
        model(inputs(1, K, seed=seed))
    return model, apart


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        torch.equal(got[name], want[name]) and got[name].shape == want[name].shape for name in got
    )


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(K,), (1, K), (1, 1, K), (3, K), (2, 5, K)])
def test_three_layers_are_one_job_with_their_own_bits(
    fmt: WeightFormat, shape: tuple[int, ...], jobs: list[int]
) -> None:
    model, apart = learned(fmt)
    for seed in range(3):
        x = inputs(*shape, seed=seed)
        jobs.clear()
        got = model(x)
        assert jobs == [3, 1]
        assert equal(got, apart(x))


def test_bits_beside_layers_that_never_shared(jobs: list[int]) -> None:
    """Negative zeros and NaN: bytes are compared, and given back."""
    model, apart = learned()
    x = inputs(1, K)
    x[0, 3], x[0, 5] = -0.0, torch.nan
    jobs.clear()
    got, want = model(x), apart(x)
    assert jobs[:2] == [3, 1]
    for name in ROWS:
        bits = [y[name].view(torch.int16).numpy() for y in (got, want)]
        assert np.array_equal(*bits)


def test_many_tokens_are_computed_apart(jobs: list[int]) -> None:
    model, apart = learned()
    tokens = shared_input.MOST_ELEMENTS // K
    for count, expected in ((tokens, [3, 1]), (tokens + 1, [1] * 4), (0, [1] * 4)):
        x = inputs(count, K)
        jobs.clear()
        got = model(x)
        assert jobs == expected and equal(got, apart(x))


CHANGED: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "k has another input": lambda name, x: x * 2 if name == "k" else x,
    "in place before k": lambda name, x: x.mul_(2) if name == "k" else x,
    "in place before v": lambda name, x: x.neg_() if name == "v" else x,
    "one bit": lambda name, x: x.index_fill(-1, torch.tensor([K - 1]), 3.0) if name == "k" else x,
    "fewer tokens for k": lambda name, x: x[:1] if name == "k" else x,
    "another dtype for v": lambda name, x: x.float() if name == "v" else x,
    "not contiguous": lambda name, x: x.t().contiguous().t() if name == "v" else x,
}


@pytest.mark.parametrize("kind", CHANGED)
def test_another_input_is_computed_alone(kind: str) -> None:
    model, apart = learned()
    model.between = apart.between = CHANGED[kind]
    for seed in range(5):
        assert equal(model(inputs(2, K, seed=seed)), apart(inputs(2, K, seed=seed)))


def test_an_equal_input_elsewhere_is_the_same(jobs: list[int]) -> None:
    """Autocast makes a new tensor for each of them; a view has another shape."""
    model, apart = learned()
    model.between = lambda name, x: x.clone() if name == "k" else x.view(-1, K)
    jobs.clear()
    got, want = model(inputs(1, 2, K)), apart(inputs(1, 2, K))
    assert jobs[:2] == [3, 1]
    for name in ROWS:
        assert torch.equal(got[name].view_as(want[name]), want[name])
    assert got["k"].shape == want["k"].shape


@pytest.mark.parametrize("hook", ["pre", "forward"])
def test_hooks_on_one_of_them(hook: str) -> None:
    model, apart = learned()
    for m in (model, apart):
        if hook == "pre":
            m.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            m.k.register_forward_hook(lambda module, args, output: output.mul_(2))
    for seed in range(5):
        x = inputs(1, K, seed=seed)
        assert equal(model(x), apart(x))


def test_writing_into_an_output_leaves_the_others() -> None:
    model, apart = learned()
    x = inputs(2, K)
    want = apart(x)
    q = model.q(x)
    q.zero_()
    k = model.k(x)
    k.fill_(1)
    assert torch.equal(model.v(x), want["v"])
    assert q._base is None or q._base._base is None
    again = model(x)
    assert equal(again, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode: Callable[[], Any], jobs: list[int]) -> None:
    model, apart = learned()
    x = inputs(1, K)
    jobs.clear()
    with mode():
        got = model(x)
    assert jobs == [3, 1] and equal(got, apart(x))
    with mode():
        model.q(x)
    assert not model.k(x).is_inference()  # computed alone if need be


def test_a_gradient_is_refused_for_each() -> None:
    model, apart = learned()
    x = inputs(1, K)
    want = apart(x)
    for name in "qkv":
        y = model.get_submodule(name)(x.detach().requires_grad_())
        assert torch.equal(y, want[name])
        with pytest.raises(RuntimeError, match=f"{name}: .*no gradient"):
            y.sum().backward()


def test_autocast(jobs: list[int]) -> None:
    model, apart = learned()
    x = inputs(1, K, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(model(x), apart(x))


def test_threads_have_inputs_of_their_own() -> None:
    model, apart = learned(threads=2)
    batches = [inputs(1, K, seed=s) for s in range(4)]
    want = [apart(x) for x in batches]
    meet = threading.Barrier(4)

    def run(thread: int) -> bool:
        meet.wait()
        x = batches[thread]
        return all(equal(model(x), want[thread]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_an_exception_in_between() -> None:
    model, apart = learned()

    def fail(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "v":
            raise KeyError("v")
        return x

    for seed in range(4):
        x = inputs(1, K, seed=seed)
        model.between = fail
        with pytest.raises(KeyError):
            model(x)
        model.between = lambda name, x: x
        assert equal(model(x * 2), apart(x * 2))
        assert equal(model(x), apart(x))


def test_an_interrupted_job_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, apart = learned()
    x = inputs(1, K)
    want = apart(x)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "wait", _interrupted)
        model.q(x)
    assert torch.equal(model.k(x), want["k"])
    assert equal(model(x), want)


def _interrupted(job: Job[Any]) -> Any:
    raise KeyboardInterrupt


def test_a_part_is_taken_once(jobs: list[int]) -> None:
    """Outputs belong to who takes them: a second call computes another."""
    model, apart = learned()
    x = inputs(1, K)
    want = apart.k(x)
    model.q(x)
    first = model.k(x)
    jobs.clear()
    first.zero_()
    assert torch.equal(model.k(x), want) and jobs == [1]


def test_a_set_that_is_not_taken_twice_is_given_up(jobs: list[int]) -> None:
    model, apart = learned()
    x = inputs(1, K)
    model(x)
    jobs.clear()
    for seed in range(6):
        y = inputs(1, K, seed=seed)
        assert torch.equal(model.q(y), apart.q(y)), seed
    assert sorted(jobs) == [1] * (6 + 6 - 2) + [3, 3]
    jobs.clear()
    for seed in range(20, 30):  # the same three again: not learned anew
        assert equal(model(inputs(1, K, seed=seed)), apart(inputs(1, K, seed=seed)))
    assert set(jobs) == {1}


def test_another_set_may_be_learned_after_one_is_given_up(jobs: list[int]) -> None:
    """Layers that share their keys with another layer call q alone from then on, say."""
    model, apart = learned()
    pair = ("k", "v")
    for seed in range(6):
        x = inputs(1, K, seed=seed)
        model.q(x)
        y = x + 1
        jobs.clear()
        for name in pair:
            want = apart.get_submodule(name)(y)
            assert torch.equal(model.get_submodule(name)(y), want)
    assert jobs == [1, 2, 1]  # `apart`, shared, `apart`


def test_layers_of_different_inputs_are_left_alone(jobs: list[int]) -> None:
    parent = torch.nn.ModuleList([Case.random(seed=s).layer for s in range(3)])
    share_inputs(parent)
    for seed in range(60):
        for index, layer in enumerate(parent):
            layer(inputs(1, K, seed=3 * seed + index))
    assert set(jobs) == {1}
    shared = parent[0]._shared
    assert shared is not None and not shared._looks


def test_who_may_share() -> None:
    """Equal inputs, format, pool and parent."""
    cases = {
        "a": Case.random(seed=1), "b": Case.random(seed=2), "wider": Case.random(inputs=128),
        "quantised": Case.random(MXFP4), "two threads": Case.random(threads=2),
    }  # fmt: skip
    parent = torch.nn.ModuleDict({name: case.layer for name, case in cases.items()})
    parent["below"] = torch.nn.ModuleList([Case.random().layer])
    share_inputs(parent)
    shared = {name: m._shared for name, m in parent.items() if isinstance(m, HybridLinear)}
    assert shared["a"] is not None and shared["a"] is shared["b"]
    assert all(shared[name] is None for name in ("wider", "quantised", "two threads"))
    assert parent["below"][0]._shared is None


def test_another_weight_is_used_at_once(jobs: list[int]) -> None:
    model, apart = learned()
    x = inputs(1, K)
    model.q(x)  # the outputs of the old k and v are at hand
    other = Case.random(rows=ROWS["v"], seed=9)
    for m in (model, apart):
        m.v.load_state_dict({"weight": other.weight})
    assert torch.equal(model.v(x), apart.v(x))
    for seed in range(20, 23):
        y = inputs(1, K, seed=seed)
        jobs.clear()
        got = model(y)
        assert jobs == [3, 1] and equal(got, apart(y))


def test_a_copy_learns_for_itself(jobs: list[int]) -> None:
    model, apart = learned()
    twin = copy.deepcopy(model)
    for seed in range(4):
        x = inputs(1, K, seed=seed)
        model.q(x)
        got = twin(x)
        assert equal(got, apart(x))
        assert torch.equal(model.k(x), apart.k(x)) and torch.equal(model.v(x), apart.v(x))
    assert jobs.count(3) >= 4


def test_memory_is_let_go(jobs: list[int]) -> None:
    """What one call leaves is dropped by the next."""
    model, _ = learned()
    shared = model.q._shared
    assert shared is not None
    model.q(inputs(1, K))
    assert len(shared._staged.outputs) == 2
    model.k(inputs(1, K))
    model.v(inputs(1, K))
    assert not shared._staged.outputs
