"""Every command on systems that refuse or hide something, and with output that goes nowhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hybrid_moe import loaders, sysfiles
from hybrid_moe.cli.errors import explain
from hybrid_moe.cpu_kernels.ceilings import bandwidth
from tests.hybrid_moe.command import PROMPT, run, write_model
from tests.machines import Machine

PLAN = ("--ram-bandwidth", 20, "--gmacs", 60, "--ram", "64GB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bandwidth probe: the real ones are far beyond the caches."""
    real = bandwidth.ReadProbe
    monkeypatch.setattr(bandwidth, "ReadProbe", lambda pool: real(pool, 1 << 20, block=64 << 10))


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "generate": lambda model, out: (
        "generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 2,
    ),
    "convert": lambda model, out: ("convert", "--model", model, "--out", out / "converted"),
    "inspect": lambda model, out: ("inspect", model),
    "plan": lambda model, out: ("plan", model, *PLAN),
    "serve": lambda model, out: ("serve", "--dry-run", "--model", model, *PLAN),
    "doctor": lambda model, out: ("doctor", "--no-bandwidth"),
    "bench": lambda model, out: (
        "bench", "ceilings", "--tiers", "portable", "--seconds", 0.001,
    ),
}  # fmt: skip


def _refuse(error: Exception) -> Callable[..., Any]:
    def refuse(*arguments: object) -> None:
        raise error

    return refuse


def _hide(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sysfiles, "ROOT", root / "nothing")
    patch.setattr(psutil, "PROCFS_PATH", str(root / "nothing"), raising=False)


