"""Memory that a step gives back and the next one takes again, kept in between.

The C library returns every freed block of more than some megabytes to the system, which hands it
out again page by page, each filled with zeros first. A training step of ``cnn-wide`` on a CPU asks
for 60,000 pages, in a fifth of its time. JAX has no option for it.
"""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell the C library, before threads are started. One that cannot be told changes nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)  # no block with a mapping of its own
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    # Large blocks are kept in the first arena alone, for the threads that share it. If it is the
    # only one, threads wait for each other, and a step of cnn takes a third longer; with as many
    # arenas as glibc would make, few threads share the first. Measured on two cores.
    mallopt(_M_ARENA_MAX, 1 + (os.cpu_count() or 1))
