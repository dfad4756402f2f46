"""What this package relies on in SGLang, as a table, and the check that it still holds.

Run at registration, before anything is replaced, and by `hybrid-moe doctor --sglang`. A finding
says what changed, so that a new SGLang fails with a sentence instead of a traceback from inside.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TESTED = ("0.5.23", "0.5.23")
"""First and last version of SGLang that the plugin was tested with."""

KT_MODULE = "sglang.srt.layers.moe.kt_ep_wrapper"
LAYER_MODULE = "sglang.srt.layers.moe.fused_moe_triton.layer"
GRAPH_MODULE = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"


class ContractError(RuntimeError):
    """SGLang lacks something that the plugin relies on."""


@dataclass(frozen=True)
class Requirement:
    """One thing in SGLang.

    Attributes:
        target: `module:attribute`; empty attribute for the module itself.
        what: what it is relied on for, as the report prints it.
        examine: None if existing is enough; else gives the problem with the object, or None.
    """

    target: str
    what: str
    examine: Callable[[Any], str | None] | None = None


@dataclass(frozen=True)
class Finding:
    """A requirement and what is wrong with it (None: it holds)."""

    requirement: Requirement
    problem: str | None


def called_with(*names: str) -> Callable[[Any], str | None]:
    """We call it with these keywords (a method: besides self)."""

    def examine(function: Any) -> str | None:
        signature = inspect.signature(function)
        instance = (None,) if next(iter(signature.parameters), "") == "self" else ()
        try:
            signature.bind(*instance, **dict.fromkeys(names))
        except TypeError as error:
            return f"{error} (it takes {signature})"
        return None

    return examine


def calls_with(*names: str) -> Callable[[Any], str | None]:
    """SGLang calls our replacement as it calls this: exactly these parameters, besides self."""

    def examine(function: Any) -> str | None:
        found = [p for p in inspect.signature(function).parameters if p != "self"]
        if found == list(names):
            return None
        return f"its parameters are ({', '.join(found)}), expected ({', '.join(names)})"

    return examine


def has_fields(*names: str) -> Callable[[Any], str | None]:
    """A dataclass or named tuple with these fields, and maybe others."""

    def examine(kind: Any) -> str | None:
        if dataclasses.is_dataclass(kind):
            found = {field.name for field in dataclasses.fields(kind)}
        else:
            found = set(getattr(kind, "_fields", ()))
        return _missing("field", names, found)

    return examine


def uses(*names: str) -> Callable[[Any], str | None]:
    """A function whose code refers to these names, as variables or as keywords of calls."""

    def examine(function: Any) -> str | None:
        code = inspect.unwrap(function).__code__
        keywords = (word for const in code.co_consts if isinstance(const, tuple) for word in const)
        return _missing("use of", names, {*code.co_names, *code.co_varnames, *keywords})

    return examine


def offers_only(*names: str) -> Callable[[Any], str | None]:
    """A class whose public methods are among these: all that SGLang can call is ours."""

    def examine(kind: Any) -> str | None:
        public = {n for n, v in vars(kind).items() if inspect.isfunction(v) and n[0] != "_"}
        unknown = sorted(public - set(names))
        return f"it has methods that ours lacks: {', '.join(unknown)}" if unknown else None

    return examine


_METHOD = f"{KT_MODULE}:KTEPWrapperMethod"
_LAYER = f"{LAYER_MODULE}:FusedMoE"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_LOAD = ("param", "loaded_weight", "weight_name", "shard_id")

REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement(f"{KT_MODULE}:KTRANSFORMERS_AVAILABLE", "the switch that admits --kt-*"),
    Requirement(
        f"{KT_MODULE}:KTConfig",
        "the --kt-* options of a layer",
        has_fields(
            "layer_idx",
            "num_gpu_experts",
            "cpuinfer_threads",
            "threadpool_count",
            "weight_path",
            "chunked_prefill_size",
            "max_deferred_experts_per_token",
            "method",
            "num_layers",
        ),
    ),
    Requirement(f"{_METHOD}.__init__", "making it", calls_with("gpu_method", "kt_config")),
    Requirement(
        f"{_METHOD}.create_weights",
        "allocating a layer",
        calls_with(
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
            "extra_weight_attrs",
        ),
    ),
    Requirement(f"{_METHOD}.process_weights_after_loading", "loading", calls_with("layer")),
    Requirement(
        f"{_METHOD}.create_moe_runner", "building", calls_with("layer", "moe_runner_config")
    ),
    Requirement(f"{_METHOD}.apply", "running", calls_with("layer", "dispatch_output")),
    Requirement(
        _METHOD,
        "all that SGLang calls",
        offers_only(
            "create_weights",
            "process_weights_after_loading",
            "create_moe_runner",
            "get_moe_runner_backend",
            "get_moe_routing_method_type",
            "submit",
            "sync",
            "apply",
        ),
    ),
    Requirement(
        f"{_LAYER}.__init__",
        "the layer asks for the method and tells what it needs",
        uses("KTEPWrapperMethod", "weight_loader", "moe_intermediate_size", "is_draft"),
    ),
    Requirement(f"{LAYER_MODULE}:KTEPWrapperMethod", "where the layer finds the method"),
    Requirement(
        f"{_LAYER}._weight_loader_impl", "filling a slot", called_with(*_LOAD, "expert_id")
    ),
    Requirement(f"{_LAYER}.weight_loader", "one expert", calls_with(*_LOAD, "expert_id")),
    Requirement(f"{_LAYER}.weight_loader_fused", "stacked experts", calls_with(*_LOAD)),
    Requirement(
        f"{LAYER_MODULE}:_fuses_routed_scaling_factor_in_topk",
        "who applies routed_scaling_factor",
        calls_with("quant_method", "runner_backend"),
    ),
    Requirement(
        "sglang.srt.layers.moe.moe_runner:MoeRunnerConfig",
        "the activation and sizes of a layer",
        has_fields(
            "layer_id",
            "num_local_experts",
            "activation",
            "is_gated",
            "apply_router_weight_on_input",
            "no_combine",
            "routed_scaling_factor",
            "gemm1_alpha",
            "gemm1_beta",
            "gemm1_clamp_limit",
            "swiglu_limit",
        ),
    ),
    Requirement(
        "sglang.srt.layers.moe.token_dispatcher:StandardDispatchOutput",
        "a batch",
        has_fields("hidden_states", "topk_output"),
    ),
    Requirement(
        "sglang.srt.layers.moe.token_dispatcher:StandardCombineInput",
        "an output",
        called_with("hidden_states"),
    ),
    Requirement(
        "sglang.srt.layers.moe.topk:StandardTopKOutput",
        "routing",
        called_with("topk_weights", "topk_ids", "router_logits"),
    ),
    Requirement("sglang.srt.layers.moe.topk:TopKOutputChecker.format_is_bypassed", "routing to do"),
    Requirement("sglang.srt.layers.moe.topk:TopKOutputChecker.format_is_standard", "routing done"),
    Requirement("sglang.srt.layers.moe:get_moe_a2a_backend", "expert parallelism"),
    Requirement("sglang.srt.runtime_context:get_exec", "the server's options"),
    Requirement(
        "sglang.srt.model_executor.cuda_graph_config:cuda_graph_fully_disabled",
        "whether graphs are captured",
        called_with(),
    ),
    Requirement("sglang.srt.runtime_context:get_parallel", "the server's ranks"),
    Requirement(
        "sglang.srt.eplb.expert_location:ExpertLocationMetadata.logical_to_all_physical",
        "the ids of an expert",
        calls_with("layer_id", "logical_expert_id", "require_global_experts"),
    ),
    Requirement(
        "sglang.srt.eplb.expert_location:get_global_expert_location_metadata", "expert locations"
    ),
    Requirement(
        "sglang.srt.layers.quantization.base_config:FusedMoEMethodBase", "the base of methods"
    ),
    Requirement(
        f"{_SCHEDULER}.run_batch", "steps and their numbers", uses("forward_ct", "forward_iter")
    ),
    Requirement(
        "sglang.srt.model_executor.model_runner:ModelRunner.forward",
        "telling prefill from decode",
        called_with("forward_batch"),
    ),
    Requirement(
        "sglang.srt.managers.schedule_batch:ScheduleBatch",
        "the requests of a step",
        has_fields("reqs", "forward_iter"),
    ),
    Requirement(
        f"{_SCHEDULER}.process_batch_result",
        "failing the requests of a step",
        calls_with("batch", "result"),
    ),
    Requirement(
        "sglang.srt.managers.schedule_batch:Req.__init__",
        "dropping what a step gave",
        uses("discard_output_reason", "skip_radix_cache_insert"),
    ),
    Requirement(
        "sglang.srt.managers.schedule_batch:FINISH_ABORT",
        "the answer to its requests",
        called_with("message", "status_code"),
    ),
    Requirement(f"{GRAPH_MODULE}:KTRANSFORMERS_AVAILABLE", "announcing graph batch sizes"),
)


def examine(requirements: Sequence[Requirement] = REQUIREMENTS) -> list[Finding]:
    """Every requirement with what is wrong with it. Imports SGLang's modules."""
    return [Finding(requirement, _problem(requirement)) for requirement in requirements]


