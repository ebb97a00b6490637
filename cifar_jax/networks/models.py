"""Networks: images float ``[B, H, W, C]`` -> logits ``[B, K]``, as Flax linen modules in NHWC."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax

from cifar_jax.config import ALWAYS_NORMALISED, ModelName, TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.errors import DataError, UsageError
from cifar_jax.layout import TorchLayout
from cifar_jax.networks.airbench import Airbench
from cifar_jax.networks.batch_norm import BatchNorm
from cifar_jax.networks.blocks import (
    Conv,
    LayerFunction,
    global_average_pool,
    global_max_pool,
    residual,
)
from cifar_jax.networks.pooling import max_pool
from cifar_jax.options import flag

BATCH_NORM_MOMENTUM = 0.9  # PyTorch's default, which it calls 0.1


def conv_block(
    features: int, *, norm: Callable[[], LayerFunction] | None, pool: bool, dtype: Any = None
) -> list[LayerFunction]:
    """Conv 3x3 padding 1, batch norm if wanted, ReLU, MaxPool 2 if wanted."""
    return [
        # The norm cancels any bias; Adam would turn its gradient, pure rounding, into steps.
        Conv(features, use_bias=norm is None, dtype=dtype),
        *([norm()] if norm else []),
        nn.relu,
        *([max_pool] if pool else []),
    ]


def space_to_depth(x: jax.Array, side: int) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H/side, W/side, C*side*side]``, like ``torch.nn.PixelUnshuffle``.

    Raises:
        DataError: ``side`` does not divide H and W.
    """
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise DataError(
            f"images of {height}x{width} pixels cannot be cut into squares of --patch-size {side}",
            fix="resize the images with --image-size, or give another --patch-size",
        )
    squares = x.reshape(batch, height // side, side, width // side, side, channels)
    squares = squares.transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, height // side, width // side, channels * side**2)


def flatten(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H*W*C]``."""
    return x.reshape(x.shape[0], -1)


class ConvNet(nn.Module):
    """The tutorial's network: convolutional blocks, flatten, Dense layers.

    Attributes:
        widths: channels of each convolution; empty for an MLP or, if ``hidden`` is empty too, a
            linear model.
        hidden: units of each hidden Dense layer.
        convs_per_pool: convolutions before each pooling.
        patch_size: side of the patches that become single pixels first (:func:`space_to_depth`).
        global_pool: average over all positions instead of flattening, to take any image size.
        axis_name: the pmap axis over which batch norm takes its statistics.
        dtype: of the activations, if not that of the parameters; logits always have the latter.
    """

    batch_norm_momentum: ClassVar[float] = BATCH_NORM_MOMENTUM

    num_classes: int
    widths: Sequence[int]
    hidden: Sequence[int]
    convs_per_pool: int = 1
    patch_size: int = 1
    global_pool: bool = False
    batch_norm: bool = False
    dropout: float = 0.0
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        norm = _batch_norm(train, self.axis_name, self.dtype) if self.batch_norm else None
        layers: list[LayerFunction] = []
        if self.patch_size > 1:
            layers.append(self._space_to_depth)
        for index, features in enumerate(self.widths, start=1):
            pool = index % self.convs_per_pool == 0
            layers += conv_block(features, norm=norm, pool=pool, dtype=self.dtype)
        layers.append(global_average_pool if self.global_pool else self._checked_flatten)
        for features in self.hidden:
            layers += [nn.Dense(features, dtype=self.dtype), nn.relu]
            if self.dropout:
                layers.append(nn.Dropout(self.dropout, deterministic=not train))
        layers.append(nn.Dense(self.num_classes))
        return nn.Sequential(layers)(x)

    def _space_to_depth(self, x: jax.Array) -> jax.Array:
        return space_to_depth(x, self.patch_size)

    def _checked_flatten(self, x: jax.Array) -> jax.Array:
        """:func:`flatten`, with a readable error if the image size has changed."""
        flat = flatten(x)
        if not self.is_initializing():
            trained_for = self.variables["params"]["Dense_0"]["kernel"].shape[0]
            if flat.shape[1] != trained_for:
                raise DataError(
                    f"these images flatten to {flat.shape[1]} numbers, but the network was made "
                    f"for {trained_for}: a network that flattens takes one image size",
                    fix="resize the images to the size of training with --image-size, or train "
                    "--model cnn-gap, which takes any size",
                )
        return flat

    def torch_layout(self, image_shape: ImageShape) -> TorchLayout:
        """The names of these layers in the tutorial's ``self.network = nn.Sequential(...)``."""
        layers = ["PixelUnshuffle"] if self.patch_size > 1 else []
        for i in range(len(self.widths)):
            normed = [f"Conv_{i}", f"BatchNorm_{i}"] if self.batch_norm else [f"Conv_{i}"]
            layers += [*normed, "ReLU"]
            if (i + 1) % self.convs_per_pool == 0:
                layers += ["MaxPool2d"]
        layers += ["AdaptiveAvgPool2d", "Flatten"] if self.global_pool else ["Flatten"]
        for i in range(len(self.hidden)):
            layers += [f"Dense_{i}", "ReLU", "Dropout"] if self.dropout else [f"Dense_{i}", "ReLU"]
        layers += [f"Dense_{len(self.hidden)}"]
        # PyTorch numbers all layers; those under Flax's names have parameters.
        names = {name: f"network.{i}" for i, name in enumerate(layers) if "_" in name}
        if self.global_pool:
            return TorchLayout(names, None)
        height, width, channels = image_shape
        shrunk = self.patch_size * 2 ** (len(self.widths) // self.convs_per_pool)
        flattened = height // shrunk, width // shrunk, [channels, *self.widths][-1]
        return TorchLayout(names, ("Dense_0", flattened))


class ResNet9(nn.Module):
    """David Page's nine-layer residual network (https://myrtle.ai/learn/how-to-train-your-resnet/).

    Attributes:
        widths: channels of its four stages; the second and fourth end in a residual block.
        dropout, axis_name, dtype: as in :class:`ConvNet`.
    """

    batch_norm_momentum: ClassVar[float] = BATCH_NORM_MOMENTUM

    num_classes: int
    widths: Sequence[int] = (64, 128, 256, 512)
    dropout: float = 0.0
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        norm = _batch_norm(train, self.axis_name, self.dtype)

        def block(features: int, pool: bool = False) -> list[LayerFunction]:
            return conv_block(features, norm=norm, pool=pool, dtype=self.dtype)

        def scale(x: jax.Array) -> jax.Array:
            # The small factor keeps the initial logits, and so the initial gradients, small.
            return 0.125 * x

        first, second, third, fourth = self.widths
        layers = [
            *block(first),
            *block(second, pool=True),
            residual([*block(second), *block(second)]),
            *block(third, pool=True),
            *block(fourth, pool=True),
            residual([*block(fourth), *block(fourth)]),
            global_max_pool,
        ]
        if self.dropout:
            layers.append(nn.Dropout(self.dropout, deterministic=not train))
        layers += [nn.Dense(self.num_classes, use_bias=False), scale]
        return nn.Sequential(layers)(x)

    def torch_layout(self, image_shape: ImageShape) -> TorchLayout:
        """The names of these layers in PyTorch tutorials: ``conv1.0`` and so on."""
        del image_shape  # nothing is flattened but [B, 1, 1, C]
        blocks = ("conv1", "conv2", "res1.0", "res1.1", "conv3", "conv4", "res2.0", "res2.1")
        names: dict[str, str] = {}
        for i, block in enumerate(blocks):
            names[f"Conv_{i}"], names[f"BatchNorm_{i}"] = f"{block}.0", f"{block}.1"
        return TorchLayout({**names, "Dense_0": "classifier.3"}, None)


def _batch_norm(train: bool, axis_name: str | None, dtype: Any) -> Callable[[], BatchNorm]:
    return functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=1e-5,
        axis_name=axis_name,
        dtype=dtype,
    )


Model = ConvNet | ResNet9 | Airbench

MODELS: dict[ModelName, Callable[..., Model]] = {
    "linear": functools.partial(ConvNet, widths=(), hidden=()),
    "mlp": functools.partial(ConvNet, widths=(), hidden=(512, 256)),
    "cnn": functools.partial(ConvNet, widths=(16, 32, 64), hidden=(512, 256)),
    "cnn-wide": functools.partial(
        ConvNet, widths=(32, 64, 128, 128, 256, 256), hidden=(1024, 512), convs_per_pool=2
    ),
    "cnn-gap": functools.partial(ConvNet, widths=(32, 64, 128), hidden=(), global_pool=True),
    "resnet9": ResNet9,
    "airbench": Airbench,
}


def create_model(
    config: TrainConfig, num_classes: int, axis_name: str | None = None, dtype: Any = None
) -> Model:
    """The network that ``config`` describes, with activations of type ``dtype``.

    ``config.dtype`` is for training only: scores and predictions are computed in float32. A network
    gets the options that it has a field for.

    Raises:
        UsageError: ``config`` sets an option that the network has no field for.
    """
    make = MODELS[config.model]
    has = inspect.signature(make).parameters
    names = ("batch_norm", "patch_size", "dropout", "widths", "hidden")
    given = {name: getattr(config, name) for name in names}
    given = {name: value for name, value in given.items() if value != getattr(TrainConfig, name)}
    if dtype is not None:
        given["dtype"] = dtype
    for name in given:
        if name not in has and not (name == "batch_norm" and config.model in ALWAYS_NORMALISED):
            raise UsageError(
                f"{flag(name)} with --model {config.model}, which has no field {name}",
                fix="leave it out, or add that field to the network",
            )
    options = {"axis_name": axis_name, **given}
    return make(num_classes=num_classes, **{n: v for n, v in options.items() if n in has})


def torch_layout(model: nn.Module, image_shape: ImageShape) -> TorchLayout:
    """The names of the layers of ``model`` in PyTorch.

    Raises:
        UsageError: ``model`` defines no such names.
    """
    if not hasattr(model, "torch_layout"):
        raise UsageError(
            f"{type(model).__name__} has no torch_layout with its layers' names in PyTorch",
            fix="write one, as in networks/models.py, or export --format stablehlo",
        )
    layout: TorchLayout = model.torch_layout(image_shape)
    return layout
