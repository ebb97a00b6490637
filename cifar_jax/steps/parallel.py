"""One step on one or many devices: ``jax.pmap`` with a state that is replicated on every device.

The devices may belong to several processes. Each process then passes its own devices' share of a
batch, and all of them get the same results.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from cifar_jax.data.dataset import ImageShape, Split
from cifar_jax.errors import ResourceError, first_line
from cifar_jax.layout import Variables
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.train_step import Sums, TrainState
from cifar_jax.system.allocator import give_back_freed_memory
from cifar_jax.system.compilation_cache import nothing_kept
from cifar_jax.system.stop_signals import signals_held

AXIS_NAME = "batch"

# Advances a training state: (state, current step, step to stop before, signal) -> (state, sums of
# each step, number of steps done). Runs at least one step, and as many as fit into one dispatch.
Advance = Callable[[TrainState, int, int, int], tuple[TrainState, Sums, int]]
# The sums over a whole split: (variables, split) -> sums.
Evaluate = Callable[[Variables, Split], RunningSums]

# XLA's YNN fusions, on by default in jaxlib 0.10, make convolutions on a CPU up to twice as slow.
CPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}

# In bytes: XLA's alignment of a program's arguments on a CPU.
_ALIGNMENT = 64

_DETERMINISTIC: dict[str, str | bool] = {
    # This also turns off the search for the fastest kernel, whose result can differ between runs.
    "xla_gpu_deterministic_ops": True,
    # Do not use what the search of another run has found, either.
    "xla_gpu_per_fusion_autotune_cache_dir": "",
}


def select_devices(count: int | Literal["all"]) -> list[jax.Device]:
    """The first ``count`` devices of each process, or all.

    Also disables asynchronous dispatch on a single CPU device, if called before anything else
    starts JAX's devices, so that the calling thread runs the programs: see
    :mod:`cifar_jax.system.allocator`.

    Raises:
        ResourceError: there are fewer devices, none of the kind in ``JAX_PLATFORMS``, or
            ``JAX_DISABLE_JIT`` is set.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise ResourceError(
            "JAX_DISABLE_JIT is set, but the programs here are compiled ahead of time",
            fix="unset JAX_DISABLE_JIT",
        )
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a jax without CUDA
        reason = f": {first_line(error)}" if str(error) else ""
        raise ResourceError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}, and jax finds no such device"
            f"{reason}",
            fix="install the extra for that device, or unset JAX_PLATFORMS to use what there is",
        ) from error
    if count == "all":
        return devices
    local = jax.local_device_count()
    if count > local:
        platform = devices[0].platform
        fix = f"use --devices {local}"
        if platform == "cpu":
            fix += f", or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise ResourceError(
            f"--devices {count}, but jax sees {local} {platform} device(s)",
            fix=fix,
        )
    processes = range(jax.process_count())
    return [device for i in processes for device in jax.local_devices(process_index=i)[:count]]


