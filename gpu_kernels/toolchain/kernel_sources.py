"""A hash of all that determines a kernel's code, so that it is found without the compiler."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.imported import IMPORTED_AT

logger = logging.getLogger(__name__)

DSL = "nvidia-cutlass-dsl"
TESTED_DSL = "4.8.1 cu12"
"""What the extra `gpu` pins. Without the DSL, kernels are found that it has compiled elsewhere."""
_PACKAGE = "hybrid_moe"
_CLOCK_S = 1.0  # a file's time may lag behind the clock, by the kernel's tick


def dsl_version() -> str | None:
    """Of CuTe DSL and the CUDA tools in it, "4.8.1 cu12"; None where it is not installed. Reads
    package metadata, imports nothing."""
    try:
        version = importlib.metadata.version(DSL)
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.metadata.version(f"{DSL}-libs-cu13")
    except importlib.metadata.PackageNotFoundError:
        return f"{version} cu12"
    return f"{version} cu13"  # which is used where both are installed


def binary_key(definition: KernelDefinition, arch: str) -> str | None:
    """SHA-256 of the kernel's sources, its choices, `arch` and the DSL's version.

    None where the code that runs here may not be what the files say: one of them has changed since
    the package was imported, or cannot be found.
    """
    found = _sources(definition.build.__module__)
    if found is None:
        return None
    files, digest = found
    for file in files:  # by ctime, since copies and installers set mtime; anew at every call
        if file.stat().st_ctime > IMPORTED_AT - _CLOCK_S:
            logger.debug("%s is new: its kernels are compiled anew", file)
            return None
    choices = (definition.name, definition.build.__qualname__, repr(definition.config))
    arguments = repr((definition.arguments, definition.threads, definition.shared_bytes))
    text = "\n".join([digest, *choices, arguments, arch, dsl_version() or TESTED_DSL])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _sources(module: str) -> tuple[tuple[Path, ...], str] | None:
    """The file of `module` and all files of this package that it imports, directly or not, and a
    hash of what is in them. None if there is no such file."""
    contents: dict[str, tuple[Path, bytes]] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = None if name in contents else _file(name)
        if file is not None:
            contents[name] = file, file.read_bytes()
            waiting.extend(_imports(contents[name][1]))
    if module not in contents:
        return None
    digest = hashlib.sha256()
    for name, (_, text) in sorted(contents.items()):
        digest.update(f"{name} {len(text)}\0".encode() + text)
    return tuple(file for file, _ in contents.values()), digest.hexdigest()


def _file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    origin = None if spec is None else spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None


def _imports(source: bytes) -> Iterator[str]:
    """Modules of this package, or names in them, that a file imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        # Not the package itself, which imports every other part when asked for it.
        yield from (name for name in names if name.startswith(f"{_PACKAGE}."))
