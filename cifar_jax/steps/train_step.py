"""The training and evaluation steps: pure functions of a state and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.layout import Variables
from cifar_jax.steps.augment import Augmentation, make_augmentation

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """Everything that a step changes. With config and data it determines the rest of the run."""

    step: jax.Array  # int32, optimizer steps done
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def n_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def initial_train_state(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: ImageShape, seed: int
) -> TrainState:
    """The state before the first step. Pure, so that it also works under ``jax.eval_shape``."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
    )


def create_train_state(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: ImageShape, seed: int
) -> TrainState:
    """:func:`initial_train_state`, computed."""
    # Drawing takes a CPU 30 ms, and compiling it with optimizations takes seconds.
    lowered = jax.jit(lambda: initial_train_state(model, tx, image_shape, seed)).lower()
    if jax.default_backend() != "cpu":
        return lowered.compile()()
    return lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})()


def normalize(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pixels 0..255 ``[B, H, W, C]`` -> float32 with mean near 0 and std near 1 in each channel."""
    return (image.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Sums]:
    """One optimizer step on one device's share of a batch.

    All randomness is a function of (seed, step, position in the global batch), so augmentation does
    not depend on the number of devices or micro-batches.

    Args:
        batch: ``image`` uint8 ``[B, H, W, C]`` and ``label`` int32 ``[B]``.
        mean, std: of each channel, in units of 0..1.
        accumulate: the number of micro-batches whose gradients are averaged; divides B.
        axis_name: the pmap axis over which gradients and batch statistics are averaged and sums
            taken; None on a single device.

    Returns:
        The next state, and the sums over the whole batch of ``loss`` (cross-entropy without label
        smoothing), ``correct`` and ``count``.
    """
    device = lax.axis_index(axis_name) if axis_name else 0
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), state.step)
    )
    batch = {**batch, "image": augment_batch(augment_key, batch["image"], augment, device)}
    dropout_key = jax.random.fold_in(dropout_key, device)

    def loss_fn(
        params: Any, batch_stats: Any, micro_batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(micro_batch["image"], mean, std),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        label = micro_batch["label"]
        targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (updated.get("batch_stats", {}), classification_sums(logits, label))

    def micro_step(carry: tuple[Any, Any], xs: tuple[Any, Batch]) -> tuple[tuple[Any, Any], Sums]:
        (batch_stats, grads), (index, micro_batch) = carry, xs
        key = jax.random.fold_in(dropout_key, index)
        (_, (batch_stats, sums)), micro_grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch_stats, micro_batch, key
        )
        return (batch_stats, jax.tree.map(jnp.add, grads, micro_grads)), sums

    start = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
    if accumulate == 1:
        (batch_stats, grads), sums = micro_step(start, (0, batch))
    else:
        micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        (batch_stats, grads), stacked_sums = lax.scan(
            micro_step,
            start,
            (jnp.arange(accumulate), micro_batches),
        )
        grads = jax.tree.map(lambda g: g / accumulate, grads)
        sums = jax.tree.map(lambda s: s.sum(axis=0), stacked_sums)
    if axis_name:
        # Without sync, statistics differ between devices. Running averages are linear in them, so
        # averaging at every step equals averaging once, before they are used.
        grads, batch_stats = lax.pmean((grads, batch_stats), axis_name)
        sums = lax.psum(sums, axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    next_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return next_state, sums


def make_train_step(
    config: TrainConfig,
    model: nn.Module,
    tx: optax.GradientTransformation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """:func:`train_step` with everything but state and batch bound, as ``config`` says."""
    return functools.partial(
        train_step,
        model=model,
        tx=tx,
        augment=make_augmentation(config, mean),
        mean=mean,
        std=std,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        accumulate=config.accumulate,
        axis_name=axis_name,
    )


def augment_batch(
    key: jax.Array, images: jax.Array, augment: Augmentation, device: jax.Array | int
) -> jax.Array:
    """One device's share of a batch, uint8 ``[B, H, W, C]``, augmented as the network sees it.

    An image's key depends on its position in the whole batch, not on its device.
    """
    positions = device * len(images) + jnp.arange(len(images))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    return jax.vmap(augment)(keys, images)


def exact_logits(
    model: nn.Module,
    variables: Variables,
    images: jax.Array,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """The logits of a trained network: images uint8 ``[B, H, W, C]`` -> float32 ``[B, K]``.

    For scores and predictions, in full precision: by default, GPUs multiply in TF32 (about three
    digits).
    """
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, normalize(images, mean, std), train=False)


def eval_step(
    variables: Variables,
    batch: Batch,
    *,
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    axis_name: str | None = None,
) -> Sums:
    """Sums over the images whose ``mask`` is 1; the keys are those of :func:`train_step`.

    Args:
        batch: ``image`` uint8 ``[B, H, W, C]``, ``label`` int32 ``[B]``, ``mask`` float32 ``[B]``.
        axis_name: the pmap axis over which the sums are taken; None on a single device.
    """
    logits = exact_logits(model, variables, batch["image"], mean, std)
    sums = classification_sums(logits, batch["label"], batch["mask"])
    return lax.psum(sums, axis_name) if axis_name else sums


def classification_sums(logits: jax.Array, label: jax.Array, mask: jax.Array | None = None) -> Sums:
    """Sums of cross-entropy, of correct predictions and of images, over logits ``[B, K]``.

    To be divided once, after all batches: a mean of batch means would give the images of a short
    last batch more weight.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = (logits.argmax(axis=-1) == label).astype(jnp.float32)
    if mask is None:
        mask = jnp.ones_like(loss)
    return {
        "loss": (loss * mask).sum(),
        "correct": (correct * mask).sum(),
        "count": mask.sum(),
    }
