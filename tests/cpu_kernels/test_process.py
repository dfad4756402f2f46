"""The edges of a process's life: fork, signals, exit, close. Each runs in its own interpreter."""

from __future__ import annotations

import pytest

from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from tests.cpu_kernels.toolbox import run_script

THREADS = pytest.mark.parametrize("threads", range(1, min(2, usable_cores()) + 1))

PRELUDE = """
import gc, os, signal, sys, threading, time
import numpy as np
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch

threads = {threads}
case = Case.random(MXFP4, 64, 96)
batch = random_batch(3, case.H, case.E, 2)
layer = case.layer(pool=PoolConfig(threads))

def in_child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(17)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(18)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
"""


def _run(code: str, threads: int = 1) -> str:
    result = run_script(PRELUDE.format(threads=threads) + code)
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    return result.stdout


@THREADS
@pytest.mark.parametrize(
    "use",
    [
        "layer.forward(*batch)",
        "layer.submit(*batch)",
        "job.wait()",
        "job.done",
        "layer.load(0, case.experts[0])",
    ],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_forked_child_gets_an_error(threads: int, used_before: bool, use: str) -> None:
    """Neither a hang nor a crash: threads and packed weights stay with the parent."""
    if "job" in use and not used_before:
        pytest.skip("a job needs a parent that has submitted it")
    before = "job = layer.submit(*batch)" if used_before else ""
    out = _run(
        f"""
{before}
code = in_child(lambda: {use})
assert code == 17, code
assert layer.forward(*batch).shape == (3, 64)
""",
        threads,
    )
    assert "fork" in out and "spawn" in out


@THREADS
def test_a_forked_child_may_load_its_own(threads: int) -> None:
    """What the message advises works, also when the parent has threads of that configuration."""
    _run(
        """
x, ids, weights = map(np.ascontiguousarray, batch)
def small(layer):
    return layer.forward(x[:1], ids[:1], weights[:1])
expected = layer.forward(*batch)
assert np.array_equal(small(layer), expected[:1])
def child():
    own = case.layer(pool=PoolConfig(threads))
    assert np.array_equal(own.forward(*batch), expected)
    assert np.array_equal(small(own), expected[:1])
assert in_child(child) == 0
assert np.array_equal(layer.forward(*batch), expected)
assert np.array_equal(small(layer), expected[:1])
""",
        threads,
    )


@THREADS
def test_a_forked_child_may_close_what_it_inherits(threads: int) -> None:
    """Also while a thread of the parent is about to build the layer's descriptor."""
    _run(
        """
layer._ready_lock.acquire()
assert in_child(layer.close) == 0
layer._ready_lock.release()
expected = layer.forward(*batch)
assert in_child(layer.close) == 0
assert np.array_equal(layer.forward(*batch), expected)
""",
        threads,
    )


@THREADS
def test_fork_while_another_thread_submits(threads: int) -> None:
    """A lock that is held at the fork never opens in the child."""
    _run(
        """
stop = threading.Event()
def submit():
    while not stop.is_set():
        layer.forward(*batch)
thread = threading.Thread(target=submit)
thread.start()
codes = [in_child(lambda: layer.forward(*batch)) for _ in range(20)]
stop.set()
thread.join()
assert codes == [17] * 20, codes
""",
        threads,
    )


@THREADS
def test_close_while_a_job_is_in_flight(threads: int) -> None:
    """The job keeps the weights that it reads."""
    _run(
        """
batch = random_batch(200, case.H, case.E, 2)
expected = layer.forward(*batch)
for _ in range(10):
    layer = case.layer(pool=PoolConfig(threads))
    job = layer.submit(*batch)
    layer.close()
    layer.close()
    gc.collect()
    assert np.array_equal(job.wait(), expected)
    job = case.layer(pool=PoolConfig(threads)).submit(*batch)
    gc.collect()
    assert np.array_equal(job.wait(), expected)
""",
        threads,
    )


@THREADS
@pytest.mark.parametrize("how", ["", "raise SystemExit(0)", "del layer, job; gc.collect()"])
def test_exit_with_jobs_in_flight(threads: int, how: str) -> None:
    """No crash at exit while workers are in the middle of long jobs."""
    _run(
        f"""
case = Case.random(MXFP4, 512, 512, E=8)
layer = case.layer(pool=PoolConfig(threads))
batch = random_batch(1500, case.H, case.E, 6)
for _ in range(12):
    job = layer.submit(*batch)
{how}
""",
        threads,
    )


@THREADS
def test_interrupts(threads: int) -> None:
    """Ctrl-C during a forward pass raises, and the threads go on working afterwards."""
    _run(
        """
case = Case.random(MXFP4, 512, 512, E=4)
layer = case.layer(pool=PoolConfig(threads))
batch = random_batch(60, case.H, case.E, 2)
expected = layer.forward(*batch)
signal.signal(signal.SIGINT, signal.default_int_handler)
for round in range(25):
    timer = threading.Timer(0.01 + 0.001 * round, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            layer.forward(*batch)
    except KeyboardInterrupt:
        pass
    timer.join()
    assert np.array_equal(layer.forward(*batch), expected)
""",
        threads,
    )


def test_interrupt_of_one_long_pass() -> None:
    """A pass that takes far longer than the interrupt's delay does not finish first."""
    _run(
        """
case = Case.random(MXFP4, 1024, 1024, E=4)
layer = case.layer(pool=PoolConfig(1))
batch = random_batch(2000, case.H, case.E, 4)
signal.signal(signal.SIGINT, signal.default_int_handler)
job = layer.submit(*batch)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    job.wait()
except KeyboardInterrupt:
    assert not job.done
else:
    raise AssertionError("the pass was not interrupted")
first = layer.forward(*[part[:2] for part in batch])
assert np.array_equal(job.wait()[:2], first)
"""
    )
