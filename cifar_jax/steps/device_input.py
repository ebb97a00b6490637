"""Steps whose images are on the device: many steps per dispatch, without TensorFlow or the host.

Every device holds all decoded images as uint8, and each step receives the indices of its batch. The
order is that of tf.data's batches, so that the step sees the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from numpy.typing import NDArray

from cifar_jax.config import TrainConfig
from cifar_jax.data import images
from cifar_jax.data.dataset import Dataset, ImageFiles, Split, epoch_order
from cifar_jax.errors import ResourceError
from cifar_jax.layout import Variables
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.parallel import (
    AXIS_NAME,
    Advance,
    Evaluate,
    compile_step,
    local_devices,
    local_rows,
    replicate,
    sum_on_host,
)
from cifar_jax.steps.train_step import Sums, TrainState, eval_step

# The rest is left for the state and the activations: a guess.
_SHARE_FOR_IMAGES = 0.9

# On a CPU, where a step can take a tenth of a second, return often enough for the progress bar and
# for Ctrl-C.
_MOST_STEPS_ON_A_CPU = 32


def decode(split: Split) -> Split:
    """The same split, decoded to the same pixels as tf.data's batches."""
    assert isinstance(split.images, ImageFiles)
    if split.images.resize:  # Pillow rounds differently from TensorFlow when it resizes
        from cifar_jax.data.input_pipeline import decode as decode_by_tensorflow

        return decode_by_tensorflow(split)
    return images.decode(split)


def room_mb(devices: Sequence[jax.Device]) -> int:
    """Megabytes of images that fit on each device, and on the host that decodes them."""
    own = local_devices(devices)
    stats = own[0].memory_stats()
    if stats is None:  # a CPU, whose devices share the host's memory with the decoded images
        free = _available_bytes() // (len(own) + 1)
    else:
        limit = stats.get("bytes_limit", math.inf)
        free = min(limit - stats["bytes_in_use"], _available_bytes())
    return int(_SHARE_FOR_IMAGES * free) >> 20


def check_fits(dataset: Dataset, room_mb: float) -> None:
    """Raise ``ResourceError`` unless all decoded images fit together.

    The test images are loaded last, while the others are still in memory.
    """
    splits, shape = (dataset.train, dataset.val, dataset.test), dataset.image_shape
    count = sum(map(len, splits))
    megabytes = count * np.prod(shape) / 2**20
    if megabytes > room_mb:
        raise ResourceError(
            f"--input device: {count:,} images of {'x'.join(map(str, shape))} "
            f"take {megabytes:,.2f} MB decoded, and there is room for {room_mb:,} MB",
            fix="use --input tf.data, which streams them, or a smaller --image-size",
        )


