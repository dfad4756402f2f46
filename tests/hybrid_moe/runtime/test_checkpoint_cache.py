"""Checkpoints shared by the layers of a model: never an older state than that on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import files, safetensors
from hybrid_moe.loaders.files import INDEX_NAME
from hybrid_moe.runtime import checkpoint_cache
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Weights, wrapper

SINGLE = "model.safetensors"


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    KTMoEWrapper.force_release_loader()


def write(folder: Path, size: int) -> None:
    """A new file in place of the old one, as downloaders do it."""
    save_file({"w": np.full(size, float(size))}, folder / "new")
    (folder / "new").replace(folder / SINGLE)


def value(folder: Path) -> float:
    return float(checkpoint_cache.checkpoint_at(folder).index.read("w")[0])


@pytest.mark.parametrize("module", [files, safetensors])
def test_a_file_that_is_replaced_while_it_is_opened(
    module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the choice of files and the scan, or between the scan and the first read."""
    write(tmp_path, 3)
    function = "choose_files" if module is files else "read_header"
    original = getattr(safetensors, function)

    def then_replaced(*args: object) -> object:
        result = original(*args)
        write(tmp_path, 5)
        monkeypatch.undo()
        return result

    monkeypatch.setattr(safetensors, function, then_replaced)
    if module is files:
        assert value(tmp_path) == 5
    else:  # offsets of the old file are not used on the new one
        with pytest.raises(CheckpointError, match=r"changed since its header was read"):
            value(tmp_path)
    assert value(tmp_path) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder, 5),
        lambda folder: (folder / "config.json").write_text('{"num_experts": 3}'),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / INDEX_NAME).write_text("{}"),
        lambda folder: (folder / "model-00001-of-00002.safetensors").touch(),
    ],
)
def test_what_changes_is_read_again(change: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "config.json").write_text("{}")
    first = checkpoint_cache.checkpoint_at(tmp_path)
    assert checkpoint_cache.checkpoint_at(tmp_path) is first
    change(tmp_path)
    try:
        assert checkpoint_cache.checkpoint_at(tmp_path) is not first
    except CheckpointError:
        assert (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    """An engine reads the rest of the model, by rules of its own."""
    folder = Weights.random().save(tmp_path)
    shutil.copy(folder / SINGLE, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=rf"{SINGLE} and model-00001-of-00001\.safetensors"):
        wrapper(weight_path=folder).load_weights()
    (folder / "model-00001-of-00001.safetensors").unlink()
    wrapper(weight_path=folder).load_weights()


def test_a_lost_layer_is_told_by_every_layer(tmp_path: Path) -> None:
    folder = Weights.random().save(tmp_path, layer=0)
    (folder / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(CheckpointError, match=r"layer 1 .* has no tensors"):
        wrapper(weight_path=folder).load_weights()
