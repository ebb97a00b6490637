from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cifar_jax.convolution import conv3x3


@pytest.mark.parametrize(
    ("size", "channels", "features"),
    [((8, 6), 3, 16), ((4, 4), 1, 32), ((5, 6), 3, 16), ((6, 6), 3, 64), ((6, 6), 8, 16)],
)
def test_every_form_is_the_convolution_forward_and_backward(
    size: tuple[int, int], channels: int, features: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)

    def expected(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    y, pull_back = jax.vjp(conv3x3, x, kernel)
    true_y, true_pull_back = jax.vjp(expected, x, kernel)
    np.testing.assert_allclose(y, true_y, rtol=1e-5, atol=1e-5)
    gradient = rng.normal(size=y.shape).astype(np.float32)
    for ours, truth in zip(pull_back(gradient), true_pull_back(gradient), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-4)


def test_images_take_the_fast_form_on_a_cpu() -> None:
    images, kernel = np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 3, 3, 16), np.float32)
    compiled = jax.jit(conv3x3).lower(images, kernel).as_text()
    assert "tensor<4x4x3x64xf32>" in compiled  # the four kernels, side by side


def test_gradients_in_a_loop_have_the_form_that_a_cpu_runs_fast() -> None:
    """Elsewhere XLA brings them into it; in a loop it leaves them up to 70 times slower."""
    x, kernel = np.zeros((8, 8, 8, 16), np.float32), np.zeros((3, 3, 16, 32), np.float32)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (conv3x3(x, kernel) ** 2).sum()

    def loop(x: jax.Array, kernel: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            of_x, of_kernel = jax.grad(loss, (0, 1))(x * carry, kernel)
            return carry + of_x.sum() + of_kernel.sum(), None

        return lax.scan(body, jnp.float32(1), None, length=3)[0]

    program = jax.jit(loop).lower(x, kernel).compile().as_text()
    assert "while(" in program
    convolutions = [line for line in program.splitlines() if " convolution(" in line]
    assert len(convolutions) >= 3
    for line in convolutions:
        assert "dim_labels=b01f_01io->b01f" in line
