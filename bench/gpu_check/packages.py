"""Packages in a folder of unpacked wheels, for a machine on which nothing but torch is installed.

    pip install --target FOLDER --only-binary :all: llvmlite psutil tqdm typer rich numba pytest \\
        hypothesis ml_dtypes safetensors transformers nvidia-cutlass-dsl==4.8.1

elsewhere, for this Python; without dependencies (`--no-deps`) where torch would come along.
"""

from __future__ import annotations

import os
import site
import sys

VARIABLE = "GPU_CHECK_PACKAGES"


def add_packages() -> None:
    """Make the folder that the variable names importable, here and in the processes of steps. What
    is installed already comes first. `.pth` files count, as in site-packages: CuTe DSL has one."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    if not os.path.isdir(folder):  # noqa: PTH112 (before anything else is imported)
        raise SystemExit(f"{VARIABLE} is {folder!r}: no such folder")
    before = set(sys.path)
    site.addsitedir(folder)
    added = [path for path in sys.path if path not in before]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, given), *added])
