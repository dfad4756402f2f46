"""Synthetic checkpoints: what is published of the models, and bytes that depend on nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic.checkpoint import make_checkpoint
from synthetic.ggml_blocks import ggml_blocks
from synthetic.models import E2M1_RMS, GROUP, MODELS, scale_byte

from hybrid_moe.formats.mx import E2M1_VALUES, MXFP4
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.loaders import Checkpoint
from tests.hybrid_moe.planning.fake_checkpoints import MODELS as PUBLISHED

SMALL = MODELS["small"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(SMALL, tmp_path_factory.mktemp("models"), threads=2)


@pytest.mark.parametrize(
    ("name", "published", "billions"),
    [("gpt-oss-20b", "gpt-oss-20b", 20.9), ("qwen3-30b-a3b", "Qwen3-30B-A3B-MXFP4", 30.5)],
)
def test_the_large_ones_are_as_published(name: str, published: str, billions: float) -> None:
    model, other = MODELS[name], PUBLISHED[published]
    tensors = model.list_tensors()
    made = {t.plan.key: (t.plan.dtype, t.plan.shape) for t in tensors}
    assert made == {key: (dtype, shape) for key, dtype, shape in other.tensors(other.config)}
    for key, value in other.config.items():
        assert model.config[key] == value
    codes = sum(math.prod(t.plan.shape) for t in tensors if t.fill == "codes")
    others = sum(math.prod(t.plan.shape) for t in tensors if t.plan.dtype == "BF16")
    assert (2 * codes + others) / 1e9 == pytest.approx(billions, abs=0.05)


def test_another_vocabulary_is_another_model() -> None:
    model = MODELS["gpt-oss-20b"]
    smaller = model.with_vocabulary(50048)
    assert model.with_vocabulary(201088) is model and smaller.name == "gpt-oss-20b-50048"
    rows = {t.plan.shape[0] for t in smaller.list_tensors() if "embed" in t.plan.key}
    assert rows == {50048}


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = make_checkpoint(SMALL, tmp_path, threads=1)
    files = sorted(file.name for file in small.iterdir())
    assert files == ["config.json", "model.safetensors"] == sorted(f.name for f in again.iterdir())
    for name in files:
        assert (small / name).read_bytes() == (again / name).read_bytes()


def test_what_is_there_is_kept_and_what_is_another_model_is_refused(small: Path) -> None:
    config = small / "config.json"
    before = config.stat().st_mtime_ns
    assert make_checkpoint(SMALL, small.parent) == small
    assert config.stat().st_mtime_ns == before
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"vocab_size": 5}))
    try:
        with pytest.raises(ValueError, match="holds another model than small"):
            make_checkpoint(SMALL, small.parent)
    finally:
        config.write_text(text)


def test_what_a_killed_run_left_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / SMALL.name
    folder.mkdir()
    (folder / "model.safetensors.partial").write_bytes(b"half")
    make_checkpoint(SMALL, tmp_path)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_keep_the_size_of_what_they_multiply(small: Path) -> None:
    """Rows of N weights of variance 1/N; a random scale byte is half, one or two of its middle."""
    spread = math.sqrt((0.25 + 1 + 4) / 3)
    assert pytest.approx(np.std(E2M1_VALUES), rel=1e-3) == E2M1_RMS
    checkpoint = Checkpoint.open(small)
    expert = checkpoint.layer(0).expert(3, MXFP4, None)
    values = MXFP4.dequantize(expert.down.codes, expert.down.scales)
    expected = 2.0 ** (scale_byte(256**-0.5) - 127) * E2M1_RMS * spread
    assert values.std() == pytest.approx(expected, rel=0.02)
    assert 0.5 < values.std() * 256**0.5 < 2
    router = checkpoint.index.read("model.layers.1.mlp.router.weight").view(np.uint16)
    weights = (router.astype(np.uint32) << 16).view(np.float32)
    assert weights.std() * 512**0.5 == pytest.approx(1, rel=0.05)


def test_ggml_reads_the_same_weights_from_its_blocks() -> None:
    """Element j of ggml's 32 is the low half of byte 1 + j, element j + 16 the high one."""
    rng = np.random.default_rng(0)
    N, groups = 5, 3
    codes = rng.integers(0, 256, (N, GROUP // 2 * groups), dtype=np.uint8)
    scales = rng.integers(100, 140, (N, groups), dtype=np.uint8)
    blocks = ggml_blocks(Matrix(codes, scales)).reshape(N, groups, 17)
    table = np.array(E2M1_VALUES)
    quants = blocks[..., 1:]
    elements = np.concatenate([table[quants & 15], table[quants >> 4]], axis=-1)
    values = elements * 2.0 ** (blocks[..., :1].astype(np.float64) - 127)
    assert np.array_equal(values.reshape(N, -1), MXFP4.dequantize(codes, scales))
