"""``cifar_jax.predict``, as a command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_jax.checkpoints import trained
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.predict import BATCH_SIZE, _describe, find_images, main, predict
from cifar_jax.scoring import inference
from cifar_jax.scoring.inference import make_logits, softmax
from cifar_jax.steps import parallel


def run(
    *arguments: str | Path, stdin: bytes = b"", python: Sequence[str] = ("-m", "cifar_jax.predict")
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *python, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120)


def test_files_folders_and_standard_input(
    trained_run: Path, image_folder: Path, tmp_path: Path
) -> None:
    """And one bad file is named, while the others go on."""
    folder, bad = image_folder / "test" / "frog", tmp_path / "bad.png"
    bad.write_text("no image")
    single = image_folder / "test" / "cat" / "000.png"
    found = run(
        "--checkpoint", trained_run, "--json", folder, bad, "-", single, stdin=single.read_bytes()
    )
    assert found.returncode == ExitCode.DATA
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    files = [*sorted(map(str, folder.iterdir())), str(bad), "-", str(single)]
    assert [line["file"] for line in lines] == files
    assert "not an image" in lines[7]["error"]
    assert "1 of 10 image(s) could not be read" in found.stderr.decode()
    assert found.stderr.decode().count("\n") == 1

    network = trained.load(trained_run)
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
    expected = softmax(make_logits(network)(pixels))
    for line, row in zip(lines, expected, strict=False):
        assert list(line["probabilities"]) == list(network.class_names)
        np.testing.assert_allclose(list(line["probabilities"].values()), row, rtol=1e-5)
        assert line["probability"] == max(line["probabilities"].values())
        assert line["probabilities"][line["class"]] == line["probability"]
    assert {**lines[8], "file": ""} == {**lines[9], "file": ""}  # from standard input, and a file


def test_predictions_are_of_float32_on_a_gpu_too(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it would round what it multiplies to TF32."""
    texts = []

    def noted(lowered: Any, platform: str) -> Any:
        texts.append(lowered.as_text())
        return parallel.compile_lowered(lowered, platform)

    monkeypatch.setattr(inference, "compile_lowered", noted)
    make_logits(trained.load(trained_run))(np.zeros((1, 8, 8, 3), np.uint8))
    (text,) = texts
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert len(products) >= 5  # three convolutions and two Dense layers
    assert all("HIGHEST" in product and "DEFAULT" not in product for product in products)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"these are float32 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"these are uint8 \[8, 8, 3\]"),
        (np.zeros((1, 9, 9, 3), np.uint8), r"these are uint8 \[1, 9, 9, 3\]"),
        (np.zeros((1, 8, 8, 3)).tolist(), r"these are float64 \[1, 8, 8, 3\]"),
        ([], r"these are float64 \[0\]"),
    ],
)
def test_images_of_another_kind_are_refused(trained_run: Path, images: Any, said: str) -> None:
    logits = make_logits(trained.load(trained_run))
    with pytest.raises(ValueError, match=rf"^images must be uint8 \[N, 8, 8, 3\], .*{said}"):
        logits(images)


