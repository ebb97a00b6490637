from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

from cifar_jax.networks.airbench import Whitening
from cifar_jax.networks.initializers import (
    partly_identity,
    uniform,
    unit_std,
    whiten,
    whitening_kernel,
)


def correlated_images(n: int = 40, size: int = 9) -> np.ndarray:
    """Noise that neighbouring pixels and channels share, about 0."""
    noise = np.random.default_rng(0).normal(size=(n, size + 2, size + 2, 3))
    smooth = sum(noise[:, i : i + size, j : j + size] for i in range(3) for j in range(3))
    return (smooth + 2 * smooth.mean(axis=-1, keepdims=True)).astype(np.float32) / 5


def test_the_whitening_whitens() -> None:
    """Of the squares it was made from, no two outputs correlate, and each has variance 1."""
    images = correlated_images() + 0.5  # it is about 0 that the variance is 1
    params = {"Whitening": {"kernel": np.zeros((2, 2, 3, 24)), "bias": np.ones(24)}}
    whitened = whiten(params, jnp.asarray(images))["Whitening"]
    np.testing.assert_array_equal(whitened["bias"], 1)
    outputs = lax.conv_general_dilated(
        images, whitened["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1, 24)
    np.testing.assert_array_equal(outputs[:, 12:], -outputs[:, :12])
    covariance = np.asarray(outputs.T @ outputs)[:12, :12] / len(outputs)
    np.testing.assert_allclose(covariance, np.eye(12), atol=0.05)
    # It does because it was made to: the squares themselves do correlate.
    size = images.shape[1] - 1
    squares = [images[:, i : i + size, j : j + size] for i, j in itertools.product((0, 1), (0, 1))]
    flat = np.concatenate(squares, axis=-1).reshape(-1, 12)
    assert np.abs(np.corrcoef(flat.T) - np.eye(12)).max() > 0.5


def test_directions_that_no_image_has_are_not_blown_up() -> None:
    """As of grey images in colour: divided by nothing but the author's 5e-4."""
    grey = np.repeat(correlated_images()[..., :1], 3, axis=-1)
    kernel = np.asarray(whitening_kernel(jnp.asarray(grey), 2)).reshape(12, 24)
    assert np.linalg.norm(kernel, axis=0).max() == pytest.approx(5e-4**-0.5, rel=1e-2)


@pytest.mark.parametrize(("channels", "features"), [(4, 10), (6, 6), (8, 3)])
def test_the_first_features_are_the_channels(channels: int, features: int) -> None:
    kernel = partly_identity(jax.random.key(0), (3, 3, channels, features))
    x = np.random.default_rng(0).normal(size=(2, 5, 5, channels)).astype(np.float32)
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    n = min(channels, features)
    np.testing.assert_array_equal(y[..., :n], x[..., :n])
    rest = np.asarray(kernel[..., n:])
    assert (np.abs(rest) <= (9 * channels) ** -0.5).all()
    assert np.unique(rest).size == rest.size


def test_the_rest_is_as_pytorch_draws_it() -> None:
    """Bounds, and spread, of its layer of as many inputs."""
    ours = np.asarray(uniform(12)(jax.random.key(0), (20_000,)))
    theirs = torch.nn.Conv2d(3, 5000, 2).bias.detach().numpy()
    assert np.abs(ours).max() <= 12**-0.5
    assert np.abs(theirs).max() <= 12**-0.5
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.03)
    assert abs(ours.mean()) < 0.01
    # The first bias of airbench is drawn so, for the 12 inputs of its layer.
    bias = Whitening().init(jax.random.key(0), jnp.zeros((1, 3, 3, 3)))["params"]["bias"]
    assert 0.8 * 12**-0.5 < np.abs(bias).max() <= 12**-0.5


def test_the_head_has_a_deviation_of_one() -> None:
    kernel = np.asarray(unit_std(jax.random.key(0), (256, 10)))
    assert kernel.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert abs(kernel.mean()) < 0.1
