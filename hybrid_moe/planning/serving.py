"""The SGLang command that carries a plan out."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.formats.activation import activation_bits
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.integrations.sglang import cpu_activation as activations
from hybrid_moe.integrations.sglang import gpu_backend
from hybrid_moe.placement.profile import write_profile
from hybrid_moe.planning.decode_depth import decode_depth
from hybrid_moe.planning.draft_steps import draft_flags
from hybrid_moe.planning.kv_cache import PAGE
from hybrid_moe.planning.plan import GPU, Plan
from hybrid_moe.schedule import streamed_prefill
from hybrid_moe.schedule.quality import EXACT
from hybrid_moe.schedule.quality import VARIABLE as QUALITY_VARIABLE

INSTALL = 'pip install "hybrid-moe[sglang]"'

PLACEMENT_VARIABLE = "HYBRID_MOE_PLACEMENT"
"""The plugin's variable: the file of a placement profile."""

_NUMA_BINDING = "SGLANG_AUTO_NUMA_BIND"
"""SGLang's variable: unless it is 0, a scheduler gets the cores and the memory of one NUMA node."""

_RESERVED = (
    "--model-path", "--model", "--kt-weight-path", "--kt-method", "--kt-num-gpu-experts",
    "--context-length", "--tp", "--tp-size", "--tensor-parallel-size", "--mem-fraction-static",
    "--max-total-tokens", "--max-running-requests", "--chunked-prefill-size",
    "--swa-full-tokens-ratio",
)  # fmt: skip
"""Flags that the plan decides: given again, the plan would no longer be what runs."""


@dataclass(frozen=True)
class ServerCommand:
    """A command line and what its environment needs beside the present one."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As a shell takes it, an option on each line."""
        lines: list[str] = [f"{name}={shlex.quote(v)}" for name, v in self.environment.items()]
        head = [*lines, *map(shlex.quote, self.arguments[:3])]
        options: list[list[str]] = []
        for word in self.arguments[3:]:
            if word.startswith("--") or not options:
                options.append([])
            options[-1].append(shlex.quote(word))
        return " \\\n    ".join([" ".join(head), *(" ".join(option) for option in options)])


