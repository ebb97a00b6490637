"""A folder of class folders, or of splits with them: its classes, and the files of each split."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from cifar_jax.data.dataset import Contents, ImageFiles, Split
from cifar_jax.data.images import probe_shape
from cifar_jax.data.listing import folders_and_files, list_images, reading
from cifar_jax.errors import DataError, shown

# A data set counts as greyscale if this many files of each split are.
_SHAPE_SAMPLE = 500
# The folders of splits, and other names that may be meant for them.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read_folder(root: Path, name: str, data_dir: Path, image_size: int | None) -> Contents:
    """A folder in the layout of torchvision's ImageFolder, with splits or flat.

    Prints remarks on what may be a mistake; ``data_dir`` keeps the listing for the next time.

    ``test/`` is the test set, or ``val/`` if there is no ``test/``; with both, ``val/`` is the
    validation split. All images of a flat folder are ``train``.

    Raises:
        DataError: the splits, classes or files are not as expected.
    """
    with reading(root):
        root = _unwrap(root)
        present = _split_folders(root)
    if present and ("train" not in present or len(present) == 1):
        raise DataError(
            f"{shown(root)} has {' and '.join(f'{split}/' for split in present)} only",
            fix="put class folders into train/ and test/, or class folders alone into the root",
        )
    roots = {split: root / split for split in present} or {"train": root}
    kept_in = data_dir / "listings"
    listings = {split: list_images(folder, kept_in) for split, folder in roots.items()}
    first, *others = listings
    class_names = listings[first].class_names
    for other in others:
        _check_same_classes(roots[first], class_names, roots[other], listings[other].class_names)
    _print_remarks(root, class_names, sum((x.ignored for x in listings.values()), Counter()))

    some = [listing.evenly_spread(_SHAPE_SAMPLE) for listing in listings.values()]
    shape = probe_shape(np.concatenate([listings[first].one_of_each_class(), *some]), image_size)
    splits = {
        split: Split(ImageFiles(listing.paths, shape, image_size is not None), listing.labels)
        for split, listing in listings.items()
    }
    val, test = splits.get("val"), splits.get("test")
    if test is None:
        val, test = None, val
    sizes = b"".join(listings[split].sizes for split in sorted(listings))
    digest = hashlib.sha256(sizes).hexdigest()
    return Contents(name, digest, class_names, splits["train"], test, val)


def _split_folders(root: Path) -> list[str]:
    """Those of ``train``, ``val`` and ``test`` that exist; none in a folder of class folders.

    Raises:
        DataError: there are folders that must be splits, but have other names.
    """
    names = [folder.name for folder in folders_and_files(root)[0]]
    present = [split for split in _SPLIT_FOLDERS if split in names]
    if len(present) == 1 < len(names) and not folders_and_files(root / present[0])[0]:
        return []  # a class, such as pictures of trains
    meant = {
        name: split
        for split, spellings in _SPLIT_FOLDERS.items()
        for name in names
        if name not in _SPLIT_FOLDERS and name.casefold() in spellings
    }
    # A single one may be a class, and so may 'valid' beside others.
    splits = {*present, *meant.values()}
    if meant and "train" in splits and len(splits) > 1:
        renamed = ", ".join(f"{shown(name)}/ to {split}/" for name, split in meant.items())
        raise DataError(
            f"{shown(root)} has {' and '.join(f'{shown(name)}/' for name in meant)}, but splits "
            "must be called train/, val/ and test/",
            fix=f"rename {renamed}",
        )
    if present and (others := [name for name in names if name not in present]):
        print(
            f"{shown(root)}: ignored beside {' and '.join(f'{split}/' for split in present)}: "
            f"{', '.join(f'{shown(name)}/' for name in others[:5])}"
        )
    return present


def _unwrap(root: Path) -> Path:
    """Descend through folders with a single folder, as in many archives, and at most a README."""
    while True:
        folders, _ = folders_and_files(root)
        if len(folders) != 1 or folders[0].name in _SPLIT_FOLDERS:
            return root
        if folders[0].is_symlink():  # can be circular
            return root
        inner_folders, _ = folders_and_files(Path(folders[0].path))
        if not inner_folders:  # it is a class
            return root
        root = Path(folders[0].path)


def _check_same_classes(
    root: Path, class_names: tuple[str, ...], other_root: Path, other_names: tuple[str, ...]
) -> None:
    if class_names != other_names:
        missing = sorted(set(class_names) - set(other_names))
        extra = sorted(set(other_names) - set(class_names))
        alike = set(map(_as_read, missing)) & set(map(_as_read, extra))
        show = ascii if alike else repr  # repr would show them as the same
        raise DataError(
            f"{shown(other_root)} has other classes than {shown(root)}: "
            f"missing {show(missing)}, extra {show(extra)}",
            fix="give both the same class folders",
        )


def _print_remarks(root: Path, class_names: tuple[str, ...], ignored: Counter[str]) -> None:
    """Print warnings on what is not an error, but may be a mistake."""
    if ignored:
        counts = [f"{n:,} {ending or 'without ending'}" for ending, n in ignored.most_common(5)]
        if len(ignored) > len(counts):
            counts.append("...")
        print(
            f"{shown(root)}: ignored {ignored.total():,} file(s) that are not JPEG or PNG: "
            f"{', '.join(counts)}"
        )
    seen: dict[str, str] = {}
    for name in class_names:
        other = seen.setdefault(_as_read(name), name)
        if other != name:
            print(
                f"warning: {shown(root)} has the classes {other!a} and {name!a}, which read the "
                "same; if they are one, put their images into one folder"
            )


def _as_read(name: str) -> str:
    """A key that is equal for names that differ only in case or in Unicode composition."""
    return unicodedata.normalize("NFKC", name.casefold())
