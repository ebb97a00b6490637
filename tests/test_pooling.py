from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.pooling import max_pool


def linen_max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_it_is_max_pooling_forward_and_backward(size: tuple[int, int], form: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *size, 5)).astype(np.float32)
    pooled, pull_back = jax.vjp(max_pool, x)
    expected, expected_pull_back = jax.vjp(linen_max_pool, x)
    assert np.array_equal(pooled, expected)
    gradient = rng.normal(size=pooled.shape).astype(np.float32)
    assert np.array_equal(pull_back(gradient)[0], expected_pull_back(gradient)[0])


def test_the_first_of_equals_gets_the_gradient() -> None:
    """As in PyTorch, in reading order; a share for each would leave parity."""
    window = jnp.array([[1.0, 2.0], [2.0, 2.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: max_pool(x).sum())(window)
    assert gradient[0, :, :, 0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("size", [(1, 4), (4, 1)])
def test_images_without_one_whole_window_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(CifarJaxError, match=f"{size[0]}x{size[1]} pixels are left"):
        max_pool(jnp.zeros((2, *size, 3)))
