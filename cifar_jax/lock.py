"""One training run at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import CifarJaxError, ExitCode

_NAME = ".lock"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of some clusters' file systems


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make ``workdir`` if need be, and keep other runs out of it.

    The kernel lifts the lock when this process ends, however it ends. A folder in which nothing
    was written is taken away again.

    Raises:
        CifarJaxError: environment; another process holds it, or it cannot be written.
    """
    path = workdir / _NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = _open_and_lock(path)
    except OSError as error:
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"--workdir {workdir} cannot be written: {error.strerror}",
            fix="give another --workdir",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where the folder is gone, or not empty
            path.unlink()
            workdir.rmdir()
        os.close(descriptor)


def _open_and_lock(path: Path) -> int:
    """A descriptor of the lock file, which no other process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise CifarJaxError(
                ExitCode.ENVIRONMENT,
                f"--workdir {path.parent} is locked by {holder or 'another run'}",
                fix="wait for that run to end or stop it, or give another --workdir",
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(descriptor)
                raise
            print(f"warning: no lock on {path.parent}, whose file system has none")
            return descriptor
        if _is_file_of(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # the one who held it has just taken it away


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
