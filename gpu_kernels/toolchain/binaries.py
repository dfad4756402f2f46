"""Compiled kernels: from memory, from the cache on disk, else from compilers in other processes.

A cache entry is a line of JSON (entry point, PTX) followed by the cubin. Its name is a hash of all
that the code depends on (`kernel_sources`), so a machine with a filled cache never imports the DSL.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hybrid_moe import binary_cache
from hybrid_moe.gpu_kernels.definition import Artifacts, KernelDefinition, compile_here
from hybrid_moe.gpu_kernels.toolchain.compile_process import CompileError, Compiler
from hybrid_moe.gpu_kernels.toolchain.cubin import Resources, read_resources
from hybrid_moe.gpu_kernels.toolchain.kernel_sources import DSL, binary_key, dsl_version
from hybrid_moe.gpu_kernels.toolchain.parameters import parameter_places

logger = logging.getLogger(__name__)

_MOST_COMPILERS = 8
"""Processes of about 0.6 GB, with torch and the DSL."""

_known: dict[tuple[KernelDefinition, str], KernelBinary] = {}


@dataclass(frozen=True)
class KernelBinary:
    """A compiled kernel.

    Attributes:
        arch: what it runs on, see `architectures`.
        entry: name of the entry point.
        ptx: its text, for people and tests.
        cubin: its code.
        resources: registers and memory that it takes.
    """

    arch: str
    entry: str
    ptx: str
    cubin: bytes
    resources: Resources


def compiled(definition: KernelDefinition, arch: str) -> KernelBinary:
    """The kernel for `arch`, a name of `ARCHITECTURES`.

    Raises:
        CompileError: the DSL is not installed, or the kernel could not be compiled.
    """
    known = _known.get((definition, arch))
    return known if known is not None else warm([definition], arch)[0]


def compiled_here(definition: KernelDefinition, arch: str) -> KernelBinary:
    """`compiled`, but what is in neither memory nor cache is compiled in this process: for tests,
    whose many small kernels take less time than starting compilers."""
    if not fetched(definition, arch):
        keep(definition, arch, compile_here(definition, arch))
    return _known[definition, arch]


def warm(definitions: Sequence[KernelDefinition], arch: str) -> list[KernelBinary]:
    """Compile what is in neither memory nor cache, several at a time; in the order given.

    Raises:
        CompileError: of all that could not be compiled; the others are in the cache then.
    """
    return warm_all([(definition, arch) for definition in definitions])


def warm_all(wanted: Sequence[tuple[KernelDefinition, str]]) -> list[KernelBinary]:
    """`warm` for kernels of several architectures."""
    missing = [each for each in dict.fromkeys(wanted) if not fetched(*each)]
    if missing:
        with binary_cache.one_process():  # ranks of a server want the same kernels at one time
            if missing := [each for each in missing if not fetched(*each)]:
                _compile(missing)
    return [_known[each] for each in wanted]


def fetched(definition: KernelDefinition, arch: str) -> bool:
    """Look in memory, then on disk: whether the binary is in memory now."""
    if (definition, arch) in _known:
        return True
    key = binary_key(definition, arch)
    payload = None if key is None else binary_cache.read(f"{key}.cubin")
    if payload is None:
        return False
    try:
        _known[definition, arch] = _binary(definition, arch, _unpacked(payload))
    except ValueError as error:
        logger.warning("kernel cache entry %s.cubin will be rebuilt: %s", key, error)
        return False
    return True


def _compile(missing: Sequence[tuple[KernelDefinition, str]]) -> None:
    if dsl_version() is None:
        raise CompileError(
            f"{DSL} is not installed, which compiles kernels for the GPU: "
            'pip install "hybrid-moe[gpu]"'
        )
    waiting = list(reversed(missing))
    failed: list[str] = []

    def work() -> None:
        with Compiler() as compiler:
            while waiting:
                try:
                    definition, arch = waiting.pop()
                except IndexError:  # another thread was faster
                    return
                try:
                    keep(definition, arch, compiler.compile(definition, arch))
                except CompileError as error:
                    failed.append(str(error))

    compilers = min(len(missing), len(os.sched_getaffinity(0)), _MOST_COMPILERS)
    with ThreadPoolExecutor(compilers, thread_name_prefix="hybrid-moe-compile") as executor:
        for future in [executor.submit(work) for _ in range(compilers)]:
            future.result()
    if failed:
        raise CompileError("\n".join(failed))


def keep(definition: KernelDefinition, arch: str, artifacts: Artifacts) -> None:
    """Put what a compiler gave into memory and cache."""
    _known[definition, arch] = _binary(definition, arch, artifacts)
    key = binary_key(definition, arch)
    if key is not None:
        binary_cache.write(f"{key}.cubin", _packed(artifacts))
    logger.debug("compiled %s (%r) for %s", definition.name, definition.config, arch)


def _binary(definition: KernelDefinition, arch: str, artifacts: Artifacts) -> KernelBinary:
    """With its resources.

    Raises:
        ValueError: not a cubin of this kernel, or its parameters do not lie where a launch puts
            them.
    """
    resources = read_resources(artifacts.cubin, artifacts.entry)
    expected = parameter_places(definition)
    if resources.parameters != expected:
        raise ValueError(
            f"{definition.name}: the code has parameters (offset, bytes) {resources.parameters}, "
            f"its definition {expected}"
        )
    return KernelBinary(arch, artifacts.entry, artifacts.ptx, artifacts.cubin, resources)


def _packed(artifacts: Artifacts) -> bytes:
    header = json.dumps({"entry": artifacts.entry, "ptx": artifacts.ptx}).encode()
    return struct.pack("<I", len(header)) + header + artifacts.cubin


def _unpacked(payload: bytes) -> Artifacts:
    """Raises ValueError for what `_packed` has not made."""
    try:
        (size,) = struct.unpack_from("<I", payload)
        header = json.loads(payload[4 : 4 + size])
        return Artifacts(header["entry"], header["ptx"], payload[4 + size :])
    except (struct.error, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"no header of a kernel: {error!r}") from error
