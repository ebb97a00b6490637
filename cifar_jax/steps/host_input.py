"""Steps whose images come from the host: tf.data prepares a batch while the previous step runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.data.input_pipeline import decode as decode  # which device_input has of its own
from cifar_jax.data.input_pipeline import eval_batches, train_batches
from cifar_jax.layout import Variables
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.parallel import (
    AXIS_NAME,
    Advance,
    Evaluate,
    compile_step,
    empty_batch,
    local_devices,
    local_rows,
    shard,
    sum_on_host,
)
from cifar_jax.steps.train_step import Sums, TrainState, eval_step


def make_advance(
    step: Callable[..., Any],
    state: TrainState,
    split: Split,
    config: TrainConfig,
    devices: Sequence[jax.Device],
    first_step: int,
) -> Advance:
    """Compile ``step``, and start reading ``split`` at ``first_step``; each call runs one step."""
    n_devices = len(local_devices(devices))
    empty = empty_batch(config.batch_size, split.image_shape, devices)
    empty["signal"] = np.zeros(n_devices, np.int32)
    compiled = compile_step(
        step, state, empty, devices, donate_state=True, deterministic=config.deterministic
    )
    batches = train_batches(
        split,
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        first_step=first_step,
        rows=local_rows(config.batch_size, devices),
    )

    def advance(
        state: TrainState, at_step: int, before_step: int, signal: int
    ) -> tuple[TrainState, Sums, int]:
        del at_step, before_step  # always one step, the next
        batch = shard(next(batches), devices)
        batch["signal"] = np.full(n_devices, signal, np.int32)
        state, sums = compiled(state, batch)
        return state, sums, 1

    return advance


def make_evaluate(
    model: nn.Module,
    dataset: Dataset,
    variables: Variables,
    devices: Sequence[jax.Device],
    batch_size: int,
    *,
    deterministic: bool = False,
) -> Evaluate:
    """Compile ``evaluate(variables, split)`` for images of ``dataset`` and a network's variables.

    Every image counts once, at any batch size and number of devices.

    Args:
        batch_size: images per step, over all devices; rounded up to a multiple of their number.
        deterministic: as in :func:`cifar_jax.steps.parallel.compile_step`.
    """
    batch_size = -(-batch_size // len(devices)) * len(devices)
    empty = empty_batch(batch_size, dataset.image_shape, devices)
    step = compile_step(
        functools.partial(
            eval_step, model=model, mean=dataset.mean, std=dataset.std, axis_name=AXIS_NAME
        ),
        variables,
        {**empty, "mask": np.zeros(empty["label"].shape, np.float32)},
        devices,
        donate_state=False,
        deterministic=deterministic,
    )
    rows = local_rows(batch_size, devices)

    def evaluate(variables: Variables, split: Split) -> RunningSums:
        total = RunningSums()
        for batch in eval_batches(split, batch_size=batch_size, rows=rows):
            total.add(sum_on_host(step(variables, shard(batch, devices))))
        return total

    return evaluate
