"""The choices of a run, and what each part of the network learns by.

From https://github.com/KellerJordan/cifar10-airbench, ``airbench94_muon.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cifar_jax.initializers import WHITENING
from cifar_jax.muon import muon


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run. The loss is a sum over the batch, so learning rates are for its sum of gradients.

    Attributes:
        widths: channels of the three stages.
        epochs: a whole number of passes; what does not fill a batch is left out.
        whitening_epochs: so many at the start train the whitening's bias, which then is fixed.
        kernel_rate, kernel_momentum: Muon's, for the 3x3 kernels.
        bias_rate, head_rate, momentum, decay: of Nesterov SGD for all else; decay is decoupled.
            All rates fall linearly to 0.
        deep: as in :class:`cifar_jax.models.Airbench`.
        crop: pixels that an image is shifted by, at most.
        cutout: side in pixels of a square that is blanked in each image; 0: none is.
        dtype: of activations.
    """

    widths: tuple[int, ...] = (64, 256, 256)
    deep: bool = False
    epochs: int = 8
    batch_size: int = 2000
    whitening_epochs: int = 3
    kernel_rate: float = 0.24
    kernel_momentum: float = 0.6
    bias_rate: float = 0.053
    head_rate: float = 0.67
    momentum: float = 0.85
    decay: float = 0.004
    label_smoothing: float = 0.2
    crop: int = 2
    cutout: int = 0
    dtype: str = "float16"


# By the accuracy, in percent on the original images, that its author's network reaches in as many
# epochs, the latter two by SGD. With Muon those two have not been run on a GPU yet.
RECIPES = {
    "94": Recipe(),
    "95": Recipe(widths=(128, 384, 384), epochs=15),
    "96": Recipe(widths=(128, 384, 512), deep=True, epochs=37, crop=4, cutout=12),
}


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Muon for the 3x3 kernels; SGD for the biases and the head; nothing for the whitening."""
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
