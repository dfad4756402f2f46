"""A job is any list of phases: threads know no more of it than its tasks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.drivers import worker
from hybrid_moe.cpu_kernels.drivers.patience import NS_PER_MAC, progress
from hybrid_moe.cpu_kernels.drivers.records import MAX_PHASES, Entry, Group, Phase
from hybrid_moe.cpu_kernels.drivers.route import add_tasks, append_phase
from tests.streams.interpreted import interpret

Phases = list[tuple[int, int]]
"""(kind, tasks)."""


def never() -> None:
    raise AssertionError("it waits")


def published(group: Group, phases: Phases) -> Entry:
    """The next job of the group: tasks of one pool, each of 1 + index units or one less. A unit is
    10 * kind multiply-adds."""
    sequence = group.submitted.value + 1
    entry = worker.ring_entry(group, sequence)
    worker.open_entry(entry, sequence)
    entry.job.pools = 1
    entry.phase_count.value = entry.task_ns.value = 0
    for index, (kind, tasks) in enumerate(phases):
        units = max(0, (1 + index) * tasks - 1)
        add_tasks(entry, append_phase(entry, kind), 0, units, tasks, 10 * kind)
    worker.publish(group, entry)
    return entry


jobs = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=MAX_PHASES
).filter(lambda phases: phases[-1][1] > 0)  # some task must end the job


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(jobs, min_size=1, max_size=4))
def test_tasks_run_once_and_phase_by_phase(
    monkeypatch: pytest.MonkeyPatch, programs: list[Phases]
) -> None:
    with monkeypatch.context() as patch:
        interpret(patch, never)
        ran: list[tuple[int, int, int]] = []

        def run_task(entry: Entry, phase: Phase, pool: int, task: int, worker: int) -> None:
            ran.append((phase.kind, phase.units[pool], task))

        patch.setattr(worker, "run_task", run_task)
        patch.setattr(worker, "enter", lambda layer: 0)
        group = Group.new()
        for number, phases in enumerate(programs, start=1):
            ran.clear()
            entry = published(group, phases)
            assert group.completed.value == number - 1
            largest = [
                10 * kind * -(-((1 + index) * tasks - 1) // tasks)
                for index, (kind, tasks) in enumerate(phases)
                if tasks
            ]
            assert entry.task_ns.value == NS_PER_MAC * max(largest)
            before = progress(group)
            worker.participate(group, number, 0, 0, 0)
            assert ran == [
                (kind, (1 + index) * tasks - 1, task)
                for index, (kind, tasks) in enumerate(phases)
                for task in range(tasks)
            ]
            assert group.completed.value == number and progress(group) != before


def test_a_late_thread_finds_no_task_in_a_shorter_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry holds a later job, which has fewer phases; what is left of the older one is
    closed."""
    interpret(monkeypatch, never)
    monkeypatch.setattr(worker, "ring_entry", lambda group, sequence: group.ring[0])
    group = Group.new()
    entry = published(group, [(1, 3), (2, 3), (3, 3)])
    published(group, [(1, 2)])
    for index in range(MAX_PHASES):
        assert worker.claim(entry.phases[index], 1, 0) == -1
        assert worker.phase_is_done(entry, 1, index)
    assert [worker.claim(entry.phases[0], 2, 0) for _ in range(3)] == [0, 1, -1]
    assert worker.claim(entry.phases[1], 2, 0) == -1


def test_who_counts_a_task_late_completes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has counted the last task of a phase and is put aside. Others end the job, and its
    entry takes one whose last phase has that index: the job that is complete stays the newest."""
    interpret(monkeypatch, never)
    monkeypatch.setattr(worker, "ring_entry", lambda group, sequence: group.ring[0])
    monkeypatch.setattr(worker, "run_task", lambda *arguments: None)
    monkeypatch.setattr(worker, "enter", lambda layer: 0)
    group = Group.new()
    entry = published(group, [(1, 1), (2, 1), (3, 1)])
    end_phase = worker.end_phase

    def put_aside(group: Group, sequence: int, is_last: int) -> None:
        if sequence == 1 and not is_last:
            group.completed.value = group.submitted.value = 6  # as if all these had come and gone
            published(group, [(1, 1)])
        end_phase(group, sequence, is_last)

    monkeypatch.setattr(worker, "end_phase", put_aside)
    assert worker.take_tasks(group, entry, 1, 0, 0, 0, 0, 1) == 1
    assert group.completed.value == 6 and group.submitted.value == 7
