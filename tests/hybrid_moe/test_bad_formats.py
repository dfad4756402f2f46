"""Damaged checkpoints of every kind, and hostile calls of every format: what `test_bad_input` and
`tests/loaders/test_bad_checkpoints.py` try on one of them.

Whatever happens to a tensor of an expert, loading raises an error that names the expert's matrix,
or gives the bits that the checkpoint has: all of them, where nothing was lost. The same wrapper
loads the whole one afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hybrid_moe.formats.numbers import Array
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.test_wrapper_formats import FIRST, RUN, batch_of, wrapper_of
from tests.stored_kinds import FILE, KINDS, Kind, Tensors, edit, write

Damage = Callable[[torch.Tensor], torch.Tensor | None]
"""A tensor -> what is there instead; None for nothing."""

WEIGHTS = (".weight",)
"""A float weight that is not a number is kept as it is, and what it gives is not a number."""
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _last(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """With another number in the last place; of 8-bit floats, the bits of their NaN."""
    damaged = tensor.clone()
    if tensor.dtype in NUMBERS:
        damaged.view(-1)[-1] = value
    elif tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        bits = 0x7F if tensor.dtype is torch.float8_e4m3fn else 0xFF
        damaged.view(torch.uint8).view(-1)[-1] = bits
    return damaged


DAMAGE: dict[str, Damage] = {
    "missing": lambda t: None,
    "a row less": lambda t: t[:-1] if t.dim() else t.reshape(1, 1, 1),
    "a row more": lambda t: torch.cat([t, t[-1:]]) if t.dim() else torch.stack([t, t]),
    "a column less": lambda t: t[..., :-1] if t.dim() else t.reshape(1, 1),
    "no rows": lambda t: t[:0] if t.dim() else t.reshape(1)[:0],
    "one axis more": lambda t: t[None, None, None],
    "another type": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
    "a wider type": lambda t: t.float().to(torch.float64) if t.is_floating_point() else t.double(),
    "not a number": lambda t: _last(t, float("nan")),
    "infinite": lambda t: _last(t, float("inf")),
}


@pytest.fixture(autouse=True)
def _forget_checkpoints() -> Iterator[None]:
    yield
    KTMoEWrapper.force_release_loader()


def _planes(w: KTMoEWrapper) -> list[Array]:
    """All bits of both experts."""
    return [
        plane
        for expert in range(2)
        for matrix in (w.unpack(expert).gate, w.unpack(expert).up, w.unpack(expert).down)
        for _, plane in sorted(matrix.planes.items())
    ]


def _differing(these: list[Array], those: list[Array]) -> int:
    """Elements that are not equal."""
    assert [a.shape for a in these] == [a.shape for a in those]
    return sum(int((a != b).sum()) for a, b in zip(these, those, strict=True))


def _suffixes(folder: Path, kind: Kind) -> list[str]:
    """Of the tensors of a matrix."""
    found: list[str] = []
    stem = kind.key(1, 1, "")
    edit(folder, lambda tensors: found.extend(k.removeprefix(stem) for k in tensors if stem in k))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_damaged_tensors(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    write(tmp_path, kind)
    file = tmp_path / FILE
    good = file.read_bytes()
    whole = wrapper_of(kind, weight_path=tmp_path, method="auto")
    whole.load_weights()
    expected = _planes(whole)
    stem, refused = kind.key(1, 1, ""), 0
    for suffix in _suffixes(tmp_path, kind):
        for what, damage in DAMAGE.items():
            file.write_bytes(good)
            w = wrapper_of(kind, weight_path=tmp_path, method="auto")

            def change(tensors: Tensors, key: str = stem + suffix, damage: Damage = damage) -> None:
                damaged = damage(tensors.pop(key))
                if damaged is not None:
                    tensors[key] = damaged

            edit(tmp_path, change)
            try:
                w.load_weights()
            except ValueError as error:  # CheckpointError is one
                refused += 1
                assert stem in str(error), (suffix, what)
                assert not w.loaded and w.nbytes == 0
                file.write_bytes(good)
                w.load_weights()
            assert _differing(_planes(w), expected) <= (suffix in WEIGHTS), (suffix, what)
            w.close()
    assert refused >= 6  # of the weights themselves at least


def _wrong_index(folder: Path, kind: Kind) -> None:
    index = {"weight_map": {kind.key(1, 1, ".weight"): "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / FILE).unlink()


def _cut(folder: Path, kind: Kind) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def _without_an_expert(folder: Path, kind: Kind) -> None:
    stem = kind.key(1, 0, "").rpartition(".")[0] + "."
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if stem in key])


def _with_another_expert(folder: Path, kind: Kind) -> None:
    old, new = (kind.key(expert, 0, "").rpartition(".")[0] + "." for expert in (1, 2))
    edit(
        folder,
        lambda tensors: tensors.update(
            {key.replace(old, new): tensors[key].clone() for key in list(tensors) if old in key}
        ),
    )


FILES: dict[str, tuple[Callable[[Path, Kind], object], str]] = {
    "missing shard": (_wrong_index, r"model-2\.safetensors: this shard is missing"),
    "truncated": (_cut, r"model\.safetensors: truncated"),
    "no safetensors": (
        lambda folder, kind: (folder / FILE).write_bytes(b"<html>" * 99),
        r"model\.safetensors: a header of \d+ bytes",
    ),
    "too few experts": (_without_an_expert, r"map\[1\] = 1: the checkpoint has experts 0 to 0"),
    "too many experts": (_with_another_expert, "num_experts is 2, but layer 0 of .* has 3 experts"),
}


@pytest.mark.parametrize("name", FIRST.values())
def test_damaged_files(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    write(tmp_path, kind)
    good = (tmp_path / FILE).read_bytes()
    for damage, message in FILES.values():
        w = wrapper_of(kind, weight_path=tmp_path, method="auto")
        damage(tmp_path, kind)
        with pytest.raises(ValueError, match=message):
            w.load_weights()
        assert not w.loaded and w.nbytes == 0
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
        (tmp_path / FILE).write_bytes(good)
        w.load_weights()
        w.close()


@pytest.mark.parametrize("name", RUN)
def test_hostile_calls(name: str, tmp_path: Path) -> None:
    """Ids that are nobody's give zeros; a wild value stays in its row; what is no batch is refused;
    and the next call has the bits of the first."""
    kind = KINDS[name]
    write(tmp_path, kind)
    w = wrapper_of(kind, weight_path=tmp_path, method="auto")
    w.load_weights()
    x, ids, weights = batch_of(kind)
    clean = w.forward(x, ids, weights)
    others = torch.arange(len(x)) != 2
    for nobody in (-1, 2, 2**32 + 1, -(2**63)):
        assert not w.forward(x, torch.full_like(ids, nobody), weights).any()
    for value in (float("nan"), float("inf"), 3.4e38):
        for place in range(0, 3, 2):
            batch = [x.clone(), ids, weights.clone()]
            batch[place][2] = value
            y = w.forward(*batch)
            assert torch.equal(y[others], clean[others]) and not torch.equal(y[2], clean[2])
    for wrong in ((x[:, :-32], ids, weights), (x, ids[:-1], weights), (x, ids, weights[:, :1])):
        with pytest.raises(ValueError, match="has shape"):
            w.forward(*wrong)
    for strange in ((x.to_sparse(), ids, weights), (x, ids.double(), weights)):
        with pytest.raises(TypeError, match=r"must be|has dtype"):
            w.forward(*strange)
    assert not w.forward(x[:0], ids[:0], weights[:0]).numel()
    assert torch.equal(w.forward(x, ids, weights), clean)
    w.close()
