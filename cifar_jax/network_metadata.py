"""What a network's tensors do not say, as the metadata beside them: in checkpoints and files."""

from __future__ import annotations

import contextlib
import json
import math
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar_jax.config import NOT_PART_OF_THE_RUN, TrainConfig, from_json, to_json
from cifar_jax.dataset import Dataset, ImageShape
from cifar_jax.errors import CifarJaxError, ExitCode, first_line
from cifar_jax.images import MAX_PIXELS

if TYPE_CHECKING:
    from cifar_jax.trained import TrainedNetwork

# What values of other types, and numbers that cannot be, raise in the parser.
_WRONG_VALUES = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
_OF_THIS_MACHINE = NOT_PART_OF_THE_RUN | {"initial_weights"}


class Description(NamedTuple):
    """All of a :class:`cifar_jax.trained.TrainedNetwork` but its weights and its data."""

    config: TrainConfig
    class_names: tuple[str, ...]
    image_shape: ImageShape
    mean: tuple[float, ...]
    std: tuple[float, ...]


def describe(config: TrainConfig, network: Dataset | TrainedNetwork) -> dict[str, Any]:
    """A network of ``config``, for the images and classes of ``network``, in JSON's terms."""
    return {
        "config": to_json(config),
        "class_names": network.class_names,
        "image_shape": network.image_shape,
        "mean": network.mean,
        "std": network.std,
    }


def metadata_of(network: TrainedNetwork) -> dict[str, str]:
    """:func:`describe`, each value as JSON text; no paths of this machine."""
    values = describe(network.config, network)
    config = {name: v for name, v in values["config"].items() if name not in _OF_THIS_MACHINE}
    return {name: json.dumps(value) for name, value in {**values, "config": config}.items()}


@contextlib.contextmanager
def refusing(what: str, *, fix: str) -> Iterator[None]:
    """Around what reads a description: it may be anyone's, and its errors become ``what``.

    Raises:
        CifarJaxError: checkpoint; with the reason.
    """
    try:
        yield
    except CifarJaxError as error:
        raise CifarJaxError(ExitCode.CHECKPOINT, f"{what}: {error.what}", fix=fix) from error
    except _WRONG_VALUES as error:
        reason = f"{type(error).__name__} {first_line(error)}"
        raise CifarJaxError(ExitCode.CHECKPOINT, f"{what}: {reason}", fix=fix) from error


def parse_description(values: Mapping[str, Any]) -> Description:
    """The inverse of :func:`describe`, checked; call it under :func:`refusing`.

    Args:
        values: as from JSON; others beside those of a description are passed over.
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
            f"images of {height}x{width}x{channels}: of 1 or 3 channels and at most "
            f"{MAX_PIXELS:,} pixels is what networks here take"
        )
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channel(s)")
    if min(std) <= 0 or not all(map(math.isfinite, mean + std)):
        raise ValueError("std must be above 0, mean and std finite")
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError("class names must be there, and distinct")
    "".join(class_names).encode()  # they are text, and not half of a surrogate pair
    return Description(config, class_names, (height, width, channels), mean, std)
