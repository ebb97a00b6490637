"""A whole run as one pure function, without the host: whitening, all epochs, the test."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from airbench.recipe import Recipe
from cifar_jax.networks.initializers import WHITENING, whiten, whitening_stride
from cifar_jax.steps.augment import blank
from cifar_jax.steps.train_step import TrainState, classification_sums, normalize


class Examples(NamedTuple):
    """Images uint8 ``[N, H, W, C]`` and labels int32 ``[N]``, on the device."""

    images: jax.Array
    labels: jax.Array


class Setting(NamedTuple):
    """What stays the same during a run.

    Attributes:
        mean, std: of each channel, in units of 0..1.
        on_step: called on the host after each step, which takes time.
    """

    recipe: Recipe
    model: nn.Module
    tx: optax.GradientTransformation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    on_step: Callable[[], None] | None = None


class Batch(NamedTuple):
    """Which images make a batch, and how each is shown.

    Attributes:
        index: int32 ``[B]``.
        corner: int32 ``[B, 2]``, of the crop in the padded image.
        mirrored: bool ``[B]``.
        hole: float32 ``[B, 2]``, the corner of the blanked square, as a share (0 to 1) of the
            range where it can be; None for no square.
    """

    index: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    corner: jax.Array
    mirrored: jax.Array
    hole: jax.Array | None = None


def train_and_score(
    state: TrainState, key: jax.Array, train: Examples, test: Examples, *, setting: Setting
) -> dict[str, jax.Array]:
    """A whole run, from the first parameters to the answers on ``test``.

    Returns:
        ``correct``, the number of right answers, and ``loss`` ``[steps]``, the mean training loss
        of each batch: cross-entropy with smoothed labels.
    """
    state, losses = train_whole(state, key, train, setting=setting)
    correct = score(state, test, setting=setting)
    return {"correct": correct, "loss": losses}


def train_whole(
    state: TrainState, key: jax.Array, train: Examples, *, setting: Setting
) -> tuple[TrainState, jax.Array]:
    """The state after all epochs, and the mean loss of each batch ``[steps]``."""
    recipe = setting.recipe
    some = train.images[:: whitening_stride(len(train.images))]
    state = state.replace(params=whiten(state.params, normalize(some, setting.mean, setting.std)))
    padded = reflect_pad(train.images, recipe.crop)
    flip_key, epochs_key = jax.random.split(key)
    mirrored_at_first = jax.random.bernoulli(flip_key, shape=(len(train.labels),))

    def epoch(learn_whitening: bool, state: TrainState, number: jax.Array) -> Any:
        batches = draw_batches(
            jax.random.fold_in(epochs_key, number), mirrored_at_first, number, recipe
        )
        step = functools.partial(
            train_step, padded, train.labels, learn_whitening=learn_whitening, setting=setting
        )
        return lax.scan(step, state, batches)

    # Two loops: once the whitening is fixed, no gradient goes back as far as its output.
    numbers = jnp.arange(recipe.epochs)
    first, rest = jnp.split(numbers, [min(recipe.whitening_epochs, recipe.epochs)])
    state, first_losses = lax.scan(functools.partial(epoch, True), state, first)
    state, losses = lax.scan(functools.partial(epoch, False), state, rest)
    return state, jnp.concatenate([first_losses.ravel(), losses.ravel()])


def reflect_pad(images: jax.Array, pixels: int) -> jax.Array:
    """``[N, H, W, C]`` -> ``[N, H + 2 pixels, W + 2 pixels, C]``."""
    return jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")


def draw_batches(
    key: jax.Array, mirrored_at_first: jax.Array, epoch: jax.Array | int, recipe: Recipe
) -> Batch:
    """An epoch's batches, each array with the steps as its first axis.

    Each image is mirrored or not at random in the first epoch, and then alternates, so that two
    epochs show both ways (Jordan, 2024, arXiv:2404.00498, section 3.6).
    """
    n = len(mirrored_at_first)
    order_key, corner_key = jax.random.split(key)
    order = jax.random.permutation(order_key, n)
    corners = jax.random.randint(corner_key, (n, 2), 0, 2 * recipe.crop + 1)
    mirrored = (mirrored_at_first ^ (epoch % 2 == 1))[order]
    hole = jax.random.uniform(jax.random.fold_in(key, 2), (n, 2)) if recipe.cutout else None
    steps = n // recipe.batch_size

    def cut(x: jax.Array) -> jax.Array:
        return x[: steps * recipe.batch_size].reshape(steps, recipe.batch_size, *x.shape[1:])

    return jax.tree.map(cut, Batch(order, corners, mirrored, hole))


def crop_and_flip(padded: jax.Array, batch: Batch, crop: int) -> jax.Array:
    """The images of ``batch``, uint8 ``[B, H, W, C]``, cropped from the padded ones and flipped."""
    _, height, width, channels = padded.shape
    size = (1, height - 2 * crop, width - 2 * crop, channels)

    def one(index: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(padded, (index, corner[0], corner[1], 0), size)[0]

    images = jax.vmap(one)(batch.index, batch.corner)
    return jnp.where(batch.mirrored[:, None, None, None], images[:, :, ::-1], images)


def cut_out(images: jax.Array, hole: jax.Array, side: int) -> jax.Array:
    """Normalised images ``[B, H, W, C]``, in each a square of 0, the mean.

    Args:
        hole: as in :class:`Batch`. The whole square lies in the image, as the author has it, and
            unlike in :func:`cifar_jax.steps.augment.cutout`.
    """
    places = jnp.array(images.shape[1:3]) - side + 1
    corners = jnp.floor(hole * places).astype(jnp.int32)
    return jax.vmap(lambda image, corner: blank(image, corner, side, 0.0))(images, corners)


def train_step(
    padded: jax.Array,
    labels: jax.Array,
    state: TrainState,
    batch: Batch,
    *,
    learn_whitening: bool,
    setting: Setting,
) -> tuple[TrainState, jax.Array]:
    """The next state, and the mean loss of the batch."""
    recipe, model = setting.recipe, setting.model
    images = normalize(crop_and_flip(padded, batch, recipe.crop), setting.mean, setting.std)
    if batch.hole is not None:
        images = cut_out(images, batch.hole, recipe.cutout)
    targets = jax.nn.one_hot(labels[batch.index], model.num_classes)
    targets = optax.smooth_labels(targets, recipe.label_smoothing)
    fixed = {} if learn_whitening else {WHITENING: state.params[WHITENING]}
    learned = {name: layer for name, layer in state.params.items() if name not in fixed}

    def loss_fn(learned: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": {**learned, **fixed}, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy(logits, targets).sum(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
    grads = {**grads, **jax.tree.map(jnp.zeros_like, fixed)}
    updates, opt_state = setting.tx.update(grads, state.opt_state, state.params)
    next_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if setting.on_step:
        jax.debug.callback(setting.on_step)
    return next_state, loss / recipe.batch_size


def score(state: TrainState, test: Examples, *, setting: Setting) -> jax.Array:
    """The number of right answers on ``test``, by the mean of the logits for six views of each."""
    n = len(test.labels)
    batches = math.ceil(n / setting.recipe.batch_size)
    size = math.ceil(n / batches)
    if missing := batches * size - n:  # the last batch is padded; no answer is -1
        test = Examples(
            jnp.pad(test.images, ((0, missing), (0, 0), (0, 0), (0, 0))),
            jnp.pad(test.labels, (0, missing), constant_values=-1),
        )

    def some(examples: Examples) -> jax.Array:
        logits = mean_logits(state, examples.images, setting)
        return classification_sums(logits, examples.labels)["correct"]

    batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), test)
    return lax.map(some, batches).sum()


# Of the image and its mirror image, then of two shifts, each with its mirror image.
VIEW_WEIGHTS = (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)


def views(images: jax.Array) -> jax.Array:
    """Six views of each image for test-time augmentation: ``[B, H, W, C]`` -> ``[6, B, H, W, C]``.

    Unshifted, shifted by a pixel down and right, and up and left, each also mirrored. A reflection
    fills the edges.
    """
    _, height, width, _ = images.shape
    padded = reflect_pad(images, 1)
    shifted = [padded[:, i : i + height, i : i + width] for i in (0, 2)]
    return jnp.stack([way for x in (images, *shifted) for way in (x, x[:, :, ::-1])])


def mean_logits(state: TrainState, images: jax.Array, setting: Setting) -> jax.Array:
    """The weighted mean of the logits ``[B, K]`` for the six views."""

    def logits(view: jax.Array) -> jax.Array:
        x = normalize(view, setting.mean, setting.std)
        return setting.model.apply(state.variables, x, train=False)

    return jnp.tensordot(jnp.array(VIEW_WEIGHTS), lax.map(logits, views(images)), 1)
