"""Whether the kernel keeps what has been read of a checkpoint.

A model that is loaded once leaves a second copy of itself in the page cache. Where memory has room
for both, the next start is faster for it. Where it has not, the kernel drops pages of others for
pages that nobody reads again, and does so in the way of the loading threads; then each range is let
go of when it has been read.

Reads go through the page cache, into a buffer that each thread reuses. On two cores of Zen 4 that
copies 20 to 30 GB/s (pieces of 1 to 16 MB; packing takes 10), where touching a mapping of the same
pages gave 22 to 35; a disk of 2.5 GB/s gave O_DIRECT no more than plain reads with read-ahead.
"""

from __future__ import annotations

import os

import psutil

from hybrid_moe.logs import warn_once

VARIABLE = "HYBRID_MOE_PAGE_CACHE"
_CHOICES = {"keep": False, "release": True}


def releases_pages(nbytes: int) -> bool:
    """Whether pages are let go of while `nbytes` of files become as many bytes of weights.

    `HYBRID_MOE_PAGE_CACHE` decides ("keep" or "release"), else whether there is memory for both.

    Raises:
        ValueError: the variable has another value.
    """
    chosen = os.environ.get(VARIABLE, "").strip().lower()
    if chosen:
        if chosen not in _CHOICES:
            raise ValueError(f'{VARIABLE} must be "keep" or "release", not {chosen!r}')
        return _CHOICES[chosen]
    try:
        available = psutil.virtual_memory().available
    except (OSError, ValueError, KeyError, IndexError) as error:  # a sandbox that hides /proc
        warn_once(
            f"the system does not say how much memory is available ({type(error).__name__}: "
            f"{error}): the page cache of checkpoints is kept; {VARIABLE}=release lets it go"
        )
        return False
    return bool(2 * nbytes > available)


def expect_pages(descriptor: int, offset: int, nbytes: int) -> None:
    """Let the kernel read a range of a file ahead. Threads that share a descriptor make its own
    read-ahead lose the thread: from a disk of 1.8 GB/s two of them loaded 1.1 GB/s, and with the
    next experts asked for 1.5."""
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def release_pages(descriptor: int, offset: int, nbytes: int) -> None:
    """Let go of the whole pages in a range of a file; those that others have mapped stay."""
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
