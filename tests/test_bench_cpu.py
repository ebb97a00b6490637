"""The pieces of ``experiments/bench_cpu.py``, each on little data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXPERIMENTS, write_images

from bench import pipeline
from bench.steps import _flops
from bench.torch_epochs import recipe
from cifar_jax.config import TrainConfig
from cifar_jax.optim import make_schedule
from cifar_jax.torch_reference import learning_rates


@pytest.mark.parametrize("data", ["shapes", "files"])
def test_the_pipeline_is_timed_beside_memory(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if data == "files":
        write_images(tmp_path / "files", {"bird": 200, "cat": 200}, size=32)
        data = str(tmp_path / "files")
    few = ["--data", data, "--max-train-examples", "256", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *few, "--output", str(tmp_path / "out.json")])
    pipeline.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == 2
    seconds = found["epoch_seconds"]
    assert found["pipeline_ratio"] == pytest.approx(seconds["memory"][0] / seconds["tf.data"][0])
    assert 0 < found["waiting_share"] < 1


def test_pytorch_stops_at_the_accuracy_that_is_wanted(tmp_path: Path) -> None:
    """In a process of its own, which workers that load images are forked from."""
    command = [sys.executable, "-m", "bench.torch_epochs", "--data", "shapes", "--tutorial"]
    command += ["--max-train-examples", "128", "--epochs", "2", "--until", "0.01"]
    command += ["--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["epochs"]) == 1
    assert found["val_accuracy"][0] >= 0.01
    assert 0 < found["test_accuracy"] < 0.5


def test_pytorchs_rates_are_the_tutorials_and_ours() -> None:
    assert learning_rates(recipe("cnn", tutorial=True), 20) == [1e-3] * 20
    ours = make_schedule(TrainConfig(), 20)
    rates = learning_rates(recipe("cnn", tutorial=False), 20)
    assert rates == pytest.approx([float(ours(i)) for i in range(20)], rel=1e-5)


def test_work_is_counted_by_the_textbook() -> None:
    convolutions = [32 * 32 * 27 * 16, 16 * 16 * 144 * 32, 8 * 8 * 288 * 64]
    macs = sum(convolutions) + 1024 * 512 + 512 * 256 + 256 * 10
    assert _flops("cnn") == {
        "forward": 2 * 128 * macs,
        "train": 2 * 128 * (3 * macs - convolutions[0]),
    }
