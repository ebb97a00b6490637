"""What trips people up between the two layouts, each with its numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from matplotlib.figure import Figure

from cifar_jax import layout, parity, torch_reference
from cifar_jax.config import TrainConfig
from cifar_jax.networks.models import create_model
from layouts.networks import CLASSES, initial_variables


def measure_pitfalls(training: dict[str, Any]) -> dict[str, Any]:
    """What trips people up between the two layouts, each with its numbers."""
    correct = training["flax_initial_weights"]["test_correct"]
    n_test = training["n_test"]
    return {
        "flatten_order": {
            "what": "a flatten reads NHWC as h, w, c and NCHW as c, h, w: the first Dense layer's "
            "inputs must be permuted when weights move",
            "accuracy": correct["jax_weights_in_jax"] / n_test,
            "accuracy_converted": correct["jax_weights_in_torch"] / n_test,
            "accuracy_without_permutation": correct["jax_weights_in_torch_without_permutation"]
            / n_test,
        },
        "permute_is_a_view": _permute(),
        "same_padding_with_stride_2": _same_padding(),
        "imshow": _imshow(),
        "initialisers": _initialisers(training),
        "batch_norm_momentum": _batch_norm_momentum(),
        "onecycle_momentum": _onecycle_momentum(),
    }


def _permute() -> dict[str, Any]:
    images = np.zeros((256, 32, 32, 3), np.float32)
    theirs, ours = torch.from_numpy(images), jnp.asarray(images)
    permuted = theirs.permute(0, 3, 1, 2)
    transpose = jax.jit(lambda x: x.transpose(0, 3, 1, 2))

    def microseconds(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(50):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e6

    return {
        "what": "torch's permute only changes strides; JAX has no strides, a transpose copies "
        "unless it is fused into what follows",
        "megabytes": images.nbytes / 2**20,
        "torch_strides_before": list(theirs.stride()),
        "torch_strides_after": list(permuted.stride()),
        "torch_same_memory": permuted.data_ptr() == theirs.data_ptr(),
        "torch_is_contiguous_after": permuted.is_contiguous(),
        "jax_same_memory": transpose(ours).unsafe_buffer_pointer() == ours.unsafe_buffer_pointer(),
        "torch_permute_us": microseconds(lambda: theirs.permute(0, 3, 1, 2)),
        "torch_permute_contiguous_us": microseconds(lambda: permuted.contiguous()),
        "jax_transpose_us": microseconds(lambda: transpose(ours).block_until_ready()),
    }


def _same_padding() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        "what": "with stride 2, SAME pads an even image at its end only, torch's padding=1 at both "
        "ends: another grid of pixels"
    }
    kernel = rng.normal(size=(3, 3, 3, 8)).astype(np.float32)
    for size in (32, 33):
        x = rng.normal(size=(4, size, size, 3)).astype(np.float32)
        weight = torch.from_numpy(layout.hwio_to_oihw(kernel))
        theirs = torch.nn.functional.conv2d(
            torch.from_numpy(layout.nhwc_to_nchw(x)), weight, stride=2, padding=1
        )
        for name, padding in (("SAME", "SAME"), ("padding_1", ((1, 1), (1, 1)))):
            ours = jax.lax.conv_general_dilated(
                jnp.asarray(x),
                jnp.asarray(kernel),
                (2, 2),
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            difference = parity.relative_difference(
                layout.nhwc_to_nchw(np.asarray(ours)), theirs.numpy()
            )
            found[f"difference_{name}_{size}x{size}"] = difference
    return found


def _imshow() -> dict[str, Any]:
    image = np.arange(32 * 32 * 3).reshape(32, 32, 3)
    chw = image.transpose(2, 0, 1)
    try:
        Figure().subplots().imshow(chw)
        message = "none"
    except TypeError as error:
        message = str(error)
    return {
        "what": "imshow needs channels last; a reshape instead of a transpose silences it and "
        "scrambles the image",
        "error_for_channels_first": message,
        "share_of_values_misplaced_by_reshape": float((chw.reshape(32, 32, 3) != image).mean()),
        "share_of_values_misplaced_by_transpose": float((chw.transpose(1, 2, 0) != image).mean()),
    }


def _initialisers(training: dict[str, Any]) -> dict[str, Any]:
    model = create_model(TrainConfig(model="cnn"), CLASSES)
    shape = (32, 32, 3)
    ours = initial_variables(model, shape)["params"]
    weights = torch_reference.initial_state_dict(model, shape, seed=0)
    theirs = layout.from_torch(weights, model.torch_layout(shape))["params"]
    runs = {
        begun_by: training[key]["val_accuracy"]["jax"]
        for begun_by in ("flax", "torch")
        if (key := f"{begun_by}_initial_weights") in training
    }
    return {
        "what": "Flax draws kernels with std 1/sqrt(fan_in) (LeCun normal) and zero biases; torch "
        "uniformly with std 1/sqrt(3 fan_in), and biases too",
        "std": {
            layer: {
                "fan_in": int(np.prod(leaves["kernel"].shape[:-1])),
                "flax_kernel": float(leaves["kernel"].std()),
                "torch_kernel": float(theirs[layer]["kernel"].std()),
                "flax_bias": float(leaves["bias"].std()),
                "torch_bias": float(theirs[layer]["bias"].std()),
            }
            for layer, leaves in ours.items()
        },
        "val_accuracy_first_epoch": {name: curve[0] for name, curve in runs.items()},
        "val_accuracy_last_epoch": {name: curve[-1] for name, curve in runs.items()},
    }


def _batch_norm_momentum() -> dict[str, Any]:
    x = np.random.default_rng(0).normal(3, 2, (8, 2, 2, 4)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(4, momentum=0.1)
    theirs.train()(torch.from_numpy(layout.nhwc_to_nchw(x)))

    def updated(momentum: float) -> Any:
        norm = nn.BatchNorm(use_running_average=False, momentum=momentum)
        variables = norm.init(jax.random.key(0), x)
        return norm.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    same_number, right = updated(0.1), updated(0.9)
    buffers = {name: buffer.numpy() for name, buffer in theirs.named_buffers()}
    mean, variance = buffers["running_mean"], buffers["running_var"]
    return {
        "what": "Flax's momentum 0.9 is torch's 0.1; and torch's running variance divides by n - 1",
        "n": 8 * 2 * 2,
        "mean_difference_momentum_0.9": parity.relative_difference(np.asarray(right["mean"]), mean),
        "mean_difference_momentum_0.1": parity.relative_difference(
            np.asarray(same_number["mean"]), mean
        ),
        "variance_difference_as_it_is": parity.relative_difference(
            np.asarray(right["var"]), variance
        ),
        "variance_difference_corrected": parity.relative_difference(
            layout.torch_running_variance(
                np.asarray(right["var"]), momentum=0.9, start=np.ones(4), n=32, steps=1
            ),
            variance,
        ),
    }


def _onecycle_momentum() -> dict[str, Any]:
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)
    first_betas = []
    for _ in range(100):
        first_betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        schedule.step()
    return {
        "what": "torch's OneCycleLR also moves Adam's first beta unless cycle_momentum=False; "
        "optax's schedule moves the learning rate alone",
        "torch_first_beta_min": min(first_betas),
        "torch_first_beta_max": max(first_betas),
        "optax_first_beta": 0.9,
    }
