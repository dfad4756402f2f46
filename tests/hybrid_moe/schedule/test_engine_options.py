"""What engines are told by variables: streamed prefill and the quality of decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hybrid_moe
from hybrid_moe.cpu_kernels.trace import tracing
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.split_experts import SplitExperts
from hybrid_moe.schedule.quality import QUALITIES, deferral_depth, quality, quality_named
from hybrid_moe.schedule.step_planner import StepPlanner
from hybrid_moe.schedule.streamed_prefill import new_prefill_stream, stream_memory
from tests.hybrid_moe.steps import SLOW_CPU, sure

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


@torch.inference_mode()
def test_a_model_that_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Token by token, experts sent to slots in which they are for one step: the logits are those of
    a prompt that is read at once, as far as two placements agree; metrics and trace say what was
    done."""
    ids = torch.randint(0, 3000, (1, 12), generator=torch.Generator().manual_seed(1))
    logits = []
    for memory, share in (("1MiB", 0.25), (None, 0.25), (None, 0.5)):
        monkeypatch.setenv("HYBRID_MOE_STREAM_PREFILL", memory or "")
        model = hybrid_moe.from_pretrained(
            MODEL, method="MXFP4", progress=False, gpu_experts=share, gpu_backend="torch"
        ).eval()
        if memory is None:
            logits.append(model(ids).logits.float())
            continue
        split = next(m.layer for m in model.modules() if isinstance(m, HybridExperts))
        assert isinstance(split, SplitExperts)
        stream = split.wrapper.prefill_stream
        assert stream is not None and isinstance(stream.steps, StepPlanner)
        stream.steps = sure(SLOW_CPU)
        before, past, found = hybrid_moe.metrics(), None, []
        with tracing(tmp_path / "trace.json"):
            for at in range(ids.shape[1]):
                out = model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
                past = out.past_key_values
                found.append(out.logits.float())
        logits.append(torch.cat(found, 1))
        counted = hybrid_moe.metrics() - before
        assert counted.sent_bytes == stream.sent_bytes > 0 and counted.sent_experts > 12
        assert counted.deferred_pairs == counted.stays == 0
        assert "sent of" in (tmp_path / "trace.json").read_text()
    decoded, plain, other = logits
    assert (decoded - plain).abs().mean() < 2 * (other - plain).abs().mean()


def test_too_little_memory() -> None:
    from tests.hybrid_moe.cases import wrapper

    with pytest.raises(ValueError, match=r"has 0\.1 KiB of the device: an expert of layer 0 takes"):
        wrapper(
            gpu_backend="torch", gpu_device="cpu", prefill_stream=new_prefill_stream(64)
        ).reserve_slots()
