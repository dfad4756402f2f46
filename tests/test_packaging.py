"""What the project declares about itself is so."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

import hybrid_moe

tomllib = pytest.importorskip("tomllib", reason="Python 3.11's")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_AT_LEAST = re.compile(r"([\w-]+)>=([\d.]+)")
_EXACTLY = re.compile(r"^([\w-]+)==([\d.]+)$", re.M)


def _name(text: str) -> str:
    return text.lower().replace("_", "-")


def _declared(requirements: list[str]) -> dict[str, Version]:
    found = {}
    for requirement in requirements:
        match = _AT_LEAST.fullmatch(requirement)
        assert match, f"{requirement}: a lowest version, and nothing else, is declared"
        found[_name(match[1])] = Version(match[2])
    return found


def test_the_lowest_versions_are_the_tested_ones() -> None:
    """constraints-lowest.txt pins what pyproject.toml declares, no more and no less."""
    extras = PROJECT["optional-dependencies"]
    required = _declared([*PROJECT["dependencies"], *extras["transformers"]])
    tools = _declared(extras["dev"])
    text = (ROOT / "constraints-lowest.txt").read_text()
    tested = {_name(name): Version(version) for name, version in _EXACTLY.findall(text)}
    assert {name: tested.get(name) for name in required} == required
    others = {name: version for name, version in tested.items() if name not in required}
    assert others == {name: tools[name] for name in others}


def test_the_version_is_said_once() -> None:
    """hybrid_moe.__version__; the distribution and the changelog follow it."""
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert importlib.metadata.version("hybrid-moe") == hybrid_moe.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and hybrid_moe.__version__ in headings


def test_every_package_is_declared() -> None:
    """A folder with modules that pyproject does not list is missing from the wheel."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(tool["packages"])
    found = set()
    for top, folder in tool["package-dir"].items():
        for file in (ROOT / folder).rglob("*.py"):
            found.add(".".join([top, *file.parent.relative_to(ROOT / folder).parts]))
    assert found == listed


def test_the_tests_of_tiers_are_there() -> None:
    """`make test-tiers` names files, which move."""
    asked = subprocess.run(
        ["make", "-s", "-f", "Makefile", "-f", "-", "listed"],
        input="listed:\n\t@echo $(TIER_TESTS)\n",
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    paths = asked.stdout.split()
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
