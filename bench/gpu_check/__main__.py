"""Check and measure everything that only a GPU can tell, within eight minutes.

    make gpu-check RESULTS=DIR

Where nothing is installed but torch, GPU_CHECK_PYTHON is that Python, and GPU_CHECK_PACKAGES a
folder of unpacked wheels (`packages.py`). Needs no network. Writes gpu_check.md (tables),
gpu_check.json (the receipt), gpu_check.log (what the steps said) and, with AMX, moe_layer.json; the
receipts are stored by `bench/report.py`. Ends with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.gpu_check.packages import add_packages

SECONDS = 470


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    args = parser.parse_args()
    add_packages()
    return check(args.results.resolve(), args.seconds)


def check(results: Path, seconds: float) -> int:
    """All steps; 1 if one failed."""
    from bench.gpu_check.environment import environment
    from bench.gpu_check.plan import steps
    from bench.gpu_check.points import read_points
    from bench.gpu_check.report import page, summary
    from bench.gpu_check.running import run_all
    from hybrid_moe.planning.receipt import receipt, write_receipt

    results.mkdir(parents=True, exist_ok=True)
    facts = environment()
    print(f"{facts['gpu'].get('name', 'no GPU: a rehearsal')}; {facts['kernels']['reason']}")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        collected = Path(folder) / "points.jsonl"
        for outcome in run_all(steps(collected, results), seconds, results / "gpu_check.log"):
            outcomes.append(outcome)
            print(f"{outcome.state:9} {outcome.seconds:5.0f} s  {outcome.name}: {outcome.reason}")
        points = read_points(collected)
    (results / "gpu_check.md").write_text(page(facts, outcomes, points))
    document = receipt(
        "gpu_check",
        gpu=facts["gpu"].get("name"),
        environment=facts,
        steps=[{**asdict(outcome), "tail": ""} for outcome in outcomes],
        points=points,
    )
    write_receipt(results / "gpu_check.json", document)
    print()
    for what, bar, measured in summary(outcomes, points):
        print(f"{what:36} {bar:20} {measured}")
    return int(any(outcome.state in ("failed", "too slow") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
