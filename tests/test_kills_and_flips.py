"""Accidents by the dozen, at random: `python -m pytest -m long` runs these."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import assert_equal, make_state, save_steps

from cifar_jax.checkpoints.checkpoint import restore, restore_newest
from cifar_jax.config import from_json
from cifar_jax.errors import CifarJaxError
from cifar_jax.train import train_and_evaluate

STARTED = "compiling the steps"


def start(image_folder: Path, workdir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cifar_jax.train", "--data", str(image_folder), "--resume"),
            *("--model", "mlp", "--hidden", "8", "--dropout", "0.2", "--input", "device"),
            *("--batch-size", "16", "--epochs", "6", "--checkpoint-every", "1"),
            *("--workdir", str(workdir)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_started(process: subprocess.Popen[str]) -> None:
    """Until it compiles, or, as there is nothing left to do, has ended."""
    assert process.stdout is not None
    said = character = " "
    while character and STARTED not in said:
        character = process.stdout.read(1)
        said += character


@pytest.fixture(scope="module")
def undisturbed(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], float]:
    """The report of the run, and how many seconds it takes from when it says ``STARTED``."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(image_folder, workdir)
    wait_until_started(process)
    started = time.monotonic()
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    seconds = time.monotonic() - started
    return json.loads((workdir / "report.json").read_text()), seconds


@pytest.mark.long
@pytest.mark.fault("A1", "A2", "A3", "A22")
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_any_instant_arrives_at_the_same_bits(
    tmp_path: Path,
    image_folder: Path,
    undisturbed: tuple[dict[str, Any], float],
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, seconds = undisturbed
    draw = random.Random(seed)
    workdir = tmp_path / "run"
    accidents = []
    for signum in (signal.SIGKILL, draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])):
        process = start(image_folder, workdir)
        wait_until_started(process)
        accidents.append((signum.name, draw.uniform(0, 0.7 * seconds)))
        time.sleep(accidents[-1][1])
        process.send_signal(signum)
        said, _ = process.communicate(timeout=100)
        expected = {0, -signal.SIGKILL, 128 + signum}
        if (workdir / "report.json").exists():
            expected.add(-signum)  # Python has taken its handlers down: all is done
        assert process.returncode in expected, (accidents, said)
        assert "Traceback" not in said, (accidents, said)
    # The rest without another process, of which all these accidents take enough.
    config = from_json(json.loads((workdir / "config.json").read_text()), where="config.json")
    train_and_evaluate(dataclasses.replace(config, resume=True), workdir)
    assert "warning" not in capsys.readouterr().out, accidents
    found = json.loads((workdir / "report.json").read_text())
    for name in ("params_sha256", "test_loss", "test_correct", "steps"):
        assert found[name] == report[name], (accidents, name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 7)), accidents


@contextlib.contextmanager
def flipped_bit(folder: Path, draw: random.Random) -> Iterator[str]:
    """One random bit of all those in the files of ``folder``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    (file,) = draw.choices(files, [file.stat().st_size for file in files])
    content = file.read_bytes()
    position, bit = draw.randrange(len(content)), draw.randrange(8)
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    file.write_bytes(changed)
    yield f"bit {bit} of byte {position} of {file}"
    for place in (file, Path(str(file).replace("/20/", "/20.damaged/"))):
        if place.exists():
            place.write_bytes(content)


@pytest.mark.long
@pytest.mark.fault("A7")
def test_500_flipped_bits_are_noticed_or_change_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    draw = random.Random(0)
    refused = 0
    for _ in range(500):
        with flipped_bit(tmp_path / "20", draw) as flip:
            newest, rejected = restore_newest(tmp_path, make_state(0))
            assert newest is not None, flip
            step = int(newest.path.name)
            assert (step, len(rejected)) in ((20, 0), (10, 1)), flip
            assert_equal(newest.state, make_state(step))
            assert newest.metadata == {"history": [step]}, flip
            refused += len(rejected)
        if rejected:
            (tmp_path / "20.damaged").rename(tmp_path / "20")
    assert_equal(restore(tmp_path / "20", make_state(0)).state, make_state(20))
    assert refused > 450


@pytest.mark.long
@pytest.mark.fault("A8")
def test_with_all_damaged_there_is_an_error_and_no_state(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    draw = random.Random(1)
    refused = 0
    for _ in range(100):
        with flipped_bit(tmp_path / "10", draw) as flip:
            try:
                newest, _ = restore_newest(tmp_path, make_state(0))
                assert newest is not None, flip
                assert_equal(newest.state, make_state(10))
            except CifarJaxError:
                refused += 1
    assert refused > 80
