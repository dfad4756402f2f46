"""The options that `plan` and `serve` share: the machine, and what it is to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybrid_moe.planning import CpuSpeeds, Plan

GpuOption = Annotated[
    list[str] | None,
    typer.Option(help="Memory of a GPU, or NxMEMORY: 24GB, 2x24GB. Repeatable. None: CPU only."),
]
RamOption = Annotated[
    str | None, typer.Option(help="Memory of the machine, such as 64GB; default: this machine's.")
]
ContextOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the longest request; default: 32768 at most.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Original checkpoint, where the other one was converted: SGLang reads all but the "
        "CPU's experts from it.",
    ),
]
MethodOption = Annotated[
    str | None, typer.Option(help="Format of the CPU's experts; default: what is stored.")
]
DenseOption = Annotated[
    str,
    typer.Option(
        help="Format of linear layers where there is no GPU: bf16, int8, mxfp4; or torch."
    ),
]
GpuExpertsOption = Annotated[
    str | None,
    typer.Option(
        help="With --gpu: experts of each layer on it; default: as many as fit. Without: as for "
        "`generate`, 25%, 24GB, a placement profile, or profile.json@25% by a routing profile."
    ),
]
GpuBackendOption = Annotated[
    str | None,
    typer.Option(
        metavar="cute|torch",
        help="What computes the experts on the GPU: this package's kernels (cute), or torch, which "
        "needs no GPU. Default: with --gpu SGLang does, without it cute where it can be used.",
    ),
]
StreamPrefillOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With --gpu-backend: memory of the GPU for experts that travel there while a long "
        "prompt is read, and in decode without graphs where that pays, such as 2GiB. Default: the "
        "CPU computes them.",
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        help="Which experts are on the GPU: a placement profile, or a routing profile of "
        "`hybrid-moe profile`, of which the best placement is made."
    ),
]
RequestsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Requests at the same time; default: as many as leave each 5 tokens a second, or half "
        "of its speed alone.",
    ),
]
RequestSpeedOption = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Tokens a second that each request has at least: so many run at the same time.",
    ),
]
ChunkOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens that are prefilled at once; 0: what makes prefill fastest, within memory.",
    ),
]
DEFAULT_CHUNK = 2048
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; default: one per available core.")
]
PoolsOption = Annotated[
    int | None, typer.Option(min=1, help="Worker pools; default: one per NUMA node.")
]
CeilingsOption = Annotated[
    Path | None,
    typer.Option(
        help="Receipt of `hybrid-moe bench ceilings --json`; default: measure here, a second."
    ),
]
RamBandwidthOption = Annotated[
    float | None, typer.Option(min=0.001, help="GB/s that the memory gives, instead of measuring.")
]
GmacsOption = Annotated[
    float | None,
    typer.Option(min=0.001, help="10^9 multiply-accumulates a second, with --ram-bandwidth."),
]
GpuBandwidthOption = Annotated[
    float | None, typer.Option(min=0.001, help="GB/s of a GPU's memory; default: by its size.")
]


@dataclass(frozen=True)
class MachineOptions:
    """Values of the shared options, by their names."""

    gpu: list[str] | None
    ram: str | None
    context: int | None
    base: str | None
    method: str | None
    gpu_experts: str | None
    profile: Path | None
    requests: int | None
    chunk: int
    threads: int | None
    pools: int | None
    ceilings: Path | None
    ram_bandwidth: float | None
    gmacs: float | None
    gpu_bandwidth: float | None
    dense: str = "bf16"
    gpu_backend: str | None = None
    stream_prefill: str | None = None
    request_speed: float | None = None

    def plan(self, named: str | Path) -> Plan:
        """Plan a model, see `find_model`; measures the ceilings if none were given."""
        from hybrid_moe import planning
        from hybrid_moe.cpu_kernels.pool.config import PoolConfig, default_pools
        from hybrid_moe.integrations.sglang import gpu_backend
        from hybrid_moe.loaders.find_model import find_model
        from hybrid_moe.planning import machine
        from hybrid_moe.planning.admission import requests_with
        from hybrid_moe.planning.parts import lay_out
        from hybrid_moe.planning.streaming import best_chunk

        gpus = planning.parse_gpus(self.gpu or (), self.gpu_bandwidth)
        path, base = find_model(named), find_model(self.base) if self.base else None
        count = self._gpu_experts()
        if self.gpu_backend is not None and not gpus and self.gpu_experts is None:
            raise ValueError(
                "--gpu-backend is for experts on a GPU: say which with --gpu-experts, or --gpu"
            )
        if self.request_speed is not None and (self.requests is not None or not gpus):
            raise ValueError(
                "--request-speed says how many requests run at the same time on a --gpu: leave out "
                "--requests"
            )
        if self.stream_prefill is not None and (not gpus or self.gpu_backend is None):
            raise ValueError(
                "--stream-prefill sends experts to slots of this package on a GPU: add --gpu and "
                "--gpu-backend cute"
            )
        backend = gpu_backend.backend_named(self.gpu_backend, "--gpu-backend ") if gpus else None
        model = planning.read_model(path, base, self.method, self.dense, backend)
        slots = None
        if count is None and self.gpu_experts is not None:
            slots = planning.slots_of(model, self.gpu_experts)
        threads = self.threads or PoolConfig.choose(pools=self.pools).threads
        request = planning.Request(
            gpus=gpus,
            ram=planning.parse_size(self.ram) if self.ram else machine.memory_of_this_machine(),
            context=self.context or min(model.max_context or 32768, 32768),
            requests=(self.requests or 1) if gpus else 1,
            chunk=self.chunk or DEFAULT_CHUNK,
            threads=threads,
            pools=self.pools or default_pools(threads),
            cpu=self._speeds(threads),
            num_gpu_experts=count,
            slots=slots,
            **self._profile(),
            huge_pages=machine.huge_pages_here(),
            stream_memory=planning.parse_size(self.stream_prefill) if self.stream_prefill else 0,
        )
        if gpus and self.requests is None:
            count = requests_with(
                lambda count: lay_out(model, replace(request, requests=count)), self.request_speed
            )
            request = replace(request, requests=count)
        if self.chunk:
            return planning.make_plan(model, request)
        return best_chunk(
            lambda chunk: planning.make_plan(model, replace(request, chunk=chunk)), request.context
        )

    def _profile(self) -> dict[str, Any]:
        """Arguments of `Request` that say which experts are on the GPU.

        Raises:
            FileNotFoundError, ValueError: no such file, or it is damaged.
        """
        from hybrid_moe.placement.profile import read_profile
        from hybrid_moe.placement.routed_masks import is_routing_file
        from hybrid_moe.placement.routing_profile_file import read_routing_profile
        from hybrid_moe.planning import MeasuredRouting

        if self.profile is None:
            return {}
        path = self.profile.expanduser()
        if not is_routing_file(path):
            return {"profile": read_profile(path)}
        return {"routing": MeasuredRouting(path, read_routing_profile(path))}

    def _gpu_experts(self) -> int | None:
        """A number of experts of each layer, which is what SGLang takes.

        Raises:
            ValueError: something else, and there is a --gpu.
        """
        text = self.gpu_experts
        if text is None or (not self.gpu and not text.isdecimal()):
            return None
        if not text.isdecimal():
            raise ValueError(
                f"--gpu-experts {text}: with --gpu, which is for SGLang, it is a number of experts "
                "of each layer, such as 8"
            )
        return int(text)

    def _speeds(self, threads: int) -> CpuSpeeds:
        from hybrid_moe.formats.table import FORMATS
        from hybrid_moe.planning import machine

        if (self.ram_bandwidth is None) != (self.gmacs is None):
            raise ValueError("--ram-bandwidth and --gmacs describe one machine: give both")
        if self.ram_bandwidth is not None and self.gmacs is not None:
            if self.ceilings is not None:
                raise ValueError("give --ceilings, or --ram-bandwidth and --gmacs, not both")
            macs = dict.fromkeys(FORMATS, self.gmacs * 1e9)
            return machine.CpuSpeeds(self.ram_bandwidth * 1e9, macs, "as given")
        if self.ceilings is not None:
            return machine.read_receipt(self.ceilings)
        return machine.measure_cpu(threads)
