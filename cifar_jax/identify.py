"""Which network of the zoo do tensors of PyTorch belong to? Their names and shapes tell."""

from __future__ import annotations

import itertools
import json
import math
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.checkpoints.network_metadata import Description, parse_description, refusing
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import ModelName, TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.errors import CheckpointError, CifarJaxError, UsageError
from cifar_jax.layout import (
    StateDict,
    TorchLayout,
    Variables,
    fold_bias_into_batch_norm,
    from_torch,
    to_torch,
)
from cifar_jax.networks.airbench import Airbench
from cifar_jax.networks.initializers import WHITENING_SIDE
from cifar_jax.networks.models import ConvNet, Model, create_model, torch_layout

Shape = tuple[int, ...]

_USUAL_SIDE = 32  # of CIFAR-10's images, if a network takes any
_USUAL_DROPOUT = 0.5  # PyTorch's default: names reveal where dropout is, but not its rate

# Differences of each kind that an error lists; an entirely different network has dozens.
_NAMED = 5


class Network(NamedTuple):
    """A network of the zoo, without its weights."""

    config: TrainConfig
    image_shape: ImageShape
    num_classes: int

    @property
    def model(self) -> Model:
        return create_model(self.config, self.num_classes)

    @property
    def layout(self) -> TorchLayout:
        return torch_layout(self.model, self.image_shape)


def identify(
    state_dict: StateDict, *, model: ModelName | None = None, image_size: int | None = None
) -> Network:
    """The network whose layer names are closest to those of ``state_dict``.

    If no names match, it is one whose tensors have the same shapes, if there is one.

    Widths and hidden units are read off the tensors; the config sets only what differs from the
    model's defaults. :func:`variables_of` checks whether the tensors really are that network's.

    Args:
        model: the only model to consider; None for all.
        image_size: the side of the images, for networks that take any.

    Raises:
        UsageError: ``image_size`` leaves nothing after the network's poolings.
    """
    layers = {name.rpartition(".")[0] for name in state_dict}
    names: tuple[ModelName, ...] = (model,) if model else typing.get_args(ModelName)
    candidates = [
        network
        for name in names
        for network in _candidates(name, state_dict, image_size)
        if model or hasattr(network.model, "torch_layout")  # a user's own may have none
    ]

    def distance(network: Network) -> int:
        return len(layers.symmetric_difference(network.layout.names.values()))

    nearest = min(candidates, key=distance)
    if distance(nearest):
        shapes = Counter(array.shape for array in state_dict.values())
        nearest = next((c for c in candidates if _has_shapes(c, shapes)), nearest)
    side, model = nearest.image_shape[0], nearest.config.model
    divisor = _divisor(nearest.config)
    smallest = divisor + (WHITENING_SIDE - 1 if model == "airbench" else 0)
    if side < smallest:
        raise UsageError(
            f"--image-size {side} is too small for {model}, which divides it by {divisor}",
            fix=f"give {smallest} or more",
        )
    return nearest


def variables_of(state_dict: StateDict, network: Network, source: Path) -> Variables:
    """The tensors, which must be exactly those of ``network``, as variables in Flax's layout.

    The bias of a convolution before a batch norm, which our networks do without, is folded into the
    norm.

    Args:
        source: the file, for errors.

    Raises:
        CheckpointError: tensors are missing, extra or of another shape.
    """
    config = network.config
    try:
        if len(config.widths) + len(config.hidden) > len(state_dict):
            raise ValueError("it has more layers than the file has tensors")
        layout, expected = network.layout, _expected_shapes(network)
    except (CifarJaxError, OverflowError, ValueError) as error:  # metadata can hold any numbers
        raise CheckpointError(
            f"{source} claims to hold {_describe(config)}, which is impossible: {error}",
            fix="use another copy, or save its tensors alone",
        ) from error
    for layer, following in itertools.pairwise(layout.names.values()):
        if f"{layer}.bias" in state_dict and f"{following}.running_mean" in expected:
            expected[f"{layer}.bias"] = expected[f"{following}.running_mean"]
    found = {name: array.shape for name, array in state_dict.items()}
    if found != expected and Counter(found.values()) == Counter(expected.values()):
        renamed = ", ".join(f"{a} is {b}" for a, b in _renamed(found, expected))
        raise CheckpointError(
            f"the tensors in {source} have the shapes of {_describe(config)}, but other names; in "
            f"order, {renamed}",
            fix="if that is right, rename them in the state_dict and save it again",
        )
    if found != expected:
        raise CheckpointError(
            f"the tensors in {source} are not those of {_describe(config)}: "
            f"{_differences(found, expected)}",
            fix="remove tensors that are not the network's, such as a loss's weights; or name the "
            "network with --model; networks that are not in the zoo cannot be converted",
        )
    if not layout.scaled_norms:
        _check_unscaled(state_dict, layout, config, source)
    return from_torch(fold_bias_into_batch_norm(state_dict, layout), layout)