def test_a_program_gets_images_where_it_can_read_them(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another address than a multiple of 64, another thread would run it.

    In batches of powers of two, so that few are compiled.
    """
    batches = []

    def noted(*arguments: Any) -> Any:
        compiled = parallel.compile_lowered(*arguments)

        def call(variables: Any, images: np.ndarray) -> Any:
            batches.append((len(images), images.ctypes.data % 64))
            return compiled(variables, images)

        return call

    monkeypatch.setattr(inference, "compile_lowered", noted)
    logits = make_logits(trained.load(trained_run))
    memory = np.random.default_rng(0).integers(0, 256, 131 * 192 + 2 * 64).astype(np.uint8)
    for offset in (16, 32, 48):
        start = -memory.ctypes.data % 64 + offset
        images = memory[start : start + 131 * 192].reshape(131, 8, 8, 3)
        together = logits(images)  # a full batch, and a padded one
        np.testing.assert_allclose(logits(images[128:]), together[128:], rtol=1e-5)
    assert batches == 3 * [(128, 0), (4, 0), (4, 0)]


def test_words_for_people_and_no_tensorflow(trained_run: Path, image_folder: Path) -> None:
    code = (
        "import sys; from cifar_jax.predict import main; main(sys.argv[1:]);"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    file = image_folder / "test" / "frog" / "000.png"
    found = run("--checkpoint", trained_run, "--top", "2", file, python=("-c", code))
    assert found.returncode == ExitCode.OK, found.stderr
    answer, time = found.stdout.decode().splitlines()
    assert answer.startswith(f"{file}: ")
    assert answer.count("%") == 2
    assert time.startswith("1 image(s), ")


@pytest.mark.parametrize("n_sound", [0, 1])
def test_only_what_was_answered_is_counted(
    trained_run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], n_sound: int
) -> None:
    sound = [str(image_folder / "test" / "frog" / "000.png")][:n_sound]
    too_long = 300 * "x"  # of which to ask whether it is a folder is an error
    with pytest.raises(CifarJaxError, match=rf"^2 of {2 + n_sound} image\(s\) could not be read"):
        main(["--checkpoint", str(trained_run), "absent.png", too_long, *sound])
    out, err = capsys.readouterr()
    assert "absent.png cannot be read: No such file or directory. Fix: check the path." in err
    assert f"{too_long} cannot be read: File name too long" in err
    counted = [line for line in out.splitlines() if "ms each" in line]
    assert len(counted) == n_sound
    assert all(line.startswith("1 image(s), ") for line in counted)


def test_more_images_than_one_batch(trained_run: Path, image_folder: Path, tmp_path: Path) -> None:
    files = []
    for i in range(BATCH_SIZE + 3):
        files.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(np.full((8, 8, 3), 7 * i, np.uint8)).save(files[-1])
    network = trained.load(trained_run)
    logits = make_logits(network)
    together = list(predict(network, logits, files))
    assert [answer["file"] for answer in together] == files
    for file, answer in zip(files, together, strict=True):
        (alone,) = predict(network, logits, [file])
        assert answer["probability"] == pytest.approx(alone["probability"], rel=1e-5)


def test_options_may_stand_between_images(
    trained_run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, wide = str(image_folder / "test" / "cat" / "000.png"), str(tmp_path / "wide.png")
    with Image.new("RGB", (24, 8)) as around:
        around.paste(Image.open(image), (8, 0))
        around.save(wide)
    stretched, cut = [], []
    for answers, options in ((stretched, ["--json"]), (cut, ["--fit", "crop", "--json"])):
        main(["--checkpoint", str(trained_run), image, *options, wide])
        answers += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [answer["file"] for answer in answers] == [image, wide]
    assert cut[0]["probabilities"] == stretched[0]["probabilities"]
    # Two rows of one batch are not promised the same bits.
    same = pytest.approx(stretched[0]["probabilities"], rel=1e-5)
    assert cut[1]["probabilities"] == same
    assert stretched[1]["probabilities"] != same


def test_a_reader_that_stops_reading_is_no_error(trained_run: Path, image_folder: Path) -> None:
    command = f"{sys.executable} -m cifar_jax.predict --checkpoint {trained_run} --json "
    command += f"{image_folder / 'test'} | head -n 1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=120)
    assert found.stdout.count(b"\n") == 1
    assert found.stderr == b""


def test_folders_give_their_images_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/c.jpg", "notes.txt", ".d.png", "e.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(file).relative_to(tmp_path).as_posix() for file in find_images([str(tmp_path)])]
    assert found == ["a/c.jpg", "b.PNG", "e.webp"]


def test_an_answer_is_one_line_whatever_the_file_is_called() -> None:
    answer = {"file": "a\nb.png", "probabilities": {"cat": 0.25, "dog": 0.75}}
    assert _describe(answer, 1) == "a\\nb.png: dog 75.0 %"


def test_in_a_folder_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # which would be waited for
    (tmp_path / "to_pipe.png").symlink_to(tmp_path / "pipe.png")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "lost.png")]


def test_wrong_use_is_one_line(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        (["--checkpoint", trained_run], ExitCode.USAGE, "IMAGE"),
        (["x.png"], ExitCode.USAGE, "--checkpoint"),
        (["--checkpoint", trained_run, "--top", "0", "x.png"], ExitCode.USAGE, "--top 0"),
        (["--checkpoint", trained_run, "--fit", "pad", "x.png"], ExitCode.USAGE, "--fit 'pad'"),
        (["--checkpoint", tmp_path / "no", "x.png"], ExitCode.CHECKPOINT, "does not exist"),
        (["--checkpoint", trained_run, tmp_path / "empty"], ExitCode.DATA, "holds no image"),
    ):
        with pytest.raises(CifarJaxError) as caught:
            main(list(map(str, arguments)))
        assert caught.value.exit_code == code
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_shown(trained_run: Path, tmp_path: Path) -> None:
    name = bytes(tmp_path) + b"/\xff.png"
    shutil.copyfile(next((Path(__file__).parent.parent / "tests").glob("*.py")), name)
    command = [sys.executable, "-m", "cifar_jax.predict", "--checkpoint", trained_run, name]
    found = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert found.returncode == ExitCode.DATA
    assert b"is not an image" in found.stderr
