"""Trained networks in checkpoints: everything that inference needs, without the training state."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.checkpoints import checkpoint
from cifar_jax.checkpoints.network_metadata import (
    Description,
    describe,
    parse_description,
    refusing,
)
from cifar_jax.checkpoints.workdir import checkpoints_of, step_folder, write_config
from cifar_jax.config import NOT_PART_OF_THE_RUN, TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.layout import StateDict, Variables, to_torch
from cifar_jax.networks.models import create_model, torch_layout
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import select_devices
from cifar_jax.steps.train_step import TrainState, initial_train_state

UNKNOWN_DATA = "unknown"  # as the digest of what a converted network was trained on
_OF_THIS_MACHINE = NOT_PART_OF_THE_RUN | {"initial_weights"}


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network with its weights; the first five fields are its :class:`Description`.

    Attributes:
        variables: ``params`` and ``batch_stats`` with NumPy leaves.
        data_digest: identifies the training data, as in ``Dataset``.
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
    def description(self) -> Description:
        return Description(self.config, self.class_names, self.image_shape, self.mean, self.std)

    @property
    def n_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    def metadata(self) -> dict[str, str]:
        """What the tensors do not say, as JSON texts to store beside them in another file.

        Paths of this machine are left out.
        """
        values = describe(self.description)
        config = {name: v for name, v in values["config"].items() if name not in _OF_THIS_MACHINE}
        return {name: json.dumps(value) for name, value in {**values, "config": config}.items()}

    def state_dict(self) -> StateDict:
        """The variables under PyTorch's names and in its layout.

        Raises:
            UsageError: as of :func:`cifar_jax.networks.models.torch_layout`.
        """
        return to_torch(self.variables, torch_layout(self.model, self.image_shape))


def load(path: str | Path) -> TrainedNetwork:
    """The network in ``path``, a run's workdir or one step's folder: see :func:`step_folder`.

    Raises:
        CheckpointError: there is none at ``path``, or it cannot be read.
        ResourceError: JAX has no device of the requested kind.
    """
    step = step_folder(Path(path))
    select_devices("all")  # raises if there are none
    metadata = checkpoint.restore_metadata(step)
    with refusing(
        f"the checkpoint {step} contains no network of this package",
        fix="use the version of cifar_jax that wrote it",
    ):
        description = parse_description(metadata)
        digest = str(metadata["data"]["digest"])
        # Only arrays with the network's shapes are read, whatever size the files may claim.
        like = _shapes(description)
    state = checkpoint.restore(step, like).state
    return TrainedNetwork(*description, dict(state.variables), digest)


def _shapes(description: Description) -> TrainState:
    """The training state of such a network, with shapes instead of arrays."""
    config = description.config
    model = create_model(config, len(description.class_names))
    tx = make_optimizer(config, make_schedule(config, 1))
    shapes: TrainState = jax.eval_shape(
        lambda: initial_train_state(model, tx, description.image_shape, config.seed)
    )
    return shapes


def save(network: TrainedNetwork, workdir: Path, *, source: str) -> None:
    """Write ``network`` as a workdir that :func:`load` reads: ``config.json``, ``checkpoints/0``.

    Args:
        source: where the network comes from, recorded in place of the unknown data's name.

    Raises:
        ResourceError: the checkpoint cannot be written.
        OSError: ``workdir`` cannot be written.
    """
    params = network.variables["params"]
    state = TrainState(
        step=np.array(0, np.int32),
        params=params,
        batch_stats=network.variables["batch_stats"],
        opt_state=make_optimizer(network.config, make_schedule(network.config, 1)).init(params),
    )
    metadata = {
        **describe(network.description),
        "data": {"name": f"unknown data ({source})", "digest": UNKNOWN_DATA},
        "history": [],
        "sums": dataclasses.asdict(RunningSums()),
        "seconds": 0.0,
    }
    write_config(network.config, workdir)
    checkpoint.save(checkpoints_of(workdir), 0, state, metadata, best_step=0)
