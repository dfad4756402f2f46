"""`OnlinePlacement`: when and how much it moves, on layers without weights and on real ones."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe import logs
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import WeightFormat, layer_formats
from hybrid_moe.placement import online
from hybrid_moe.placement.online import OnlineOptions, OnlinePlacement
from hybrid_moe.runtime import filling
from hybrid_moe.wrapper import KTMoEWrapper
from tests.formats import random_matrix
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures

SIGNATURES = signature_weights()


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class CountedLayer:
    """A layer without weights, which checks that what is asked of it is possible."""

    def __init__(self, experts: int = 16, hot: int = 4, top_k: int = 2, nbytes: int = 10) -> None:
        self.layer_idx, self.num_experts, self.num_experts_per_tok = 0, experts, top_k
        self.routed = np.zeros(experts, np.int64)
        self.elsewhere = torch.zeros(experts, dtype=torch.bool)
        self.gpu_experts_mask = torch.arange(experts) < hot
        self.gpu_slots, self.slot_nbytes, self.keeps_panels = hot, nbytes, False
        self.prefill_stream = None
        self.copied: list[int] = []
        self.places = 1

    def promote(self, expert: int, cuda_stream: int | None = None) -> None:
        assert not self.gpu_experts_mask[expert]
        assert self.gpu_experts_mask.sum() < self.gpu_slots
        self.gpu_experts_mask[expert] = True
        self.places += 1
        self.copied.append(self.slot_nbytes)

    def demote(self, expert: int, cuda_stream: int | None = None) -> None:
        assert self.gpu_experts_mask[expert]
        assert self.places, "there is one place to spare"
        self.gpu_experts_mask[expert] = False
        self.places -= 1
        self.copied.append(0 if self.keeps_panels else self.slot_nbytes)

    def route(self, experts: list[int], tokens: int = 40) -> None:
        self.routed[experts] += tokens


def made(layers: list[CountedLayer], clock: Clock, **options: Any) -> OnlinePlacement:
    given: dict[str, Any] = {"half_life_pairs": 4, "payback_pairs": 0, **options}
    return OnlinePlacement(layers, OnlineOptions(**given), clock)


def test_nothing_moves_without_traffic_and_all_of_it_in_time() -> None:
    clock, layer = Clock(), CountedLayer()
    placed = made([layer], clock)
    for _ in range(5):
        clock.now += 1
        assert placed.step() == 0
    for _ in range(40):
        layer.route([8, 9])
        clock.now += 1
        placed.step()
    assert layer.gpu_experts_mask[[8, 9]].all() and layer.gpu_experts_mask.sum() == 4
    report = placed.report()
    assert (report.swaps, report.returns) == (2, 0)
    assert report.moved_bytes == sum(layer.copied) == 40
    assert report.pairs == 40 * 80 and report.first_pairs == 0
    assert report.gained_bytes == 10 * report.hot_pairs > 0
    assert report.tokens == 40 * 40
    assert 0.8 < report.hit_rate < 1
    assert "2 came to the GPU, 0 of them back" in report.summary()
    timed = made([layer], clock, read_bandwidth=5.0).report()
    assert timed.gained_seconds == 0 and "0.0 s of the CPU's reading" in timed.summary()


def test_experts_that_are_due_to_be_sent_stay_where_they_are_used_more() -> None:
    """By more than chance and the way back of the other explain, within the budget, and not twice
    within a half-life."""
    clock, layer = Clock(), CountedLayer()
    # the way back of one expert is worth 4 pairs; the burst has room for one swap, 20 bytes
    placed = made([layer], clock, payback_pairs=4, bytes_per_second=1.0)
    use, swapped = placed._use[0, 0], list[tuple[int, int]]()

    def stay(*sent: int) -> tuple[int, ...]:
        return placed.stay(0, sent, lambda down, up: swapped.append((down, up)))

    use[:4], use[8] = (90, 80, 70, 60), 74
    assert stay(8) == (), "not a quarter more than expert 3"
    use[:4], use[8] = 0, 5
    assert stay(8) == (), "it does not pay for the way back"
    use[:4], use[8:11] = (90, 80, 2, 1), (100, 200, 300)
    assert placed.stay(1, (8,), lambda down, up: None) == (), "a layer that is not there"
    assert stay(8, 9) == (9, 8) and swapped == [(3, 9), (2, 8)]
    assert stay(10) == (), "the budget is spent"
    report = placed.report()
    assert (report.stays, report.swaps, report.moved_bytes) == (2, 2, 40)
    clock.now += 20
    use[8] = 0
    assert stay(10) == (10,) and swapped[-1] == (1, 10), "expert 8 has just come"
    clock.now += 20
    use[9] = use[10] = 0
    assert stay(2, 3) == (), "and so have these, and those have just left"


def test_a_step_looks_now_and_then() -> None:
    clock, layer = Clock(), CountedLayer()
    placed = made([layer], clock)
    layer.route([8, 9], tokens=1000)
    assert placed.step() == 4, "the first step looks"
    layer.route([10, 11], tokens=100_000)
    clock.now += online.LOOK_SECONDS / 2
    assert placed.step() == 0


@settings(max_examples=100)
@given(
    rate=st.sampled_from((50.0, 200.0, 10_000.0)),
    steps=st.lists(st.tuples(st.floats(0.001, 3), st.integers(0, 12)), max_size=60),
    keep=st.booleans(),
)
def test_no_span_of_time_moves_more_than_its_bytes(
    rate: float, steps: list[tuple[float, int]], keep: bool
) -> None:
    """Beside what may be due at once: some of a second's bytes, or one swap."""
    clock, layers = Clock(), [CountedLayer(nbytes=10), CountedLayer(nbytes=35)]
    for layer in layers:
        layer.keeps_panels = keep
    placed = made(layers, clock, bytes_per_second=rate)
    burst = max(online.BURST_SECONDS * rate, 35.0 if keep else 70.0)
    moved = [(clock.now, 0)]
    for wait, topic in steps:
        clock.now += wait
        for layer in layers:
            layer.route([topic, topic + 1, topic + 2, topic + 3])
        placed.step()
        total = sum(sum(layer.copied) for layer in layers)
        assert total == placed.report().moved_bytes
        moved.append((clock.now, total))
        for since, before in moved:
            assert total - before <= burst + rate * (clock.now - since) + 1e-6


