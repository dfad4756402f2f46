"""Our MoE layer against other libraries: same shapes, threads and random experts, in turn.

    python bench/peers.py --methods MXFP4 --shapes A --kt-python OTHER_VENV/bin/python

Each library runs in a process of its own that is stopped (SIGSTOP) while another one runs, since
idle threads of most libraries spin. A point is measured in several rounds, each library once per
round and the read bandwidth before each, so that all see the same neighbours; ratios are medians
over rounds of ours against the peer in the same round.

kt-kernel: `pip install kt-kernel` into an environment of its own, whose Python is --kt-python (or
--kt-path, a directory of `pip install --target`). ggml: --ggml-lib, a directory with its shared
libraries, such as `llama_cpp/lib` of `pip install llama-cpp-python`. Both are optional.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ceilings import USES, mac_ceiling
from common import parse_list, parse_shapes, processor, receipt, write_receipt
from disturbance import ATTEMPTS, DISTURBED
from problem import Shape, batches_for, random_batches
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats import format_named

OURS = "ours"
NAMES = (OURS, "kt-kernel", "ggml", "torch")


class WorkerProcess:
    """One library in a process that runs only while it answers."""

    def __init__(self, name: str, python: str, environment: dict[str, str]) -> None:
        self.name = name
        self.label = name
        # a file, since a pipe that nobody reads fills up
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", "peer.worker", name],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Wake the worker, wait for its answer, stop it.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {status}: {self._errors.read()[-500:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


@dataclass
class Point:
    """One library at one batch size. `rounds_ms`: median of each round; bandwidths in GB/s."""

    library: str
    label: str
    method: str
    shape: str
    tokens: int
    threads: int
    rounds_ms: list[float] = field(default_factory=list)
    read_bandwidths: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    weight_bytes: float = 0.0
    macs: float = 0.0
    our_ceiling: float = 0.0
    spare_cores: int = 0
    ours_is_faster: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def read_bandwidth(self) -> float:
        return statistics.median(self.read_bandwidths)


def workers_for(args: argparse.Namespace) -> list[WorkerProcess]:
    """Start a worker of each wanted library."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    if args.ggml_lib:
        environment["GGML_LIB"] = str(Path(args.ggml_lib).resolve())
    workers = []
    for name in parse_list(args.libraries):
        if name not in NAMES:
            raise SystemExit(f"unknown library {name}: there are {', '.join(NAMES)}")
        python, variables = sys.executable, dict(environment)
        if name == "kt-kernel":
            python = args.kt_python or python
            if args.kt_path:
                variables["PYTHONPATH"] = str(Path(args.kt_path).resolve())
        workers.append(WorkerProcess(name, python, variables))
    return workers


def set_up(workers: list[WorkerProcess], console: Console, **problem: Any) -> list[WorkerProcess]:
    """Load the layer in each; those that cannot are reported and closed."""
    ready = []
    for worker in workers:
        console.log(f"{worker.name}: loading {problem['method']}, shape {problem['shape']}")
        try:
            answer = worker.ask("setup", **problem)
        except RuntimeError as error:
            answer = {"unavailable": str(error)}
        if "unavailable" in answer:
            console.print(f"[yellow]{worker.name} is left out:[/] {answer['unavailable']}")
            worker.close()
        else:
            worker.label = answer["label"]
            ready.append(worker)
    return ready


class Pace:
    """Which libraries are too slow for which batches: no point takes minutes."""

    def __init__(self, longest_call: float) -> None:
        self._longest = longest_call
        self._last: dict[str, tuple[float, float]] = {}

    def expects(self, library: str, distinct: float) -> bool:
        """Whether a call that touches `distinct` experts should be short enough.

        A call takes at least as much longer than the last one as it touches more experts.
        """
        experts, seconds = self._last.get(library, (distinct, 0.0))
        return seconds * max(1.0, distinct / experts) <= self._longest

    def saw(self, library: str, distinct: float, seconds: float) -> bool:
        """Note a call; whether it was short enough."""
        self._last[library] = (distinct, seconds)
        return seconds <= self._longest


@dataclass(frozen=True)
class Round:
    """Median of one library's calls in one round, and the conditions."""

    ms: float
    read_bandwidth: float
    others: float


def run_round(worker: WorkerProcess, seconds: float, probe: ReadProbe) -> Round:
    """Time one library; again if other processes were busy, and then the least disturbed."""
    rounds = []
    for _ in range(ATTEMPTS):
        before = probe.measure(0.1)
        answer = worker.ask("run", seconds=seconds, least=1)
        after = probe.measure(0.1)
        ms = 1e3 * statistics.median(answer["samples"])
        rounds.append(Round(ms, (before + after) / 2, answer["others"]))
        if answer["others"] < DISTURBED:
            break
    return min(rounds, key=lambda r: r.others)


