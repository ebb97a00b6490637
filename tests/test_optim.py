from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError
from cifar_jax.steps.muon import orthogonalize
from cifar_jax.steps.optim import make_optimizer, make_schedule

PARAMS = {"Conv_0": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])}}
GRADS = {"Conv_0": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])}}


def first_update(**options: object) -> dict[str, np.ndarray]:
    config = TrainConfig(schedule="constant", learning_rate=0.1, **options)  # type: ignore[arg-type]
    tx = make_optimizer(config, make_schedule(config, 10))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return jax.tree.map(np.asarray, updates)["Conv_0"]


def test_a_constant_rate_takes_no_memory_a_step() -> None:
    """Very many epochs, that early stopping is to end."""
    assert make_schedule(TrainConfig(schedule="constant"), total_steps=10**15)(10**6) > 0


def test_rates_that_would_fill_the_memory_are_not_computed() -> None:
    with pytest.raises(CifarJaxError, match=r"--epochs 10 .* 84,000,000 steps.* Fix: give fewer"):
        make_schedule(TrainConfig(), total_steps=84_000_000)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear"])
def test_a_run_of_one_step_has_a_learning_rate(schedule: str) -> None:
    config = TrainConfig(schedule=schedule)  # type: ignore[arg-type]
    assert 0 < make_schedule(config, total_steps=1)(0) <= config.learning_rate


def test_weight_decay_is_on_kernels_only() -> None:
    """sgd: -lr * (gradient + decay * parameter), as torch.optim.SGD."""
    update = first_update(optimizer="sgd", weight_decay=0.2)
    np.testing.assert_allclose(update["kernel"], [-0.1 * (0.5 + 0.4), -0.1 * (0.25 - 0.2)])
    np.testing.assert_allclose(update["bias"], [0.1])


def test_adamw_decays_beside_the_gradient_and_adam_inside() -> None:
    """Adam's first step is lr * sign(gradient), whatever its size."""
    decoupled = first_update(optimizer="adamw", weight_decay=0.2)
    np.testing.assert_allclose(decoupled["kernel"], [-0.1 * (1 + 0.4), -0.1 * (1 - 0.2)], rtol=1e-5)
    np.testing.assert_allclose(decoupled["bias"], [0.1], rtol=1e-5)
    inside = first_update(optimizer="adam", weight_decay=0.2)
    np.testing.assert_allclose(inside["kernel"], [-0.1, -0.1], rtol=1e-5)


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    norm = np.sqrt(0.5**2 + 0.25**2 + 1)
    update = first_update(optimizer="sgd", clip_norm=0.1)
    np.testing.assert_allclose(update["bias"], [0.1 * 0.1 / norm], rtol=1e-6)
    decayed = first_update(optimizer="sgd", clip_norm=0.1, weight_decay=0.2)["kernel"]
    np.testing.assert_allclose(decayed, update["kernel"] - [0.04, -0.02], rtol=1e-6)


def test_momentum_and_nesterov() -> None:
    """Nesterov's first step looks ahead: gradient + momentum * gradient."""
    plain = first_update(optimizer="sgd", momentum=0.9)
    np.testing.assert_allclose(plain["bias"], [0.1], rtol=1e-6)
    ahead = first_update(optimizer="sgd", momentum=0.9, nesterov=True)
    np.testing.assert_allclose(ahead["bias"], [0.19], rtol=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_muons_direction_has_singular_values_of_about_one(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    (turned,) = np.asarray(orthogonalize([jnp.asarray(matrix, jnp.float32)]))
    u, before, v = np.linalg.svd(matrix, full_matrices=False)
    after = np.diag(u.T @ turned @ v.T)
    np.testing.assert_allclose(u @ np.diag(after) @ v, turned, atol=1e-4)  # the same vectors
    assert 0.6 < after[before > 0.2 * before[0]].min() < after.max() < 1.3


def test_matrices_made_orthogonal_together_are_those_made_so_alone() -> None:
    rng = np.random.default_rng(0)
    shapes = [(8, 27), (12, 12), (40, 12)]
    matrices = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    for matrix, together in zip(matrices, orthogonalize(matrices), strict=True):
        (alone,) = orthogonalize([matrix])
        assert together.shape == matrix.shape
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_half_precision_makes_nearly_the_same_direction() -> None:
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(16, 72)), jnp.float32)
    (exact,), (rounded,) = orthogonalize([matrix]), orthogonalize([matrix], jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.02)
    assert not np.array_equal(rounded, exact)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_airbenchs_whitening_is_left_as_it_is(optimizer: Any) -> None:
    """Its gradient is 0; decay, and Muon's hold on norms, would change it all the same."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 24)), jnp.float32)
    params = {"Whitening": {"kernel": kernel}, "Conv_0": {"kernel": jnp.ones((3, 3, 24, 4))}}
    grads = {**jax.tree.map(jnp.ones_like, params), "Whitening": {"kernel": 0 * kernel}}
    decay = 0.0 if optimizer == "muon" else 0.1
    config = TrainConfig(model="airbench", optimizer=optimizer, weight_decay=decay)
    tx = make_optimizer(config, make_schedule(config, 10))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["Whitening"]["kernel"], 0)
    assert (np.asarray(updates["Conv_0"]["kernel"]) != 0).all()


def test_muon_is_for_kernels_of_convolutions_whose_norms_it_holds() -> None:
    """What airbench's own does in one step, written out; all else is Adam's."""
    rng = np.random.default_rng(0)
    params = {
        "Conv_0": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)},
        "Dense_0": {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)},
    }
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    config = TrainConfig(
        optimizer="muon", batch_norm=True, momentum=0.6, learning_rate=0.2, schedule="linear"
    )
    tx = make_optimizer(config, make_schedule(config, 10))
    state = tx.init(params)
    running = np.zeros((36, 8))
    for rate in (0.2, 0.18):
        updates, state = tx.update(grads, state, params)
        kernel = np.asarray(params["Conv_0"]["kernel"]).reshape(36, 8)
        gradient = np.asarray(grads["Conv_0"]["kernel"]).reshape(36, 8)
        running = 0.6 * running + gradient
        kernel = kernel * np.sqrt(8) / np.linalg.norm(kernel)
        (direction,) = orthogonalize([jnp.asarray(gradient + 0.6 * running)])
        expected = kernel - rate * np.asarray(direction)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(
            params["Conv_0"]["kernel"].reshape(36, 8), expected, rtol=1e-4, atol=1e-5
        )
    signs = np.sign(grads["Dense_0"]["bias"])
    np.testing.assert_allclose(params["Dense_0"]["bias"], -(0.02 + 0.018) * signs, rtol=1e-4)
