"""Does a step wait for its images? The same steps from tf.data and from memory, in turn."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, ImageFiles, Split, epoch_order
from cifar_jax.data.input_pipeline import decode, train_batches
from cifar_jax.data.sources import load_dataset
from cifar_jax.networks.models import create_model
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import AXIS_NAME, compile_step, select_devices, shard
from cifar_jax.steps.train_step import create_train_state, make_train_step
from cifar_jax.system.allocator import keep_freed_memory

_BATCH_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--max-train-examples", type=int)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    keep_freed_memory()  # as every command does
    dataset = load_dataset(
        arguments.data,
        data_dir=arguments.data_dir,
        max_train_examples=arguments.max_train_examples,
        cache_mb=0,
    )
    steps = _Steps(dataset)
    started = time.perf_counter()
    files = dataset.train
    decoded = _decoded(files)
    decoding = time.perf_counter() - started
    times: dict[str, list[float]] = {"memory": [], "tf.data": [], "streamed": [], "waiting": []}
    epochs = arguments.rounds + 1
    pipelines = {"tf.data": _by_pipeline(decoded, epochs), "streamed": _by_pipeline(files, epochs)}
    n = len(files) // _BATCH_SIZE
    for epoch in range(epochs):
        found = {"memory": steps.run(_in_memory(decoded, epoch))}
        for name, pipeline in pipelines.items():
            found[name] = steps.run(itertools.islice(pipeline, n))
        if epoch:  # the first one warms up
            for name, (seconds, waiting) in found.items():
                times[name].append(seconds)
                if name == "tf.data":
                    times["waiting"].append(waiting / seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    arguments.output.write_text(
        json.dumps(
            {
                "steps": n,
                "decoding_seconds": decoding,
                "epoch_seconds": times,
                "pipeline_ratio": medians["memory"] / medians["tf.data"],
                "streamed_ratio": medians["memory"] / medians["streamed"],
                "waiting_share": medians["waiting"],
            }
        )
    )


class _Steps:
    """The compiled step of ``cifar_jax.train`` and its state."""

    def __init__(self, dataset: Dataset) -> None:
        self._devices = select_devices(1)
        config = TrainConfig()
        model = create_model(config, len(dataset.class_names), AXIS_NAME)
        tx = make_optimizer(config, make_schedule(config, 1000))
        self._state: Any = create_train_state(model, tx, dataset.image_shape, seed=0)
        step = make_train_step(config, model, tx, dataset.mean, dataset.std, AXIS_NAME)
        batch = next(_in_memory(_decoded(dataset.train.take(np.arange(_BATCH_SIZE))), 0))
        self._compiled = compile_step(
            step, self._state, shard(batch, self._devices), self._devices, donate_state=True
        )

    def run(self, batches: Iterator[dict[str, Any]]) -> tuple[float, float]:
        """Train on all of them: seconds, and how many of those were spent waiting for a batch."""
        waiting = 0.0
        started = time.perf_counter()
        in_flight: list[Any] = []
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waiting += time.perf_counter() - asked
            if batch is None:
                break
            self._state, sums = self._compiled(self._state, shard(batch, self._devices))
            in_flight.append(sums)
            if len(in_flight) > 2:
                jax.block_until_ready(in_flight.pop(0))
        jax.block_until_ready(self._state)
        return time.perf_counter() - started, waiting


def _decoded(split: Split) -> Split:
    return decode(split) if isinstance(split.images, ImageFiles) else split


def _in_memory(split: Split, epoch: int) -> Iterator[dict[str, Any]]:
    """Batches that are ready in memory: nothing is left to gather, decode or copy."""
    order = epoch_order(len(split), 0, epoch)
    order = order[: len(order) // _BATCH_SIZE * _BATCH_SIZE].reshape(-1, _BATCH_SIZE)
    return iter([{"image": split.pixels[i], "label": split.labels[i]} for i in order])


def _by_pipeline(split: Split, epochs: int) -> Iterator[dict[str, Any]]:
    """One pipeline for all epochs, as in ``cifar_jax.train``."""
    return train_batches(split, batch_size=_BATCH_SIZE, seed=0, epochs=epochs, first_step=0)


if __name__ == "__main__":
    main()
