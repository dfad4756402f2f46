"""The distributions in `dist/` hold what they should; the wheel's modules are importable.

    python .ci/check_dist.py     # after `make wheel`

`python -m build` makes the wheel from the source distribution, so the wheel that is checked here is
what a user of the source distribution gets. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "hybrid_moe": "hybrid_moe",
    "cpu_kernels": "hybrid_moe/cpu_kernels",
    "gpu_kernels": "hybrid_moe/gpu_kernels",
    "loaders": "hybrid_moe/loaders",
}
"""Folder here -> folder in the wheel."""
SOURCES = (*PACKAGES, "tests", "bench", "docs", "examples", "compat", ".ci")
BESIDE = ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt",
          "constraints-lowest.txt")  # fmt: skip
MOST_WHEEL_BYTES = 1_000_000

IMPORT = """
import hybrid_moe, importlib.metadata, sys
assert hybrid_moe.__file__.startswith(sys.prefix), hybrid_moe.__file__
assert importlib.metadata.version("hybrid-moe") == hybrid_moe.__version__ == {version!r}
assert importlib.metadata.entry_points(group="console_scripts", name="hybrid-moe")
"""


def files_of(folder: str) -> set[str]:
    """Files that belong to the project; caches do not."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(message)


def main() -> None:
    dist = ROOT / "dist"
    wheels, sources = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    check(len(wheels) == len(sources) == 1, "run `make wheel`: dist/ has a wheel and an sdist")
    wheel, source = wheels[0], sources[0]
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set(BESIDE).union(*(files_of(folder) for folder in SOURCES))
    check(wanted <= inside, f"not in {source.name}: {sorted(wanted - inside)[:5]}")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = {
        there + name.removeprefix(here)
        for here, there in PACKAGES.items()
        for name in files_of(here)
        if name.endswith((".py", "py.typed"))
    }
    check(wanted <= inside, f"not in {wheel.name}: {sorted(wanted - inside)[:5]}")
    more = {name for name in inside if ".dist-info/" not in name} - wanted
    check(not more, f"too much in {wheel.name}: {sorted(more)[:5]}")
    check(wheel.stat().st_size < MOST_WHEEL_BYTES, f"{wheel.name}: {wheel.stat().st_size} bytes")
    version = wheel.name.split("-")[1]
    check(source.name == f"hybrid_moe-{version}.tar.gz", f"{source.name} beside {wheel.name}")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)]
        for arguments in (install, ["-I", "-c", IMPORT.format(version=version)]):
            subprocess.run([python, *arguments], cwd=folder, check=True)
    print(f"{wheel.name}: {wheel.stat().st_size} bytes; {source.name}: {source.stat().st_size}")


if __name__ == "__main__":
    sys.exit(main())
