"""Where the other libraries are, if they are anywhere.

Each is looked for where the user says, then in the interpreter that runs the benchmark, then in
`build/peers`, where `make bench-peers-install` puts them (their dependencies must not meet ours).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALLED = Path(__file__).resolve().parents[2] / "build" / "peers"


@dataclass(frozen=True)
class Place:
    """How to start the worker of a library: an interpreter, and what its environment adds."""

    python: str
    variables: dict[str, str]


def package_folder(name: str, folder: Path) -> Path | None:
    """The folder of package `name`: in this interpreter, else in `folder`; None where in neither.

    Nothing is imported.
    """
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return folder / name if (folder / name).is_dir() else None


def find_ggml(folder: str | None) -> Place | None:
    """The folder of ggml's shared libraries: `folder`, GGML_LIB, or llama-cpp-python's own."""
    named = folder or os.environ.get("GGML_LIB")
    if named is None:
        package = package_folder("llama_cpp", INSTALLED / "ggml")
        named = str(package / "lib") if package else None
    return Place(sys.executable, {"GGML_LIB": str(Path(named).resolve())}) if named else None


def find_kt(python: str | None, folder: str | None) -> Place | None:
    """kt-kernel: of another interpreter, of a folder of `pip install --target`, or installed."""
    python = python or os.environ.get("KT_PYTHON")
    if python:
        return Place(python, {})
    if folder is None:
        package = package_folder("kt_kernel", INSTALLED / "kt_kernel")
        folder = str(package.parent) if package else None
    if folder is None:
        return None
    return Place(sys.executable, {"PYTHONPATH": str(Path(folder).resolve())})
