"""A trained network, as a checkpoint holds it: all that predicting takes, and no training state."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cifar_jax import checkpoint
from cifar_jax.config import TrainConfig, from_json, to_json
from cifar_jax.dataset import ImageShape
from cifar_jax.errors import CifarJaxError, ExitCode, first_line
from cifar_jax.images import MAX_PIXELS
from cifar_jax.layout import StateDict, Variables, to_torch
from cifar_jax.metrics import RunningSums
from cifar_jax.models import create_model
from cifar_jax.optim import make_optimizer, make_schedule
from cifar_jax.train_step import TrainState, initial_train_state
from cifar_jax.workdir import checkpoints_of, step_folder

UNKNOWN_DATA = "unknown"  # as the digest of what a converted network was trained on


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network, its weights, and what its images and answers mean.

    Attributes:
        class_names: the name of each label, in label order.
        image_shape: ``(H, W, C)`` of the images of training.
        mean, std: of each channel, in units of 0..1; images are normalised by them.
        variables: ``params`` and ``batch_stats`` with NumPy leaves.
        data_digest: of what it was trained on, as in ``Dataset``.
    """

    config: TrainConfig
    class_names: tuple[str, ...]
    image_shape: ImageShape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Variables
    data_digest: str = UNKNOWN_DATA

    @property
    def model(self) -> nn.Module:
        return create_model(self.config, len(self.class_names))

    @property
    def n_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    def state_dict(self) -> StateDict:
        """The variables under PyTorch's names and in its layout."""
        return to_torch(self.variables, self.model.torch_layout(self.image_shape))


def load(path: Path) -> TrainedNetwork:
    """The network in ``path``, a run's workdir or one step's folder: see :func:`step_folder`.

    Raises:
        CifarJaxError: checkpoint; there is none at ``path``, or it cannot be read.
    """
    step = step_folder(path)
    metadata = checkpoint.restore_metadata(step)
    try:
        network = parse_description(metadata)
        digest = str(metadata["data"]["digest"])
        # The shapes to read are those of the network, whatever amount of memory a file may claim.
        like = _shapes(network.config, len(network.class_names), network.image_shape)
    except (*DESCRIBES_NONE, CifarJaxError) as error:
        reason = f"{type(error).__name__} {first_line(error)}"
        if isinstance(error, CifarJaxError):
            reason = error.what
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"the checkpoint {step} holds no network of this program: {reason}",
            fix="use the version of cifar_jax that wrote it",
        ) from error
    state = checkpoint.restore(step, like).state
    return dataclasses.replace(network, variables=dict(state.variables), data_digest=digest)


# What :func:`parse_description` raises, besides the ``CifarJaxError`` of a config.
DESCRIBES_NONE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


def parse_description(values: Mapping[str, Any]) -> TrainedNetwork:
    """The network, still without variables, that a file describes; the file may be anyone's.

    Args:
        values: ``config``, ``class_names``, ``image_shape``, ``mean`` and ``std``, as from JSON.

    Raises:
        CifarJaxError: usage; the config is none.
        One of ``DESCRIBES_NONE``: another value is missing, or cannot be.
    """
    config = from_json(values["config"], where="its config")
    lists = ("class_names", "image_shape", "mean", "std")
    if wrong := [name for name in lists if not isinstance(values[name], list | tuple)]:
        raise ValueError(f"{wrong[0]} is no list")
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
    return TrainedNetwork(config, class_names, (height, width, channels), mean, std, {})


def _shapes(config: TrainConfig, num_classes: int, image_shape: ImageShape) -> TrainState:
    """The training state of such a network, of shapes instead of arrays."""
    model = create_model(config, num_classes)
    tx = make_optimizer(config, make_schedule(config, 1))
    shapes: TrainState = jax.eval_shape(
        lambda: initial_train_state(model, tx, image_shape, config.seed)
    )
    return shapes


def save(network: TrainedNetwork, workdir: Path, *, source: str) -> None:
    """Write ``network`` as a workdir that :func:`load` reads: ``config.json``, ``checkpoints/0``.

    Args:
        source: where the network comes from; it stands for the name of the data, which is unknown.

    Raises:
        CifarJaxError: environment; the checkpoint cannot be written.
        OSError: nor can the workdir.
    """
    params = network.variables["params"]
    state = TrainState(
        step=np.array(0, np.int32),
        params=params,
        batch_stats=network.variables["batch_stats"],
        opt_state=make_optimizer(network.config, make_schedule(network.config, 1)).init(params),
    )
    metadata = {
        "config": to_json(network.config),
        "data": {"name": f"unknown data ({source})", "digest": UNKNOWN_DATA},
        "class_names": network.class_names,
        "image_shape": network.image_shape,
        "mean": network.mean,
        "std": network.std,
        "history": [],
        "sums": dataclasses.asdict(RunningSums()),
        "seconds": 0.0,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(to_json(network.config), indent=2) + "\n")
    checkpoint.save(checkpoints_of(workdir), 0, state, metadata, best_step=0)
