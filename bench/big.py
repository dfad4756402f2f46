"""A checkpoint as large as memory allows, from its files to the last layer's output.

    python bench/big.py [--model deepseek-v4-flash] [--gb 13] [--directory build/models] [--keep]

Writes random weights in the dimensions and under the names of DeepSeek-V4-Flash (256 experts, as
many layers as `--gb` hold) or of gpt-oss-20b (complete), inspects and plans it, loads every layer
in a fresh process from the disk, its files dropped from the page cache, and runs all layers: one
token and a prompt. Loading stands beside what the disk gives to plain sequential reads just before
and after, memory beside the plan, tokens beside the read bandwidth of the same seconds. The
checkpoint is removed afterwards. `--model rehearsal` is a few MB, for tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from load import PeakMemory, drop_from_cache, files_of, in_fresh_process, sequential_read
from synthetic.checkpoint import make_checkpoint
from synthetic.deepseek import flash_layers
from synthetic.models import MODELS, Synthetic

_FLASH_LAYER_GB = 3.43
_PROMPT = 512
_PASSES = 15


def _flash(gigabytes: float) -> Synthetic:
    return flash_layers(max(1, round(gigabytes / _FLASH_LAYER_GB)))


CHOICES: Mapping[str, Callable[[float], Synthetic]] = MappingProxyType(
    {
        "deepseek-v4-flash": _flash,
        "gpt-oss-20b": lambda _: MODELS["gpt-oss-20b"],
        "rehearsal": lambda _: flash_layers(
            2, hidden_size=256, moe_intermediate_size=128, n_routed_experts=16
        ),
    }
)


def describe(folder: Path, threads: int) -> dict[str, Any]:
    """What `inspect` and `plan` say of the experts, without reading a weight."""
    from hybrid_moe.formats.table import FORMATS
    from hybrid_moe.loaders import Checkpoint, inspect_checkpoint
    from hybrid_moe.planning import CpuSpeeds, Request, machine, make_plan, read_model
    from hybrid_moe.planning.plan import CPU_EXPERTS

    summary = inspect_checkpoint(folder)
    sources = Checkpoint.open(folder).sources().values()
    speeds = CpuSpeeds(1e9, dict.fromkeys(FORMATS, 1e9), "not measured: nothing is predicted here")
    request = Request(
        gpus=(), ram=machine.memory_of_this_machine(), context=1, requests=1, chunk=_PROMPT,
        threads=threads, pools=1, cpu=speeds, huge_pages=machine.huge_pages_here(),
    )  # fmt: skip
    plan = make_plan(read_model(folder), request)
    return {
        "layers": len(sources),
        "model_type": summary.model_type,
        "expert_bytes": sum(s.num_experts * s.expert_nbytes for s in sources),
        "planned_bytes": sum(p.nbytes for p in plan.parts if p.name.startswith(CPU_EXPERTS)),
    }


def run(folder: Path, threads: int, cache: str | None) -> dict[str, Any]:
    """Load and compute in this process, a fresh one."""
    import torch

    from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
    from hybrid_moe.loaders import Checkpoint
    from hybrid_moe.loaders.model_config import TOP_K
    from hybrid_moe.wrapper import KTMoEWrapper

    checkpoint = Checkpoint.open(folder)
    sources = checkpoint.sources()
    probe = ReadProbe(threads)  # its memory belongs to the baseline
    baseline = PeakMemory.now()
    start = time.perf_counter()
    layers = []
    with PeakMemory() as memory:
        for number, source in sources.items():
            layer = KTMoEWrapper(
                number, source.num_experts, checkpoint.model.of_layer(TOP_K, number) or 1,
                source.hidden, source.intermediate, weight_path=folder, method=None, cache=cache,
                cpuinfer_threads=threads, threadpool_count=1,
            )  # fmt: skip
            layer.load_weights()
            layers.append((source, layer))
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"load_s": seconds, "peak_bytes": memory.peak - baseline}
    result["packed_bytes"] = sum(layer.nbytes for _, layer in layers)

    def inputs(tokens: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        made = torch.Generator().manual_seed(seed)
        batches = []
        for source, layer in layers:
            k = layer.num_experts_per_tok
            x = torch.randn(tokens, source.hidden, generator=made).bfloat16()
            ids = torch.rand(tokens, source.num_experts, generator=made).argsort(1)[:, :k]
            batches.append((x, ids, torch.full((tokens, k), 1 / k)))
        return batches

    def pass_over(batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
        """Seconds of all layers."""
        begin = time.perf_counter()
        for (_, layer), batch in zip(layers, batches, strict=True):
            y = layer.forward(*batch)
        seconds = time.perf_counter() - begin
        assert bool(torch.isfinite(y).all())
        return seconds

    for tokens, name in ((1, "decode"), (_PROMPT, "prefill")):
        pass_over(inputs(tokens, 0))
        seen, reads = [], []
        for turn in range(_PASSES if tokens == 1 else 3):
            reads.append(probe.measure(0.1))
            seen.append(pass_over(inputs(tokens, 1 + turn)))
        result[f"{name}_s"], result[f"{name}_GBps"] = (
            statistics.median(seen),
            statistics.median(reads),
        )
    used = sum(  # by a token: the experts that it takes, of each layer
        layer.num_experts_per_tok * s.nbytes_as(s.formats) / s.num_experts for s, layer in layers
    )
    result["token_bytes"] = used
    result["prompt"] = _PROMPT
    return result


def measure(folder: Path, threads: int, cache: Path | None) -> dict[str, Any]:
    """All figures of a checkpoint: see the table."""
    facts = describe(folder, threads)
    most = sum(file.stat().st_size for file in files_of(folder))  # a disk may be fast for less
    before = sequential_read(folder, threads, most)
    drop_from_cache(folder)
    words = [f"--run={folder}", f"--threads={threads}"]
    point = {**facts, **in_fresh_process(*words, script=__file__)}
    point["disk_GBps"] = statistics.median([before, sequential_read(folder, threads, most)])
    point["load_GBps"] = point["expert_bytes"] / point["load_s"] / 1e9
    point["peak_over_plan"] = point["peak_bytes"] / point["planned_bytes"]
    point["packed_over_stored"] = point["packed_bytes"] / point["expert_bytes"]
    point["decode_tokens_per_s"] = 1 / point["decode_s"]
    point["roofline_tokens_per_s"] = 1e9 * point["decode_GBps"] / point["token_bytes"]
    point["prefill_tokens_per_s"] = point["prompt"] / point["prefill_s"]
    if cache is not None:
        words.append(f"--cache={cache}")
        point["building_s"] = in_fresh_process(*words, script=__file__)["load_s"]
        drop_from_cache(cache)
        point["second_start_s"] = in_fresh_process(*words, script=__file__)["load_s"]
    return point


def main() -> None:
    from harness import parser
    from rich.console import Console
    from tables import BIG, show

    from hybrid_moe.cpu_kernels.pool.topology import usable_cores
    from hybrid_moe.planning.receipt import processor, receipt, write_receipt

    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=CHOICES, default="deepseek-v4-flash")
    arguments.add_argument("--gb", type=float, default=13.7, help="of a model that is cut to size")
    arguments.add_argument("--threads", type=int, default=usable_cores())
    arguments.add_argument("--directory", type=Path, default=Path("build/models"))
    arguments.add_argument("--cache", help="a folder for packed layers, as large: a second start")
    arguments.add_argument("--keep", action="store_true", help="keep the checkpoint")
    arguments.add_argument("--run", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.run:
        print(json.dumps(run(Path(args.run), args.threads, args.cache)))
        return
    args.directory.mkdir(parents=True, exist_ok=True)
    model = CHOICES[args.model](args.gb)
    folder = args.directory / model.name
    try:
        folder = make_checkpoint(model, args.directory, args.threads)
        cache = Path(args.cache) if args.cache else None
        point = {"model": model.name, **measure(folder, args.threads, cache)}
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    show(Console(width=160), f"{model.name}, {args.threads} threads, {processor()}", BIG, [point])
    write_receipt(args.json, receipt("big", points=[point], threads=args.threads))


if __name__ == "__main__":
    main()
