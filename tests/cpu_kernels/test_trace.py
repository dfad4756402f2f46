"""Traces are valid, their times nest and cover, and off they cost a load of a word."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.drivers import records, spans, worker
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.trace_file import BETWEEN, GroupSpans, TraceNote, events
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch, random_matrix
from tests.cpu_kernels.pool.test_phases import published
from tests.cpu_kernels.toolbox import run_script
from tests.streams.interpreted import interpret

H, I, E = 64, 96, 4
POOLS = {"one": PoolConfig(2), "two": PoolConfig(1), "pools": PoolConfig(2, 2)}
JOBS, TOKENS = 5, (1, 9)
TOUCHING = 1e-3
"""Microseconds: a file's times are nanoseconds, so what touches may differ by rounding."""

Event = dict[str, Any]


def _work(layers: dict[str, Any], name: str) -> None:
    experts, dense = layers[name]
    for tokens in TOKENS:
        x, ids, weights = random_batch(tokens, H, E, 2)
        for _ in range(JOBS):
            experts.forward(x, ids, weights)
            dense.forward(x)


@pytest.fixture(scope="module")
def layers() -> dict[str, Any]:
    case, rng = Case.random(MXFP4, H, I, E=E), np.random.default_rng(1)
    made = {}
    for name, pool in POOLS.items():
        experts = case.layer(pool=pool)
        experts.name = f"experts of {name}"
        matrix = PackedMatrix(MXFP4, 192, H, pool)
        matrix.load(random_matrix(MXFP4, rng, 192, H))
        made[name] = (experts, DenseLayer([matrix], name=f"linear of {name}"))
        _work(made, name)  # threads start, kernels compile
    return made


