"""Inference with a trained network: images in, logits and probabilities out. No TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.errors import NumericsError
from cifar_jax.steps.parallel import aligned, compile_lowered
from cifar_jax.steps.train_step import exact_logits

_LARGEST_BATCH = 128

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def make_logits(network: TrainedNetwork) -> Logits:
    """A function from images uint8 ``[N, H, W, C]`` to logits ``[N, K]``, for any N.

    It runs in batches whose sizes are powers of two, the last one padded, and compiles each size
    when it first occurs.

    The function raises ``ValueError`` for images of another shape or type, and ``NumericsError`` if
    a logit is not finite, as with weights that are too large: argmax would then return an arbitrary
    class.
    """
    model = network.model
    variables = jax.device_put(network.variables)

    def forward(variables: Any, images: Any) -> jax.Array:
        return exact_logits(model, variables, images, network.mean, network.std)

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> jax.stages.Compiled:
        images = jax.ShapeDtypeStruct(shape, np.uint8)
        return compile_lowered(jax.jit(forward).lower(variables, images), jax.default_backend())

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != network.image_shape:
            wanted = ", ".join(map(str, network.image_shape))
            raise ValueError(
                f"images must be uint8 [N, {wanted}], from 0 to 255: these are {images.dtype} "
                f"{list(images.shape)}"
            )
        found = [np.zeros((0, len(network.class_names)), np.float32)]
        for start in range(0, len(images), _LARGEST_BATCH):
            batch = images[start : start + _LARGEST_BATCH]
            n = len(batch)
            padding = (1 << (n - 1).bit_length()) - n
            if padding:
                batch = np.pad(batch, [(0, padding), (0, 0), (0, 0), (0, 0)])
            batch = aligned(batch)
            found.append(np.asarray(compiled(batch.shape)(variables, batch))[:n])
        values = np.concatenate(found)
        if not np.isfinite(values).all():
            raise NumericsError(
                "the network's logits are not finite",
                fix="give another checkpoint",
            )
        return values

    return logits


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logits ``[N, K]`` -> probabilities ``[N, K]``: exp(z_k) / sum_j exp(z_j)."""
    return np.exp(log_softmax(logits))


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """The logarithm of :func:`softmax`, finite even if a probability underflows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
