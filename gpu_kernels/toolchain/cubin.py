"""What a cubin says about its kernel: registers, local memory, shared memory, parameters.

A cubin is an ELF file. Its section `.nv.info` holds attributes of each function, and
`.nv.info.NAME` those of one kernel (`EIATTR_...`, as `cuobjdump -elf` prints them). NVIDIA does not
describe the format; what is read here is what ptxas reports (`remarks{ptx}` of the DSL).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_KPARAM_INFO = 0x17
_FRAME_SIZE = 0x11
_REGCOUNT = 0x2F
_NOBITS = 8
_WITH_SIZE = 4
"""Format of an attribute that is followed by as many bytes as its last half-word says; of the
others the half-word is the value."""


@dataclass(frozen=True)
class Resources:
    """What a thread or a block of a kernel takes.

    Attributes:
        registers: of a thread, 32 bits each.
        local_bytes: of a thread, in memory that is the GPU's slowest: spilled registers, and arrays
            that are indexed while it runs. Kernels here need none.
        shared_bytes: of a block, beside what a launch asks for; from sm_90 on the system's 1024.
        parameters: (offset, bytes) of each parameter, in order.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    parameters: tuple[tuple[int, int], ...]


def read_resources(cubin: bytes, entry: str) -> Resources:
    """Of the kernel `entry`.

    Raises:
        ValueError: this is no cubin, or it lacks the kernel.
    """
    try:
        sections = dict(_sections(cubin))
        symbol = _symbol(sections, entry)
        of_all = list(_attributes(sections[".nv.info"]))
        of_kernel = list(_attributes(sections[f".nv.info.{entry}"]))
        counted = {
            kind: struct.unpack_from("<I", payload, 4)[0]
            for kind, payload in of_all
            if kind in (_REGCOUNT, _FRAME_SIZE) and struct.unpack_from("<I", payload)[0] == symbol
        }
        return Resources(
            registers=counted[_REGCOUNT],
            local_bytes=counted[_FRAME_SIZE],
            shared_bytes=len(sections.get(f".nv.shared.{entry}", b"")),
            parameters=_parameters(of_kernel),
        )
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"not a cubin with the kernel {entry}: {error!r}") from error


def _parameters(attributes: list[tuple[int, bytes]]) -> tuple[tuple[int, int], ...]:
    found = {}
    for kind, payload in attributes:
        if kind == _KPARAM_INFO:  # index, ordinal, offset, flags with the size from bit 18
            _, ordinal, offset, flags = struct.unpack("<IHHI", payload)
            found[ordinal] = offset, flags >> 18
    return tuple(found[ordinal] for ordinal in range(len(found)))


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content; zeros for what takes no room in the file."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("no 64-bit ELF file")
    (first,) = struct.unpack_from("<Q", elf, 0x28)
    step, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", elf, first + step * i) for i in range(count)]
    names = elf[rows[names_at][4] :]
    for name, kind, _, _, offset, size in rows:
        content = bytes(size) if kind == _NOBITS else elf[offset : offset + size]
        if len(content) != size:
            raise ValueError("it is cut off")
        yield _text(names, name), content


def _symbol(sections: dict[str, bytes], name: str) -> int:
    """Number of the symbol `name`."""
    for number, symbol in enumerate(struct.iter_unpack("<IBBHQQ", sections[".symtab"])):
        if _text(sections[".strtab"], symbol[0]) == name:
            return number
    raise KeyError(name)


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(b"\0", at)].decode()


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        kind, number, size = struct.unpack_from("<BBH", section, at)
        at += 4
        payload = section[at : at + size] if kind == _WITH_SIZE else b""
        at += len(payload)
        yield number, payload
