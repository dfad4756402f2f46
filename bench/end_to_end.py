"""Whole models: tokens per second beside the machine's limits, and beside other engines.

    python bench/end_to_end.py --peers llama.cpp
    python bench/end_to_end.py --model small --models build/models --rounds 1

Checkpoints have published dimensions and layouts and random weights (`synthetic/`); what is not
below --models yet is written first: 14 GB for gpt-oss-20b, 18 for qwen3-30b-a3b, and as much again
as GGUF for llama.cpp, which reads the same weights.

Each engine runs in a process of its own, which ends before the next one starts, since two copies
of a model seldom fit; each loads the model once a round, and the rounds take turns. A context is
computed as a prompt if it has at most --longest-prompt tokens; longer ones are filled with random
keys and values. Then --new tokens follow, and between every eight of them the clock stands still
while memory is read: "read" is the harmonic mean of these bandwidths. The roofline is that over the
bytes that a token reads: its experts, linear layers, routers and norms, and the KV cache, each
once; the share of it is the median over the eights. "Peak" is what the multiply-accumulates of a
prompt take at the peak of the instructions that their formats are given. Memory stands beside what
`plan` says, and so do both speeds, with the ceilings of the same seconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import parse_list, parse_numbers, parser
from peer.find import BENCH, INSTALLED, Place, find_llama, those_found
from peer.interface import UnavailableError
from peer.process import WorkerProcess
from rich.console import Console
from synthetic.checkpoint import make_checkpoint
from synthetic.models import MODELS
from tables import END_TO_END, OTHERS, show
from whole_model.clock import SLICE

from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.table import BF16
from hybrid_moe.planning import CpuSpeeds, Model, Plan, Request, make_plan, read_model
from hybrid_moe.planning.machine import huge_pages_here, memory_of_this_machine
from hybrid_moe.planning.plan import RAM
from hybrid_moe.planning.reading import token_reads
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

OURS = "ours"
ENGINES = (OURS, "llama.cpp", "transformers")
_WORKER = "whole_model.worker"


@dataclass
class Point:
    """One engine behind one context. Lists have a value for each round.

    Attributes:
        computed: the context was a prompt; else its keys and values are random.
        token_bytes: that a token reads, the cache in the middle of the answer.
        prefill_s: seconds from the prompt to the first token.
        decode: tokens per second after it.
        reads: bandwidth meanwhile, GB/s. shares: what is used of it.
        peak_s: what the prompt's multiply-accumulates take at their peak.
        peak_rss: most memory of the process up to here, bytes. planned: what `plan` says.
        predicted_decode, predicted_prefill: tokens per second that `plan` says with these ceilings.
        tokens: the answer's first ones.
    """

    model: str
    engine: str
    label: str
    dense: str
    context: int
    computed: bool
    threads: int
    token_bytes: int
    planned: int | None
    prefill_s: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    peak_s: list[float] = field(default_factory=list)
    peak_rss: list[int] = field(default_factory=list)
    predicted_decode: list[float] = field(default_factory=list)
    predicted_prefill: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A model that all engines run: its checkpoint, what the planner knows of it, and its GGUF
    files where an engine wants them."""

    name: str
    folder: Path
    planned: Model
    vocabulary: int
    gguf: list[str]


