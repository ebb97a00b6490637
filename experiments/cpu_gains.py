"""What does each CPU optimisation gain? A step with all of them, and without each.

    python experiments/cpu_gains.py --output cpu_gains.json   # eight to twenty minutes

Times the training step of ``cifar_jax.train`` and the answers of ``cifar_jax.predict``, for 128
images, in milliseconds. The programs take turns, round after round, each in a process of its own.
Needs 24 GB of memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from flax import linen as nn

import paired_timing
from bench import steps
from cifar_jax import cli
from cifar_jax.networks import convolution, models, winograd
from cifar_jax.steps import parallel
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output

# Rounds, and the steps in each, by network.
_TURNS = {"cnn": (9, 50), "cnn-wide": (7, 3), "resnet9": (5, 1)}

# What is replaced, and by what, to do without each part.
_PARTS: dict[str, tuple[Any, str, Any]] = {
    "half the multiplications (winograd.py)": (winograd, "pays", lambda *_: False),
    "four pixels at once in the first layer (convolution.py)": (convolution, "_MAX_IN_CHANNELS", 0),
    "max-pooling's own gradient (pooling.py)": (
        models,
        "max_pool",
        functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    ),
    "batch norm's own sums and gradient (batch_norm.py)": (
        models,
        "BatchNorm",
        functools.partial(nn.BatchNorm, use_fast_variance=False),
    ),
    "memory kept between steps (allocator.py)": (steps, "keep_freed_memory", lambda: None),
    "the compiler option (parallel.py)": (parallel, "CPU_COMPILER_OPTIONS", {}),
}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--models", nargs="+", choices=_TURNS, default=list(_TURNS))
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that are timed
    check_output(arguments.output)
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        rounds, n = _TURNS[model]
        specs = [
            {"model": model, "batch_size": steps.BATCH_SIZE, "without": without}
            for without in ([], *([part] for part in _PARTS), list(_PARTS))
        ]
        for timing in paired_timing.time_in_turn(
            [sys.executable, __file__], specs, rounds=rounds, steps=n, cwd=Path(__file__).parent
        ):
            row = timing.row()
            rows.append(row)
            print(
                f"{model:9s} {row['pass']:8s} {row['step_ms_median']:7.1f} ms "
                f"({row['step_ms_min']:.1f} to {row['step_ms_max']:.1f}), "
                f"{row['peak_memory_mb']} MB, without {_name(row['without'])}",
                flush=True,
            )
        found = {**environment("jax", "jaxlib", "flax"), "programs": rows}
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")


def _name(without: list[str]) -> str:
    return {0: "nothing", len(_PARTS): "all of them"}.get(len(without), ", ".join(without))


def _make_programs(spec: dict[str, Any]) -> Any:
    for part in spec["without"]:
        mock.patch.object(*_PARTS[part]).start()
    return steps.make_programs({**spec, "framework": "cifar_jax"})


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a worker of the command's own
        paired_timing.serve(json.loads(sys.argv[1]), _make_programs)
    else:
        cli.run(main)
