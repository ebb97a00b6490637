"""Image files of any kind, as the pixels that a network was trained on. Pillow only.

A JPEG gives the very pixels that training's decoder gives; what else that decoder does is done
here too: transparency is dropped, and of 16 bits the upper 8 are kept.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cifar_jax.config import FitName
from cifar_jax.dataset import ImageFiles, ImageShape, Split
from cifar_jax.errors import CifarJaxError, ExitCode

# 64 megapixels take 200 MB decoded; a file of a few kilobytes can claim thousands of them.
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20


def read_image(
    file: Path | BinaryIO, name: str, image_shape: ImageShape, *, fit: FitName = "stretch"
) -> NDArray[np.uint8]:
    """The image in ``file``, a path or an open file, as uint8 ``[H, W, C]``.

    Turned as its EXIF orientation says; of an animation the first frame.

    Args:
        name: what to call it in errors.
        image_shape: ``(H, W, C)`` to resize to, bilinear with antialiasing as in training.
        fit: ``stretch`` changes the proportions to fit; ``crop`` cuts the middle out.

    Raises:
        CifarJaxError: data; it cannot be read, is no image, is damaged, or is too large.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
            content = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise _refused(name, f"cannot be read: {reason}", "check the path") from error
    if not content:
        raise _refused(name, "is empty")
    if len(content) > MAX_BYTES:
        raise _refused(name, f"has more than {MAX_BYTES >> 20} MB", "make it smaller")
    try:
        with warnings.catch_warnings(action="ignore"):  # on metadata; what matters raises
            image: Image.Image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise _refused(
                    name,
                    f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}",
                    "make it smaller",
                )
            image = ImageOps.exif_transpose(image)
            return _resized(_eight_bits(image, image_shape[2]), image_shape, fit)
    except UnidentifiedImageError as error:
        raise _refused(name, "is no image of a format that Pillow reads") from error
    except CifarJaxError:
        raise
    except Exception as error:  # a damaged file ends in whatever its decoder runs into
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _refused(name, f"is damaged: {reason}") from error


def probe_shape(paths: NDArray[np.bytes_], image_size: int | None) -> ImageShape:
    """The shape of a data set's images, from a few of them: greyscale only if all of these are.

    Raises:
        CifarJaxError: data; names a file that is no image.
    """
    grey, first = True, (0, 0)
    for path in map(os.fsdecode, paths):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                grey = grey and len(image.getbands()) == 1 and image.mode != "P"
                first = first if any(first) else (image.height, image.width)
        except OSError as error:
            raise unusable(path) from error
    height, width = (image_size, image_size) if image_size is not None else first
    return height, width, 1 if grey else 3


def decode(split: Split) -> Split:
    """The same split with every file decoded into memory, none of them resized.

    Raises:
        CifarJaxError: data; names the first file that cannot be decoded or has another size.
    """
    files = split.images
    assert isinstance(files, ImageFiles)
    paths = [os.fsdecode(path) for path in files.paths]

    def read(path: str) -> NDArray[np.uint8]:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                pixels = np.asarray(_eight_bits(image, files.shape[2]))
        except OSError as error:
            raise unusable(path) from error
        if pixels.shape[:2] != files.shape[:2]:
            raise other_size(path, pixels.shape, files.shape)
        return pixels.reshape(files.shape)

    pixels = np.empty((len(files), *files.shape), np.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(read, paths)
        for i, image in enumerate(
            tqdm(decoded, "decoding", len(paths), unit="images", disable=None)
        ):
            pixels[i] = image
    return Split(pixels, split.labels)


def other_size(path: str, shape: tuple[int, ...], first: ImageShape) -> CifarJaxError:
    (height, width), (h, w) = shape[:2], first[:2]
    return CifarJaxError(
        ExitCode.DATA,
        f"the image {path} is {height}x{width}, the first is {h}x{w}",
        fix=f"give --image-size {h} to resize all images to {h}x{h}",
    )


def unusable(path: str) -> CifarJaxError:
    """What is the matter with a file of a data set that does not decode."""
    file = Path(path)
    if not file.is_file():
        what, fix = "is not there any more", "put it back"
    elif file.stat().st_size == 0:
        what, fix = "is empty", "put the right file there, or delete it"
    else:
        what, fix = "is damaged or no JPEG or PNG", "put the right file there, or delete it"
    return CifarJaxError(ExitCode.DATA, f"the image {path} {what}", fix=fix)


def image_suffixes() -> frozenset[str]:
    """The endings of the formats that can be read, ``.jpg`` and so on."""
    return frozenset(s for s, f in Image.registered_extensions().items() if f in Image.OPEN)


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Greyscale or RGB of 8 bits."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow keeps in 16 or in 32
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if values.max() <= 1 else 1
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _resized(image: Image.Image, image_shape: ImageShape, fit: FitName) -> NDArray[np.uint8]:
    height, width, channels = image_shape
    if image.size != (width, height):
        if fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG file of an image ``[H, W]`` or ``[H, W, C]``."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "PNG")
    return file.getvalue()


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """:func:`png` as a ``data:`` address, for pages that hold all they show."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _refused(name: str, what: str, fix: str = "give a JPEG, PNG or other image") -> CifarJaxError:
    return CifarJaxError(ExitCode.DATA, f"{name} {what}", fix=fix)
