"""`load_layer`: which experts are read, what the sink gets, and what is refused."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors
from hybrid_moe.loaders import Checkpoint, LayerSource, check_map, load_layer
from hybrid_moe.loaders import load as load_module
from hybrid_moe.loaders.load import LayerLoad, load_layers
from hybrid_moe.loaders.safetensors import ReadBuffers, SafetensorsIndex
from hybrid_moe.parallel import for_each
from tests.families import EXPERTS, FamilyFixture

Family = Callable[[str], FamilyFixture]
shared_fixture = settings(
    max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Collector:
    """A sink that keeps copies, as a packer does."""

    def __init__(self) -> None:
        self.experts: dict[int, list[np.ndarray]] = {}

    def __call__(self, physical: int, tensors: ExpertTensors) -> None:
        assert physical not in self.experts
        self.experts[physical] = arrays_of(tensors)


def arrays_of(tensors: ExpertTensors) -> list[np.ndarray]:
    """Copies of everything that an expert consists of."""
    matrices = (tensors.gate, tensors.up, tensors.down)
    fields = [(matrix.codes, matrix.scales, matrix.bias) for matrix in matrices]
    return [array.copy() for triple in fields for array in triple if array is not None]


def all_equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def source_of(fixture: FamilyFixture) -> LayerSource:
    return Checkpoint.open(fixture.directory).layer(1)


NAMES = ["deepseek_v4_mxfp4", "gpt_oss_mxfp4", "qwen3_moe_fused"]


@shared_fixture
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_wanted_experts_arrive_at_their_slots(
    family: Family, name: str, data: st.DataObject
) -> None:
    source = source_of(family(name))
    slots = data.draw(st.integers(1, 7))
    mapping = np.array(
        data.draw(st.lists(st.integers(0, EXPERTS - 1), min_size=slots, max_size=slots)), np.int64
    )
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots)))
    sink, steps = Collector(), []
    load_layer(
        source,
        mapping,
        wanted,
        sink,
        formats=source.formats,
        threads=data.draw(st.integers(1, 3)),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert sorted(sink.experts) == np.flatnonzero(wanted).tolist()
    for physical, arrays in sink.experts.items():
        assert all_equal(arrays, arrays_of(source.expert(int(mapping[physical]))))
    assert steps == [(done, wanted.sum()) for done in range(1, int(wanted.sum()) + 1)]


def test_other_experts_are_never_read_and_replicas_once(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(family("qwen3_moe_mxfp4"))
    read: list[str] = []
    original = SafetensorsIndex.read

    def spy(index: SafetensorsIndex, key: str, *args: Any, **kwargs: Any) -> Any:
        read.append(key)
        return original(index, key, *args, **kwargs)

    monkeypatch.setattr(SafetensorsIndex, "read", spy)
    mapping, wanted = np.array([3, 0, 3, 1, 2]), np.array([True, False, True, True, False])
    load_layer(source, mapping, wanted, Collector(), formats=MXFP4, threads=2)
    stem = "model.layers.1.mlp.experts."
    assert sorted(read) == sorted(
        f"{stem}{expert}.{projection}_proj.{kind}"
        for expert in (1, 3)
        for projection in ("gate", "up", "down")
        for kind in ("weight", "weight_scale")
    )


def test_bf16_is_quantized_while_loading_and_says_so_once(
    family: Family, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "_announced", set())
    source, sink = source_of(family("gpt_oss")), Collector()
    everything = np.ones(EXPERTS, bool)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        load_layer(source, np.arange(EXPERTS), everything, sink, formats=MXFP4, threads=2)
        load_layer(source, np.arange(EXPERTS), everything, Collector(), formats=MXFP4)
        load_layer(source, np.arange(EXPERTS), everything, Collector(), formats=BF16)
    (record,) = caplog.records
    assert "stores its experts as BF16: they are converted to MXFP4" in record.getMessage()
    for expert, arrays in sink.experts.items():
        assert all_equal(arrays, arrays_of(source.expert(expert, MXFP4)))


def test_mxfp4_does_not_become_bf16(family: Family) -> None:
    source = source_of(family("deepseek_v4_mxfp4"))
    with pytest.raises(ValueError, match="stores its experts as MXFP4, which does not become"):
        load_layer(source, np.arange(4), np.ones(4, bool), Collector(), formats=BF16)


BAD_MAPS: dict[str, tuple[Any, str]] = {
    "two axes": (np.zeros((2, 2), np.int64), r"one axis, this one has shape \(2, 2\)"),
    "float": (np.zeros(4), "must be int64, this one is float64"),
    "int32": (np.zeros(4, np.int32), "must be int64, this one is int32"),
    "too short": (np.zeros(3, np.int64), "has 3 entries, expected 4"),
    "too long": (np.zeros(5, np.int64), "has 5 entries, expected 4"),
    "negative": (np.array([0, -1, 2, 3]), r"map\[1\] = -1: .* experts 0 to 3"),
    "beyond": (np.array([0, 1, 2, 4]), r"map\[3\] = 4: .* experts 0 to 3"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_map(family: Family, name: str) -> None:
    mapping, message = BAD_MAPS[name]
    with pytest.raises(ValueError, match=message):
        check_map(mapping, 4, 4)
    with pytest.raises(ValueError, match=message):
        load_layer(
            source_of(family("qwen3_moe")), mapping, np.ones(4, bool), Collector(), formats=BF16
        )


@pytest.mark.parametrize("wanted", [np.ones(4), np.ones((4, 1), bool)])
def test_bad_wanted(family: Family, wanted: Any) -> None:
    with pytest.raises(ValueError, match="wanted must be bool with one axis"):
        load_layer(source_of(family("qwen3_moe")), np.arange(4), wanted, Collector(), formats=BF16)


def test_bad_threads(family: Family) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        load_layer(
            source_of(family("qwen3_moe")), np.arange(4), np.ones(4, bool), Collector(),
            formats=BF16, threads=0,
        )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_the_sink_stops_the_load(family: Family, threads: int) -> None:
    calls: list[int] = []

    def sink(physical: int, tensors: ExpertTensors) -> None:
        calls.append(physical)
        raise CheckpointError("no more")

    with pytest.raises(CheckpointError, match="no more"):
        load_layer(
            source_of(family("qwen3_moe")), np.arange(EXPERTS).repeat(5), np.ones(20, bool), sink,
            formats=BF16, threads=threads,
        )  # fmt: skip
    assert len(calls) <= threads


def test_threads_have_buffers_of_their_own() -> None:
    buffers: dict[int, set[int]] = {}
    barrier = threading.Barrier(3)

    own = ReadBuffers()

    def work(item: int) -> None:
        buffers.setdefault(threading.get_ident(), set()).add(id(own.mine))
        if item < 3:
            barrier.wait(timeout=60)  # all three threads take part

    for_each(range(30), work, 3)
    assert len(buffers) == 3 and all(len(ids) == 1 for ids in buffers.values())
    assert len(set.union(*buffers.values())) == 3


def test_layers_follow_each_other_without_a_pause(family: Family) -> None:
    """One thread is held in the first layer's last expert until another has begun the second
    layer; each layer is asked for when it is its turn, and counts for itself."""
    checkpoint = Checkpoint.open(family("qwen3_moe_mxfp4").directory)
    begun = threading.Event()
    asked: list[int] = []
    steps: list[tuple[int, int, int]] = []

    def layers() -> Iterator[LayerLoad]:
        for number in checkpoint.layers[:2]:
            asked.append(number)
            yield LayerLoad(
                checkpoint.layer(number),
                np.arange(EXPERTS),
                np.ones(EXPERTS, bool),
                functools.partial(sink, number),
                formats=MXFP4,
                progress=lambda done, total, number=number: steps.append((number, done, total)),
            )

    def sink(layer: int, expert: int, tensors: ExpertTensors) -> None:
        if layer == checkpoint.layers[0]:
            assert expert < EXPERTS - 1 or begun.wait(30)
        else:
            begun.set()

    load_layers(layers(), 2)
    assert asked == list(checkpoint.layers[:2])
    for number in asked:
        assert [s[1:] for s in steps if s[0] == number] == [
            (done, EXPERTS) for done in range(1, EXPERTS + 1)
        ]


def test_an_interrupt_ends_all_layers(family: Family) -> None:
    """No expert is begun after Ctrl-C, and no thread is at one when it arrives at the caller."""
    source, begun, ended = source_of(family("qwen3_moe_mxfp4")), [], []

    def sink(expert: int, tensors: ExpertTensors) -> None:
        begun.append(expert)
        if len(begun) == 3:
            raise KeyboardInterrupt
        ended.append(expert)

    def layers() -> Iterator[LayerLoad]:
        for _ in range(50):
            yield LayerLoad(source, np.arange(EXPERTS), np.ones(EXPERTS, bool), sink, formats=MXFP4)

    with pytest.raises(KeyboardInterrupt):
        load_layers(layers(), 2)
    assert len(begun) == len(ended) + 1 <= 4
