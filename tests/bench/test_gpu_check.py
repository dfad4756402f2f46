"""`make gpu-check`: steps that fail or hang, points that are cut off, and what the tables say."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import report as results
import torch
from gpu_check import report
from gpu_check.points import Points, read_points
from gpu_check.running import Step, run_all

from bench.gpu_check import kernels, plan, workload
from bench.gpu_check.packages import VARIABLE, add_packages


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_no_step_stops_another(tmp_path: Path) -> None:
    """One fails, one hangs with a child that would hold the GPU, one cannot run; the last runs."""
    child = tmp_path / "child"
    hanging = f"echo on its way; sleep 60 & echo $! > {child}; wait"
    steps = [
        Step("bad", _python("print('before'); raise SystemExit('it broke')"), 60),
        Step("slow", ["sh", "-c", hanging], 2),
        Step("lacking", _python(""), 60, missing="there is no GPU"),
        Step("good", _python("import os; print(os.environ['WORD'])"), 60, env={"WORD": "done"}),
    ]
    log = tmp_path / "log"
    bad, slow, lacking, good = run_all(steps, 120, log)
    assert (bad.state, bad.reason) == ("failed", "status 1: it broke")
    assert {"before", "it broke"} <= set(bad.tail.splitlines())
    assert (slow.state, slow.tail.splitlines()[-1]) == ("too slow", "on its way")
    assert (lacking.state, lacking.reason) == ("not run", "there is no GPU")
    assert (good.state, good.reason) == ("passed", "done")
    assert "==== good" in log.read_text()
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(child.read_text())).status() == psutil.STATUS_ZOMBIE


def test_the_whole_time_is_kept(tmp_path: Path) -> None:
    steps = [Step(name, _python("import time; time.sleep(60)"), 60) for name in ("one", "two")]
    one, two = run_all(steps, 12, tmp_path / "log")
    assert (one.state, one.reason) == ("too slow", "stopped after 7 s")
    assert (two.state, two.reason) == ("not run", "no time was left")


def test_points_of_a_step_that_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "points"
    Points(str(path)).add("kernels", us=1.5, share=None)
    with path.open("a") as file:
        file.write('{"bench": "kern')
    assert read_points(path) == [{"bench": "kernels", "us": 1.5, "share": None}]
    assert read_points(tmp_path / "none") == []


def _kernel(
    kernel: str, tokens: int, us: float | None, share: float | None = None
) -> dict[str, Any]:
    return {
        "bench": "kernels", "model": "m", "format": "MXFP4", "tokens": tokens, "kernel": kernel,
        "us": us, "ceiling": "copy", "share": share,
    }  # fmt: skip


def test_the_short_table() -> None:
    points = [
        {"bench": "ceilings", "name": "copy", "unit": "bytes/s", "rate": 3e12},
        _kernel("gate_up", 1, 10.0, 0.7), _kernel("down", 1, 5.0, 0.62),
        _kernel("pack", 1, 2.0, 0.1),
        _kernel("triton gate_up + down", 1, 30.0), _kernel("torch gate_up + down", 1, None),
        _kernel("gate_up", 4096, 800.0, 0.5),
        {"bench": "hybrid", "ratio": 1.05}, {"bench": "hybrid", "ratio": None},
        {"bench": "streamed", "faster": 1.9},
    ]  # fmt: skip
    table = {what: measured for what, _, measured in report.summary([], points)}
    assert table["ceiling: copy"] == "3000 GB/s"
    assert table["ceiling: mma.sync"] == report.NOT_MEASURED
    assert table["decode, 1 to 8 tokens, MXFP4"] == "62 % at least, median 66 %"
    assert table["decode beside Triton"] == "2.00 × at least, median 2.00 ×"
    assert table["decode beside cuBLAS"] == report.NOT_MEASURED
    assert table["prefill, 4096 tokens, MXFP4"].startswith("50 %")
    assert table["hybrid layer / longer half"] == "1.05 at most"
    assert table["streamed prefill beside the CPU alone"] == "1.90 ×"


def test_without_a_gpu_nothing_is_measured_and_every_row_is_there() -> None:
    found = list(report.summary([], []))
    measured = [row[2] for row in found[1:]]
    assert len(found) > 10 and set(measured) == {report.NOT_MEASURED}


def test_a_receipt_has_a_section_of_the_results() -> None:
    step = {"name": "s", "state": "passed", "seconds": 1.0, "reason": "", "tail": ""}
    points = [_kernel("gate_up", 1, 10.0, 0.7)]
    text = "\n".join(results.gpu_check({"gpu": "H100", "steps": [step], "points": points}))
    assert "On a GPU: H100" in text and "| m MXFP4 | 1 | gate_up | 10.0 | copy | 70 |" in text


def test_work_is_what_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the experts in use, once; and a share of the nearer ceiling."""
    model = workload.MODELS[2].small()
    layer = kernels.Layer.random(model, "MXFP4")
    (batch, *_) = workload.random_batches(model, 3, torch.device("cpu"))
    work = layer.work(batch)
    H, I, pairs = model.hidden, model.intermediate, 3 * model.top_k
    assert work["gate_up"][0] + work["down"][0] == (
        batch.distinct * layer.layout.nbytes + 2 * 3 * H + 2 * 2 * pairs * I + 4 * pairs * H
    )
    assert work["gate_up"][1] == 2 * work["down"][1] == 4 * pairs * H * I
    monkeypatch.setattr(kernels, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(kernels, "mma_flops", lambda: 1e12)
    assert kernels.share_of_ceiling(20.0, 1e4, 1e6) == ("copy", 0.5)
    assert kernels.share_of_ceiling(20.0, 1e3, 1e7) == ("mma", 0.5)
    assert kernels.share_of_ceiling(None, 1e3, 1e7) == ("", None)


def test_batches_use_other_experts_one_after_another() -> None:
    model = workload.MODELS[0]
    one = workload.random_batches(model, 1, torch.device("cpu"))
    assert len({tuple(batch.ids.flatten().tolist()) for batch in one}) == len(one) == 16
    assert one[0].distinct == model.top_k


def test_the_plan_names_tests_that_are_there(tmp_path: Path) -> None:
    steps = plan.steps(tmp_path / "points", tmp_path)
    assert len(plan.KERNEL_TESTS) >= 4
    words = [word for step in steps for word in step.command if word.endswith(".py")]
    assert [word for word in words if not (plan.ROOT / word).exists()] == []
    assert sum(step.limit_s for step in steps if not step.missing) < 800


def test_packages_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their .pth files, here and for the processes of steps."""
    inner = tmp_path / "deep" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "inner.pth").write_text(str(inner))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "first")
    add_packages()
    assert {str(tmp_path), str(inner)} <= set(sys.path)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["first", str(tmp_path), str(inner)]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="no such folder"):
        add_packages()
