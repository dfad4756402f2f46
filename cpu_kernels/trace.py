"""Traces: what the threads of every pool did, and when, in Chrome's trace format.

`HYBRID_MOE_TRACE=FILE` traces a process from its first pool to its end; `tracing(FILE)` a part of
it. Compiled code notes spans into memory (`drivers.spans`), and `trace_file` makes events of them
when the trace ends. What only Python knows of, copies to a GPU and decisions, `note` keeps.
Each group has room for `ROOM` spans; what comes later is not kept, which the file and a warning
say. So neither memory (16 MiB a group) nor the file grow without end, and no thread waits.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import platform
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.trace_file import GroupSpans, TraceNote, events
from hybrid_moe.locks import ProcessLock

_log = logging.getLogger(__name__)

VARIABLE = "HYBRID_MOE_TRACE"

ROOM = 1 << 18
"""Spans of a group: those of some 200 tokens of a model with 24 layers."""

_GETTID = {"x86_64": 186, "aarch64": 178}

_labels: list[str] = ["job"]
_label_numbers: dict[str, int] = {"job": 0}
_lock = ProcessLock()


def label(name: str) -> int:
    """The number under which a layer's descriptor has the name of its jobs."""
    with _lock:
        number = _label_numbers.get(name)
        if number is None:
            number = _label_numbers[name] = len(_labels)
            _labels.append(name)
        return number


@dataclass
class _Notes:
    """A group and the memory that its threads write to, which stays: a thread may be late."""

    control: records.Group
    spans: npt.NDArray[Any]
    trace: records.Trace


class NoteSource(Protocol):
    """Whoever knows of something late, such as when a GPU was done."""

    def note_all(self) -> None:
        """`note` all that has not been noted."""


class _Recorder:
    """The groups of this process, and whether they are traced."""

    def __init__(self) -> None:
        self._notes: list[_Notes] = []
        self._groups: list[records.Group] = []
        self._path: Path | None = None
        self._python: list[TraceNote] = []
        self._lost_notes = 0
        self._sources: weakref.WeakSet[NoteSource] = weakref.WeakSet()
        self._begin = 0
        self._lock = ProcessLock()
        self._given = os.environ.get(VARIABLE)

    def add_group(self, control: records.Group) -> None:
        """A group begins; its threads do not run yet."""
        with self._lock:
            self._groups.append(control)
            if self._given:
                path, self._given = Path(self._given), None
                try:
                    self._begin_file(path)
                except OSError as error:
                    _log.warning("%s: no trace is written: %s", VARIABLE, error)
            if self._path is not None:
                self._record(control)

    def start(self, path: str | Path) -> None:
        with self._lock:
            if self._path is not None:
                raise RuntimeError(f"a trace is being written already, to {self._path}")
            self._begin_file(Path(path))
            for control in self._groups:
                self._record(control)

    def _begin_file(self, path: Path) -> None:
        path.touch()  # a folder that cannot be written is an error now, not at the end
        self._path, self._begin = path.absolute(), time.monotonic_ns()
        self._python, self._lost_notes = [], 0

    def _record(self, control: records.Group) -> None:
        """Let a group's threads write."""
        for notes in self._notes:
            if notes.control is control:
                break
        else:
            spans = Arena(ROOM * records.Span.nbytes).bytes
            spans.fill(0)  # so that no thread meets a page fault
            trace = records.Trace.new()
            trace.room, trace.gettid = ROOM, _GETTID[platform.machine()]
            trace.words[records.Trace.word("spans")] = spans.ctypes.data
            notes = _Notes(control, spans.view(records.Span.dtype), trace)
            self._notes.append(notes)
        notes.spans["written"][: min(ROOM, notes.trace.taken.value)] = 0
        notes.trace.taken.value = 0
        control.trace.value = notes.trace.address  # last: threads may write from here on

    def is_recording(self) -> bool:
        """Whether a trace is being written."""
        return self._path is not None

    def note(self, note: TraceNote) -> None:
        """Keep a note, unless it is of before the trace or finds no room."""
        if self._path is not None and note.begin >= self._begin:
            if len(self._python) < ROOM:
                self._python.append(note)
            else:
                self._lost_notes += 1

    def add_source(self, source: NoteSource) -> None:
        """Ask `source` for its notes when a trace ends; it is not kept alive."""
        self._sources.add(source)

    def stop(self) -> None:
        """End the trace, and write its file."""
        if not self.is_recording():  # without the lock: at exit a thread may hold it for good
            return
        for source in list(self._sources):
            source.note_all()
        with self._lock:
            path, self._path = self._path, None
            if path is None:
                return
            end = time.monotonic_ns()
            for control in self._groups:
                control.trace.value = 0
            groups = [self._spans(notes) for notes in self._notes]
        lost = sum(group.lost for group in groups) + self._lost_notes
        content = {
            "traceEvents": events(groups, _labels, self._begin, end, self._python),
            "displayTimeUnit": "ns",
            "otherData": {"spans that found no room": lost},
        }
        path.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False))
        if lost:
            _log.warning(
                "%s is truncated: there was room for %d spans of a pool group, and %d came later",
                path,
                ROOM,
                lost,
            )

    def _spans(self, notes: _Notes) -> GroupSpans:
        taken = notes.trace.taken.value
        kept = notes.spans[: min(ROOM, taken)]
        # one that is half written, or begun before the trace, is of a thread that came late
        kept = kept[(kept["written"] == 1) & (kept["begin"] >= self._begin)]
        return GroupSpans(self._groups.index(notes.control), kept.copy(), max(0, taken - ROOM))

    def forget(self) -> None:
        """In a forked child: the parent's threads, memory and file are not the child's."""
        self._notes, self._groups, self._path, self._given = [], [], None, None
        self._python, self._sources = [], weakref.WeakSet()


_recorder = _Recorder()
add_group = _recorder.add_group
is_recording = _recorder.is_recording
note = _recorder.note
add_source = _recorder.add_source
os.register_at_fork(after_in_child=_recorder.forget)
atexit.register(_recorder.stop)  # behind `group.stop_all`, which is registered later


@contextlib.contextmanager
def tracing(path: str | Path) -> Iterator[None]:
    """Trace what the pools of this process do inside the `with`, and write it to a file.

    Args:
        path: of the file, in Chrome's trace format (open it in https://ui.perfetto.dev).

    Raises:
        OSError: the file cannot be written. RuntimeError: a trace is under way.
    """
    _recorder.start(path)
    try:
        yield
    finally:
        _recorder.stop()