class Bench:
    """What all points of a run share."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.pool = PoolConfig.choose(args.threads)
        self.points: dict[tuple[str, str, int], Point] = {}

    def measure(self, subject: Subject, engine: str, place: Place) -> None:
        """One round of an engine: every context."""
        args = self.args
        worker = WorkerProcess(engine, place, args.threads, _WORKER)
        try:
            answer = worker.ask(
                "setup",
                folder=str(subject.folder),
                weights=subject.gguf if engine == "llama.cpp" else [],
                dense=args.dense,
                threads=args.threads,
                context=max(args.contexts) + args.new,
                vocabulary=subject.vocabulary,
            )
            if "unavailable" in answer:
                raise UnavailableError(answer["unavailable"])
            self.console.log(f"{engine}: {subject.name} is loaded ({answer['load_s']:.0f} s)")
            for context in args.contexts:
                self._measure(subject, worker, answer["label"], context)
        finally:
            worker.close()

    def _measure(self, subject: Subject, worker: WorkerProcess, label: str, context: int) -> None:
        args, model = self.args, subject.planned
        computed = context <= args.longest_prompt
        peaks = {name: mac_ceiling(name, self.pool, seconds=0.1) for name in formats(model)}
        made = worker.ask("run", context=context, new=args.new, computed=computed)
        if "unavailable" in made:
            self.console.log(f"{worker.name}, {context} tokens: left out: {made['unavailable']}")
            return
        read = statistics.harmonic_mean(made["reads"])
        speeds = CpuSpeeds(1e9 * read, peaks, "measured meanwhile")
        middle = context + args.new // 2
        plan = forecast(model, speeds, middle, args.threads)
        key = (subject.name, worker.name, context)
        point = self.points.get(key)
        if point is None:
            point = self.points[key] = Point(
                subject.name, worker.name, label, args.dense, context, computed, args.threads,
                token_bytes=token_reads(model, middle).total,
                planned=planned_bytes(model, speeds, context + args.new, args.threads)
                if worker.name == OURS
                else None,
            )  # fmt: skip
        if computed:
            point.prefill_s.append(made["prefill"])
            point.peak_s.append(peak_seconds(model, context, peaks))
            prefill = forecast(model, speeds, context, args.threads).prefill
            point.predicted_prefill.append(prefill.tokens_per_second)
        point.decode.append(len(made["seconds"]) / sum(made["seconds"]))
        point.predicted_decode.append(plan.decode.tokens_per_second)
        point.reads.append(read)
        point.shares.append(read_share(point.token_bytes, made["seconds"], made["reads"]))
        point.peak_rss.append(worker.ask("memory")["peak_rss"])
        point.others.append(made["others"])
        point.tokens = point.tokens or made["tokens"][:8]


def read_share(nbytes: int, seconds: list[float], reads: list[float]) -> float:
    """Of the read bandwidth, what an answer uses: the median over its slices, each beside the
    bandwidths at its beginning and end.

    Args:
        nbytes: that a token reads.
        seconds: of each token.
        reads: GB/s, see `TokenClock`.
    """
    around = itertools.pairwise(reads)
    return statistics.median(
        nbytes / statistics.mean(seconds[at : at + SLICE]) / (1e9 * statistics.mean(pair))
        for at, pair in zip(range(0, len(seconds), SLICE), around, strict=True)
    )


def formats(model: Model) -> list[str]:
    """Names of the formats that a model's products are computed in."""
    dense = BF16 if model.dense.fmt is None else model.dense.fmt
    return list(dict.fromkeys(fmt.name for fmt in (*model.formats, dense, BF16)))


def peak_seconds(model: Model, tokens: int, peaks: Mapping[str, float]) -> float:
    """Of a prompt's multiply-accumulates at the peak of each format's instruction; the output layer
    meets the last token only and is left out."""
    dense = BF16 if model.dense.fmt is None else model.dense.fmt
    weights = [(layer.method, layer.top_k * layer.weights) for layer in model.layers]
    weights += [(dense, model.dense.weights), (BF16, model.torch_weights)]
    return sum(tokens * count / peaks[fmt.name] for fmt, count in weights)


def planned_bytes(model: Model, speeds: CpuSpeeds, context: int, threads: int) -> int:
    """What `plan` says that the process will take."""
    return make_plan(model, _request(speeds, context, threads)).nbytes(RAM)


def forecast(model: Model, speeds: CpuSpeeds, tokens: int, threads: int) -> Plan:
    """A plan whose decode has `tokens` in the cache, which it takes to be half full, and whose
    prefill is of as many."""
    request = _request(speeds, 2 * tokens, threads)
    return make_plan(model, replace(request, chunk=tokens))


def _request(speeds: CpuSpeeds, context: int, threads: int) -> Request:
    return Request(
        gpus=(), ram=memory_of_this_machine(), context=context, requests=1, chunk=context,
        threads=threads, pools=1, cpu=speeds, huge_pages=huge_pages_here(),
    )  # fmt: skip


def rows(points: list[Point]) -> list[dict[str, Any]]:
    """The points as a receipt stores them and the table shows them."""
    ours = {(p.model, p.dense, p.context): p for p in points if p.engine == OURS}
    return [_row(p, ours.get((p.model, p.dense, p.context))) for p in points]


