"""Memory that a step gives back and the next one takes again, kept in between.

The C library returns every freed block of more than some megabytes to the system, which hands it
out again page by page, each filled with zeros first. A training step of ``cnn-wide`` on a CPU asks
for 60,000 pages, in a fifth of its time. JAX has no option for it.

The C library keeps what the main thread frees; large blocks of other threads are returned still.
(One arena for all threads would keep those too, but then threads wait for each other: a step of
``cnn`` took up to half as long again.) So the main thread runs the programs itself:
:func:`cifar_jax.parallel.run_in_place`.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell the C library, before threads are started. One that cannot be told changes nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)  # no block with a mapping of its own
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
