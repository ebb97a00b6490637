"""What a network's tensors do not say, as the metadata of the file that holds them."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

from cifar_jax.config import NOT_PART_OF_THE_RUN, from_json, to_json
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.layout import StateDict
from cifar_jax.state_dicts import variables_of
from cifar_jax.trained import TrainedNetwork


def metadata_of(network: TrainedNetwork) -> dict[str, str]:
    """All of ``network`` but its variables, each value as JSON; no paths of this machine."""
    config = to_json(network.config)
    values = {
        "config": {name: v for name, v in config.items() if name not in NOT_PART_OF_THE_RUN},
        "class_names": network.class_names,
        "image_shape": network.image_shape,
        "mean": network.mean,
        "std": network.std,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def network_of(path: Path, state_dict: StateDict, metadata: dict[str, str]) -> TrainedNetwork:
    """The inverse of :func:`metadata_of`, checked: the file may be anyone's."""
    try:
        config = from_json(json.loads(metadata["config"]))
        class_names = tuple(_list(metadata["class_names"]))
        height, width, channels = map(operator.index, _list(metadata["image_shape"]))
        mean, std = (tuple(map(float, _list(metadata[name]))) for name in ("mean", "std"))
        if min(height, width, channels, *std) <= 0 or not all(map(math.isfinite, mean + std)):
            raise ValueError("sizes and std must be above 0, mean and std finite")
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean {mean} and std {std} are not of {channels} channel(s)")
        if not class_names or len(set(class_names)) < len(class_names):
            raise ValueError("there must be class names, each another one")
        "".join(class_names).encode()  # they are text, and not half of a surrogate pair
    except (
        CifarJaxError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) if isinstance(error, CifarJaxError) else repr(error)
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"the metadata of {path} describes no network of this program: {reason}",
            fix="use the file as cifar_jax.convert wrote it, or save its tensors alone",
        ) from error
    image_shape = (height, width, channels)
    variables = variables_of(state_dict, config, image_shape, len(class_names), path)
    return TrainedNetwork(config, class_names, image_shape, mean, std, variables)


def _list(text: str) -> list[Any]:
    values = json.loads(text)
    if not isinstance(values, list):
        raise ValueError(f"{text:.100} is no list")
    return values
