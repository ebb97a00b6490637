"""What a user waits for: from the command to the first step, and for an epoch from files."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import first_step

_EXPERIMENTS = Path(__file__).resolve().parents[1]
_RUN = ("--model", "cnn", "--input", "tf.data")


def first_step_seconds(data: list[str], rounds: int) -> dict[str, Any]:
    """From the command ``cifar_jax.train`` to its first step: nothing compiled, all compiled."""
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, seconds in (("cold", cold), ("warm", warm)):
                run = first_step.train(
                    [*_RUN, *data, "--workdir", f"{folder}/{name}"],
                    stop=True,
                    environment={"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"},
                )
                seconds.append(run.to_first_step)
    print(f"  first step after {_said(cold)} s, with compiled programs kept {_said(warm)} s")
    return {
        "first_step_seconds_cold": statistics.median(cold),
        "first_step_seconds_warm": statistics.median(warm),
        "first_step_seconds": {"cold": cold, "warm": warm},
    }


def epochs(data: list[str], rounds: int) -> dict[str, Any]:
    """Epochs of ``cnn`` as users of each run them, in turn, on the same files.

    Ours runs with the programs that JAX has kept, from its second time on. PyTorch reads the files
    as ImageFolder does, through a DataLoader with a worker per core as in the tutorial, with the
    same flips and crops.
    """
    found: dict[str, Any] = {"ours": [], "torch": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "cifar_jax.train", *_RUN, *data, "--epochs", "2"]
            seconds = _seconds([*command, "--workdir", f"{folder}/run"])
            rows = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            by_epoch = [json.loads(row)["seconds"] for row in rows]
            found["ours"].append({"epochs": by_epoch, "whole_command": seconds})
            output = Path(folder) / "torch.json"
            command = [sys.executable, "-m", "bench.torch_epochs", *data, "--epochs", "2"]
            seconds = _seconds([*command, "--output", str(output)])
            by_epoch = json.loads(output.read_text())["epochs"]
            found["torch"].append({"epochs": by_epoch, "whole_command": seconds})
        for name, runs in found.items():
            print(f"  {name}: {runs[-1]}", flush=True)
    return {"epochs": found}


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=_EXPERIMENTS)
    return time.perf_counter() - started


def _said(seconds: list[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in seconds)
