"""When this process imported the package: whatever it runs of it was read later than this."""

from __future__ import annotations

import time

IMPORTED_AT = time.time()
"""Seconds since the epoch."""
