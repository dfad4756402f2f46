"""Spans of compiled code -> events of Chrome's trace format, which Perfetto shows.

Rows of a pool group: its jobs with their phases inside, each worker's tasks, and each thread that
calls: what it submits, its waits, and "torch", the time between them. An arrow leads from each
submission to its job, and on to the end of the wait for it: deferred experts are those whose arrow
passes over other jobs. Rows of their own have what Python has noted (`TraceNote`): transfers,
decisions, a GPU's parts. Times are microseconds since the trace began.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
_NOTE_ROWS = _ROWS - _GROUP_ROWS
"""Rows of a group have numbers from _ROWS + _GROUP_ROWS * group on, which no thread of the system
has: its jobs, then its workers. Before them are the rows of notes. Threads that call have their own
numbers."""


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


@dataclass(frozen=True)
class TraceNote:
    """Something that no pool's thread has done.

    Attributes:
        row: the name of its row.
        name: what it was.
        begin, end: `time.monotonic_ns`.
        facts: what else is to be seen of it.
        flow: notes of one flow are joined by arrows, in the order of their times; None for none.
    """

    row: str
    name: str
    begin: int
    end: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    flow: str | None = None


def events(
    groups: Iterable[GroupSpans],
    labels: Sequence[str],
    begin: int,
    end: int,
    notes: Sequence[TraceNote] = (),
) -> list[Event]:
    """Events of a trace.

    Args:
        groups: with spans in nanoseconds.
        labels: names of jobs by `records.Layer.label`.
        begin, end: of the trace, nanoseconds.
        notes: of Python.
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
        made += _arrows(group, names, row, begin)
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
    return made + _noted(notes, begin)


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


def _arrows(group: GroupSpans, names: dict[int, str], row: int, start: int) -> Iterable[Event]:
    """From each submission to its job and to the end of the last wait for it."""
    spans = group.spans
    first: dict[int, int] = {}
    tasks = spans[spans["kind"] == records.SPAN_TASK]
    for sequence, begin in zip(tasks["sequence"].tolist(), tasks["begin"].tolist(), strict=True):
        first[sequence] = min(begin, first.get(sequence, begin))
    ends: dict[int, tuple[int, int]] = {}
    for span in spans[spans["kind"] == records.SPAN_WAIT]:
        sequence = int(span["sequence"])
        ends[sequence] = max((int(span["end"]), int(span["thread"])), ends.get(sequence, (0, 0)))
    for span in spans[spans["kind"] == records.SPAN_SUBMIT]:
        sequence = int(span["sequence"])
        if sequence not in first:
            continue
        steps = [(int(span["end"]) - 1, int(span["thread"])), (first[sequence], row)]
        if sequence in ends:  # a GPU's stream waits without a thread
            end, waiter = ends[sequence]
            steps.append((end - 1, waiter))
        flow = f"{row} {sequence}"
        yield from _flow(_name(names, sequence), flow, [(t - start, at) for t, at in steps])


def _flow(name: str, flow: str, steps: Sequence[tuple[int, int]]) -> Iterable[Event]:
    """An arrow through (nanoseconds since the trace began, row), within events that are there."""
    for at, (moment, row) in enumerate(steps):
        phase = "s" if at == 0 else "f" if at == len(steps) - 1 else "t"
        event = {"ph": phase, "name": name, "cat": "flow", "id": flow, "ts": _us(moment)}
        yield {**event, **_at(row), **({"bp": "e"} if phase == "f" else {})}


def _noted(notes: Sequence[TraceNote], start: int) -> list[Event]:
    """Rows of what Python has noted, and the arrows between."""
    rows = {name: _NOTE_ROWS + at for at, name in enumerate(dict.fromkeys(n.row for n in notes))}
    made = [_named("thread_name", row, name) for name, row in rows.items()]
    flows: dict[str, list[TraceNote]] = {}
    for note in notes:
        begin, end = note.begin - start, note.end - start
        made.append(_span(note.name, rows[note.row], begin, end, **note.facts))
        if note.flow is not None:
            flows.setdefault(note.flow, []).append(note)
    for flow, through in flows.items():
        if len(through) > 1:
            through.sort(key=lambda note: note.begin)
            steps = [(note.begin - start, rows[note.row]) for note in through]
            made += _flow(flow, flow, steps)
    return made


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
