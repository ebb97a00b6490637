"""Errors with a fix, and the exit codes of all commands."""

from __future__ import annotations

import enum
import os
import signal
from pathlib import Path
from typing import ClassVar


class ExitCode(enum.IntEnum):
    """The exit status of a command. A stop by signal N exits with 128 + N."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    NUMERICS = 5
    ENVIRONMENT = 6


class CifarJaxError(Exception):
    """An error that is shown as one line, without a traceback; raised as one of its subclasses.

    Args:
        what: what is wrong, with the option, file and value at fault.
        fix: what to do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(self, what: str, *, fix: str) -> None:
        # Names of files and classes may contain line breaks; the message stays one line.
        cure = fix if fix.endswith("?") else f"{fix}."
        what = what.rstrip(".:")  # another library's message may end so
        super().__init__(" ".join(f"{what}. Fix: {cure}".splitlines()))
        self.what = what
        self.fix = fix


class UsageError(CifarJaxError):
    """An option or argument that cannot be used."""

    exit_code = ExitCode.USAGE


class DataError(CifarJaxError):
    """Images, folders or archives that cannot be used."""

    exit_code = ExitCode.DATA


class CheckpointError(CifarJaxError):
    """A checkpoint, run or file of weights that cannot be used."""

    exit_code = ExitCode.CHECKPOINT


class NumericsError(CifarJaxError):
    """Numbers that are not finite, or not those that were expected."""

    exit_code = ExitCode.NUMERICS


class ResourceError(CifarJaxError):
    """Something that the machine lacks or refuses: disk, memory, devices, packages, permissions."""

    exit_code = ExitCode.ENVIRONMENT


class Stopped(BaseException):
    """The command ends early because of a signal; ``message`` says what was saved.

    Like ``KeyboardInterrupt`` not an ``Exception``, so that handlers of all errors do not catch it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.signum = signum
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of another library's error, whose message may be pages long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shown(name: str | bytes | Path) -> str:
    """An external name for a message: characters that do not print on a line are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(name))
