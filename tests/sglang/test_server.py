"""`python -m sglang.launch_server --kt-*`: an unmodified SGLang server over its OpenAI endpoint.

Minutes of starting servers, so only with HYBRID_MOE_TEST_SERVER=1 (`make test-sglang`).

The server without `--kt-*` computes the same weights in BF16 with SGLang's own code. Its greedy
tokens are the reference. Where it prefers a token by less than `TIE` nats, either choice is right,
and the texts part there; until then the distance to the second best token must agree within `TIE`
as well, token by token.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sglang.model import EXPERTS, LAYERS, TOP_K, write_copy
from tests.sglang.paths import MXFP4_MODEL, SHIMS

if os.environ.get("HYBRID_MOE_TEST_SERVER") != "1":
    pytest.skip("starts SGLang servers: make test-sglang", allow_module_level=True)

sys.path.append(str(SHIMS))
from hybrid_moe_sglang_shims import COUNTERS, FAULT, HOT, Counters

from tests.sglang.server import Answer, Server

TIE = 0.2
"""Nats. BF16 arithmetic moves these distances by up to 0.10 against float32 in the same texts (256
tokens of Transformers, eager experts), and here two BF16 computations are compared."""

TOKENS = 32
PROMPTS = (
    "Emma was surprised to see Mr. Knightley in the garden, and",
    "It is a truth universally acknowledged, that a single man",
    "Elizabeth could not but",
    "The whole party were in raptures with the prospect of a ball at the Crown; and Mrs. Weston,",
    "My dear sister,",
    "He had been gone only a quarter of an hour, when",
    "Fanny",
    "There was no being displeased with such an encourager, for his admiration made him discern a "
    "likeness before it was possible.",
)
CODE_PROMPTS = (
    "def forward(self, x): return [f(x[i], i) for i in range(len(x))] #",
    "for (k, v) in self._d.items(): print(k, '=', v[0] + 1, end=';') #",
    "import os, sys; assert sys.argv[1:] == ['-x', '--yes'], os.environ['PATH'] #",
)
LOAD_REQUESTS, LOAD_CLIENTS, LOAD_TOKENS = 300, 32, 6


@dataclass(frozen=True)
class Placement:
    """Experts on the "GPU" of a test.

    Attributes:
        hot: their ids by layer; the first so many unless they are a `profile`.
        quantized: SGLang loads the MXFP4 checkpoint, in which it has no use for an expert.
        backend: who computes them, as `HYBRID_MOE_GPU` says; None for SGLang.
        ranks: of tensor parallelism.
        dynamic: experts move, as `HYBRID_MOE_DYNAMIC` says; these are the first ones.
    """

    name: str
    hot: dict[int, list[int]]
    profile: bool = False
    quantized: bool = False
    backend: str | None = None
    ranks: int = 1
    dynamic: str | None = None


def first(count: int) -> dict[int, list[int]]:
    return {layer: list(range(count)) for layer in range(LAYERS)}


SOME = {0: [2, 3, 11], 1: [], 2: [0, 15], 3: list(range(1, 16))}
SOME_OR_ALL = {**SOME, 1: list(range(EXPERTS))}

PLACEMENTS = (
    Placement("none", first(0), quantized=True),
    Placement("first five", first(5)),
    Placement("profile", SOME, profile=True),
    Placement("all", first(EXPERTS)),
    Placement("both halves", SOME_OR_ALL, profile=True, quantized=True, backend="torch"),
    Placement("two ranks", SOME_OR_ALL, profile=True, quantized=True, backend="torch", ranks=2),
    Placement("dynamic", first(4), quantized=True, backend="torch", dynamic="1GB"),
    Placement("dynamic, kept", first(4), quantized=True, backend="torch", dynamic="1GB,keep"),
)


class KtServer(Server):
    """A server with `--kt-*`, and what its workers counted."""

    def __init__(self, models: dict[bool, Path], folder: Path, placement: Placement) -> None:
        self.counters = folder / "counters"
        self.fault = folder / "a fault for a test"
        self.ranks = placement.ranks
        environment = {
            FAULT: str(self.fault),
            COUNTERS: str(self.counters),
            HOT: json.dumps({str(layer): ids for layer, ids in placement.hot.items()}),
        }
        options: dict[str, str | int] = {
            "--kt-weight-path": str(MXFP4_MODEL),
            "--kt-method": "MXFP4",
            "--kt-cpuinfer": 2,
            "--kt-threadpool-count": 1,
        }
        if placement.profile:
            profile = folder / "placement.json"
            profile.write_text(environment[HOT])
            environment["HYBRID_MOE_PLACEMENT"] = str(profile)
        else:
            options["--kt-num-gpu-experts"] = len(placement.hot[0])
        if placement.backend is not None:
            environment["HYBRID_MOE_GPU"] = placement.backend
        if placement.dynamic is not None:
            environment["HYBRID_MOE_DYNAMIC"] = placement.dynamic
        if placement.ranks > 1:
            options["--tp-size"] = self.ranks
            cores = sorted(os.sched_getaffinity(0))
            ours = (str(cores[rank % len(cores)]) for rank in range(self.ranks))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(ours)
        super().__init__(models[placement.quantized], options, environment, folder / "log")

    def counted(self) -> dict[str, int]:
        """Of all ranks together; "chosen" of the first one, whose tokens are everybody's."""
        first, *others = (Counters.of_rank(self.counters, r).read() for r in range(self.ranks))
        return {
            name: count + sum(other[name] for other in others if name != "chosen")
            for name, count in first.items()
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether its experts are MXFP4 -> the model."""
    folder = tmp_path_factory.mktemp("model")
    return {
        True: write_copy(folder / "mxfp4", dequantize=False),
        False: write_copy(folder / "bf16", dequantize=True),
    }


@pytest.fixture(scope="module")
def expected(models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What SGLang writes on its own."""
    log = tmp_path_factory.mktemp("alone") / "log"
    with Server(models[False], {}, {}, log) as server:
        answers = server.complete_all(PROMPTS, TOKENS, clients=1)
        assert "hybrid_moe serves" not in server.printed()
    return answers


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda placement: placement.name)
def served(
    request: pytest.FixtureRequest,
    models: dict[bool, Path],
    expected: list[Answer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Placement, KtServer]]:
    """A running server for each placement, after the one without `--kt-*` has ended."""
    folder = tmp_path_factory.mktemp("served")
    with KtServer(models, folder, request.param) as server:
        yield request.param, server


