"""Weights that are quantized while they are loaded, and what is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, held_formats, quantize
from tests.stored_kinds import KINDS, Kind, Tensors, edit, write

SCRIPT = """
import sys
from hybrid_moe.loaders import Checkpoint
source = Checkpoint.open({path!r}).layer(0)
source.expert(1)
print("numba" in sys.modules)
"""


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8", "MOE_INT4", "MOE_INT8"])
@pytest.mark.parametrize("name", ["fp8", "fp8 ragged", "fp8 rows", "bf16"])
def test_to_integers(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time come to what the whole matrix comes to."""
    kind = KINDS[name]
    stored = write(tmp_path, kind)
    source = Checkpoint.open(tmp_path).layer(0)
    held = held_formats(source, METHODS[method])
    assert held == (FORMATS[f"INT{method[-1]}_ROW_FLOAT32"],) * 2
    assert not source.is_exact(held)
    monkeypatch.setattr(quantize, "_CHUNK", 1)
    tensors = source.expert(1, held)
    for part in ("gate", "up", "down"):
        codes, scales = held.down.encode(getattr(stored, part)[1].astype(np.float32))
        matrix = getattr(tensors, part)
        assert np.array_equal(matrix.codes, codes) and np.array_equal(matrix.scales, scales)


@pytest.mark.parametrize("method", ["MXFP4", "MXFP8", "FP8", "FP8_PERCHANNEL", "RAWINT4"])
def test_from_bf16(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write(tmp_path, KINDS["bf16"])
    source = Checkpoint.open(tmp_path).layer(0)
    held = held_formats(source, METHODS[method])
    monkeypatch.setattr(quantize, "_CHUNK", 1)
    matrix = source.expert(0, held).gate
    codes, scales = held.gate_up.encode(stored.gate[0].astype(np.float32))
    assert np.array_equal(matrix.codes, codes) and np.array_equal(matrix.scales, scales)
    assert matrix.scale_rows == held.gate_up.scale_rows


@pytest.mark.parametrize("name", ["fp8", "fp8 rows"])
def test_a_nan_is_not_quantized(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    write(tmp_path, kind)
    key = kind.key(1, 2, ".weight")

    def damage(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8)[-1, -1] = 0x7F

    edit(tmp_path, damage)
    source = Checkpoint.open(tmp_path).layer(0)
    with pytest.raises(CheckpointError, match=r"1\.down_proj.*NaN or infinite"):
        source.expert(1, FORMATS["INT8_ROW_FLOAT32"])


def test_rows_of_no_whole_groups(tmp_path: Path) -> None:
    write(tmp_path, Kind("BF16", KINDS["bf16"].make, "BF16", intermediate=96))
    source = Checkpoint.open(tmp_path).layer(0)
    with pytest.raises(ValueError, match="rows of 96 weights, which INT4_G128_FP16 does not hold"):
        held_formats(source, METHODS["GPTQ_INT4"])


@pytest.mark.parametrize(("name", "imported"), [("mxfp4", False), ("bf16", False), ("awq", True)])
def test_numba_is_imported_where_it_is_needed(name: str, imported: bool, tmp_path: Path) -> None:
    write(tmp_path, KINDS[name])
    script = SCRIPT.format(path=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(imported)