def test_layers_that_have_nothing_to_swap_are_left_out() -> None:
    clock = Clock()
    full, none, away = CountedLayer(hot=16), CountedLayer(hot=0), CountedLayer(hot=4)
    away.elsewhere = ~away.gpu_experts_mask
    placed = made([full, none, away], clock)
    assert not placed.active
    for layer in (full, none, away):
        layer.route([8, 9], tokens=1000)
    clock.now += 1
    assert placed.step() == 0 and placed.report().pairs == 0
    some = CountedLayer(experts=8)
    some.elsewhere[5] = True
    placed = made([full, some], clock)
    some.route([5, 6], tokens=1000)
    clock.now += 1
    assert placed.step() == 2 and some.gpu_experts_mask[6], "5 is not here"
    assert placed.report().pairs == 1000


def test_a_move_that_fails_ends_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.warn_once.cache_clear()
    clock, layer = Clock(), CountedLayer()

    def fail(expert: int, cuda_stream: int | None = None) -> None:
        raise RuntimeError(f"the GPU has lost expert {expert}")

    placed = made([layer], clock)
    layer.route([8, 9], tokens=1000)
    monkeypatch.setattr(layer, "promote", fail)
    clock.now += 1
    with caplog.at_level(logging.WARNING):
        assert placed.step() == 1
    assert "a move failed: the GPU has lost expert" in caplog.text
    clock.now += 1
    assert placed.step() == 0 and not placed.active


@pytest.mark.parametrize(
    ("given", "rate", "keep"),
    [
        (True, online.LINK_BYTES, False),
        ("1", online.LINK_BYTES, False),
        ("2GB", 2 << 30, False),
        (" 512 MiB/s ", 512 << 20, False),
        ("keep", online.LINK_BYTES, True),
        ("2GB,keep", 2 << 30, True),
        ("1, keep", online.LINK_BYTES, True),
    ],
)
def test_options(given: Any, rate: float, keep: bool) -> None:
    options = OnlineOptions.of(given)
    assert options is not None
    assert (options.bytes_per_second, options.keep_panels) == (rate, keep)
    assert options.panels == ("keep" if keep else "drop")
    assert OnlineOptions.of(options) is options
    read = OnlineOptions.of("keep,read=60GB/s")
    assert read == OnlineOptions(keep_panels=True, read_bandwidth=60 << 30)


