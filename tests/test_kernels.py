"""The speedrun's kernels: by an interpreter against a plain form, and as Triton gets them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from airbench import kernels
from airbench.kernels import norm_gelu
from cifar_jax.networks.airbench import gelu
from cifar_jax.networks.pooling import max_pool

# Pooled or not, with one block to a program or several: B, H, W (pooled), C, programs at most.
CASES = [
    (True, (2, 3, 5), 24, 2112),
    (True, (16, 4, 3), 192, 9),
    (False, (5, 3, 1), 7, 2112),
    (False, (16, 5, 4), 128, 5),
]


def plainly(x: jax.Array, bias: jax.Array, pool: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    if pool:
        x = max_pool(x)
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    normalised = (wide - mean) / jnp.sqrt(variance + 1e-12) + bias
    return gelu(normalised.astype(x.dtype)), mean, variance


@pytest.mark.parametrize(
    ("pool", "images", "channels", "programs", "dtype"),
    [(*case, "float32") for case in CASES] + [(*case, "float16") for case in CASES[::2]],
)
def test_it_is_the_plain_form_and_so_is_its_gradient(
    pool: bool,
    images: tuple[int, int, int],
    channels: int,
    programs: int,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", programs)
    batch, height, width = images
    sides = (2 * height, 2 * width) if pool else (height, width)
    keys = jax.random.split(jax.random.key(0), 3)
    x = 1 + 2 * jax.random.normal(keys[0], (batch, *sides, channels))
    x = x.round(1).astype(dtype)  # so there are windows with two largest pixels
    bias = jax.random.normal(keys[1], (channels,))
    gradient = jax.random.normal(keys[2], (*images, channels)).astype(dtype)

    def run(operation, x):  # type: ignore[no-untyped-def]
        def activations(x, bias):  # type: ignore[no-untyped-def]
            out, *statistics = operation(x, bias)
            return out, statistics

        out, pull_back, statistics = jax.vjp(activations, x, bias, has_aux=True)
        return out, *pull_back(gradient.astype(out.dtype)), *statistics

    ours = jax.jit(run, static_argnums=0)(lambda x, b: norm_gelu(x, b, 1e-12, pool), x)
    # In float32: a plain form in float16 rounds more often.
    plain = jax.jit(run, static_argnums=0)(lambda x, b: plainly(x, b, pool), x.astype(jnp.float32))
    for found, expected in zip(ours, plain, strict=True):
        assert found.shape == expected.shape
        error = np.linalg.norm(found.astype(jnp.float32) - expected)
        assert error < (1e-5 if dtype == "float32" else 2e-3) * np.linalg.norm(expected)


def test_a_window_of_equal_pixels_gives_its_gradient_to_the_first() -> None:
    x = jnp.zeros((1, 4, 4, 1)).at[0, 2, 3].set(1)  # three windows of zeros, and one with a winner
    gradient = jax.grad(lambda x: norm_gelu(x, jnp.ones(1), 1e-3, True)[0].sum() ** 2)(x)
    where = np.argwhere(np.asarray(gradient)[0, :, :, 0])
    assert where.tolist() == [[0, 0], [0, 2], [2, 0], [2, 3]]


# JAX says so from 0.11 on, where a kernel is lowered for a GPU; see kernels.py.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("batch", "channels", "dtype"),
    [(16, n, "float16") for n in (64, 256, 384)]
    + [(16, 64, "bfloat16"), (16, 64, "float32"), (1, 2, "float16")],
)
def test_triton_takes_it(
    batch: int, channels: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it goes without a GPU: each pass is a kernel of its own, in Triton's form."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h100)
    bias = jax.ShapeDtypeStruct((channels,), jnp.float32)
    for pool in (True, False):
        x = jax.ShapeDtypeStruct((batch, 6, 6, channels), dtype)

        def loss_fn(x: jax.Array, bias: jax.Array, pool: bool = pool) -> jax.Array:
            return norm_gelu(x, bias, 1e-12, pool)[0].astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
        with use_abstract_mesh(mesh):
            text = program.trace(x, bias).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 3


def test_programs_share_the_blocks_evenly() -> None:
    for rows, channels in ((450_000, 64), (98_000, 256), (18_000, 384), (15, 7), (7919 * 16, 64)):
        grid = kernels._Grid.to_sum(rows, channels)
        programs, beside = grid.shape
        assert programs * grid.blocks * grid.block_rows == rows
        assert beside * grid.block_channels == channels
        assert programs * beside <= kernels._MOST_PROGRAMS or programs == 1
