"""The initial weights that all parts of the study begin with. Without torch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from cifar_jax.data.dataset import ImageShape
from cifar_jax.steps.train_step import create_train_state

CLASSES = 10


def initial_variables(model: Any, image_shape: ImageShape, dtype: Any = np.float32) -> Any:
    """Flax's own initial weights, the same in every float type."""
    with jax.enable_x64(False):
        state = create_train_state(model, optax.identity(), image_shape, seed=0)
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), state.variables)
