"""Files that are odd, damaged or malicious: TensorFlow and Pillow say the same, and cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GREY, RGB, write_images
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from cifar_jax.checkpoints.workdir import saved_steps
from cifar_jax.config import TrainConfig
from cifar_jax.data import images, input_pipeline
from cifar_jax.data.dataset import ImageFiles, ImageShape, Split
from cifar_jax.data.images import probe_shape, read_image
from cifar_jax.data.listing import list_images
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.evaluate import EvaluateOptions, evaluate
from cifar_jax.steps import host_input
from cifar_jax.train import train_and_evaluate

THREE_GREY = np.dstack([GREY] * 3)
ALPHA = GREY[:, ::-1]
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}


def encode(pixels: NDArray[Any] | Image.Image, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(*sizes: tuple[int, int], pixels: bytes, bits: int = 8, exif: bytes = b"") -> bytes:
    """An RGB PNG with a header for each (width, height), whose compressed pixels are ``pixels``."""
    before = [(b"IHDR", struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0)) for size in sizes]
    before += [(b"eXIf", exif)] if exif else []
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in (*before, (b"IDAT", pixels), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + bytes(4)
    return bytes(with_right_checksums(bytearray(content)))


def with_right_checksums(content: bytearray) -> bytearray:
    """``content`` itself, a PNG, up to where it is damaged."""
    at = 8
    while content.startswith(b"\x89PNG") and at + 12 <= len(content):
        end = at + 8 + struct.unpack_from(">I", content, at)[0]
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return content


def by_both(
    path: Path | bytes, shape: ImageShape = (24, 20, 3), *, to_grey: bool = False
) -> list[Any]:
    """What Pillow and TensorFlow make of a data set's file: its pixels, or the error."""
    paths = np.array([os.fsencode(path)])
    split = Split(ImageFiles(paths, shape, resize=False, to_grey=to_grey), np.zeros(1, np.int32))
    found: list[Any] = []
    for decode in (images.decode, input_pipeline.decode):
        try:
            found.append(decode(split).pixels[0])
        except CifarJaxError as error:
            found.append(str(error) if error.exit_code == ExitCode.DATA else error)
    return found


# ------------------------------------------------------------------------------ odd, but no fault