def _row(point: Point, ours: Point | None) -> dict[str, Any]:
    decode, read = statistics.median(point.decode), statistics.median(point.reads)
    row = {
        **asdict(point),
        "decode_tokens_per_s": decode,
        "read_bandwidth": read,
        "roofline": 1e9 * read / point.token_bytes,
        "decode_share": statistics.median(point.shares),
        "prefill_tokens_per_s": None,
        "prefill_share": None,
        "ours_decodes_faster": None,
        "ours_prefills_faster": None,
        "decode_of_plan": _ratio(point.decode, point.predicted_decode),
        "prefill_of_plan": None,
        "memory": max(point.peak_rss),
        "others": statistics.median(point.others),
    }
    if point.prefill_s:
        row["prefill_tokens_per_s"] = point.context / statistics.median(point.prefill_s)
        row["prefill_share"] = statistics.median(
            peak / took for peak, took in zip(point.peak_s, point.prefill_s, strict=True)
        )
        measured = [point.context / seconds for seconds in point.prefill_s]
        row["prefill_of_plan"] = _ratio(measured, point.predicted_prefill)
    if ours is not None and point is not ours:
        row["ours_decodes_faster"] = _ratio(ours.decode, point.decode)
        if point.prefill_s:
            row["ours_prefills_faster"] = _ratio(point.prefill_s, ours.prefill_s)
    return row


def _ratio(larger: list[float], smaller: list[float]) -> float:
    """Median of the rounds' ratios; a round that one of them lacks does not count."""
    return statistics.median(a / b for a, b in zip(larger, smaller, strict=False))


def make_gguf(place: Place, folder: Path, models: Path, dense: str) -> list[str]:
    """The GGUF files of a checkpoint: written where they are not there.

    Raises:
        SystemExit: they cannot be written.
    """
    target = models / "gguf" / folder.name
    made = subprocess.run(
        [place.python, "-m", "synthetic.gguf_files", str(folder), str(target), dense],
        cwd=BENCH, env=os.environ | place.variables, capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"no GGUF of {folder}: {made.stderr[-500:]}")
    return made.stdout.split("\n")[:-1]


def places(args: argparse.Namespace, console: Console) -> dict[str, Place]:
    """Where each wanted engine is; those that are nowhere are reported."""
    unknown = [name for name in args.peers if name not in ENGINES]
    if unknown:
        raise SystemExit(f"unknown engine {unknown[0]}: there are {', '.join(ENGINES[1:])}")
    here = Place(sys.executable, {})
    found = {OURS: here, "llama.cpp": find_llama(args.llama_cpp), "transformers": here}
    return those_found((OURS, *args.peers), found, console)


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", type=parse_list, default="gpt-oss-20b", help=", ".join(MODELS))
    made.add_argument("--models", type=Path, default=INSTALLED.parent / "models", metavar="DIR")
    made.add_argument("--vocabulary", type=int, help="rows of lm_head; default: as published")
    made.add_argument("--contexts", type=parse_numbers, default="16,512,8192")
    made.add_argument("--longest-prompt", type=int, default=512, metavar="TOKENS")
    made.add_argument("--new", type=int, default=64, help="tokens that are generated")
    made.add_argument("--threads", type=int, default=usable_cores())
    made.add_argument("--dense", default="bf16", help="format of linear layers: bf16, int8, ...")
    made.add_argument("--peers", type=parse_list, default="", help=", ".join(ENGINES[1:]))
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--remove-gguf", action="store_true", help="afterwards: it is large")
    made.add_argument("--llama-cpp", metavar="FOLDER", help="with build/bin and llama_cpp")
    return made.parse_args()


def main() -> None:
    args = parse_arguments()
    unknown = [name for name in args.model if name not in MODELS]
    if unknown:
        raise SystemExit(f"unknown model {unknown[0]}: there are {', '.join(MODELS)}")
    console = Console(width=170)
    engines = places(args, console)
    bench = Bench(args, console)
    for name in args.model:
        model = MODELS[name]
        if args.vocabulary:
            model = model.with_vocabulary(args.vocabulary)
        folder = make_checkpoint(model, args.models, args.threads)
        llama = engines.get("llama.cpp")
        gguf = make_gguf(llama, folder, args.models, args.dense) if llama else []
        planned = read_model(folder, dense=args.dense)
        subject = Subject(model.name, folder, planned, model.config["vocab_size"], gguf)
        run_rounds(bench, subject, dict(engines))
        if args.remove_gguf and gguf:
            shutil.rmtree(Path(gguf[0]).parent)
    points = rows(list(bench.points.values()))
    show(console, processor(), [*END_TO_END, OTHERS], points)


def run_rounds(bench: Bench, subject: Subject, engines: dict[str, Place]) -> None:
    """All engines in turn, as often as asked; what is measured is kept if the series is stopped."""
    for _ in range(bench.args.rounds):
        for engine, place in list(engines.items()):
            try:
                bench.measure(subject, engine, place)
            except UnavailableError as reason:
                bench.console.print(f"[yellow]{engine} is left out:[/] {reason}")
                del engines[engine]
            points = rows(list(bench.points.values()))
            write_receipt(bench.args.json, receipt("end_to_end", points=points))


if __name__ == "__main__":
    main()