def test_no_options() -> None:
    for off in (None, False, "", "0"):
        assert OnlineOptions.of(off) is None
    for wrong, error in ((7, TypeError), ("fast", ValueError), ("2GB,kept", ValueError)):
        with pytest.raises(error, match=r'dynamic is .* must be True or False, .* \("2GB"\)'):
            OnlineOptions.of(wrong)
    for name in ("bytes_per_second", "half_life_pairs", "read_bandwidth"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            OnlineOptions(**{name: -1})
    with pytest.raises(ValueError, match="margin is 1"):
        OnlineOptions(margin=1)
    with pytest.raises(ValueError, match="payback_pairs is -2"):
        OnlineOptions(payback_pairs=-2)


# Real layers ------------------------------------------------------------------------------------


def hybrid(weights: Weights, hot: int = 3, **arguments: Any) -> KTMoEWrapper:
    mask = torch.arange(E) < hot
    given: dict[str, Any] = {"gpu_experts_mask": mask, "gpu_backend": "torch", "gpu_device": "cpu"}
    return weights.load(wrapper(**{**given, **arguments}))


def of_topic(batch: Batch, topic: list[int]) -> Batch:
    """Most tokens go to the topic's experts."""
    batch.ids[1:] = torch.tensor(topic)
    return batch


@pytest.mark.parametrize("panels", ["drop", "keep"])
def test_experts_follow_the_topic(panels: str) -> None:
    """Exact at every step, and soon on the GPU; nothing leaks, however often it happens."""
    clock, layers = Clock(), [hybrid(SIGNATURES, layer_idx=i, gpu_panels=panels) for i in range(2)]
    options = OnlineOptions(
        half_life_pairs=2, payback_pairs=0, bytes_per_second=1e6, keep_panels=panels == "keep"
    )
    placed = OnlinePlacement(layers, options, clock)
    places = [layer._layer.free_places for layer in layers]
    memory = [(layer.nbytes, layer.gpu_nbytes) for layer in layers]
    counted, hits = 0, list[float]()
    for step in range(120):
        topic = [[0, 1, 2], [5, 6, 7], [2, 3, 6]][step // 20 % 3]
        before = [layer.pairs for layer in layers]
        for layer in layers:
            batch = of_topic(signature_batch(6, step), topic)
            counted += int((batch.ids >= 0).sum())
            assert torch.equal(layer.forward(*batch.args), signatures(batch))
        hot = sum(layer.pairs[0] - old[0] for layer, old in zip(layers, before, strict=True))
        all_ = sum(sum(layer.pairs) - sum(old) for layer, old in zip(layers, before, strict=True))
        hits.append(hot / all_)
        clock.now += 1
        placed.step()
    report = placed.report()
    assert report.pairs == counted == sum(sum(layer.pairs) for layer in layers)
    assert report.hot_pairs == sum(layer.pairs[0] for layer in layers)
    for start in range(0, 120, 20):
        assert np.mean(hits[start + 10 : start + 20]) > 0.85
    assert report.swaps >= 5 * 2 and report.returns == 0
    assert [layer._layer.free_places for layer in layers] == places
    assert [(layer.nbytes, layer.gpu_nbytes) for layer in layers] == memory
    copied = 0
    for layer in layers:
        assert layer._runner is not None and layer._runner._halves is not None
        copied += layer._runner._halves[1].moved_bytes
    assert copied == report.moved_bytes


BRIEF = ("MXFP4", "BF16", "NVFP4", "INT4_G32_FP16_Z1", "INT8_ROW_FLOAT32", "Q4_K", "FP8")
"""In a short run: one row of each kind of planes."""


@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param(fmt, id=name, marks=[] if name in BRIEF else pytest.mark.full)
        for name, fmt in FORMATS.items()
        if has_kernels(fmt)
    ],
)
def test_every_format_moves(fmt: WeightFormat) -> None:
    """A slot has the CPU's bytes: an expert that comes, goes and comes again is the one that was
    loaded, and computes what it would have computed there from the beginning."""
    size = max(64, 2 * fmt.k_multiple, *(plane.per for plane in fmt.planes))
    rng = np.random.default_rng(3)
    experts = [
        ExpertTensors(*(random_matrix(fmt, rng, size, size) for _ in range(3))) for _ in range(4)
    ]
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([[0, 1], [1, 3], [2, 0]])
    weights = torch.tensor([[0.5, 1.0], [0.25, 2.0], [1.0, 1.0]])

    def layer(hot: list[int], panels: str) -> KTMoEWrapper:
        made = KTMoEWrapper(
            0, 4, 2, size, size, torch.isin(torch.arange(4), torch.tensor(hot)), 1, 1,
            formats=layer_formats(fmt), gpu_backend="torch", gpu_device="cpu", gpu_panels=panels,
        )  # fmt: skip
        made.load_weights_by(filling.from_experts(experts.__getitem__, biases=False))
        return made

    fresh = layer([3, 2], "drop")
    for panels in ("drop", "keep"):
        moved = layer([0, 2], panels)
        for down, up in ((0, 3), (3, 0), (0, 1), (1, 3)):
            moved.demote(down)
            moved.promote(up)
        assert torch.equal(moved.gpu_experts_mask, fresh.gpu_experts_mask)
        assert torch.equal(moved.forward(x, ids, weights), fresh.forward(x, ids, weights))
        for expert, loaded in enumerate(experts):
            found = moved.unpack(expert)
            for name in ("gate", "up", "down"):
                planes, expected = getattr(found, name).planes, getattr(loaded, name).planes
                assert planes.keys() == expected.keys()
                for plane in planes:
                    assert planes[plane].tobytes() == expected[plane].tobytes()
        assert moved.routed.tolist() == [2, 2, 1, 1] and moved.gpu_slots == 2
        assert moved.keeps_panels == (panels == "keep")
        assert 2 * moved.slot_nbytes == moved.gpu_nbytes
        moved.close()
    fresh.close()


