"""Learning-rate schedules and optimizers, from optax. Steps are the clock."""

from __future__ import annotations

from typing import Any

import jax
import optax

from cifar_jax.config import TrainConfig


def make_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at each step 0 .. total_steps - 1."""
    peak = config.learning_rate
    # A schedule of T values makes T - 1 moves, as torch's OneCycleLR(total_steps=T) does.
    moves = max(total_steps - 1, 1)
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(moves, peak)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, moves)
    return optax.constant_schedule(peak)


def make_optimizer(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of ``config``: clipping, then weight decay on kernels, then the update rule.

    For ``sgd`` and ``adam`` the decay is L2 (added to the gradient, as PyTorch does); for
    ``adamw`` it is decoupled (Loshchilov and Hutter, 2019, arXiv:1711.05101).
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
    else:
        parts.append(optax.adamw(schedule, weight_decay=config.weight_decay, mask=is_kernel))
    return optax.chain(*parts)


def is_kernel(params: Any) -> Any:
    """A tree of booleans: which leaves are kernels, and not biases or batch-norm parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
