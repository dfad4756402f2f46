"""Where things are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIMS = Path(__file__).parent / "shims"
MXFP4_MODEL = ROOT / "examples" / "tiny_moe" / "model"