def _folders_for_files(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Reading each file of /proc and /sys is an error."""
    machine = Machine({0: "0"})
    for name in machine.content():
        (root / name).mkdir(parents=True)
    patch.setattr(sysfiles, "ROOT", root)
    patch.setattr(psutil, "PROCFS_PATH", str(root / "proc"), raising=False)


def _affinity(code: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def fault(root: Path, patch: pytest.MonkeyPatch) -> None:
        refuse = _refuse(OSError(code, os.strerror(code)))
        patch.setattr(os, "sched_getaffinity", refuse)
        patch.setattr(os, "sched_setaffinity", refuse)

    return fault


def _no_counts(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "cpu_count", lambda: None)
    patch.setattr(os, "sysconf", _refuse(ValueError("unrecognized configuration name")))
    _hide(root, patch)


FAULTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "/proc and /sys are hidden": _hide,
    "/proc and /sys cannot be read": _folders_for_files,
    "affinity calls: no permission": _affinity(errno.EPERM),
    "affinity calls: no such call": _affinity(errno.ENOSYS),
    "nothing counts processors or memory": _no_counts,
    "a quota that we do not know": lambda root, patch: Machine(
        {0: "0"}, files={"sys/fs/cgroup/box/cpu.max": "plenty\n"}
    ).pretend(root, patch),
    "a terminal without columns": lambda root, patch: patch.setenv("COLUMNS", "0"),
    "a terminal with one column": lambda root, patch: patch.setenv("COLUMNS", "1"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fallback_covers_its_call(
    command: str, fault: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS[fault](tmp_path / "root", monkeypatch)
    result = run(*COMMANDS[command](model, tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.exception is None and "Traceback" not in result.stderr
    assert result.stdout.strip() or command == "convert"


ERRORS = {
    RuntimeError("can't start new thread"): (1, "RuntimeError: can't start new thread (nobody"),
    KeyError("x"): (1, "KeyError: 'x' (nobody foresaw this: HYBRID_MOE_DEBUG=1"),
    ValueError("two\n  lines"): (2, "two lines"),
    OSError(errno.ENOSPC, "No space left on device"): (2, "No space left on device"),
    ModuleNotFoundError("no", name="accelerate"): (2, 'pip install "hybrid-moe[transformers]"'),
    MemoryError(): (2, "MemoryError"),
    RecursionError("too deep"): (1, "RecursionError: too deep"),
}


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_every_error_is_one_paragraph(
    error: Exception, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = ERRORS[error]
    monkeypatch.setattr(loaders, "inspect_checkpoint", _refuse(error))
    result = run("inspect", model)
    assert result.exit_code == code and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("hybrid-moe: ") and message in result.stderr
    assert result.stderr == f"hybrid-moe: {explain(error)}\n"
    debugged = run("inspect", model, env={"HYBRID_MOE_DEBUG": "1"})
    assert debugged.exception is error


def test_an_interrupt_is_no_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "inspect_checkpoint", _refuse(KeyboardInterrupt()))  # type: ignore[arg-type]
    result = run("inspect", model)
    assert result.exit_code == 128 + signal.SIGINT and "Traceback" not in result.stderr


CONTRADICTIONS = {
    "more experts per token than there are": ({"num_experts_per_tok": 9}, "take 9 experts of 8"),
    "no experts per token": ({"num_experts_per_tok": 0}, "between 1 and 8"),
    "a number in words": ({"num_experts_per_tok": "two"}, "expected int, got str"),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "an unknown activation": ({"hidden_act": "wild"}, "wild"),
    "an unknown dtype": ({"dtype": "float7"}, "float7"),
    "a padding token beyond the vocabulary": ({"pad_token_id": 10**9}, "Padding_idx"),
    "another width": ({"hidden_size": 96}, "another shape"),
    "quantized by a number": ({"quantization_config": 7}, "to_dict"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_configuration_that_cannot_be(name: str, model: Path, tmp_path: Path) -> None:
    changes, message = CONTRADICTIONS[name]
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    result = run("generate", "--model", directory, "--prompt", PROMPT, "--threads", 1)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    paragraphs = [line for line in result.stderr.splitlines() if line.startswith("hybrid-moe: ")]
    assert len(paragraphs) == 1 and message in paragraphs[0] and str(directory) in paragraphs[0]


def test_plan_and_inspect_see_a_routing_that_cannot_be(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    for command, code in (("inspect", 1), ("plan", 2), ("serve", 2)):
        result = run(*COMMANDS[command](directory, tmp_path))
        assert result.exit_code == code and "take 9 experts of 8" in result.stderr


SANDBOX = """
import os, sys
from pathlib import Path
import psutil

def refuse(*arguments):
    raise OSError(38, "Function not implemented")

def read(path, *arguments, **options):
    hidden = str(path).startswith(("/proc/", "/sys/"))
    return refuse() if hidden else read_text(path, *arguments, **options)

read_text, Path.read_text = Path.read_text, read
os.sched_setaffinity = refuse
if sys.argv[1] != "generate":  # PyTorch itself makes this call, and nothing catches it
    os.sched_getaffinity = refuse
psutil.PROCFS_PATH = "/nowhere"
from hybrid_moe.cli import main
main()
"""
"""From the first import on, as a sandbox would be."""


@pytest.mark.parametrize("command", ["generate", "doctor", "plan"])
def test_a_start_in_a_sandbox(command: str, model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SANDBOX, *map(str, COMMANDS[command](model, tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.strip()
    times = done.stderr.count("the affinity mask cannot be read")
    assert times == (command != "generate")


# streams ----------------------------------------------------------------------------------------

MAIN = [sys.executable, "-c", "from hybrid_moe.cli import main; main()"]
LIGHT = ("inspect", "plan", "doctor")
"""Commands that start quickly."""


def _plain(**env: str) -> dict[str, str]:
    own = ("LC_", "LANG", "PYTHON", "COLUMNS")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(own)}, **env}


def _words(command: str, model: Path) -> list[str]:
    return [*MAIN, *map(str, COMMANDS[command](model, model))]


@pytest.fixture(scope="module")
def named_in_chinese(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(model, tmp_path_factory.mktemp("names") / "模型-é")


ENCODINGS = (
    ({"PYTHONIOENCODING": "ascii"}, b"\\u6a21\\u578b-\\xe9"),
    ({"PYTHONIOENCODING": "latin-1", "TERM": "dumb"}, b"\\u6a21\\u578b-\xe9"),
    ({"PYTHONIOENCODING": "ascii:strict", "NO_COLOR": "1"}, b"\\u6a21\\u578b-\\xe9"),
    ({"PYTHONUTF8": "1"}, "模型-é".encode()),
)


@pytest.mark.parametrize(
    ("command", "env", "shown"),
    [("inspect", *encoding) for encoding in ENCODINGS]
    + [(command, *ENCODINGS[0]) for command in LIGHT if command != "inspect"],
)
def test_an_encoding_that_cannot_say_it(
    command: str, env: dict[str, str], shown: bytes, named_in_chinese: Path
) -> None:
    words = _words(command, named_in_chinese)
    done = subprocess.run(words, env=_plain(COLUMNS="500", **env), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and (command == "doctor" or shown in done.stdout)


@pytest.mark.parametrize(("env", "shown"), ENCODINGS)
def test_an_error_that_the_encoding_cannot_say(
    env: dict[str, str], shown: bytes, named_in_chinese: Path
) -> None:
    absent = subprocess.run(
        [*MAIN, "inspect", str(named_in_chinese / "x")], env=_plain(**env), capture_output=True
    )
    assert absent.returncode == 2  # (Click writes messages to an ASCII stream as UTF-8)
    assert shown in absent.stderr or "模型-é".encode() in absent.stderr


def test_help_on_a_terminal_without_columns() -> None:
    done = subprocess.run([*MAIN, "plan", "--help"], env=_plain(COLUMNS="0"), capture_output=True)
    assert done.returncode == 0 and b"MODEL" in done.stdout


@pytest.mark.parametrize(
    ("command", "sink"),
    [
        pytest.param(command, sink, marks=() if command == "inspect" or first else pytest.mark.full)
        for command in LIGHT
        for first, sink in ((True, "full disk"), (False, "closed pipe"), (False, "no stream"))
    ],
)
def test_output_that_goes_nowhere(command: str, sink: str, model: Path) -> None:
    words = _words(command, model)
    options: dict[str, Any] = {"env": _plain(), "stderr": subprocess.PIPE}
    if sink == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        code = subprocess.run(words, stdout=writer, **options)
        os.close(writer)
        assert (code.returncode, code.stderr) == (1, b"")
    elif sink == "full disk":
        with Path("/dev/full").open("wb") as full:
            code = subprocess.run(words, stdout=full, **options)
        assert code.returncode == 2
        assert code.stderr == b"hybrid-moe: No space left on device\n"
    else:
        code = subprocess.run(words, preexec_fn=lambda: os.close(1), **options)
        assert (code.returncode, code.stderr) == (0, b"")
