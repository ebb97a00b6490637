"""Keep the memory that one step frees for the next one, instead of returning it to the system.

By default, glibc returns every freed block of more than a few megabytes to the kernel, which zeroes
each page before handing it out again. A training step of ``cnn-wide`` on a CPU touches 60,000 new
pages, which takes a fifth of its time. JAX has no option for this.

Even when told to keep memory, glibc does so for the main thread only; for other threads it keeps
blocks below 64 MB, the size of their heaps. A compiled program allocates one block, often a larger
one, so the main thread runs the programs itself: see
:func:`cifar_jax.steps.parallel.select_devices`. (A single arena for all threads would keep
everything too, but then they wait for each other: a step of ``cnn`` took up to half as long again.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

# From glibc's malloc.h, and the size of a heap of any thread but the main one.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 64 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Configure glibc's malloc; call it before threads start. Other C libraries are left alone."""
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)  # no block with a mapping of its own
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_TOP_PAD, 2 * _HEAP_BYTES)  # keep a heap that is free, and the one after it


def give_back_freed_memory() -> None:
    """Return free memory to the system, once: compiling leaves more than steps can reuse."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """The function ``name`` of the C library, if that is glibc."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function
