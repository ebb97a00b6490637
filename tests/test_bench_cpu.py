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
from cifar_jax.config import TrainConfig
from cifar_jax.optim import make_schedule


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


TORCH_EPOCHS = """if True:
    import json, torch
    from bench import torch_epochs
    step, steps = torch.optim.Adam.step, []
    def noted(self, *args, **options):
        steps.extend((group["lr"], *group["betas"]) for group in self.param_groups[:1])
        return step(self, *args, **options)
    torch.optim.Adam.step = noted
    torch_epochs.main()
    print(json.dumps(steps))
"""


@pytest.mark.parametrize("tutorial", [True, False])
def test_pytorch_trains_by_the_recipe_and_stops_at_the_accuracy_that_is_wanted(
    tmp_path: Path, tutorial: bool
) -> None:
    """In a process of its own, which workers that load images are forked from."""
    command = [sys.executable, "-c", TORCH_EPOCHS]
    command += ["--tutorial"] * tutorial + ["--data", "shapes", "--max-train-examples", "640"]
    command += ["--epochs", "2", "--until", "0.01", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["epochs"]) == 1
    assert found["val_accuracy"][0] >= 0.01
    assert 0 < found["test_accuracy"] < 0.5
    rates, *betas = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    assert [set(beta) for beta in betas] == [{0.9}, {0.999}]
    schedule = make_schedule(TrainConfig(), 2 * len(rates))  # of two epochs
    expected = [1e-3 if tutorial else float(schedule(i)) for i in range(len(rates))]
    assert len(rates) > 3
    assert rates == pytest.approx(expected, rel=1e-5)


def test_work_is_counted_by_the_textbook() -> None:
    convolutions = [32 * 32 * 27 * 16, 16 * 16 * 144 * 32, 8 * 8 * 288 * 64]
    macs = sum(convolutions) + 1024 * 512 + 512 * 256 + 256 * 10
    assert _flops("cnn") == {
        "forward": 2 * 128 * macs,
        "train": 2 * 128 * (3 * macs - convolutions[0]),
    }
