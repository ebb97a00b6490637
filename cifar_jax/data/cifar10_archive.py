"""CIFAR-10's own archives, read without extraction: the "python" and the "binary" version.

Both are of https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_jax.data import archive
from cifar_jax.data.dataset import Split
from cifar_jax.errors import DataError

_PYTHON_ROOT, _BINARY_ROOT = "cifar-10-batches-py", "cifar-10-batches-bin"
# The files of this version are pickles, which are programs: they are read from this archive only.
_PYTHON_ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_MOST_RECORDS, _RECORD_BYTES = 10_000, 1 + 3 * 32 * 32


def root_of(path: Path) -> str | None:
    """The folder in the archive ``path`` that identifies it as one of these, or None."""
    roots = {first.parts[0] for first in archive.first_paths(path, 3) if first.parts}
    return next((root for root in (_PYTHON_ROOT, _BINARY_ROOT) if root in roots), None)


def read(path: Path, root: str) -> tuple[Split, Split, tuple[str, ...]]:
    """The training and the test images of the archive ``path``, and the class names.

    Args:
        root: as returned by :func:`root_of`.

    Raises:
        DataError: the archive is damaged, or holds pickles and is not the official one.
    """
    is_python = root == _PYTHON_ROOT
    ending, meta = ("", "batches.meta") if is_python else (".bin", "batches.meta.txt")
    read_batch = _read_python_batch if is_python else _read_binary_batch
    batches = [f"{name}{ending}" for name in _BATCHES]
    files: dict[str, bytes] = {}
    with archive.TarGz(path) as members:
        if is_python and (digest := members.sha256()) != _PYTHON_ARCHIVE_SHA256:
            raise DataError(
                f"{path} is not CIFAR-10's own: it holds pickles, which are programs, and its "
                f"SHA-256 is {digest[:12]}..., not {_PYTHON_ARCHIVE_SHA256[:12]}...",
                fix="use the binary version, whose content needs no pickle, or image folders",
            )
        for member, _ in members:
            if str(member.parent) == root and member.name in (*batches, meta):
                files[member.name] = b"".join(members.content())
    try:
        if missing := {*batches, meta} - files.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if is_python:
            class_names = tuple(_unpickle(files[meta])["label_names"])
        else:
            class_names = tuple(files[meta].decode().split())
        *parts, test_part = [read_batch(files[name]) for name in batches]
        train = Split(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
        )
        test = Split(*test_part)
        for split in (train, test):
            if split.labels.max() >= len(set(class_names)):
                raise ValueError(f"label {split.labels.max()} has none of the class names")
    except (KeyError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{path} is laid out like CIFAR-10's own archive, but cannot be read as it: "
            f"{type(error).__name__} {error}",
            fix="download it again",
        ) from error
    return train, test, class_names


def _read_binary_batch(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Records of a label byte and 3 x 32 x 32 pixel bytes."""
    if not 0 < len(content) <= _MOST_RECORDS * _RECORD_BYTES:
        raise ValueError(f"a batch has 1 to {_MOST_RECORDS:,} images of {_RECORD_BYTES:,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
    return _channels_last(records[:, 1:]), records[:, 0].astype(np.int32)


def _read_python_batch(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    batch = _unpickle(content)
    return _channels_last(np.asarray(batch["data"], np.uint8)), np.asarray(
        batch["labels"], np.int32
    )


def _channels_last(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[N, C*H*W]`` -> ``[N, H, W, C]``."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can make NumPy arrays and plain values, and nothing else."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(content: bytes) -> dict[str, Any]:
    # The official files were written by Python 2, where strings are bytes.
    loaded = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
