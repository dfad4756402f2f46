"""Spans of compiled code -> events of Chrome's trace format, which Perfetto shows.

Rows of a pool group: its jobs with their phases inside, each worker's tasks, and each thread that
calls: what it submits, its waits, and "torch", the time between them. Times are microseconds since
the trace began.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers import records

Event = dict[str, Any]

PHASES = {
    records.ENCODE: "encode",
    records.GATE_UP: "gate·up",
    records.DOWN: "down",
    records.DOWN_BY_PAIR: "down by pair",
    records.COMBINE: "combine",
    records.ZERO: "zero",
    records.LINEAR: "linear",
    records.ATTEND: "attend",
    records.MERGE: "merge",
}
"""Names of phases."""

BETWEEN = "torch"
"""What a thread does between a wait and the next submission, as far as this package knows."""

_ROWS = 1_000_000_000
_GROUP_ROWS = 10_000
"""Rows of a group have numbers from _ROWS + _GROUP_ROWS * group on, which no thread of the system
has: its jobs, then its workers. Threads that call have their own numbers."""


@dataclass(frozen=True)
class GroupSpans:
    """What the threads of a group did.

    Attributes:
        number: of the group in its process.
        spans: `records.Span` [any], in no order.
        lost: how many more there were.
    """

    number: int
    spans: npt.NDArray[Any]
    lost: int = 0


def events(
    groups: Iterable[GroupSpans], labels: Sequence[str], begin: int, end: int
) -> list[Event]:
    """Events of a trace.

    Args:
        groups: with spans in nanoseconds.
        labels: names of jobs by `records.Layer.label`.
        begin, end: of the trace, nanoseconds.
    """
    made: list[Event] = [_named("process_name", 0, f"hybrid_moe {os.getpid()}")]
    callers: dict[int, list[Event]] = {}
    for group in groups:
        if not len(group.spans):
            continue  # it had nothing to do: no rows
        row = _ROWS + _GROUP_ROWS * group.number
        of_group = f" of group {group.number}" if group.number else ""
        names = _names(group.spans, labels)
        made += _jobs(group, names, row, begin, of_group)
        made += _tasks(group, names, row, begin, of_group)
        for thread, event in _calls(group, names, begin):
            callers.setdefault(thread, []).append(event)
        if group.lost:
            text = f"truncated: {group.lost} spans{of_group} found no room"
            made.append({"ph": "i", "s": "g", "name": text, "ts": _us(end - begin), **_at(row)})
    threads = {t.native_id: t.name for t in threading.enumerate()}
    for thread, calls in callers.items():
        calls.sort(key=lambda event: float(event["ts"]))
        made.append(_named("thread_name", thread, f"caller {threads.get(thread, thread)}"))
        made += calls
        made += _between(calls, thread)
    return made


def _us(nanoseconds: int) -> float:
    return int(nanoseconds) / 1000


def _at(row: int) -> Event:
    return {"pid": os.getpid(), "tid": row}


def _named(what: str, row: int, name: str) -> Event:
    return {"ph": "M", "name": what, "args": {"name": name}, **_at(row)}


def _span(name: str, row: int, begin: int, end: int, **args: Any) -> Event:
    """A complete event; `begin` and `end` are nanoseconds since the trace began."""
    event = {"ph": "X", "name": name, "ts": _us(begin), "dur": _us(end - begin), **_at(row)}
    return {**event, "args": args} if args else event


def _names(spans: npt.NDArray[Any], labels: Sequence[str]) -> dict[int, str]:
    """Job number -> name, of jobs whose submission is in the trace."""
    submitted = spans[spans["kind"] == records.SPAN_SUBMIT]
    numbers = zip(submitted["sequence"].tolist(), submitted["label"].tolist(), strict=True)
    return {sequence: labels[number] for sequence, number in numbers}


def _phase(kind: int) -> str:
    return PHASES.get(kind, f"phase of kind {kind}")


def _name(names: dict[int, str], sequence: int) -> str:
    return names.get(sequence, f"job {sequence}")


def _jobs(
    group: GroupSpans, names: dict[int, str], row: int, start: int, of_group: str
) -> list[Event]:
    """Jobs, from their first task to the end of their last, and their phases likewise."""
    made = [_named("thread_name", row, f"jobs{of_group}")]
    tasks = group.spans[group.spans["kind"] == records.SPAN_TASK]
    if not len(tasks):
        return made
    tasks = tasks[np.lexsort((tasks["detail"], tasks["sequence"]))]
    key = np.stack([tasks["sequence"], tasks["detail"]])
    first = np.flatnonzero(np.any(np.diff(key, axis=1, prepend=-1) != 0, axis=0))
    begins = np.minimum.reduceat(tasks["begin"], first) - start
    ends = np.maximum.reduceat(tasks["end"], first) - start
    phases: dict[int, list[Event]] = {}
    for at, begin, end in zip(first, begins, ends, strict=True):
        sequence = int(tasks["sequence"][at])
        kind = int(tasks["detail"][at]) % records.SPAN_KINDS
        phase = _span(_phase(kind), row, begin, end)
        phases.setdefault(sequence, []).append(phase)
    submitted = group.spans[group.spans["kind"] == records.SPAN_SUBMIT]
    tokens = dict(zip(submitted["sequence"].tolist(), submitted["detail"].tolist(), strict=True))
    bounds = np.flatnonzero(np.diff(tasks["sequence"], prepend=-1))
    begins = np.minimum.reduceat(tasks["begin"], bounds) - start
    ends = np.maximum.reduceat(tasks["end"], bounds) - start
    for at, begin, end in zip(bounds, begins, ends, strict=True):
        sequence = int(tasks["sequence"][at])
        made.append(
            _span(
                _name(names, sequence),
                row,
                begin,
                end,
                job=sequence,
                tokens=tokens.get(sequence),
            )
        )
        made += phases[sequence]
    return made


def _tasks(
    group: GroupSpans, names: dict[int, str], row: int, start: int, of_group: str
) -> list[Event]:
    tasks = group.spans[group.spans["kind"] == records.SPAN_TASK]
    workers = np.unique(tasks["thread"]).tolist()
    made = [_named("thread_name", row + 1 + w, f"worker {w}{of_group}") for w in workers]
    for task in tasks:
        begin, end, _, worker, sequence, detail, *_ = map(int, task.tolist())
        name = f"{_phase(detail % records.SPAN_KINDS)}, {_name(names, sequence)}"
        made.append(_span(name, row + 1 + worker, begin - start, end - start, job=sequence))
    return made


def _calls(group: GroupSpans, names: dict[int, str], start: int) -> Iterable[tuple[int, Event]]:
    """Submissions and waits, each with its thread."""
    verbs = {records.SPAN_SUBMIT: "submit", records.SPAN_WAIT: "wait for"}
    for span in group.spans[group.spans["kind"] != records.SPAN_TASK]:
        begin, end, kind, thread, sequence, *_ = map(int, span.tolist())
        name = f"{verbs[kind]} {_name(names, sequence)}"
        yield thread, _span(name, thread, begin - start, end - start, job=sequence)


def _between(calls: Sequence[Event], thread: int) -> list[Event]:
    """The time between a thread's calls, which are in order."""
    made, end = [], float(calls[0]["ts"])
    for call in calls:
        if call["ts"] > end:
            begin = end
            event = {"ph": "X", "name": BETWEEN, "ts": begin, "dur": round(call["ts"] - end, 3)}
            made.append({**event, **_at(thread)})
        end = max(end, round(call["ts"] + call["dur"], 3))
    return made
