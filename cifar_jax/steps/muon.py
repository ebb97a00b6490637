"""Muon for convolutions: a step of about the same size along each singular vector of the momentum.

Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/, in the form that holds the
record for CIFAR-10 (https://github.com/KellerJordan/cifar10-airbench). For a kernel W as a matrix
``[D, 9C]``, with a row per feature, and its gradient G:

    M <- momentum * M + G
    W <- sqrt(D) * W / |W| - rate * orthogonalize(G + momentum * M)

where |W| is the Frobenius norm. If D is at most 9C, the step has a norm of about rate * sqrt(D), so
the rate is its size relative to W. The norm of W itself does not matter: the batch norm after the
convolution divides by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Three steps of a quintic with a steep slope at 0, which brings singular values near 1, not to 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 3


class MuonState(NamedTuple):
    """The number of steps done, and the momentum M of each kernel."""

    step: jax.Array
    momentum: Any


def muon(
    schedule: optax.Schedule, momentum: float, dtype: Any = jnp.float32
) -> optax.GradientTransformation:
    """Muon with Nesterov momentum, only for kernels ``[3, 3, C, D]``.

    Args:
        dtype: of the matrix products in :func:`orthogonalize`; bfloat16 is precise enough.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        sums = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        directions = jax.tree.map(lambda m, g: _to_matrix(g + momentum * m), sums, grads)
        leaves, structure = jax.tree.flatten(directions)
        directions = jax.tree.unflatten(structure, orthogonalize(leaves, dtype))
        rate = schedule(state.step)

        def change(kernel: jax.Array, direction: jax.Array) -> jax.Array:
            features = kernel.shape[-1]
            rescaled = kernel * (jnp.sqrt(features) / jnp.linalg.norm(kernel))
            return rescaled - rate * direction.T.reshape(kernel.shape) - kernel

        return jax.tree.map(change, params, directions), MuonState(state.step + 1, sums)

    return optax.GradientTransformation(init, update)


def _to_matrix(kernel: jax.Array) -> jax.Array:
    """``[3, 3, C, D]`` -> ``[D, 9C]``: a row per feature."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def orthogonalize(matrices: list[jax.Array], dtype: Any = jnp.float32) -> list[jax.Array]:
    """The matrices ``[M, N]`` with their singular vectors, and singular values of about 1.

    By a Newton-Schulz iteration, without a decomposition. All are processed together, padded with
    zeros to the largest, which does not change the result: a few large products instead of many
    small ones.
    """
    wide = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    rows, columns = (max(m.shape[axis] for m in wide) for axis in (0, 1))
    x = jnp.stack(
        [
            jnp.pad(
                m / (jnp.linalg.norm(m) + 1e-7), ((0, rows - m.shape[0]), (0, columns - m.shape[1]))
            )
            for m in wide
        ]
    ).astype(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    cut = [x[i, : m.shape[0], : m.shape[1]].astype(m.dtype) for i, m in enumerate(wide)]
    return [c if m.shape[0] <= m.shape[1] else c.T for c, m in zip(cut, matrices, strict=True)]
