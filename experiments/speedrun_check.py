"""Does this device compute the speedrun's steps as a CPU does in float32?

    python experiments/speedrun_check.py --output check.json

A few training steps from one state on the same images: by the CPU in float32, without kernels; and
by JAX's first device, in float32 with and without kernels, and in the type of the runs. After each
step the differences of the loss, the parameters and the running averages, relative to the largest
value. Muon divides by the singular values of a gradient, the small ones too, so parameters differ
more than losses. Not yet run in full on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airbench.measure import make_setting, takes_kernels
from airbench.recipe import Recipe
from airbench.run import Setting, draw_batches, reflect_pad, train_step
from cifar_jax import cli
from cifar_jax.data import shapes
from cifar_jax.data.dataset import Split
from cifar_jax.errors import NumericsError
from cifar_jax.networks.initializers import whiten
from cifar_jax.parity import relative_difference
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import TrainState, initial_train_state, normalize
from cifar_jax.system.files import check_is_new, write_atomically
from machine import environment
from output import check_output

_STEPS = 3
_BATCH = 200
_MOST = 1e-3  # of the first loss in float32: no rounding explains more


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--smoke", action="store_true", help="does it work? a narrow network")
    arguments = parser.parse_args()
    check_output(arguments.output)
    check_is_new(arguments.output, "--output")
    recipe = dataclasses.replace(Recipe(), batch_size=_BATCH)
    if arguments.smoke:
        recipe = dataclasses.replace(recipe, widths=(4, 8, 8), batch_size=20)
    exact = dataclasses.replace(recipe, dtype="float32")
    fused = takes_kernels()
    programs = {
        "float32": exact,
        **({"float32, with kernels": dataclasses.replace(exact, fused=True)} if fused else {}),
        f"{recipe.dtype}, as the runs": dataclasses.replace(recipe, fused=fused),
    }
    pixels, labels = shapes.draw(_STEPS * recipe.batch_size, seed=0)
    images = Split(pixels, labels)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        state = jax.device_get(_first_state(make_setting(exact, images, len(shapes.CLASS_NAMES))))
    print("the CPU's steps ...", flush=True)
    expected = _steps(exact, state, images, cpu)
    found: dict[str, Any] = {
        **environment("jax", "jaxlib"),
        "device": device.device_kind,
        "recipe": dataclasses.asdict(recipe),
        "rows": [],
    }
    for name, program in programs.items():
        steps = _steps(program, state, images, device)
        differences = list(map(_differences, steps, expected))
        found["rows"].append({"program": name, "steps": differences})
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
        for number, step in enumerate(differences, start=1):
            print(f"  {name}, step {number}: " + ", ".join(f"{k} {v:.0e}" for k, v in step.items()))
        if program.dtype == "float32" and not differences[0]["loss"] < _MOST:
            raise NumericsError(
                f"{name}: the first loss on {device.device_kind} is off by "
                f"{differences[0]['loss']:.1e} of the CPU's",
                fix=f"report it, with {arguments.output}",
            )


def _first_state(setting: Setting) -> TrainState:
    state = initial_train_state(setting.model, setting.tx, (32, 32, 3), 0)
    images = normalize(jnp.asarray(shapes.draw(1000, seed=1)[0]), setting.mean, setting.std)
    return state.replace(params=whiten(state.params, images))


def _steps(recipe: Recipe, state: TrainState, images: Split, device: Any) -> list[dict[str, Any]]:
    """What each step gives: ``loss``, ``params``, ``batch_stats``; NumPy's arrays."""
    setting = make_setting(recipe, images, len(shapes.CLASS_NAMES))
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        padded = reflect_pad(jnp.asarray(images.pixels), recipe.crop)
        labels = jnp.asarray(images.labels)
        step = functools.partial(train_step, learn_whitening=True, setting=setting)
        with jax.default_device(jax.devices("cpu")[0]):  # the same draws for all
            batches = draw_batches(jax.random.key(0), jnp.zeros(len(labels), bool), 0, recipe)
        drawn = jax.tree.map(np.asarray, batches)
        given = [jax.tree.map(lambda x, i=i: x[i], drawn) for i in range(_STEPS)]
        state = jax.device_put(state, device)
        lowered = jax.jit(step).lower(padded, labels, state, given[0])
        compiled = compile_lowered(lowered, device.platform)
        results = []
        for batch in given:
            state, loss = compiled(padded, labels, state, jax.device_put(batch, device))
            kept = {"loss": loss, "params": state.params, "batch_stats": state.batch_stats}
            results.append(jax.device_get(kept))
        return results


def _differences(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of the arrays under each name."""
    return {
        name: max(
            jax.tree.leaves(jax.tree.map(relative_difference, ours[name], expected[name])),
        )
        for name in expected
    }


if __name__ == "__main__":
    cli.run(main)