def without_adobe(jpeg: bytes) -> bytes:
    """A CMYK JPEG without the marker that says that its inks are inverted."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + struct.unpack_from(">H", jpeg, start + 2)[0] :]


CMYK_IMAGE = Image.fromarray(np.dstack([RGB, ALPHA]), "CMYK")
TURNED_CMYK = CMYK_IMAGE.transpose(Image.Transpose.ROTATE_90)
CMYK = encode(CMYK_IMAGE, "JPEG")
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6  # the camera was held upright: turn by 90 degrees
EXIF_AS_TEXT, XMP = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
EXIF_AS_TEXT.add_text("Raw profile type exif", f"\nexif\n\n{TURNED.tobytes().hex()}\n")
XMP.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
JPEG = encode(RGB, "JPEG")
SIXTEEN_BITS = (RGB.astype(np.uint16) * 256 + 255).astype(">u2")
ODD: dict[str, tuple[bytes, NDArray[Any] | None]] = {  # a JPEG's pixels are what both say
    "cmyk.jpg": (CMYK, None),
    "an-escaped-byte-before-a-marker.jpg": (JPEG[:2] + b"\xff\0" + JPEG[2:], None),
    "cmyk-not-adobes.jpg": (without_adobe(CMYK), None),
    "grey.jpg": (encode(GREY, "JPEG"), None),
    "progressive.jpg": (encode(RGB, "JPEG", progressive=True), None),
    "sixteen-bits.png": (
        png_of(
            (20, 24),
            bits=16,
            pixels=zlib.compress(b"".join(b"\0" + row.tobytes() for row in SIXTEEN_BITS)),
        ),
        RGB,
    ),
    "sixteen-bits-grey.png": (encode(GREY.astype(np.uint16) * 256 + 255, "PNG"), THREE_GREY),
    "grey.png": (encode(GREY, "PNG"), THREE_GREY),
    "grey-alpha.png": (encode(np.dstack([GREY, ALPHA]), "PNG"), THREE_GREY),
    "palette.png": (encode(Image.fromarray(RGB).quantize(16), "PNG", transparency=3), None),
    "one-bit.png": (encode(GREY > 128, "PNG"), (THREE_GREY > 128) * np.uint8(255)),
    "alpha.png": (encode(np.dstack([RGB, ALPHA]), "PNG"), RGB),
    "a-transparent-colour.png": (encode(RGB, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
    "animated.png": (encode(RGB, "PNG", **FRAMES), RGB),
    "turned.jpg": (encode(np.rot90(RGB), "JPEG", exif=TURNED), None),
    "turned.png": (encode(np.rot90(RGB), "PNG", exif=TURNED), RGB),
    "turned-by-a-text.png": (encode(np.rot90(RGB), "PNG", pnginfo=EXIF_AS_TEXT), RGB),
    "turned-by-xmp.png": (encode(np.rot90(RGB), "PNG", pnginfo=XMP), RGB),
    "turned-grey.png": (encode(np.rot90(GREY), "PNG", exif=TURNED), THREE_GREY),
    "turned-cmyk.jpg": (encode(TURNED_CMYK, "JPEG", exif=TURNED), None),
    "jpeg-in-truth.png": (encode(RGB, "JPEG"), None),
    "png-in-truth.jpg": (encode(RGB, "PNG"), RGB),
}


@pytest.mark.fault("C3", "C4", "C5", "C6", "C7", "C10")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_has_one_meaning(name: str, channels: int, tmp_path: Path) -> None:
    """Both decoders and ``read_image`` give the same pixels: no alpha, the upper 8 of 16 bits."""
    content, expected = ODD[name]
    path = tmp_path / name
    path.write_bytes(content)
    ours, theirs = by_both(path, (24, 20, channels), to_grey=True)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, read_image(path, name, (24, 20, channels)))
    assert ours.std() > 10
    if channels == 3 and expected is not None:
        np.testing.assert_array_equal(ours, expected)
    if channels == 1:
        in_colour = Image.fromarray(by_both(path)[0])
        np.testing.assert_array_equal(ours[..., 0], in_colour.convert("L"))


@pytest.mark.fault("C3")
def test_a_tall_cmyk_image_is_converted_to_its_end(tmp_path: Path) -> None:
    tall = Image.fromarray(np.concatenate([np.asarray(CMYK_IMAGE)] * 6), "CMYK")
    (tmp_path / "tall.jpg").write_bytes(encode(tall, "JPEG"))
    ours, theirs = by_both(tmp_path / "tall.jpg", (144, 20, 3))
    np.testing.assert_array_equal(ours, theirs)
    assert ours[-24:].std() > 10


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]


@pytest.mark.fault("C5")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0", b"Exif\0\0nonsense of a kind"])
def test_damaged_exif_is_no_damage(exif: bytes, tmp_path: Path) -> None:
    """Also where Pillow would look up the resolution in it."""
    path = tmp_path / "a.jpg"
    for jpeg in (JPEG, encode(RGB, "JPEG", dpi=(72, 72))):
        path.write_bytes(with_exif(jpeg, exif))
        ours, theirs = by_both(path)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, read_image(path, "a", (24, 20, 3)))
        assert ours.std() > 10


@pytest.mark.fault("C5")
def test_a_data_set_is_grey_if_all_its_images_are(tmp_path: Path) -> None:
    def channels_of(*names: str) -> int:
        for name in names:
            (tmp_path / name).write_bytes(ODD[name][0])
        return probe_shape(np.array([os.fsencode(tmp_path / name) for name in names]), None)[2]

    assert channels_of("grey.jpg", "grey.png", "grey-alpha.png", "one-bit.png") == 1
    assert channels_of("grey.jpg", "palette.png") == 3
    assert channels_of("cmyk.jpg") == channels_of("alpha.png") == 3
    assert channels_of("turned-grey.png") == 1


@pytest.mark.fault("C16")
def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    """Both decoders read it; in an error it stays one printable line."""
    names = {
        b"-rf.png": "-rf.png",
        b"a b.png": "a b.png",
        b"a\nb.png": r"a\nb.png",
        b"\x1b[2J.png": r"\x1b[2J.png",
        "Käse.png".encode(): "Käse.png",
        b"\xff\xfe.png": r"\udcff\udcfe.png",
        b"x" * 251 + b".png": "x.png",
    }
    for name, shown in names.items():
        path = bytes(tmp_path) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(encode(RGB, "PNG"))
        for pixels in by_both(path):
            np.testing.assert_array_equal(pixels, RGB)
        Path(os.fsdecode(path)).write_bytes(b"no image")
        ours, theirs = by_both(path)
        assert ours == theirs
        assert f"{shown} is not a JPEG or PNG" in ours
        assert ours.isprintable()


@pytest.mark.fault("C16")
def test_a_run_on_a_folder_of_any_name_comes_to_its_end(tmp_path: Path) -> None:
    """Its name and those of its files are in titles of pictures, and in JSON."""
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    write_images(folder, {"ant": 12, "bee": 12})
    for file in list(folder.rglob("*.png")):
        file.rename(Path(os.fsdecode(bytes(file)[:-4] + b"\xff.png")))
    config = TrainConfig(data=str(folder), input="device", model="linear", epochs=1, batch_size=4)
    config = dataclasses.replace(config, learning_rate=1e-9)  # so that there are mistakes
    report = train_and_evaluate(config, tmp_path / "run")
    assert report["data"]["name"] == r"caf\udce9"
    found = evaluate(EvaluateOptions(str(tmp_path / "run"), split="train"))
    written = json.loads((tmp_path / "run" / "evaluation-train.json").read_text())
    assert written["n"] == found["n"] > 0
    assert found["mistakes"]
    for mistake in found["mistakes"]:
        assert mistake["file"].endswith(r"\udcff.png")
        mistake["file"].encode()


# ------------------------------------------------------------------------------------------ faults


def sized(height: int, width: int, progressive: bool = False) -> bytes:
    """A JPEG of some hundred bytes that claims so many pixels."""
    jpeg = bytearray(encode(RGB, "JPEG", progressive=progressive))
    start = jpeg.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(jpeg)


def black(width: int, height: int) -> bytes:
    """Compressed pixels of a PNG, made without having them all."""
    compressor = zlib.compressobj(1)
    row = bytes(1 + 3 * width)
    return b"".join([compressor.compress(row) for _ in range(height)]) + compressor.flush()


TOO_LARGE = "has 60000x60000 pixels, more than 64,000,000"
BOMBS = {
    "bomb.png": (png_of((60_000, 60_000), pixels=zlib.compress(b"\0")), TOO_LARGE),
    "bomb.jpg": (sized(60_000, 60_000), TOO_LARGE),
    "progressive-bomb.jpg": (sized(60_000, 60_000, progressive=True), TOO_LARGE),
    "two-headers.png": (
        png_of((20, 24), (7000, 7000), pixels=black(7000, 7000)),
        "is damaged: its pixels cannot be decoded",
    ),
}
PNG = encode(RGB, "PNG")
AT_PIXELS, AT_TABLE = PNG.index(b"IDAT") + 20, JPEG.index(b"\xff\xc4") + 5
DAMAGED_PNG = PNG[:AT_PIXELS] + bytes(9) + PNG[AT_PIXELS + 9 :]
DAMAGED_JPEG = JPEG[:AT_TABLE] + b"\xff" * 9 + JPEG[AT_TABLE + 9 :]
NO_KIND = "is not a JPEG or PNG. Fix: put the right file there, or delete it; cifar_jax.check_data "
BAD = {
    "half.png": (PNG[: len(PNG) // 2], "is cut short"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "is cut short"),
    "header.jpg": (JPEG[:30], "is cut short"),
    "ten-bytes-less.png": (PNG[:-10], "is cut short"),
    "ten-bytes-less.jpg": (JPEG[:-10], "is cut short"),
    "damaged.png": (DAMAGED_PNG, "is damaged: the checksum of its b'IDAT' is wrong"),
    "damaged-deeper.png": (
        bytes(with_right_checksums(bytearray(DAMAGED_PNG))),
        "is damaged: its pixels cannot be decoded",
    ),
    "damaged.jpg": (DAMAGED_JPEG, "is damaged: its pixels cannot be decoded"),
    "empty.png": (b"", "is empty"),
    "without-rows.jpg": (sized(0, 20), "has 0x20 pixels"),
    "text.png": (b"no image at all", NO_KIND),
    "program.png": (b"MZ\x90\0\3" + bytes(200), NO_KIND),
    "animation.png": (encode(RGB, "GIF", **FRAMES), NO_KIND),
    "animation.jpg": (encode(RGB, "WEBP", **FRAMES), NO_KIND),
    "bitmap.png": (encode(RGB, "BMP"), NO_KIND),
    "wide.png": (
        encode(np.zeros((48, 64, 3), np.uint8), "PNG"),
        "is 48x64, the first is 24x20. Fix: give --image-size 24 to resize",
    ),
    "turned-by-a-second-header.png": (
        png_of((20, 24), (24, 20), pixels=black(24, 20)),
        "is damaged: its pixels cannot be decoded",
    ),
    "turned-by-a-second-header-and-back-by-exif.png": (
        png_of((20, 24), (24, 20), pixels=black(24, 20), exif=TURNED.tobytes()[6:]),
        "is damaged: its pixels cannot be decoded",
    ),
    **BOMBS,
}


@pytest.mark.fault("C1", "C2", "C7", "C8", "C9", "C10")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_the_same_error_by_both_decoders(name: str, tmp_path: Path) -> None:
    content, what = BAD[name]
    (tmp_path / name).write_bytes(content)
    ours, theirs = by_both(tmp_path / name)
    assert ours == theirs
    assert f"the image {tmp_path / name} {what}" in ours
    assert ". Fix: " in ours


def test_a_file_of_any_size_is_read_to_its_end_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    (tmp_path / "noise.png").write_bytes(encode(noise, "PNG"))
    for pixels in by_both(tmp_path / "noise.png", (250, 250, 3)):
        np.testing.assert_array_equal(pixels, noise)
    monkeypatch.setattr(images, "MAX_BYTES", 100_000)
    for error in by_both(tmp_path / "noise.png", (250, 250, 3)):
        assert "noise.png has more than 0 MB" in error


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """As a user who is not root, to whom all is permitted; yields a folder that is theirs."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