def measure(
    workers: list[WorkerProcess],
    shape: Shape,
    method: str,
    tokens: int,
    args: argparse.Namespace,
    probe: ReadProbe,
    pace: Pace,
    ceiling: float,
) -> list[Point]:
    """One batch size, all libraries in turn."""
    batches = random_batches(shape, tokens, batches_for(tokens), args.seed)
    distinct = statistics.mean(b.distinct_experts for b in batches)
    nbytes = distinct * shape.weights_per_expert * format_named(method).bits_per_weight / 8
    points: dict[str, Point] = {}
    for worker in workers:
        if not pace.expects(worker.name, distinct):
            continue
        seconds = worker.ask("prepare", tokens=tokens, seed=args.seed)["seconds"]
        if pace.saw(worker.name, distinct, seconds):
            points[worker.name] = Point(
                worker.name, worker.label, method, shape.name, tokens, args.threads,
                weight_bytes=nbytes, macs=float(shape.macs(tokens)), our_ceiling=ceiling,
                spare_cores=usable_cores() - args.threads,
            )  # fmt: skip
    for _ in range(args.rounds):
        for worker in workers:
            if worker.name in points:
                round_ = run_round(worker, args.seconds, probe)
                points[worker.name].rounds_ms.append(round_.ms)
                points[worker.name].read_bandwidths.append(round_.read_bandwidth)
                points[worker.name].others.append(round_.others)
    if OURS in points:
        for point in points.values():
            pairs = zip(point.rounds_ms, points[OURS].rounds_ms, strict=True)
            point.ours_is_faster = statistics.median(theirs / mine for theirs, mine in pairs)
    return list(points.values())


def accuracy(args: argparse.Namespace, method: str, console: Console) -> list[dict[str, Any]]:
    """Relative error of each library against float64, on a small problem."""
    rows = []
    workers = set_up(
        workers_for(args),
        console,
        shape="small",
        method=method,
        threads=args.threads,
        max_tokens=64,
    )
    for worker in workers:
        errors = [
            worker.ask("error", tokens=16, seed=3, outliers=outliers)["error"]
            for outliers in (0, 8)
        ]
        rows.append(
            {"library": worker.name, "label": worker.label, "method": method,
             "normal": errors[0], "outliers": errors[1]}
        )  # fmt: skip
        worker.close()
    return rows


def speed_table(points: list[Point]) -> Table:
    table = Table(title=f"{points[0].threads} threads each, on {processor()}")
    table.add_column("library")
    for name in ("method", "shape", "tokens", "ms", "GB/s", "read now", "GMAC/s", "ours faster by"):
        table.add_column(name, justify="right")
    for p in points:
        table.add_row(
            p.label,
            p.method,
            p.shape,
            str(p.tokens),
            f"{p.ms:.2f}",
            f"{p.weight_bytes / p.ms / 1e6:.2f}",
            f"{p.read_bandwidth:.1f}",
            f"{p.macs / p.ms / 1e6:.1f} of {p.our_ceiling / 1e9:.0f}",
            "" if p.library == OURS or p.ours_is_faster is None else f"{p.ours_is_faster:.2f}",
        )
    return table


def accuracy_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="error ||y - reference|| / ||reference||, reference in float64")
    for name in ("library", "method", "normal inputs", "8 channels x 40"):
        table.add_column(name)
    for r in rows:
        table.add_row(r["label"], r["method"], f"{r['normal']:.4f}", f"{r['outliers']:.4f}")
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="MXFP4", help=", ".join(USES))
    parser.add_argument("--shapes", default="A")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--libraries", default=",".join(NAMES))
    parser.add_argument(
        "--threads", type=int, default=max(1, usable_cores() - 1),
        help="of each library; by default one core is spare, for kt-kernel's queue thread",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each library and round")
    parser.add_argument("--longest-call", type=float, default=3.0, help="skip slower points")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kt-python", help="Python of an environment with kt-kernel and torch")
    parser.add_argument("--kt-path", help="directory of `pip install --target` with kt-kernel")
    parser.add_argument("--ggml-lib", help="directory with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the receipt there")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=120)
    probe = ReadProbe(args.threads)
    tokens = [int(t) for t in parse_list(args.tokens)]
    points: list[Point] = []
    errors: list[dict[str, Any]] = []
    for method in parse_list(args.methods):
        ceiling = mac_ceiling(method, args.threads)
        if not args.no_accuracy:
            errors += accuracy(args, method, console)
        for shape in parse_shapes(args.shapes):
            problem = {"shape": shape.name, "method": method, "threads": args.threads}
            workers = set_up(workers_for(args), console, **problem, max_tokens=max(tokens))
            pace = Pace(args.longest_call)
            for count in tokens:
                points += measure(workers, shape, method, count, args, probe, pace, ceiling)
            for worker in workers:
                worker.close()
    console.print(speed_table(points))
    if errors:
        console.print(accuracy_table(errors))
    spare = usable_cores() - args.threads
    console.print(
        f"{spare} cores were spare: kt-kernel's queue thread busy-waits through a call and needs "
        "one. Shape C runs without its biases and clamps, which not every library has."
    )
    documents = [{**asdict(p), "ms": p.ms, "read_bandwidth": p.read_bandwidth} for p in points]
    write_receipt(args.json, receipt("peers", documents, errors=errors))


if __name__ == "__main__":
    main()
