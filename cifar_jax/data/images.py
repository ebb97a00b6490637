"""Image files of any kind, decoded to the pixels that training would see. Pillow only.

JPEGs decode to the same pixels as in training. Like the decoder of training, this one drops
transparency and keeps the upper 8 of 16 bits. EXIF rotation, which that decoder ignores, is applied
before either decodes.

The files of a data set are JPEG or PNG. All of them are read by :func:`read_checked`, which checks
their bytes before any decoder sees them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cifar_jax.config import FitName
from cifar_jax.data.dataset import ImageFiles, ImageShape, Split
from cifar_jax.errors import CifarJaxError, DataError, first_line, shown

# 64 megapixels take 200 MB decoded; a file of a few kilobytes can claim thousands of them.
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20

_POSTSCRIPT = "EPS"  # a program: Pillow would have Ghostscript run it, for as long as it takes

# Pillow warns of odd metadata; what matters raises. Set once for the process: many threads read
# images, and ``warnings.catch_warnings`` is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def read_image(
    file: Path | BinaryIO, name: str, image_shape: ImageShape, *, fit: FitName = "stretch"
) -> NDArray[np.uint8]:
    """The image in ``file``, a path or an open file, as uint8 ``[H, W, C]``.

    Rotated as its EXIF orientation says; of an animation, the first frame.

    Args:
        name: the image's name in errors.
        image_shape: ``(H, W, C)`` to resize to, bilinear with antialiasing as in training.
        fit: ``stretch`` changes the proportions to fit; ``crop`` cuts out the middle.

    Raises:
        DataError: the file cannot be read, is not an image, is damaged, or is too large.
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
    if content.startswith((_PNG, _JPEG)):  # as in training: Pillow ignores a wrong checksum
        try:
            _header(content)
        except ValueError as error:
            raise _refused(name, str(error)) from error
    try:
        image = Image.open(io.BytesIO(content))
        if image.format == _POSTSCRIPT:
            raise UnidentifiedImageError
        if image.height * image.width > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.height}x{image.width}")
        return _resized(_upright(image, image_shape[2]), image_shape, fit)
    except UnidentifiedImageError as error:
        raise _refused(name, "is not an image of a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise _refused(name, f"has more than {MAX_PIXELS:,} pixels: {error}") from error
    except Exception as error:  # a damaged file ends in whatever its decoder runs into
        raise _refused(name, f"is damaged: {first_line(error)}") from error


def probe_shape(paths: NDArray[np.bytes_], image_size: int | None) -> ImageShape:
    """The shape of a data set's images, from a sample: greyscale only if the whole sample is.

    The size is the first image's. Unreadable images are skipped here, and reported when all are
    read.

    Raises:
        DataError: none of them can be read.
    """
    shapes: list[ImageShape] = []
    for path in paths:
        with contextlib.suppress(CifarJaxError):
            shapes.append(_read(path)[1])
            if shapes[-1][2] > 1:
                break
    shapes = shapes or [_read(paths[0])[1]]
    height, width = (image_size, image_size) if image_size is not None else shapes[0][:2]
    return height, width, max(channels for _, _, channels in shapes)


def decode(split: Split) -> Split:
    """The same split with every file decoded into memory, without resizing.

    Raises:
        DataError: names the first file that cannot be decoded or has another size.
    """
    files = split.images
    assert isinstance(files, ImageFiles)
    pixels = np.empty((len(files), *files.shape), np.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(functools.partial(decode_file, files), files.paths)
        for i, image in enumerate(
            tqdm(decoded, "decoding", len(files), unit="images", disable=None)
        ):
            pixels[i] = image
    return Split(pixels, split.labels)


def decode_file(files: ImageFiles, path: bytes) -> NDArray[np.uint8]:
    """The pixels of one of ``files``, uint8 ``[H, W, C]``, not resized.

    Raises:
        DataError: the file is not such an image.
    """
    return _decoded(path, read_checked(files, path), files.shape[2])


def read_checked(files: ImageFiles, path: bytes) -> bytes:
    """The content of one of ``files``: a complete JPEG or PNG of the right size.

    With ``files.to_grey``, a colour image is returned as a greyscale copy, since decoders convert
    to grey differently.

    Raises:
        DataError: the file is not such an image.
    """
    content, shape = _read(path)
    if shape == files.shape:  # as nearly all are
        return content
    (height, width, channels), (h, w, wanted_channels) = shape, files.shape
    if (height, width) != (h, w) and not files.resize:
        raise unusable(
            path,
            f"is {height}x{width}, the first is {h}x{w}",
            fix=f"give --image-size {h} to resize all images to {h}x{h}",
        )
    if channels > wanted_channels:
        if not files.to_grey:
            raise unusable(
                path,
                "is in colour, but the images that were sampled first are greyscale",
                fix="make it greyscale, or some of the others colour",
            )
        return png(_decoded(path, content, wanted_channels))
    return content


def _decoded(path: bytes, content: bytes, channels: int) -> NDArray[np.uint8]:
    height, width, _ = _header(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        if image.size == (width, height):  # otherwise there is a second header
            return np.asarray(_eight_bits(image, channels)).reshape(height, width, channels)
    except Exception as error:  # a damaged file ends in whatever its decoder runs into
        raise undecodable(path) from error
    raise undecodable(path)


def undecodable(path: bytes) -> CifarJaxError:
    """The error for a file that :func:`read_checked` accepts and the decoder does not."""
    return unusable(path, "is damaged: its pixels cannot be decoded")


def unusable(path: bytes, what: str, fix: str | None = None) -> CifarJaxError:
    return DataError(
        f"the image {shown(path)} {what}",
        fix=fix or "put the right file there, or delete it; cifar_jax.check_data names all of them",
    )


def _read(path: bytes) -> tuple[bytes, ImageShape]:
    try:
        # Without O_NONBLOCK, opening a pipe that has replaced the file would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            content = os.read(descriptor, _FIRST_READ)
            if len(content) == _FIRST_READ:
                content += os.read(descriptor, min(os.fstat(descriptor).st_size, MAX_BYTES))
                if len(content) > MAX_BYTES:
                    raise ValueError(f"has more than {MAX_BYTES >> 20} MB")
        finally:
            os.close(descriptor)
        return _upright_file(path, content, _header(content))
    except FileNotFoundError as error:
        raise unusable(path, "is not there any more", fix="put it back") from error
    except OSError as error:
        raise unusable(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise unusable(path, str(error)) from error


def _upright_file(path: bytes, content: bytes, shape: ImageShape) -> tuple[bytes, ImageShape]:
    """The image and its shape; converted to an upright PNG if its EXIF asks for a rotation."""
    if not any(mark in content for mark in _MAY_BE_TURNED):
        return content, shape
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        # If the size differs there is a second header, which the decoder will run into.
        if _turn(image) is None or image.size != (shape[1], shape[0]):
            return content, shape
        pixels = np.asarray(_upright(image, shape[2]))
    except Exception as error:  # a damaged file ends in whatever its decoder runs into
        raise undecodable(path) from error
    height, width = pixels.shape[:2]
    return png(pixels, compress_level=0), (height, width, shape[2])


# Pillow finds an orientation in EXIF, also within PNG text chunks, and in XMP.
_MAY_BE_TURNED = (b"Exif", b"eXIf", b"exif", b":Orientation")
_FIRST_READ = 64 * 2**10  # bytes; most files are smaller, and are read in one call
_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
_JPEG_MARKER = re.compile(rb"\xff([^\xff])")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _header(content: bytes) -> ImageShape:
    """The shape that a JPEG or PNG claims; 1 channel if it is greyscale, otherwise 3.

    A file of a few bytes can claim gigabytes, so this comes before any decoder. Decoders also
    differ in whether they accept a truncated file or a wrong checksum: here both are errors.

    Raises:
        ValueError: what is wrong with the file.
    """
    try:
        if content.startswith(_JPEG):
            shape = _jpeg_header(content)
        elif content.startswith(_PNG):
            shape = _png_header(content)
        else:
            raise ValueError("is not a JPEG or PNG" if content else "is empty")
    except (IndexError, struct.error) as error:
        raise ValueError("is cut short") from error
    height, width, _ = shape
    if not height * width:
        raise ValueError(f"has {height}x{width} pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"has {height}x{width} pixels, more than {MAX_PIXELS:,}")
    return shape


def _jpeg_header(content: bytes) -> ImageShape:
    at = len(_JPEG)
    while True:
        found = _JPEG_MARKER.search(content, at)  # the next one, as libjpeg does
        if found is None:
            raise IndexError
        marker, at = found[1][0], found.end()
        if marker in _JPEG_FRAMES:
            height, width, channels = struct.unpack_from(">HHB", content, at + 3)
            if content.rfind(_JPEG_END, at) < 0:
                raise ValueError("is cut short")
            return height, width, 1 if channels == 1 else 3
        if marker:
            (length,) = struct.unpack_from(">H", content, at)
            at += length or 2


def _png_header(content: bytes) -> ImageShape:
    at = len(_PNG)
    width, height, _, colour = struct.unpack_from(">IIBB", content, at + 8)
    while True:
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        (checksum,) = struct.unpack_from(">I", content, end)
        if zlib.crc32(content[at + 4 : end]) != checksum:
            raise ValueError(f"is damaged: the checksum of its {name!r} is wrong")
        if name == b"IEND":
            return height, width, 1 if colour in (0, 4) else 3
        at = end + 4


def image_suffixes() -> frozenset[str]:
    """The file endings of all formats that can be read: ``.jpg`` and so on."""
    formats = Image.registered_extensions().items()  # which fills Image.OPEN
    return frozenset(s for s, f in formats if f in Image.OPEN and f != _POSTSCRIPT)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The rotation that EXIF asks for, or None; damaged EXIF is ignored."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow's parsers run into
        return None


def _upright(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit greyscale or RGB, rotated as EXIF says."""
    image.load()  # this rotates a TIFF, and removes its orientation
    turn = _turn(image)
    image = _eight_bits(image, channels)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit greyscale or RGB."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow stores in 16 or 32
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if values.max() <= 1 else 1
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    elif image.mode == "CMYK":
        image = _cmyk_to_rgb(image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Convert as TensorFlow does: Pillow rounds differently."""
    # Pillow inverts every CMYK JPEG, as those of Adobe require; others are then inverted already.
    is_light = image.format == "JPEG" and "adobe" not in image.info
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, 64):  # in pieces: 16-bit copies take much memory
        piece = image.crop((0, top, image.width, min(top + 64, image.height)))
        light = np.asarray(piece, np.uint16) if is_light else 255 - np.asarray(piece, np.uint16)
        pixels = light[..., :3] * light[..., 3:] // 255
        rgb.paste(Image.fromarray(pixels.astype(np.uint8)), (0, top))
    return rgb


def _resized(image: Image.Image, image_shape: ImageShape, fit: FitName) -> NDArray[np.uint8]:
    height, width, channels = image_shape
    if image.size != (width, height):
        if fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def png(pixels: NDArray[np.uint8], *, compress_level: int = 6) -> bytes:
    """The PNG file of an image ``[H, W]`` or ``[H, W, C]``."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    image.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """:func:`png` as a ``data:`` URI, for self-contained pages."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _refused(name: str, what: str, fix: str = "give a JPEG, PNG or other image") -> CifarJaxError:
    return DataError(shown(f"{name} {what}"), fix=fix)