@pytest.mark.fault("C18")
def test_what_may_not_be_read_is_named_with_the_reason() -> None:
    with unprivileged() as folder:
        for name in ("bird", "cat"):
            (folder / name).mkdir()
            (folder / name / "1.png").write_bytes(PNG)
        (folder / "bird" / "1.png").chmod(0)
        for error in by_both(folder / "bird" / "1.png"):
            assert "bird/1.png cannot be read: Permission denied. Fix: " in error
        (folder / "cat").chmod(0)
        with pytest.raises(CifarJaxError, match=r"cannot read .*/cat: Permission denied") as caught:
            list_images(folder, folder / "listings")
        assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.fault("C18", "C19")
def test_what_is_no_file_any_more_is_not_waited_for(tmp_path: Path) -> None:
    pipe, done = tmp_path / "pipe.png", threading.Event()
    os.mkfifo(pipe)
    (tmp_path / "folder.png").mkdir()

    def release() -> None:  # so that this test fails, and does not hang either
        while not done.wait(20):
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    threading.Thread(target=release, daemon=True).start()
    started = time.perf_counter()
    for name, what in (
        ("pipe.png", "is empty"),
        ("folder.png", "cannot be read: Is a directory"),
        ("gone.png", "is not there any more. Fix: put it back"),
    ):
        for error in by_both(tmp_path / name):
            assert f"{name} {what}" in error
    done.set()
    assert time.perf_counter() - started < 20


