from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.networks.batch_norm import BatchNorm

OPTIONS: dict[str, Any] = {"momentum": 0.8, "epsilon": 1e-3}


def theirs(**options: Any) -> nn.BatchNorm:
    return nn.BatchNorm(**{**OPTIONS, **options}, use_fast_variance=False)


def ours(**options: Any) -> BatchNorm:
    return BatchNorm(**{**OPTIONS, **options})


def inputs(*shape: int, dtype: Any = np.float32) -> tuple[dict[str, Any], Any, Any]:
    """Variables, what to normalise, whose mean is not 0, and a gradient."""
    rng = np.random.default_rng(0)
    positive = functools.partial(rng.uniform, 0.5, 2, shape[-1:])
    variables = {
        "params": {"scale": positive(), "bias": rng.normal(size=shape[-1:])},
        "batch_stats": {"mean": rng.normal(size=shape[-1:]), "var": positive()},
    }
    x = rng.normal(3, 2, size=shape)
    gradient = rng.normal(size=shape)
    in_float32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables)
    return in_float32, jnp.asarray(x, dtype), jnp.asarray(gradient, dtype)


def train(norm: Any, variables: dict[str, Any], x: Any, gradient: Any) -> Any:
    """The result, the new running averages, and the gradients of parameters and ``x``."""

    def apply(params: Any, x: Any) -> Any:
        return norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    y, pull_back, updated = jax.vjp(apply, variables["params"], x, has_aux=True)
    return y, updated, pull_back(gradient)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("shape", [(4, 8, 8, 5), (3, 7, 5, 16), (1, 1, 1, 3), (6, 4)])
def test_it_is_that_of_flax_in_training(shape: tuple[int, ...], form: str) -> None:
    given = inputs(*shape)
    norms = (norm(use_running_average=False) for norm in (ours, theirs))
    found, expected = (jax.jit(functools.partial(train, norm))(*given) for norm in norms)
    assert_close(found, expected, 1e-5)


def test_it_is_that_of_flax_in_half_precision(form: str) -> None:
    given = inputs(8, 8, 8, 5, dtype=jnp.bfloat16)
    norms = (norm(use_running_average=False, dtype=jnp.bfloat16) for norm in (ours, theirs))
    found, expected = (jax.jit(functools.partial(train, norm))(*given) for norm in norms)
    assert_close(found, expected, 2**-7)
    assert_close(found[1], expected[1], 1e-6)  # the averages are of sums in float32


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_it_is_that_of_flax_when_predicting_and_keeps_the_averages(dtype: Any) -> None:
    variables, x, _ = inputs(4, 8, 8, 5)
    found, expected = (
        norm(use_running_average=True, dtype=dtype).apply(variables, x, mutable=["batch_stats"])
        for norm in (ours, theirs)
    )
    assert_close(found, expected, 1e-6 if dtype is None else 2**-7)


@pytest.mark.parametrize("x64", [False, True])
def test_it_begins_as_that_of_flax(x64: bool) -> None:
    """Outside of pmap too, and in float32."""
    with jax.enable_x64(x64):
        x = inputs(4, 8, 8, 5)[1]
        found, expected = (
            norm(use_running_average=False, axis_name="batch").init(jax.random.key(0), x)
            for norm in (ours, theirs)
        )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, 0)


@pytest.mark.parametrize("axis_name", ["batch", None])
def test_devices_that_share_an_axis_normalise_as_one(axis_name: str | None) -> None:
    variables, x, gradient = inputs(8, 4, 4, 5)
    alone = train(ours(use_running_average=False), variables, x, gradient)

    def on_a_device(x: Any, gradient: Any) -> Any:
        y, updated, (params, of_x) = train(
            ours(use_running_average=False, axis_name=axis_name), variables, x, gradient
        )
        return y, updated, (jax.lax.psum(params, "batch"), of_x)

    y, updated, (params, of_x) = jax.pmap(on_a_device, axis_name="batch")(
        x.reshape(4, 2, *x.shape[1:]), gradient.reshape(4, 2, *x.shape[1:])
    )
    first = functools.partial(jax.tree.map, lambda a: a[0])
    together = (y.reshape(x.shape), first(updated), (first(params), of_x.reshape(x.shape)))
    if axis_name:
        assert_close(together, alone, 1e-5)
    else:
        with pytest.raises(AssertionError):
            assert_close(together, alone, 1e-2)


def test_sums_over_many_pixels_stay_exact() -> None:
    """Added one after the other, 2^22 numbers would be off by some 1e-4 of their sum."""
    x = np.random.default_rng(0).uniform(0.5, 1, (64, 256, 256, 1)).astype(np.float32)
    variables = inputs(1)[0]
    _, updated = jax.jit(
        functools.partial(ours(use_running_average=False).apply, mutable=["batch_stats"])
    )(variables, x)
    mean = 0.8 * variables["batch_stats"]["mean"] + 0.2 * x.mean(dtype=np.float64)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=2e-7)