def network_of(path: Path, state_dict: StateDict, metadata: dict[str, str]) -> TrainedNetwork:
    """The network in the file ``path``, as its own ``metadata`` describes it; both are untrusted.

    Args:
        metadata: from :meth:`cifar_jax.checkpoints.trained.TrainedNetwork.metadata`; other
            keys are ignored.

    Raises:
        CheckpointError: the metadata describes no network, or one of other tensors.
    """
    with refusing(
        f"the metadata of {path} describes no network of this program",
        fix="use the file as cifar_jax.convert wrote it, or save its tensors alone",
    ):
        known = {name: json.loads(metadata[name]) for name in Description._fields}
        description = parse_description(known)
    config, class_names, image_shape, *_ = description
    network = Network(config, image_shape, len(class_names))
    return TrainedNetwork(*description, variables_of(state_dict, network, path))


def _check_unscaled(
    state_dict: StateDict, layout: TorchLayout, config: TrainConfig, source: Path
) -> None:
    for layer, torch_name in layout.names.items():
        name = f"{torch_name}.weight"
        if layer.startswith("BatchNorm") and (state_dict[name] != 1).any():
            raise CheckpointError(
                f"{name} in {source} is not all ones, but {config.model}'s norms have no scale",
                fix="train with that weight fixed, as the network's author does",
            )


def _candidates(
    name: ModelName, state_dict: StateDict, image_size: int | None
) -> Iterator[Network]:
    """The networks called ``name``, with the widths of ``state_dict`` and any options."""
    for kernels, weights in _readings(state_dict):
        yield from _of_widths(name, kernels, weights, image_size)


def _readings(state_dict: StateDict) -> Iterator[tuple[list[Shape], list[Shape]]]:
    """Guesses of (shapes of convolution kernels, shapes of Dense weights).

    If a weight is missing, the layer's bias still gives its width; if its position does not reveal
    the kind of layer, both are tried.
    """
    shapes: list[Shape] = []
    for name in sorted(state_dict, key=_network_order):
        layer, _, what = name.rpartition(".")
        shape = state_dict[name].shape
        if what == "weight" and len(shape) in (2, 4):  # [O, I], [O, I, H, W]
            shapes.append(shape)
        elif (
            what == "bias"
            and len(shape) == 1
            and not {f"{layer}.weight", f"{layer}.running_mean"} & set(state_dict)
        ):
            shapes.append(shape)  # [O]
    for unknown in (4, 2):
        kernels: list[Shape] = []
        weights: list[Shape] = []
        for index, shape in enumerate(shapes):
            ndim = len(shape)
            if ndim == 1:
                conv_follows = any(len(later) == 4 for later in shapes[index:])
                ndim = 4 if conv_follows else 2 if weights else unknown
            whole = shape if len(shape) > 1 else (*shape, 3, 3, 3)[:ndim]
            (kernels if ndim == 4 else weights).append(whole)
        yield kernels, weights
        if all(len(shape) > 1 for shape in shapes):
            break


