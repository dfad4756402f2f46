"""torch has one thread in decode steps, all of its own in prompts, and gets its own back."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StoppingCriteria, StoppingCriteriaList

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.cpu_kernels.tuning import AWAKE_SPIN_NS, SPIN_NS
from hybrid_moe.integrations.transformers.step import threads
from hybrid_moe.integrations.transformers.step.prepare import prepare_steps
from hybrid_moe.integrations.transformers.step.threads import (
    FEW_TOKENS,
    scope_threads,
    torch_threads,
)

OWN = 3
"""Threads of torch that the tests begin with: neither one, nor what it has by itself."""


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(OWN)
    yield
    torch.set_num_threads(before)


class Seen(StoppingCriteria):  # type: ignore[misc]
    """Threads between the passes of `generate`."""

    def __init__(self, stop_with: BaseException | None = None) -> None:
        self.threads: list[int] = []
        self.stop_with = stop_with

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        if self.stop_with is not None:
            raise self.stop_with
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def plain() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).bfloat16().eval()


@pytest.fixture
def model(plain: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    made = copy.deepcopy(plain)
    prepare_steps(made)
    return made


@pytest.fixture
def inside(model: Qwen3MoeForCausalLM) -> list[tuple[int, int]]:
    """(tokens, threads) of each pass."""
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append((args[0].shape[1], torch.get_num_threads()))

    model.model.layers[0].register_forward_pre_hook(note)
    return seen


def _generate(model: Any, prompt: int = 4, new: int = 3, **options: Any) -> torch.Tensor:
    ids = torch.arange(prompt)[None] % 64
    made: torch.Tensor = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    return made


def test_one_in_decode_steps_and_between_them(
    model: Qwen3MoeForCausalLM, plain: Qwen3MoeForCausalLM, inside: list[tuple[int, int]]
) -> None:
    seen = Seen()
    made = _generate(model, FEW_TOKENS, stopping_criteria=StoppingCriteriaList([seen]))
    assert inside == [(FEW_TOKENS, OWN), (1, 1), (1, 1)]
    assert set(seen.threads) == {1} and torch.get_num_threads() == OWN
    assert torch.equal(made, _generate(plain, FEW_TOKENS))


def test_a_forward_pass_alone(model: Qwen3MoeForCausalLM, inside: list[tuple[int, int]]) -> None:
    with torch.no_grad():
        for tokens in (FEW_TOKENS - 1, FEW_TOKENS):
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            model(ids)
            model(input_ids=ids)
            model(inputs_embeds=model.get_input_embeddings()(ids))
    assert [n for _, n in inside] == [1] * 3 + [OWN] * 3 and torch.get_num_threads() == OWN


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_its_own_come_back_after_an_error(model: Qwen3MoeForCausalLM, error: BaseException) -> None:
    criteria = StoppingCriteriaList([Seen(error)])
    with pytest.raises(type(error)):
        _generate(model, stopping_criteria=criteria)
    assert torch.get_num_threads() == OWN
    handle = model.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        model(torch.zeros(1, 1, dtype=torch.int64))
    handle.remove()
    assert torch.get_num_threads() == OWN


def test_scopes_nest() -> None:
    with torch_threads(few=True):
        assert torch.get_num_threads() == 1
        with torch_threads(few=False):
            assert torch.get_num_threads() == OWN
            with torch_threads(few=True):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == OWN
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == OWN


def test_other_threads_keep_theirs(model: Qwen3MoeForCausalLM) -> None:
    """Those that are there, those that start meanwhile, and those that generate too."""
    here, go = threading.Barrier(2), threading.Event()
    seen: dict[str, int] = {}

    def other() -> None:
        torch.set_num_threads(OWN + 1)
        torch.get_num_threads()  # its first call takes over what others have set
        here.wait()
        go.wait()
        seen["was there"] = torch.get_num_threads()

    def late() -> None:
        seen["late"] = torch.get_num_threads()

    def generating() -> None:
        torch.set_num_threads(OWN + 2)
        _generate(model, new=2)
        seen["generating"] = torch.get_num_threads()

    was_there = threading.Thread(target=other)
    was_there.start()
    here.wait()
    torch.set_num_threads(OWN)
    with torch_threads(few=True):
        for target in (late, generating):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        go.set()
        was_there.join()
        assert torch.get_num_threads() == 1
    assert seen == {"was there": OWN + 1, "late": OWN, "generating": OWN + 2}


def test_mkl_s_threads_too() -> None:
    """It has a number of its own for the thread once torch's has been set."""
    _, set_mkl = threads._setters()

    def mkl() -> int:
        now = set_mkl(0)
        set_mkl(now)
        return now

    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    assert mkl() == OWN
    with torch_threads(few=True):
        assert mkl() == 1
    assert mkl() == OWN


def test_models_look_as_before(model: Qwen3MoeForCausalLM, plain: Qwen3MoeForCausalLM) -> None:
    """Transformers asks for signatures; a copy runs its own weights."""
    assert type(model) is type(plain)
    for name in ("forward", "generate"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(plain, name))
    prepare_steps(model)  # once more changes nothing
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other and other.generate.__self__ is other
    with torch.no_grad():
        other.lm_head.weight.zero_()
        assert other(torch.zeros(1, 1, dtype=torch.int64)).logits.count_nonzero() == 0


def test_workers_stay_awake_in_decode_steps(model: Qwen3MoeForCausalLM) -> None:
    pool = PoolConfig(2)
    scope_threads(model, pool)
    spin, seen = group_for(pool).control.spin_ns, []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(spin.value))
    _generate(model, FEW_TOKENS, new=2)
    assert seen == [SPIN_NS, AWAKE_SPIN_NS] and spin.value == SPIN_NS


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.table(input_ids)
        return made


def test_it_is_captured_as_the_model_is() -> None:
    model, ids = Embedded(), torch.zeros(1, 2, dtype=torch.int64)
    scope_threads(model)
    assert "generate" not in vars(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids), model(ids))
    assert torch.get_num_threads() == OWN


def test_without_openmp(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """torch's own setting then; said once."""
    threads._setters.cache_clear()
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda path: object())
    try:
        with torch_threads(few=True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == OWN
        assert threads._setters()[0] is torch.set_num_threads
        assert "does not take its number of threads" in caplog.text
    finally:
        threads._setters.cache_clear()
