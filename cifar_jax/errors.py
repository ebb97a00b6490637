"""The errors that people see, and the exit codes of every command."""

from __future__ import annotations

import enum
import os
import signal
from pathlib import Path


class ExitCode(enum.IntEnum):
    """What a command's exit status says. A stop by signal N exits with 128 + N."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    NUMERICS = 5
    ENVIRONMENT = 6


class CifarJaxError(Exception):
    """Something a person can put right; shown as one line, without a traceback.

    Args:
        exit_code: the kind of error, and the command's exit status.
        what: what is wrong, with the option, file and value at fault.
        fix: what to do about it.
    """

    def __init__(self, exit_code: ExitCode, what: str, *, fix: str) -> None:
        # Names of files and classes come from outside: a line break in one stays one line.
        cure = fix if fix.endswith("?") else f"{fix}."
        what = what.rstrip(".:")  # another library's message may end so
        super().__init__(" ".join(f"{what}. Fix: {cure}".splitlines()))
        self.exit_code = exit_code
        self.what = what
        self.fix = fix


class Stopped(BaseException):
    """The command ends early because a signal asked for it; ``message`` says what was kept.

    Like ``KeyboardInterrupt`` no ``Exception``: whoever catches all errors must not catch this.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.signum = signum
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """What to quote of an error that another library raised, which may be pages long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shown(name: str | bytes | Path) -> str:
    """A name that comes from outside, for a message: escaped where it would not print in a line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(name))
