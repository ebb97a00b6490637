from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cifar_jax.networks import winograd
from cifar_jax.networks.blocks import Conv
from cifar_jax.networks.convolution import conv3x3, paired_conv
from cifar_jax.networks.winograd import Padding

ALL_ROUND: Padding = ((1, 1), (1, 1))
PADDINGS: list[Padding] = [ALL_ROUND, ((1, 0), (1, 0)), ((1, 1), (1, 0)), ((1, 0), (1, 1))]


def plain(x: jax.Array, kernel: jax.Array, padding: Padding = ALL_ROUND) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("size", "channels", "features"),
    [((8, 6), 3, 16), ((4, 4), 1, 32), ((5, 6), 3, 16), ((6, 6), 3, 64), ((6, 6), 8, 16)],
)
def test_every_form_is_the_convolution_forward_and_backward(
    size: tuple[int, int], channels: int, features: int, padding: Padding, form: str
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)
    ours = functools.partial(conv3x3, padding=padding, paired=form == "gpu")
    assert_the_same(ours, functools.partial(plain, padding=padding), x, kernel)


def test_it_begins_as_that_of_flax() -> None:
    x = np.zeros((1, 4, 4, 8), np.float32)
    found, expected = (conv.init(jax.random.key(0), x) for conv in (Conv(16), nn.Conv(16, (3, 3))))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("size", [(5, 6), (4, 7)])
def test_that_of_a_small_kernel_too(size: tuple[int, int], form: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(2, 2, 3, 24)).astype(np.float32)
    assert_the_same(paired_conv, functools.partial(plain, padding=((0, 0), (0, 0))), x, kernel)


def assert_the_same(ours: Any, truth: Any, x: Any, kernel: Any) -> None:
    """Forward and backward."""
    y, pull_back = jax.vjp(ours, x, kernel)
    true_y, true_pull_back = jax.vjp(truth, x, kernel)
    np.testing.assert_allclose(y, true_y, rtol=1e-5, atol=1e-5)
    gradient = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    for found, expected in zip(pull_back(gradient), true_pull_back(gradient), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 13, 96])  # one image, not to be cut, in two parts
@pytest.mark.parametrize(
    ("size", "channels", "features", "padding"),
    [
        ((3, 4), 32, 32, ALL_ROUND),
        ((8, 12), 64, 32, ALL_ROUND),
        ((4, 4), 33, 70, ((1, 0), (1, 1))),
        ((5, 7), 64, 66, ALL_ROUND),  # the last tile of each row is filled up
        ((3, 3), 66, 64, ((1, 0), (1, 0))),
        ((4, 9), 64, 64, ((1, 1), (1, 0))),  # without its last column, rows of whole tiles
    ],
)
def test_the_form_of_half_the_multiplications_is_the_convolution(
    batch: int, size: tuple[int, int], channels: int, features: int, padding: Padding
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)
    assert winograd.pays(x, kernel)

    def both(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> list[tuple[jax.Array, ...]]:
        y, pull_back = jax.vjp(functools.partial(conv3x3, padding=padding), x, kernel)
        true_y, true_pull_back = jax.vjp(functools.partial(plain, padding=padding), x, kernel)
        return [(y, *pull_back(gradient)), (true_y, *true_pull_back(gradient))]

    shape = (batch, *(n - 1 + end for n, (_, end) in zip(size, padding, strict=True)), features)
    gradient = rng.normal(size=shape).astype(np.float32)
    program = jax.jit(both).lower(x, kernel, gradient).compile()
    assert program.as_text().count(" convolution(") == 6 * 3 + 3, "of each the six and the plain"
    for ours, truth in zip(*program(x, kernel, gradient), strict=True):
        assert np.abs(ours - truth).max() < 5e-6 * np.abs(truth).max()


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        (np.zeros((2, 8, 8, 16), np.float32), np.zeros((3, 3, 16, 32), np.float32)),
        (np.zeros((2, 8, 6, 32), np.float32), np.zeros((3, 3, 32, 32), np.float32)),
        (np.zeros((2, 8, 8, 32), jnp.bfloat16), np.zeros((3, 3, 32, 32), jnp.bfloat16)),
    ],
    ids=["few channels", "few for rows of no whole tiles", "bfloat16"],
)
def test_where_it_does_not_pay_the_form_is_plain(x: jax.Array, kernel: jax.Array) -> None:
    assert not winograd.pays(x, kernel)
    assert jax.jit(conv3x3).lower(x, kernel).as_text().count("stablehlo.convolution") == 1


def test_images_take_the_fast_form_on_a_cpu() -> None:
    images, kernel = np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 3, 3, 16), np.float32)
    compiled = jax.jit(conv3x3).lower(images, kernel).as_text()
    assert "tensor<4x4x3x64xf32>" in compiled  # the four kernels, side by side


@pytest.mark.parametrize(
    ("side", "padding"), [(5, ALL_ROUND), (3, ((0, 0), (0, 0))), (3, ((1, 2), (1, 1)))]
)
def test_another_convolution_is_refused_and_not_silently_this_one(
    side: int, padding: Padding
) -> None:
    x, kernel = jnp.zeros((1, 8, 8, 32)), jnp.zeros((side, side, 32, 32))
    with pytest.raises(ValueError, match="conv3x3 is for kernels of 3x3 and padding 1"):
        conv3x3(x, kernel, padding)


def test_only_a_gpu_takes_columns_in_pairs() -> None:
    x, kernel = np.zeros((2, 7, 7, 24), np.float32), np.zeros((3, 3, 24, 64), np.float32)
    pairs = "tensor<3x2x48x128xf32>"
    ours = jax.jit(functools.partial(conv3x3, paired=True)).trace(x, kernel)
    assert pairs in ours.lower(lowering_platforms=("cuda",)).as_text()
    assert pairs not in ours.lower(lowering_platforms=("cpu",)).as_text()


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
