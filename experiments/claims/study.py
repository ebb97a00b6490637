"""What the experiments share: data, training runs that are kept, a folder for pictures."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from matplotlib.figure import Figure

from cifar_jax.config import TrainConfig, to_json
from cifar_jax.data.dataset import Dataset, ImageFiles, Split, epoch_order, stratified_choice
from cifar_jax.data.sources import load_dataset
from cifar_jax.networks.models import create_model
from cifar_jax.steps.augment import make_augmentation
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import create_train_state, eval_step, train_step

_EVAL_BATCH = 500
# Of the small data that --quick runs on.
_QUICK_TRAIN, _QUICK_EVAL = 1000, 500


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A network after training.

    Attributes:
        model, variables: the network, with NumPy leaves.
        history: for each epoch ``train_loss, train_accuracy`` (of images as augmented, while the
            weights move), ``val_loss, val_accuracy``.
        seconds: of training alone, without compiling and scoring.
    """

    model: nn.Module
    variables: Any
    history: list[dict[str, float]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Study:
    """One run of the experiments.

    Attributes:
        source, data_dir: as ``--data`` and ``--data-dir`` of ``cifar_jax.train``.
        quick: small data, few steps, one seed: shows that everything runs, measures nothing.
        figures: the folder for pictures.
        runs: the folder where trained networks are kept, so that claims share them.
    """

    source: str
    data_dir: str | None
    quick: bool
    figures: Path
    runs: Path

    @property
    def seeds(self) -> range:
        return range(1 if self.quick else 3)

    def scaled(self, full: int, quick: int) -> int:
        """``full``, or ``quick`` if the study is."""
        return quick if self.quick else full

    @functools.cached_property
    def dataset(self) -> Dataset:
        """All three splits, decoded; a small part of each if the study is quick."""
        dataset = load_dataset(
            self.source,
            data_dir=self.data_dir,
            max_train_examples=_QUICK_TRAIN if self.quick else None,
            cache_mb=1 << 20,
        )
        if isinstance(dataset.test.images, ImageFiles):
            from cifar_jax.data.input_pipeline import decode

            dataset = dataclasses.replace(dataset, test=decode(dataset.test))
        if self.quick:
            dataset = dataclasses.replace(
                dataset,
                val=first_of_each_class(dataset.val, _QUICK_EVAL),
                test=first_of_each_class(dataset.test, _QUICK_EVAL),
            )
        return dataset

    def subset(self, n: int) -> Split:
        """``n`` training images, the classes in proportion; all where there are no more."""
        return first_of_each_class(self.dataset.train, n)

    def fit(
        self,
        config: TrainConfig,
        *,
        seed: int,
        n_train: int | None = None,
        model: nn.Module | None = None,
        dataset: Dataset | None = None,
    ) -> Fitted:
        """Train a network, or take the one kept from an earlier call with the same arguments.

        Args:
            config: epochs, batch, optimizer, schedule, augmentation; and the network, unless
                ``model`` is given. It must have a ``repr`` that tells it from others.
            n_train: train on so many images.
            dataset: instead of the study's, such as one with other pixels; same shapes.
        """
        dataset = dataset or self.dataset
        train = dataset.train if n_train is None else first_of_each_class(dataset.train, n_train)
        model = model or create_model(config, len(dataset.class_names), None)
        described = [to_json(config), repr(model), seed, len(train), dataset.digest]
        described += [dataset.mean, dataset.std, jax.__version__]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]
        path = self.runs / f"{key}.npz"
        if path.exists():
            return _read(path, model)
        fitted = fit(config, model, train, dataset, seed)
        self.runs.mkdir(parents=True, exist_ok=True)
        _write(path, fitted)
        return fitted

    def accuracy(self, fitted: Fitted, split: Split, dataset: Dataset | None = None) -> float:
        """Of ``fitted`` on ``split``, 0..1."""
        return score(fitted.model, fitted.variables, split, dataset or self.dataset)["accuracy"]

    def save_figure(self, figure: Figure, name: str) -> str:
        """Save ``figure`` as the picture ``name``, which is returned."""
        self.figures.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.figures / name, dpi=110)
        return name


