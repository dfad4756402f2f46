"""Every way in which weights are stored: the planes mean what the file means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.loaders import Checkpoint, held_formats, inspect_checkpoint
from hybrid_moe.loaders.safetensors import ReadBuffer
from tests.stored_kinds import KINDS, write


@pytest.mark.parametrize("name", KINDS)
def test_values(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    stored = write(tmp_path, kind)
    source = Checkpoint.open(tmp_path).layer(0)
    fmt = FORMATS[kind.format]
    assert source.formats == (fmt, fmt) and source.is_exact(source.formats)
    assert (source.hidden, source.intermediate) == (kind.hidden, kind.intermediate)
    assert held_formats(source, METHODS[kind.method]) == source.formats
    buffer = ReadBuffer()
    for expert in range(2):
        tensors = source.expert(expert, buffer=buffer)
        for part in ("gate", "up", "down"):
            matrix, values = getattr(tensors, part), getattr(stored, part)[expert]
            # the product of a code, a scale and a factor, rounded once, and an offset's once more
            assert np.allclose(matrix.dequantize(fmt), values, rtol=2.0**-23, atol=0)
            for plane in matrix.planes.values():
                assert plane.strides[-1] == plane.itemsize  # what packers rely on


@pytest.mark.parametrize("name", KINDS)
def test_inspect_and_size(name: str, tmp_path: Path) -> None:
    """Nothing is expanded: strips take what the planes take, or 2 % more."""
    kind = KINDS[name]
    write(tmp_path, kind)
    summary = inspect_checkpoint(tmp_path)
    assert summary.problems == ()
    assert dict(summary.formats) == {kind.format: (0,)}
    fmt = FORMATS[kind.format]
    H, I = kind.hidden, kind.intermediate
    matrices = [(I, H), (I, H), (-(-H // 64) * 64, I)]  # strips of down have 64 rows
    planes = 2 * sum(fmt.nbytes(*shape) for shape in matrices)
    source = Checkpoint.open(tmp_path).layer(0)
    assert planes <= source.nbytes_as(source.formats) <= 1.02 * planes
    assert source.nbytes_as(source.formats) in summary.ram_experts.values()
