"""Memory that a step gives back and the next one takes again, kept in between.

The C library returns every freed block of more than some megabytes to the system, which hands it
out again page by page, each filled with zeros first. A training step of ``cnn-wide`` on a CPU asks
for 60,000 pages, in a fifth of its time. JAX has no option for it.

The C library keeps what the main thread frees, and of other threads what is smaller than the 64 MB
in which it gets memory for them. A program's own memory is one block, often larger, so the main
thread runs the programs itself: :func:`cifar_jax.parallel.select_devices`. (One arena for all
threads would keep everything too, but then they wait for each other: a step of ``cnn`` took up to
half as long again.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

# Of glibc's malloc.h, and the most that it gets at once for a thread that is not the main one.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 64 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell the C library, before threads are started. One that cannot be told changes nothing."""
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)  # no block with a mapping of its own
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_TOP_PAD, 2 * _HEAP_BYTES)  # what is free of a heap and the next: both are kept


def give_back_freed_memory() -> None:
    """Give the system what is free, once: compiling leaves more of it than steps can use again."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """That function of the C library, if it is glibc's."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function
