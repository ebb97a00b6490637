"""Learning-rate schedules and optimizers, from optax. Schedules count steps, not epochs."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from cifar_jax.config import TrainConfig
from cifar_jax.errors import UsageError
from cifar_jax.networks.initializers import WHITENING
from cifar_jax.steps.muon import muon

_MOST_STEPS = 10_000_000  # their rates take a second to compute, and 80 MB


def make_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at each step 0 .. total_steps - 1: that of PyTorch, rounded once.

    OneCycle is that of ``torch.optim.lr_scheduler.OneCycleLR``, whose peak may lie between two
    steps; optax would put it on the step before, and differ by up to 2 % of the peak.

    Raises:
        UsageError: there are so many steps that their rates would fill the memory.
    """
    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if total_steps > _MOST_STEPS:
        raise UsageError(
            f"--epochs {config.epochs} with --batch-size {config.batch_size} are {total_steps:,} "
            f"steps, and --schedule {config.schedule} takes {_MOST_STEPS:,} at most",
            fix="give fewer --epochs, a larger --batch-size, or --schedule constant",
        )
    steps = np.arange(total_steps)
    if config.schedule == "onecycle":
        top = 0.3 * total_steps - 1
        rates = np.where(
            steps <= top,
            _cosine(peak / 25, peak, steps / top),
            _cosine(peak, peak / 25 / 1e4, (steps - top) / (total_steps - 1 - top)),
        )
    elif config.schedule == "linear":
        rates = peak * (1 - steps / total_steps)
    elif config.schedule == "cosine":
        rates = _cosine(peak, 0.0, steps / max(total_steps - 1, 1))
    else:
        assert_never(config.schedule)
    return lambda step: jnp.asarray(rates)[step]


def _cosine(start: float, end: float, progress: NDArray[Any]) -> NDArray[Any]:
    """From ``start`` at progress 0 to ``end`` at 1."""
    return end + (start - end) * (1 + np.cos(np.pi * progress)) / 2


def make_optimizer(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of ``config``: clipping, then weight decay on kernels, then the update rule.

    For ``sgd`` and ``adam`` the decay is L2 (added to the gradient, as in PyTorch); for ``adamw``
    it is decoupled (Loshchilov and Hutter, 2019, arXiv:1711.05101). ``muon`` trains the kernels of
    convolutions, and Adam everything else, at a tenth of the learning rate.
    """
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay and config.optimizer != "adamw":
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=is_kernel))
    if config.optimizer == "sgd":
        parts.append(optax.sgd(schedule, config.momentum or None, config.nesterov))
    elif config.optimizer == "adam":
        parts.append(optax.adam(schedule))
    elif config.optimizer == "muon":
        of_kernels = muon(schedule, config.momentum)
        of_all_else = optax.adam(lambda step: 0.1 * schedule(step))
        parts.append(optax.partition({True: of_kernels, False: of_all_else}, is_convolution))
    elif config.optimizer == "adamw":
        parts.append(optax.adamw(schedule, weight_decay=config.weight_decay, mask=is_kernel))
    else:
        assert_never(config.optimizer)
    return optax.chain(*parts)


def is_convolution(params: Any) -> Any:
    """A tree of booleans: which leaves are trained kernels of convolutions."""
    kernels = is_kernel(params)
    return jax.tree.map(lambda leaf, kernel: kernel and leaf.ndim == 4, params, kernels)


def is_kernel(params: Any) -> Any:
    """A tree of booleans: which leaves are trained kernels; airbench's first is not."""

    def is_one(path: Any, leaf: Any) -> bool:
        return path[-1].key == "kernel" and path[0].key != WHITENING

    return jax.tree_util.tree_map_with_path(is_one, params)
