"""What is logged once in a process."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, the first time that it is given."""
    logger.warning("%s", message)
