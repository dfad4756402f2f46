"""What a real SGLang server tells: its routing profile and its counts, beside the test's own.

Starts a server, so only with HYBRID_MOE_TEST_SERVER=1 (`make test-sglang`).
"""

from __future__ import annotations

import os
import re
import time
import urllib.request
from pathlib import Path

import pytest

if os.environ.get("HYBRID_MOE_TEST_SERVER") != "1":
    pytest.skip("starts an SGLang server: make test-sglang", allow_module_level=True)

from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.placement.routing_profile_file import read_routing_profile
from tests.sglang.model import EXPERTS, LAYERS, TOP_K, write_copy
from tests.sglang.test_server import PLACEMENTS, PROMPTS, TOKENS, KtServer

PLACEMENT = next(p for p in PLACEMENTS if p.name == "both halves")
SECONDS = 90.0
"""Until a file that is written every 20 seconds must be there."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> KtServer:
    """A server that was asked something and runs still."""
    folder = tmp_path_factory.mktemp("figures")
    models = {True: write_copy(folder / "mxfp4", dequantize=False)}
    made = KtServer(models, folder, PLACEMENT)
    made.environment = {**made.environment, "HYBRID_MOE_PROFILE": str(folder / "profile.json")}
    made.switches = ("--enable-metrics",)
    return made


def settled(path: Path) -> RoutingProfile:
    """The profile, when the file has not changed for longer than it is rewritten in."""
    deadline, last, since = time.monotonic() + SECONDS, -1, time.monotonic()
    while time.monotonic() < deadline:
        written = path.stat().st_mtime_ns if path.exists() else -1
        if written != last:
            last, since = written, time.monotonic()
        if last >= 0 and time.monotonic() - since > 45:
            return read_routing_profile(path)
        time.sleep(1)
    raise AssertionError(f"{path} was not written, or is written without end")


def test_profile_and_metrics(server: KtServer) -> None:
    with server:
        server.complete_all(PROMPTS, TOKENS, clients=4)
        profile = settled(Path(server.environment["HYBRID_MOE_PROFILE"]))
        url = f"http://127.0.0.1:{server.port}/metrics"
        text = urllib.request.urlopen(url, timeout=60).read().decode()
        counted = server.counted()
    assert profile.model.layers == tuple(range(LAYERS))
    assert (profile.model.num_experts, profile.model.top_k) == (EXPERTS, TOP_K)
    assert profile.counts.sum() == counted["chosen"]
    assert profile.by_phase[:2].sum() == counted["chosen"]  # no step mixes the phases here
    assert profile.tokens[1] >= len(PROMPTS) * (TOKENS - 1)  # the first of each ends its prefill
    hot = sum(profile.counts[layer, ids].sum() for layer, ids in PLACEMENT.hot.items())
    assert hot == counted["hot"]

    def of(name: str) -> float:
        found = re.findall(rf"^hybrid_moe_{name}_total(?:{{[^}}]*}})? (\S+)$", text, re.M)
        return sum(map(float, found))

    assert of("cold_pairs") == counted["cold"]
    assert of("hot_pairs") + of("hot_pairs_alone") == counted["hot"]
    assert of("read_bytes") > 0 and of("busy_seconds") > 0 and of("faults") == 0
