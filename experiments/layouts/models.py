"""How far each network is from its PyTorch twin."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from cifar_jax import parity
from cifar_jax.config import ModelName, TrainConfig
from cifar_jax.data import shapes
from cifar_jax.networks.models import MODELS, create_model
from layouts.networks import CLASSES, initial_variables

DRIFT_STEPS = 200
BATCH_SIZE = 8
_MEAN, _STD = 0.5, 0.25

_SLOW = ("cnn-wide", "resnet9", "airbench")
_NARROW = {
    "cnn": (4, 8, 16),
    "cnn-wide": (4, 4, 8, 8, 16, 16),
    "cnn-gap": (8, 16, 32),
    "resnet9": (4, 8, 8, 16),
    "airbench": (4, 8, 8),
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "nesterov": {"optimizer": "sgd", "nesterov": True, "learning_rate": 0.01},
    "adam": {"optimizer": "adam", "learning_rate": 1e-3},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01, "learning_rate": 1e-3},
}


def compare_models(quick: bool) -> dict[str, Any]:
    """Every network against its twin; trained by SGD with OneCycle.

    The 200 steps are those of a narrower network where the whole one would take minutes. ``quick``
    makes all networks narrow and the images smaller, and leaves out float64.
    """
    compared: dict[str, Any] = {}
    for name in MODELS:
        whole = _config(name, narrow=quick, **OPTIMIZERS["sgd"])
        trained = _config(name, narrow=quick or name in _SLOW, **OPTIMIZERS["sgd"])
        size = 16 if quick else 32
        if name == "cnn-gap":  # it takes any size
            size += size // 2
        row: dict[str, Any] = {
            "image_size": size,
            "widths": _widths(whole),
            "widths_200_steps": _widths(trained),
            "batch_size": BATCH_SIZE,
        }
        for dtype in (np.float32,) if quick else (np.float32, np.float64):
            with jax.enable_x64(dtype is np.float64):
                pair, images, labels = _pair(whole, size, dtype)
                found = _forward_and_backward(pair, images, labels, dtype)
                if trained != whole:
                    pair, images, labels = _pair(trained, size, dtype)
                found.update(_drift(pair, images, labels, trained))
            if dtype is np.float32:
                row.update(found)
            else:
                row["float64"] = found
            print(
                f"  {name:9s} {dtype.__name__}: activations {found['max_activation_diff']:.0e}, "
                f"gradients {found['max_gradient_diff']:.0e}, loss over {DRIFT_STEPS} steps "
                f"{found['loss_drift_200_steps']:.0e}",
                flush=True,
            )
        compared[name] = row
    return compared


def compare_optimizers() -> dict[str, Any]:
    """200 steps of the tutorial's network with each optimizer, by OneCycle."""
    compared: dict[str, Any] = {}
    for name, options in OPTIMIZERS.items():
        config = _config("cnn", narrow=False, **options)
        row: dict[str, Any] = {"batch_size": BATCH_SIZE, "float64": {}}
        for dtype, into in ((np.float32, row), (np.float64, row["float64"])):
            with jax.enable_x64(dtype is np.float64):
                into.update(_drift(*_pair(config, 32, dtype), config))
        compared[name] = row
        print(
            f"  {name:9s} loss over {DRIFT_STEPS} steps: float32 "
            f"{row['loss_drift_200_steps']:.0e}, float64 "
            f"{row['float64']['loss_drift_200_steps']:.0e}",
            flush=True,
        )
    return compared


def _config(model: ModelName, *, narrow: bool, **options: Any) -> TrainConfig:
    widths = _NARROW.get(model, ()) if narrow else ()
    return TrainConfig(model=model, widths=widths, **options)


def _widths(config: TrainConfig) -> str:
    return ",".join(map(str, config.widths)) or "the model's own"


def _pair(config: TrainConfig, size: int, dtype: Any) -> tuple[parity.Pair, Any, Any]:
    """The two networks, and 200 batches of shapes: images ``[200, B, H, W, C]``."""
    shape = (size, size, 3)
    model = create_model(config, CLASSES)
    images, labels = _drawn()
    order = np.random.default_rng(0).permutation(len(labels))  # they are drawn class by class
    cut, margin = max(shapes.SIZE - size, 0) // 2, max(size - shapes.SIZE, 0) // 2
    images = images[:, cut : shapes.SIZE - cut, cut : shapes.SIZE - cut]
    padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images = np.pad(images[order], padding, mode="reflect")
    pair = parity.Pair(model, initial_variables(model, shape, dtype), shape)
    return pair, images.reshape(DRIFT_STEPS, -1, *shape), labels[order].reshape(DRIFT_STEPS, -1)


@functools.cache
def _drawn() -> tuple[Any, Any]:
    return shapes.draw(DRIFT_STEPS * BATCH_SIZE, seed=0)


def _forward_and_backward(
    pair: parity.Pair, images: Any, labels: Any, dtype: Any
) -> dict[str, Any]:
    x = ((images[0] / 255 - _MEAN) / _STD).astype(dtype)
    gradients = pair.gradients(x, labels[0])
    evaluating, training = (pair.activations(x, train=train) for train in (False, True))
    return {
        "loss_diff": gradients.pop("loss"),
        "max_activation_diff": _largest([*evaluating.values(), *training.values()]),
        "max_logit_diff": evaluating["logits"],
        "max_gradient_diff": _largest([*gradients.values()]),
    }


def _largest(values: list[float]) -> float:
    return float(np.max(values))  # unlike max(), it does not lose a NaN


def _drift(pair: parity.Pair, images: Any, labels: Any, config: TrainConfig) -> dict[str, Any]:
    batches = list(zip(images, labels, strict=True))
    drift = parity.measure_drift(pair, config, batches, (_MEAN,) * 3, (_STD,) * 3)
    return {
        "loss_drift_200_steps": _largest(drift.loss),
        "loss_drift_1_step": _largest(drift.loss[:2]),  # before the first step, and after it
        "param_drift_200_steps": drift.params[-1],
        "batch_stats_drift_200_steps": drift.batch_stats,
        "loss_difference": drift.loss,
        "param_difference": {"steps": drift.params_steps, "relative": drift.params},
        "loss_first_and_last": [drift.ours[0], drift.ours[-1]],
    }
