"""The optimizer of each part of the network, as in ``airbench94_muon.py``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from airbench.recipe import Recipe
from cifar_jax.networks.initializers import WHITENING
from cifar_jax.steps.muon import muon


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Muon for the 3x3 kernels; SGD for the biases and the head; the whitening's kernel stays."""
    total = recipe.epochs * steps_per_epoch

    def sgd(rate: float, steps: int) -> optax.GradientTransformation:
        falling = optax.linear_schedule(rate, 0.0, steps)
        return optax.chain(
            optax.add_decayed_weights(recipe.decay / rate),
            optax.sgd(falling, recipe.momentum, nesterov=True),
        )

    kernel_rate = optax.linear_schedule(recipe.kernel_rate, 0.0, total)
    return optax.partition(
        {
            "kernel": muon(kernel_rate, recipe.kernel_momentum, jnp.dtype(recipe.dtype)),
            "head": sgd(recipe.head_rate, total),
            "bias": sgd(recipe.bias_rate, total),
            "whitening bias": sgd(recipe.bias_rate, recipe.whitening_epochs * steps_per_epoch),
            "whitening kernel": optax.set_to_zero(),
        },
        _parts,
    )


def _parts(params: Any) -> Any:
    """The name of each leaf's part."""

    def part(path: Any, leaf: Any) -> str:
        layer, name = (key.key for key in path)
        if layer == WHITENING:
            return f"whitening {name}"
        if layer.startswith("Dense"):
            return "head"
        return name

    return jax.tree_util.tree_map_with_path(part, params)
