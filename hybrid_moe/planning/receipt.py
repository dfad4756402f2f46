"""Receipts: a measurement as it is stored, with what ran, where, and with which versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from hybrid_moe import __version__

PACKAGES = ("llvmlite", "numpy")


def processor() -> str:
    """The processor's name, LLVM's name of its family, and how many cores we may use."""
    import llvmlite.binding as llvm

    from hybrid_moe.cpu_kernels.pool.topology import usable_cores
    from hybrid_moe.planning.doctor import processor_name

    return f"{processor_name()} ({llvm.get_host_cpu_name()}), {usable_cores()} cores"


def receipt(bench: str, **facts: Any) -> dict[str, Any]:
    """JSON of a measurement: `facts` are its own, and `points` usually the rows of its table."""
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "processor": processor(),
        "versions": {
            "hybrid-moe": __version__,  # which a source tree has too
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        **facts,
    }


def write_receipt(path: str | Path | None, document: dict[str, Any]) -> None:
    """Write JSON where the user asked for it.

    Raises:
        OSError: the file cannot be written.
    """
    if path:
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
