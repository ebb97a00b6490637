"""Networks: images float ``[B, H, W, C]`` -> logits ``[B, K]``, as Flax linen modules in NHWC."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from cifar_jax.config import ALWAYS_NORMALISED, ModelName, TrainConfig
from cifar_jax.convolution import conv3x3, paired_conv
from cifar_jax.dataset import ImageShape
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.initializers import (
    WHITENING,
    WHITENING_SIDE,
    partly_identity,
    uniform,
    unit_deviation,
)
from cifar_jax.layout import TorchLayout
from cifar_jax.pooling import max_pool, whole_windows

Layer = Callable[[jax.Array], jax.Array]

BATCH_NORM_MOMENTUM = 0.9  # PyTorch's default, which it calls 0.1


def conv_block(
    features: int, *, norm: Callable[[], Layer] | None, pool: bool, dtype: Any = None
) -> list[Layer]:
    """Conv 3x3 padding 1, batch norm if wanted, ReLU, MaxPool 2 if wanted."""
    return [
        nn.Conv(
            features,
            (3, 3),
            padding=1,
            # A norm subtracts any bias; Adam would turn its gradient, all rounding, into steps.
            use_bias=norm is None,
            dtype=dtype,
            conv_general_dilated=conv3x3,
        ),
        *([norm()] if norm else []),
        nn.relu,
        *([max_pool] if pool else []),
    ]


def space_to_depth(x: jax.Array, side: int) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H/side, W/side, C*side*side]``, ``torch.nn.PixelUnshuffle``'s.

    Raises:
        CifarJaxError: data; ``side`` does not divide H and W.
    """
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise CifarJaxError(
            ExitCode.DATA,
            f"images of {height}x{width} pixels cannot be cut into squares of --patch-size {side}",
            fix="resize the images with --image-size, or give another --patch-size",
        )
    squares = x.reshape(batch, height // side, side, width // side, side, channels)
    squares = squares.transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, height // side, width // side, channels * side**2)


def residual(layers: list[Layer]) -> Layer:
    """What comes in, and what the ``layers`` make of it, added."""
    branch = nn.Sequential(layers)

    def add(x: jax.Array) -> jax.Array:
        return x + branch(x)

    return add


def flatten(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H*W*C]``."""
    return x.reshape(x.shape[0], -1)


def global_max_pool(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, C]``, for any H and W."""
    return x.max(axis=(1, 2))


def global_average_pool(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, C]``, for any H and W."""
    return x.mean(axis=(1, 2))


class ConvNet(nn.Module):
    """The tutorial's network: convolutional blocks, flatten, Dense layers.

    Attributes:
        widths: channels of each convolution; none leaves an MLP, or with no ``hidden`` either, a
            linear model.
        hidden: units of each hidden Dense layer.
        convs_per_pool: convolutions before each pooling.
        patch_size: side of the squares of pixels whose values become channels, before all else.
        global_pool: average over all positions instead of flattening: takes any image size.
        axis_name: the pmap axis over which batch norm takes its statistics.
        dtype: of activations, where it is not that of the parameters; logits are of theirs.
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
        layers: list[Layer] = []
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
        """``flatten``, with an error that explains itself where the image size has changed."""
        flat = flatten(x)
        if not self.is_initializing():
            trained_for = self.variables["params"]["Dense_0"]["kernel"].shape[0]
            if flat.shape[1] != trained_for:
                raise CifarJaxError(
                    ExitCode.DATA,
                    f"these images flatten to {flat.shape[1]} numbers, the network was made for "
                    f"{trained_for}: a network that flattens takes one image size",
                    fix="resize the images to the size of training with --image-size, or train "
                    "--model cnn-gap, which takes any size",
                )
        return flat

    def torch_layout(self, image_shape: ImageShape) -> TorchLayout:
        """Where the tutorial's ``self.network = nn.Sequential(...)`` keeps the same layers."""
        height, width, channels = image_shape
        height, width = height // self.patch_size, width // self.patch_size
        names: dict[str, str] = {}
        index = 1 if self.patch_size > 1 else 0  # the PixelUnshuffle
        for i in range(len(self.widths)):
            names[f"Conv_{i}"] = f"network.{index}"
            if self.batch_norm:
                index += 1
                names[f"BatchNorm_{i}"] = f"network.{index}"
            index += 2  # the ReLU, and on
            if (i + 1) % self.convs_per_pool == 0:
                index += 1
                height, width = height // 2, width // 2
        index += 2 if self.global_pool else 1  # AdaptiveAvgPool2d and Flatten, or Flatten
        for i in range(len(self.hidden) + 1):
            names[f"Dense_{i}"] = f"network.{index}"
            index += 3 if self.dropout else 2  # the ReLU, the Dropout, and on
        channels = self.widths[-1] if self.widths else channels
        flattened = None if self.global_pool else ("Dense_0", (height, width, channels))
        return TorchLayout(names, flattened)


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

        def block(features: int, pool: bool = False) -> list[Layer]:
            return conv_block(features, norm=norm, pool=pool, dtype=self.dtype)

        def scale(x: jax.Array) -> jax.Array:
            # The small factor keeps the first logits, and so the first gradients, small.
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
        """Under the names that the tutorial's successor gives: ``conv1.0.weight`` and so on."""
        del image_shape  # nothing is flattened but [B, 1, 1, C]
        blocks = ("conv1", "conv2", "res1.0", "res1.1", "conv3", "conv4", "res2.0", "res2.1")
        names: dict[str, str] = {}
        for i, block in enumerate(blocks):
            names[f"Conv_{i}"], names[f"BatchNorm_{i}"] = f"{block}.0", f"{block}.1"
        return TorchLayout({**names, "Dense_0": "classifier.3"}, None)


class Whitening(nn.Module):
    """Airbench's first convolution. Its kernel, which a run sets, has no gradient; its bias learns.

    Attributes:
        dtype: as in :class:`ConvNet`.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, channels = WHITENING_SIDE, x.shape[-1]
        inputs = side * side * channels
        shape = (side, side, channels, 2 * inputs)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", uniform(inputs), (2 * inputs,))
        x, kernel, bias = promote_dtype(x, lax.stop_gradient(kernel), bias, dtype=self.dtype)
        y = paired_conv(x, kernel)
        # So its gradient is summed over images first, and then over pixels. In one sum of so few
        # columns, a GPU would take three times as long.
        return y + lax.optimization_barrier(jnp.broadcast_to(bias, y.shape[1:]))


# (x, bias, epsilon, pool) -> the activations, and the mean and variance of what was normalised.
NormGeluOperation = Callable[
    [jax.Array, jax.Array, float, bool], tuple[jax.Array, jax.Array, jax.Array]
]


class NormGelu(nn.Module):
    """An operation that does what batch norm and GELU do in training, with that norm's variables.

    Attributes:
        operation: as :class:`Airbench` is given it.
        pool: whether it pools first.
        epsilon, momentum: as in ``nn.BatchNorm``.
    """

    operation: NormGeluOperation
    pool: bool
    epsilon: float
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        bias = self.param("bias", nn.initializers.zeros, shape)
        averages = [
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        ]
        x = whole_windows(x) if self.pool else x
        y, *found = self.operation(x, bias, self.epsilon, self.pool)
        for average, value in zip(averages, found, strict=True):
            average.value = self.momentum * average.value + (1 - self.momentum) * value
        return y


class Airbench(nn.Module):
    """The network of the record for 94 % (https://github.com/KellerJordan/cifar10-airbench).

    Its first convolution whitens the images and is not trained: a run sets it from its own
    (:func:`cifar_jax.initializers.whiten`). Two convolutions at each of its widths, the first of
    them pooled.

    Attributes:
        widths: channels of its stages.
        deep: a third convolution in each stage, and a residual around the last two: the layers of
            its author's network for 96 %.
        norm_gelu: in training, an operation in place of a batch norm and the GELU after it, and of
            the max-pool before if there is one; as in experiments/airbench/kernels.py. It takes
            its statistics over one device.
        axis_name, dtype: as in :class:`ConvNet`.
    """

    batch_norm_momentum: ClassVar[float] = 0.6  # of some 200 steps, the last few

    num_classes: int
    widths: Sequence[int] = (64, 256, 256)
    deep: bool = False
    norm_gelu: NormGeluOperation | None = None
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        def scale(x: jax.Array) -> jax.Array:
            return x / self.widths[-1]

        epsilon = 1e-12  # and Flax's faster variance: so the record was measured
        norm_names = (f"BatchNorm_{i}" for i in itertools.count())

        def norm() -> nn.BatchNorm:
            return nn.BatchNorm(
                use_running_average=not train,
                use_scale=False,
                momentum=self.batch_norm_momentum,
                epsilon=epsilon,
                axis_name=self.axis_name,
                dtype=self.dtype,
                name=next(norm_names),
            )

        def normed(pool: bool = False) -> list[Layer]:
            if train and self.norm_gelu:
                momentum, name = self.batch_norm_momentum, next(norm_names)
                return [NormGelu(self.norm_gelu, pool, epsilon, momentum, name=name)]
            return [*([max_pool] if pool else []), norm(), gelu]

        def conv(features: int, below: int = 1, right: int = 1, paired: bool = False) -> nn.Conv:
            return nn.Conv(
                features,
                (3, 3),
                padding=((1, below), (1, right)),
                use_bias=False,
                kernel_init=partly_identity,
                dtype=self.dtype,
                conv_general_dilated=functools.partial(conv3x3, paired=paired),
            )

        height, width = (size - WHITENING_SIDE + 1 for size in x.shape[1:3])
        layers: list[Layer] = [Whitening(self.dtype, name=WHITENING), gelu]
        for i, features in enumerate(self.widths):
            below, right = map(_padding_at_end, (height, width))
            layers += [conv(features, below, right, paired=i == 0), *normed(pool=True)]
            rest = [conv(features), *normed()]
            if self.deep:
                rest = [residual([*rest, conv(features), norm()]), gelu]
            layers += rest
            height, width = height // 2, width // 2
        if self.norm_gelu:
            # Or XLA for a GPU might compute it again, and round it otherwise, where the gradient of
            # the maximum looks for what is as large: finding nothing, it would divide by 0. XLA for
            # a CPU fuses across it.
            layers.append(lax.optimization_barrier)
        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=unit_deviation)
        return nn.Sequential([*layers, global_max_pool, head, scale])(x)

    def torch_layout(self, image_shape: ImageShape) -> TorchLayout:
        """Under its author's names."""
        del image_shape  # nothing is flattened but [B, 1, 1, C]
        names = {WHITENING: "whiten"}
        convs = 3 if self.deep else 2
        for i, (stage, j) in enumerate(itertools.product(range(len(self.widths)), range(convs))):
            names[f"Conv_{i}"] = f"layers.{stage + 1}.conv{j + 1}"
            names[f"BatchNorm_{i}"] = f"layers.{stage + 1}.norm{j + 1}"
        return TorchLayout({**names, "Dense_0": "head"}, None, scaled_norms=False)


def _padding_at_end(size: int) -> int:
    """Of a convolution before a pool, which leaves out the last of an odd number of rows."""
    return 0 if size % 2 and size > 1 else 1


_GELU_SCALE, _GELU_CUBE = math.sqrt(8 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Its input times the normal distribution's share below it.

    Hendrycks and Gimpel, 2016, arXiv:1606.08415, in the form that is within 5e-4 of that; their
    tanh as a sigmoid, as a GPU has an exponential.
    """
    return x * gelu_share(x)


def gelu_share(x: jax.Array) -> jax.Array:
    """What share of its input :func:`gelu` passes on."""
    return nn.sigmoid(_GELU_SCALE * (x + _GELU_CUBE * x**3))


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of :func:`gelu`."""
    share = gelu_share(x)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBE * x * x)
    return share + x * share * (1 - share) * slope


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # From its input alone: XLA would keep the exponential too, and memory is what takes the time.
    return gelu(x), lax.optimization_barrier(x)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient * gelu_slope(x),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _batch_norm(train: bool, axis_name: str | None, dtype: Any) -> Callable[[], nn.BatchNorm]:
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=1e-5,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits to cancellation
        axis_name=axis_name,
        dtype=dtype,  # of what it returns; it computes in float32
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
    config: TrainConfig, num_classes: int, axis_name: str | None, dtype: Any = None
) -> Model:
    """The network that ``config`` names, with its options; ``dtype`` is that of activations.

    ``config.dtype`` is of training alone: scores and predictions are made in float32.
    """
    options: dict[str, Any] = {"axis_name": axis_name, "dtype": dtype}
    if config.model != "airbench":
        options["dropout"] = config.dropout
    if config.model not in ALWAYS_NORMALISED:
        options["batch_norm"] = config.batch_norm
        options["patch_size"] = config.patch_size
    if config.widths:
        options["widths"] = config.widths
    if config.hidden:
        options["hidden"] = config.hidden
    return MODELS[config.model](num_classes=num_classes, **options)
