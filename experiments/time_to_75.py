r"""How long does it take, from the command, to 75 % on CIFAR-10's test images?

    python experiments/time_to_75.py --data cifar10.tar.gz \
        --output experiments/results/time_to_75.json

The rule, fixed beforehand on validation images: `--preset fast` always trains its three epochs;
PyTorch, with the tutorial's recipe (Adam at a constant 1e-3, no augmentation, files through a
DataLoader), stops after the first epoch that validates at 75 % or more, or else after ten. The test
set is scored once, at the end. Both run on the CPU. Seconds are those of the whole command: start,
reading, compiling (nothing is compiled beforehand), training, validation and test. Needs the test
extra, and a machine that does nothing else. Each run is stored as it ends, and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import first_step
from cifar_jax import cli
from cifar_jax.data.sources import check_source
from cifar_jax.errors import UsageError
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output

_TARGET = 0.75
_MOST_EPOCHS = 10


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for cifar_jax.train")
    parser.add_argument("--data-dir", help="as in cifar_jax.train")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument(
        "--seeds", type=int, default=5, help="train the preset with the seeds 0 .. N-1"
    )
    parser.add_argument("--torch-seeds", type=int, default=1, help="the same for PyTorch")
    arguments = parser.parse_args()
    source = arguments.data
    check_source(source)
    data = first_step.data_options(source, arguments.data_dir)
    about = {**environment("jax", "jaxlib", "torch"), "data": Path(source).name}
    runs = _earlier_runs(arguments.output, about)
    check_output(arguments.output)
    planned = [("cifar_jax, fast", seed) for seed in range(arguments.seeds)]
    for seed in range(arguments.torch_seeds):
        planned += [(f"PyTorch, {model}", seed) for model in ("cnn-wide", "cnn")]
    for program, seed in planned:
        if any((run["program"], run["seed"]) == (program, seed) for run in runs):
            continue
        print(f"{program}, seed {seed} ...", flush=True)
        measure = _fast if program.startswith("cifar_jax") else _torch
        runs.append({"program": program, "seed": seed, **measure(program, seed, data)})
        print(f"  {runs[-1]}", flush=True)
        found = {
            **about,
            "rule": " ".join((__doc__ or "").split("\n\n")[2].split()),
            "runs": runs,
            "summary": _summary(runs),
        }
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
    for row in _summary(runs):
        print(row)


def _earlier_runs(output: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs stored in ``output``, of the same machine, data and versions; none at first."""
    if not output.exists():
        return []
    try:
        found = json.loads(output.read_text())
        same = {
            # The second form, without the architecture, was stored until 2026-11-28.
            "machine": (about["machine"], about["machine"].partition(", ")[2]),
            "data": (about["data"],),
            "versions": (about["versions"],),
        }
        differs = next((name for name, forms in same.items() if found[name] not in forms), None)
        runs: list[dict[str, Any]] = found["runs"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"--output {output} is there already, and holds no runs: {error!r}",
            fix="give another --output",
        ) from error
    if differs:
        raise UsageError(
            f"--output {output} holds runs of {differs} {found[differs]}, and these are of "
            f"{about[differs]}",
            fix="give another --output",
        )
    return runs


def _fast(program: str, seed: int, data: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "cifar_jax.train", "--preset", "fast", *data]
        seconds = _seconds(
            [*command, "--seed", str(seed), "--workdir", str(workdir)], Path(folder) / "cache"
        )
        rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {
            "seconds": seconds,
            "epochs": [row["seconds"] for row in rows],
            "val_accuracy": [row["val_accuracy"] for row in rows],
            "test_accuracy": json.loads((workdir / "report.json").read_text())["test_accuracy"],
        }


def _torch(program: str, seed: int, data: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "torch.json"
        command = [sys.executable, "-m", "bench.torch_epochs", *data, "--tutorial"]
        command += ["--model", program.split(", ")[1], "--seed", str(seed)]
        command += ["--epochs", str(_MOST_EPOCHS), "--until", str(_TARGET)]
        seconds = _seconds([*command, "--output", str(output)], Path(folder) / "cache")
        return {"seconds": seconds, **json.loads(output.read_text())}


def _seconds(command: list[str], cache: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )
    return time.perf_counter() - started


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for program in dict.fromkeys(run["program"] for run in runs):
        its = [run for run in runs if run["program"] == program]
        scores = [run["test_accuracy"] for run in its]
        rows.append(
            {
                "program": program,
                "n": len(its),
                "seconds_mean": statistics.mean(run["seconds"] for run in its),
                "test_accuracy_mean": statistics.mean(scores),
                "test_accuracy_std": statistics.stdev(scores) if len(scores) > 1 else None,
                "validated_at_75": sum(run["val_accuracy"][-1] >= _TARGET for run in its),
            }
        )
    return rows


if __name__ == "__main__":
    cli.run(main)
