"""One step on one or many devices: ``jax.pmap`` with a state that every device holds whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray

from cifar_jax.dataset import ImageShape
from cifar_jax.errors import CifarJaxError, ExitCode

AXIS_NAME = "batch"

# XLA's YNN fusions, on by default in this jaxlib, make convolutions on a CPU up to twice as slow.
CPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


def select_devices(count: int | Literal["all"]) -> list[jax.Device]:
    """The first ``count`` devices, or all.

    Raises:
        CifarJaxError: environment; there are fewer.
    """
    devices = jax.devices()
    if count == "all":
        return devices
    if count > len(devices):
        platform = devices[0].platform
        fix = f"use --devices {len(devices)}"
        if platform == "cpu":
            fix += f", or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"--devices {count}, but jax sees {len(devices)} {platform} device(s)",
            fix=fix,
        )
    return devices[:count]


def shard(batch: dict[str, NDArray[Any]], devices: Sequence[jax.Device]) -> dict[str, NDArray[Any]]:
    """``[B, ...]`` -> ``[D, B/D, ...]``: each device's share of a batch."""
    return {name: x.reshape(len(devices), -1, *x.shape[1:]) for name, x in batch.items()}


def compile_step(
    step: Callable[..., Any],
    state: Any,
    batch_size: int,
    image_shape: ImageShape,
    devices: Sequence[jax.Device],
    *,
    returns_state: bool,
) -> Callable[..., Any]:
    """Compile ``step(state, batch)`` with ``jax.pmap``, ahead of time, for one size of batch.

    The state is not mapped: it has no device axis, before, after and in a checkpoint alike. That
    trusts ``step`` to leave every device with the same state, which its ``pmean`` does.

    Args:
        state: a state (or variables) of the shapes to compile for.
        batch_size: global; a multiple of the number of devices.
        returns_state: True for a step of training, which returns ``(state, sums)`` and reuses the
            given state's memory; False for one of evaluation, which returns ``sums`` and whose
            batch has a mask. ``sums`` get a leading device axis.
    """
    share = (len(devices), batch_size // len(devices))
    batch = {
        "image": jax.ShapeDtypeStruct((*share, *image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct(share, np.int32),
    }
    if not returns_state:
        batch["mask"] = jax.ShapeDtypeStruct(share, np.float32)
    mapped = jax.pmap(
        step,
        axis_name=AXIS_NAME,
        in_axes=(None, 0),
        out_axes=(None, 0) if returns_state else 0,
        donate_argnums=(0,) if returns_state else (),
        devices=devices,
    )
    compiled = compile_lowered(mapped.lower(state, batch), devices[0].platform)
    if len(devices) == 1 or devices[0].platform != "cpu":
        return compiled
    # With several steps in flight, XLA's CPU devices starve each other of threads and hang.
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


def compile_lowered(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """Compile with the options that are best for ``platform``."""
    if platform != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # another jaxlib: without the option, only slower


def sum_over_devices(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Per-device sums ``[D]`` to floats; waits for the step that makes them."""
    return {name: float(np.sum(np.asarray(x), dtype=np.float64)) for name, x in sums.items()}
