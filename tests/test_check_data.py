"""``cifar_jax.check_data`` names every bad file, and images that are there twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_jax.check_data import main
from cifar_jax.errors import CifarJaxError, ExitCode


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "data"))


def test_good_data_are_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train" / "cat" / "notes.txt").touch()
    n_open = len(os.listdir("/dev/fd"))
    main([str(data)])
    assert len(os.listdir("/dev/fd")) == n_open, "each file is closed again"
    assert capsys.readouterr().out.splitlines() == [
        f"{data}: ignored 1 file(s) that are not JPEG or PNG: 1 .txt",
        "class                    train       val      test",
        "bird                        27         3         7",
        "cat                         27         3         7",
        "frog                        27         3         7",
        "0 bad file(s), 0 image(s) of another size, 0 image(s) that are there twice",
    ]


@pytest.mark.fault("C22")
def test_images_that_are_there_twice_are_named(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two splits, two classes or one, also as another file; whatever the seed splits off."""
    shutil.copy(data / "train" / "cat" / "000.png", data / "train" / "cat" / "again.png")
    shutil.copy(data / "test" / "cat" / "001.png", data / "train" / "cat" / "leak\n.png")
    with Image.open(data / "test" / "frog" / "002.png") as image:
        image.save(data / "test" / "bird" / "2.png", compress_level=0)
    main([str(data)])
    *same, last = [line for line in capsys.readouterr().out.splitlines() if "image" in line]
    assert last == "0 bad file(s), 0 image(s) of another size, 3 image(s) that are there twice"
    across_splits, in_one, across_classes = sorted(
        same, key=lambda line: ("bird" in line, "again" in line)
    )
    assert f"{data}/train/cat/leak\\n.png, test {data}/test/cat/001.png" in across_splits
    assert in_one.count("train/cat/000.png") == in_one.count("train/cat/again.png") == 1
    assert across_classes == (
        f"the same image: test {data}/test/bird/2.png, test {data}/test/frog/002.png"
    )


@pytest.mark.fault("C26")
def test_a_class_without_training_images_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(30):  # one image each, and a fifth of them is held out
        folder = tmp_path / f"class{i}"
        folder.mkdir()
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / "0.png")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    held_out = [x.split()[0] for x in lines if x.startswith("class") and x.split()[1] == "0"]
    assert len(held_out) == 6
    warnings = [line for line in lines if "warning" in line]
    first = ", ".join(held_out[:5])
    assert warnings == [f"warning: no image of {first} and others to train on"]


@pytest.mark.fault("C1", "C2", "C9", "C22")
def test_every_bad_file_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(data / "train" / "cat" / "007.png")
    for name in ("train/bird/003.png", "test/frog/004.png"):
        (data / name).write_bytes((data / name).read_bytes()[:-20])
    (data / "train" / "bird" / "000.png").write_bytes(b"")  # the first of all
    with pytest.raises(CifarJaxError, match=r"3 file\(s\) of .*/data cannot be used") as caught:
        main([str(data)])
    assert caught.value.exit_code == ExitCode.DATA
    assert caught.value.fix == (
        "mend or remove the bad files named above; give --image-size 8 to resize all images to 8x8"
    )
    printed = capsys.readouterr().out
    assert printed.count("bad: ") == 3
    for line in (
        f"another size: the image {data}/train/cat/007.png is 9x9, the first is 8x8",
        f"bad: the image {data}/train/bird/000.png is empty",
        f"bad: the image {data}/train/bird/003.png is cut short",
        f"bad: the image {data}/test/frog/004.png is cut short",
        "3 bad file(s), 1 image(s) of another size, 0 image(s) that are there twice",
    ):
        assert line in printed.splitlines()
    with pytest.raises(CifarJaxError, match=r"3 file\(s\) of .*/data cannot be used\. Fix"):
        main([str(data), "--image-size", "8"])


def test_sound_images_of_other_sizes_are_not_called_bad(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, size in enumerate((9, 11)):
        Image.new("RGB", (size, size)).save(data / "train" / "cat" / f"{i:03d}.png")
    with pytest.raises(CifarJaxError, match=r"^2 image\(s\) of .* of another size") as caught:
        main([str(data)])
    assert caught.value.exit_code == ExitCode.DATA
    assert caught.value.fix == "give --image-size 8 to resize all images to 8x8"
    assert "bad: " not in capsys.readouterr().out
    main([str(data), "--image-size", "8"])


def test_it_runs_without_tensorflow(image_folder: Path) -> None:
    script = (
        "import sys; from cifar_jax.data import shapes; from cifar_jax.check_data import main;"
        "shapes.N_TRAIN = 100; main([sys.argv[1]]); main(['shapes']);"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(image_folder)]
    found = subprocess.run(command, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(b"0 bad file(s)") == 2


def test_a_size_for_images_that_are_no_files_is_refused_as_in_training() -> None:
    with pytest.raises(CifarJaxError, match="--image-size 64 with --data shapes"):
        main(["shapes", "--image-size", "64"])
