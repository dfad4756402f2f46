"""How many requests run at a time: against every number of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from hybrid_moe.planning import Model, Plan, make_plan, read_model
from hybrid_moe.planning.admission import MOST, READING_SPEED, admission_note, requests_with
from hybrid_moe.planning.parts import lay_out
from hybrid_moe.planning.prediction import output_seconds, step_of
from tests.hybrid_moe.command import run
from tests.hybrid_moe.planning.cases import CPU, request
from tests.hybrid_moe.planning.conftest import Fake

MACHINE = ("--ram-bandwidth", 80, "--gmacs", 1000, "--ram", "200GB", "--threads", 16)


def plans_of(model: Model, gpu: str, read: float) -> Callable[[int], Plan]:
    speeds = replace(CPU, read=read)
    return lambda count: lay_out(model, request(gpu, requests=count, cpu=speeds))


def speed(plan: Plan, tokens: int) -> float:
    """Of each of so many requests, from its parts: all layers one after the other, the CPU's
    experts beside the GPU's."""
    gpus = plan.request.gpus
    step = step_of(plan.model, plan.hot, plan.request.cpu, gpus, tokens, plan.cache.per_gpu() / 2)
    seconds = sum(times.alone for times in step.times())
    return 1 / (seconds + output_seconds(plan.model, len(gpus), step.rates))


@pytest.mark.parametrize(("name", "gpu"), [("gpt-oss-20b", "14GB"), ("gpt-oss-120b", "24GB")])
@pytest.mark.parametrize("read", [10e9, 80e9])
def test_as_many_as_leave_each_its_speed(fake: Fake, name: str, gpu: str, read: float) -> None:
    """Every number is tried; one more than the answer leaves less."""
    plan_of = plans_of(read_model(fake(name)), gpu, read)
    speeds = {count: speed(plan_of(count), count) for count in range(1, MOST + 1)}
    assert sorted(speeds.values(), reverse=True) == list(speeds.values())
    for asked in (None, speeds[1], 0.8 * speeds[1], 0.1 * speeds[1]):
        least = min(READING_SPEED, speeds[1] / 2) if asked is None else asked * (1 - 1e-12)
        given = None if asked is None else asked * (1 - 1e-12)
        expected = max(count for count, found in speeds.items() if found >= least)
        assert requests_with(plan_of, given) == expected
    with pytest.raises(ValueError, match=r"one request alone gets \d"):
        requests_with(plan_of, 1.001 * speeds[1])


def test_together_they_get_more_and_each_gets_less(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    note = admission_note(plan)
    assert note.startswith("at most 4 requests run at a time: each gets ")
    numbers = re.findall(r"(?:gets|all|alone) ([\d.]+)", note)
    each, together, alone = (float(number) for number in numbers)
    assert each < alone < together == pytest.approx(4 * each, rel=0.02)
    one = admission_note(make_plan(gpt_oss, request("14GB", num_gpu_experts=8, requests=1)))
    assert re.fullmatch(r"one request runs at a time and gets [\d.]+ tok/s; others wait", one)


def test_the_server_is_told(fake: Fake) -> None:
    """What the user says stays; `plan` and `serve` say the same."""
    words = (fake("gpt-oss-120b"), "--gpu", "24GB", *MACHINE)

    def flags(*more: object) -> tuple[str, str, str]:
        result = run("serve", "--dry-run", "--model", *words, *more)
        assert result.exit_code == 0, result.output
        lines = dict(re.findall(r"(--\S+) (\S+)", result.stdout))
        graphs = lines.get("--cuda-graph-max-bs-decode", "")
        return lines["--max-running-requests"], graphs, result.stderr

    running, graphs, note = flags()
    assert running == graphs and f"at most {running} requests run at a time" in note
    each = float(note.split("each gets ")[1].split()[0])
    assert each >= READING_SPEED - 0.05
    shown = run("plan", *words)
    assert f"at most {running} requests" in " ".join(shown.stdout.split())
    assert flags("--requests", 3)[:2] == ("3", "3")
    assert int(flags("--request-speed", 10)[0]) < int(running) < int(flags("--request-speed", 2)[0])
    assert flags("--", "--cuda-graph-bs-decode", "1", "2")[1] == ""
    for more, message in (
        (("--request-speed", 5, "--requests", 2), "leave out --requests"),
        (("--request-speed", 500), "one request alone gets"),
    ):
        result = run("serve", "--dry-run", "--model", *words, *more)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
