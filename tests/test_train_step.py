"""The step: what it computes, and that devices and micro-batches do not change it."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.networks.models import create_model
from cifar_jax.steps.host_input import make_evaluate
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import (
    AXIS_NAME,
    CPU_COMPILER_OPTIONS,
    compile_step,
    empty_batch,
    select_devices,
    shard,
    sum_on_host,
)
from cifar_jax.steps.train_step import (
    TrainState,
    classification_sums,
    create_train_state,
    eval_step,
    make_train_step,
    normalize,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SHAPE = (8, 8, 3)
SMALL = TrainConfig(widths=(4, 8), hidden=(16,), optimizer="sgd", learning_rate=0.05)


def make_batches(n: int, batch_size: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (batch_size, *SHAPE), dtype=np.uint8),
            "label": rng.integers(0, 10, batch_size).astype(np.int32),
        }
        for _ in range(n)
    ]


def make_step(config: TrainConfig, axis_name: str | None) -> tuple[Any, TrainState]:
    model = create_model(config, 10, axis_name)
    tx = make_optimizer(config, make_schedule(config, 100))
    return make_train_step(config, model, tx, MEAN, STD, axis_name), initial_state(config)


@functools.cache  # it takes as long to compile as a step
def initial_state(config: TrainConfig) -> TrainState:
    tx = make_optimizer(config, make_schedule(config, 100))
    model = create_model(config, 10)
    return jax.device_get(create_train_state(model, tx, SHAPE, config.seed))


def compile_for(config: TrainConfig, devices: int) -> Any:
    step, state = make_step(config, AXIS_NAME)
    used = select_devices(devices)
    return compile_step(step, state, empty_batch(16, SHAPE, used), used, donate_state=True)


compiled_for = functools.cache(compile_for)


def run_steps(
    config: TrainConfig, devices: int, n_steps: int, compiled: Any = None
) -> tuple[list[float], TrainState]:
    """The loss of each step and the state after the last, under pmap over ``devices``."""
    compiled = compiled or compiled_for(config, devices)
    state, used = initial_state(config), select_devices(devices)
    losses = []
    for batch in make_batches(n_steps, 16):
        state, sums = compiled(state, shard(batch, used))
        total = sum_on_host(sums)
        assert total["count"] == 16
        losses.append(total["loss"] / total["count"])
    return losses, jax.device_get(state)


def test_normalize_gives_zero_mean_and_unit_std() -> None:
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    expected = (np.array([0, 128, 255]) / 255 - MEAN) / STD
    np.testing.assert_allclose(normalize(image, MEAN, STD).ravel(), expected, rtol=1e-6)


def test_sums_of_uniform_logits() -> None:
    """Ten equal logits: cross-entropy ln 10 each, and class 0 wins the tie."""
    label = jnp.array([0, 3, 0, 9])
    sums = classification_sums(jnp.zeros((4, 10)), label)
    np.testing.assert_allclose(sums["loss"], 4 * np.log(10), rtol=1e-6)
    assert (sums["correct"], sums["count"]) == (2, 4)
    masked = classification_sums(jnp.zeros((4, 10)), label, jnp.array([1.0, 1, 0, 0]))
    np.testing.assert_allclose(masked["loss"], 2 * np.log(10), rtol=1e-6)
    assert (masked["correct"], masked["count"]) == (1, 2)


def test_a_step_is_the_textbooks_sgd_step() -> None:
    config = TrainConfig(
        model="linear", optimizer="sgd", momentum=0, schedule="constant", learning_rate=0.1,
        flip=False, crop=0,
    )  # fmt: skip
    step, state = make_step(config, None)
    (batch,) = make_batches(1, 16)
    after, sums = jax.jit(step)(state, batch)

    x = ((batch["image"] / 255 - MEAN) / STD).reshape(16, -1)
    kernel, bias = (state.params["Dense_0"][name] for name in ("kernel", "bias"))
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    one_hot = np.eye(10)[batch["label"]]
    grad = x.T @ (p - one_hot) / 16
    np.testing.assert_allclose(after.params["Dense_0"]["kernel"], kernel - 0.1 * grad, atol=1e-5)
    np.testing.assert_allclose(sums["loss"], -np.log((p * one_hot).sum(axis=1)).sum(), rtol=1e-5)
    assert sums["correct"] == (logits.argmax(axis=1) == batch["label"]).sum()
    assert after.step == 1


def test_a_batch_can_be_learnt_by_heart() -> None:
    config = TrainConfig(optimizer="adam", schedule="constant", widths=(8,), hidden=(32,),
                         flip=False, crop=0)  # fmt: skip
    step, state = make_step(config, None)
    step = jax.jit(step)
    (batch,) = make_batches(1, 16)
    for _ in range(60):
        state, sums = step(state, batch)
    assert sums["correct"] == 16
    assert sums["loss"] / 16 < 0.1


def test_label_smoothing_pulls_the_optimum_away_from_certainty() -> None:
    """The gradient at smoothing s is (1-s) of the plain one plus s of that to the uniform."""

    def gradient(smoothing: float) -> np.ndarray:
        config = TrainConfig(
            model="linear", optimizer="sgd", momentum=0, schedule="constant", learning_rate=1.0,
            flip=False, crop=0, label_smoothing=smoothing,
        )  # fmt: skip
        step, state = make_step(config, None)
        (batch,) = make_batches(1, 16)
        after, _ = jax.jit(step)(state, batch)
        return state.params["Dense_0"]["bias"] - np.asarray(after.params["Dense_0"]["bias"])

    _, state = make_step(TrainConfig(model="linear", flip=False, crop=0), None)
    (batch,) = make_batches(1, 16)
    x = ((batch["image"] / 255 - MEAN) / STD).reshape(16, -1)
    p = np.asarray(jax.nn.softmax(x @ state.params["Dense_0"]["kernel"]))
    uniform = (p - 0.1).mean(axis=0)
    np.testing.assert_allclose(gradient(0.3), 0.7 * gradient(0.0) + 0.3 * uniform, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [SMALL, TrainConfig(widths=(4, 8), hidden=(16,), batch_norm=True, cutout=2, optimizer="sgd")],
    ids=["plain", "batch norm"],
)
def test_devices_do_not_change_the_losses(config: TrainConfig) -> None:
    """A forgotten pmean, of gradients or of batch norm's statistics, shows within a few steps."""
    one, state = run_steps(config, 1, n_steps=20)
    four, other = run_steps(config, 4, n_steps=20)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_without_pmean_the_losses_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    one, _ = run_steps(SMALL, 1, n_steps=20)
    monkeypatch.setattr("cifar_jax.steps.train_step.lax.pmean", lambda x, axis_name: x)
    two, _ = run_steps(SMALL, 2, n_steps=20, compiled=compile_for(SMALL, 2))
    assert not np.allclose(two, one, rtol=1e-5)