def _of_widths(
    name: ModelName, kernels: list[Shape], weights: list[Shape], image_size: int | None
) -> Iterator[Network]:
    num_classes = weights[-1][0] if weights else 10
    own = create_model(TrainConfig(model=name), num_classes)
    if not isinstance(own, Model):  # a user's own, with its own options
        side, channels = image_size or _USUAL_SIDE, kernels[0][1] if kernels else 3
        yield Network(TrainConfig(model=name), (side, side, channels), num_classes)
        return
    widths: Shape = ()
    hidden: Shape = ()
    if own.widths:
        widths = tuple(shape[0] for shape in kernels)
    kernel = kernels[0] if kernels else None
    if name == "resnet9":  # conv1 to conv4 come first, then the residual blocks
        widths = widths[:4] if len(widths) >= 4 else ()
    elif name == "airbench":  # two of each width, then the first of all, called whiten
        widths = widths[:-1:2]
        kernel = kernels[-1] if kernels else None
    elif name != "linear":
        hidden = tuple(shape[0] for shape in weights[:-1])
    # Colours times the area of a patch; no square is three times another, so only one side fits.
    inputs = kernel[1] if kernel else 3
    sides = [s for c in (3, 1) if (s := math.isqrt(inputs // c)) ** 2 * c == inputs]
    choices = itertools.product(sorted({1, *sides}), (False, True), (0.0, _USUAL_DROPOUT))
    for patch_size, batch_norm, dropout in choices:
        try:
            config = TrainConfig(
                model=name,
                widths=widths if widths != own.widths else (),
                hidden=hidden if hidden and hidden != own.hidden else (),
                patch_size=patch_size,
                batch_norm=batch_norm,
                dropout=dropout,
            )
        except CifarJaxError:
            continue  # an option that this model does not have
        weight = weights[0] if weights else None
        image_shape = _image_shape(config, kernel, weight, image_size)
        yield Network(config, image_shape, num_classes)


def _image_shape(
    config: TrainConfig, kernel: Shape | None, weight: Shape | None, image_size: int | None
) -> ImageShape:
    """The image shapes that fit the first convolution's kernel and the first Dense weight."""
    inputs = weight[1] if weight else 0
    model = create_model(config, 1)
    if not model.widths:
        if image_size:
            return image_size, image_size, max(inputs // image_size**2, 1)
        for channels in (3, 1):
            side = math.isqrt(inputs // channels)
            if side and side * side * channels == inputs:
                return side, side, channels
        return _USUAL_SIDE, _USUAL_SIDE, 3
    channels = max(kernel[1] // config.patch_size**2, 1) if kernel else 3
    side = image_size or _USUAL_SIDE
    if not image_size and takes_one_size(config):
        side = math.isqrt(inputs // model.widths[-1]) * _divisor(config) or _USUAL_SIDE
    return side, side, channels


def takes_one_size(config: TrainConfig) -> bool:
    """Whether the network flattens, so that its tensors determine the size of the images."""
    return config.model in ("linear", "mlp", "cnn", "cnn-wide")


def _divisor(config: TrainConfig) -> int:
    """The factor by which the network reduces the side of the image, patches included."""
    if config.model == "resnet9":
        return 2**3
    model = create_model(config, 1)
    if isinstance(model, Airbench):
        return 2 ** len(model.widths)
    if not isinstance(model, ConvNet):
        return 1
    return config.patch_size * 2 ** (len(model.widths) // model.convs_per_pool)


def _expected_shapes(network: Network) -> dict[str, Shape]:
    """The shape of each PyTorch tensor by name, in the order of the network."""
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    shapes = jax.eval_shape(network.model.init, jax.random.key(0), images)
    # Arrays that take no memory: contradictory shapes can multiply to terabytes.
    variables = jax.tree.map(lambda leaf: np.empty(leaf.shape, "V0"), dict(shapes))
    tensors = to_torch(variables, network.layout)
    return {n: a.shape for n, a in tensors.items() if not n.endswith("num_batches_tracked")}


def _has_shapes(network: Network, shapes: Counter[Shape]) -> bool:
    """Whether the network's tensors have these shapes, whatever their names."""
    try:
        return Counter(_expected_shapes(network).values()) == shapes
    except CifarJaxError:  # the images are too small for it
        return False


def _describe(config: TrainConfig) -> str:
    options = [
        ("patches", config.patch_size > 1),
        ("batch norm", config.batch_norm),
        ("dropout", config.dropout),
    ]
    given = [name for name, value in options if value]
    return config.model + (f" with {' and '.join(given)}" if given else "")


def _renamed(found: dict[str, Shape], expected: dict[str, Shape]) -> list[tuple[str, str]]:
    """Pairs of a name in the file that is not ours, and our next name with that shape."""
    left = [name for name in expected if name not in found]
    pairs = []
    for name, shape in found.items():
        if name not in expected:
            match = next((other for other in left if expected[other] == shape), "")
            left = [other for other in left if other != match]
            pairs.append((name, match))
    return pairs


def _differences(found: dict[str, Shape], expected: dict[str, Shape]) -> str:
    missing = [f"{n} {list(shape)}" for n, shape in expected.items() if n not in found]
    extra = [
        f"{n} {list(found[n])}" for n in sorted(found, key=_network_order) if n not in expected
    ]
    mis_shaped = [
        f"{n} {list(found[n])} instead of {list(shape)}"
        for n, shape in expected.items()
        if found.get(n, shape) != shape
    ]
    kinds = {"missing": missing, "extra": extra, "of another shape": mis_shaped}
    return "; ".join(
        f"{kind}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for kind, names in kinds.items()
        if names
    )


def _network_order(name: str) -> list[str]:
    """A key that sorts ``network.2`` before ``network.10``: files do not keep their order."""
    return [part.zfill(9) if part.isdecimal() else part for part in name.split(".")]