def assert_same(answer: Answer, reference: Answer) -> int:
    """Equal tokens up to a tie of the reference; returns how many were compared."""
    assert len(answer.tokens) == len(reference.tokens) == TOKENS
    for i, (ours, theirs) in enumerate(zip(answer.tokens, reference.tokens, strict=True)):
        margin = reference.margins[i]
        if ours != theirs:
            assert margin < TIE, f"token {i} is {ours!r}, not {theirs!r}, {margin:.3f} nats ahead"
            return i
        assert abs(answer.margins[i] - margin) < TIE, f"token {i}, {ours!r}"
    return TOKENS


def assert_all_same(name: str, answers: list[Answer], references: list[Answer]) -> None:
    """`assert_same` for all; most tokens must have been compared."""
    compared = [assert_same(a, r) for a, r in zip(answers, references, strict=True)]
    moved = max(
        abs(x - y)
        for a, r, n in zip(answers, references, compared, strict=True)
        for x, y in zip(a.margins[:n], r.margins[:n], strict=True)
    )
    total = len(answers) * TOKENS
    print(f"\n{name}: {sum(compared)} of {total} tokens equal, margins within {moved:.3f} nats")
    assert sum(compared) >= total // 2


def assert_counted(placement: Placement, counted: dict[str, int], fed: int) -> None:
    """Every cold pair ran in our workers, every hot one in SGLang's experts or in our slots of one
    rank, none in both.

    `fed`: tokens that the model has at least been given.
    """
    assert counted["wrong"] == 0
    assert counted["worked"] == counted["cold"]
    assert counted["cold"] + counted["hot"] == counted["chosen"]
    assert counted["chosen"] >= fed * LAYERS * TOP_K
    layers_with_cold = sum(len(ids) < EXPERTS for ids in placement.hot.values())
    assert (counted["cold"] > 0) == (counted["calls"] > 0) == (layers_with_cold > 0)
    assert (counted["hot"] > 0) == any(placement.hot.values())
    assert placement.dynamic is not None or not counted["moved"]


