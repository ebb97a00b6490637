"""JAX's cache of compiled programs, in a folder that only this user can write to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import ResourceError
from cifar_jax.system.files import try_to_write

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
_OFF = ("0", "n", "no", "f", "false", "off")  # as JAX reads it
_MOST_BYTES = 1 << 30  # some hundred programs


def use_compilation_cache() -> None:
    """Tell JAX where to cache compiled programs.

    JAX's own environment variables take precedence: ``JAX_COMPILATION_CACHE_DIR`` names another
    folder, and ``JAX_ENABLE_COMPILATION_CACHE=0`` disables the cache. If the folder cannot be
    written there is one warning, where JAX would print one for each program.

    Raises:
        ResourceError: others can write to the folder, and so could inject programs.
    """
    if _FOLDER not in os.environ:
        try:
            folder = _own_folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_room(folder)
        except (OSError, RuntimeError):  # no home, or a full disk: then each command compiles anew
            return
        _tell(_FOLDER, str(folder))
        if _LEAST_SECONDS not in os.environ:
            _tell(_LEAST_SECONDS, 0.3)
    if os.path.isdir(given := os.environ[_FOLDER]):
        found = os.stat(given)
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            raise ResourceError(
                f"{_FOLDER} {given} can be written by others, who could inject programs",
                fix=f"chmod go-w {given}, or name another folder",
            )
    is_off = not given or os.environ.get(_ENABLED, "").lower() in _OFF
    if is_off or "://" in given:  # a bucket
        return
    try:
        try_to_write(Path(given))
    except OSError as error:
        if os.path.isdir(given):  # perhaps filled by others: it is read, but nothing is written
            consequence = "new programs are not cached"
            _tell(_LEAST_SECONDS, 1e9)
        else:
            consequence = "each program is compiled anew"
            _tell(_ENABLED, False)
        print(
            f"warning: {_FOLDER} {given} cannot be written: {error.strerror or error}; "
            f"{consequence}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Disable the cache inside: what is compiled here is compiled anew by the next command."""
    import jax

    least_seconds = jax.config.values[_LEAST_SECONDS.lower()]
    jax.config.update(_LEAST_SECONDS.lower(), 1e9)
    try:
        yield
    finally:
        jax.config.update(_LEAST_SECONDS.lower(), least_seconds)


def _tell(variable: str, value: str | float | bool) -> None:
    """Set an option of JAX, whether or not JAX is imported yet."""
    os.environ[variable] = str(value)
    if "jax" in sys.modules:
        import jax

        jax.config.update(variable.lower(), value)


def _own_folder() -> Path:
    """The folder for this kind of processor: machines may share a home, but not compiled code."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({ln for ln in lines if ln.startswith(("model name", "flags"))}))
    except OSError:  # not Linux
        processor = platform.machine() + platform.processor()
    return caches / "cifar_jax" / hashlib.sha256(processor.encode()).hexdigest()[:8]


def _make_room(folder: Path) -> None:
    """Delete the oldest programs, mostly of earlier versions, if the cache is too large."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # deleted by another command meanwhile
            size = sum(file.stat().st_size for file in [path, *path.rglob("*")])
            found.append((path.stat().st_mtime, size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > _MOST_BYTES:
            if path.is_dir():  # XLA's autotuning results for a GPU
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
