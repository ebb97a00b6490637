"""The memory of a training step: counted, and as XLA says it will allocate."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import initial_train_state, make_train_step

_LARGEST_BATCH = 2**24


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device while it trains.

    Attributes:
        batch_size: images per step.
        params, batch_stats, opt_state: held from step to step.
        xla_arguments: the inputs of a step: the above, and the batch.
        xla_temporaries: activations, gradients and workspace; values that are never needed at the
            same time share memory.
        xla_total: the peak, with outputs that do not reuse an argument's memory.
    """

    batch_size: int
    params: int
    batch_stats: int
    opt_state: int
    xla_arguments: int
    xla_temporaries: int
    xla_total: int


def step_memory(
    config: TrainConfig, model: nn.Module, image_shape: ImageShape, batch_size: int
) -> StepMemory:
    """Compile the training step of ``config`` for ``batch_size``, and ask XLA; nothing is run."""
    channels = image_shape[2]
    mean, std = (0.5,) * channels, (0.25,) * channels  # arbitrary: they do not affect memory
    tx = make_optimizer(config, make_schedule(config, total_steps=1000))

    state = jax.eval_shape(lambda: initial_train_state(model, tx, image_shape, seed=0))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    step = make_train_step(config, model, tx, mean, std)
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    analysis = compile_lowered(lowered, jax.default_backend()).memory_analysis()
    assert analysis is not None, "this backend does not report its allocations"
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return StepMemory(
        batch_size=batch_size,
        params=_bytes(state.params),
        batch_stats=_bytes(state.batch_stats),
        opt_state=_bytes(state.opt_state),
        xla_arguments=arguments,
        xla_temporaries=temporaries,
        xla_total=arguments + outputs + temporaries,
    )


def largest_batch(
    config: TrainConfig,
    model: nn.Module,
    image_shape: ImageShape,
    limit: float,
    known: StepMemory,
) -> StepMemory | None:
    """The largest power of two whose step takes at most ``limit`` bytes by XLA's own count.

    The first batch tried is a guess from ``known``, which is then doubled or halved until it fits
    and twice as many images do not.

    Returns:
        None if not even one image fits.
    """

    @functools.cache
    def memory(exponent: int) -> StepMemory:
        return step_memory(config, model, image_shape, 2**exponent)

    @functools.cache
    def fits(exponent: int) -> bool:
        try:
            return memory(exponent).xla_total <= limit
        except jax.errors.JaxRuntimeError as error:  # on a GPU, compiling runs kernels
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return False

    held = known.params + known.batch_stats + known.opt_state
    per_image = max(known.xla_total - held, 1) / known.batch_size
    guess = max((limit - held) / per_image, 1)
    exponent = int(min(np.log2(guess), np.log2(_LARGEST_BATCH)))
    while exponent >= 0 and not fits(exponent):
        exponent -= 1
    while 2**exponent < _LARGEST_BATCH and fits(exponent + 1):
        exponent += 1
    return memory(exponent) if exponent >= 0 else None


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
