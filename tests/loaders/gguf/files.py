"""GGUF files for tests, field by field: good ones, and any kind of bad one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.loaders.gguf.ggml_types import TYPES_BY_NAME, GgmlType

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = range(11)
LETTERS = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f",
           BOOL: "B", UINT64: "Q", 11: "q", 12: "d"}  # fmt: skip


def text(value: str | bytes) -> bytes:
    """A string with its length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    """A value behind its type."""
    raw = text(value) if kind == STRING else struct.pack(f"<{LETTERS[kind]}", value)
    return struct.pack("<I", kind) + raw


def array(kind: int, values: Sequence[Any]) -> bytes:
    """An array behind its type."""
    parts = (text(v) if kind == STRING else struct.pack(f"<{LETTERS[kind]}", v) for v in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(parts)


@dataclass(frozen=True)
class Entry:
    """A tensor as a header states it; `shape` outermost first, `data` its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: bytes = b""
    offset: int | None = None


@dataclass(frozen=True)
class GgufFile:
    """All fields of a file; what is None follows from the rest."""

    keys: tuple[tuple[str, bytes], ...] = ()
    tensors: tuple[Entry, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32
    after: bytes = b""

    def with_key(self, key: str, value: bytes) -> GgufFile:
        """The same with one more key."""
        return replace(self, keys=(*self.keys, (key, value)))

    def content(self) -> bytes:
        """Its bytes."""
        head = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if self.num_tensors is None else self.num_tensors,
            len(self.keys) if self.num_keys is None else self.num_keys,
        )
        head += b"".join(text(key) + value for key, value in self.keys)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            head += struct.pack("<IQ", tensor.kind, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data + self.after

    def write(self, path: Path) -> Path:
        """Write it to `path`, which is returned."""
        path.write_bytes(self.content())
        return path


def entry(name: str, shape: tuple[int, ...], kind: str = "F32", seed: int = 0) -> Entry:
    """A tensor of random weights, all of them finite."""
    row = TYPES_BY_NAME[kind]
    blocks = random_blocks(row, np.random.default_rng(seed), int(np.prod(shape[:-1])), shape[-1])
    return Entry(name, shape, row.number, blocks.tobytes())


_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2),
           "Q4_K": (0, 2), "Q5_K": (0, 2), "MXFP4": (), "F32": (), "BF16": ()}  # fmt: skip
"""Where fp16 numbers lie in a block; of others at byte 0."""


def random_blocks(kind: GgmlType, rng: np.random.Generator, N: int, K: int) -> Array:
    """Rows of random blocks, uint8 [N, bytes]: all bits occur, and every weight is finite.

    Numbers are of magnitude 2^-9 to 2^-5, so that products of scales and codes are weights of
    ordinary size.
    """
    blocks = rng.integers(0, 256, (N, K // kind.weights, kind.nbytes), np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] = rng.integers(115, 122, blocks.shape[:-1])
    elif kind.name in ("F32", "BF16"):
        blocks[..., -1] = 0x3C | (blocks[..., -1] & 0x80)
    for at in _HALVES.get(kind.name, (0,)):
        blocks[..., at + 1] = (blocks[..., at + 1] & 0x83) | rng.choice([0x18, 0x1C, 0x20, 0x24])
    return blocks.reshape(N, -1)


E_, H_, I_ = 3, 256, 512
"""Sizes of the test model: whole superblocks in both directions."""


def expert_entries(
    layer: int,
    gate: str = "Q4_K",
    down: str = "Q6_K",
    *,
    up: str | None = None,
    fused: bool = False,
    bias: bool = False,
    sizes: tuple[int, int, int] = (E_, H_, I_),
) -> list[Entry]:
    """The tensors of a layer's experts in these types."""
    E, H, I = sizes
    shapes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}
    if fused:
        shapes = {"gate_up": (E, 2 * I, H), "down": (E, H, I)}
    kinds = {"gate": gate, "gate_up": gate, "up": up or gate, "down": down}
    found = []
    for seed, (name, shape) in enumerate(shapes.items()):
        stem = f"blk.{layer}.ffn_{name}_exps"
        found.append(entry(f"{stem}.weight", shape, kinds[name], 10 * layer + seed))
        if bias:
            found.append(entry(f"{stem}.bias", shape[:2], "F32", 100 * layer + seed))
    return found


def model_file(*tensors: Entry, layers: int = 1, architecture: str = "qwen3moe") -> GgufFile:
    """A file of those tensors with the metadata of a small model."""
    a = architecture
    numbers = {
        "block_count": layers,
        "context_length": 128,
        "embedding_length": H_,
        "feed_forward_length": I_,
        "expert_feed_forward_length": I_,
        "expert_count": E_,
        "expert_used_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
    }
    keys = [
        ("general.architecture", scalar(STRING, a)),
        *((f"{a}.{key}", scalar(UINT32, value)) for key, value in numbers.items()),
        (f"{a}.attention.layer_norm_rms_epsilon", scalar(FLOAT32, 1e-6)),
        (f"{a}.rope.freq_base", scalar(FLOAT32, 10000.0)),
        ("tokenizer.ggml.tokens", array(STRING, [f"t{i}" for i in range(64)])),
    ]
    return GgufFile(tuple(keys), tensors)


def write_split(folder: Path, file: GgufFile, counts: Sequence[int], stem: str = "m") -> list[Path]:
    """The same in several files, with so many tensors each."""
    paths, first = [], 0
    for number, count in enumerate(counts):
        split = (
            ("split.no", scalar(UINT16, number)),
            ("split.count", scalar(UINT16, len(counts))),
            ("split.tensors.count", scalar(INT32, len(file.tensors))),
        )
        keys = (*file.keys, *split) if number == 0 else split
        part = replace(file, keys=keys, tensors=file.tensors[first : first + count])
        paths.append(part.write(folder / f"{stem}-{number + 1:05d}-of-{len(counts):05d}.gguf"))
        first += count
    return paths
