r"""How fast is this on a CPU, compared with PyTorch and Keras, and with what the machine can do?

    python experiments/bench_cpu.py --quick --output bench.json           # under three minutes
    python experiments/bench_cpu.py --data cifar10.tar.gz \
        --output experiments/results/bench_cpu.json                       # 15 to 35 minutes

Needs the test extra, which brings torch, and a machine that does nothing else. The programs take
turns, round after round, each in a process of its own. Writes one JSON and, beside it, a figure:

programs   a training step and an inference of 128 images, by network and program: median and
           spread, GFLOP/s, the share of the ceiling, peak memory
pairs      ours and each other program: a ratio over 1 means that ours is faster
ceiling_gflops                 the best of XLA and torch in a product of two float32 matrices
first_step_seconds_cold, _warm from the command to the first step: with nothing compiled, and with
                               what an earlier run compiled
epochs     two epochs from files as users of each program run them, and the whole commands
pipeline_ratio                 seconds of an epoch from memory / of the same epoch by tf.data; and
                               again for files that are decoded in each epoch
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import first_step
from bench import steps, whole
from bench.figure import draw
from cifar_jax import cli
from cifar_jax.data.sources import check_source
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="the JSON to write; the figure goes beside it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two networks, few rounds, little data"
    )
    parser.add_argument("--data", help="for epochs and first steps [default shapes]")
    parser.add_argument("--data-dir", help="as in cifar_jax.train")
    arguments = parser.parse_args()
    # Of the processes that are timed: JAX's, and PyTorch's.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    source = arguments.data or "shapes"
    check_source(source)
    quick = arguments.quick
    check_output(arguments.output)
    data = first_step.data_options(source, arguments.data_dir)
    if quick:
        data += ["--max-train-examples", "1280"]
    found: dict[str, Any] = {
        "quick": quick,
        **environment(*_PACKAGES),
        "data": Path(source).name,
    }
    for title, measure in (
        ("steps", lambda: steps.measure(quick)),
        (
            "from the command to the first step",
            lambda: whole.first_step_seconds(data, 1 if quick else 3),
        ),
        ("epochs", lambda: {} if quick else whole.epochs(data, 2)),
        ("the pipeline", lambda: _pipeline(data, 1 if quick else 5)),
    ):
        print(f"{title} ...", flush=True)
        found.update(measure())
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
    picture = arguments.output.with_suffix(".png")
    draw(found, picture)
    print(f"in {arguments.output} and {picture}")


_PACKAGES = ("jax", "jaxlib", "torch", "keras", "tensorflow-cpu")


def _pipeline(data: list[str], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pipeline.json"
        command = [sys.executable, "-m", "bench.pipeline", *data, "--rounds", str(rounds)]
        where = Path(__file__).parent
        subprocess.run([*command, "--output", str(output)], check=True, cwd=where)
        found: dict[str, Any] = json.loads(output.read_text())
    print(f"  {found}")
    return {"pipeline_ratio": found["pipeline_ratio"], "pipeline": found}


if __name__ == "__main__":
    cli.run(main)
