"""Muon for convolutions: each step turns a kernel by as much in every direction that it has.

Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/, in the form that holds the
record for CIFAR-10 (https://github.com/KellerJordan/cifar10-airbench): the norm of a kernel, which
the batch norm after it undoes, is held where it began, so that the learning rate is an angle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Three steps of a quintic whose slope at 0 is steep: it brings singular values near 1, not to it.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 3


class MuonState(NamedTuple):
    """What Muon remembers: the step, and the running sum of gradients of each kernel."""

    step: jax.Array
    momentum: Any


def muon(schedule: optax.Schedule, momentum: float) -> optax.GradientTransformation:
    """Muon with Nesterov momentum, for kernels ``[3, 3, C, D]`` alone."""

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        sums = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        rate = schedule(state.step)

        def change(kernel: jax.Array, gradient: jax.Array, total: jax.Array) -> jax.Array:
            features = kernel.shape[-1]
            direction = (gradient + momentum * total).reshape(-1, features)
            direction = orthogonalize(direction).reshape(kernel.shape)
            rescaled = kernel * (jnp.sqrt(features) / jnp.linalg.norm(kernel))
            return rescaled - rate * direction - kernel

        return jax.tree.map(change, params, grads, sums), MuonState(state.step + 1, sums)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """``[M, N]`` with the same singular vectors, and singular values of about 1.

    By Newton and Schulz's iteration, without a decomposition.
    """
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if rows <= columns else x.T
