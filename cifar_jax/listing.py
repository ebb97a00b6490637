"""The image files of a folder of class folders; a listing that took long is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.files import new_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

# What takes less is listed each time: a kept listing does not know of files that were overwritten.
_WORTH_KEEPING_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images below a folder, class by class, sorted.

    Attributes:
        class_names: the class folders, in label order.
        paths: bytes ``[N]``, as the file system spells them.
        labels: int32 ``[N]``.
        sizes: a line a file, of its path within the folder and its bytes; tells data from other
            data.
    """

    class_names: tuple[str, ...]
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int32]
    sizes: bytes

    def one_of_each_class(self) -> NDArray[np.bytes_]:
        _, first = np.unique(self.labels, return_index=True)
        return self.paths[first]


def list_images(root: Path, kept_in: Path) -> Listing:
    """The image files of each class folder below ``root``.

    A listing that takes seconds is kept in ``kept_in``, and holds until a file is added to or
    deleted from any of the folders.

    Raises:
        CifarJaxError: data; fewer than two class folders, or one without an image.
    """
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:20]
    kept = _read(kept_in / f"{name}.npz")
    if kept is not None:
        return kept
    started = time.perf_counter()
    changed_at: dict[bytes, int] = {}
    listing = _walk(root, changed_at)
    if time.perf_counter() - started > _WORTH_KEEPING_SECONDS:
        with contextlib.suppress(CifarJaxError):  # nothing depends on it
            _write(kept_in / f"{name}.npz", listing, changed_at)
    return listing


def folders_and_files(
    folder: Path,
) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """What counts in a folder, sorted by name: hidden entries and macOS's own do not."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    return [e for e in entries if e.is_dir()], [e for e in entries if not e.is_dir()]


def _walk(root: Path, changed_at: dict[bytes, int]) -> Listing:
    """List ``root``, and note in ``changed_at`` when each folder on the way was last changed."""
    changed_at[os.fsencode(root)] = root.stat().st_mtime_ns
    folders, _ = folders_and_files(root)
    if len(folders) < 2:
        raise CifarJaxError(
            ExitCode.DATA,
            f"{root} holds {len(folders)} class folder(s), where at least two are needed",
            fix=f"put the images of each class into a folder of its own, such as {root}/frog/1.png",
        )
    # A class at a time into arrays: Python's own objects take a kilobyte an image.
    paths_of_classes: list[NDArray[np.bytes_]] = []
    sizes_of_classes: list[bytes] = []
    bar = tqdm(desc=f"listing {root}", unit=" images", delay=1, leave=False, disable=None)
    for folder in folders:
        paths: list[bytes] = []
        lines: list[bytes] = []
        unvisited = [Path(folder.path)]
        while unvisited:
            visited = unvisited.pop()
            changed_at[os.fsencode(visited)] = visited.stat().st_mtime_ns
            inner_folders, files = folders_and_files(visited)
            # Links to folders are not followed inside a class: they can lead round in a circle.
            unvisited += [Path(f.path) for f in reversed(inner_folders) if not f.is_symlink()]
            for file in files:
                if file.name.lower().endswith(IMAGE_SUFFIXES):
                    path = os.fsencode(file.path)
                    paths.append(path)
                    relative = path[len(os.fsencode(root)) :]
                    lines.append(b"%s %d\n" % (relative, file.stat().st_size))
                    bar.update()
        if not paths:
            raise CifarJaxError(
                ExitCode.DATA,
                f"the class folder {folder.path} holds no {' or '.join(IMAGE_SUFFIXES)} image",
                fix="put images there, or delete the folder",
            )
        paths_of_classes.append(np.array(paths))
        sizes_of_classes.append(b"".join(lines))
    bar.close()
    return Listing(
        tuple(folder.name for folder in folders),
        np.concatenate(paths_of_classes),
        np.repeat(np.arange(len(folders), dtype=np.int32), [len(p) for p in paths_of_classes]),
        b"".join(sizes_of_classes),
    )


def _write(path: Path, listing: Listing, changed_at: dict[bytes, int]) -> None:
    with new_path(path, "the listing") as temporary:
        np.savez(
            temporary,
            class_names=np.array([os.fsencode(name) for name in listing.class_names]),
            paths=listing.paths,
            labels=listing.labels,
            sizes=np.frombuffer(listing.sizes, np.uint8),
            folders=np.array(list(changed_at)),
            changed_at=np.array(list(changed_at.values())),
        )


def _read(path: Path) -> Listing | None:
    """The kept listing, if there is one and no folder has changed since."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            for folder, changed_at in zip(kept["folders"], kept["changed_at"], strict=True):
                if os.stat(folder).st_mtime_ns != changed_at:
                    return None
            return Listing(
                tuple(os.fsdecode(name) for name in kept["class_names"]),
                kept["paths"],
                kept["labels"],
                kept["sizes"].tobytes(),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
