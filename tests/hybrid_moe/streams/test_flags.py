"""Whether memory flags work: the trial finds what is wrong with them, and is made once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hybrid_moe.streams import flags


@dataclass
class Trial:
    """Two words, and a stream that answers as `reaction` says at each query."""

    posted: int = 7
    waits: bool = True
    hears: bool = True
    clears: bool = True
    words: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    starts: int = 0
    ends: int = 0

    def start(self) -> None:
        assert self.words[0] == 0, "what an earlier exchange left would be taken for an answer"
        self.starts += 1
        self.words[0] = self.posted

    def record(self) -> Any:
        return self

    def query(self) -> bool:
        answered = bool(self.words[1])
        over = (answered and self.hears) if self.waits else True
        if answered and over and self.clears:
            self.words[1] = 0
            self.ends += 1
        return over


def test_trial_of_flags() -> None:
    trial = Trial()
    for turn in range(1, 4):
        flags.exchange(trial.words, trial.start, trial.record)
        assert trial.starts == turn and trial.ends == turn
        assert trial.words.tolist() == [7, 0]  # posted and seen, answered and cleared


@pytest.mark.parametrize(
    "defect,message",
    [
        ({"posted": 0}, "the host does not see"),
        ({"waits": False}, "did not wait"),
        ({"hears": False}, "does not see what the host writes"),
        ({"clears": False}, "did not clear"),
    ],
)
def test_trial_finds(defect: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_PATIENCE_S", 0.01)
    trial = Trial(**defect)
    with pytest.raises(flags.TrialError, match=message):
        flags.exchange(trial.words, trial.start, trial.record)


def test_flags_are_tried_once_and_not_under_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, tried = torch.device("cuda", 3), []

    def refuse(device: torch.device) -> None:
        tried.append(device)
        raise flags.TrialError("no 64-bit operations")

    monkeypatch.setattr(flags, "_tried", {})
    monkeypatch.setattr(flags, "_untried", {3})
    monkeypatch.setattr(flags, "try_flags", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    assert not flags.flags_work(gpu, may_try=False) and not tried
    assert not flags.flags_work(gpu, may_try=True)
    assert not flags.flags_work(gpu, may_try=True)
    assert tried == [gpu]
    (record,) = [r for r in caplog.records if r.name == "hybrid_moe.streams.flags"]
    assert record.getMessage() == (
        "GPU 3: jobs are handed over by host functions, since memory flags do not work: no 64-bit "
        "operations"
    )


def test_flags_are_tried_after_a_capture_that_came_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, tried = torch.device("cuda", 3), []
    monkeypatch.setattr(flags, "_tried", {})
    monkeypatch.setattr(flags, "_untried", set())
    monkeypatch.setattr(flags, "try_flags", tried.append)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    for _ in range(3):
        assert not flags.flags_work(gpu, may_try=False)
    (record,) = [r for r in caplog.records if r.name == "hybrid_moe.streams.flags"]
    assert record.getMessage() == (
        "GPU 3: its first use is in a capture, where memory flags cannot be tried: this graph's "
        "jobs are handed over by host functions; run the layers once before the capture for flags"
    )
    assert not tried
    assert flags.flags_work(gpu, may_try=True) and tried == [gpu]
    assert flags.flags_work(gpu, may_try=False)  # in later captures as well


def test_host_functions_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_tried", {0: True})
    assert flags.flags_work(torch.device("cuda", 0), may_try=True)
    monkeypatch.setenv(flags.HANDOVER, "host")
    assert not flags.flags_work(torch.device("cuda", 0), may_try=True)
