"""Write a synthetic checkpoint: the same bytes from the same seed, 16 MiB in memory at a time."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.loaders.model_config import CONFIG_NAME
from hybrid_moe.loaders.writer import ShardedWriter
from hybrid_moe.parallel import for_each
from synthetic.models import Synthetic, Tensor, scale_byte

SEED = 20
SHARD_BYTES = 5_000_000_000
_PIECE = 16 << 20
_BF16_ONE = 0x3F80


def make_checkpoint(model: Synthetic, models: Path, threads: int = 1) -> Path:
    """The folder of `model` below `models`; written where it is not there yet.

    `config.json` is written last, so a folder that has it is complete.

    Raises:
        ValueError: the folder holds something else.
        OSError: too little room on the disk.
    """
    folder = models / model.name
    config = {**model.config, "synthetic": {"seed": SEED}}
    file = folder / CONFIG_NAME
    if file.is_file():
        if json.loads(file.read_text()) != config:
            raise ValueError(f"{folder} holds another model than {model.name}: remove it")
        return folder
    tensors = model.list_tensors()
    needed = sum(tensor.plan.nbytes for tensor in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.partial"):  # of a run that was killed
        left.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: {needed} bytes will be written, {free} are free")
    writer = ShardedWriter(folder, [tensor.plan for tensor in tensors], SHARD_BYTES)
    try:
        for_each(tensors, lambda tensor: _write(writer, tensor), threads)
        writer.add_file(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    return folder


def _write(writer: ShardedWriter, tensor: Tensor) -> None:
    rng = np.random.Generator(np.random.SFC64([SEED, zlib.crc32(tensor.plan.key.encode())]))
    for start in range(0, tensor.plan.nbytes, _PIECE):
        nbytes = min(_PIECE, tensor.plan.nbytes - start)
        writer.write(tensor.plan.key, _values(rng, tensor, nbytes), start)


def _values(rng: np.random.Generator, tensor: Tensor, nbytes: int) -> Array:
    """The next `nbytes` of a tensor."""
    if tensor.fill == "codes":
        return np.frombuffer(rng.bytes(nbytes), np.uint8)
    if tensor.fill == "scales":
        middle = scale_byte(tensor.scale)
        return rng.integers(middle - 1, middle + 2, nbytes, dtype=np.uint8)
    if tensor.fill == "ones":
        return np.full(nbytes // 2, _BF16_ONE, np.uint16)
    normal = rng.standard_normal(nbytes // 2, dtype=np.float32)
    normal *= np.float32(tensor.scale)
    return normal.view(np.uint16)[1::2]  # the upper halves: BF16, cut off
