"""How far each network of the zoo is from its PyTorch twin."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cifar_jax import parity, shapes
from cifar_jax.config import TrainConfig
from cifar_jax.dataset import ImageShape
from cifar_jax.models import MODELS, create_model

CLASSES = 10
DRIFT_STEPS = 200
BATCH_SIZE = 16
_MEAN, _STD = 0.5, 0.25

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "nesterov": {"optimizer": "sgd", "nesterov": True, "learning_rate": 0.01},
    "adam": {"optimizer": "adam", "learning_rate": 1e-3},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01, "learning_rate": 1e-3},
}


def compare_models(quick: bool) -> dict[str, Any]:
    """Every network of the zoo against its twin; trained by SGD with OneCycle."""
    compared = {}
    for name in MODELS:
        config = _config(name, quick, OPTIMIZERS["sgd"])
        size = 48 if name == "cnn-gap" else 32  # which takes any
        row: dict[str, Any] = {"image_size": size, "widths": _widths(config)}
        for dtype, into in ((np.float32, row), (np.float64, row.setdefault("float64", {}))):
            with jax.enable_x64(dtype is np.float64):
                pair, images, labels = _pair(config, size, dtype)
                into.update(_forward_and_backward(pair, images[0], labels[0], dtype))
                into.update(_drift(pair, config, images, labels))
        compared[name] = row
        print(f"  {name:9s} {_described(row)}; float64: {_described(row['float64'])}", flush=True)
    return compared


def compare_optimizers(quick: bool) -> dict[str, Any]:
    """200 steps of the tutorial's network with each optimizer, by OneCycle and at a constant rate.

    In float64 what is left is optax's schedule, which is computed in float32.
    """
    compared: dict[str, Any] = {}
    for name, options in OPTIMIZERS.items():
        for schedule in ("onecycle", "constant"):
            config = _config("cnn", quick, {**options, "schedule": schedule})
            row = compared[f"{name}, {schedule}"] = {"widths": _widths(config)}
            for dtype, into in ((np.float32, row), (np.float64, row.setdefault("float64", {}))):
                with jax.enable_x64(dtype is np.float64):
                    pair, images, labels = _pair(config, 32, dtype)
                    into.update(_drift(pair, config, images, labels))
    return compared


def _config(model: str, quick: bool, options: dict[str, Any]) -> TrainConfig:
    narrow = {"cnn": (4, 8, 16), "cnn-wide": (4, 4, 8, 8, 16, 16), "cnn-gap": (8, 16, 32)}
    narrow["resnet9"] = (4, 8, 8, 16)
    widths = narrow.get(model, ()) if quick else ()
    values = {"model": model, "widths": widths, "flip": False, "crop": 0, **options}
    return TrainConfig(**values)


def _widths(config: TrainConfig) -> str:
    return ",".join(map(str, config.widths)) or "the model's own"


def _pair(config: TrainConfig, size: int, dtype: Any) -> tuple[parity.Pair, Any, Any]:
    """The two networks, and 200 batches of shapes: images ``[200, B, H, W, C]``."""
    shape = (size, size, 3)
    model = create_model(config, CLASSES, None)
    images, labels = shapes.draw(DRIFT_STEPS * BATCH_SIZE, seed=0)
    order = np.random.default_rng(0).permutation(len(labels))  # they are drawn class by class
    margin = (size - shapes.SIZE) // 2
    padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images = np.pad(images[order], padding, mode="reflect")
    pair = parity.Pair(model, initial_variables(model, shape, dtype), shape)
    return pair, images.reshape(DRIFT_STEPS, -1, *shape), labels[order].reshape(DRIFT_STEPS, -1)


def _forward_and_backward(
    pair: parity.Pair, images: Any, labels: Any, dtype: Any
) -> dict[str, Any]:
    x = ((images / 255 - _MEAN) / _STD).astype(dtype)
    gradients = pair.gradients(x, labels)
    return {
        "loss_diff": gradients.pop("loss"),
        "max_activation_diff": max(
            max(pair.activations(x, train=train).values()) for train in (False, True)
        ),
        "max_logit_diff": pair.logits(x),
        "max_gradient_diff": max(gradients.values()),
        "batch_size": len(labels),
    }


def _drift(pair: parity.Pair, config: TrainConfig, images: Any, labels: Any) -> dict[str, Any]:
    batches = list(zip(images, labels, strict=True))
    drift = parity.measure_drift(pair, config, batches, (_MEAN,) * 3, (_STD,) * 3)
    return {
        "loss_drift_200_steps": max(drift.loss),
        "loss_drift_1_step": max(drift.loss[:2]),  # before the first step, and after it
        "param_drift_200_steps": drift.params[-1],
        "batch_stats_drift_200_steps": drift.batch_stats,
        "loss_difference": drift.loss,
        "param_difference": {"steps": drift.params_steps, "relative": drift.params},
        "loss_first_and_last": [drift.ours[0], drift.ours[-1]],
    }


def _described(row: dict[str, Any]) -> str:
    return (
        f"activations {row['max_activation_diff']:.0e}, gradients {row['max_gradient_diff']:.0e}, "
        f"loss over {DRIFT_STEPS} steps {row['loss_drift_200_steps']:.0e}"
    )


def initial_variables(model: Any, image_shape: ImageShape, dtype: Any = np.float32) -> Any:
    """Flax's own initial weights, the same in every float type."""
    with jax.enable_x64(False):
        init = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *image_shape), np.float32))
    variables = {"params": init["params"], "batch_stats": init.get("batch_stats", {})}
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