def local_devices(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of ``devices`` that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def local_rows(batch_size: int, devices: Sequence[jax.Device]) -> slice:
    """The images of a global batch that belong to this process's ``devices``; contiguous."""
    share = batch_size // len(devices)
    first = devices.index(local_devices(devices)[0])
    return slice(first * share, (first + len(local_devices(devices))) * share)


def aligned(x: NDArray[Any]) -> NDArray[Any]:
    """``x``, copied if necessary to an address from which a program on a CPU can read it in place.

    From any other address one of JAX's threads copies it, and then also runs the program, whatever
    :func:`select_devices` has set.
    """
    if x.flags.c_contiguous and x.ctypes.data % _ALIGNMENT == 0:
        return x
    memory = np.empty(x.nbytes + _ALIGNMENT, np.uint8)
    copy = memory[-memory.ctypes.data % _ALIGNMENT :][: x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def shard(batch: dict[str, NDArray[Any]], devices: Sequence[jax.Device]) -> dict[str, NDArray[Any]]:
    """``[B, ...]`` -> ``[D, B/D, ...]``: each device's share of this process's part of a batch."""
    count = len(local_devices(devices))
    return {name: aligned(x).reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}


def empty_batch(
    batch_size: int, image_shape: ImageShape, devices: Sequence[jax.Device]
) -> dict[str, NDArray[Any]]:
    """A batch of zeros in the form that :func:`shard` returns, to compile for."""
    share = (len(local_devices(devices)), batch_size // len(devices))
    return {
        "image": np.zeros((*share, *image_shape), np.uint8),
        "label": np.zeros(share, np.int32),
    }


def compile_step(
    step: Callable[..., Any],
    state: Any,
    batch: dict[str, NDArray[Any]],
    devices: Sequence[jax.Device],
    *,
    donate_state: bool,
    deterministic: bool = False,
    shared: tuple[jax.Array, ...] = (),
) -> Callable[..., Any]:
    """Compile ``step(state, batch, *shared)`` with ``jax.pmap``, ahead of time.

    The state and the results have no device axis: not before, not after, and not in a checkpoint.
    ``step`` must therefore leave the same values on every device, by ``pmean`` and ``psum``.

    Args:
        state, batch: examples with the shapes to compile for; each array of the batch has a leading
            axis of this process's devices.
        donate_state: whether the new state reuses the memory of the old one.
        deterministic: whether a GPU, too, computes the same bits in each run.
        shared: arrays that are already replicated on every device, by :func:`replicate`.

    Returns:
        A function of a state and a batch.
    """
    mapped = jax.pmap(
        step,
        axis_name=AXIS_NAME,
        in_axes=(None, 0, *(None for _ in shared)),
        out_axes=None,
        donate_argnums=(0,) if donate_state else (),
        devices=devices,
    )
    several_on_cpu = len(devices) > 1 and devices[0].platform == "cpu"
    # Loaded from the cache, such a program loses the order of its all-reduces, and two of them can
    # interleave, which aborts the process and could give wrong sums (jaxlib 0.10.2).
    with nothing_kept() if several_on_cpu else contextlib.nullcontext():
        compiled = compile_lowered(
            mapped.lower(state, batch, *shared), devices[0].platform, deterministic=deterministic
        )

    whole, divided = _sharding(devices), _sharding(devices, AXIS_NAME)
    several_processes = not divided.is_fully_addressable

    def call(state: Any, batch: dict[str, NDArray[Any]]) -> Any:
        # JAX places the batch itself if it can: half a millisecond faster than _place.
        placed = _place(batch, divided) if several_processes else batch
        result = compiled(_place(state, whole), placed, *shared)
        # With several steps in flight, XLA's CPU devices starve each other of threads and hang.
        return jax.block_until_ready(result) if several_on_cpu else result

    return call


def compiler_options(platform: str, *, deterministic: bool = False) -> dict[str, str | bool]:
    """XLA's options for programs on ``platform``, besides ``XLA_FLAGS``."""
    options = CPU_COMPILER_OPTIONS if platform == "cpu" else {}
    return {**options, **_DETERMINISTIC} if deterministic else dict(options)


def compile_lowered(
    lowered: jax.stages.Lowered, platform: str, *, deterministic: bool = False
) -> jax.stages.Compiled:
    """Compile with :func:`compiler_options`."""
    options = compiler_options(platform, deterministic=deterministic)
    with signals_held():
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if platform != "cpu" or "No such compile option" not in str(error):
                raise
            return lowered.compile()  # another jaxlib, without the option: only slower
        finally:
            give_back_freed_memory()


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """The arrays of ``tree``, replicated on ``devices``."""
    return _place(tree, _sharding(devices))


def place_state(state: Any, devices: Sequence[jax.Device]) -> Any:
    """``state`` replicated on ``devices``, in memory that the first step can reuse.

    A CPU reads NumPy arrays in place, and they cannot be donated: the first step would allocate its
    results behind its own memory, which would then be too small for the next steps.
    """
    placed = replicate(state, devices)
    if devices[0].platform != "cpu":
        return placed
    with signals_held():
        return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(placed)


def _sharding(devices: Sequence[jax.Device], *axes: str) -> jax.sharding.Sharding:
    """A sharding over ``devices``: split along ``axes``, or replicated without any."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS_NAME,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def _place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The arrays of ``tree`` on the devices; those already there are left as they are."""

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def sum_on_host(sums: dict[str, jax.Array]) -> dict[str, float]:
    """The sums of one step, or ``[n]`` of n steps, as floats; waits for these steps."""
    return {name: float(np.sum(np.asarray(x), dtype=np.float64)) for name, x in sums.items()}
