"""A training step and an inference of 128 images: this project, PyTorch, Keras; and the ceiling."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import paired_timing
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import ModelName, TrainConfig
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.models import ResNet9, create_model
from cifar_jax.scoring.inference import make_logits
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import AXIS_NAME, compile_step, place_state, select_devices, shard
from cifar_jax.steps.train_step import create_train_state, make_train_step
from cifar_jax.system.allocator import keep_freed_memory
from layouts.timings import make_torch_programs, timing_batch

BATCH_SIZE = 128
_IMAGE_SHAPE = (32, 32, 3)
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_CLASSES = tuple(map(str, range(10)))
_PRODUCT_SIDE = 2048

_OURS = {"framework": "cifar_jax", "layout": "NHWC", "mode": "compiled"}
_PEERS = [
    {"framework": "torch", "layout": "contiguous", "mode": "eager"},
    {"framework": "torch", "layout": "channels_last", "mode": "eager"},
    {"framework": "torch", "layout": "contiguous", "mode": "compiled"},
    {"framework": "torch", "layout": "channels_last", "mode": "compiled"},
    {"framework": "keras", "layout": "NHWC", "mode": "fit"},
]
_QUICK_PEERS = [_PEERS[1], _PEERS[4]]

_PRODUCTS = [
    {"framework": "product", "library": library, "batch_size": 1} for library in ("jax", "torch")
]

# Rounds, and the steps in each, by network. A turn takes 0.2 seconds or more, as the first steps
# after a pause are slow: threads must wake up.
_TURNS: dict[ModelName, tuple[int, int]] = {"cnn": (11, 50), "cnn-wide": (11, 3), "resnet9": (7, 1)}
_QUICK_TURNS: dict[ModelName, tuple[int, int]] = {"cnn": (3, 5), "cnn-wide": (3, 1)}


def measure(quick: bool) -> dict[str, Any]:
    """``programs`` with their medians and spread, ``pairs`` of ours and another, the ceiling."""
    rows: list[dict[str, Any]] = []
    ceilings: list[float] = []
    for model, (rounds, steps) in (_QUICK_TURNS if quick else _TURNS).items():
        specs = [
            {**program, "model": model, "batch_size": BATCH_SIZE}
            for program in [_OURS, *(_QUICK_PEERS if quick else _PEERS)]
        ]
        work = _flops(model)
        for timing in _time(specs, rounds, steps):
            row = timing.row()
            gflops = work[row["pass"]] / row["step_ms_median"] / 1e6
            rows.append({**row, "gflops": gflops})
            print(
                f"  {model:9s} {row['pass']:8s} {program_name(row):28s} "
                f"{row['step_ms_median']:7.1f} ms "
                f"({row['step_ms_min']:.1f} to {row['step_ms_max']:.1f})",
                flush=True,
            )
        for product in _time(_PRODUCTS, rounds, 3):
            ceilings.append(2 * _PRODUCT_SIDE**3 / product.row()["step_ms_median"] / 1e6)
    ceiling_gflops = max(ceilings)
    print(
        f"  a product of {_PRODUCT_SIDE}x{_PRODUCT_SIDE}: {ceiling_gflops:.0f} GFLOP/s", flush=True
    )
    for row in rows:
        row["share_of_ceiling"] = row["gflops"] / ceiling_gflops
    return {"ceiling_gflops": ceiling_gflops, "pairs": _pairs(rows), "programs": rows}


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = {(r["model"], r["pass"]): r for r in rows if r["framework"] == "cifar_jax"}
    return [
        {
            "workload": f"{row['model']} {row['pass']}, {row['batch_size']} images",
            "ours_ms": ours[row["model"], row["pass"]]["step_ms_median"],
            "peer": program_name(row),
            "peer_ms": row["step_ms_median"],
            "ratio": row["step_ms_median"] / ours[row["model"], row["pass"]]["step_ms_median"],
        }
        for row in rows
        if row["framework"] != "cifar_jax"
    ]


def program_name(row: dict[str, Any]) -> str:
    """What a reader calls the program of a row."""
    if row["framework"] == "torch":
        return f"PyTorch {row['layout']}, {row['mode']}"
    return {"cifar_jax": "cifar_jax", "keras": "Keras 3 on JAX"}[row["framework"]]


def _time(specs: list[dict[str, Any]], rounds: int, steps: int) -> list[paired_timing.Timing]:
    command = [sys.executable, "-m", "bench.steps"]
    where = Path(__file__).resolve().parents[1]
    return paired_timing.time_in_turn(command, specs, rounds=rounds, steps=steps, cwd=where)


def _flops(model: ModelName) -> dict[str, float]:
    """Floating-point operations of a batch, by the textbook: two a multiply-accumulate.

    A training step computes three things of each layer: its output, the gradient of its kernel and
    that of its input, which the first layer does not need. A program that needs fewer operations,
    as this project's convolutions do, can exceed the ceiling.
    """
    network = create_model(TrainConfig(model=model), len(_CLASSES))
    macs = [row.macs for row in layer_table(network, _IMAGE_SHAPE, BATCH_SIZE)]
    first = next(n for n in macs if n)
    return {
        "forward": 2.0 * BATCH_SIZE * sum(macs),
        "train": 2.0 * BATCH_SIZE * (3 * sum(macs) - first),
    }


def make_programs(spec: dict[str, Any]) -> Any:
    """What a worker times: ``forward`` and ``train``, or a product of matrices."""
    makers = {
        "cifar_jax": _make_own,
        "torch": make_torch_programs,
        "keras": _make_keras,
        "product": _make_product,
    }
    return makers[spec["framework"]](spec)


def _make_own(spec: dict[str, Any]) -> Any:
    """The step of ``cifar_jax.train`` and the answers of ``cifar_jax.predict``, of uint8 images.

    Unlike the other programs they normalise the images, and ``forward`` fetches the answers to the
    host.
    """
    keep_freed_memory()  # as every command does
    devices = select_devices(1)
    config = TrainConfig(
        model=spec["model"], learning_rate=1e-3, schedule="constant", flip=False, crop=0
    )
    model = create_model(config, len(_CLASSES), AXIS_NAME)
    tx = make_optimizer(config, make_schedule(config, 1))
    state: Any = jax.device_get(create_train_state(model, tx, _IMAGE_SHAPE, seed=0))
    network = TrainedNetwork(config, _CLASSES, _IMAGE_SHAPE, _MEAN, _STD, state.variables)
    images, labels = uint8_batch(spec["batch_size"])
    batch = shard({"image": images, "label": labels}, devices)
    step = make_train_step(config, model, tx, _MEAN, _STD, AXIS_NAME)
    compiled = compile_step(step, state, batch, devices, donate_state=True)
    state = place_state(state, devices)
    logits = make_logits(network)

    def forward(steps: int) -> None:
        for _ in range(steps):
            logits(images)

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, sums = compiled(state, batch)
        jax.block_until_ready((state, sums))

    return {"forward": forward, "train": train}, dict


def _make_keras(spec: dict[str, Any]) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # in its own process only; TensorFlow installs it

    network = _keras_network(spec["model"])
    network.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, labels = timing_batch(spec["batch_size"])

    def forward(steps: int) -> None:
        for _ in range(steps):
            network.predict_on_batch(images)

    @functools.cache  # made in the round that is not counted
    def epoch(steps: int) -> tuple[Any, Any]:
        return np.concatenate([images] * steps), np.concatenate([labels] * steps)

    def train(steps: int) -> None:
        network.fit(*epoch(steps), batch_size=spec["batch_size"], shuffle=False, verbose=0)

    return {"forward": forward, "train": train}, dict


def _keras_network(name: ModelName) -> Any:
    """The network of that name in Keras's own layers."""
    from keras import Input, Model, layers

    model = create_model(TrainConfig(model=name), len(_CLASSES))
    norm = isinstance(model, ResNet9)

    def block(x: Any, features: int, pool: bool = False) -> Any:
        x = layers.Conv2D(features, 3, padding="same", use_bias=not norm)(x)
        if norm:
            x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        x = layers.ReLU()(x)
        return layers.MaxPooling2D()(x) if pool else x

    x = start = Input(_IMAGE_SHAPE)
    if isinstance(model, ResNet9):
        first, second, third, fourth = model.widths
        x = block(block(x, first), second, pool=True)
        x = layers.Add()([x, block(block(x, second), second)])
        x = block(block(x, third, pool=True), fourth, pool=True)
        x = layers.Add()([x, block(block(x, fourth), fourth)])
        x = layers.Dense(len(_CLASSES), use_bias=False)(layers.GlobalMaxPooling2D()(x))
        return Model(start, layers.Rescaling(0.125)(x))
    for index, features in enumerate(model.widths, start=1):
        x = block(x, features, pool=index % model.convs_per_pool == 0)
    x = layers.Flatten()(x)
    for features in model.hidden:
        x = layers.Dense(features, activation="relu")(x)
    return Model(start, layers.Dense(len(_CLASSES))(x))


def _make_product(spec: dict[str, Any]) -> Any:
    """A square matrix product in float32, by the library's own routine."""
    keep_freed_memory()
    side = np.random.default_rng(0).normal(size=(_PRODUCT_SIDE, _PRODUCT_SIDE)).astype(np.float32)
    if spec["library"] == "jax":
        a = jax.device_put(side)
        product = functools.partial(jax.jit(jax.numpy.matmul), a, a)
    else:
        import torch  # in its own process only

        b = torch.tensor(side)
        product = functools.partial(torch.matmul, b, b)

    def run(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(product())  # torch returns when it is done

    return {"product": run}, dict


def uint8_batch(batch_size: int) -> tuple[Any, Any]:
    """Images ``[B, 32, 32, 3]`` of noise and labels ``[B]``, as they come from a file."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, *_IMAGE_SHAPE), dtype=np.uint8)
    return images, rng.integers(0, len(_CLASSES), batch_size).astype(np.int32)


if __name__ == "__main__":
    paired_timing.serve(json.loads(sys.argv[1]), make_programs)
