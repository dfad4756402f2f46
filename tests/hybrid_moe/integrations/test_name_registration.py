"""When Transformers knows `experts_implementation="hybrid_moe"`: what was imported and called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"

NAMES = ("hybrid_moe", "hybrid-moe")
SCRIPT = f"""
def said():
    for name in {NAMES!r}:
        try:
            transformers.AutoModelForCausalLM.from_pretrained(
                {str(TINY)!r}, experts_implementation=name
            )
        except Exception as error:
            print(f"{{type(error).__name__}}: {{error}}")

"""


def run(statements: str) -> list[str]:
    """What a new process prints; each `said()` is what Transformers says of our name, and of one
    that nobody has registered."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + statements], capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()


def check_registered(known: str, unknown: str) -> None:
    assert known.startswith("NotImplementedError") and "hybrid_moe.from_pretrained" in known
    assert "hybrid_moe.register()" in known
    assert unknown.startswith("ValueError") and '"hybrid-moe"` is not supported' in unknown
    assert '`experts_implementation="hybrid_moe"`' in unknown  # among those that are


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import hybrid_moe; hybrid_moe.register(); import transformers", marks=pytest.mark.full
        ),
        "from hybrid_moe import register; register(); register(); import transformers",
    ],
)
def test_a_call_before_transformers_registers_the_name(imports: str) -> None:
    check_registered(*run(f"{imports}; said()"))


def test_the_import_after_transformers_registers_the_name() -> None:
    """For quantised experts too, whose modules copy the table of names."""
    known_and_unknown = run("""
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "hybrid_moe" not in ALL_EXPERTS_FUNCTIONS
import hybrid_moe
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS
from transformers.integrations import finegrained_fp8
assert "hybrid_moe" in finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
said()
""")
    check_registered(*known_and_unknown)


def test_the_import_before_transformers_registers_nothing() -> None:
    """Transformers refuses the name; a call of ours makes it known, now or before."""
    *before, known, unknown = run(
        "import hybrid_moe, transformers; said(); hybrid_moe.register(); said()"
    )
    for line, name in zip(before, NAMES, strict=True):
        assert line.startswith("ValueError") and f'"{name}"` is not supported' in line
        assert line.count("hybrid_moe") == (name == "hybrid_moe")  # not among those that are
    check_registered(known, unknown)


def test_the_import_is_light() -> None:
    script = """
import sys
import hybrid_moe
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
assert not [f for f in map(type, sys.meta_path) if f.__module__.startswith("hybrid_moe")]
import transformers
import hybrid_moe.loaders
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