def first_of_each_class(split: Split, n: int) -> Split:
    """A stratified choice of ``n`` images, always the same."""
    if n >= len(split):
        return split
    return split.take(stratified_choice(split.labels, n, np.random.default_rng(0)))


def some_of(split: Split, n: int) -> Split:
    """:func:`first_of_each_class` in a random order, always the same.

    A folder's images come sorted by class: the first thousand are all airplanes.
    """
    chosen = first_of_each_class(split, n)
    return chosen.take(np.random.default_rng(0).permutation(len(chosen)))


def fit(config: TrainConfig, model: nn.Module, train: Split, dataset: Dataset, seed: int) -> Fitted:
    """Train ``model`` on ``train`` with the package's own step, in memory, without checkpoints."""
    batch_size = min(config.batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    tx = make_optimizer(config, make_schedule(config, config.epochs * steps_per_epoch))
    state = create_train_state(model, tx, train.image_shape, seed)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        augment=make_augmentation(config, dataset.mean),
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
        label_smoothing=config.label_smoothing,
    )

    def batch_of(indices: Any) -> dict[str, Any]:
        return {"image": train.pixels[indices], "label": train.labels[indices]}

    lowered = jax.jit(step, donate_argnums=0).lower(state, batch_of(np.arange(batch_size)))
    compiled = compile_lowered(lowered, jax.default_backend())
    history: list[dict[str, float]] = []
    seconds = 0.0
    for epoch in range(config.epochs):
        started = time.perf_counter()
        order = epoch_order(len(train), seed, epoch)[: steps_per_epoch * batch_size]
        sums = []
        for indices in order.reshape(steps_per_epoch, batch_size):
            state, step_sums = compiled(state, batch_of(indices))
            sums.append(step_sums)
        total = {name: float(np.sum([s[name] for s in sums], dtype=np.float64)) for name in sums[0]}
        seconds += time.perf_counter() - started
        val = score(model, state.variables, dataset.val, dataset)
        history.append(
            {
                "train_loss": total["loss"] / total["count"],
                "train_accuracy": total["correct"] / total["count"],
                "val_loss": val["loss"],
                "val_accuracy": val["accuracy"],
            }
        )
    return Fitted(model, jax.device_get(state.variables), history, seconds)


def score(model: nn.Module, variables: Any, split: Split, dataset: Dataset) -> dict[str, float]:
    """``loss`` and ``accuracy`` on a decoded split; every image counts once."""
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for start in range(0, len(split), _EVAL_BATCH):
        images = split.pixels[start : start + _EVAL_BATCH]
        padding = _EVAL_BATCH - len(images)
        batch = {
            "image": np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)]),
            "label": np.pad(split.labels[start : start + _EVAL_BATCH], (0, padding)),
            "mask": np.pad(np.ones(len(images), np.float32), (0, padding)),
        }
        sums = _eval_step(model, dataset.mean, dataset.std, variables, batch)
        totals = {name: totals[name] + float(sums[name]) for name in totals}
    return {
        "loss": totals["loss"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # compiled once a network, not once a call
def _eval_step(model: nn.Module, mean: Any, std: Any, variables: Any, batch: Any) -> Any:
    return eval_step(variables, batch, model=model, mean=mean, std=std)


def _write(path: Path, fitted: Fitted) -> None:
    arrays = flatten_dict({"variables": fitted.variables}, sep="/")
    about = json.dumps({"history": fitted.history, "seconds": fitted.seconds})
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, about=np.array(about), **arrays)
    temporary.rename(path)


def _read(path: Path, model: nn.Module) -> Fitted:
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files if name != "about"}
        about = json.loads(str(saved["about"]))
    variables = unflatten_dict(arrays, sep="/").get("variables", {})
    variables.setdefault("batch_stats", {})
    return Fitted(model, variables, about["history"], about["seconds"])
