"""The rehearsal of the benchmark at size: every step, in the model's layout, in a few MB."""

from __future__ import annotations

from pathlib import Path

import big
import pytest
from synthetic.checkpoint import make_checkpoint
from tables import BIG, markdown

from hybrid_moe.loaders import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(big.CHOICES["rehearsal"](0), tmp_path_factory.mktemp("models"))


def test_rehearsal(folder: Path) -> None:
    point = {"model": "rehearsal", **big.measure(folder, threads=1, cache=None)}
    weights = 2 * 16 * 3 * 256 * 128  # layers, experts, matrices
    assert point["expert_bytes"] == point["packed_bytes"] == weights * 17 // 32
    assert point["planned_bytes"] >= point["packed_bytes"]
    assert point["token_bytes"] == 6 * point["expert_bytes"] / 16
    assert all(point[name] > 0 for name in ("load_s", "decode_s", "prefill_s", "disk_GBps"))
    assert len(markdown(BIG, [point]).splitlines()) == 3


def test_sizes_are_as_published() -> None:
    """What `--gb` cuts is the number of layers."""
    model = big.CHOICES["deepseek-v4-flash"](13.7)
    tensors = model.list_tensors()
    experts = [t.plan for t in tensors if ".experts." in t.plan.key]
    assert len(experts) == 4 * 256 * 3 * 2
    assert 13.6e9 < sum(plan.nbytes for plan in experts) < 13.8e9


def test_the_checkpoint_is_read_as_one(folder: Path) -> None:
    source = Checkpoint.open(folder).layer(1)
    assert source.formats.name == "MXFP4" and source.num_experts == 16
    assert (source.hidden, source.intermediate) == (256, 128)
