"""What is checked and measured, in which order, and what each step needs."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_check.clock import on_gpu
from bench.gpu_check.environment import has_amx
from bench.gpu_check.running import Step

ROOT = Path(__file__).parents[2]
_OF_TOOLS = ("test_simulator", "test_on_device")
KERNEL_TESTS = sorted(
    str(file.relative_to(ROOT))
    for file in (ROOT / "tests" / "gpu").glob("test_*.py")
    if "tests.gpu.harness" in file.read_text() and not file.name.startswith(_OF_TOOLS)
)
"""Those that run kernels, by way of tests/gpu/harness.py."""
_FOLDER = "GPU_CHECK_PACKAGES names a folder with packages"


def _module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", name, *words]


def _tests(*words: str) -> list[str]:
    return _module("pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *words)


def _lacking(*packages: str) -> str:
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"no {', '.join(lacking)}: {_FOLDER}" if lacking else ""


def steps(points: Path, results: Path) -> Sequence[Step]:
    """All of them. What matters most comes first: what there is no time for is at the end.

    Args:
        points: where measurements are collected.
        results: the folder of the results.
    """
    gpu, bench = on_gpu(), ["--points", str(points)]
    tests = _lacking("pytest", "hypothesis", "ml_dtypes")
    no_gpu = "" if gpu else "there is no GPU"
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = no_gpu or ("" if sanitizer else "there is no compute-sanitizer")
    small = _module("bench.gpu_check.small_shapes")
    device_tests = {"HYBRID_MOE_TEST_GPU": "cuda"} if gpu else {}

    def watched(tool: str) -> list[str]:
        return [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small]

    return [
        Step("compile", _module("bench.gpu_check.compile"), 90),
        Step("kernels against their references", small, 60),
        Step(
            "kernels' tests" if gpu else "kernels' tests are found",
            _tests(*KERNEL_TESTS, "--continue-on-collection-errors",
                   *([] if gpu else ["--collect-only"])),
            100 if gpu else 180, tests, device_tests,
        ),
        Step("hybrid layer: replays and moves", _module("bench.gpu_check.replays",
             "--moves", "1000" if gpu else "20"), 60 if gpu else 150),
        Step("ceilings", _module("bench.gpu_check.ceilings", *bench), 40),
        Step("measure: kernels", _module("bench.gpu_check.kernels", *bench, "--seconds",
             "110" if gpu else "60"), 150),
        Step("measure: hybrid layer", _module("bench.gpu_check.hybrid", *bench), 60),
        Step("measure: streamed prefill", _module("bench.gpu_check.streamed", *bench),
             60 if gpu else 24),
        Step("tests/streams/test_cuda.py", _tests("tests/streams/test_cuda.py"), 60,
             tests or no_gpu),
        Step("conformance: graphs", _tests("tests/conformance/test_graphs.py", "--on-device",
             "cuda" if gpu else "cpu"), 45, tests or _lacking("safetensors")),
        Step("memcheck", watched("memcheck"), 45, no_sanitizer),
        Step("racecheck", watched("racecheck"), 45, no_sanitizer),
        Step("AMX tests", _tests("tests/cpu_kernels/kernels/test_amx.py"), 40,
             tests or ("" if has_amx() else "this processor has no AMX")),
        Step("bench/moe_layer.py", [sys.executable, str(ROOT / "bench" / "moe_layer.py"),
             "--methods", "MXFP4,BF16", "--tokens", "1,64,1024", "--seconds", "0.5",
             "--json", str(results / "moe_layer.json")], 60,
             "" if has_amx() else "this processor has no AMX"),
    ]  # fmt: skip