def check(requirements: Sequence[Requirement] = REQUIREMENTS) -> None:
    """Raise `ContractError` with every requirement that does not hold."""
    broken = [finding for finding in examine(requirements) if finding.problem is not None]
    if broken:
        details = "; ".join(f"{f.requirement.target}: {f.problem}" for f in broken)
        raise ContractError(
            f"SGLang {installed_version() or '(?)'} is not as hybrid_moe needs it (tested: "
            f"{tested_range()}): {details}"
        )


def installed_version() -> str | None:
    """SGLang's version; None if it has no metadata (a source tree) or is absent."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed() -> bool:
    """Whether SGLang can be imported."""
    return importlib.util.find_spec("sglang") is not None


def tested_range() -> str:
    """The tested versions as text."""
    first, last = TESTED
    return first if first == last else f"{first} to {last}"


def untested(version: str | None) -> str | None:
    """A warning for a version outside the tested range, None inside."""
    if version is None:
        return f"SGLang's version is unknown; hybrid_moe is tested with SGLang {tested_range()}"
    from packaging.version import Version  # SGLang depends on it

    first, last = map(Version, TESTED)
    if first <= Version(version) <= last:
        return None
    return f"SGLang {version} is untested with hybrid_moe (tested: {tested_range()})"


def _problem(requirement: Requirement) -> str | None:
    module_name, _, path = requirement.target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        return f"cannot be imported ({error})"
    for name in filter(None, path.split(".")):
        if not hasattr(found, name):
            return f"{name} is gone"
        found = getattr(found, name)
    return None if requirement.examine is None else requirement.examine(found)


def _missing(kind: str, names: Sequence[str], found: set[str]) -> str | None:
    missing = [name for name in names if name not in found]
    return f"no {kind} {', '.join(missing)}" if missing else None
