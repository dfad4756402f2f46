"""What `HYBRID_MOE_HANDOVER` may say."""

from __future__ import annotations

import pytest
import torch

from hybrid_moe.streams import flags


@pytest.mark.parametrize("value", ["hosts", "Host", "flag", "0"])
def test_a_misspelt_hand_over_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flags.HANDOVER, value)
    with pytest.raises(ValueError, match=f'HANDOVER=.{value}. must be "flags".* or "host"'):
        flags.flags_work(torch.device("cuda", 0), may_try=False)


@pytest.mark.parametrize("value", ["", "flags"])
def test_flags_are_the_default(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flags.HANDOVER, value)
    monkeypatch.setattr(flags, "_tried", {0: True})
    assert flags.flags_work(torch.device("cuda", 0), may_try=False)
    monkeypatch.setenv(flags.HANDOVER, "host")
    assert not flags.flags_work(torch.device("cuda", 0), may_try=False)
