"""Random inputs of the loaders, held against other readers; random use of wrappers, beside a model
of what they must do."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the reference's products are tiny
