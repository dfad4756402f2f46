"""The SGLang command that a plan becomes, and the `plan` and `serve` commands."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.cli.plan import digits
from hybrid_moe.integrations.sglang.gpu_experts import PROFILE
from hybrid_moe.placement.profile import read_profile, write_profile
from hybrid_moe.planning import DoesNotFitError, Model, make_plan, read_model
from hybrid_moe.planning.plan import GPU
from hybrid_moe.planning.serving import ServerCommand, server_command
from hybrid_moe.schedule import streamed_prefill
from tests.hybrid_moe.planning.cases import GIB, request
from tests.hybrid_moe.planning.conftest import Fake

MACHINE = ("--ram-bandwidth", "80", "--gmacs", "1000", "--threads", "16", "--pools", "1")
EVERYWHERE = {
    "--kt-method": "MXFP4", "--kt-cpuinfer": "16", "--kt-threadpool-count": "1",
    "--context-length": "8192", "--max-total-tokens": "8192", "--max-running-requests": "4",
    "--cuda-graph-max-bs-decode": "4",
    "--chunked-prefill-size": "2048", "--disable-shared-experts-fusion": "",
}  # fmt: skip


def run(*arguments: object, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def flags(command: ServerCommand) -> dict[str, str]:
    """Flag -> its value, "" for a switch."""
    assert command.arguments[1:3] == ("-m", "sglang.launch_server")
    found: dict[str, str] = {}
    for word in command.arguments[3:]:
        if word.startswith("--"):
            assert word not in found, f"{word} twice"
            found[word] = ""
        else:
            found[list(found)[-1]] = word
    return found


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("16GB", {"--moe-runner-backend": "marlin", "--swa-full-tokens-ratio": "0.844"}),
        ("2x16GB", {"--tp-size": "2", "--moe-runner-backend": "marlin",
                    "--swa-full-tokens-ratio": "0.844"}),
    ],
)  # fmt: skip
def test_flags_on_gpus(gpt_oss: Model, gpus: str, expected: dict[str, str]) -> None:
    plan = make_plan(gpt_oss, request(gpus))
    found = flags(server_command(plan))
    assert found.pop("--model-path") == found.pop("--kt-weight-path") == str(gpt_oss.path)
    assert found.pop("--kt-num-gpu-experts") == str(plan.hot.most) != "0"
    fraction = float(found.pop("--mem-fraction-static"))
    assert found == EVERYWHERE | expected
    static = sum(p.nbytes for p in plan.parts if p.place == GPU and not p.assumed)
    assert static <= fraction * plan.request.room + GIB / 32
    ratio = float(found["--swa-full-tokens-ratio"])
    assert plan.cache.window_tokens is not None
    assert ratio * plan.cache.tokens >= plan.cache.window_tokens


def test_original_and_converted(fake: Fake) -> None:
    model = read_model(fake("Qwen3-30B-A3B-MXFP4"), fake("Qwen3-30B-A3B"))
    found = flags(server_command(make_plan(model, request("24GB"))))
    assert found["--model-path"] == str(fake("Qwen3-30B-A3B"))
    assert found["--kt-weight-path"] == str(fake("Qwen3-30B-A3B-MXFP4"))
    assert (found["--kt-method"], found["--moe-runner-backend"]) == ("MXFP4", "triton")


def test_without_a_gpu_there_is_no_command(gpt_oss: Model) -> None:
    with pytest.raises(ValueError, match="Transformers' server runs"):
        server_command(make_plan(gpt_oss, request()))


def test_a_profile_goes_through_the_environment(gpt_oss: Model, tmp_path: Path) -> None:
    file = tmp_path / "hot experts.json"
    write_profile(file, {layer.layer: [1, 2] for layer in gpt_oss.layers})
    plan = make_plan(gpt_oss, request("24GB", profile=read_profile(file)))
    command = server_command(plan)
    assert command.environment == {PROFILE: str(file), "SGLANG_AUTO_NUMA_BIND": "0"}
    assert command.text.startswith(
        f"{PROFILE}='{file}' SGLANG_AUTO_NUMA_BIND=0 python -m sglang.launch_server \\\n    --"
    )
    assert flags(command)["--kt-num-gpu-experts"] == "2"


def test_what_does_not_fit_is_not_served(gpt_oss: Model) -> None:
    with pytest.raises(DoesNotFitError, match="GPU memory"):
        server_command(make_plan(gpt_oss, request("2GB")))


@pytest.mark.parametrize("flag", ["--context-length=5", "--tp", "--kt-method", "--model-path"])
def test_flags_that_the_plan_decides(gpt_oss: Model, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} is decided by the plan"):
        server_command(make_plan(gpt_oss, request("24GB")), extra=[flag, "2"])


def test_sglang_knows_every_flag(fake: Fake, gpt_oss: Model) -> None:
    server_args = pytest.importorskip("sglang.srt.server_args")
    qwen = read_model(fake("Qwen3-30B-A3B-MXFP4"))
    for plan in (make_plan(gpt_oss, request("2x24GB")), make_plan(qwen, request())):
        parser = argparse.ArgumentParser()
        server_args.ServerArgs.add_cli_args(parser)
        parser.parse_args(server_command(plan).arguments[3:])


# The commands -----------------------------------------------------------------------------------


def test_plan_prints_and_writes(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run("plan", fake("gpt-oss-20b"), "--gpu", "16GB", "--ram", "64GB", "--context", 4096,
                 "--gpu-experts", 8, *MACHINE, "--json", file, env={"COLUMNS": "120"})  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    speed = document["decode"]["tokens_per_second"]
    for fact in (
        "gpt_oss", "32 in each of 24 layers, 4 per token", "80.0 GB/s, 1000 GMAC/s (as given)",
        f"{document['gpu_experts']['0']} per layer", "all, of 16.00 GiB", "all, of 64.00 GiB",
        f"Decode: about {float(format(speed, '.1g')):.0f} tok/s, not measured",
        "limit: RAM bandwidth", "would help: more experts on the GPU",
    ):  # fmt: skip
        assert fact in result.stdout, fact


def test_plan_shows_what_does_not_fit_and_fails(fake: Fake) -> None:
    result = run("plan", fake("gpt-oss-20b"), "--ram", "4GB", *MACHINE)
    assert result.exit_code == 2
    assert "routed experts" in result.stdout
    assert "hybrid-moe: memory is too small by" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "big"], 'size "big"'),
        (["--ram", "x"], 'size "x"'),
        (["--gpu-experts", "3"], "need a GPU"),
        (["--method", "INT3"], "unknown method"),
        (["--profile", "/nowhere"], "/nowhere"),
        (["--ceilings", "/nowhere", *MACHINE], "not both"),
    ],
)
def test_mistakes_are_one_paragraph(fake: Fake, arguments: list[str], message: str) -> None:
    machine = [] if MACHINE[0] in arguments else MACHINE
    result = run("plan", fake("gpt-oss-20b"), *arguments, *machine)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_half_a_machine(fake: Fake) -> None:
    result = run("plan", fake("gpt-oss-20b"), "--ram-bandwidth", 80)
    assert result.exit_code == 2 and "give both" in result.stderr


def test_serve_prints_the_command(fake: Fake) -> None:
    result = run("serve", "--model", fake("gpt-oss-20b"), "--gpu", "16GB", *MACHINE, "--dry-run",
                 "--", "--port", "4000")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "SGLANG_AUTO_NUMA_BIND=0 python -m sglang.launch_server \\\n    --model-path "
    )
    assert result.stdout.endswith("    --port 4000\n")
    assert "computed, not measured" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", "--port", "1"), "--port: what follows -- is for SGLang, which needs a --gpu"),
        (("--base", "x"), "--base is for SGLang"),
        (("--ram", "4GB"), "memory is too small by"),
        (("--gpu-experts", "2"), "experts on the GPU need a GPU"),
        (("--gpu-experts", "101%"), "gpu_experts is '101%'"),
        (("--gpu-experts", "25%", "--gpu", "24GB", *MACHINE), "it is a number of experts of each"),
        (("--gpu-backend", "cute"), "--gpu-backend is for experts on a GPU"),
        (("--gpu", "16GB", "--gpu-backend", "cuda"), "--gpu-backend cuda: choose cute ("),
        (("--gpu", "16GB", "--stream-prefill", "1GiB"), "add --gpu and --gpu-backend cute"),
        (("--stream-prefill", "1GiB"), "add --gpu and --gpu-backend cute"),
        (("--gpu", "16GB", "--quality", "fine"), "--quality fine: must be exact or balanced"),
        (("--gpu", "16GB", "--draft", "prompt"), "SGLang has flags of its own, which go after --"),
        (("--quality", "balanced"), "--quality is for decode beside a GPU"),
        (("--gpu", "16GB", "--cpu-activation", "int4"), "cpu_activation is 'int4', must be None"),
    ],
)
def test_serve_refuses(fake: Fake, words: tuple[str, ...], message: str) -> None:
    result = run("serve", "--dry-run", "--model", fake("gpt-oss-20b"), *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr


def test_serve_with_experts_of_our_own(fake: Fake) -> None:
    result = run("serve", "--model", fake("Qwen3-30B-A3B-MXFP4"), "--gpu", "16GB", "--dry-run",
                 "--gpu-backend", "cute", *MACHINE)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("HYBRID_MOE_GPU=cute SGLANG_AUTO_NUMA_BIND=0 python -m ")
    assert "--moe-runner-backend triton" in result.stdout  # what SGLang finds there is not MXFP4
    assert "--kt-num-gpu-experts 0" not in result.stdout


def test_serve_with_inputs_of_8_bits(fake: Fake) -> None:
    """A variable of the server; experts that take no such inputs are refused before it starts."""
    words = ("--gpu", "16GB", "--dry-run", "--cpu-activation", "int8", *MACHINE)
    result = run("serve", "--model", fake("gpt-oss-20b"), *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("HYBRID_MOE_CPU_ACTIVATION=int8 SGLANG_AUTO_NUMA_BIND=0 ")
    refused = run("serve", "--model", fake("Qwen3-30B-A3B"), "--ram", "96GB", *words)
    assert refused.exit_code == 2 and "those of BF16 are not" in refused.stderr


def test_serve_that_streams_and_defers(fake: Fake) -> None:
    """Both go through the environment, and the plan has room for the experts on their way."""
    words = ("--model", fake("Qwen3-30B-A3B-MXFP4"), "--gpu", "16GB", "--gpu-backend", "cute",
             "--dry-run", *MACHINE)  # fmt: skip
    result = run("serve", *words, "--stream-prefill", "3GiB", "--quality", "balanced")
    assert result.exit_code == 0, result.output
    environment = dict(word.split("=", 1) for word in result.stdout.split(" python")[0].split())
    assert environment == {
        "HYBRID_MOE_GPU": "cute",
        "HYBRID_MOE_STREAM_PREFILL": "3145728KiB",
        "HYBRID_MOE_QUALITY": "balanced",
        "SGLANG_AUTO_NUMA_BIND": "0",
    }
    assert streamed_prefill.stream_memory(environment) == 3 * GIB
    deferred = "--kt-max-deferred-experts-per-token"
    # 16 cores beside a GPU of 448 GB/s: attention hides at least one of eight experts
    assert re.search(rf"{deferred} [12]\s", result.stdout)
    given = run("serve", *words, "--quality", "balanced", "--", deferred, "1")
    assert given.stdout.count(deferred) == 1 and f"{deferred} 1" in given.stdout
    assert deferred not in run("serve", *words).stdout

    def hot(text: str) -> int:
        return int(re.search(r"--kt-num-gpu-experts (\d+)", text)[1])  # type: ignore[index]

    assert hot(result.stdout) < hot(run("serve", *words).stdout)


def test_experts_that_move(fake: Fake) -> None:
    """A variable of the server, which needs experts that are ours."""
    model = (
        "serve",
        "--model",
        fake("Qwen3-30B-A3B-MXFP4"),
        "--gpu",
        "16GB",
        "--dry-run",
        *MACHINE,
    )
    result = run(*model, "--gpu-backend", "cute", "--dynamic", "2GB,keep")
    assert result.exit_code == 0, result.output
    assert "HYBRID_MOE_DYNAMIC=2GB,keep " in result.stdout.splitlines()[0]
    for words, message in (
        (("--dynamic", "1"), "--dynamic 1: experts on the GPU that are SGLang's cannot move"),
        (("--gpu-backend", "cute", "--dynamic", "fast"), "dynamic is 'fast', must be True or"),
    ):
        refused = run(*model, *words)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())
    for off in ("0", ""):
        assert "DYNAMIC" not in run(*model, "--dynamic", off).stdout


def test_serve_without_a_gpu_measures_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_moe.planning.machine.measure_cpu", None)
    result = run("serve", "--model", fake("gpt-oss-20b"), "--ram", "64GB", "--port", 1, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Transformers' server in this process, at http://127.0.0.1:1/v1\n"


def test_serve_without_sglang(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("serve", "--model", fake("gpt-oss-20b"), "--gpu", "16GB", *MACHINE)
    assert result.exit_code == 2
    assert 'sglang is not installed: pip install "hybrid-moe[sglang]"' in result.stderr


def test_serve_becomes_the_server(gpt_oss: Model, tmp_path: Path) -> None:
    """With a stand-in for SGLang that prints what it was given and fails."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(
        f"import os, sys\nprint('SERVER', os.getpid(), os.environ['{PROFILE}'], *sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    profile = tmp_path / "hot.json"
    write_profile(profile, {layer.layer: [0] for layer in gpt_oss.layers})
    arguments = ("serve", "--model", gpt_oss.path, "--gpu", "24GB", "--profile", profile, *MACHINE,
                 "--", "--port", "1")  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "from hybrid_moe.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    out, error = process.communicate()
    assert process.returncode == 7, error
    server = re.search(r"^SERVER (\d+) (\S+) (.*)$", out, re.MULTILINE)
    assert server is not None
    assert int(server[1]) == process.pid  # the same process: signals reach the server
    assert server[2] == str(profile)
    assert "--kt-num-gpu-experts 1" in server[3] and server[3].endswith("--port 1")


@pytest.mark.parametrize(
    ("value", "one", "two"),
    [(13802.9, "10000", "14000"), (4700.0, "5000", "4700"), (9.6, "10", "9.6"),
     (2.44, "2", "2.4"), (0.0321, "0.03", "0.032")],
)  # fmt: skip
def test_predictions_have_one_digit_or_two(value: float, one: str, two: str) -> None:
    assert (digits(value, 1), digits(value, 2)) == (one, two)


def test_only_plans_without_a_gpu_are_measured(fake: Fake) -> None:
    result = run("plan", fake("gpt-oss-20b"), "--ram", "64GB", *MACHINE)
    assert "tok/s" in result.stdout and "not measured" not in result.stdout
