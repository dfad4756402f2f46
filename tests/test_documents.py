"""What the documents name exists: links, files, and names of the code in backticks."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "compat/**/*.md", "examples/**/*.md",
                    "tests/conformance/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
ABOUT_CODE = [
    ROOT / name
    for name in (
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/gpu.md",
        "docs/kernels.md",
        "docs/numerics.md",
    )
]
SOURCES = ("hybrid_moe", "cpu_kernels", "gpu_kernels", "loaders", "tests", "bench", "compat")

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_CODE = re.compile(r"`([^`\n]+)`")
_BLOCK = re.compile(r"^```.*?^```$", re.S | re.M)
_FILE = re.compile(r"[\w./-]+\.(?:py|md|json|toml|txt)")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_PLACE = re.compile(rf"({_FILE.pattern}): ?({_NAME.pattern})")

Names = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def _anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", path.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@Names
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in _LINK.findall(path.read_text("utf-8")):
        file = path.parent / target if target else path
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in _anchors(file), f"{target} has no heading #{anchor}"


@functools.cache
def _files() -> frozenset[str]:
    """Files of the project with a / in front."""
    found = [f for folder in (*SOURCES, "docs", "examples") for f in (ROOT / folder).rglob("*.*")]
    return frozenset(f"/{file.relative_to(ROOT)}" for file in (*found, *ROOT.glob("*.*")))


def _with_place(path: Path) -> Iterator[tuple[str, str]]:
    """What a page writes as `file.py: name`."""
    for code in _code(path):
        if match := _PLACE.fullmatch(code):
            yield match[1], match[2]


@functools.cache
def _words() -> frozenset[str]:
    """Every identifier in the sources, and what they spell in strings."""
    files = [ROOT / "Makefile", *(f for s in SOURCES for f in (ROOT / s).rglob("*.py"))]
    text = "\n".join(file.read_text("utf-8") for file in files)
    return frozenset(re.findall(r"\w+", text))


def _code(path: Path) -> Iterator[str]:
    yield from _CODE.findall(_BLOCK.sub("", path.read_text("utf-8")))


@pytest.mark.parametrize("path", ABOUT_CODE, ids=lambda path: path.name)
def test_files_exist(path: Path) -> None:
    """By the end of their path: a page may leave out what a reader knows."""
    named = {name for code in _code(path) for name in _FILE.findall(code)}
    assert named
    missing = [name for name in named if not any(f.endswith(f"/{name}") for f in _files())]
    assert missing == []


@pytest.mark.parametrize("path", ABOUT_CODE, ids=lambda path: path.name)
def test_names_exist(path: Path) -> None:
    """Names of the code have an underscore or capitals inside; other words are prose."""
    dotted = {code for code in _code(path) if _NAME.fullmatch(code) and not _FILE.fullmatch(code)}
    names = {name for code in dotted for name in code.split(".")}
    names = {name for name in names if "_" in name or re.search(r"[a-z][A-Z]", name)}
    assert names
    assert sorted(names - _words()) == []


@pytest.mark.parametrize("path", ABOUT_CODE, ids=lambda path: path.name)
def test_names_are_where_they_are_said_to_be(path: Path) -> None:
    for file, dotted in _with_place(path):
        texts = [(ROOT / f[1:]).read_text("utf-8") for f in _files() if f.endswith(f"/{file}")]
        for name in dotted.split("."):
            pattern = rf"^\s*(def|class) {name}\b|^{name}\b"
            assert any(re.search(pattern, text, re.M) for text in texts), f"{file} has no {dotted}"