@pytest.mark.fault("C19")
def test_a_run_whose_files_go_away_can_be_resumed(image_folder: Path, tmp_path: Path) -> None:
    """It ends with the file's name, and goes on from its checkpoint when the file is back."""
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    config = TrainConfig(data=str(data), model="linear", batch_size=16, epochs=4, cache_mb=0)
    expected = train_and_evaluate(config, tmp_path / "undisturbed")

    def move_away_at_step_six(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for step, batch in enumerate(input_pipeline.train_batches(*args, **kwargs)):
            if step == 6:  # of five an epoch
                (data / "train" / "cat").rename(tmp_path / "cat")
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_input, "train_batches", move_away_at_step_six)
        with pytest.raises(
            CifarJaxError, match=r"train/cat/.*.png is not there any more"
        ) as caught:
            train_and_evaluate(config, tmp_path / "run")
    assert caught.value.exit_code == ExitCode.DATA
    assert 5 <= saved_steps(tmp_path / "run" / "checkpoints")[-1] < 20
    (tmp_path / "cat").rename(data / "train" / "cat")
    resumed = train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path / "run")
    assert resumed["params_sha256"] == expected["params_sha256"]


@pytest.mark.fault("C1")
def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    """Though TensorFlow logs each error, and JAX has set how much is logged."""
    for path in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(PNG)
    (tmp_path / "dog" / "2.png").write_bytes(BAD["damaged-deeper.png"][0])
    command = [sys.executable, "-m", "cifar_jax.train", "--data", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == ExitCode.DATA
    assert ended.stderr.startswith(f"cifar_jax: error: the image {tmp_path}/dog/2.png is damaged")
    assert ended.stderr.count("\n") == 1, ended.stderr


# ---------------------------------------------------------------------------------------- mutants


def seeds() -> list[bytes]:
    """JPEGs and PNGs of several modes, all of the same size."""
    kinds = [content for name, (content, _) in ODD.items() if "not-adobes" not in name]
    return [*kinds, JPEG, PNG, encode(RGB, "JPEG", restart_marker_blocks=1, subsampling=0)]


def mutant(number: int) -> bytes:
    """A seed with one or two things done to it."""
    rng = np.random.default_rng(number)
    content = bytearray(SEEDS[rng.integers(len(SEEDS))])
    for _ in range(rng.integers(1, 3)):
        start, stop = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        piece = content[start : start + (stop - start) // 8]
        kind = rng.integers(10)
        if kind < 4:
            for at in rng.integers(0, len(content), rng.integers(1, 9)):
                content[at] ^= 1 << rng.integers(8)
        elif kind == 4:  # near the start, where it tells the kind and size of the image
            content[rng.integers(0, min(200, len(content)))] = rng.choice(
                [0, 1, 4, 127, 255, rng.integers(256)]
            )
        elif kind == 5:
            del content[(start + stop) // 2 :]
        elif kind == 6:
            del content[start : start + len(piece)]
        elif kind == 7:
            content[start:start] = piece
        elif kind == 8:
            content[start:stop] = SEEDS[rng.integers(len(SEEDS))][start:stop]
        elif (at := max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))) > 0:
            content[at + 5 : at + 9] = rng.bytes(4)  # its size
        else:
            content[16:24] = struct.pack(">II", *rng.choice([0, 20, 24, 4000, 2**31 - 1], 2))
    if rng.random() < 0.8:  # what is first looked for is there: on to the decoders
        content = with_right_checksums(content) + b"\xff\xd9"
    return bytes(content)


def outcome(decode: Callable[[], NDArray[np.uint8]], shape: ImageShape) -> NDArray[np.uint8] | str:
    """The pixels, or the text of the one kind of error that may come."""
    started = time.perf_counter()
    found: NDArray[np.uint8] | str
    try:
        found = decode()
        assert (found.shape, found.dtype) == (shape, np.uint8)
    except CifarJaxError as error:
        if error.exit_code != ExitCode.DATA:
            raise
        found = str(error)
        assert found.isprintable(), found
    assert time.perf_counter() - started < 5
    return found


def decode_mutants(count: int) -> dict[str, Any]:
    """What becomes of ``count`` mutants, and how much memory they and the bombs take."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "mutant.png"
    files = ImageFiles(np.array([os.fsencode(path)]), (24, 20, 3), resize=False)
    split = Split(files, np.zeros(1, np.int32))

    def by_tensorflow() -> NDArray[np.uint8]:  # as in its pipeline, which takes long to build
        content = images.read_checked(files, files.paths[0])
        try:
            return input_pipeline._decode(content, 3).numpy()
        except input_pipeline.tf.errors.OpError:
            raise images.undecodable(files.paths[0]) from None

    def peak_mb() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    kinds: Counter[str] = Counter()
    path.write_bytes(PNG)
    for pixels in by_both(path):
        np.testing.assert_array_equal(pixels, RGB)
    start = peak_mb()
    for content, what in BOMBS.values():
        path.write_bytes(content)
        assert all(what in found for found in by_both(path))
    bombs_mb = peak_mb() - start
    for number in range(count):
        path.write_bytes(mutant(number))
        try:
            ours = outcome(lambda: images.decode(split).pixels[0], (24, 20, 3))
            theirs = outcome(by_tensorflow, (24, 20, 3))
            outcome(lambda: read_image(path, "mutant", (8, 8, 3)), (8, 8, 3))
        except BaseException as error:
            raise AssertionError(f"mutant({number})") from error
        if isinstance(ours, str) or isinstance(theirs, str):
            agree = isinstance(ours, str) and isinstance(theirs, str) and ours == theirs
            kinds["the same error" if agree else f"one alone: {number}"] += 1
            kinds["of decoders"] += agree and "cannot be decoded" in str(ours)
        else:
            same = np.array_equal(ours, theirs)
            kinds["the same pixels" if same else f"other pixels: {number}"] += 1
    shutil.rmtree(folder)
    return {"bombs_mb": bombs_mb, "peak_mb": peak_mb() - start, "kinds": dict(kinds)}


SEEDS = seeds()


@pytest.mark.fault("C1", "C8")
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_mutants_are_images_or_clean_errors(count: int) -> None:
    """In a process of its own, whose memory is measured."""
    found = subprocess.run(
        [sys.executable, __file__, str(count)], capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["bombs_mb"] < 20, report
    assert report["peak_mb"] < 500, report
    kinds = report["kinds"]
    assert kinds["the same error"] > count / 2
    assert kinds["of decoders"] > count / 8
    assert kinds["the same pixels"] > count / 20
    # Pillow minds what is wrong with an animation, libpng with a palette; of a progressive JPEG
    # without its last scans Pillow smooths the blocks. One in two hundred is such a case.
    assert sum(kind[:5] in ("one a", "other") for kind in kinds) <= count / 200, report


if __name__ == "__main__":
    print(json.dumps(decode_mutants(int(sys.argv[1]))))
