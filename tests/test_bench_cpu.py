"""The pieces of ``experiments/bench_cpu.py``, each on little data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS, write_images

import first_step
from bench import pipeline, steps, whole
from bench.figure import draw
from bench.steps import _flops
from cifar_jax.config import TrainConfig
from cifar_jax.steps.optim import make_schedule
from paired_timing import Spec, Timing


@pytest.mark.parametrize("data", ["shapes", "files"])
def test_the_pipeline_is_timed_beside_memory(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if data == "files":
        write_images(tmp_path / "files", {"bird": 200, "cat": 200}, size=32)
        data = str(tmp_path / "files")
    few = ["--data", data, "--max-train-examples", "256", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *few, "--output", str(tmp_path / "out.json")])
    runs = []

    def run(self: Any, batches: Any) -> tuple[float, float]:
        runs.append(real_run(self, batches))
        return runs[-1]

    real_run = pipeline._Steps.run
    monkeypatch.setattr(pipeline._Steps, "run", run)
    pipeline.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == 2
    seconds = found["epoch_seconds"]
    memory, by_tf_data, streamed = runs[3:]  # the first three warm up
    assert seconds["memory"] == [memory[0]]
    assert found["pipeline_ratio"] == pytest.approx(memory[0] / by_tf_data[0])
    assert found["streamed_ratio"] == pytest.approx(memory[0] / streamed[0])
    assert 0 < found["waiting_share"] == by_tf_data[1] / by_tf_data[0] < 1


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
    command += ["--epochs", "2", "--output", str(tmp_path / "out.json")]
    command += ["--until", "0.01"] * tutorial
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["epochs"]) == (1 if tutorial else 2)
    assert found["val_accuracy"][0] >= 0.01
    assert 0 < found["test_accuracy"] < 0.5
    rates, *betas = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    assert [set(beta) for beta in betas] == [{0.9}, {0.999}]
    schedule = make_schedule(TrainConfig(), len(rates))
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


def test_what_is_told_follows_from_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours takes two milliseconds, each other program four; a product five, by torch four."""
    times = {"cifar_jax": 2.0, "keras": 4.0, "torch": 4.0, "jax": 5.0}

    def timed(specs: list[Spec], rounds: int, n: int) -> list[Timing]:
        found = []
        for spec in specs:
            ms = times[spec.get("library", spec["framework"])]
            for name in ("product",) if "library" in spec else ("forward", "train"):
                found.append(Timing({**spec, "pass": name}, rounds * [ms], {}))
        return found

    monkeypatch.setattr(steps, "_time", timed)
    found = steps.measure(quick=True)
    assert found["ceiling_gflops"] == pytest.approx(2 * 2048**3 / 4e-3 / 1e9)
    assert [pair["ratio"] for pair in found["pairs"]] == 8 * [2.0]  # networks, passes, others
    for row in found["programs"]:
        gflops = _flops(row["model"])[row["pass"]] / row["step_ms_median"] / 1e6
        assert row["gflops"] == pytest.approx(gflops)
        assert row["share_of_ceiling"] == pytest.approx(gflops / found["ceiling_gflops"])
    draw({**found, "machine": "a machine", "date": "2026-11-30"}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_first_step_is_timed_with_nothing_compiled_and_then_with_what_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(options: Any, *, stop: bool, environment: dict[str, str]) -> first_step.Run:
        cache = Path(environment["JAX_COMPILATION_CACHE_DIR"])
        kept = cache.exists()
        cache.mkdir(exist_ok=True)
        return first_step.Run(1.0 if kept else 5.0, 9.0, 100)

    monkeypatch.setattr(first_step, "train", train)
    found = whole.first_step_seconds([], 2)
    assert (found["first_step_seconds_cold"], found["first_step_seconds_warm"]) == (5, 1)
    assert found["first_step_seconds"] == {"cold": [5, 5], "warm": [1, 1]}
