"""Stop a run on SIGINT (Ctrl-C) or SIGTERM at a point where it can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While active, the first SIGINT or SIGTERM is only recorded, in ``received``.

    A second one ends the program at once, as without this class. A signal that was ignored when the
    program started, as by ``nohup`` or a shell's ``&``, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others cannot
            for signum in _SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        self.received = signum
        for each, handler in self._previous.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Delay a SIGINT or SIGTERM until the end of the block; a second one is not delayed.

    Needed where JAX's C++ calls Python: a signal's exception during its import aborts the process,
    and one that interrupts its compiler crashes it at exit.
    """
    stop = StopSignals()
    try:
        with stop:
            yield
    finally:
        if stop.received is not None:
            signal.raise_signal(stop.received)
