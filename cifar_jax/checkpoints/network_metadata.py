"""What a network's tensors do not say: the metadata stored beside them in checkpoints and files."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cifar_jax.config import TrainConfig, from_json, to_json
from cifar_jax.data.dataset import ImageShape
from cifar_jax.data.images import MAX_PIXELS
from cifar_jax.errors import CheckpointError, CifarJaxError, first_line

# Raised by the parser for values of wrong types, or out of range.
_WRONG_VALUES = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


class Description(NamedTuple):
    """A network and the meaning of its inputs and outputs, without its weights.

    Attributes:
        class_names: the name of each label, in label order.
        image_shape: ``(H, W, C)`` of the training images.
        mean, std: of each channel, in units of 0..1; images are normalised by them.
    """

    config: TrainConfig
    class_names: tuple[str, ...]
    image_shape: ImageShape
    mean: tuple[float, ...]
    std: tuple[float, ...]


def describe(description: Description) -> dict[str, Any]:
    """``description`` as JSON values."""
    return {**description._asdict(), "config": to_json(description.config)}


@contextlib.contextmanager
def refusing(what: str, *, fix: str) -> Iterator[None]:
    """Around code that parses an untrusted description: its errors are raised as ``what``.

    Raises:
        CheckpointError: ``what``, with the reason.
    """
    try:
        yield
    except CifarJaxError as error:
        raise CheckpointError(f"{what}: {error.what}", fix=fix) from error
    except _WRONG_VALUES as error:
        reason = f"{type(error).__name__} {first_line(error)}"
        raise CheckpointError(f"{what}: {reason}", fix=fix) from error


def parse_description(values: Mapping[str, Any]) -> Description:
    """The inverse of :func:`describe`, checked; call it under :func:`refusing`.

    Args:
        values: JSON values; keys that are not part of a description are ignored.
    """
    config = from_json(values["config"], where="its config")
    lists = ("class_names", "image_shape", "mean", "std")
    if wrong := [name for name in lists if not isinstance(values[name], list | tuple)]:
        raise ValueError(f"{wrong[0]} is not a list")
    class_names = tuple(values["class_names"])
    height, width, channels = map(operator.index, values["image_shape"])
    mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
    if channels not in (1, 3) or height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(
            f"images of {height}x{width}x{channels}: networks here take 1 or 3 channels and at "
            f"most {MAX_PIXELS:,} pixels"
        )
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channel(s)")
    if min(std) <= 0 or not all(map(math.isfinite, mean + std)):
        raise ValueError("std must be above 0, mean and std finite")
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError("class names must be given, and distinct")
    "".join(class_names).encode()  # raises unless they are valid text
    return Description(config, class_names, (height, width, channels), mean, std)
