"""The emulated machine: it computes what a real one does, and its ideals are the timeline's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import throttled
import torch
from throttled_machine import ThrottledLink, throttled_wrapper

from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.wrapper import KTMoEWrapper


def test_what_it_computes_is_real() -> None:
    """Streamed through an emulated machine, and by a layer of the same experts alone."""
    machine = throttled.balanced_machine(1e-3, 16)
    machine.exact = True
    both = {"gpu_backend": "torch", "gpu_device": "cpu", "gpu_slots": 0}
    with machine.emulated():
        stream = PrefillStream(
            throttled.SendAll(), 2 * throttled.E, tokens=2, link=ThrottledLink(machine)
        )
        sizes = throttled.sizes(throttled.K)
        layer = throttled_wrapper(machine, layer_idx=0, prefill_stream=stream, **both, **sizes)
        hot = KTMoEWrapper(
            0,
            gpu_experts_mask=torch.ones(throttled.E, dtype=torch.bool),
            **both | {"gpu_slots": None},
            **sizes,
        )
        cold = KTMoEWrapper(0, **both, **sizes)
        batch = throttled.random_batch(16, throttled.K, 1)
        for w in (layer, hot, cold):
            w.load_weights_from_tensors(*throttled.weights())
        sent = layer.forward(*batch)
        assert torch.equal(sent, hot.forward(*batch))
        assert layer.pairs == (16 * throttled.K, 0)
        few = throttled.random_batch(1, throttled.K, 2)
        assert torch.equal(layer.forward(*few), cold.forward(*few))
    assert machine.spent["link"] == pytest.approx(
        len(batch[1].unique()) * throttled.NBYTES / machine.rates.link
    )
    assert machine.spent["CPU"] > 0 and machine.spent["GPU"] > 0


def test_a_move_is_its_bytes_over_the_link() -> None:
    """Once, in either direction."""
    machine = throttled.balanced_machine(1e-4, 1)
    with machine.emulated():
        layer = throttled_wrapper(
            machine, layer_idx=0, gpu_backend="torch", gpu_device="cpu", gpu_slots=3,
            **throttled.sizes(throttled.K),
        )  # fmt: skip
        layer.load_weights_from_tensors(*throttled.weights())
        for count, move in enumerate((layer.promote, layer.promote, layer.demote), 1):
            move(count // 2)
            seconds = throttled.NBYTES / machine.rates.link
            assert machine.spent["link"] == pytest.approx(count * seconds)
    assert layer.gpu_experts_mask.nonzero().flatten().tolist() == [0]


def test_ideals() -> None:
    """At the balanced point all on the CPU and all sent take equally long but for attention, which
    only copies go on under; half of the experts sent is nearly twice as fast."""
    machine = throttled.balanced_machine(1.0, 64)
    counts = [[12] * throttled.E] * 40
    cpu, sent, streamed = (
        throttled.prefill_ideal(machine, counts, 0.1, way) for way in throttled.WAYS
    )
    assert cpu == pytest.approx(40 * 1.1)
    assert sent == pytest.approx(40 * 1.0 + 0.05)
    assert 40 * 0.55 < streamed < 40 * 0.6


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    receipt = tmp_path / "throttled.json"
    words = f"throttled.py --chunks 1 --layers 3 --layer-ms 0.3 --json {receipt}".split()
    monkeypatch.setattr("sys.argv", words)
    throttled.main()
    found = json.loads(receipt.read_text())
    assert [p["way"] for p in found["prefill"]] == list(throttled.WAYS)
    none, all_of_them, some = (p["sent"] for p in found["prefill"])
    assert none == 0 < some <= all_of_them <= throttled.E
    assert [d["top_k"] for d in found["decode"]] == [2, 4, 6, 8]
    for d in found["decode"]:
        share = min(2, d["top_k"]) / d["top_k"]
        # what is deferred is under attention, up to its 30 %; the last layer defers nothing
        per_layer = max(1 - 0.7 * share, 0.7)
        assert d["ideal"] <= d["plain_ideal"]
        assert d["ideal"] / d["plain_ideal"] == pytest.approx(per_layer, abs=0.15)
    assert [(m["move"], m["experts"]) for m in found["moves"]] == [
        (move, experts) for experts in (1, throttled.E // 2) for move in ("promote", "demote")
    ]
