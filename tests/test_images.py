"""Images of any kind become the pixels that training's decoder gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from conftest import GREY, RGB
from numpy.typing import NDArray
from PIL import Image

from cifar_jax.data import images
from cifar_jax.data.dataset import ImageFiles, Split
from cifar_jax.data.images import image_suffixes, read_image
from cifar_jax.data.input_pipeline import decode
from cifar_jax.errors import CifarJaxError, DataError, ExitCode

RNG = np.random.default_rng(0)


def decoded_for_training(path: Path, shape: tuple[int, int, int], resize: bool) -> NDArray[Any]:
    paths = np.array([str(path).encode()])
    return decode(Split(ImageFiles(paths, shape, resize), np.zeros(1, np.int32))).pixels[0]


def save(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("shape", [(8, 8, 3), (48, 40, 3), (12, 30, 3)])
def test_resizing_agrees_with_training_to_one_level(shape: Any, tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(RGB), "a.png")
    theirs = decoded_for_training(path, shape, resize=True).astype(int)
    difference = read_image(path, "a", shape) - theirs
    assert np.abs(difference).max() <= 1
    assert abs(difference.mean()) < 0.4, "neither cuts off what the other rounds"


def test_cropping_keeps_the_proportions(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle square
    path = save(tmp_path, Image.fromarray(wide), "wide.png")
    assert read_image(path, "wide", (10, 10, 3), fit="crop").min() == 255
    assert read_image(path, "wide", (10, 10, 3), fit="stretch").min() == 0


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_photograph_is_turned_upright(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path, Image.fromarray(RGB), f"a.{suffix}", exif=exif, **options)
    np.testing.assert_array_equal(read_image(path, "a", (20, 24, 3)), np.rot90(RGB, k=-1))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB), (2, RGB[:, ::-1]), (3, RGB[::-1, ::-1]), (4, RGB[::-1]),
        (5, RGB.swapaxes(0, 1)), (6, np.rot90(RGB, k=-1)),
        (7, RGB[::-1, ::-1].swapaxes(0, 1)), (8, np.rot90(RGB)),
    ],
)  # fmt: skip
def test_each_orientation_is_exifs_own(
    orientation: int, upright: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(RGB), "a.png", exif=exif)
    height, width, _ = upright.shape
    np.testing.assert_array_equal(read_image(path, "a", (height, width, 3)), upright)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "F", "I", "I;16", "1", "P", "PA"])
def test_every_mode_is_read(mode: str, tmp_path: Path) -> None:
    if mode == "F":
        image = Image.fromarray(GREY.astype(np.float32) / 255)
    elif mode.startswith("I"):
        image = Image.fromarray(GREY.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = Image.fromarray(RGB).convert("RGB" if mode == "LAB" else mode)
    name = "a.png" if mode in ("1", "P", "PA", "I;16") else "a.tif"
    if mode in ("HSV", "PA"):
        image = image.convert("RGBA" if mode == "PA" else "RGB")
    path = save(tmp_path, image, name)
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        with pytest.raises(DataError, match="truncated"):  # which Pillow has written itself
            read_image(path, name, (24, 20, 3))
        return
    pixels = read_image(path, name, (24, 20, 3))
    assert pixels.std() > 10
    if mode in ("F", "I", "I;16"):
        assert np.abs(pixels[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.float32([[-1, 0, 0.5, 1]]), [0, 0, 128, 255]),
        (np.float32([[-1, 0, 100.4, 300]]), [0, 0, 100, 255]),
        (np.int32([[-1, 0, 25_700, 70_000]]), [0, 0, 100, 255]),
    ],
    ids=["of 1", "of 255", "of 65535"],
)
def test_what_is_beyond_black_and_white_is_black_and_white(
    values: NDArray[Any], levels: list[int], tmp_path: Path
) -> None:
    path = save(tmp_path, Image.fromarray(values), "a.tif")
    assert read_image(path, "a", (1, 4, 1)).ravel().tolist() == levels


def test_an_open_file_is_read_too() -> None:
    np.testing.assert_array_equal(read_image(io.BytesIO(encoded("PNG")), "-", (24, 20, 3)), RGB)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.fault("C1", "C2", "C8", "C10")
def test_what_is_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded("PNG")
    (tmp_path / "whole.png").write_bytes(whole)
    broken = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"no image at all", "is not an image"),
        "cut.png": (whole[:-300], "is cut short"),
        "flipped.png": (whole[:-20] + bytes(1) + whole[-19:], "is damaged: the checksum"),
        "cut.gif": (encoded("GIF")[:-300], "is damaged: "),
    }
    for name, (content, what) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CifarJaxError, match=f"^{name} {what}") as caught:
            read_image(tmp_path / name, name, (8, 8, 3))
        assert caught.value.exit_code == ExitCode.DATA
    for name in ("missing.png", "null\0byte.png"):
        with pytest.raises(CifarJaxError, match="cannot be read"):
            read_image(tmp_path / name, name, (8, 8, 3))
    with pytest.raises(CifarJaxError, match="cannot be read"):
        read_image(tmp_path, "a folder", (8, 8, 3))
    huge = encoded("PPM").replace(b"20 24", b"60000 60000")
    with pytest.raises(CifarJaxError, match=r"a\\nb has more than 64,000,000 pixels"):
        read_image(io.BytesIO(huge), "a\nb", (8, 8, 3))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(CifarJaxError, match="24x20 pixels, more than 100"):
        read_image(tmp_path / "whole.png", "whole.png", (8, 8, 3))
    with pytest.raises(CifarJaxError, match="more than 100 pixels: 24x20"):
        read_image(io.BytesIO(encoded("BMP")), "bitmap", (8, 8, 3))
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    with pytest.raises(CifarJaxError, match="has more than"):
        read_image(Path("/dev/zero"), "zeros", (8, 8, 3))


@pytest.mark.fault("C25")
def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run it, and waits."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/was_run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it looks for it once
    with pytest.raises(CifarJaxError, match="is not an image of a format"):
        read_image(io.BytesIO(encoded("EPS")), "drawing", (8, 8, 3))
    assert not (tmp_path / "was_run").exists()


def test_endings_are_of_formats_that_can_be_read() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= image_suffixes()
    assert not {".pdf", ".txt", ".eps", ".ps"} & image_suffixes()
