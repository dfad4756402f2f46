"""A group of worker pools: threads that sleep, spin or work inside one compiled loop.

Worker 0 is a thread that waits for a result (CPU tensors), so a group of n workers starts n - 1
threads. Of several waiting threads one is worker 0; when it leaves, another takes its place. A
group whose callers must not work (CUDA) starts a thread for worker 0 too.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybrid_moe.cpu_kernels import drivers, trace
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.affinity import bind_thread
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.tuning import AWAKE_SPIN_NS, SPIN_NS, WAIT_SPIN_NS
from hybrid_moe.locks import ProcessLock

FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}
"""Of the system call, by machine."""

_SUBMITTED = records.Group.word("submitted")
_COMPLETED = records.Group.word("completed")
_STOP = records.Group.word("stop")
_SPIN = records.Group.word("spin_ns")

_TIMEOUT_NS = 50_000_000  # of a caller's wait: Ctrl-C is seen after two of these at the latest
_forks = 0
"""Forks between the first process and this one. Asking the system for the process id would take
longer than everything else that a wait does in Python."""

_TAKE_OVER_S = 0.0005  # between two looks of a new worker 0 whether the place is free


def _function(name: str, arity: int) -> Callable[..., int]:
    # void pointers take any address or count, and convert in a third of the time of int64
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * arity)
    return kind(drivers.addresses()[name])


class PoolGroup:
    """The threads of one `PoolConfig` and their ring of jobs. Use `group_for`."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self._forks = _forks
        self._lock = threading.Lock()
        drivers.check_machine()
        self.control = control = records.Group.over(Arena(records.Group.nbytes).bytes)
        self._words = control.words  # the same, quicker to read one by one
        self.address = control.address
        control.spin_ns.value = SPIN_NS
        self._awake = 0
        self._awake_lock = threading.Lock()
        control.wait_spin_ns = WAIT_SPIN_NS
        control.futex = FUTEX_NUMBERS[platform.machine()]
        control.timeout_ns = control.timeout[1] = _TIMEOUT_NS
        trace.add_group(control)
        self._in_flight: dict[int, object] = {}
        """What jobs own, by number. Entries leave by `dict.pop`, which needs no lock."""
        self._starting: object = None
        self._try_launch = _function("try_launch", 2)
        self._help_until = _function("help_until", 5)
        self._wake_all = _function("wake_all", 1)
        self._work = _function("work", 3)
        self._become_worker0 = _function("become_worker0", 1)
        self._pools = config.worker_pools()
        self._caller_pool = self._pools[0]
        self._masks = config.worker_masks()
        self.caller_works = True
        self._background_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        try:
            for worker in range(1, config.threads):
                self._start(worker)
        except BaseException:
            self.stop()
            raise

    def _start(self, worker: int) -> None:
        """Start a worker's thread."""
        thread = threading.Thread(
            target=self._run, args=(worker,), name=f"hybrid_moe-{worker}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            wanted, started = self.config.threads, len(self._threads)
            by_caller = int(worker != 0)  # of the workers
            possible = started + by_caller
            fewer = f"ask for at most {possible} (cpuinfer_threads=, --threads), or "
            raise OSError(
                f"the system lets this process start {started} of the {wanted - by_caller} threads "
                f"that {wanted} worker(s) need ({error}): {fewer if possible else ''}raise the "
                "limit on processes and threads (ulimit -u, pids.max of the cgroup)"
            ) from error
        self._threads.append(thread)

    def _run(self, worker: int) -> None:
        bind_thread(self._masks[worker])
        while worker == 0 and not (self._become_worker0(self.address) or self._words[_STOP]):
            time.sleep(_TAKE_OVER_S)  # a caller that is worker 0 leaves within its time-out
        self._work(self.address, self._pools[worker], worker)

    def start_background_worker(self) -> None:
        """From now on callers do not work: a thread takes worker 0's place (CUDA tensors).

        It waits for a caller that is worker 0 at this moment, since both would use its scratch.

        Raises:
            OSError: the system allows no further thread.
        """
        with self._background_lock:
            if self.caller_works:
                self._start(0)
                self.caller_works = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Idle workers spin for AWAKE_SPIN_NS meanwhile, before they sleep: for a series of jobs
        with little between them, of a caller who does not want the cores himself. Scopes of several
        threads overlap."""
        self._count_awake(1)
        try:
            yield
        finally:
            self._count_awake(-1)

    def _count_awake(self, change: int) -> None:
        if self._forks != _forks:  # a scope that a fork has left: there is no control block
            return
        with self._awake_lock:
            self._awake += change
            self._words[_SPIN] = AWAKE_SPIN_NS if self._awake else SPIN_NS

    def check_process(self) -> None:
        """Raise in a forked child, where the workers do not exist, and after `stop`."""
        if self._forks != _forks:
            self._check_not_forked()
        if self._words[_STOP]:
            raise RuntimeError("the worker threads of hybrid_moe have been stopped")

    def _check_not_forked(self) -> None:
        if self._forks != _forks:
            raise RuntimeError(
                "the worker threads of hybrid_moe do not exist in a forked child process; "
                "load the model after the fork, or use the 'spawn' start method"
            )

    def submit(self, job: int, owned: object) -> int:
        """Route a job and hand it to the workers. It waits only while the ring is full.

        Args:
            job: address of its descriptor, which is copied into the ring. What routing has found
                is in it afterwards.
            owned: kept alive until the job is complete, even if nobody waits for it.

        Returns:
            The job's number, from 1 on; or -expert for an expert that is neither loaded nor
            skipped: then nothing runs.
        """
        self.check_process()
        if self._in_flight:
            self.release_completed()
        with self._lock:
            in_flight = self._in_flight
            # owned before it starts: an interrupt between these lines must not free its memory
            if self._starting is not None:
                newest = self._words[_SUBMITTED]
                in_flight[newest] = (in_flight.get(newest), self._starting)
            self._starting = owned
            oldest = self._words[_COMPLETED] + 1  # a full ring has it, or had
            while (sequence := self._try_launch(self.address, job)) == records.NO_ROOM:
                self._advance(oldest)
                self.check_process()  # stopped: nothing will make room
                oldest = self._words[_COMPLETED] + 1
            if sequence > 0:
                in_flight[sequence] = owned
            self._starting = None
            return sequence

    def _advance(self, sequence: int) -> int:
        """Wait a while for job `sequence`, as worker 0 if nobody else is; 1 when complete, or 0."""
        return self._help_until(self.address, sequence, self._caller_pool, 0, self.caller_works)

    def wait(self, sequence: int) -> None:
        """Return when job `sequence` is complete, working on it meanwhile where that is allowed."""
        self.check_process()
        while not self._advance(sequence):
            self.check_process()
        self._in_flight.pop(sequence, None)
        if self._in_flight:  # jobs that nobody has waited for
            self.release_completed()

    def release_completed(self) -> None:
        """Drop the references to what completed jobs owned."""
        completed = self._words[_COMPLETED]
        for sequence in list(self._in_flight):
            if sequence <= completed:
                self._in_flight.pop(sequence, None)

    @property
    def completed(self) -> int:
        """Number of the newest job that is complete."""
        self._check_not_forked()  # the child has no mapping of the control block
        return self._words[_COMPLETED]

    def is_complete(self, sequence: int) -> bool:
        """Whether job `sequence` is. What completed jobs owned is let go."""
        self._check_not_forked()  # the child has no mapping of the control block
        if self._words[_COMPLETED] < sequence:
            return False
        self.release_completed()
        return True

    def stop(self) -> None:
        """Stop the threads. The wait is bounded: a daemon thread may not hold up the exit."""
        if self._forks != _forks:
            return
        self._words[_STOP] = 1
        self._wake_all(self.address)
        for thread in self._threads:
            thread.join(timeout=1.0)


_groups: dict[PoolConfig, PoolGroup] = {}
_groups_lock = ProcessLock()
_inherited: list[object] = []  # the parent's groups in a forked child: unusable, never freed


def group_for(config: PoolConfig) -> PoolGroup:
    """The group of this configuration, started on first use and shared afterwards."""
    with _groups_lock:
        group = _groups.get(config)
        if group is None:
            group = _groups[config] = PoolGroup(config)
        return group


@atexit.register
def stop_all() -> None:
    """Stop every group before the interpreter is torn down."""
    for group in list(_groups.values()):
        group.stop()


def _start_anew_in_child() -> None:
    """The parent's threads do not exist in the child, which may start its own."""
    global _groups, _forks
    _forks += 1
    _inherited.append(_groups)
    _groups = {}


os.register_at_fork(after_in_child=_start_anew_in_child)
