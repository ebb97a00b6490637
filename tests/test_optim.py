from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.optim import make_optimizer, make_schedule

PARAMS = {"Conv_0": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])}}
GRADS = {"Conv_0": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])}}


def first_update(**options: object) -> dict[str, np.ndarray]:
    config = TrainConfig(schedule="constant", learning_rate=0.1, **options)  # type: ignore[arg-type]
    tx = make_optimizer(config, make_schedule(config, 10))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return jax.tree.map(np.asarray, updates)["Conv_0"]


def test_onecycle_rises_to_its_peak_and_falls_to_nearly_nothing() -> None:
    """At 0: peak/25; at the last of the first 30 %: peak; at the last step: peak/25/10,000."""
    schedule = make_schedule(TrainConfig(learning_rate=0.5), total_steps=30)
    np.testing.assert_allclose(schedule(0), 0.5 / 25, rtol=1e-6)
    np.testing.assert_allclose(schedule(4), (0.5 / 25 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(schedule(8), 0.5, rtol=1e-6)
    np.testing.assert_allclose(schedule(29), 0.5 / 25 / 1e4, rtol=1e-6)


def test_cosine_and_constant() -> None:
    cosine = make_schedule(TrainConfig(schedule="cosine", learning_rate=0.5), total_steps=101)
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [0.5, 0.25, 0], atol=1e-8)
    constant = make_schedule(TrainConfig(schedule="constant", learning_rate=0.5), total_steps=101)
    assert constant(0) == constant(100) == 0.5


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
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


def test_momentum_and_nesterov() -> None:
    """Nesterov's first step looks ahead: gradient + momentum * gradient."""
    plain = first_update(optimizer="sgd", momentum=0.9)
    np.testing.assert_allclose(plain["bias"], [0.1], rtol=1e-6)
    ahead = first_update(optimizer="sgd", momentum=0.9, nesterov=True)
    np.testing.assert_allclose(ahead["bias"], [0.19], rtol=1e-6)
