"""The emulated streams keep what CUDA promises, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.streams.emulation import CaptureError, DeadlockError, Device


def device(seed: int = 0, **options: object) -> Device:
    return Device(random.Random(seed), **options)  # type: ignore[arg-type]


def orders(program: Callable[[Device, list[str]], None], **options: object) -> set[str]:
    """All orders in which what `program` notes can happen, as far as 200 seeds find them."""
    found = set()
    for seed in range(200):
        gpu, notes = device(seed, **options), list[str]()
        program(gpu, notes)
        gpu.run()
        found.add("".join(notes))
    return found


def two_streams(gpu: Device, notes: list[str]) -> None:
    first, second = gpu.stream(0), gpu.stream(2)
    for stream, letter in ((first, "a"), (second, "x"), (first, "b"), (second, "y")):
        stream.queue(letter, lambda letter=letter: notes.append(letter))  # type: ignore[misc]


def test_streams_keep_their_own_order_only() -> None:
    assert orders(two_streams) == {"abxy", "axby", "axyb", "xaby", "xayb", "xyab"}


def test_streams_of_one_channel_run_in_the_order_of_submission() -> None:
    assert orders(two_streams, channels=2) == {"axby"}


def test_events_order_streams() -> None:
    def program(gpu: Device, notes: list[str]) -> None:
        first, second = gpu.stream(), gpu.stream()
        first.queue("a", lambda: notes.append("a"))
        second.wait(first.record())
        first.queue("b", lambda: notes.append("b"))
        second.queue("x", lambda: notes.append("x"))

    assert orders(program) == {"abx", "axb"}


def test_flags_order_streams() -> None:
    word = torch.zeros(1, dtype=torch.int64)

    def program(gpu: Device, notes: list[str]) -> None:
        word.zero_()
        first, second = gpu.stream(), gpu.stream()
        first.queue("a", lambda: notes.append("a"))
        first.write_value(word.data_ptr(), 5)
        second.wait_value(word.data_ptr(), 5)
        second.queue("x", lambda: notes.append("x"))

    assert orders(program) == {"ax"}


def test_a_flag_that_nobody_writes() -> None:
    gpu, word = device(), torch.zeros(1, dtype=torch.int64)
    gpu.stream().wait_value(word.data_ptr(), 1)
    with pytest.raises(DeadlockError, match="wait value"):
        gpu.run()


def test_one_thread_makes_all_calls() -> None:
    gpu = device(would_block=lambda function, user_data: function == 1)
    gpu.python = {1: lambda _: None, 2: lambda _: None}
    gpu.stream().host_function(1, 0)
    gpu.run_some(5)
    gpu.stream().host_function(2, 0)  # does not block itself, and never gets the thread
    with pytest.raises(DeadlockError):
        gpu.run()


def test_operators_run_when_the_stream_does() -> None:
    gpu = device()
    stream, x = gpu.stream(), torch.ones(3)
    with stream:
        y = (x * 2)[:2].to(torch.float64)
        y.add_(1)
        kept, places = x.sort()
    x.fill_(5)
    assert y.isnan().all() and kept.isnan().all() and not places.any()
    gpu.run()
    assert y.tolist() == [11.0, 11.0] and kept.tolist() == [5.0] * 3


def test_a_value_that_the_host_waits_for() -> None:
    with device().stream(), pytest.raises(AssertionError, match="the host waits"):
        torch.ones(1).item()


def test_entered_streams_nest() -> None:
    gpu = device()
    outer, inner, x = gpu.stream(), gpu.stream(), torch.zeros(1)
    word = torch.zeros(1, dtype=torch.int64)
    outer.wait_value(word.data_ptr(), 1)
    with outer:
        with inner:
            x.add_(1)
        x.mul_(7)
    gpu.run_some(100)
    assert x.item() == 1
    word[0] = 1
    gpu.run()
    assert x.item() == 7


def test_graphs_run_in_any_order_that_their_edges_allow() -> None:
    def program(gpu: Device, notes: list[str]) -> None:
        first, second = gpu.stream(), gpu.stream()
        with gpu.capture(first) as graph:
            first.queue("a", lambda: notes.append("a"))
            second.wait(first.record())
            first.queue("b", lambda: notes.append("b"))
            second.queue("x", lambda: notes.append("x"))
            first.wait(second.record())
            first.queue("c", lambda: notes.append("c"))
        assert not second.capturing()
        graph.launch(first)
        first.queue("!", lambda: notes.append("!"))
        graph.launch(first)

    assert orders(program) == {x + "!" + y for x in ("abxc", "axbc") for y in ("abxc", "axbc")}


def test_replays_compute_anew() -> None:
    gpu = device()
    stream, x = gpu.stream(), torch.ones(2)
    with gpu.capture(stream) as graph, stream:
        y = x + 1
    for value in (3.0, 4.0, 5.0):
        x.fill_(value)
        graph.launch(stream)
        gpu.run()
        assert y.tolist() == [value + 1] * 2


def test_a_capture_ends_with_all_streams_joined() -> None:
    gpu = device()
    first, second = gpu.stream(), gpu.stream()
    with pytest.raises(CaptureError, match=r"not joined: \['x'\]"), gpu.capture(first):
        second.wait(first.record())
        second.queue("x", lambda: None)


def test_events_of_other_captures() -> None:
    gpu = device()
    stream = gpu.stream()
    outside = stream.record()
    with gpu.capture(stream):
        inside = stream.record()
        with pytest.raises(CaptureError, match="of one capture"):
            stream.wait(outside)
    with pytest.raises(CaptureError, match="of one capture"):
        stream.wait(inside)
    with gpu.capture(stream), pytest.raises(CaptureError, match="of one capture"):
        stream.wait(inside)
