"""Untrusted ``.tar.gz`` archives: read within bounds, extracted once and safely."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Self

from tqdm import tqdm

from cifar_jax.errors import CifarJaxError, DataError, ResourceError
from cifar_jax.system.files import fix_of, lacks_room
from cifar_jax.system.lock import alone_in

SUFFIXES = (".tar.gz", ".tgz")

# Limits that an archive of images stays below and a decompression bomb exceeds; sizes in bytes.
_MOST_UNPACKED = 2 * 2**30
_MOST_TIMES_ITS_SIZE = 200
_ALWAYS_ALLOWED = 16 * 2**20  # a small archive may hold the same image again and again
_LARGEST_FILE = 64 * 2**20
_MOST_HEADERS = 400_000  # enough for 200,000 files, as a long name takes a header of its own
_LARGEST_EXTENSION = 2**16
_LONGEST_PATH, _LONGEST_NAME, _DEEPEST = 1000, 255, 32

_PIECE = 2**20
_PAX = tarfile.XHDTYPE
_EXTENSIONS = (_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=]+)=")

_DOWNLOAD_AGAIN = "download it again, or give another --data"
_GIVE_ANOTHER = "do not trust this archive; give another --data"
_UNPACK_IT = "if you trust it, unpack it with tar and give --data the folder"


class TarGz:
    """A ``.tar.gz`` of files and folders, read once from front to end, within bounds.

    The headers are parsed here rather than by iterating with ``tarfile``: a negative size, an
    extension of gigabytes or a thousand extensions in a row can make that loop, exhaust memory or
    hit the recursion limit, depending on Python's patch release; and it takes an archive that was
    cut between two members for a complete one.

    Every method raises ``DataError`` if the archive cannot be read, is damaged, holds
    anything but files and folders with safe names, or unpacks to more than images would.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._reading():
            self._file = path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
        self._gzip = gzip.GzipFile(fileobj=self._file)
        self._unpacked = 0
        self._unread = 0  # bytes of the current file
        self._taken: dict[str, tuple[str, bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Compressed bytes read so far, out of ``size``."""
        return self._file.tell()

    def sha256(self) -> str:
        """The digest of the ``.tar.gz`` itself; call it before anything else is read."""
        with self._reading():
            digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            self._file.seek(0)
        return digest

    def __iter__(self) -> Iterator[tuple[PurePosixPath, bool]]:
        """The path of each member, safe to join to a folder, and whether it is a file."""
        extensions: dict[str, str] = {}
        for _ in range(_MOST_HEADERS):
            block = self._read(tarfile.BLOCKSIZE)
            if not any(block):
                while rest := self._unpack(_PIECE):  # its checksum comes last
                    if rest.count(0) < len(rest):
                        raise self._refused("goes on after its end", _DOWNLOAD_AGAIN)
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                if header.type in _EXTENSIONS:
                    extensions |= self._read_extension(header)
                    continue
                name = extensions.get("path", header.name)
                size = int(extensions.get("size", header.size))
            except (tarfile.HeaderError, ValueError) as error:
                raise self._refused(f"is damaged: {error}", _DOWNLOAD_AGAIN) from error
            is_file = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            is_sparse = any(key.startswith("GNU.sparse") for key in extensions)
            if not (is_file or header.isdir()) or is_sparse:
                raise self._refused(
                    f"holds {_shown(name)}, which is neither a plain file nor a folder",
                    _GIVE_ANOTHER,
                )
            path = self._safe_path(name, is_file)
            self._unread = self._bounded(size, _LARGEST_FILE, name) if is_file else 0
            padding = -self._unread % tarfile.BLOCKSIZE
            yield path, is_file
            for _ in self.content():
                pass  # skip what was not read
            self._read(padding)
            extensions = {}
        raise self._refused(f"has more than {_MOST_HEADERS // 2:,} files", _UNPACK_IT)

    def content(self) -> Iterator[bytes]:
        """The content of the current file, in pieces."""
        while self._unread:
            piece = self._read(min(self._unread, _PIECE))
            self._unread -= len(piece)
            yield piece

    def unpacked_size(self) -> int:
        """Unpacked size of the archive in bytes; reads the rest of it."""
        while self._unpack(_PIECE):
            pass
        return self._unpacked

    def _read(self, size: int) -> bytes:
        data = self._unpack(size)
        if len(data) < size:
            raise self._refused(
                f"ends early, after {self._unpacked:,} unpacked bytes", _DOWNLOAD_AGAIN
            )
        return data

    def _unpack(self, size: int) -> bytes:
        """The next ``size`` unpacked bytes; fewer only at the end."""
        with self._reading():
            data = self._gzip.read(size)
        self._unpacked += len(data)
        allowed = min(_MOST_UNPACKED, max(_ALWAYS_ALLOWED, _MOST_TIMES_ITS_SIZE * self.size))
        if self._unpacked > allowed:
            raise self._refused(
                f"unpacks to more than {allowed:,} bytes from {self.size:,}", _UNPACK_IT
            )
        return data

    def _read_extension(self, header: tarfile.TarInfo) -> dict[str, str]:
        """What an extension header says about the member that follows it."""
        size = self._bounded(header.size, _LARGEST_EXTENSION, header.name)
        data = self._read(size + -size % tarfile.BLOCKSIZE)[:size]
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        return _pax_records(data) if header.type == _PAX else {}

    def _bounded(self, size: int, largest: int, name: str) -> int:
        if size < 0:
            raise self._refused(f"gives {_shown(name)} a size of {size}", _DOWNLOAD_AGAIN)
        if size > largest:
            raise self._refused(
                f"holds {_shown(name)} of {size:,} bytes; {largest:,} is the most", _UNPACK_IT
            )
        return size

    def _safe_path(self, name: str, is_file: bool) -> PurePosixPath:
        """``name`` as a path, if it stays below the root and collides with no other member."""
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in name
            or "\0" in name
            or re.match("[A-Za-z]:", name)
            or (is_file and not path.parts)
        ):
            raise self._refused(f"holds {_shown(name)}, an unsafe name", _GIVE_ANOTHER)
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if (
            longest > _LONGEST_NAME
            or len(os.fsencode(name)) > _LONGEST_PATH
            or len(path.parts) > _DEEPEST
        ):
            raise self._refused(f"holds {_shown(name)}, too long or too deep a name", _GIVE_ANOTHER)
        for depth in range(1, len(path.parts) + 1):
            mine = "/".join(path.parts[:depth]), is_file and depth == len(path.parts)
            first = self._taken.setdefault(mine[0].casefold(), mine)
            if first != mine or (mine[1] and first is not mine):
                both = f"{_shown(first[0])} and {_shown(name)}"
                raise self._refused(f"holds {both}, which can be one place on a disk", _UNPACK_IT)
        return path

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except EOFError as error:
            raise self._refused(f"of {self.size:,} bytes ends early", _DOWNLOAD_AGAIN) from error
        except (OSError, zlib.error) as error:
            raise self._refused(f"cannot be read: {error}", _DOWNLOAD_AGAIN) from error

    def _refused(self, what: str, fix: str) -> CifarJaxError:
        return DataError(f"the archive {self._path} {what}", fix=fix)


def _shown(name: str) -> str:
    return repr(name if len(name) < 100 else f"{name[:100]}...")


def _pax_records(data: bytes) -> dict[str, str]:
    """The records of a PAX header, ``LENGTH KEY=VALUE`` and a line break each.

    Raises:
        ValueError: ``data`` is not of that form.
    """
    records = {}
    start = 0
    while start < len(data):
        head = _PAX_RECORD.match(data, start)
        end = start + int(head[1]) if head else 0
        if not head or end <= head.end() or data[end - 1 : end] != b"\n":
            raise ValueError(f"a PAX header holds {data[start : start + 20]!r}")
        value = data[head.end() : end - 1]
        records[head[2].decode()] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def first_paths(archive: Path, count: int) -> list[PurePosixPath]:
    """The paths of the first ``count`` members.

    Raises:
        DataError: as for :class:`TarGz`.
    """
    with TarGz(archive) as members:
        return [path for _, (path, _) in zip(range(count), members, strict=False)]


def extract_once(archive: Path, into: Path) -> Path:
    """Extract ``archive`` to a folder below ``into`` named by its digest, unless it exists already.

    The folder appears whole or not at all: files are extracted to a hidden folder, which is then
    renamed. One of several processes extracts while the others wait, and what a killed process left
    behind is removed. On a file system without locks, each process extracts and the first to finish
    wins.

    Raises:
        DataError: as for :class:`TarGz`.
        ResourceError: ``into`` cannot be written, or its disk is full.
    """
    with TarGz(archive) as members:
        name = archive.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        folder = into / f"{name}-{members.sha256()[:12]}"
        if folder.is_dir():
            return folder
        try:
            with alone_in(into, "extracting") as alone:
                if not folder.is_dir():
                    _extract(members, folder, alone)
        except OSError as error:  # from writing: TarGz has turned those from reading into its own
            what = f"cannot write to --data-dir {into}: {error.strerror or error}"
            if lacks_room(error):
                needed = members.unpacked_size() / 2**20
                there = next(place for place in (into, *into.parents) if place.exists())
                free = shutil.disk_usage(there).free / 2**20
                what += f"; {archive} needs {needed:,.1f} MB, and {free:,.1f} MB are free"
            raise ResourceError(what, fix=fix_of(error, "another --data-dir")) from error
    return folder


def _extract(members: TarGz, folder: Path, alone: bool) -> None:
    """Extract to ``folder``, which appears whole or not at all.

    Args:
        alone: whether this process holds the lock, so that no other extracts at the same time.
    """
    if alone:
        for leftover in folder.parent.glob(".incomplete-*"):
            shutil.rmtree(leftover)
    hidden = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    incomplete = hidden / folder.name
    incomplete.mkdir()
    try:
        with tqdm(
            total=members.size, unit="B", unit_scale=True, desc="extracting", disable=None
        ) as bar:
            for path, is_file in members:
                target = incomplete / path
                (target.parent if is_file else target).mkdir(parents=True, exist_ok=True)
                if is_file:
                    with target.open("xb") as output:
                        output.writelines(members.content())
                bar.update(members.position - bar.n)
        os.sync()
        incomplete.rename(folder)
    except OSError:
        if alone or not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
