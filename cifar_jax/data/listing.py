"""List the image files of a folder of class folders; a listing that took long is cached."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_jax.data.images import unusable
from cifar_jax.errors import CifarJaxError, DataError, shown
from cifar_jax.system.files import new_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

# Faster listings are not cached: a cached listing does not notice files that were overwritten.
_WORTH_KEEPING_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images below a folder, class by class, sorted.

    Attributes:
        class_names: the class folders, in label order; unprintable characters are escaped.
        paths: bytes ``[N]``, as the file system spells them.
        labels: int32 ``[N]``.
        sizes: a line per file, with its relative path and its size in bytes; identifies the data.
        ignored: the number of files that are not images, by ending.
    """

    class_names: tuple[str, ...]
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int32]
    sizes: bytes
    ignored: Counter[str]

    def one_of_each_class(self) -> NDArray[np.bytes_]:
        _, first = np.unique(self.labels, return_index=True)
        return self.paths[first]

    def evenly_spread(self, count: int) -> NDArray[np.bytes_]:
        """At most ``count`` paths, evenly spaced in their order."""
        return self.paths[:: max(1, -(-len(self.paths) // count))]


def list_images(root: Path, kept_in: Path) -> Listing:
    """The image files of each class folder below ``root``.

    A listing that takes seconds is cached in ``kept_in``, and is valid until a file is added to or
    deleted from any of the folders.

    Raises:
        DataError: there are fewer than two class folders, one is without an image, or an image is
            not a regular file.
    """
    root = root.absolute()
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:20]
    path = kept_in / f"{name}.listing"
    kept = _read(path)
    if kept is not None:
        return kept
    started = time.perf_counter()
    changed_at: dict[bytes, int] = {}
    with reading(root):
        listing = _walk(root, changed_at)
    if time.perf_counter() - started > _WORTH_KEEPING_SECONDS:
        with contextlib.suppress(CifarJaxError):  # only a cache
            _write(path, listing, changed_at)
    return listing


@contextlib.contextmanager
def reading(root: Path) -> Iterator[None]:
    """Turn an ``OSError`` at or below ``root`` into a ``DataError``."""
    try:
        yield
    except OSError as error:
        path = error.filename or root
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise DataError(
            f"cannot read {shown(path)}: "
            + ("it is a link to nothing" if dangling else f"{error.strerror or error}"),
            fix="make it readable, or remove it",
        ) from error


def folders_and_files(
    folder: Path,
) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """The folders and files in ``folder``, sorted by name, without hidden ones and macOS's own."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    return [e for e in entries if e.is_dir()], [e for e in entries if not e.is_dir()]


def too_few_classes(root: Path, count: int) -> CifarJaxError:
    """The ``DataError`` for a ``root`` with only ``count`` class folders."""
    return DataError(
        f"{shown(root)} holds {count} class folder(s), where at least two are needed",
        fix="put the images of each class into a folder of its own, such as "
        f"{shown(root / 'frog' / '1.png')}",
    )


def _walk(root: Path, changed_at: dict[bytes, int]) -> Listing:
    """List ``root``, and record in ``changed_at`` when each folder was last changed."""
    changed_at[os.fsencode(root)] = root.stat().st_mtime_ns
    folders, _ = folders_and_files(root)
    if len(folders) < 2:
        raise too_few_classes(root, len(folders))
    # Converted to arrays class by class: Python objects take a kilobyte per image.
    paths_of_classes: list[NDArray[np.bytes_]] = []
    sizes_of_classes: list[bytes] = []
    ignored: Counter[str] = Counter()
    n_root = len(os.fsencode(root))
    with tqdm(desc=f"listing {root}", unit=" images", delay=1, leave=False, disable=None) as bar:
        for folder in folders:
            paths: list[bytes] = []
            lines: list[bytes] = []
            for file in _files_below(Path(folder.path), changed_at):
                if not file.name.lower().endswith(IMAGE_SUFFIXES):
                    ignored[shown(os.path.splitext(file.name)[1].lower())] += 1
                    continue
                path = os.fsencode(file.path)
                paths.append(path)
                lines.append(b"%s %d\n" % (path[n_root:], _size(file)))
                bar.update()
            if not paths:
                raise DataError(
                    f"the class folder {shown(folder.path)} holds no "
                    f"{' or '.join(IMAGE_SUFFIXES)} image",
                    fix="put images there, or delete the folder",
                )
            paths_of_classes.append(np.array(paths))
            sizes_of_classes.append(b"".join(lines))
    return Listing(
        tuple(shown(folder.name) for folder in folders),
        np.concatenate(paths_of_classes),
        np.repeat(np.arange(len(folders), dtype=np.int32), [len(p) for p in paths_of_classes]),
        b"".join(sizes_of_classes),
        ignored,
    )


def _files_below(folder: Path, changed_at: dict[bytes, int]) -> Iterator[os.DirEntry[str]]:
    unvisited = [folder]
    while unvisited:
        visited = unvisited.pop()
        changed_at[os.fsencode(visited)] = visited.stat().st_mtime_ns
        inner_folders, files = folders_and_files(visited)
        # Links to folders are not followed inside a class: they can be circular.
        unvisited += [Path(f.path) for f in reversed(inner_folders) if not f.is_symlink()]
        yield from files


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def _size(file: os.DirEntry[str]) -> int:
    """The size in bytes of a file, or of a link's target."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):  # opening it could block forever
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise unusable(os.fsencode(file.path), f"is {kind}, not a regular file", fix="remove it")
    return found.st_size


def _write(path: Path, listing: Listing, changed_at: dict[bytes, int]) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        class_names=np.array(listing.class_names),
        paths=listing.paths,
        labels=listing.labels,
        sizes=np.frombuffer(listing.sizes, np.uint8),
        ignored=np.array(list(listing.ignored.items()), np.str_).reshape(-1, 2),
        folders=np.array(list(changed_at)),
        changed_at=np.array(list(changed_at.values())),
    )
    content = buffer.getvalue()
    with new_path(path, "the listing") as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


def _read(path: Path) -> Listing | None:
    """The cached listing, if it exists, is undamaged, and no folder has changed since."""
    try:
        content = path.read_bytes()
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as kept:
            for folder, changed_at in zip(kept["folders"], kept["changed_at"], strict=True):
                if os.stat(folder).st_mtime_ns != changed_at:
                    return None
            return Listing(
                tuple(kept["class_names"].tolist()),
                kept["paths"],
                kept["labels"],
                kept["sizes"].tobytes(),
                Counter({ending: int(count) for ending, count in kept["ignored"].tolist()}),
            )
    except OSError:
        return None
