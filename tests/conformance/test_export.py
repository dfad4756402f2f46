"""Clauses of submit_write_weight_scale_to_buffer: an expert's bytes in host buffers, cut for tensor
parallel ranks. Codes as stored, scales as bf16; w13 is gate over up, w2 is cut along its inputs."""

from __future__ import annotations

import pytest
import torch

from .kit import E, H, I, Kit

MAP = torch.arange(E).flip(0)


def _buffers(ranks: int) -> list[list[torch.Tensor]]:
    """w13 codes and scales, w2 codes and scales; one tensor per rank."""
    rows, columns = 2 * I // ranks, I // ranks
    shapes = [
        ((rows, H // 2), torch.uint8),
        ((rows, H // 32), torch.bfloat16),
        ((H, columns // 2), torch.uint8),
        ((H, columns // 32), torch.bfloat16),
    ]
    return [[torch.zeros(shape, dtype=dtype) for _ in range(ranks)] for shape, dtype in shapes]


def _expected(kit: Kit, expert: int, ranks: int) -> list[list[torch.Tensor]]:
    w, logical = kit.weights[0], int(MAP[expert])

    def stored(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = torch.from_numpy(w.scales[name][logical]).float() - 127
        codes = torch.from_numpy(w.codes[name][logical])
        return codes, torch.exp2(exponents).to(torch.bfloat16)

    gate, up, down = stored("gate"), stored("up"), stored("down")
    w13 = [
        [torch.cat([gate[p].chunk(ranks)[r], up[p].chunk(ranks)[r]]) for r in range(ranks)]
        for p in range(2)
    ]
    w2 = [list(down[p].chunk(ranks, dim=1)) for p in range(2)]
    return [*w13, *w2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_expert_is_written_for_each_rank(kit: Kit, ranks: int) -> None:
    wrapper = kit.load(MAP)
    for expert in (0, 6):
        buffers = _buffers(ranks)
        pointers = [[part.data_ptr() for part in parts] for parts in buffers]
        try:
            wrapper.submit_write_weight_scale_to_buffer(ranks, expert, *pointers)
        except NotImplementedError as error:
            pytest.skip(f"optional: {error}")
        wrapper.sync_write_weight_scale_to_buffer()
        expected = _expected(kit, expert, ranks)
        for found, wanted in zip(buffers, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_writing_before_load_raises(kit: Kit) -> None:
    wrapper = kit.make()
    pointers = [[part.data_ptr() for part in parts] for parts in _buffers(1)]
    with pytest.raises(Exception):  # noqa: B017 - any exception is an answer, a crash is not
        wrapper.submit_write_weight_scale_to_buffer(1, 0, *pointers)
        wrapper.sync_write_weight_scale_to_buffer()