def test_greedy_tokens_are_those_without_kt(
    served: tuple[Placement, KtServer], expected: list[Answer]
) -> None:
    placement, server = served
    answers = server.complete_all(PROMPTS, TOKENS, clients=len(PROMPTS))  # all at once
    assert_all_same(placement.name, answers, expected)
    counted = server.counted()
    print(counted)
    assert_counted(placement, counted, fed=len(PROMPTS) * (TOKENS - 1))
    assert server.printed().count("hybrid_moe serves --kt-*") == placement.ranks


def test_load_loses_nothing(served: tuple[Placement, KtServer]) -> None:
    placement, server = served
    before = server.counted()
    prompts = [f"{_prompt(i)} {i}" for i in range(LOAD_REQUESTS)]
    answers = server.complete_all(prompts, LOAD_TOKENS, clients=LOAD_CLIENTS)
    assert [len(a.tokens) for a in answers] == [LOAD_TOKENS] * LOAD_REQUESTS
    assert {a.finish for a in answers} == {"length"}
    after = server.counted()
    grown = {name: after[name] - before[name] for name in after}
    print(f"\n{placement.name}: {LOAD_REQUESTS} requests, {grown}")
    assert_counted(placement, grown, fed=LOAD_REQUESTS * LOAD_TOKENS)
    assert placement.dynamic is None or grown["moved"] > LAYERS


def _prompt(number: int) -> str:
    """Another topic in the second half of the load."""
    prompts = PROMPTS if number < LOAD_REQUESTS // 2 else CODE_PROMPTS
    return prompts[number % len(prompts)]


def test_a_fault_fails_its_requests_and_the_server_survives(
    served: tuple[Placement, KtServer], expected: list[Answer]
) -> None:
    placement, server = served
    if placement.name == "all":
        pytest.skip("nothing runs on the CPU")
    if placement.ranks > 1:
        pytest.skip("the server ends: only one rank knows of the fault")
    server.fault.touch()
    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(server.complete, PROMPTS[i], TOKENS) for i in range(4)]
        errors = [request.exception() for request in running]
    failed = [error for error in errors if error is not None]
    assert failed and all("a fault for a test" in str(error) for error in failed)
    for answer, reference in zip(
        server.complete_all(PROMPTS[:2], TOKENS, 2), expected, strict=False
    ):
        assert_same(answer, reference)


def test_killed_and_restarted(
    models: dict[bool, Path], expected: list[Answer], tmp_path: Path
) -> None:
    """A server that dies under load answers as before when it is started again."""
    placement = PLACEMENTS[2]
    server = KtServer(models, tmp_path, placement)
    with server, ThreadPoolExecutor(LOAD_CLIENTS) as clients:
        running = [clients.submit(server.complete, PROMPTS[i % 8], 400) for i in range(32)]
        while server.counted()["cold"] < 1000:
            assert not all(request.done() for request in running)
        server.kill()
        broken = [request.exception(timeout=60) for request in running]
    assert all(isinstance(error, OSError) for error in broken)  # requests' errors are such
    with server:
        answers = server.complete_all(PROMPTS, TOKENS, clients=4)
    assert_all_same("restarted", answers, expected)
    counted = server.counted()
    assert counted["wrong"] == 0
