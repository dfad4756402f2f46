"""When Transformers knows `experts_implementation="hybrid_moe"`: what was imported and called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"

NAMES = ("hybrid_moe", "hybrid-moe")
SCRIPT = """
{imports}
for name in ("hybrid_moe", "hybrid-moe"):
    try:
        transformers.AutoModelForCausalLM.from_pretrained({folder!r}, experts_implementation=name)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


def run(imports: str) -> tuple[str, str]:
    """What a new process says of our name, and of one that nobody has registered."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(imports=imports, folder=str(TINY))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    known, unknown = done.stdout.strip().splitlines()
    return known, unknown


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, hybrid_moe",
        "import hybrid_moe, transformers; hybrid_moe.register()",
        pytest.param(
            "import hybrid_moe; hybrid_moe.register(); import transformers", marks=pytest.mark.full
        ),
        "from hybrid_moe import register; register(); register(); import transformers",
    ],
)
def test_the_name_is_registered(imports: str) -> None:
    known, unknown = run(imports)
    assert known.startswith("NotImplementedError") and "hybrid_moe.from_pretrained" in known
    assert "hybrid_moe.register()" in known
    assert unknown.startswith("ValueError") and '"hybrid-moe"` is not supported' in unknown
    assert '`experts_implementation="hybrid_moe"`' in unknown  # among those that are


def test_the_name_is_registered_for_quantised_experts_too() -> None:
    script = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "hybrid_moe" not in ALL_EXPERTS_FUNCTIONS
import hybrid_moe
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS
from transformers.integrations import finegrained_fp8
assert "hybrid_moe" in finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_import_before_transformers_registers_nothing() -> None:
    """Transformers refuses the name; one call of ours before makes it known."""
    for said, name in zip(run("import hybrid_moe, transformers"), NAMES, strict=True):
        assert said.startswith("ValueError") and f'"{name}"` is not supported' in said
        assert said.count("hybrid_moe") == (name == "hybrid_moe")  # not among those that are


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