def make_advance(
    step: Callable[..., Any],
    state: TrainState,
    split: Split,
    config: TrainConfig,
    devices: Sequence[jax.Device],
    first_step: int,
) -> Advance:
    """Put ``split`` on the devices, and compile ``step`` for many steps per dispatch."""
    del first_step  # each call is given its position
    held = _place(split, devices)
    batch_size, n_devices = config.batch_size, len(local_devices(devices))
    steps_per_epoch = len(split) // batch_size
    rows = local_rows(batch_size, devices)
    many_steps = _scan(step)
    order_of = functools.lru_cache(maxsize=1)(
        functools.partial(epoch_order, len(split), config.seed)
    )

    def batches(at_step: int, n: int, signal: int) -> dict[str, NDArray[np.int32]]:
        epoch, done = divmod(at_step, steps_per_epoch)
        order = order_of(epoch)[done * batch_size : (done + n) * batch_size]
        index = order.reshape(n, batch_size)[:, rows].astype(np.int32)
        return {
            "index": _by_device(index, n_devices),
            "signal": np.full((n_devices, n), signal, np.int32),
        }

    @functools.cache
    def compiled(n: int) -> Callable[..., Any]:
        return compile_step(
            many_steps,
            state,
            batches(0, n, 0),
            devices,
            donate_state=True,
            deterministic=config.deterministic,
            shared=held,
        )

    save_every = min(config.checkpoint_every or steps_per_epoch, steps_per_epoch)
    at_once = _steps_at_once(devices[0].platform, steps_per_epoch, save_every)
    for n in (at_once, steps_per_epoch % at_once):
        if n > 0:
            compiled(n)

    def advance(
        state: TrainState, at_step: int, before_step: int, signal: int
    ) -> tuple[TrainState, Sums, int]:
        # Nearly always one of the two numbers compiled above; any other compiles anew.
        n = min(at_once - at_step % steps_per_epoch % at_once, before_step - at_step)
        state, sums = compiled(n)(state, batches(at_step, n, signal))
        return state, sums, n

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
    """As :func:`cifar_jax.steps.host_input.make_evaluate`, with the images on the devices."""
    batch_size = -(-batch_size // len(devices)) * len(devices)
    rows = local_rows(batch_size, devices)
    n_devices = len(local_devices(devices))
    bound_step = functools.partial(
        eval_step, model=model, mean=dataset.mean, std=dataset.std, axis_name=AXIS_NAME
    )
    many_steps = _scan(lambda variables, batch: (variables, bound_step(variables, batch)))

    def evaluation_of(split: Split) -> Callable[[Variables], RunningSums]:
        if isinstance(split.images, ImageFiles):
            split = decode(split)
        n = -(-len(split) // batch_size)
        index = np.arange(n * batch_size).reshape(n, batch_size)[:, rows]
        mask = index < len(split)
        batch = {
            "index": _by_device(np.where(mask, index, 0).astype(np.int32), n_devices),
            "mask": _by_device(mask.astype(np.float32), n_devices),
        }
        at_once = _steps_at_once(devices[0].platform, n, n)
        dispatches = [
            {name: x[:, start : start + at_once] for name, x in batch.items()}
            for start in range(0, n, at_once)
        ]
        compiled = compile_step(
            lambda *arguments: many_steps(*arguments)[1],
            variables,
            dispatches[0],
            devices,
            donate_state=False,
            deterministic=deterministic,
            shared=_place(split, devices),
        )

        def evaluate(variables: Variables) -> RunningSums:
            total = RunningSums()
            for dispatch in dispatches:
                total.add(sum_on_host(compiled(variables, dispatch)))
            return total

        return evaluate

    validate = evaluation_of(dataset.val)

    def evaluate(variables: Variables, split: Split) -> RunningSums:
        return validate(variables) if split is dataset.val else evaluation_of(split)(variables)

    return evaluate


def _steps_at_once(platform: str, steps: int, save_every: int) -> int:
    """How many of ``steps`` one dispatch runs: all up to a save, or on a CPU a part of them.

    That part divides ``steps`` and ``save_every``, so that a single program suffices.
    """
    if platform != "cpu":
        return save_every
    common = math.gcd(steps, save_every)
    return max(n for n in range(1, min(common, _MOST_STEPS_ON_A_CPU) + 1) if common % n == 0)


def _place(split: Split, devices: Sequence[jax.Device]) -> tuple[jax.Array, jax.Array]:
    return replicate(split.pixels, devices), replicate(split.labels, devices)


def _by_device(rows: NDArray[Any], n_devices: int) -> NDArray[Any]:
    """``[n, B]`` -> ``[D, n, B/D]``: each device's share of each of n batches."""
    return np.moveaxis(rows.reshape(len(rows), n_devices, -1), 1, 0)


def _scan(step: Callable[..., Any]) -> Callable[..., Any]:
    """Turn ``step(carry, batch)`` into a function of many steps, with ``index`` instead of images.

    Each array of the batch, and each sum, gets the steps as its first axis. A single step is not
    made a loop.
    """

    def many_steps(
        carry: Any, batch: dict[str, jax.Array], pixels: jax.Array, labels: jax.Array
    ) -> tuple[Any, Sums]:
        def one_step(carry: Any, batch: dict[str, jax.Array]) -> tuple[Any, Sums]:
            index = batch["index"]
            rest = {name: x for name, x in batch.items() if name != "index"}
            return step(carry, {**rest, "image": pixels[index], "label": labels[index]})

        if len(batch["index"]) > 1:
            return lax.scan(one_step, carry, batch)
        carry, sums = one_step(carry, {name: x[0] for name, x in batch.items()})
        return carry, {name: x[None] for name, x in sums.items()}

    return many_steps


def _available_bytes() -> int:
    """Free memory of the host as Linux reports it; elsewhere, more than any machine has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 50
