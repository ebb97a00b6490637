"""Timed runs: their summary, their floating-point operations, and where a GPU's time goes."""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from scipy import stats
from tqdm import tqdm

from airbench.optimizer import make_optimizer
from airbench.recipe import Recipe
from airbench.run import VIEW_WEIGHTS, Examples, Setting, train_and_score
from cifar_jax.data.dataset import Split, channel_statistics
from cifar_jax.networks.airbench import Airbench
from cifar_jax.networks.initializers import WHITENING
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import initial_train_state

Run = Callable[[int], dict[str, Any]]

_KERNELS_NAMED = 30
_FORWARD, _INPUT_GRADIENT, _KERNEL_GRADIENT = (
    f"convolutions: {what}"
    for what in ("forward", "gradient of the input", "gradient of the kernel")
)


def make_setting(recipe: Recipe, train: Split, num_classes: int) -> Setting:
    """The network, optimizer and normalisation for ``train``."""
    dtype = jnp.dtype(recipe.dtype)
    network = Airbench
    if recipe.fused:
        from airbench.fused import FusedAirbench

        network = FusedAirbench
    model = network(num_classes, recipe.widths, recipe.deep, dtype=dtype)
    tx = make_optimizer(recipe, len(train) // recipe.batch_size)
    return Setting(recipe, model, tx, *channel_statistics(train.pixels))


def takes_kernels() -> bool:
    """Whether Triton, and so kernels.py, runs here: on NVIDIA's GPUs from Ampere on."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", "")) >= 8
    except ValueError:  # no GPU, or one of AMD's, whose capability is a name: not tried
        return False


def compile_run(setting: Setting, train: Split, test: Split) -> tuple[Run, dict[str, float]]:
    """A function that does the run of a seed, and the seconds that compiling it took.

    Cold: with nothing compiled before; warm: with what the first compilation left on the disk. On a
    CPU with a terminal it is compiled once more, to move a progress bar after each step.
    """
    on_device = [
        Examples(jnp.asarray(split.pixels), jnp.asarray(split.labels)) for split in (train, test)
    ]
    begin: Any = jax.jit(
        lambda seed: initial_train_state(setting.model, setting.tx, train.image_shape, seed)
    )
    state = begin(0)

    def compile_for(setting: Setting) -> jax.stages.Compiled:
        program = jax.jit(functools.partial(train_and_score, setting=setting))
        lowered = program.lower(state, jax.random.key(0), *on_device)
        return compile_lowered(lowered, jax.default_backend())

    compiled, seconds = _cold_and_warm(lambda: compile_for(setting))
    begin = begin.lower(0).compile()
    steps = setting.recipe.epochs * (len(train) // setting.recipe.batch_size)
    bars: list[tqdm[Any]] = []
    if shows_progress():
        compiled = compile_for(setting._replace(on_step=lambda: bars[-1].update()))

    def run(seed: int) -> dict[str, Any]:
        key = jax.block_until_ready(jax.random.key(seed))
        with tqdm(total=steps, unit="steps", leave=False, disable=not shows_progress()) as bar:
            bars[:] = [bar]
            started = time.perf_counter()
            state = jax.block_until_ready(begin(seed))
            ready = time.perf_counter()
            result = compiled(state, key, *on_device)
            jax.block_until_ready(result)
            done = time.perf_counter()
        accuracy = float(result["correct"]) / len(test)
        ended = time.perf_counter()
        return {
            "seed": seed,
            "accuracy": accuracy,
            "seconds": done - ready,
            "seconds_strict": ended - started,
            "loss": np.asarray(result["loss"]),
        }

    return run, seconds


def _cold_and_warm(
    compile_program: Callable[[], jax.stages.Compiled],
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The program, and the seconds of compiling it: ``cold``, then ``warm``."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # it is there
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            for name in ("cold", "warm"):
                compilation_cache.reset_cache()  # else it stays open on the folder before
                started = time.perf_counter()
                compiled = compile_program()
                seconds[name] = time.perf_counter() - started
                jax.clear_caches()
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()
    return compiled, seconds


def shows_progress() -> bool:
    """Whether a run takes long enough for a progress bar, and someone is there to see it."""
    return jax.default_backend() == "cpu" and sys.stderr.isatty()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, spread and the 95 % interval of the mean, of accuracies in 0..1; and of seconds."""
    accuracies = [run["accuracy"] for run in runs]
    n = len(runs)
    mean = statistics.mean(accuracies)
    found: dict[str, Any] = {"n": n, "mean_accuracy": mean, "std": None, "interval_95": None}
    if n > 1:
        found["std"] = statistics.stdev(accuracies)
        margin = float(stats.t.ppf(0.975, n - 1)) * found["std"] / math.sqrt(n)
        found["interval_95"] = [mean - margin, mean + margin]
    for name in ("seconds", "seconds_strict"):
        values = [run[name] for run in runs if name in run]
        if not values:
            continue
        found[f"{name}_mean"] = statistics.mean(values)
        found[f"{name}_std"] = statistics.stdev(values) if n > 1 else None
    return found


def run_flop(setting: Setting, n_train: int, n_test: int, image_shape: Any) -> dict[str, float]:
    """Floating-point operations of convolutions and the head in a run, by kind.

    Convolutions are counted as they are written, in whatever form they are computed: Winograd's, on
    a CPU, multiplies less, and pairs of columns, on a GPU, more. A multiply-accumulate counts as
    two. A layer's forward pass, the gradient of its kernel and that of its input cost the same. The
    whitening needs only the forward pass, and the layer after it needs the gradient of its input
    only while the whitening's bias learns.
    """
    recipe = setting.recipe
    rows = [row for row in layer_table(setting.model, image_shape, 1) if row.macs]
    whitening, after, *_ = rows
    assert whitening.name == WHITENING
    forward = sum(row.macs for row in rows)
    learned = forward - whitening.macs
    images = n_train // recipe.batch_size * recipe.batch_size
    later = max(recipe.epochs - recipe.whitening_epochs, 0)
    return {
        _FORWARD: 2.0 * (images * recipe.epochs + len(VIEW_WEIGHTS) * n_test) * forward,
        _INPUT_GRADIENT: 2.0 * images * (recipe.epochs * learned - later * after.macs),
        _KERNEL_GRADIENT: 2.0 * images * recipe.epochs * learned,
    }


def ceiling_flops(dtype: str, side: int) -> float:
    """Floating-point operations a second of this device in the product of two square matrices."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        results = [product(a, b) for _ in range(3)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - started) / 3)
    return 2 * side**3 / min(times)


def kernels(run: Run) -> dict[str, Any]:
    """A GPU's seconds in one run: by kind of kernel, and for the longest kernels.

    Convolutions are recognised by the names that XLA gives to operations.
    """
    seconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(0)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                operation = next((str(v) for name, v in event.stats if name == "hlo_op"), "")
                name = operation if operation.startswith("cudnn-conv") else event.name
                seconds[name] += event.duration_ns / 1e9
                times[name] += 1
    kinds: Counter[str] = Counter()
    for name, value in seconds.items():
        kinds[_kind(name)] += value
    return {
        "seconds_by_kind": dict(kinds.most_common()),
        "longest": [
            {"name": name[:120], "times": times[name], "seconds": value}
            for name, value in seconds.most_common(_KERNELS_NAMED)
        ],
    }


def _kind(name: str) -> str:
    for start, kind in (
        ("cudnn-conv-bw-input", _INPUT_GRADIENT),
        ("cudnn-conv-bw-filter", _KERNEL_GRADIENT),
        ("cudnn-conv", _FORWARD),
    ):
        if name.startswith(start):
            return kind
    # Triton's and CUTLASS's, and cuBLAS's own.
    return "products of matrices" if "gemm" in name or name.startswith("nvjet") else "all else"
