"""A group of worker pools: threads that sleep, spin or work inside one compiled loop.

Worker 0 is the thread that waits for a result (CPU tensors), so a pool of n threads starts n - 1.
A group whose callers must not work (CUDA) starts a thread for worker 0 too.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig

logger = logging.getLogger(__name__)

Slots = npt.NDArray[np.int64]

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_TIMEOUT_NS = 50_000_000  # Ctrl-C is seen at least this often
_SPIN_PAUSES = 1_000  # about 50 us: torch's own threads want the cores when we are idle
_RETAINED_WORKSPACES = 2


def _function(name: str, arity: int) -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arity)
    return kind(drivers.addresses()[name])


class Workspace:
    """Memory that one job borrows: staging, routing, encoded rows, the workers' scratch."""

    def __init__(self, nbytes: int) -> None:
        self.arena = Arena(nbytes)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def reset(self) -> None:
        self._used = 0

    def take(self, nbytes: int) -> int:
        """Address of `nbytes` more bytes, on a cache line."""
        at = self._used
        self._used = -(-(at + nbytes) // 64) * 64
        if self._used > self.nbytes:
            raise AssertionError("a job took more scratch than it had announced")
        return self.arena.address + at

    def copy(self, array: npt.NDArray[np.generic]) -> int:
        """Address of a copy of `array`, C-contiguous."""
        address = self.take(array.nbytes)
        if array.nbytes:
            at = address - self.arena.address
            target = self.arena.bytes[at : at + array.nbytes].view(array.dtype)
            np.copyto(target.reshape(array.shape), array)
        return address


@dataclass(frozen=True)
class Submission:
    """What routing found: the job's number, ids out of range, an expert that is not loaded or -1.

    A job with a missing expert has not been published.
    """

    sequence: int
    ignored: int
    missing: int


class PoolGroup:
    """The threads of one `PoolConfig` and their ring of jobs. Use `group_for`."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._workspaces: list[Workspace] = []
        self._block = Arena(8 * f.GROUP_SLOTS)
        self._slots: Slots = self._block.bytes.view(np.int64)
        self.address = self._block.address
        futex = _SYS_FUTEX.get(platform.machine())
        if futex is None:
            raise NotImplementedError(f"no worker pools on {platform.machine()} yet")
        self._slots[f.G_SPIN] = _SPIN_PAUSES
        self._slots[f.G_FUTEX] = futex
        self._slots[f.G_TIMEOUT_NS] = _TIMEOUT_NS
        self._slots[f.G_TIMESPEC : f.G_TIMESPEC + 2] = (0, _TIMEOUT_NS)
        self._in_flight: dict[int, object] = {}
        self._worker0 = threading.Lock()  # held by the one waiting thread that works
        self._lock_ring = _function("lock_ring", 1)
        self._unlock_ring = _function("unlock_ring", 1)
        self._open_slot = _function("open_slot", 2)
        self._prepare = _function("prepare", 1)
        self._publish = _function("publish", 2)
        self._help_until = _function("help_until", 5)
        self._wake_all = _function("wake_all", 1)
        self._work = _function("work", 3)
        self._pools = config.worker_pools()
        self._cpus = config.worker_cpus()
        self.caller_works = True
        self._threads = [self._start(worker) for worker in range(1, config.threads)]

    def _start(self, worker: int) -> threading.Thread:
        thread = threading.Thread(
            target=self._run, args=(worker,), name=f"hybrid_moe-{worker}", daemon=True
        )
        thread.start()
        return thread

    def _run(self, worker: int) -> None:
        try:
            os.sched_setaffinity(0, {self._cpus[worker]})  # 0 is this thread
        except OSError as error:
            logger.warning("worker %d is not pinned: %s", worker, error)
        while self._work(self.address, self._pools[worker], worker) == 0:
            continue

    def start_background_worker(self) -> None:
        """From now on callers never work: a thread takes worker 0's place (CUDA tensors)."""
        with self._lock:
            if self.caller_works:
                self.caller_works = False
                self._threads.append(self._start(0))

    def check_process(self) -> None:
        """Raise in a forked child, where the workers do not exist."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "the worker threads of hybrid_moe do not exist in a forked child process; "
                "load the model after the fork, or use the 'spawn' start method"
            )
        if self._slots[f.G_STOP]:
            raise RuntimeError("the worker threads of hybrid_moe have been stopped")

    def borrow(self, nbytes: int) -> Workspace:
        """A workspace of at least `nbytes`; give it back with `give_back`."""
        with self._lock:
            for index, workspace in enumerate(self._workspaces):
                if workspace.nbytes >= nbytes:
                    return self._workspaces.pop(index)
        return Workspace(nbytes)

    def give_back(self, workspace: Workspace) -> None:
        """Keep the largest few for later jobs."""
        workspace.reset()
        with self._lock:
            self._workspaces.append(workspace)
            self._workspaces.sort(key=lambda w: w.nbytes)
            del self._workspaces[: -_RETAINED_WORKSPACES]

    def clear_workspaces(self) -> None:
        """Drop scratch that no job uses."""
        with self._lock:
            self._workspaces.clear()

    def submit(self, fill: Callable[[Slots], None], owned: object) -> Submission:
        """Route and publish a job.

        Args:
            fill: writes the job's slots; called with the ring slot's view.
            owned: kept alive until the job is complete, even if nobody waits for it.
        """
        self.check_process()
        with self._lock:
            while self._pending() >= f.RING - 2:  # a host function may take one slot meanwhile
                self._advance(int(self._slots[f.G_COMPLETED]) + 1)
            self._forget_completed()
            self._lock_ring(self.address)
            try:
                return self._publish_next(fill, owned)
            finally:
                self._unlock_ring(self.address)

    def _pending(self) -> int:
        return int(self._slots[f.G_SUBMITTED]) - int(self._slots[f.G_COMPLETED])

    def _publish_next(self, fill: Callable[[Slots], None], owned: object) -> Submission:
        sequence = int(self._slots[f.G_SUBMITTED]) + 1
        start = f.G_RING + (sequence % f.RING) * f.JOB_SLOTS
        address = self.address + 8 * start
        self._open_slot(address, sequence)
        job = self._slots[start : start + f.JOB_SLOTS]
        job[f.J_POOLS] = self.config.pools
        fill(job)
        missing = self._prepare(address)
        submission = Submission(sequence, int(job[f.J_IGNORED]), missing - 1)
        if missing == 0:
            self._in_flight[sequence] = owned
            self._publish(self.address, address)
        return submission

    def _forget_completed(self) -> None:
        completed = int(self._slots[f.G_COMPLETED])
        for sequence in [s for s in self._in_flight if s <= completed]:
            del self._in_flight[sequence]

    def _advance(self, sequence: int) -> bool:
        """Wait a while for job `sequence`, as worker 0 if nobody else is; true when complete."""
        assist = self.caller_works and self._worker0.acquire(blocking=False)
        try:
            return bool(
                self._help_until(self.address, sequence, self._pools[0], 0, int(assist))
            )
        finally:
            if assist:
                self._worker0.release()

    def wait(self, sequence: int) -> None:
        """Return when job `sequence` is complete, working on it meanwhile where that is allowed."""
        self.check_process()
        while not self._advance(sequence):
            self.check_process()

    def is_complete(self, sequence: int) -> bool:
        return int(self._slots[f.G_COMPLETED]) >= sequence

    def stop(self) -> None:
        """Stop the threads; bounded, since a daemon thread may not hold up the exit."""
        if os.getpid() != self._pid:
            return
        self._slots[f.G_STOP] = 1
        self._wake_all(self.address)
        for thread in self._threads:
            thread.join(timeout=1.0)


_groups: dict[PoolConfig, PoolGroup] = {}
_groups_lock = threading.Lock()


def group_for(config: PoolConfig) -> PoolGroup:
    """The group of this configuration, started on first use and shared afterwards."""
    with _groups_lock:
        group = _groups.get(config)
        if group is None:
            group = _groups[config] = PoolGroup(config)
        return group


@atexit.register
def stop_all() -> None:
    """Stop every group before the interpreter takes itself apart."""
    for group in list(_groups.values()):
        group.stop()


def _forget_lock_in_child() -> None:
    """A lock that another thread held at the fork would never open in the child."""
    global _groups_lock
    _groups_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock_in_child)

