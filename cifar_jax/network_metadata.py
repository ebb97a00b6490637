"""What a network's tensors do not say, as the metadata of the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cifar_jax.config import NOT_PART_OF_THE_RUN, to_json
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.layout import StateDict
from cifar_jax.state_dicts import variables_of
from cifar_jax.trained import DESCRIBES_NONE, TrainedNetwork, parse_description

_OF_THIS_MACHINE = NOT_PART_OF_THE_RUN | {"initial_weights"}
_DESCRIPTION = ("config", "class_names", "image_shape", "mean", "std")


def metadata_of(network: TrainedNetwork) -> dict[str, str]:
    """All of ``network`` but its variables, each value as JSON; no paths of this machine."""
    config = to_json(network.config)
    values = {
        "config": {name: v for name, v in config.items() if name not in _OF_THIS_MACHINE},
        "class_names": network.class_names,
        "image_shape": network.image_shape,
        "mean": network.mean,
        "std": network.std,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def network_of(path: Path, state_dict: StateDict, metadata: dict[str, str]) -> TrainedNetwork:
    """The inverse of :func:`metadata_of`, checked: the file may be anyone's."""
    described = {name: text for name, text in metadata.items() if name in _DESCRIPTION}
    try:
        network = parse_description({name: json.loads(text) for name, text in described.items()})
    except (*DESCRIBES_NONE, CifarJaxError, RecursionError) as error:
        reason = error.what if isinstance(error, CifarJaxError) else repr(error)
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"the metadata of {path} describes no network of this program: {reason}",
            fix="use the file as cifar_jax.convert wrote it, or save its tensors alone",
        ) from error
    variables = variables_of(
        state_dict, network.config, network.image_shape, len(network.class_names), path
    )
    return dataclasses.replace(network, variables=variables)
