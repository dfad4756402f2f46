"""Locks at a fork: what another thread holds in the parent is open in the child."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from hybrid_moe import locks
from hybrid_moe.locks import ProcessLock
from tests.cpu_kernels.toolbox import run_script

Trace = Callable[..., Any]


def test_a_process_lock_is_a_lock() -> None:
    lock = ProcessLock()
    with lock:
        assert not lock.acquire(timeout=0)
    assert lock.acquire(timeout=0)
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire()))
    thread.start()
    lock.release()
    thread.join()
    assert taken == [True]


def test_an_interrupt_leaves_it_open() -> None:
    """Ctrl-C at any event of Python code in the lock, on the way in and out."""
    lock = ProcessLock()
    for wanted in itertools.count(1):
        events = 0

        def trace(frame: FrameType, event: str, _: object, wanted: int = wanted) -> Trace:
            nonlocal events
            if frame.f_code.co_filename == locks.__file__:
                events += 1
                if events == wanted:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with lock:
                pass
        except KeyboardInterrupt:
            assert lock.acquire(timeout=0), f"taken for ever, after event {wanted}"
            lock.release()
        else:
            break
        finally:
            sys.settrace(before)
    assert lock.acquire(timeout=0)


def test_it_is_open_in_a_child() -> None:
    lock = ProcessLock()
    with lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if lock.acquire(timeout=0) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not lock.acquire(timeout=0), "the parent's is as it was"


_HOLD_ALL = """
import importlib, os, sys, threading
from pathlib import Path

for folder in ("hybrid_moe", "cpu_kernels", "loaders"):
    for file in sorted(Path(folder).rglob("*.py")):
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        name = name if name.startswith("hybrid_moe") else "hybrid_moe." + name
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:  # SGLang is not installed everywhere
            assert "sglang" in name or "sglang" in str(error), (name, error)

from hybrid_moe.cpu_kernels.jit import compile
from hybrid_moe.locks import ProcessLock
compile._FORK_PATIENCE_S = 0.1

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition,
         threading.Semaphore, ProcessLock)

def found(value, path, seen, depth=0):
    "(path, lock) of all locks that a module, a class or an object of ours leads to."
    if id(value) in seen or depth > 5:
        return
    seen.add(id(value))
    if isinstance(value, LOCKS):
        yield path, value
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield from found(item, f"{path}[{key!r}]", seen, depth + 1)
    elif isinstance(value, type):
        if value.__module__.startswith("hybrid_moe"):
            for key, item in list(vars(value).items()):
                yield from found(item, f"{path}.{key}", seen, depth + 1)
    elif type(value).__module__.startswith("hybrid_moe") and hasattr(value, "__dict__"):
        for key, item in list(vars(value).items()):
            yield from found(item, f"{path}.{key}", seen, depth + 1)

def all_locks():
    result = {}
    for name, module in sorted(sys.modules.items()):
        # a child cannot use CUDA if its parent did
        if name.startswith("hybrid_moe") and name != "hybrid_moe.streams.cuda":
            for key, value in list(vars(module).items()):
                result.update(found(value, f"{name}.{key}", set()))
    return result

def is_open(lock):
    return lock.acquire(timeout=0)

locks = all_locks()
print(len(locks), sorted(locks))
held = set()
def hold():
    for lock in locks.values():
        if id(lock) not in held:
            held.add(id(lock))
            assert is_open(lock)
thread = threading.Thread(target=hold)
thread.start()
thread.join()
pid = os.fork()
if pid == 0:
    inherited = {path for path, lock in all_locks().items() if not is_open(lock) }
    # the same lock under two names is taken by the first
    names = {}
    for path, lock in all_locks().items():
        names.setdefault(id(lock), []).append(path)
    bad = [paths for paths in names.values() if all(path in inherited for path in paths)]
    print("held in the child:", bad, flush=True)
    os._exit(len(bad))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_no_lock_of_the_package_stays_held_in_a_child() -> None:
    """Locks of modules, classes, and the objects that modules hold. (`cached_property` has its own
    until Python 3.12, held for the microseconds in which a value is computed.)"""
    result = run_script(_HOLD_ALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hybrid_moe.cpu_kernels.jit.compile._compile_lock" in result.stdout
    assert "hybrid_moe.streams.buffers.BUFFERS._lock" in result.stdout


_FORK_WHILE_COMPILING = """
import os, signal, sys, threading
import numpy as np
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.jit.compile import emit_object
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch
from tests.cpu_kernels.jit.test_jit import _text

case = Case.random(MXFP4, 64, 96)
batch = random_batch(3, case.H, case.E, 2)
expected = case.layer().forward(*batch)
stop = threading.Event()
compiled = 0
def compile_all_the_time():
    global compiled
    while not stop.is_set():
        compiled += 1
        emit_object(_text(compiled), PORTABLE.target, "answer")
thread = threading.Thread(target=compile_all_the_time)
thread.start()
codes = []
for number in range(15):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        emit_object(_text(1_000_000 + number), PORTABLE.target, "answer")
        os._exit(0 if np.array_equal(case.layer().forward(*batch), expected) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
thread.join()
assert codes == [0] * 15, codes
assert compiled > 15
"""


def test_fork_while_another_thread_compiles() -> None:
    """The child compiles, too: neither our lock nor LLVM's is in somebody else's hands."""
    result = run_script(_FORK_WHILE_COMPILING, HYBRID_MOE_CACHE_DIR="/proc/nowhere")
    assert result.returncode == 0, result.stdout + result.stderr