@pytest.fixture(scope="module")
def traced(layers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """Events while a thread for each group works."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    threads = [threading.Thread(target=_work, args=(layers, name), name=name) for name in POOLS]
    with trace.tracing(path):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    content = json.loads(path.read_text())
    assert content["otherData"] == {"spans that found no room": 0}
    found: list[Event] = content["traceEvents"]
    return found


def _rows(events: list[Event]) -> dict[str, list[Event]]:
    """Complete events in order by the name of their row."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(set(names.values())) == len(names)
    rows: dict[str, list[Event]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            rows[names[event["tid"]]].append(event)
    for row in rows.values():
        row.sort(key=lambda e: (e["ts"], -e["dur"]))
    return rows


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def test_times_nest(traced: list[Event]) -> None:
    for name, row in _rows(traced).items():
        open_ends: list[float] = []
        for event in row:
            while open_ends and open_ends[-1] <= event["ts"] + TOUCHING:
                open_ends.pop()
            if open_ends:
                assert "jobs" in name, f"{event} begins before the one before it ends"
                assert _end(event) <= open_ends[-1] + TOUCHING
            open_ends.append(_end(event))


def test_every_job_is_there_with_its_parts(traced: list[Event]) -> None:
    rows = _rows(traced)
    every = [event for row in rows.values() for event in row]
    jobs = {(e["name"], e["args"]["job"]): e for e in every if "tokens" in e.get("args", {})}
    wanted = Counter(f"{kind} of {name}" for kind in ("experts", "linear") for name in POOLS)
    assert Counter(name for name, _ in jobs) == {n: JOBS * len(TOKENS) for n in wanted}
    found: dict[tuple[str, int], Counter[str]] = {key: Counter() for key in jobs}
    for key, job in jobs.items():
        for event in every:
            number = event.get("args", {}).get("job")
            if event is job or number != key[1] or not event["name"].endswith(key[0]):
                continue
            what = event["name"].removesuffix(key[0]).strip(" ,")
            found[key][what] += 1
            if what == "submit":
                assert event["ts"] <= job["ts"]
            elif what == "wait for":
                assert _end(event) >= _end(job) - TOUCHING
            else:
                assert event["ts"] >= job["ts"] and _end(event) <= _end(job) + TOUCHING
    for (name, _), parts in found.items():
        assert parts["submit"] == 1 and parts["wait for"] >= 1
        phases = set(parts) - {"submit", "wait for"} - {"encode"}
        kinds = ({"linear"}, {"gate·up", "down"}, {"gate·up", "down by pair", "combine"})
        assert phases in (kinds[:1] if "linear" in name else kinds[1:])


def test_phases_cover_their_job(traced: list[Event]) -> None:
    """From its first task to the last, but for the turns from phase to phase."""
    for name, row in _rows(traced).items():
        if not name.startswith("jobs"):
            continue
        starts = [at for at, event in enumerate(row) if "args" in event]
        assert starts
        for at, following in itertools.pairwise([*starts, len(row)]):
            job, phases = row[at], row[at + 1 : following]
            assert phases[0]["ts"] == pytest.approx(job["ts"], abs=TOUCHING)
            assert _end(phases[-1]) == pytest.approx(_end(job), abs=TOUCHING)


def test_a_group_without_jobs_has_no_rows() -> None:
    nothing = GroupSpans(3, np.zeros(0, records.Span.dtype))
    (process,) = events([nothing], [], 0, 10**6)
    assert process["name"] == "process_name"


def test_a_caller_s_time_is_covered(traced: list[Event]) -> None:
    """It submits, waits, or does something else: nothing is left out from its first call on."""
    rows = {name: row for name, row in _rows(traced).items() if name.startswith("caller")}
    assert len(rows) == len(POOLS)
    for row in rows.values():
        assert {event["name"].split()[0] for event in row} == {"submit", "wait", BETWEEN}
        for before, after in itertools.pairwise(row):
            assert after["ts"] == pytest.approx(_end(before), abs=TOUCHING)


def test_workers_have_rows_of_their_own(traced: list[Event]) -> None:
    workers = [name for name in _rows(traced) if name.startswith("worker")]
    groups = {name.partition(" of ")[2] for name in workers}
    assert len(groups) == len(POOLS) and len(workers) <= sum(p.threads for p in POOLS.values())


def test_arrows_lead_from_submit_to_job_to_wait(traced: list[Event]) -> None:
    """One for each job; every step lies within the event that it belongs to."""
    rows = _rows(traced)
    numbers = {e["tid"]: e["args"]["name"] for e in traced if e["name"] == "thread_name"}
    flows: dict[str, list[Event]] = {}
    for event in traced:
        if event["ph"] in "stf":
            flows.setdefault(event["id"], []).append(event)
    assert len(flows) == len(POOLS) * 2 * JOBS * len(TOKENS)
    for steps in flows.values():
        assert [step["ph"] for step in steps] == ["s", "t", "f"]
        assert steps[0]["ts"] <= steps[2]["ts"] and steps[1]["ts"] <= steps[2]["ts"]
        for step, what in zip(steps, ("submit ", "", "wait for "), strict=True):
            name = what + step["name"]
            assert any(
                event["name"] == name and event["ts"] - TOUCHING <= step["ts"] <= _end(event)
                for event in rows[numbers[step["tid"]]]
            ), (name, step)


def test_notes_of_python(tmp_path: Path) -> None:
    """They have rows of their own, and arrows between those of one flow; what began before the
    trace is left out, and whoever knows something late is asked at the end."""

    class Late:
        def note_all(self) -> None:
            now = time.monotonic_ns()
            trace.note(TraceNote("late", "layer 1", now - 10, now, {}, "wave 1"))

    late = Late()
    trace.add_source(late)
    before = time.monotonic_ns()
    assert not trace.is_recording()
    trace.note(TraceNote("lost", "outside", before, before))
    with trace.tracing(tmp_path / "notes.json"):
        assert trace.is_recording()
        now = time.monotonic_ns()
        trace.note(TraceNote("link", "copies", now, now + 1000, {"bytes": 3}, "wave 1"))
        trace.note(TraceNote("lost", "too early", before, now))
    found = json.loads((tmp_path / "notes.json").read_text())["traceEvents"]
    rows = _rows(found)
    assert {name: len(row) for name, row in rows.items()} == {"link": 1, "late": 1}
    assert rows["link"][0]["args"] == {"bytes": 3} and rows["link"][0]["dur"] == 1
    assert [e["ph"] for e in found if e["ph"] in "stf"] == ["s", "f"]


def test_what_finds_no_room_is_counted(
    layers: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trace, "_recorder", trace._Recorder())
    monkeypatch.setattr(trace, "ROOM", 7)
    group = layers["two"][0]._group
    trace._recorder.add_group(group.control)
    with caplog.at_level(logging.WARNING), trace.tracing(tmp_path / "a.json"):
        _work(layers, "two")
    content = json.loads((tmp_path / "a.json").read_text())
    lost = content["otherData"]["spans that found no room"]
    kept = [e for e in content["traceEvents"] if e["ph"] == "X" and e["name"] != BETWEEN]
    assert lost > 0 and f"{lost} came later" in caplog.text
    assert sum("job" in e.get("args", {}) and "tokens" not in e["args"] for e in kept) == 7
    assert [e for e in content["traceEvents"] if e["name"].startswith(f"truncated: {lost} spans")]
    with trace.tracing(tmp_path / "b.json"):  # the room is free again
        pass
    assert json.loads((tmp_path / "b.json").read_text())["otherData"] == {
        "spans that found no room": 0
    }


def test_one_trace_at_a_time_and_where_it_can_be_written(tmp_path: Path) -> None:
    one, other = (trace.tracing(tmp_path / f"{name}.json") for name in "ab")
    with one, pytest.raises(RuntimeError, match="already"), other:
        pass
    with pytest.raises(FileNotFoundError), trace.tracing(tmp_path / "no" / "c.json"):
        pass
    with trace.tracing(tmp_path / "d.json"):
        pass


_SCRIPT = """
import os
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch
layer = Case.random(MXFP4, 64, 64, E=2).layer(pool=PoolConfig(2))
for _ in range(3):
    layer.forward(*random_batch(1, 64, 2, 1))
child = os.fork()
if not child:
    raise SystemExit(0)  # with what is registered for the exit
os.waitpid(child, 0)
assert not os.path.getsize(os.environ["HYBRID_MOE_TRACE"]), "the child wrote its parent's file"
"""


def test_the_variable_traces_a_process(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = run_script(_SCRIPT, HYBRID_MOE_TRACE=str(path))
    assert done.returncode == 0, done.stderr
    events = json.loads(path.read_text())["traceEvents"]
    assert sum("tokens" in event.get("args", {}) for event in events) == 3


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    code = _SCRIPT.partition("child")[0]
    done = run_script(code, HYBRID_MOE_TRACE=str(tmp_path / "no" / "trace.json"))
    assert done.returncode == 0 and "no trace is written" in done.stderr


@pytest.mark.parametrize("traced", [False, True])
def test_off_it_costs_a_load_of_a_word(monkeypatch: pytest.MonkeyPatch, traced: bool) -> None:
    """By counting what drivers do for a job of two phases of three tasks, and a wait."""
    clock = interpret(monkeypatch, lambda: None)
    group = records.Group.new()
    memory = np.zeros(64 * records.Span.nbytes + 64, np.uint8)
    notes = records.Trace.new()
    notes.room = 64
    notes.words[records.Trace.word("spans")] = memory.ctypes.data + -memory.ctypes.data % 64
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        real = getattr(spans, name)

        def counted(*arguments: Any) -> Any:
            if name != "load_acquire" or arguments[0].address == group.trace.address:
                counts[name] += 1
            return real(*arguments)

        return counted

    for name in ("load_acquire", "store_release", "fetch_add", "nanoseconds", "system_call"):
        monkeypatch.setattr(spans, name, counting(name))
    monkeypatch.setattr(worker, "run_task", lambda *arguments: None)
    monkeypatch.setattr(worker, "count_time", lambda *arguments: None)  # the job has no layer
    monkeypatch.setattr(worker, "enter", lambda layer: 0)
    monkeypatch.setattr(worker, "set_float_environment", lambda: 0)
    monkeypatch.setattr(worker, "restore_float_environment", lambda before: None)
    published(group, [(records.GATE_UP, 3), (records.DOWN, 3)])
    group.timeout_ns = 10**12
    group.trace.value = notes.address if traced else 0
    assert worker.help_until(group, 1, 0, 0, 1)
    if not traced:
        assert counts == {"load_acquire": 7}  # six tasks and the wait
        return
    assert notes.taken.value == counts["fetch_add"] == counts["store_release"] == 7
    assert counts["nanoseconds"] == 14 and counts["system_call"] == 1
    assert clock.ahead == 0
