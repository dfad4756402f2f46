"""What engines are told by variables: streamed prefill and the quality of decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hybrid_moe
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.split_experts import SplitExperts
from hybrid_moe.schedule.quality import QUALITIES, deferral_depth, quality, quality_named
from hybrid_moe.schedule.streamed_prefill import new_prefill_stream, stream_memory

MODEL = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"


def test_quality() -> None:
    assert quality({}) == "exact" and quality({"HYBRID_MOE_QUALITY": "balanced"}) == "balanced"
    with pytest.raises(ValueError, match="HYBRID_MOE_QUALITY=best: must be exact or balanced"):
        quality({"HYBRID_MOE_QUALITY": "best"})
    assert all(quality_named(name, "--quality ") == name for name in QUALITIES)
    assert [deferral_depth("balanced", k) for k in (1, 4, 6, 8)] == [0, 1, 1, 2]
    assert deferral_depth("exact", 8) == 0


def test_memory() -> None:
    assert stream_memory({}) is None
    assert stream_memory({"HYBRID_MOE_STREAM_PREFILL": "2GiB"}) == 2 << 30
    with pytest.raises(ValueError, match='HYBRID_MOE_STREAM_PREFILL: size "some"'):
        stream_memory({"HYBRID_MOE_STREAM_PREFILL": "some"})


@torch.inference_mode()
def test_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt of the small model: streamed or not its logits differ no more than those of two
    placements do, whose halves also round in different ways (and a router may be near a tie)."""
    ids = torch.randint(0, 3000, (1, 300), generator=torch.Generator().manual_seed(0))
    logits, splits = [], []
    for share, memory in ((0.25, None), (0.5, None), (0.25, "1MiB")):
        if memory is not None:
            monkeypatch.setenv("HYBRID_MOE_STREAM_PREFILL", memory)
        model = hybrid_moe.from_pretrained(
            MODEL, method="MXFP4", progress=False, gpu_experts=share, gpu_backend="torch"
        ).eval()
        logits.append(model(ids).logits.float())
        splits.append([m.layer for m in model.modules() if isinstance(m, HybridExperts)])
    streams = {split.wrapper._prefill_stream for split in splits[2]}
    assert len(streams) == 1 and all(isinstance(split, SplitExperts) for split in splits[2])
    (stream,) = streams
    assert stream is not None and stream.nbytes <= 1 << 20 and len(stream._layers) == 4
    stream.learn()
    assert stream.planner.cpu
    plain, other, streamed = logits
    assert (streamed - plain).abs().mean() < 2 * (other - plain).abs().mean()
    same = (streamed.argmax(-1) == plain.argmax(-1)).float().mean()
    assert same > 0.9


def test_too_little_memory() -> None:
    from tests.hybrid_moe.cases import wrapper

    with pytest.raises(ValueError, match=r"has 0\.1 KiB of the device: an expert of layer 0 takes"):
        wrapper(
            gpu_backend="torch", gpu_device="cpu", prefill_stream=new_prefill_stream(64)
        ).reserve_slots()
