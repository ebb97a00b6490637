"""What is listed, and what is refused; a kept listing is the listing, until a folder changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_jax.data import listing
from cifar_jax.data.listing import Listing, list_images
from cifar_jax.errors import CifarJaxError, ExitCode


def same(a: Listing, b: Listing) -> bool:
    arrays = np.array_equal(a.paths, b.paths) and np.array_equal(a.labels, b.labels)
    return arrays and (a.class_names, a.sizes, a.ignored) == (b.class_names, b.sizes, b.ignored)


@pytest.fixture
def root(image_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(image_folder / "train", tmp_path / "train")
    (tmp_path / "train" / "cat" / "inner").mkdir()
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "train" / "cat" / "inner")
    (tmp_path / "train" / "cat" / "README").touch()
    for name in ("a.gif", "Thumbs.db", "b.GIF", ".DS_Store"):
        (tmp_path / "train" / "cat" / "inner" / name).touch()
    return tmp_path / "train"


@pytest.mark.fault("C11", "C12")
def test_hidden_files_do_not_count_and_others_are_counted(root: Path, tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX"):
        for folder in (root / name, root / "cat" / name):
            folder.mkdir()
            shutil.copy(root / "cat" / "000.png", folder)
    (root / "cat" / "001.png").rename(root / "cat" / "001.PNG")
    found = list_images(root, tmp_path)
    assert found.class_names == ("bird", "cat", "frog")
    assert len(found.paths) == 91
    assert found.ignored == {".gif": 2, ".db": 1, "": 1}


def test_a_folder_has_the_same_listing_by_any_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    by_name, here = list_images(root, tmp_path), list_images(Path(), tmp_path)
    assert same(here, by_name)
    assert here.sizes.startswith(b"/bird/")


@pytest.mark.fault("C15", "C17")
def test_folders_are_listed_to_any_depth_and_links_to_folders_are_not(
    root: Path, tmp_path: Path
) -> None:
    deep = root / "cat" / "/".join("abcdefghijklmnopqrst")
    deep.mkdir(parents=True)
    (deep / "round").symlink_to(root / "cat")
    (deep / "far").symlink_to(root.parent)
    (tmp_path / "elsewhere.png").write_bytes(b"x")
    (deep / "link.png").symlink_to(tmp_path / "elsewhere.png")  # of a file: it is listed
    found = list_images(root, tmp_path)
    assert len(found.paths) == 92
    assert os.fsencode(deep / "link.png") in found.paths
    assert f"{str(deep / 'link.png').removeprefix(str(root))} 1\n" in found.sizes.decode()


def dangle(path: Path) -> None:
    path.symlink_to(path.parent / "nothing.png")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)  # the whole path would be too long


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.fault("C17", "C18")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (dangle, r"cannot read .*/new.png: it is a link to nothing"),
        (link_to_itself, r"cannot read .*/new.png: Too many levels of symbolic links"),
        (os.mkfifo, r"the image .*/new.png is a pipe, not a regular file"),
        (make_socket, r"the image .*/new.png is a socket, not a regular file"),
        (link_to_a_device, r"the image .*/new.png is a device, not a regular file"),
    ],
)
def test_what_can_be_no_image_is_named(make: Any, what: str, root: Path, tmp_path: Path) -> None:
    make(root / "cat" / "inner" / "new.png")
    with pytest.raises(CifarJaxError, match=f"{what}. Fix: ") as caught:
        list_images(root, tmp_path)
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.fault("C16")
def test_names_that_do_not_print_are_escaped(tmp_path: Path) -> None:
    for name in (b"-a", "Käse".encode(), b"a\nb", b"a b", b"\xff"):
        folder = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        folder.mkdir()
        (folder / "1.png").write_bytes(b"x")
    found = list_images(tmp_path, tmp_path / "listings")
    assert found.class_names == ("-a", "Käse", r"a\nb", "a b", r"\udcff")
    assert [Path(os.fsdecode(path)).read_bytes() for path in found.paths] == [b"x"] * 5
    os.mkfifo(folder / "\x1b.png")
    with pytest.raises(CifarJaxError, match=r"/\\udcff/\\x1b.png is a pipe"):
        list_images(tmp_path, tmp_path / "listings")


@pytest.mark.fault("C23")
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


@pytest.mark.fault("C23")
@pytest.mark.parametrize("where", ["cat/new.png", "cat/inner/new.png", "dog/new.png"])
def test_a_new_file_is_noticed(
    where: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    list_images(root, tmp_path / "listings")
    (root / where).parent.mkdir(exist_ok=True)
    shutil.copy(root / "cat" / "000.png", root / where)
    assert str(root / where).encode() in list_images(root, tmp_path / "listings").paths


@pytest.mark.fault("C23")
def test_a_damaged_kept_listing_is_made_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    first = list_images(root, tmp_path / "listings")
    (kept,) = (tmp_path / "listings").iterdir()
    whole = kept.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(200):
        damaged = bytearray(whole)
        if number % 4 == 0:
            del damaged[rng.integers(len(whole)) :]
        elif number % 4 == 1:
            damaged[rng.integers(len(whole)) :] = rng.bytes(100)
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        kept.write_bytes(damaged)
        assert listing._read(kept) is None, number
    assert same(list_images(root, tmp_path / "listings"), first)
    assert kept.read_bytes() == whole


def test_where_it_cannot_be_kept_nothing_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    (tmp_path / "file").write_text("in the way")
    assert len(list_images(root, tmp_path / "file").paths) == 91
