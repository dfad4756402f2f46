"""docs/sglang.md and docs/plan.md say what the commands and the code say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.hybrid_moe.planning import example_page

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "sglang.md"
SOURCES = ("hybrid_moe", "cpu_kernels", "loaders")

UPSTREAM = {
    "--kt-weight-path", "--kt-method", "--kt-cpuinfer", "--kt-threadpool-count",
    "--kt-num-gpu-experts", "--kt-max-deferred-experts-per-token",
}  # fmt: skip
FORK = {
    "--kt-numa-nodes", "--kt-gpu-experts-ratio", "--kt-expert-placement-strategy",
    "--kt-gpu-prefill-token-threshold", "--kt-enable-dynamic-expert-update",
    "--record-kt-gpu-expert-distribution", "--kt-lora-path", "--kt-expert-lora-path",
}  # fmt: skip
"""Of sglang-kt 0.7.2."""


def section(title: str) -> str:
    """The text under a heading of the guide."""
    parts = re.split(r"^## ", GUIDE.read_text("utf-8"), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(title))


def first_column(text: str) -> list[str]:
    """What stands in backticks in the first column of a section's tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_the_page_is_what_the_commands_print() -> None:
    written = example_page.PAGE.read_text("utf-8")
    assert written == example_page.page(), "run python -m tests.hybrid_moe.planning.example_page"


def test_every_option_is_in_the_tables() -> None:
    named = [word for word in first_column(section("Every `--kt-*` option")) if word[:2] == "--"]
    assert sorted(named) == sorted(UPSTREAM | FORK)


def test_upstream_has_no_other_options() -> None:
    exec_fields = pytest.importorskip("sglang.srt.server_args")
    names = {name for name in exec_fields.ServerArgs.__dataclass_fields__ if name[:3] == "kt_"}
    assert {f"--{name.replace('_', '-')}" for name in names} == UPSTREAM


def test_every_message_is_in_the_code() -> None:
    texts = [
        text for name in SOURCES for file in (ROOT / name).rglob("*.py") for text in literals(file)
    ]
    fragments = first_column(section("Troubleshooting by message"))
    assert len(fragments) > 20
    unknown = [part for part in fragments if not any(part in text for text in texts)]
    assert not unknown


def literals(file: Path) -> list[str]:
    """Every string of a source file, adjacent ones joined."""
    tree = ast.parse(file.read_text("utf-8"))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]