def server_command(
    plan: Plan,
    python: str = "python",
    extra: Sequence[str] = (),
    quality: str = EXACT,
    cpu_activation: str | None = None,
) -> ServerCommand:
    """The command for a plan that fits.

    Args:
        python: the interpreter that has SGLang.
        extra: further flags for SGLang, appended.
        quality: of decode, see `schedule.quality`: no more experts are deferred than make a token
            faster by the timeline, unless `extra` says how many.
        cpu_activation: "int8" for inputs of 8 bits on the CPU, see `KTMoEWrapper`.

    Raises:
        DoesNotFitError: the plan does not fit.
        ValueError: the plan has no GPU, `extra` has a flag that the plan decides, or the model's
            experts take no inputs of 8 bits.
    """
    if not plan.request.gpus:
        raise ValueError("without a GPU Transformers' server runs, and no SGLang")
    plan.check()
    _check_extra(extra)
    _check_activation(plan, cpu_activation)
    model, request = plan.model, plan.request
    flags = [
        ("--model-path", str(model.base)),
        ("--kt-weight-path", str(model.path)),
        ("--kt-method", model.method),
        ("--kt-cpuinfer", request.threads),
        ("--kt-threadpool-count", request.pools),
        ("--kt-num-gpu-experts", plan.hot.most),
        ("--context-length", request.context),
        ("--max-total-tokens", -(-plan.cache.tokens // PAGE) * PAGE),
        ("--max-running-requests", request.requests),
        ("--chunked-prefill-size", request.chunk),
    ]
    words = [word for name, value in flags for word in (name, str(value))]
    words.append("--disable-shared-experts-fusion")
    words += _gpu_flags(plan)
    words += _graph_flags(plan, extra)
    words += _deferral_flags(plan, quality, extra)
    words += draft_flags(plan, extra)
    profile = plan.hot.profile
    environment = {} if profile is None else {PLACEMENT_VARIABLE: str(profile.path)}
    if model.gpu_backend is not None:
        environment[gpu_backend.VARIABLE] = model.gpu_backend
    if request.stream_memory:
        environment[streamed_prefill.VARIABLE] = f"{-(-request.stream_memory // 1024)}KiB"
    if quality != EXACT:
        environment[QUALITY_VARIABLE] = quality
    if cpu_activation is not None:
        environment[activations.VARIABLE] = cpu_activation
    environment[_NUMA_BINDING] = "0"
    return ServerCommand((python, "-m", "sglang.launch_server", *words, *extra), environment)


def write_placement(plan: Plan) -> Path | None:
    """Write the file that the command's environment names, where the placement was made from
    measured routing; None where there is nothing to write.

    Raises:
        OSError: its folder cannot be written.
    """
    if plan.request.routing is None or plan.hot.profile is None:
        return None
    profile = plan.hot.profile
    write_profile(profile.path, profile.layers, profile.ranks)
    return profile.path


def require_sglang() -> None:
    """Raise `ImportError` in words where SGLang is not installed."""
    if importlib.util.find_spec("sglang") is None:
        raise ImportError(f"sglang is not installed: {INSTALL}")


def static_fraction(plan: Plan) -> float:
    """Share of a GPU's memory that may hold weights and cache: all but what is kept free for
    activations, graphs and the CUDA context. `--max-total-tokens` bounds the cache within it."""
    kept = sum(part.nbytes for part in plan.parts if part.place == GPU and part.assumed)
    return math.floor(1000 * (1 - kept / plan.request.room)) / 1000


def _gpu_flags(plan: Plan) -> list[str]:
    words = ["--mem-fraction-static", f"{static_fraction(plan):.3f}"]
    if len(plan.request.gpus) > 1:
        words += ["--tp-size", str(len(plan.request.gpus))]
    # Marlin and Triton skip ids of -1 (experts that are elsewhere) and tell which expert is whose
    runner = "marlin" if plan.model.engine_format == MXFP4.name else "triton"
    words += ["--moe-runner-backend", runner]
    if plan.model.gpu_backend == "torch":  # which no graph can hold
        words += ["--cuda-graph-backend-decode", "disabled"]
        words += ["--cuda-graph-backend-prefill", "disabled"]
    if plan.cache.window_ratio is not None:
        words += ["--swa-full-tokens-ratio", f"{plan.cache.window_ratio:.3f}"]
    return words


_GRAPHS = "--cuda-graph-max-bs-decode"


def _graph_flags(plan: Plan, extra: Sequence[str]) -> list[str]:
    """Graphs for steps of as many requests as run. SGLang's own number goes by the GPU's memory:
    with fewer graphs the largest batches would launch kernel by kernel, with more they would take
    memory that the plan has given to experts."""
    if plan.model.gpu_backend == "torch" or any("cuda-graph" in word for word in extra):
        return []
    return [_GRAPHS, str(plan.request.requests)]


_DEFERRED = "--kt-max-deferred-experts-per-token"


def _deferral_flags(plan: Plan, quality: str, extra: Sequence[str]) -> list[str]:
    if quality == EXACT or any(word.partition("=")[0] == _DEFERRED for word in extra):
        return []
    return [_DEFERRED, str(decode_depth(plan, quality).depth)]


def _check_activation(plan: Plan, cpu_activation: str | None) -> None:
    bits = activation_bits(cpu_activation)
    if bits == 16:
        return
    for fmt in {fmt for layer in plan.model.layers for fmt in layer.formats.each}:
        format_kernels(fmt, bits)


def _check_extra(extra: Sequence[str]) -> None:
    for word in extra:
        if word.partition("=")[0] in _RESERVED:
            raise ValueError(
                f"{word.partition('=')[0]} is decided by the plan: use the options of "
                "`hybrid-moe serve`, before the --"
            )
