"""The pieces of ``experiments/bench_cpu.py``, each on little data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_images

from bench.steps import _flops

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def run(module: str, output: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("data", ["shapes", "files"])
def test_the_pipeline_is_timed_beside_memory(tmp_path: Path, data: str) -> None:
    if data == "files":
        write_images(tmp_path / "files", {"bird": 200, "cat": 200}, size=32)
        data = str(tmp_path / "files")
    few = ("--data", data, "--max-train-examples", "256")
    found = run("bench.pipeline", tmp_path / "out.json", *few, "--rounds", "1")
    assert found["steps"] == 2
    seconds = found["epoch_seconds"]
    assert found["pipeline_ratio"] == pytest.approx(seconds["memory"][0] / seconds["tf.data"][0])
    assert 0 < found["waiting_share"] < 1


def test_pytorch_stops_at_the_accuracy_that_is_wanted(tmp_path: Path) -> None:
    few = ("--data", "shapes", "--max-train-examples", "128", "--tutorial", "--epochs", "2")
    found = run("bench.torch_epochs", tmp_path / "out.json", *few, "--until", "0.01")
    assert len(found["epochs"]) == 1
    assert found["val_accuracy"][0] >= 0.01
    assert 0 < found["test_accuracy"] < 0.5


def test_work_is_counted_by_the_textbook() -> None:
    convolutions = [32 * 32 * 27 * 16, 16 * 16 * 144 * 32, 8 * 8 * 288 * 64]
    macs = sum(convolutions) + 1024 * 512 + 512 * 256 + 256 * 10
    assert _flops("cnn") == {
        "forward": 2 * 128 * macs,
        "train": 2 * 128 * (3 * macs - convolutions[0]),
    }
