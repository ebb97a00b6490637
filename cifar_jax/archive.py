"""``.tar.gz`` archives: extraction of image folders, once and safely, and a look at the members."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from cifar_jax.errors import CifarJaxError, ExitCode

SUFFIXES = (".tar.gz", ".tgz")


@contextlib.contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Turn what goes wrong while ``archive`` is read into a ``CifarJaxError`` (data)."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise CifarJaxError(
            ExitCode.DATA,
            f"cannot read the archive {archive}: {error}",
            fix="download it again, or give another --data",
        ) from error


def first_names(archive: Path, count: int) -> list[str]:
    """The names of the first ``count`` members."""
    names = []
    with reading(archive), tarfile.open(archive, mode="r|gz") as members:
        for member in members:
            names.append(member.name)
            if len(names) == count:
                break
    return names


def extract_once(archive: Path, into: Path) -> Path:
    """Extract ``archive`` to a folder below ``into`` named by its content; skip what is there.

    Only regular files and folders are written, and only below that folder. The folder appears
    whole or not at all: extraction goes to a temporary one, which is then renamed.

    Raises:
        CifarJaxError: data; the archive is damaged, or holds a link, a device or an unsafe name.
    """
    with reading(archive):
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    name = archive.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    folder = into / f"{name}-{digest[:12]}"
    if folder.is_dir():
        return folder
    try:
        into.mkdir(parents=True, exist_ok=True)
        incomplete = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=into))
    except OSError as error:
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"cannot write to --data-dir {into}: {error.strerror}",
            fix="give a --data-dir that can be written",
        ) from error
    try:
        with reading(archive):
            _extract(archive, incomplete)
        try:
            incomplete.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has just put the same folder there
                raise
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    size = archive.stat().st_size
    made = {folder}
    with (
        archive.open("rb") as file,
        tarfile.open(fileobj=file, mode="r|gz") as members,
        tqdm(total=size, unit="B", unit_scale=True, desc="extracting", disable=None) as progress,
    ):
        for member in members:
            target = folder.joinpath(*_safe_parts(archive, member))
            if member.isreg():
                if target.parent not in made:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    made.add(target.parent)
                content = members.extractfile(member)
                assert content is not None  # it is a regular file
                with target.open("xb") as output:  # "x": a name that comes twice is refused
                    shutil.copyfileobj(content, output)
            progress.update(file.tell() - progress.n)
    os.sync()


def _safe_parts(archive: Path, member: tarfile.TarInfo) -> tuple[str, ...]:
    path = PurePosixPath(member.name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name
    if unsafe or not (member.isreg() or member.isdir()):
        kind = "an unsafe name" if unsafe else "neither a file nor a folder"
        raise CifarJaxError(
            ExitCode.DATA,
            f"the archive {archive} holds {member.name!r}, which is {kind}",
            fix="do not trust this archive; give another --data",
        )
    return path.parts
