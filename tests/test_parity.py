"""The rungs of the comparison with PyTorch, from one layer to two hundred steps of training.

Each runs in float64, where only a difference of meaning is left to see, and in float32, the type of
training. The last tests make the mistakes that the rungs are there to catch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_layout import CASES, random_variables

from cifar_jax import layout, torch_reference
from cifar_jax.config import PRESETS, TrainConfig
from cifar_jax.networks.models import create_model
from cifar_jax.parity import Drift, Pair, measure_drift, relative_difference
from cifar_jax.steps.optim import make_schedule

# The largest relative differences. float64 rounds at 1e-16, float32 at 6e-8.
LAYER = {
    "float64": 1e-12,  # sums of some hundred products
    "float32": 1e-5,
}
GRADIENT = {
    "float64": 1e-11,  # the same, through every layer and back
    "float32": 1e-4,  # a batch norm's bias sums what nearly cancels
}
SCHEDULE = {
    "float64": 1e-12,  # PyTorch's cosine multiplies from step to step, and its rounding adds up
    "float32": 1e-7,  # of the peak: the schedule's own rounding, once
}
ONE_STEP = {
    "float64": 1e-11,
    "float32": 1e-3,  # Adam divides a gradient by itself: of one near 0, rounding is a large part
}
MANY_STEPS = {
    "float64": 1e-10,  # no step more than rounding, which training does not enlarge much
    "float32": 0.1,  # a ReLU or a maximum that rounding decides otherwise sends runs their own way
}
CLIPPED = 1e-5  # PyTorch divides by norm + 1e-6, optax by the norm

STEPS = 200
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

TRAINABLE = {name: case for name, case in CASES.items() if not case[0].dropout}
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.02},
    "sgd decayed": {"optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 0.01},
    "sgd onecycle": {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "onecycle"},
    "sgd clipped": {"optimizer": "sgd", "learning_rate": 0.02, "clip_norm": 0.5},
    "nesterov": {"optimizer": "sgd", "learning_rate": 0.02, "nesterov": True},
    "adam": {"optimizer": "adam", "learning_rate": 3e-3},
    "adam decayed": {"optimizer": "adam", "learning_rate": 3e-3, "weight_decay": 0.01},
    "adam smoothed": {"optimizer": "adam", "learning_rate": 3e-3, "label_smoothing": 0.1},
    "adam onecycle": {"optimizer": "adam", "learning_rate": 1e-2, "schedule": "onecycle"},
    "adamw cosine": {
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "schedule": "cosine",
    },
}
TRAINED = (TrainConfig(widths=(4,), hidden=(16,), batch_norm=True), (4, 6, 3))


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The type to compute in; one thread for PyTorch, whose threads would wait for XLA's."""
    wide, threads = request.param == "float64", torch.get_num_threads()
    before = jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    # float32 as it is trained with. Most of the time is compiling, and XLA's code for float64 takes
    # it three times as long.
    jax.config.update("jax_disable_most_optimizations", wide)
    try:
        with jax.enable_x64(wide):
            yield request.param
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        torch.set_num_threads(threads)


def make_pair(config: TrainConfig, image_shape: tuple[int, int, int], dtype: str) -> Pair:
    variables = random_variables(config, image_shape, dtype)
    return Pair(create_model(config, 10), variables, image_shape)


def make_batch(
    image_shape: tuple[int, int, int], dtype: str, size: int = 4
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Few images: with many, some maximum is so nearly a tie that float32 decides it otherwise."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(size, *image_shape)).astype(dtype)
    return images, rng.integers(0, 10, size).astype(np.int32)


def train(
    case: tuple[TrainConfig, tuple[int, int, int]], dtype: str, steps: int = STEPS, **options: Any
) -> Drift:
    """Steps on four batches, again and again, so that there is something to learn."""
    config, image_shape = case
    plain = {"schedule": "constant", "flip": False, "crop": 0}
    config = dataclasses.replace(config, **{**plain, **options})
    rng = np.random.default_rng(2)
    batches = [
        (
            rng.integers(0, 256, (8, *image_shape), dtype=np.uint8),
            rng.integers(0, 10, 8).astype(np.int32),
        )
        for _ in range(4)
    ]
    channels = image_shape[-1]
    return measure_drift(
        make_pair(config, image_shape, dtype),
        config,
        batches * (steps // 4),
        MEAN[:channels],
        STD[:channels],
    )


def worst(differences: dict[str, float]) -> float:
    return float(np.max(list(differences.values())))  # np.max, as max() would lose a NaN


def test_differences_are_relative_to_the_largest_value() -> None:
    assert relative_difference(np.array([1.0, 4.0]), np.array([2.0, 4.0])) == 0.25
    assert relative_difference(np.array([0.5]), np.array([0.0])) == 0.5
    assert np.isnan(relative_difference(np.array([1.0, np.nan]), np.array([1.0, 2.0])))
    with pytest.raises(ValueError, match="shapes"):
        relative_difference(np.zeros((2, 1)), np.zeros((2, 2)))


@pytest.mark.parametrize(("config", "image_shape"), CASES.values(), ids=CASES)
def test_every_layer_agrees_in_evaluation(
    config: TrainConfig, image_shape: tuple[int, int, int], dtype: str
) -> None:
    """With dropout too, which then does nothing."""
    pair = make_pair(config, image_shape, dtype)
    images, _ = make_batch(image_shape, dtype)
    differences = pair.activations(images, train=False)
    assert set(differences) == {*pair.layout.names, "logits"}
    assert worst(differences) < LAYER[dtype]


@pytest.mark.parametrize(
    "case", [name for name in TRAINABLE if "batch norm" in name] + ["resnet9", "airbench"]
)
def test_every_layer_agrees_in_training(case: str, dtype: str) -> None:
    """Where batch norm takes the statistics of the batch; other networks do as in evaluation."""
    config, image_shape = CASES[case]
    images, _ = make_batch(image_shape, dtype)
    differences = make_pair(config, image_shape, dtype).activations(images, train=True)
    assert worst(differences) < LAYER[dtype]


@pytest.mark.parametrize(("config", "image_shape"), TRAINABLE.values(), ids=TRAINABLE)
def test_loss_and_gradients_agree(
    config: TrainConfig, image_shape: tuple[int, int, int], dtype: str
) -> None:
    pair = make_pair(config, image_shape, dtype)
    differences = pair.gradients(*make_batch(image_shape, dtype))
    assert len(differences) == 1 + len(jax.tree.leaves(pair.variables["params"]))
    assert worst(differences) < GRADIENT[dtype]


@pytest.mark.parametrize("total_steps", [1, 2, 3, 10, 37, 3510])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "onecycle"])
def test_schedules_agree(schedule: Any, total_steps: int, dtype: str) -> None:
    config = TrainConfig(schedule=schedule, learning_rate=3e-3)
    ours = jax.vmap(make_schedule(config, total_steps))(np.arange(total_steps))
    theirs = np.array(torch_reference.learning_rates(config, total_steps))
    difference = np.max(np.abs(np.broadcast_to(ours, theirs.shape).astype(np.float64) - theirs))
    assert difference / config.learning_rate < SCHEDULE[dtype]


