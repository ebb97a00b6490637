"""A kept listing is the listing, until a folder changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cifar_jax import listing
from cifar_jax.listing import Listing, list_images


def same(a: Listing, b: Listing) -> bool:
    arrays = np.array_equal(a.paths, b.paths) and np.array_equal(a.labels, b.labels)
    return arrays and (a.class_names, a.sizes) == (b.class_names, b.sizes)


@pytest.fixture
def root(image_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(image_folder / "train", tmp_path / "train")
    (tmp_path / "train" / "cat" / "inner").mkdir()
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "train" / "cat" / "inner")
    return tmp_path / "train"


def test_a_long_listing_is_kept_and_a_short_one_is_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_in = tmp_path / "listings"
    first = list_images(root, kept_in)
    assert len(first.paths) == 91
    assert not kept_in.exists()
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    assert same(list_images(root, kept_in), first)
    assert len(list(kept_in.iterdir())) == 1

    def walk(*_: object) -> Listing:
        raise AssertionError("it was listed again")

    monkeypatch.setattr(listing, "_walk", walk)
    assert same(list_images(root, kept_in), first)


@pytest.mark.parametrize("where", ["cat/new.png", "cat/inner/new.png", "dog/new.png"])
def test_a_new_file_is_noticed(
    where: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    list_images(root, tmp_path / "listings")
    (root / where).parent.mkdir(exist_ok=True)
    shutil.copy(root / "cat" / "000.png", root / where)
    assert str(root / where).encode() in list_images(root, tmp_path / "listings").paths


def test_a_damaged_kept_listing_is_made_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    first = list_images(root, tmp_path / "listings")
    (kept,) = (tmp_path / "listings").iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    assert same(list_images(root, tmp_path / "listings"), first)


def test_where_it_cannot_be_kept_nothing_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    (tmp_path / "file").write_text("in the way")
    assert len(list_images(root, tmp_path / "file").paths) == 91
