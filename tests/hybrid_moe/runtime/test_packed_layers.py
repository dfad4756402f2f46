"""The packed cache: the same bits without packing, whole files or none, and nothing but its own."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.cpu_kernels.fingerprint import fingerprint
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import LayerFormats, layer_formats
from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.loaders import Checkpoint, load_layer
from hybrid_moe.loaders import packed_cache as cache_module
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.packed_cache import PAGE, PackedCache, PackedWriter
from hybrid_moe.loaders.safetensors import SafetensorsIndex
from hybrid_moe.logs import warn_once
from hybrid_moe.runtime.packed_layers import cache_at, load_packed_layer
from hybrid_moe.wrapper import KTMoEWrapper
from tests.families import EXPERTS, write_family
from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.tiny_models import build, logits, prompt
from tests.loaders.gguf.files import expert_entries, model_file

MX, BF = layer_formats(MXFP4), layer_formats(BF16)
ALL = np.ones(EXPERTS, np.bool_)
IDENTITY = np.arange(EXPERTS)
POOLS = [PoolConfig(1)] + ([PoolConfig(2, pools=2)] if usable_cores() > 1 else [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: write_family(name, tmp_path_factory.mktemp(name)).directory)


@pytest.fixture
def model(written: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(written("gpt_oss_mxfp4"), tmp_path / "model"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of tensors that are read from checkpoints."""
    keys: list[str] = []
    real = SafetensorsIndex.read

    def read(index: SafetensorsIndex, key: str, *args: Any, **kwargs: Any) -> Array:
        keys.append(key)
        return real(index, key, *args, **kwargs)

    monkeypatch.setattr(SafetensorsIndex, "read", read)
    return keys


def empty(
    source: ExpertSource, formats: LayerFormats, wanted: Array = ALL, pool: PoolConfig = POOLS[0]
) -> ExpertLayer:
    layer = ExpertLayer(formats, len(wanted), source.hidden, source.intermediate, pool=pool)
    layer.allocate(wanted, biases=source.has_bias)
    return layer


def load(
    path: Path, directory: Path, formats: LayerFormats = MX, wanted: Array = ALL,
    mapping: Array = IDENTITY, pool: PoolConfig = POOLS[0], **more: Any,
) -> list[bytes]:  # fmt: skip
    """Load layer 1 by way of a cache: the bytes of its arenas."""
    source, store = Checkpoint.open(path).layer(1), cache_at(directory)
    assert store is not None
    layer = empty(source, formats, wanted, pool)
    try:
        load_packed_layer(store, source, formats, mapping, wanted, layer, 2, **more)
        assert (layer.loaded == wanted).all()
        return [arena.bytes.tobytes() for arena in layer.arenas]
    finally:
        layer.close()


