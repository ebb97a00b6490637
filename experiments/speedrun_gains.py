"""What does each choice of the speedrun gain? A training step without it, in turn with all.

    python experiments/speedrun_gains.py --output experiments/results/speedrun_gains.json

Epochs of steps on random images, after the whitening's bias is fixed: milliseconds a step, the
median and the minimum over the rounds. Compiles nine programs, and stores each choice as soon as it
is measured. Not yet run in full on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from airbench.measure import make_setting, takes_kernels
from airbench.recipe import Recipe
from airbench.run import draw_batches, reflect_pad, train_step
from cifar_jax import cli
from cifar_jax.data.dataset import Split
from cifar_jax.errors import UsageError
from cifar_jax.networks import blocks, convolution
from cifar_jax.networks.convolution import conv3x3
from cifar_jax.networks.winograd import Padding
from cifar_jax.steps import muon
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import initial_train_state
from cifar_jax.system.files import check_is_new, write_atomically
from machine import environment
from output import check_output

_STEPS = 10
_together = muon.orthogonalize


def _full_conv(x: jax.Array, kernel: jax.Array, padding: Padding, paired: bool) -> jax.Array:
    return conv3x3(x, kernel, paired=paired)


def _one_by_one(matrices: list[jax.Array], dtype: Any) -> list[jax.Array]:
    return [_together([matrix], dtype)[0] for matrix in matrices]


def _none(matrices: list[jax.Array], dtype: Any) -> list[jax.Array]:
    return matrices


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is replaced to do without a choice, or which options of the recipe or step change."""

    replaced: tuple[Any, str, Any] = (blocks, "conv3x3", conv3x3)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    learn_whitening: bool = False


WITH_ALL = _Part()
PARTS = {
    "leaving out what a pool does not read (airbench.py)": _Part((blocks, "conv3x3", _full_conv)),
    "kernels for batch norm, GELU and pooling (kernels.py)": _Part(recipe={"fused": False}),
    "taking columns in pairs (convolution.py)": _Part(
        (convolution, "in_pairs", convolution.plain_conv)
    ),
    "Muon on all kernels together (muon.py)": _Part((muon, "orthogonalize", _one_by_one)),
    "Muon's products, without which it is not Muon": _Part((muon, "orthogonalize", _none)),
    "fixing the whitening's bias": _Part(learn_whitening=True),
    "float16, in bfloat16": _Part(recipe={"dtype": "bfloat16"}),
    "float16, in float32": _Part(recipe={"dtype": "float32"}),
}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--rounds", type=int, default=7, help="in each, an epoch of both programs")
    parser.add_argument("--smoke", action="store_true", help="does it work? a narrow network")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} is out of range", fix="give 1 or more")
    check_output(arguments.output)
    check_is_new(arguments.output, "--output")
    recipe = Recipe()
    if arguments.smoke:
        recipe = dataclasses.replace(recipe, widths=(4, 8), batch_size=20)
    recipe = dataclasses.replace(recipe, fused=takes_kernels())
    if jax.default_backend() == "cpu":
        recipe = dataclasses.replace(recipe, dtype="float32")
    found: dict[str, Any] = {
        **environment("jax", "jaxlib"),
        "device": jax.devices()[0].device_kind,
        "recipe": dataclasses.asdict(recipe),
        "rounds": arguments.rounds,
        "rows": [],
    }
    print("compiling with all ...", flush=True)
    with_all = _program(recipe, WITH_ALL)
    for name, part in PARTS.items():
        print(f"compiling without {name} ...", flush=True)
        without = _program(recipe, part)
        both = [(_step_ms(without), _step_ms(with_all)) for _ in range(arguments.rounds)]
        row: dict[str, Any] = {"without": name}
        for which, values in zip(("", "with_all_"), zip(*both, strict=True), strict=True):
            row[f"{which}step_ms_median"] = statistics.median(values)
            row[f"{which}step_ms_min"] = min(values)
        found["rows"].append(row)
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
        print(
            f"{row['step_ms_median']:8.3f} ms without it, {row['with_all_step_ms_median']:.3f} with"
        )


def _step_ms(program: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program())
    return (time.perf_counter() - started) / _STEPS * 1e3


def _program(recipe: Recipe, without: _Part) -> Callable[[], Any]:
    """An epoch, compiled and run once."""
    traced, begin, others = trace(recipe, without)
    compiled = compile_lowered(traced.lower(), jax.default_backend())
    program = functools.partial(compiled, jax.jit(begin)(0), *others)
    jax.block_until_ready(program())
    return program


def trace(recipe: Recipe, without: _Part) -> tuple[jax.stages.Traced, Callable[[int], Any], Any]:
    """An epoch, not yet compiled; what makes its first state from a seed; its other arguments."""
    recipe = dataclasses.replace(recipe, **without.recipe)
    n = recipe.batch_size * _STEPS
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, rng.integers(0, 10, n).astype(np.int32))
    setting = make_setting(recipe, split, 10)

    def epoch(state: Any, padded: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        step = functools.partial(
            train_step,
            padded,
            labels,
            learn_whitening=without.learn_whitening,
            setting=setting,
        )
        return lax.scan(step, state, draw_batches(key, jnp.zeros(n, bool), 0, recipe))

    padded = reflect_pad(jnp.asarray(split.pixels), recipe.crop)
    others = (padded, jnp.asarray(split.labels), jax.random.key(0))
    begin = functools.partial(initial_train_state, setting.model, setting.tx, (32, 32, 3))
    with mock.patch.object(*without.replaced):
        return jax.jit(epoch).trace(jax.eval_shape(begin, 0), *others), begin, others


if __name__ == "__main__":
    cli.run(main)