def test_an_optimizer_without_a_twin_is_refused() -> None:
    with pytest.raises(ValueError, match="no twin in PyTorch of the optimizer muon"):
        torch_reference.learning_rates(PRESETS["fast"], 10)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, "float64") for recipe in RECIPES]
    + [(r, "float32") for r in ("sgd", "nesterov", "adam", "adam onecycle", "adamw cosine")],
    indirect=["dtype"],
)
def test_optimizers_agree_for_one_step_and_for_many(recipe: str, dtype: str) -> None:
    drift = train(TRAINED, dtype, **RECIPES[recipe])
    assert drift.theirs[-1] < 0.5 * drift.theirs[0]  # a network that learns
    one, many = ONE_STEP[dtype], MANY_STEPS[dtype]
    if "clip_norm" in RECIPES[recipe]:
        one, many = max(one, CLIPPED), max(many, CLIPPED)
    # The second loss is the first that a step has changed.
    assert np.max(drift.loss[:2]) < one
    assert drift.params[0] < one
    assert np.max(drift.loss) < many
    assert drift.params[-1] < many
    assert drift.batch_stats < many


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize(
    "case", ["linear", "mlp", "cnn", "cnn-wide batch norm", "cnn-gap", "resnet9", "airbench"]
)
def test_every_model_trains_alike(case: str, dtype: str) -> None:
    """In float64 alone; what float32 adds depends on the network's size and learning rate."""
    drift = train(TRAINABLE[case], dtype, steps=12, optimizer="adam", learning_rate=1e-3)
    assert drift.theirs[-4] < drift.theirs[0]  # the same batch
    assert np.max(drift.loss) < MANY_STEPS["float64"]
    assert drift.params[-1] < MANY_STEPS["float64"]
    assert drift.batch_stats < MANY_STEPS["float64"]


@pytest.mark.parametrize("case", ["the tutorial's", "cnn", "mlp", "linear"])
def test_a_skipped_permutation_fails(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_flattened_before", lambda layer, layout: None)
    config, image_shape = CASES[case]
    images, _ = make_batch(image_shape, "float32")
    differences = make_pair(config, image_shape, "float32").activations(images, train=False)
    assert differences["logits"] > 1000 * LAYER["float32"]


@pytest.mark.parametrize("case", ["cnn", "resnet9"])
def test_a_swapped_kernel_axis_fails(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Height and width of a 3x3 kernel: every shape stays right."""
    swapped = {"hwio_to_oihw": (3, 2, 1, 0), "oihw_to_hwio": (3, 2, 1, 0)}
    for name, axes in swapped.items():
        monkeypatch.setattr(layout, name, lambda x, axes=axes: x.transpose(axes).copy())
    config, image_shape = CASES[case]
    images, _ = make_batch(image_shape, "float32")
    differences = make_pair(config, image_shape, "float32").activations(images, train=False)
    assert worst(differences) > 1000 * LAYER["float32"]


def test_a_momentum_mistake_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax's 0.9 given to PyTorch, which means 0.1 by it."""

    class Mistaken(torch.nn.BatchNorm2d):
        def __init__(self, features: int) -> None:
            super().__init__(features, momentum=0.9)

    monkeypatch.setattr(torch_reference.nn, "BatchNorm2d", Mistaken)
    drift = train(TRAINED, "float32", **RECIPES["sgd"])
    assert drift.params[-1] < MANY_STEPS["float32"]  # training does not read running statistics
    assert drift.batch_stats > MANY_STEPS["float32"]


def test_a_forgotten_factor_of_the_variance_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "torch_running_variance", lambda variance, **rest: variance)
    with jax.enable_x64(True):
        drift = train(TRAINED, "float64", **RECIPES["sgd"])
    assert drift.batch_stats > 1000 * MANY_STEPS["float64"]