def direct(
    path: Path, formats: LayerFormats = MX, wanted: Array = ALL, mapping: Array = IDENTITY,
    pool: PoolConfig = POOLS[0],
) -> list[bytes]:  # fmt: skip
    """The same without a cache."""
    source = Checkpoint.open(path).layer(1)
    layer = empty(source, formats, wanted, pool)
    load_layer(source, mapping, wanted, layer.load, formats=formats)
    found = [arena.bytes.tobytes() for arena in layer.arenas]
    layer.close()
    return found


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "packed cache" in r.getMessage()]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"{p.pools} pools")
@pytest.mark.parametrize(
    ("name", "formats"),
    [("deepseek_v4_mxfp4", MX), ("gpt_oss_mxfp4", MX), ("qwen3_moe_fused", MX), ("mixtral", BF)],
)
def test_the_second_load_has_the_same_bits_and_reads_no_checkpoint(
    written: Callable[[str], Path], directory: Path, reads: list[str],
    name: str, formats: LayerFormats, pool: PoolConfig,
) -> None:  # fmt: skip
    """Stored as it is, with biases, and quantized on the way."""
    path = written(name)
    expected = direct(path, formats, pool=pool)
    assert load(path, directory, formats, pool=pool) == expected
    reads.clear()
    steps: list[tuple[int, int]] = []
    found = load(path, directory, formats, pool=pool, progress=lambda *step: steps.append(step))
    assert found == expected and reads == []
    assert steps == [(n, EXPERTS) for n in range(1, EXPERTS + 1)]
    (file,) = files(directory)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_an_expert_is_one_range_of_whole_pages(model: Path, directory: Path) -> None:
    """What reads an expert from disk alone finds it by arithmetic, without this package."""
    pool = POOLS[-1]
    arenas = load(model, directory, pool=pool)
    (file,) = files(directory)
    content = file.read_bytes()
    sizes = [len(arena) // EXPERTS for arena in arenas]
    rounded = [-(-size // PAGE) * PAGE for size in sizes]
    header = len(content) - EXPERTS * sum(rounded)
    assert header > 0 and header % PAGE == 0
    for expert in range(EXPERTS):
        at = header + expert * sum(rounded)
        for arena, size, room in zip(arenas, sizes, rounded, strict=True):
            assert content[at : at + size] == arena[expert * size : (expert + 1) * size]
            assert not any(content[at + size : at + room])
            at += room


def test_several_ids_of_one_expert_and_masked_ones(model: Path, directory: Path) -> None:
    mapping, wanted = np.array([2, 0, 2, 1]), np.array([True, False, True, True])
    expected = direct(model, wanted=wanted, mapping=mapping)
    for _ in range(2):
        assert load(model, directory, wanted=wanted, mapping=mapping) == expected


def test_experts_that_the_file_lacks(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another placement wants others: the file is made anew, and has one of fewer then too."""
    few = IDENTITY < 2
    load(model, directory, wanted=few)
    before = files(directory)
    with caplog.at_level(logging.WARNING):
        assert load(model, directory) == direct(model)
        assert len(warnings(caplog)) == 1 and "lacks" in warnings(caplog)[0]
        assert load(model, directory, wanted=few) == direct(model, wanted=few)
    assert files(directory) == before and len(warnings(caplog)) == 1


def test_other_formats_and_pools_have_files_of_their_own(
    written: Callable[[str], Path], directory: Path
) -> None:
    path = written("mixtral")
    for formats, pool in [(BF, POOLS[0]), (MX, POOLS[0]), (MX, POOLS[-1])]:
        assert load(path, directory, formats, pool=pool) == direct(path, formats, pool=pool)
    assert len(files(directory)) == 1 + len(POOLS)


def test_a_changed_checkpoint(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One file of each layer is kept, that of the latest state."""
    load(model, directory)
    (before,) = files(directory)
    shard = next(model.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-64:] = bytes(64)
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load(model, directory) == direct(model)
    (after,) = files(directory)
    assert after != before and "another state" in warnings(caplog)[0]


def test_files_beside_the_weights_change_nothing(
    model: Path, directory: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    load(model, directory)
    (model / "README.md").write_text("a note")
    reads.clear()
    with caplog.at_level(logging.WARNING):
        load(model, directory)
    assert not reads and not warnings(caplog)


def test_a_directory_that_has_gone_bad_meanwhile(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is read from it or written to it any more; the weights come all the same."""
    source, store = Checkpoint.open(model).layer(1), cache_at(directory)
    assert store is not None
    layer = empty(source, MX)
    directory.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        load_packed_layer(store, source, MX, IDENTITY, ALL, layer, 1)
    assert layer.loaded.all() and files(directory) == []
    assert all("others may write" in message for message in warnings(caplog))
    layer.close()


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _flip(at: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    return damage


def _replace(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def _link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, "bytes, expected"),
    "empty": (_replace(b""), "too short"),
    "foreign": (_replace(bytes(100_000)), "no packed layer"),
    "other version": (_flip(8), "version"),
    "experts": (_flip(16), "bytes, expected"),
    "no experts": (lambda f: _flip(16)(f) or _flip(16)(f) or _zero(f, 16), "0 experts"),
    "key": (_flip(48), "header is damaged"),
    "table": (_flip(150), "header is damaged"),
    "weights": (_flip(-PAGE), "other bytes"),
    "writable": (lambda file: file.chmod(0o666), "others may write"),
    "link": (_link, "symbolic links"),
    "pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "not a regular file"),
}


def _zero(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + 4] = bytes(4)
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_and_built_again(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture, reads: list[str], kind: str
) -> None:
    expected = load(model, directory)
    (file,) = files(directory)
    damage, why = DAMAGE[kind]
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert load(model, directory) == expected
        assert len(warnings(caplog)) == 1
        assert why in warnings(caplog)[0] and str(file) in warnings(caplog)[0]
        reads.clear()
        assert load(model, directory) == expected
    assert files(directory) == [file] and not reads and len(warnings(caplog)) == 1


def test_an_interrupted_load_leaves_nothing(model: Path, directory: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(model, directory, progress=interrupt)
    assert files(directory) == []


@pytest.mark.parametrize("step", ["put", "finish"])
def test_a_full_disk_costs_the_file_alone(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, step: str,
) -> None:  # fmt: skip
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackedWriter, step, fail)
    with caplog.at_level(logging.WARNING):
        assert load(model, directory) == direct(model)
    assert files(directory) == [] and "No space left" in warnings(caplog)[0]


def test_no_room_for_the_whole_file(
    model: Path, directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", fail)
    with caplog.at_level(logging.WARNING):
        assert load(model, directory) == direct(model)
    assert files(directory) == [] and len(warnings(caplog)) == 1


def test_what_killed_writers_leave_behind_goes(model: Path, directory: Path) -> None:
    load(model, directory)
    (file,) = files(directory)
    old, new = (directory / f"{file.name}.{c * 16}.tmp" for c in "ab")
    for left in (old, new, directory / "somebody's.tmp"):
        left.touch()
    for left in (old, directory / "somebody's.tmp"):
        os.utime(left, (0, 0))
    file.unlink()
    load(model, directory)
    assert files(directory) == sorted([file, new, directory / "somebody's.tmp"])


@pytest.fixture
def _shared(directory: Path) -> Iterator[None]:
    directory.mkdir()
    directory.chmod(0o777)
    yield


@pytest.mark.usefixtures("_shared")
def test_a_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="others may write"):
        PackedCache(directory, fingerprint)


def test_a_directory_that_is_none_is_refused(directory: Path, tmp_path: Path) -> None:
    directory.write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        PackedCache(directory, fingerprint)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="it is a link"):
        PackedCache(link, fingerprint)


def test_wrappers(written: Callable[[str], Path], directory: Path, reads: list[str]) -> None:
    path, outputs = written("deepseek_v4_mxfp4"), []
    source = Checkpoint.open(path).layer(1)
    hidden = torch.randn(5, source.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, weights = torch.arange(10).reshape(5, 2) % EXPERTS, torch.full((5, 2), 0.5)
    for place in (None, directory, directory):
        reads.clear()
        wrapper = KTMoEWrapper(
            1, EXPERTS, 2, source.hidden, source.intermediate, weight_path=path, cache=place,
            cpuinfer_threads=1, threadpool_count=1,
        )  # fmt: skip
        wrapper.load_weights()
        outputs.append(wrapper.forward(hidden, ids, weights))
        wrapper.close()
    assert not reads and torch.equal(outputs[0], outputs[1]) and torch.equal(*outputs[1:])


def test_models(tmp_path: Path, directory: Path, reads: list[str]) -> None:
    """`from_pretrained`, of which only the experts are in the cache."""
    path, found = save(build("qwen3_moe"), tmp_path / "model"), []
    for place in (None, directory, directory):
        reads.clear()
        model = from_pretrained(path, "MXFP4", 1, dense="torch", cache=place, progress=False)
        found.append(logits(model, prompt()))
    assert not [key for key in reads if ".experts." in key]
    assert torch.equal(found[0], found[1]) and torch.equal(*found[1:])


def test_slots_do_without(
    written: Callable[[str], Path], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written("deepseek_v4_mxfp4")
    source = Checkpoint.open(path).layer(1)
    warn_once.cache_clear()
    wrapper = KTMoEWrapper(
        1, EXPERTS, 2, source.hidden, source.intermediate, weight_path=path, cache=directory,
        cpuinfer_threads=1, threadpool_count=1, num_gpu_experts=1, gpu_backend="torch",
        gpu_device="cpu",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        wrapper.load_weights()
    wrapper.close()
    assert files(directory) == [] and "GPU slots do without" in caplog.text


def test_two_formats_out_of_one_file(directory: Path, tmp_path: Path, reads: list[str]) -> None:
    """Blocks of GGUF, which are taken apart on the way, and biases."""
    file = model_file(*expert_entries(0, "Q4_K", "Q6_K", bias=True)).write(tmp_path / "m.gguf")
    source, store = Checkpoint.open(file).layer(0), cache_at(directory)
    assert store is not None
    wanted, found = np.ones(source.num_experts, np.bool_), []
    for cached in (False, True, True):
        reads.clear()
        layer = empty(source, source.formats, wanted)
        mapping = np.arange(source.num_experts)
        if cached:
            load_packed_layer(store, source, source.formats, mapping, wanted, layer, 2)
        else:
            load_layer(source, mapping, wanted, layer.load, formats=source.formats)
        biases = np.concatenate([layer.unpack(0).gate.bias, layer.unpack(2).down.bias])  # type: ignore[list-item]
        found.append((layer.arenas[0].bytes.tobytes(), biases.tobytes()))
        layer.close()
    assert not reads and found[0] == found[1] == found[2]
