"""HYBRID_MOE_PROFILE: what a server writes about its routing. No SGLang."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.sglang import server_profile
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError
from hybrid_moe.integrations.sglang.server_profile import VARIABLE, ServerProfile, chosen
from hybrid_moe.placement.routing_profile_file import read_routing_profile
from tests.sglang.paths import MXFP4_MODEL

CPU = torch.device("cpu")


def fused_moe(index: int, top_k: int | None = 2) -> Any:
    return SimpleNamespace(layer_id=index, top_k=top_k, hidden_size=128, hidden_size_unpadded=96)


def step(profile: ServerProfile, mode: str, ids: list[list[int]]) -> None:
    """A step as a model runner makes it."""
    batch = SimpleNamespace(forward_mode=SimpleNamespace(name=mode))
    profile.before_forward(None, batch, skip_attn_backend_init=False)
    for layer in (0, 2):
        profile.add(layer, torch.tensor(ids, dtype=torch.int32))


@pytest.fixture
def profile(tmp_path: Path) -> ServerProfile:
    made = ServerProfile(tmp_path / "profile.json")
    for layer in (2, 0):
        made.join(fused_moe(layer), 4, CPU, MXFP4_MODEL)
    return made


def test_phases_and_what_is_left_out(profile: ServerProfile) -> None:
    for layer in (0, 2):  # a graph's warm-up, before any request
        profile.add(layer, torch.tensor([[3, 3]]))
    step(profile, "EXTEND", [[0, 1], [0, 2], [-1, -1]])
    step(profile, "DECODE", [[1, 2]])
    step(profile, "TARGET_VERIFY", [[1, 3]])
    step(profile, "MIXED", [[2, 3]])
    profile.write()
    found = read_routing_profile(profile.path)
    assert found.model.layers == (0, 2)
    assert (found.model.hidden_size, found.model.num_experts, found.model.top_k) == (96, 4, 2)
    assert found.model.model_type == "qwen3_moe"
    assert found.tokens.tolist() == [2, 2, 1]
    for layer in (0, 1):
        assert found.prefill[layer].tolist() == [2, 1, 1, 0]
        assert found.decode[layer].tolist() == [0, 2, 1, 1]
        assert found.by_phase[2, layer].tolist() == [0, 0, 1, 1]


def test_it_is_written_while_there_are_steps(profile: ServerProfile) -> None:
    profile.write()
    assert not profile.path.exists()
    step(profile, "DECODE", [[0, 1]])
    for _ in range(3):  # the second one for what may have been under way
        profile.write()
        written = profile.path.stat().st_mtime_ns
    profile.write()
    assert profile.path.stat().st_mtime_ns == written
    step(profile, "DECODE", [[0, 1]])
    profile.write()
    assert read_routing_profile(profile.path).tokens.tolist() == [0, 2, 0]
    assert len(read_routing_profile(profile.path).window_tokens) == 2


def test_the_file_is_written_in_time(
    profile: ServerProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the thread, without anybody asking."""
    monkeypatch.setattr(server_profile, "SECONDS", 0.01)
    step(profile, "EXTEND", [[0, 1]])
    for _ in range(2000):
        if profile.path.exists():
            break
        time.sleep(0.01)
    assert read_routing_profile(profile.path).model.layers == (0, 2)


def test_a_folder_that_goes_away_does_not_end_the_server(
    profile: ServerProfile, caplog: pytest.LogCaptureFixture
) -> None:
    step(profile, "DECODE", [[0, 1]])
    profile.path.parent.rename(profile.path.parent.with_name("elsewhere"))
    profile.write()
    assert f"{profile.path} cannot be written" in caplog.text


def test_a_model_without_layers_of_ours(tmp_path: Path) -> None:
    """A draft model's runner may run first."""
    profile = ServerProfile(tmp_path / "profile.json")
    profile.before_forward(None, SimpleNamespace(forward_mode=SimpleNamespace(name="DECODE")))
    profile.write()
    assert not profile.path.exists()


def test_a_layer_that_does_not_say_how_many_experts_a_token_has(profile: ServerProfile) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"{VARIABLE}: layer 3 does not say"):
        profile.join(fused_moe(3, top_k=None), 4, CPU, None)


def test_the_variable(tmp_path: Path) -> None:
    assert chosen({}) is None and chosen({VARIABLE: ""}) is None
    path = tmp_path / "p.json"
    profile = chosen({VARIABLE: str(path)})
    assert profile is not None and profile.path == path
    assert chosen({VARIABLE: str(path)}) is profile  # of the process
    for wrong in (tmp_path, tmp_path / "p.txt", tmp_path / "none" / "p.json"):
        with pytest.raises(ValueError, match=r"must be a \.json file in a folder") as raised:
            chosen({VARIABLE: str(wrong)})
        assert str(wrong) in str(raised.value)