def test_pmap_over_one_device_is_jit() -> None:
    """Bit for bit on jax 0.10; 0.12 compiles the two to sums in another order."""
    _, mapped = run_steps(SMALL, 1, n_steps=5)
    step, state = make_step(SMALL, None)
    batches = make_batches(5, 16)
    step = jax.jit(step).lower(state, batches[0]).compile(compiler_options=CPU_COMPILER_OPTIONS)
    for batch in batches:
        state, _ = step(state, batch)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True):
        if jax.__version_info__ < (0, 12):
            assert np.array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_micro_batches_do_not_change_the_step() -> None:
    plain, state = run_steps(SMALL, 1, n_steps=3)
    accumulated, other = run_steps(TrainConfig(**{**vars(SMALL), "accumulate": 4}), 1, n_steps=3)
    np.testing.assert_allclose(accumulated, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_running_statistics_follow_each_micro_batch() -> None:
    """As if they were batches, at a rate that changes nothing else."""
    config = TrainConfig(
        model="cnn-gap", widths=(4,), batch_norm=True, flip=False, crop=0, learning_rate=1e-12
    )
    (batch,) = make_batches(1, 16)
    step, state = make_step(config, None)
    micro = jax.jit(functools.partial(step, accumulate=2))
    found = micro(state, batch)[0].batch_stats["BatchNorm_0"]
    step = jax.jit(step)
    for half in (slice(0, 8), slice(8, 16)):
        state, _ = step(state, {name: x[half] for name, x in batch.items()})
    for name, expected in state.batch_stats["BatchNorm_0"].items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_sums_are_added_in_double_precision() -> None:
    sums: Any = {"loss": np.array([2**24, 1, 1], np.float32)}
    assert sum_on_host(sums) == {"loss": 2**24 + 2}


def test_micro_batches_save_memory() -> None:
    """By XLA's own count of what a step needs beside its arguments and results."""

    def megabytes(accumulate: int) -> float:
        step, state = make_step(dataclasses.replace(SMALL, accumulate=accumulate), None)
        batch = make_batches(1, 256)[0]
        compiled = jax.jit(step).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    whole, quarters = megabytes(1), megabytes(4)
    assert quarters < whole / 2


def test_unsynchronised_statistics_are_averaged_over_the_devices() -> None:
    config = dataclasses.replace(SMALL, batch_norm=True, flip=False, crop=0)
    (batch,) = make_batches(1, 16)
    alone, state = make_step(config, None)
    halves = [{name: x[i : i + 8] for name, x in batch.items()} for i in (0, 8)]
    of_halves = [jax.jit(alone)(state, half)[0].batch_stats for half in halves]
    devices = select_devices(2)

    def of_both(axis_of_model: str | None) -> Any:
        model = create_model(config, 10, axis_of_model)
        step, _ = make_step(config, AXIS_NAME)
        step = functools.partial(step, model=model)
        compiled = compile_step(step, state, shard(batch, devices), devices, donate_state=False)
        return jax.device_get(compiled(state, shard(batch, devices))[0].batch_stats)

    mean = jax.tree.map(lambda a, b: (a + b) / 2, *of_halves)
    apart, together = of_both(None), of_both(AXIS_NAME)
    for expected, found in zip(jax.tree.leaves(mean), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Of the same inputs, the variance of all is more than the mean of the halves' own.
    first = "BatchNorm_0"
    assert (together[first]["var"] > apart[first]["var"]).all()


def test_bfloat16_is_for_activations_alone() -> None:
    config = dataclasses.replace(SMALL, batch_norm=True, dropout=0.5)
    model = create_model(config, 10, dtype=jnp.bfloat16)
    tx = make_optimizer(config, make_schedule(config, 100))
    state = create_train_state(model, tx, SHAPE, 0)
    (batch,) = make_batches(1, 16)
    apply = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    logits, captured = jax.eval_shape(apply, state.variables, np.zeros((16, *SHAPE), np.float32))
    kinds = {
        name: value["__call__"][0].dtype
        for name, value in captured["intermediates"].items()
        if name.startswith(("Conv", "BatchNorm", "Dense"))
    }
    assert kinds.pop("Dense_1") == logits.dtype == jnp.float32
    assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {jnp.dtype(jnp.float32)}

    step, _ = make_step(config, None)
    after, sums = jax.jit(functools.partial(step, model=model))(state, batch)
    _, expected = jax.jit(step)(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.variables)} == {jnp.dtype(jnp.float32)}
    assert sums["loss"].dtype == jnp.float32
    assert float(sums["loss"]) != float(expected["loss"])
    assert float(sums["loss"]) == pytest.approx(float(expected["loss"]), rel=2e-2)


def test_each_step_and_each_device_drops_units_of_its_own() -> None:
    """The same image everywhere: different losses can only come from different masks."""
    config = TrainConfig(
        model="mlp", hidden=(64,), dropout=0.5, flip=False, crop=0, learning_rate=1e-9
    )
    (batch,) = make_batches(1, 1)
    losses = []
    for n in (1, 2, 3, 4):
        step, state = make_step(config, AXIS_NAME)
        devices = select_devices(n)
        same = {name: np.repeat(x, n, axis=0) for name, x in batch.items()}
        compiled = compile_step(step, state, shard(same, devices), devices, donate_state=True)
        for _ in range(2):
            state, sums = compiled(state, shard(same, devices))
            losses.append(float(sums["loss"]))
    of_each_device = np.diff(losses[::2], prepend=0)  # the n-th adds its own to those before
    first_steps, second_steps = losses[::2], losses[1::2]
    assert len(set(np.round(of_each_device, 4))) == 4
    assert all(abs(a - b) > 1e-3 for a, b in zip(first_steps, second_steps, strict=True))


def test_each_micro_batch_drops_units_of_its_own() -> None:
    """The same image everywhere: with one mask for all, each would add the same to the loss."""
    config = TrainConfig(
        model="mlp", hidden=(64,), dropout=0.5, flip=False, crop=0, learning_rate=1e-9
    )
    (batch,) = make_batches(1, 1)
    same = {name: np.repeat(x, 4, axis=0) for name, x in batch.items()}
    step, state = make_step(config, None)
    micro = functools.partial(step, accumulate=4)
    one, four = (jax.jit(f)(state, x)[1]["loss"] for f, x in ((step, batch), (micro, same)))
    assert abs(four - 4 * one) > 1e-3


def test_augmentation_changes_from_step_to_step_and_with_the_seed() -> None:
    config = TrainConfig(widths=(4,), hidden=(8,), crop=2, learning_rate=1e-12)
    step, begun = make_step(config, None)
    other = dataclasses.replace(config, seed=config.seed + 1)
    tx = make_optimizer(config, make_schedule(config, 100))
    of_another_seed = jax.jit(make_train_step(other, create_model(config, 10), tx, MEAN, STD))
    step = jax.jit(step)
    (batch,) = make_batches(1, 16)
    state, first = step(begun, batch)
    state, second = step(state, batch)
    _, other = of_another_seed(begun, batch)
    assert abs(first["loss"] - second["loss"]) > 1e-4
    assert abs(first["loss"] - other["loss"]) > 1e-4


@pytest.fixture(scope="module")
def evaluated() -> tuple[Dataset, Any, RunningSums]:
    """103 images, a network's variables, and its sums: counted over all logits at once in NumPy."""
    (data,) = make_batches(1, 103)
    split = Split(data["image"], data["label"])
    dataset = Dataset("random", "", tuple("abcdefghij"), split, split, split, MEAN, STD)
    model = create_model(SMALL, 10)
    variables = initial_state(SMALL).variables
    x = normalize(split.pixels, MEAN, STD)
    logits = np.asarray(jax.jit(model.apply)(variables, x), np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(103), split.labels].sum()
    correct = (logits.argmax(axis=1) == split.labels).sum()
    return dataset, variables, RunningSums(loss=loss, correct=correct, count=103)


@pytest.mark.fault("B10")
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 10, 16, 99])
def test_evaluation_counts_every_image_once(
    devices: int, batch_size: int, evaluated: tuple[Dataset, Any, RunningSums]
) -> None:
    dataset, variables, expected = evaluated
    model = create_model(SMALL, 10, AXIS_NAME)
    evaluate = make_evaluate(model, dataset, variables, select_devices(devices), batch_size)
    result = evaluate(variables, dataset.test)
    assert (result.count, result.correct) == (103, expected.correct)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)


def test_scores_are_of_float32_on_a_gpu_too() -> None:
    """By default it would round what it multiplies to TF32."""
    step = functools.partial(eval_step, model=create_model(SMALL, 10), mean=MEAN, std=STD)
    batch = {**make_batches(1, 8)[0], "mask": np.ones(8, np.float32)}
    traced = jax.jit(step).trace(initial_state(SMALL).variables, batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert len(products) >= 4  # two convolutions and two Dense layers
    assert all("HIGHEST" in product and "DEFAULT" not in product for product in products)


def test_the_mask_hides_whatever_is_under_it() -> None:
    model = create_model(SMALL, 10)
    state = initial_state(SMALL)
    (batch,) = make_batches(1, 8)
    step = jax.jit(functools.partial(eval_step, model=model, mean=MEAN, std=STD))
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    sums = step(state.variables, {**batch, "mask": mask})
    other = {**batch, "image": batch["image"].copy(), "mask": mask}
    other["image"][5:] = 0
    assert jax.tree.map(float, step(state.variables, other)) == jax.tree.map(float, sums)
    assert sums["count"] == 5
