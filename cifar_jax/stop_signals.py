"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM at a moment when it can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While active, the first SIGINT or SIGTERM is only noted, in ``received``.

    A second one acts as if this were not here: it ends the program at once. A signal that the
    program was started to ignore, as by ``nohup`` or a shell's ``&``, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # else Python allows no handler
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
    """Let a SIGINT or SIGTERM wait until the end of what is under way; a second one does not.

    JAX needs it where Python is called from C++: amid its import the exception of a signal aborts
    the process, and what one cuts off in its compiler crashes at exit.
    """
    stop = StopSignals()
    try:
        with stop:
            yield
    finally:
        if stop.received is not None:
            signal.raise_signal(stop.received)
