"""Where the other libraries are, if they are anywhere.

Each is looked for where the user says, then in the interpreter that runs the benchmark, then in
`build/peers`, where `make bench-peers-install` puts them (their dependencies must not meet ours).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

BENCH = Path(__file__).resolve().parents[1]
INSTALLED = BENCH.parent / "build" / "peers"


@dataclass(frozen=True)
class Place:
    """How to start the worker of a library: an interpreter, what its environment adds, and the
    folder whose `peer.worker` it runs."""

    python: str
    variables: dict[str, str]
    bench: Path = BENCH


def those_found(
    wanted: Sequence[str], found: Mapping[str, Place | None], console: Console
) -> dict[str, Place]:
    """Those of `wanted` that are somewhere; the others are reported."""
    there = {}
    for name in wanted:
        place = found[name]
        if place is None:
            console.print(f"[yellow]{name} is left out:[/] not found; see bench/README.md")
        else:
            there[name] = place
    return there


def find_ggml(folder: str | None) -> Place | None:
    """The folder of ggml's shared libraries: `folder`, GGML_LIB, an installed llama-cpp-python's,
    or where `make bench-peers-install` built them."""
    named = folder or os.environ.get("GGML_LIB")
    if not named:
        spec = importlib.util.find_spec("llama_cpp")  # imports nothing
        if spec is not None and spec.origin is not None:
            libraries = Path(spec.origin).parent / "lib"
        else:
            libraries = INSTALLED / "ggml" / "build" / "bin"
        named = str(libraries) if libraries.is_dir() else None
    return Place(sys.executable, {"GGML_LIB": str(Path(named).resolve())}) if named else None


def ggml_avx2() -> str | None:
    """ggml's libraries for processors with AVX2 and nothing wider, where they were built."""
    libraries = INSTALLED / "ggml" / "build-avx2" / "bin"
    return str(libraries) if libraries.is_dir() else None


def find_llama(folder: str | None) -> Place | None:
    """llama.cpp's libraries and bindings: `folder` with `build/bin` and `llama_cpp`, an installed
    llama-cpp-python, or where `make bench-peers-install` built them; and the `gguf` package."""
    root = Path(folder) if folder else INSTALLED / "ggml"
    package, libraries = root / "llama_cpp", root / "build" / "bin"
    spec = importlib.util.find_spec("llama_cpp")  # imports nothing
    if not folder and spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        libraries = package / "lib"
    if not (libraries / "libllama.so").exists():
        return None
    variables = {
        "LLAMA_CPP_PACKAGE": str(package.resolve()),
        "LLAMA_CPP_LIB_PATH": str(libraries.resolve()),
    }
    if importlib.util.find_spec("gguf") is None:
        variables["PYTHONPATH"] = str(INSTALLED / "gguf")
    return Place(sys.executable, variables)


def find_kt(python: str | None, folder: str | None) -> Place | None:
    """kt-kernel: of another interpreter, of a folder of `pip install --target`, or installed."""
    python = python or os.environ.get("KT_PYTHON")
    if python:
        return Place(python, {})
    if folder is None and is_installed("kt-kernel"):
        return Place(sys.executable, {})
    if folder is None and (INSTALLED / "kt_kernel").is_dir():
        folder = str(INSTALLED / "kt_kernel")
    return Place(sys.executable, {"PYTHONPATH": str(Path(folder).resolve())}) if folder else None


def is_installed(distribution: str) -> bool:
    """Whether this interpreter has it; the module's name may be another distribution's."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