def test_what_is_kept_is_never_copied_back() -> None:
    layer = hybrid(SIGNATURES, gpu_panels="keep")
    plain = hybrid(SIGNATURES)
    assert layer._layer.nbytes > plain._layer.nbytes
    assert layer._runner is not None and layer._runner._halves is not None
    placement = layer._runner._halves[1]
    layer.demote(0)
    assert placement.moved_bytes == 0
    layer.demote(1)
    layer.demote(2)  # without one to promote in between
    assert placement.moved_bytes == 0 and not layer.gpu_experts_mask.any()
    layer.promote(0)
    assert placement.moved_bytes == layer.slot_nbytes
    given = signature_batch(4, 0)
    assert torch.equal(layer.forward(*given.args), signatures(given))
    with pytest.raises(ValueError, match="expert 0 is not on the CPU"):
        layer.promote(0)
    with pytest.raises(ValueError, match="expert 1 is not on the GPU"):
        layer.demote(1)
    with pytest.raises(ValueError, match="gpu_panels is 'both'"):
        hybrid(SIGNATURES, gpu_panels="both")
    with pytest.raises(ValueError, match="gpu_panels needs a gpu_backend"):
        wrapper(gpu_panels="keep")


def test_counters_are_of_every_call() -> None:
    """Hot, cold and elsewhere; of several calls; ids out of range are none."""
    away = torch.arange(E) == 7
    layer = hybrid(SIGNATURES, elsewhere=away)
    expected = np.zeros(E, np.int64)
    for seed in range(4):
        batch = signature_batch(5, seed)
        layer.forward(*batch.args)
        expected += np.bincount(batch.ids[batch.ids >= 0].numpy(), minlength=E)
    assert layer.routed.tolist() == expected.tolist()
    assert layer.elsewhere.tolist() == away.tolist()
    plain = SIGNATURES.load(wrapper(num_gpu_experts=2))
    batch.ids[:, 0] = E + 3
    plain.forward(*batch.args)
    assert plain.routed.sum() == (batch.ids[:, 1:] >= 0).sum()
    assert (plain.gpu_slots, plain.slot_nbytes, plain.keeps_panels) == (0, 0, False)
    assert plain.elsewhere.tolist() == [True] * 2 + [False] * (E - 2)
    assert K < E


def test_a_look_costs_little(record_property: Any) -> None:
    """Reported, not asserted: microseconds of a step for each of 48 layers of 128 experts."""
    clock = Clock()
    placed = made([CountedLayer(128, 32, 8) for _ in range(48)], clock)
    for name, pause in (("idle", 0.0), ("look", 1.0)):
        begun, steps = time.perf_counter(), 20
        for _ in range(steps):
            clock.now += pause
            placed.step()
        record_property(name, 1e6 * (time.perf_counter() - begun) / steps / 48)
