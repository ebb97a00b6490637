"""``cnn``, ``cnn-wide`` and ``resnet9`` as NCHW programs, to time and inspect beside the NHWC ones.

Not the NHWC program with transposes around it: images ``[B, C, H, W]``, kernels ``[O, I, H, W]``
and statistics are those of PyTorch's ``state_dict``, and stay in that layout from end to end.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.networks.models import ConvNet, ResNet9
from cifar_jax.networks.pooling import max_pool

Tensors = Mapping[str, jax.Array]


def apply(
    model: ConvNet | ResNet9, tensors: Tensors, images: jax.Array, *, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits ``[B, K]`` of images ``[B, C, H, W]``, without dropout.

    Args:
        model: says which network; its own (NHWC) code is not called.
        tensors: as in PyTorch's ``state_dict``.
        train: take batch norm's statistics from the batch.

    Returns:
        The logits, and the running statistics after this batch (``train``; else none).
    """
    statistics: dict[str, jax.Array] = {}
    _, channels, height, width = images.shape
    names = model.torch_layout((height, width, channels)).names

    def conv(i: int, x: jax.Array) -> jax.Array:
        """The i-th convolution, its bias or batch norm, and ReLU."""
        name = names[f"Conv_{i}"]
        x = lax.conv_general_dilated(
            x,
            tensors[f"{name}.weight"],
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        if f"BatchNorm_{i}" in names:
            x = batch_norm(names[f"BatchNorm_{i}"], x)
        else:
            x = x + _per_channel(tensors[f"{name}.bias"])
        return jax.nn.relu(x)

    def batch_norm(name: str, x: jax.Array) -> jax.Array:
        mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        if train:
            batch_mean, batch_variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            statistics[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            statistics[f"{name}.running_var"] = 0.9 * variance + 0.1 * batch_variance
            mean, variance = batch_mean, batch_variance
        scale = tensors[f"{name}.weight"] * lax.rsqrt(variance + 1e-5)
        return (x - _per_channel(mean)) * _per_channel(scale) + _per_channel(
            tensors[f"{name}.bias"]
        )

    def residual(i: int, x: jax.Array) -> jax.Array:
        return x + conv(i + 1, conv(i, x))

    x = images
    if isinstance(model, ResNet9):
        x = conv(0, x)
        x = residual(2, _max_pool(conv(1, x)))
        x = _max_pool(conv(4, x))
        x = residual(6, _max_pool(conv(5, x)))
        x = x.max((2, 3))
        return 0.125 * (x @ tensors["classifier.3.weight"].T), statistics
    for i in range(len(model.widths)):
        x = conv(i, x)
        if (i + 1) % model.convs_per_pool == 0:
            x = _max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for i in range(len(model.hidden) + 1):
        name = names[f"Dense_{i}"]
        x = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        if i < len(model.hidden):
            x = jax.nn.relu(x)
    return x, statistics


def _max_pool(x: jax.Array) -> jax.Array:
    """The project's max-pooling, which looks at each channel alone, of ``[B, C, H, W]``."""
    batch, channels, height, width = x.shape
    pooled = max_pool(x.reshape(batch * channels, height, width, 1))
    return pooled.reshape(batch, channels, height // 2, width // 2)


def _per_channel(x: jax.Array) -> jax.Array:
    """``[C]`` -> ``[1, C, 1, 1]``."""
    return jnp.reshape(x, (1, -1, 1, 1))
