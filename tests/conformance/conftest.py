"""Options, the fixture `kit`, and `--isolate`: each clause in a process of its own."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .kit import LAYERS, Kit, Weights, write_checkpoint

HERE = Path(__file__).parent
TIMEOUT = 300
"""Seconds for one isolated clause, imports included; then it counts as hung."""

OPTIONS = {
    "implementation": ("hybrid_moe:KTMoEWrapper", "MODULE:NAME of the class to test"),
    "on-device": ("cpu", "torch device of the batches: cpu or cuda"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    for name, (default, text) in OPTIONS.items():
        group.addoption(f"--{name}", default=default, help=text)
    group.addoption(
        "--isolate",
        action="store_true",
        help="run every clause in a process of its own: a crash is that clause's failure",
    )


def _option(config: pytest.Config, name: str) -> str:
    """Its value; the default where pytest has met this file too late to parse its options."""
    return str(config.getoption(name.replace("-", "_"), OPTIONS[name][0]))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Weights]]:
    weights = [Weights.random(layer) for layer in range(LAYERS)]
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), weights), weights


@pytest.fixture
def kit(request: pytest.FixtureRequest, checkpoint: tuple[Path, list[Weights]]) -> Iterator[Kit]:
    """The implementation under test. What it keeps for the process is reset around each clause."""
    name, _, attribute = _option(request.config, "implementation").partition(":")
    module = importlib.import_module(name)
    implementation = getattr(module, attribute or "KTMoEWrapper")
    device = torch.device(_option(request.config, "on-device"))
    kit = Kit(implementation, module, device, *checkpoint)
    before = implementation.get_capture_batch_sizes()
    with torch.inference_mode():
        yield kit
    implementation.set_capture_batch_sizes(before)
    kit.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not item.config.getoption("isolate", False) or HERE not in item.path.parents:
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    hook.pytest_runtest_logreport(report=_run_isolated(item))
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_isolated(item: pytest.Item) -> pytest.TestReport:
    """Run one test by another pytest; its end, whatever it is, becomes this test's report."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [sys.executable, "-m", "pytest", item.nodeid, f"--junitxml={result}"]
        command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit2"]
        command += [f"--{name}={_option(item.config, name)}" for name in OPTIONS]
        try:
            ended = subprocess.run(
                command,
                cwd=item.config.rootpath,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            outcome, text = "failed", f"hung: no result after {TIMEOUT} s"
        else:
            outcome, text = _outcome(ended, result)
    longrepr = (str(item.path), item.location[1] or 0, text) if outcome == "skipped" else text
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=outcome,  # type: ignore[arg-type]
        longrepr=longrepr if outcome != "passed" else None,
        when="call",
        start=start,
        stop=time.time(),
        duration=time.time() - start,
    )


def _outcome(ended: subprocess.CompletedProcess[bytes], result: Path) -> tuple[str, str]:
    """(outcome, text) of a process that has ended and of the report that it may have written."""
    output = ended.stdout.decode(errors="replace")
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return "failed", f"the process crashed with {name}:\n{output[-2000:]}"
    if not result.exists():
        return "failed", f"the process ended with {ended.returncode}:\n{output[-2000:]}"
    case = ElementTree.parse(result).find(".//testcase")
    for kind in ("failure", "error", "skipped"):
        found = None if case is None else case.find(kind)
        if found is not None:
            text = found.get("message", "") if kind == "skipped" else found.text or output
            return "skipped" if kind == "skipped" else "failed", text
    passed = ended.returncode == 0 and case is not None
    return ("passed", "") if passed else ("failed", f"exit code {ended.returncode}:\n{output}")
