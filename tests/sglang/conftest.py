"""SGLang on the CPU in this process, where it is installed: its engine's switch and the shims."""

from __future__ import annotations

import importlib.util
import os
import sys

from tests.sglang.paths import SHIMS

if importlib.util.find_spec("sglang") is not None:
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    sys.path.append(str(SHIMS))  # last: what is really installed goes first
