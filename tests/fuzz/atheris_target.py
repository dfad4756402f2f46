"""A target for coverage-guided fuzzing: `pip install atheris`, then

    python -m tests.fuzz.atheris_target safetensors -max_total_time=3600 corpus/
    python -m tests.fuzz.atheris_target gguf -max_total_time=3600 corpus/

Inputs are whole files. A parser may refuse one by `CheckpointError` and by nothing else; what it
accepts, it holds against the other library. `--seeds FOLDER` writes valid and damaged files to
begin with, and ends.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from hybrid_moe.formats.tensors import CheckpointError
from tests.fuzz import gguf_files, headers

SEEDS = 500


def gguf_input(content: bytes) -> None:
    """Parse a GGUF file."""
    try:
        header = gguf_files.read_gguf_header(gguf_files.in_memory(content))
    except CheckpointError:
        return
    gguf_files.check_against_library(header, content)


def safetensors_input(content: bytes) -> None:
    """Parse a safetensors file with both parsers."""
    headers.check(content)


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[Random], bytes]]] = {
    "gguf": (gguf_input, lambda rng: gguf_files.generate(rng).content()),
    "safetensors": (safetensors_input, headers.generate),
}
"""Name -> what takes an input, and what makes one."""


def write_seeds(name: str, folder: Path) -> None:
    """Files of the generator."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(SEEDS):
        (folder / f"{number:04}").write_bytes(TARGETS[name][1](Random(number)))


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: atheris_target {'|'.join(TARGETS)} [options] [corpus]")
    name = sys.argv.pop(1)
    if "--seeds" in sys.argv:
        write_seeds(name, Path(sys.argv[sys.argv.index("--seeds") + 1]))
        return
    import atheris  # no dependency of the tests: it needs a build of its own for each Python

    logging.disable()
    atheris.instrument_all()
    atheris.Setup(sys.argv, TARGETS[name][0])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
