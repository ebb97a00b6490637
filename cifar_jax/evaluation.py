"""Scoring a split: every image once, at any batch size and number of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.dataset import Dataset, Split
from cifar_jax.input_pipeline import eval_batches
from cifar_jax.metrics import RunningSums
from cifar_jax.parallel import (
    AXIS_NAME,
    compile_step,
    empty_batch,
    rows_of_this_process,
    shard,
    to_floats,
)
from cifar_jax.train_step import Variables, eval_step

Evaluate = Callable[[Variables, Split], RunningSums]


def make_evaluate(
    model: nn.Module,
    dataset: Dataset,
    variables: Variables,
    devices: Sequence[jax.Device],
    batch_size: int,
) -> Evaluate:
    """Compile ``evaluate(variables, split)`` for images of ``dataset`` and a network's variables.

    Args:
        batch_size: images a step, over all devices; rounded up to a multiple of their number.
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
    )
    rows = rows_of_this_process(batch_size, devices)

    def evaluate(variables: Variables, split: Split) -> RunningSums:
        total = RunningSums()
        for batch in eval_batches(split, batch_size=batch_size, rows=rows):
            total.add(to_floats(step(variables, shard(batch, devices))))
        return total

    return evaluate
