"""The same training in both frameworks, image for image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import layout, parity, torch_reference
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, ImageFiles, Split, epoch_order, stratified_choice
from cifar_jax.data.sources import load_dataset
from cifar_jax.networks.models import Model, create_model
from cifar_jax.steps.augment import make_augmentation
from cifar_jax.steps.train_step import normalize
from layouts.networks import initial_variables


def train_in_both(source: str, data_dir: str | None, *, quick: bool) -> dict[str, Any]:
    """Train the tutorial's network in both from the same weights, on the same augmented images.

    Once from each framework's own initial weights, to show what those change; ``quick``: from
    Flax's only.
    """
    config = TrainConfig(model="cnn", epochs=5)
    if quick:
        config = dataclasses.replace(config, epochs=6, batch_size=64, max_train_examples=1920)
    dataset = load_dataset(source, data_dir=data_dir, max_train_examples=config.max_train_examples)
    if quick:
        chosen = stratified_choice(dataset.test.labels, 500, np.random.default_rng(0))
        dataset = dataclasses.replace(dataset, test=dataset.test.take(chosen))
    if isinstance(dataset.test.images, ImageFiles):
        from cifar_jax.data.input_pipeline import decode

        dataset = dataclasses.replace(dataset, test=decode(dataset.test))
    runs = {
        f"{begun_by}_initial_weights": _train_in_both(config, dataset, begun_by)
        for begun_by in (("flax",) if quick else ("flax", "torch"))
    }
    return {
        "data": dataset.name,
        "digest": dataset.digest,
        "n_train": len(dataset.train),
        "n_val": len(dataset.val),
        "n_test": len(dataset.test),
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        **runs,
    }


def _train_in_both(config: TrainConfig, dataset: Dataset, begun_by: str) -> dict[str, Any]:
    model = create_model(config, len(dataset.class_names))
    pair = parity.Pair(model, initial_variables(model, dataset.image_shape), dataset.image_shape)
    if begun_by == "torch":
        weights = torch_reference.initial_state_dict(model, dataset.image_shape, seed=0)
        variables = layout.from_torch(weights, pair.layout)
        pair = parity.Pair(model, variables, dataset.image_shape)
    augment = jax.jit(jax.vmap(make_augmentation(config, dataset.mean)))
    steps_per_epoch = len(dataset.train) // config.batch_size

    def augmented() -> Iterator[tuple[Any, Any]]:
        images, labels = dataset.train.pixels, dataset.train.labels
        for epoch in range(config.epochs):
            order = epoch_order(len(labels), 0, epoch)[: steps_per_epoch * config.batch_size]
            for position, chosen in enumerate(order.reshape(steps_per_epoch, -1)):
                step = epoch * steps_per_epoch + position
                keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(chosen))
                yield np.asarray(augment(keys, images[chosen])), labels[chosen]

    steps = parity.train_in_lockstep(
        pair, config, augmented(), config.epochs * steps_per_epoch, dataset.mean, dataset.std
    )
    curves: dict[str, list[float]] = {"jax": [], "torch": []}
    losses: dict[str, list[float]] = {"jax": [], "torch": []}
    for step, (state, our_loss, their_loss) in enumerate(steps, start=1):
        losses["jax"].append(our_loss)
        losses["torch"].append(their_loss)
        if step % steps_per_epoch == 0:
            trained = jax.device_get(state.variables)
            scorers = _scorers(pair, trained, dataset)
            for framework in curves:
                correct = scorers[framework](dataset.val)
                curves[framework].append(correct / len(dataset.val))
            print(
                f"  epoch {step // steps_per_epoch}: validation accuracy "
                + ", ".join(f"{name} {100 * curve[-1]:.2f} %" for name, curve in curves.items()),
                flush=True,
            )
    return {
        "val_accuracy": curves,
        "train_loss_by_epoch": {
            name: np.mean(np.reshape(values, (config.epochs, -1)), axis=1).tolist()
            for name, values in losses.items()
        },
        "test_correct": _cross_score(pair, trained, dataset),
    }


def _scorers(pair: parity.Pair, variables: Any, dataset: Dataset) -> dict[str, Any]:
    """Functions that count the right answers in a split: of ``variables`` in JAX, of the twin."""

    def count(predict: Callable[[Any], Any], split: Split) -> int:
        correct = 0
        for start in range(0, len(split), 500):
            images = split.pixels[start : start + 500]
            logits = predict(np.asarray(normalize(jnp.asarray(images), dataset.mean, dataset.std)))
            correct += int((logits.argmax(-1) == split.labels[start : start + 500]).sum())
        return correct

    def theirs(x: Any) -> Any:
        return torch_reference.logits(pair.twin, layout.nhwc_to_nchw(x))

    return {
        "jax": lambda split: count(lambda x: np.asarray(_logits(pair.model, variables, x)), split),
        "torch": lambda split: count(theirs, split),
    }


@functools.partial(jax.jit, static_argnums=0)  # compiled once per network, not per call
def _logits(model: Model, variables: Any, images: Any) -> jax.Array:
    return model.apply(variables, images)


def _cross_score(pair: parity.Pair, trained: Any, dataset: Dataset) -> dict[str, int]:
    """Right answers on the test images, of both sets of weights in both frameworks.

    ``without_permutation``: JAX's weights in PyTorch when only the axes of each kernel are moved,
    and the first Dense layer's inputs stay in the order h, w, c.
    """

    def score(variables: Any, weights: dict[str, Any]) -> dict[str, int]:
        torch_reference.load(pair.twin, weights)
        scorers = _scorers(pair, variables, dataset)
        return {framework: scorer(dataset.test) for framework, scorer in scorers.items()}

    torch_weights = torch_reference.state_dict_of(pair.twin)
    theirs = score(layout.from_torch(torch_weights, pair.layout), torch_weights)
    ours = score(trained, layout.to_torch(trained, pair.layout))
    unpermuted = dataclasses.replace(pair.layout, flattened=None)
    without = score(trained, layout.to_torch(trained, unpermuted))
    return {
        "jax_weights_in_jax": ours["jax"],
        "jax_weights_in_torch": ours["torch"],
        "jax_weights_in_torch_without_permutation": without["torch"],
        "torch_weights_in_torch": theirs["torch"],
        "torch_weights_in_jax": theirs["jax"],
    }
