"""One network in JAX and in PyTorch, side by side: how far apart are they?

Differences are relative: the largest deviation anywhere in an array, divided by the largest
magnitude in PyTorch's. In float64 they compare the algorithms, in float32 also the effect of
rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from numpy.typing import NDArray

from cifar_jax import layout, torch_reference
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.layout import Array, Variables
from cifar_jax.networks.models import Model
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import compile_step, shard, sum_on_host
from cifar_jax.steps.train_step import TrainState, make_train_step, normalize


def relative_difference(ours: Array, theirs: Array) -> float:
    """Max |ours - theirs| / max |theirs|; shapes must agree, as broadcasting would hide errors."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape} differ")
    deviation = float(np.max(np.abs(ours - theirs)))
    return deviation / (float(np.max(np.abs(theirs))) or 1.0)


class Pair:
    """A Flax network and its PyTorch twin with the same weights.

    Args:
        variables: of ``model``; both networks compute in their float type.
        image_shape: ``(H, W, C)``.
    """

    def __init__(self, model: Model, variables: Variables, image_shape: ImageShape) -> None:
        self.model, self.variables = model, variables
        self.layout = model.torch_layout(image_shape)
        self.twin = torch_reference.make_twin(model, image_shape)
        torch_reference.load(self.twin, layout.to_torch(variables, self.layout))

    def activations(self, images: Array, *, train: bool) -> dict[str, float]:
        """The difference of each layer's output for images ``[B, H, W, C]``.

        Keys are Flax's names of the layers with parameters, and ``"logits"``.
        """
        apply = functools.partial(
            self.model.apply,
            train=train,
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats"],
        )
        logits, captured = jax.jit(apply)(self.variables, images)
        theirs = torch_reference.activations(self.twin, layout.nhwc_to_nchw(images), train=train)
        differences = {"logits": relative_difference(np.asarray(logits), theirs["logits"])}
        for layer, torch_name in self.layout.names.items():
            ours = np.asarray(captured["intermediates"][layer]["__call__"][0])
            if ours.ndim == 4:
                ours = layout.nhwc_to_nchw(ours)
            differences[layer] = relative_difference(ours, _computed(theirs[torch_name], ours))
        return differences

    def gradients(self, images: Array, labels: NDArray[np.int32]) -> dict[str, float]:
        """The differences of the mean loss, ``"loss"``, and of its gradient by each parameter.

        In training mode; without dropout, whose masks differ between frameworks.
        """

        def loss_fn(params: Any) -> jax.Array:
            logits, _ = self.model.apply(
                {**self.variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.device_get(jax.jit(jax.value_and_grad(loss_fn))(self.variables["params"]))
        their_loss, their_grads = torch_reference.loss_and_gradients(
            self.twin, layout.nhwc_to_nchw(images), labels
        )
        theirs = layout.from_torch(their_grads, self.layout)["params"]
        differences = jax.tree.map(relative_difference, grads, theirs)
        leaves = jax.tree_util.tree_leaves_with_path(differences)
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
        return {"loss": abs(float(loss) - their_loss) / abs(their_loss), **named}


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far the same training in both frameworks drifts apart.

    Attributes:
        ours, theirs: the loss of each step, JAX's and PyTorch's.
        params: the distance between the two sets of parameters, relative to the distance of
            PyTorch's from their start; after each of ``params_steps`` steps.
        batch_stats: the largest difference of a running mean or variance after the last step.
    """

    ours: list[float]
    theirs: list[float]
    params: list[float]
    params_steps: list[int]
    batch_stats: float

    @property
    def loss(self) -> list[float]:
        """The difference of the losses at each step, relative to the loss at the first step.

        Not to the loss at the same step, which may be almost 0 by then.
        """
        pairs = zip(self.ours, self.theirs, strict=True)
        return [abs(ours - theirs) / abs(self.theirs[0]) for ours, theirs in pairs]


def train_in_lockstep(
    pair: Pair,
    config: TrainConfig,
    batches: Iterable[tuple[NDArray[np.uint8], NDArray[np.int32]]],
    total_steps: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Iterator[tuple[TrainState, float, float]]:
    """Train both networks on the same batches, with this project's own ``train_step`` in JAX.

    Args:
        pair: its twin is trained in place.
        config: the optimizer and schedule; images are not augmented, and the network must not have
            dropout, whose masks differ between frameworks.
        batches: images ``[B, H, W, C]`` of one size and labels ``[B]``, for one step each.
        total_steps: the length of the schedule.
        mean, std: for :func:`cifar_jax.steps.train_step.normalize`.

    Yields:
        After each step: our state, whose memory the next step reuses, our loss, and PyTorch's loss.
    """
    tx = make_optimizer(config, make_schedule(config, total_steps))
    plain = dataclasses.replace(config, flip=False, crop=0, cutout=0)
    train_step = make_train_step(plain, pair.model, tx, mean, std)
    params = pair.variables["params"]
    state = TrainState(
        step=np.zeros((), np.int32),
        params=params,
        batch_stats=pair.variables["batch_stats"],
        opt_state=jax.device_get(tx.init(params)),
    )
    floating = jax.tree.leaves(params)[0].dtype
    normalized = jax.jit(functools.partial(normalize, mean=mean, std=std))
    devices = jax.devices()[:1]
    step: Callable[..., Any] | None = None
    ahead: deque[tuple[Array, NDArray[np.int32]]] = deque()
    their_losses = torch_reference.train(pair.twin, config, iter(ahead.popleft, None), total_steps)
    for images, labels in batches:
        batch = shard({"image": images, "label": labels}, devices)
        if step is None:
            step = compile_step(train_step, state, batch, devices, donate_state=True)
        state, sums = step(state, batch)
        x = np.asarray(normalized(images)).astype(floating)
        ahead.append((layout.nhwc_to_nchw(x), labels))
        their_loss = next(their_losses)
        total = sum_on_host(sums)
        yield state, total["loss"] / total["count"], their_loss


def measure_drift(
    pair: Pair,
    config: TrainConfig,
    batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Drift:
    """The drift of :func:`train_in_lockstep`, with a step for each of ``batches``."""

    def their_params() -> Any:
        current = torch_reference.state_dict_of(pair.twin)
        return layout.from_torch(current, pair.layout)["params"]

    start = their_params()
    # Only at powers of two and at the end: with a large network this takes as long as a step.
    params_steps = [*(2**k for k in range((len(batches) - 1).bit_length())), len(batches)]
    ours, theirs, params = [], [], []
    for state, our_loss, their_loss in train_in_lockstep(
        pair, config, batches, len(batches), mean, std
    ):
        ours.append(our_loss)
        theirs.append(their_loss)
        if len(ours) in params_steps:
            now = their_params()
            params.append(_distance(jax.device_get(state.params), now) / _distance(now, start))
    images, _ = batches[0]
    statistics = _statistics_difference(pair, jax.device_get(state.batch_stats), images, len(ours))
    return Drift(ours, theirs, params, params_steps, statistics)


def _statistics_difference(
    pair: Pair, batch_stats: Any, images: NDArray[np.uint8], steps: int
) -> float:
    """The largest difference of a running mean or variance after ``steps`` training steps."""
    theirs = layout.from_torch(torch_reference.state_dict_of(pair.twin), pair.layout)["batch_stats"]
    floating = jax.tree.leaves(pair.variables["params"])[0].dtype
    outputs = torch_reference.activations(
        pair.twin, layout.nhwc_to_nchw(images).astype(floating), train=False
    )
    differences: list[float] = []
    for layer, ours in batch_stats.items():
        variance = layout.torch_running_variance(
            ours["var"],
            momentum=pair.model.batch_norm_momentum,
            start=pair.variables["batch_stats"][layer]["var"],
            n=outputs[pair.layout.names[layer]][:, 0].size,
            steps=steps,
        )
        differences += [
            relative_difference(ours["mean"], theirs[layer]["mean"]),
            relative_difference(variance, theirs[layer]["var"]),
        ]
    return float(np.max(differences, initial=0.0))  # max() would lose a NaN


def _computed(theirs: Array, ours: Array) -> Array:
    """``theirs`` without the last row and column, if our convolution skips those before a pool."""
    if theirs.ndim < 4 or max(np.subtract(theirs.shape[2:], ours.shape[2:])) > 1:
        return theirs
    return theirs[:, :, : ours.shape[2], : ours.shape[3]]


def _distance(a: Any, b: Any) -> float:
    squares = jax.tree.map(lambda x, y: float(np.sum((x - y).astype(np.float64) ** 2)), a, b)
    return math.sqrt(sum(jax.tree.leaves(squares)))
