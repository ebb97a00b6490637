"""Space: strides, pools, receptive fields, layouts, borders, sizes, and what they cost.

Questions 6, 7, 8, 10, 12, 25, 37, 38, 42.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks import models
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.layers import trace_layers
from cifar_jax.networks.pooling import max_pool
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import normalize
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, listed, table
from claims.spread import difference, gain, noise, percent, spread, spread_at
from claims.study import Fitted, Study, score, some_of

Floats = NDArray[np.floating]


def _config(study: Study, epochs: int) -> TrainConfig:
    return TrainConfig(epochs=study.scaled(epochs, 1))


def _n_train(study: Study) -> int:
    return study.scaled(10_000, 500)


def _widths(study: Study, *widths: int) -> tuple[int, ...]:
    return tuple(width if not study.quick else max(2, width // 4) for width in widths)


def _cnn(study: Study, seed: int) -> Fitted:
    """The tutorial's network after 6 epochs of 10,000 images: half a minute, once for all."""
    model = models.ConvNet(
        num_classes=len(study.dataset.class_names),
        widths=_widths(study, 16, 32, 64),
        hidden=(512, 256) if not study.quick else (),
    )
    return study.fit(_config(study, 6), seed=seed, n_train=_n_train(study), model=model)


def _normalized(study: Study, images: NDArray[np.uint8]) -> jax.Array:
    return normalize(jnp.asarray(images), study.dataset.mean, study.dataset.std)


# Question 6


class StridedNet(nn.Module):
    """The tutorial's network with a stride of 2 in each convolution in place of each pool."""

    num_classes: int
    widths: Sequence[int]
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        for features in self.widths:
            x = nn.relu(nn.Conv(features, (3, 3), strides=2, padding=1)(x))
        x = models.flatten(x)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)


def measure_stride(study: Study) -> Measured:
    """Convolve with stride 1 and 2, see which pixels matter, and train with strides for pools.

    A pixel is seen if the gradient of the outputs at it is not zero. The output with stride 2 is
    compared with every other output of stride 1. The claim fails if the sides are not 32 and 16. A
    caveat if stride 2 skips positions of the kernel and no pixels, or if strides instead of pools
    cost accuracy (10,000 images, 6 epochs). Cost: four minutes of training.
    """
    images = jax.random.normal(jax.random.key(0), (1, 32, 32, 1))

    def output(x: jax.Array, kernel: int, stride: int) -> jax.Array:
        weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, 1))
        padding = ((kernel // 2, kernel // 2),) * 2
        return lax.conv_general_dilated(
            x, weights, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def seen_percent(kernel: int) -> float:
        gradient = jax.grad(lambda x: output(x, kernel, 2).sum())(images)
        return float(100 * (gradient != 0).mean())

    every_other = output(images, 3, 1)[:, ::2, ::2]
    strided, pooled = [], []
    for seed in study.seeds:
        cnn = _cnn(study, seed)
        model = StridedNet(cnn.model.num_classes, cnn.model.widths, cnn.model.hidden)
        config = _config(study, 6)
        fitted = study.fit(config, seed=seed, n_train=_n_train(study), model=model)
        strided.append(100 * study.accuracy(fitted, study.dataset.val))
        pooled.append(100 * study.accuracy(cnn, study.dataset.val))
    return Measured(
        {
            "side_stride_1_pixels": output(images, 3, 1).shape[1],
            "side_stride_2_pixels": output(images, 3, 2).shape[1],
            "difference_from_every_other_output": float(
                jnp.abs(output(images, 3, 2) - every_other).max()
            ),
            "pixels_seen_kernel_3_stride_2_percent": seen_percent(3),
            "pixels_seen_kernel_1_stride_2_percent": seen_percent(1),
            "outputs_at_stride_2_percent": 100 * every_other.size / output(images, 3, 1).size,
            "accuracy_with_strides": spread(strided),
            "accuracy_with_pools": spread(pooled),
        },
        n=len(study.seeds),
    )


def judge_stride(values: Values) -> Verdict:
    one, two = values["side_stride_1_pixels"], values["side_stride_2_pixels"]
    seen, seen_by_1x1 = (values[f"pixels_seen_kernel_{k}_stride_2_percent"] for k in (3, 1))
    strided, pooled = values["accuracy_with_strides"], values["accuracy_with_pools"]
    evidence = table(
        ("", "stride 1, then pool", "stride 2"),
        [
            ("side after a convolution of 32x32 pixels", str(one), str(two)),
            ("outputs computed", "100 %", f"{values['outputs_at_stride_2_percent']:.0f} %"),
            ("validation accuracy", percent(pooled), percent(strided)),
        ],
    )
    evidence += "\n\n" + bullets(
        f"pixels that stride 2 sees: {seen:.0f} % with a 3x3 kernel, {seen_by_1x1:.0f} % with 1x1"
    )
    if one != 32 or two != 16 or values["difference_from_every_other_output"] > 1e-5:
        return Verdict(FAILS, "Stride 2 does not give every other output of stride 1.", evidence)
    finding = "Stride 2 halves the size."
    caveats = []
    if seen > 99:
        caveats.append("It skips positions of the kernel, not pixels: a 3x3 kernel sees them all.")
    points, clear = difference(strided, pooled)
    if clear and points < 0:
        caveats.append(
            f"And as an alternative to pooling it costs accuracy: {gain(strided, pooled)} points."
        )
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


# Question 7


def _subsample(x: jax.Array) -> jax.Array:
    return x[:, ::2, ::2]


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


_POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "max": max_pool,
    "average": _average_pool,
    "every other pixel": _subsample,
}


def _shift_response(x: jax.Array, pool: Callable[[jax.Array], jax.Array], shift: int) -> Floats:
    """What a shift to the left changes in ``pool(x)``, away from the border.

    Returns:
        The share of values that change, and the root mean square of the change relative to that
        between different images (1: as if it were another image).
    """
    side = (x.shape[2] - 8) // 2 * 2  # 8 pixels to come from outside the window
    before, after = pool(x[:, :, :side]), pool(x[:, :, shift : shift + side])
    another = jnp.roll(before, 1, axis=0)
    change = jnp.sqrt(((after - before) ** 2).mean() / ((another - before) ** 2).mean())
    return np.asarray([(after != before).mean(), change])


def measure_max_pool(study: Study) -> Measured:
    """Shift test images by 0 to 8 pixels, and compare what each kind of pooling gives.

    Of the pixels, and of the output of the first trained convolution with ReLU. Only windows away
    from the border count. A value has changed if its bits differ; the size of the change is its
    root mean square, in percent of that between two different images. The claim fails if a shift by
    one pixel changes more than a third of the pooled values, or if pooled values change by as much
    as unpooled ones. A caveat above 5 %. Cost: seconds, and the training of question 6.
    """
    images = _normalized(study, some_of(study.dataset.test, study.scaled(1000, 100)).pixels)
    shifts = list(range(9))
    removed = 100 * (1 - max_pool(images).size / images.size)
    curves: dict[str, list[Floats]] = {name: [] for name in _POOLS}
    pixels = {
        name: 100 * float(_shift_response(images, pool, 1)[0]) for name, pool in _POOLS.items()
    }
    for seed in study.seeds:
        cnn = _cnn(study, seed)
        features = _first_features(cnn, images)
        for name, pool in _POOLS.items():
            curves[name].append(
                100 * np.stack([_shift_response(features, pool, shift) for shift in shifts])
            )
    mean = {name: np.mean(found, axis=0) for name, found in curves.items()}
    changed = {name: [float(found[1, 0]) for found in curves[name]] for name in _POOLS}
    moved = {name: [float(found[1, 1]) for found in curves[name]] for name in _POOLS}
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in _POOLS:
        label = "no pooling" if name == "none" else name
        style = (
            {"marker": "o", "linestyle": ":"} if name == "every other pixel" else {"marker": "."}
        )
        left.plot(shifts, mean[name][:, 0], label=label, **style)
        right.plot(shifts, mean[name][:, 1], label=label, **style)
    left.set(xlabel="shift / pixels", ylabel="values that change / %", ylim=(0, 100))
    right.set(
        xlabel="shift / pixels", ylabel="size of the change / %\n(100: another image)", ylim=0
    )
    right.legend(title="pooling 2x2")
    return Measured(
        {
            "values_removed_percent": float(removed),
            "changed_pooled_features": spread(changed["max"]),
            "changed_unpooled_features": spread(changed["none"]),
            "changed_pooled_pixels_percent": pixels["max"],
            "changed_unpooled_pixels_percent": pixels["none"],
            "size_of_change_max": spread(moved["max"]),
            "size_of_change_average": spread(moved["average"]),
            "size_of_change_unpooled": spread(moved["none"]),
            "size_of_change_max_to_unpooled": spread(
                [100 * a / b for a, b in zip(moved["max"], moved["none"], strict=True)]
            ),
        },
        n=len(study.seeds),
        figure=study.save_figure(figure, "q07_max_pool_shift.png"),
    )


def _first_features(fitted: Fitted, images: jax.Array) -> jax.Array:
    """After the first convolution and ReLU."""
    traced = trace_layers(fitted.model, fitted.variables, images)
    return next(layer.output for layer in traced if layer.kind == "relu")


def judge_max_pool(values: Values) -> Verdict:
    changed, unpooled = values["changed_pooled_features"], values["changed_unpooled_features"]
    ratio = values["size_of_change_max_to_unpooled"]
    removed = values["values_removed_percent"]
    evidence = table(
        ("after a shift by 1 pixel", "not pooled", "max-pooled", "average-pooled"),
        [
            ("features that change", percent(unpooled), percent(changed), ""),
            (
                "size of the change (100 %: another image)",
                percent(values["size_of_change_unpooled"]),
                percent(values["size_of_change_max"]),
                percent(values["size_of_change_average"]),
            ),
            (
                "pixels of the image itself that change",
                f"{values['changed_unpooled_pixels_percent']:.0f} %",
                f"{values['changed_pooled_pixels_percent']:.0f} %",
                "",
            ),
        ],
    )
    evidence += "\n\nFeatures are the outputs of the trained first convolution with ReLU."
    # By network, as the ratio is paired: their own levels differ more than pooling does.
    steadier = ratio["mean_percent"] + 2 * ratio["std_percent"] / ratio["n"] ** 0.5 < 100
    if removed != 75 or changed["mean_percent"] > 100 / 3 or not steadier:
        return Verdict(
            FAILS,
            f"Pooling removes {removed:.0f} % of the values. But a shift by one pixel changes "
            f"{changed['mean_percent']:.0f} % of the maxima, almost as many as without pooling "
            f"({unpooled['mean_percent']:.0f} %), and by {ratio['mean_percent']:.0f} % as much.",
            evidence,
        )
    finding = f"A shift by one pixel changes {changed['mean_percent']:.0f} % of the maxima."
    # "The same" allows for the odd window, not for one in twenty.
    return Verdict(CAVEAT if changed["mean_percent"] > 5 else HOLDS, finding, evidence)


# Question 8


def _seen(gradient: Floats) -> int:
    """Side of the square of pixels with a gradient that is not zero, ``[B, H, W, C]``."""
    rows = np.flatnonzero((gradient != 0).any(axis=(0, 2, 3)))
    return int(rows[-1] - rows[0] + 1)


def _central_side(energy: Floats, share: float) -> int:
    """Side of the smallest square about the centre with ``share`` of ``energy``, ``[H, W]``."""
    height = energy.shape[0]
    for margin in range(height // 2 - 1, -1, -1):
        if energy[margin : height - margin, margin : height - margin].sum() >= share * energy.sum():
            return height - 2 * margin
    return height


def measure_receptive_field(study: Study) -> Measured:
    """Differentiate single neurons with respect to the image, and count the pixels that matter.

    First, 1 to 5 stacked 3x3 convolutions with random weights. Then, in the tutorial's network as
    trained for question 6, a central neuron after each convolution, and a logit, over many images,
    because each max-pool passes the gradient to one pixel of four. The claim fails if the sides are
    not 3, 5, 7, 9 and 11, or if a logit does not see every pixel. Cost: seconds, and that training.
    """
    probe = jax.random.normal(jax.random.key(0), (1, 33, 33, 1))

    def stacked(depth: int) -> int:
        def centre(x: jax.Array) -> jax.Array:
            for i in range(depth):
                kernel = jax.random.normal(jax.random.key(i), (3, 3, 1, 1))
                x = lax.conv(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")
                x = x.transpose(0, 2, 3, 1)
            return x[0, 16, 16, 0]

        return _seen(np.asarray(jax.grad(centre)(probe)))

    images = _normalized(study, some_of(study.dataset.test, study.scaled(500, 100)).pixels)
    maps: list[Floats] = []
    sides: list[list[int]] = []
    energy_sides: list[int] = []
    logit_pixels: list[float] = []
    for seed in study.seeds:
        cnn = _cnn(study, seed)
        gradients = jax.jit(functools.partial(_layer_gradients, cnn.model))(cnn.variables, images)
        found = [np.asarray(gradient) for gradient in gradients]
        sides.append([_seen(gradient) for gradient in found])
        energies = [(gradient**2).sum(axis=(0, 3)) for gradient in found]
        energy_sides.append(_central_side(energies[-1], 0.95))
        maps = maps or energies
        logit_pixels.append(100 * float((found[-1] != 0).any(axis=(0, 3)).mean()))
    rows = layer_table(cnn.model, study.dataset.image_shape, 1)
    names = ["after conv 1", "after conv 2", "after conv 3", "a logit"]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, name, energy, side in zip(figure.subplots(1, 4), names, maps, sides[0], strict=True):
        shown = axes.imshow(np.sqrt(energy / energy.max()), cmap="viridis", vmin=0, vmax=1)
        axes.set(title=f"{name}: {side}x{side}", xlabel="x / pixels")
    figure.axes[0].set_ylabel("y / pixels")
    figure.colorbar(shown, ax=figure.axes, label="gradient (1: largest)", shrink=0.8)
    return Measured(
        {
            "sides_of_1_to_5_convolutions_pixels": [stacked(depth) for depth in range(1, 6)],
            "sides_in_cnn_by_convolution_pixels": [
                max(found) for found in zip(*sides, strict=True)
            ][:3],
            "sides_by_theory_pixels": [row.receptive_field for row in rows if row.kind == "conv"],
            "pixels_seen_by_a_logit_percent": min(logit_pixels),
            "side_with_95_percent_of_a_logits_gradient_pixels": max(energy_sides),
        },
        n=len(study.seeds),
        figure=study.save_figure(figure, "q08_receptive_field.png"),
    )


def _layer_gradients(model: nn.Module, variables: Any, images: jax.Array) -> list[jax.Array]:
    """Gradients at the image of a central neuron after each convolution, and of a logit."""

    def neurons(x: jax.Array) -> list[jax.Array]:
        traced = trace_layers(model, variables, x)
        convs = [layer.output for layer in traced if layer.kind == "conv"]
        # All channels with weights of their own, so that none cancels another.
        found = []
        for output in convs:
            middle = output[:, output.shape[1] // 2, output.shape[2] // 2]
            found.append((middle * jnp.linspace(0.5, 1.5, middle.shape[-1])).sum())
        return [*found, traced[-1].output[:, 0].sum()]

    count = len(jax.eval_shape(neurons, images))
    return [jax.grad(lambda x, i=i: neurons(x)[i])(images) for i in range(count)]


def judge_receptive_field(values: Values) -> Verdict:
    stacked = values["sides_of_1_to_5_convolutions_pixels"]
    inside, theory = values["sides_in_cnn_by_convolution_pixels"], values["sides_by_theory_pixels"]
    seen = values["pixels_seen_by_a_logit_percent"]
    central = values["side_with_95_percent_of_a_logits_gradient_pixels"]
    evidence = table(
        ("pixels a side that a neuron sees", "measured", "claimed, or by theory"),
        [
            ("after 1 to 5 stacked 3x3 convolutions", _listed(stacked), "3, 5, 7, 9, 11"),
            ("after the three convolutions of `cnn`", _listed(inside), _listed(theory)),
        ],
    )
    evidence += "\n\n" + bullets(
        f"pixels that a logit sees: {seen:.0f} %",
        f"95 % of a logit's squared gradient lies in the central {central}x{central} pixels",
    )
    if stacked != [3, 5, 7, 9, 11] or seen < 100:
        return Verdict(
            FAILS, "The sides are others, or a logit does not see every pixel.", evidence
        )
    finding = "Stacked convolutions see what the claim says, and a logit sees the whole image."
    if inside[-1] < 32:
        finding += (
            " That is thanks to the Dense layers: a neuron of the last convolution sees "
            f"{inside[-1]} of 32 pixels a side."
        )
    return Verdict(HOLDS, finding, evidence)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# Questions 10 and 25


def _imshow_takes(image: NDArray[Any]) -> bool:
    try:
        Figure().subplots().imshow(image)
    except TypeError:
        return False
    return True


def measure_layout(study: Study) -> Measured:
    """Ask each library for the order of its axes: by a convolution, by strides, by plotting.

    The order in memory is shown by a tensor's strides, in elements, also of one that torch keeps
    ``channels_last``. The claim fails if PyTorch does not want NCHW, or TensorFlow and matplotlib
    do not want NHWC. A caveat if the order of the axes does not decide that in memory. Cost:
    seconds, to import TensorFlow.
    """
    import inspect

    from cifar_jax.data.input_pipeline import tf
    from cifar_jax.torch_reference import torch

    nchw = torch.zeros(2, 3, 32, 32)
    last = nchw.to(memory_format=torch.channels_last)
    image = study.dataset.test.pixels[0]
    flax_shape = jax.eval_shape(
        lambda: nn.Conv(16, (3, 3)).init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    )[0].shape
    convolved = torch.nn.Conv2d(3, 16, 3, padding=1)(nchw).shape
    parameters = inspect.signature(tf.nn.max_pool2d).parameters
    return Measured(
        {
            "torch_convolution_gives": list(convolved),
            "flax_convolution_gives": list(flax_shape),
            "tensorflow_default": str(parameters["data_format"].default),
            "imshow_takes_chw": _imshow_takes(image.transpose(2, 0, 1)),
            "imshow_takes_hwc": _imshow_takes(image.transpose(2, 0, 1).transpose(1, 2, 0)),
            "torch_strides": list(nchw.stride()),
            "torch_channels_last_shape": list(last.shape),
            "torch_channels_last_strides": list(last.stride()),
        },
        n=1,
    )


def judge_layout(values: Values) -> Verdict:
    takes = {True: "plots it", False: "refuses it"}
    last = values["torch_channels_last_strides"]
    evidence = bullets(
        f"a convolution of 2 images to 16 channels gives {values['torch_convolution_gives']} in "
        f"PyTorch and {values['flax_convolution_gives']} in Flax",
        f"TensorFlow's default is {values['tensorflow_default']}",
        f"given [3, 32, 32], matplotlib {takes[values['imshow_takes_chw']]}; permuted, it "
        f"{takes[values['imshow_takes_hwc']]}",
        f"PyTorch's strides for [2, 3, 32, 32] are {values['torch_strides']}; as "
        f"`channels_last`, with the shape {values['torch_channels_last_shape']}, they are {last}",
    )
    right = (
        values["torch_convolution_gives"] == [2, 16, 32, 32]
        and values["flax_convolution_gives"] == [2, 32, 32, 16]
        and values["tensorflow_default"] == "NHWC"
        and values["imshow_takes_hwc"]
        and not values["imshow_takes_chw"]
    )
    if not right:
        return Verdict(FAILS, "A library has another order of axes than claimed.", evidence)
    if last != values["torch_strides"]:
        return Verdict(
            CAVEAT,
            "The libraries order the axes as claimed. But that is not the order in memory: as "
            "`channels_last`, a PyTorch tensor has the same shape, and its channels are "
            "nevertheless last in memory.",
            evidence,
        )
    return Verdict(HOLDS, "The libraries order the axes as claimed.", evidence)


def _median_us(run: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def measure_permute(study: Study) -> Measured:
    """Permute images of 3x32x32 and 3x2048x2048 in PyTorch, NumPy and JAX, and time it.

    A view shares its memory with the original, and takes as long for a large image as for a small
    one (medians of 30). Also counted: the pixels that are wrong after ``reshape`` instead. The
    claim fails if the axes go elsewhere or PyTorch copies. A caveat if another library copies.
    Cost: a second or two, and an import of torch.
    """
    from cifar_jax.torch_reference import torch

    rounds = study.scaled(30, 10)
    image = np.ascontiguousarray(study.dataset.test.pixels[0].transpose(2, 0, 1))
    permuted = torch.tensor(image).permute(1, 2, 0).numpy()
    reshaped = image.reshape(image.shape[1], image.shape[2], image.shape[0])
    times: dict[str, list[float]] = {"torch_permute": [], "torch_copy": [], "jax_transpose": []}
    for side in (32, 2048):
        theirs = torch.zeros(3, side, side)
        ours = jnp.zeros((3, side, side))

        def copy(x: Any = theirs) -> Any:
            return x.permute(1, 2, 0).contiguous()

        def transpose(x: jax.Array = ours) -> jax.Array:
            return x.transpose(1, 2, 0).block_until_ready()

        transpose()  # compiles
        times["torch_permute"].append(_median_us(lambda x=theirs: x.permute(1, 2, 0), rounds))
        times["torch_copy"].append(_median_us(copy, rounds))
        times["jax_transpose"].append(_median_us(transpose, rounds))
    array = np.zeros((3, 32, 32))
    pointers = ours.unsafe_buffer_pointer(), ours.transpose(1, 2, 0).unsafe_buffer_pointer()
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    titles = ("permute(1, 2, 0)", "reshape(32, 32, 3)")
    for axes, title, shown in zip(figure.subplots(1, 2), titles, (permuted, reshaped), strict=True):
        axes.imshow(shown)
        axes.set(title=title, xlabel="x / pixels", ylabel="y / pixels")
    return Measured(
        {
            "axes_as_claimed": bool((permuted == np.moveaxis(image, 0, -1)).all()),
            "values_wrong_by_reshape_percent": 100 * float((permuted != reshaped).mean()),
            "torch_shares_memory": theirs.permute(1, 2, 0).data_ptr() == theirs.data_ptr(),
            "numpy_shares_memory": bool(np.shares_memory(array.transpose(1, 2, 0), array)),
            "jax_shares_memory": pointers[0] == pointers[1],
            **{f"{name}_small_and_large_us": found for name, found in times.items()},
        },
        n=rounds,
        figure=study.save_figure(figure, "q25_permute.png"),
    )


def judge_permute(values: Values) -> Verdict:
    wrong = values["values_wrong_by_reshape_percent"]
    shares = {True: "a view", False: "a copy"}
    rows = [
        (
            name,
            kind,
            *(f"{us:,.1f} µs" for us in values[f"{key}_small_and_large_us"]),
        )
        for name, key, kind in (
            ("PyTorch `permute`", "torch_permute", shares[values["torch_shares_memory"]]),
            ("PyTorch `permute` and `contiguous`", "torch_copy", "a copy"),
            ("JAX `transpose`", "jax_transpose", shares[values["jax_shares_memory"]]),
        )
    ]
    evidence = table(("", "", "3x32x32", "3x2048x2048"), rows)
    evidence += "\n\n" + bullets(
        f"NumPy's `transpose` is {shares[values['numpy_shares_memory']]}",
        f"`reshape` instead of `permute` puts {wrong:.0f} % of the values in the wrong place",
    )
    small, large = values["torch_permute_small_and_large_us"]
    # The time of a view does not depend on the size: 4,096 times the values, not 10 times the time.
    if not values["axes_as_claimed"] or not values["torch_shares_memory"] or large > 10 * small:
        return Verdict(FAILS, "The axes go elsewhere, or PyTorch copies.", evidence)
    finding = (
        f"PyTorch's permute takes {large:.1f} µs however large the image is, because it changes "
        "only metadata."
    )
    copying = [
        name
        for name, key in (("NumPy's", "numpy"), ("JAX's", "jax"))
        if not values[f"{key}_shares_memory"]
    ]
    if copying:
        return Verdict(
            CAVEAT, f"{finding} But {listed(copying)} transpose makes a new array.", evidence
        )
    return Verdict(HOLDS, finding, evidence)


# Question 12


def _conv_macs(model: nn.Module) -> list[int]:
    return [row.macs for row in layer_table(model, (32, 32, 3), 1) if row.kind == "conv"]


def measure_doubling(study: Study) -> Measured:
    """Let the widths stay, double or quadruple at each pool; count operations, then train.

    Three networks of three convolutions and a Dense layer with about equal operations in all;
    10,000 images, 8 epochs. The claim fails if doubling does not keep the operations of the layers
    after the first (which sees 3 channels) within 10 %. A caveat if the number of output values
    falls, or if doubling is not the most accurate. Cost: ten minutes of training.
    """
    plans = {"constant": (27, 27, 27), "doubling": (16, 32, 64), "quadrupling": (7, 30, 120)}
    values: Values = {}
    for name, widths in plans.items():
        full = models.ConvNet(len(study.dataset.class_names), widths, ())
        # The quick study takes one network, which it has anyhow, in place of the three.
        trained = full if not study.quick else _cnn(study, 0).model
        rows = layer_table(full, (32, 32, 3), 1)
        outputs = [row.output_shape for row in rows if row.kind == "conv"]
        found = [
            study.fit(_config(study, 8), seed=seed, n_train=_n_train(study), model=trained)
            for seed in study.seeds
        ]
        values[name] = {
            "widths": list(widths),
            "multiply_accumulates_by_layer": _conv_macs(full),
            "activations_by_layer": [int(np.prod(shape)) for shape in outputs],
            "accuracy": spread([100 * study.accuracy(f, study.dataset.val) for f in found]),
        }
    return Measured(values, n=len(study.seeds))


def judge_doubling(values: Values) -> Verdict:
    doubling = values["doubling"]
    macs, activations = doubling["multiply_accumulates_by_layer"], doubling["activations_by_layer"]
    plans = ("constant", "doubling", "quadrupling")
    evidence = table(
        (
            "channels at each pool",
            "channels by layer",
            "million multiply-accumulates by layer",
            "in all",
            "output values by layer",
            "validation accuracy",
        ),
        [
            (
                plan,
                " / ".join(map(str, values[plan]["widths"])),
                " / ".join(f"{n / 1e6:.2f}" for n in values[plan]["multiply_accumulates_by_layer"]),
                f"{sum(values[plan]['multiply_accumulates_by_layer']) / 1e6:.2f}",
                " / ".join(f"{n:,}" for n in values[plan]["activations_by_layer"]),
                percent(values[plan]["accuracy"]),
            )
            for plan in plans
        ],
    )
    if max(macs[1:]) > 1.1 * min(macs[1:]):
        return Verdict(FAILS, "Doubling does not keep the work of the layers equal.", evidence)
    finding = "With doubling, all layers after the first take the same work."
    caveats = []
    if activations[-1] < 0.9 * activations[0]:
        caveats.append(
            f"But the numbers that hold the information fall from {activations[0]:,} to "
            f"{activations[-1]:,}."
        )
    better = [
        plan
        for plan in plans
        for points, clear in [difference(values[plan]["accuracy"], doubling["accuracy"])]
        if clear and points > 0
    ]
    if better:
        caveats.append(f"For about equal work, {listed(better)} is more accurate.")
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


# Question 37


class _Mirrored(nn.Module):
    """The network of :func:`_cnn`, but what lies beyond a border is its mirror image, not zeros."""

    num_classes: int
    widths: tuple[int, ...]
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train  # the same in both modes
        for features in self.widths:
            x = max_pool(nn.relu(nn.Conv(features, (3, 3), padding="REFLECT")(x)))
        x = models.flatten(x)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)


def _times_seen(padding: int) -> NDArray[np.int64]:
    """How many positions of a 3x3 kernel cover each pixel of 32x32, by the gradient of ones."""
    ones = jnp.ones((3, 3, 1, 1))

    def total(x: jax.Array) -> jax.Array:
        pads = ((padding, padding),) * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, ones, (1, 1), pads, dimension_numbers=numbers).sum()

    return np.asarray(jax.grad(total)(jnp.zeros((1, 32, 32, 1))))[0, :, :, 0].astype(np.int64)


def _blank(split: Split, top: int, left: int, dataset: Dataset) -> Split:
    """``split`` with the mean colour in a block of 10x10 pixels."""
    pixels = split.pixels.copy()
    mean = np.round(255 * np.asarray(dataset.mean)).astype(np.uint8)
    pixels[:, top : top + 10, left : left + 10] = mean
    return Split(pixels, split.labels)


def measure_corners(study: Study) -> Measured:
    """Count how often a 3x3 kernel covers each pixel; train with and without zeros at the border.

    The gradient of a trained network's loss, as root mean square over images and channels, is
    compared between the 4x4 pixels of the corners and of the centre. What zero padding adds is
    shown by the first layer's output on a plain white image, at its edge and inside. How much that
    matters is shown by the validation accuracy of a network that sees the mirrored image beyond
    each border instead of zeros. Where the objects are is shown by the accuracy with a block of
    10x10 pixels in the mean colour, in each corner and in the centre. The claim fails if the
    corners are not covered less often, or if padding does not make it more equal. A caveat if zeros
    clearly change the accuracy, if a change of more than 3 points is not ruled out, or if the
    centre does not clearly cost more than each corner. Cost: three minutes, and the training of
    question 6.
    """
    without, with_padding = _times_seen(0), _times_seen(1)
    corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
    places = dict(zip(corners, itertools.product((0, 22), (0, 22)), strict=True))
    places["centre"] = (11, 11)
    lost: dict[str, list[float]] = {place: [] for place in places}
    val = study.dataset.val
    some = some_of(val, study.scaled(1000, 100))
    images, labels = _normalized(study, some.pixels), jnp.asarray(some.labels)
    white = _normalized(study, np.full((1, 32, 32, images.shape[-1]), 255, np.uint8))
    ratios, whole, artefacts, mirrored = [], [], [], []
    for seed in study.seeds:
        cnn = _cnn(study, seed)
        assert isinstance(cnn.model, models.ConvNet)
        of_zeros = cnn.model
        other = _Mirrored(of_zeros.num_classes, tuple(of_zeros.widths), tuple(of_zeros.hidden))
        fitted = study.fit(_config(study, 6), seed=seed, n_train=_n_train(study), model=other)
        mirrored.append(100 * study.accuracy(fitted, val))

        def loss(x: jax.Array, cnn: Fitted = cnn) -> jax.Array:
            logits = jax.nn.log_softmax(cnn.model.apply(cnn.variables, x))
            return -jnp.take_along_axis(logits, labels[:, None], axis=1).sum()

        gradient = np.sqrt((np.asarray(jax.jit(jax.grad(loss))(images)) ** 2).mean(axis=(0, 3)))
        corner = np.mean(
            [
                gradient[r, c]
                for r in (slice(4), slice(-4, None))
                for c in (slice(4), slice(-4, None))
            ]
        )
        ratios.append(100 * float(corner / gradient[14:18, 14:18].mean()))
        answer = np.asarray(trace_layers(cnn.model, cnn.variables, white)[0].output)[0]
        inside, edge = answer[16, 16], answer[0, 16]
        artefacts.append(100 * float(np.abs(edge - inside).mean() / np.abs(inside).mean()))
        whole.append(100 * study.accuracy(cnn, val))
        for place, (top, left) in places.items():
            blanked = _blank(val, top, left, study.dataset)
            lost[place].append(whole[-1] - 100 * study.accuracy(cnn, blanked))
        if seed == 0:
            shown = gradient
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    panels = (
        (without, "no padding", "positions that see it"),
        (with_padding, "padding 1", "positions that see it"),
        (100 * shown / shown.max(), "trained network", "gradient / % of largest"),
    )
    for axes, (values, title, label) in zip(figure.subplots(1, 3), panels, strict=True):
        image = axes.imshow(values, vmin=0)
        axes.set(title=title, xlabel="x / pixels", ylabel="y / pixels")
        figure.colorbar(image, ax=axes, label=label)
    return Measured(
        {
            "corner_and_centre_seen_without_padding_times": [
                int(without[0, 0]),
                int(without[16, 16]),
            ],
            "corner_and_centre_seen_with_padding_times": [
                int(with_padding[0, 0]),
                int(with_padding[16, 16]),
            ],
            "gradient_in_corners_of_that_in_centre": spread(ratios),
            "first_layer_at_the_edge_off_by": spread(artefacts),
            "accuracy": spread(whole),
            "accuracy_with_mirrored_borders": spread(mirrored),
            "accuracy_lost_without_a_block": {place: spread(v) for place, v in lost.items()},
        },
        n=len(study.seeds),
        figure=study.save_figure(figure, "q37_corners.png"),
    )


def judge_corners(values: Values) -> Verdict:
    corner, centre = values["corner_and_centre_seen_without_padding_times"]
    padded, padded_centre = values["corner_and_centre_seen_with_padding_times"]
    lost = values["accuracy_lost_without_a_block"]
    accuracy, mirrored = values["accuracy"], values["accuracy_with_mirrored_borders"]
    evidence = table(
        ("positions of a 3x3 kernel that cover", "a corner pixel", "a central pixel"),
        [
            ("without padding", str(corner), str(centre)),
            ("with padding 1", str(padded), str(padded_centre)),
        ],
    )
    evidence += "\n\n" + table(
        ("trained network", ""),
        [
            (
                "gradient of the loss in the corners, relative to the centre",
                percent(values["gradient_in_corners_of_that_in_centre"]),
            ),
            (
                "by how much the first layer is off at the edge of a plain white image",
                percent(values["first_layer_at_the_edge_off_by"]),
            ),
            ("accuracy with zeros beyond the border", percent(accuracy)),
            ("accuracy with the mirrored image beyond it", percent(mirrored)),
            ("difference, in points", gain(mirrored, accuracy)),
        ],
    )
    evidence += "\n\n" + table(
        ("blank 10x10 pixels", *lost), [("points lost", *map(_points, lost.values()))]
    )
    if corner >= centre or padded / padded_centre <= corner / centre:
        return Verdict(
            FAILS, "Corners are not seen less often, or padding does not help.", evidence
        )
    points, clear = difference(mirrored, accuracy)
    if clear:
        return Verdict(CAVEAT, "The effects of the border are not negligible.", evidence)
    if abs(points) + noise(mirrored, accuracy) > 3:
        return Verdict(
            CAVEAT, "Whether the effects of the border are negligible is not clear.", evidence
        )
    corners = [points for place, points in lost.items() if place != "centre"]
    steps = [difference(lost["centre"], corner) for corner in corners]
    if not all(clear and points > 0 for points, clear in steps):
        return Verdict(
            CAVEAT, "The centre does not clearly matter more than each corner.", evidence
        )
    least, most = (pick(c["mean_percent"] for c in corners) for pick in (min, max))
    return Verdict(
        HOLDS,
        "Padding makes it more equal. Zeros and mirrored borders give the same accuracy "
        f"({gain(mirrored, accuracy)} points), and blanking the centre costs "
        f"{lost['centre']['mean_percent']:.1f} points, a corner {least:.1f} to {most:.1f}.",
        evidence,
    )


def _points(spread: Values) -> str:
    return percent(spread).removesuffix(" %")


# Question 38


def _resized(split: Split, side: int) -> Split:
    """``split`` at ``side`` pixels a side, bilinear with antialiasing."""
    images = [Image.fromarray(image) for image in split.pixels]
    pixels = [np.asarray(i.resize((side, side), Image.Resampling.BILINEAR)) for i in images]
    return Split(np.stack(pixels), split.labels)


def measure_sizes(study: Study) -> Measured:
    """Show networks made for 32x32 images other sizes: one flattens, one averages.

    Which sides from 16 to 64 does each accept? And how accurate is the averaging one, trained on
    10,000 images for 10 epochs, on 2,000 resized test images (bilinear)? The claim fails if the
    network that flattens accepts every size, or the averaging one does not. A caveat if the first
    accepts some other sizes, or if the second loses more than 5 points at a size within a factor of
    2. Cost: three minutes of training.
    """
    from cifar_jax.torch_reference import make_twin, torch

    classes = len(study.dataset.class_names)
    flat = models.ConvNet(classes, _widths(study, 16, 32, 64), (16,))
    gap = models.ConvNet(classes, _widths(study, 16, 32, 64), (), global_pool=True)
    made = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    variables = {
        model: jax.eval_shape(model.init, jax.random.key(0), made) for model in (flat, gap)
    }

    def accepts(model: models.ConvNet, side: int) -> bool:
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        try:
            jax.eval_shape(model.apply, variables[model], images)
        except CifarJaxError:
            return False
        return True

    def torch_accepts(side: int) -> bool:
        try:
            twin(torch.zeros(1, 3, side, side))
        except RuntimeError:
            return False
        return True

    twin = make_twin(flat, (32, 32, 3))
    sides = list(range(16, 65))
    shown = [16, 20, 24, 28, 32, 40, 48, 56, 64]
    shown = shown if not study.quick else [16, 32, 64]
    test = some_of(study.dataset.test, 2000)
    accuracies: dict[int, list[float]] = {side: [] for side in shown}
    for seed in study.seeds:
        fitted = study.fit(_config(study, 10), seed=seed, n_train=_n_train(study), model=gap)
        for side in shown:
            found = score(gap, fitted.variables, _resized(test, side), study.dataset)
            accuracies[side].append(100 * found["accuracy"])
    spreads = {side: spread(found) for side, found in accuracies.items()}
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        shown,
        [spreads[side]["mean_percent"] for side in shown],
        [spreads[side]["std_percent"] for side in shown],
        marker="o",
        capsize=3,
        label="global average pooling",
    )
    accepted = [side for side in sides if accepts(flat, side)]
    axes.axvspan(
        accepted[0], accepted[-1], color="tab:orange", alpha=0.3, label="sizes that Flatten takes"
    )
    axes.axhline(100 / classes, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="side of the test images / pixels", ylabel="test accuracy / %", ylim=0)
    axes.legend()
    return Measured(
        {
            "sides_tried_pixels": [sides[0], sides[-1]],
            "flatten_accepts_sides_pixels": accepted,
            "flatten_in_torch_accepts_sides_pixels": [s for s in sides if torch_accepts(s)],
            "sides_refused_by_average_pooling": sum(not accepts(gap, side) for side in sides),
            "accuracy_by_side": [{"side_pixels": side, **spreads[side]} for side in shown],
        },
        n=len(study.seeds),
        figure=study.save_figure(figure, "q38_sizes.png"),
    )


def judge_sizes(values: Values) -> Verdict:
    flat, theirs = (
        values["flatten_accepts_sides_pixels"],
        values["flatten_in_torch_accepts_sides_pixels"],
    )
    low, high = values["sides_tried_pixels"]
    refused = values["sides_refused_by_average_pooling"]
    tried = high - low + 1
    by_side = {found["side_pixels"]: found for found in values["accuracy_by_side"]}
    evidence = table(
        (f"sides of {low} to {high} pixels that are accepted", ""),
        [
            ("global average pooling", f"{tried - refused} of {tried}"),
            ("Flatten, made for 32", f"{flat[0]} to {flat[-1]}"),
            ("the same in PyTorch", f"{theirs[0]} to {theirs[-1]}"),
        ],
    )
    evidence += "\n\n" + table(
        ("side of the test images", *map(str, by_side)),
        [("accuracy with global average pooling", *map(percent, by_side.values()))],
    )
    if refused or len(flat) == tried or len(theirs) == tried:
        return Verdict(FAILS, "Flatten accepts every size, or average pooling does not.", evidence)
    worst = min(by_side, key=lambda side: by_side[side]["mean_percent"])
    finding = "With Flatten the image size is fixed, and with global average pooling it is free."
    caveats = []
    if len(flat) > 1:
        caveats.append(
            f"Flatten does accept sides of {flat[0]} to {flat[-1]}, because pools drop odd rows."
        )
    if by_side[32]["mean_percent"] - by_side[worst]["mean_percent"] > 5:
        caveats.append(
            "And accepting a size is not being right on it: accuracy falls from "
            f"{by_side[32]['mean_percent']:.0f} % at 32 pixels to "
            f"{by_side[16]['mean_percent']:.0f} % at 16 and {by_side[64]['mean_percent']:.0f} % "
            "at 64."
        )
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


# Question 42

_BASE = {"side": 32, "c_in": 64, "c_out": 64, "kernel": 3, "batch": 16}
_STEPS = {  # what each axis is varied over, and the exponent that the claim gives it
    "side": ((16, 32, 64, 128), 2.0),
    "channels in": ((16, 32, 64, 128, 256), 1.0),
    "channels out": ((16, 32, 64, 128, 256), 1.0),
    "channels in and out": ((16, 32, 64, 128, 256), 2.0),
    "kernel": ((1, 3, 5, 7, 9), 2.0),
}
_VARIED = {  # the entries of _BASE that go with an axis
    "side": ("side",),
    "channels in": ("c_in",),
    "channels out": ("c_out",),
    "channels in and out": ("c_in", "c_out"),
    "kernel": ("kernel",),
}


def _settings(quick: bool) -> list[dict[str, Any]]:
    settings = []
    for axis, (steps, _) in _STEPS.items():
        for step in steps[:2] if quick else steps:
            changed = dict.fromkeys(_VARIED[axis], step)
            base = {**_BASE, "batch": 2} if quick else _BASE
            settings.append({"axis": axis, "step": step, **base, **changed})
    return settings


def _name(setting: dict[str, Any]) -> str:
    return json.dumps([setting[name] for name in _BASE])


def print_conv_times() -> None:
    """In a process of its own: settings as JSON on stdin; of each ``[ms, operations]`` on stdout.

    The median time, and the floating-point operations that XLA counts.
    """
    request = json.load(sys.stdin)
    rng = np.random.default_rng(0)
    programs: dict[str, Any] = {}  # the base is on every axis, but timed once
    for setting in request["settings"]:
        if _name(setting) in programs:
            continue
        side, kernel = setting["side"], setting["kernel"]
        x = rng.normal(size=(setting["batch"], side, side, setting["c_in"]))
        weights = rng.normal(size=(kernel, kernel, setting["c_in"], setting["c_out"]))
        arrays = [jnp.asarray(array, jnp.float32) for array in (x, weights)]
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        lowered = jax.jit(conv).lower(*arrays)
        programs[_name(setting)] = (compile_lowered(lowered, jax.default_backend()), arrays)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(request["rounds"] + 1):  # in turn: a busy minute hits all alike
        for name, (conv, arrays) in programs.items():
            started = time.perf_counter()
            conv(*arrays).block_until_ready()
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {
        name: [statistics.median(times[name]), conv.cost_analysis()["flops"]]
        for name, (conv, _) in programs.items()
    }
    print(json.dumps([found[_name(setting)] for setting in request["settings"]]))


def measure_conv_cost(study: Study) -> Measured:
    """Time a 3x3 convolution 64 -> 64 of 16 images of 32x32, and vary one number at a time.

    Medians of 11 rounds in turn, in a process of its own, compiled as training is, and the
    operations that the compiler counts. A straight line through the logarithms gives the exponent
    of the side, of the channels in, out and both, and of the kernel. The claim fails if an exponent
    of the operations (without those on padding) differs from the claim's by more than 0.15. A
    caveat if one of the time differs by more than 0.2. Cost: half a minute.
    """
    settings = _settings(study.quick)
    rounds = study.scaled(11, 3)
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import {print_conv_times.__name__} as f; f()"],
        input=json.dumps({"settings": settings, "rounds": rounds}),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    times, operations = np.transpose(json.loads(done.stdout.splitlines()[-1]))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    exponents: dict[str, Values] = {}
    for axis, (_, claimed) in _STEPS.items():
        chosen = [i for i, setting in enumerate(settings) if setting["axis"] == axis]
        steps = np.array([settings[i]["step"] for i in chosen])
        slope, offset = np.polyfit(np.log(steps), np.log(times[chosen]), 1)
        counted, _ = np.polyfit(np.log(steps), np.log(operations[chosen]), 1)
        exponents[axis] = {
            "claimed": claimed,
            "of_operations": float(counted),
            "of_time": float(slope),
        }
        label = f"{axis}: {slope:.2f} ({claimed:.0f})"
        scaled = steps / _BASE[_VARIED[axis][0]]
        (line,) = left.loglog(scaled, times[chosen], "o", label=label)
        left.loglog(scaled, np.exp(offset) * steps**slope, color=line.get_color())
        right.semilogx(operations[chosen] / 1e9, operations[chosen] / times[chosen] / 1e6, "o")
    left.set_xscale("log", base=2)
    left.set(xlabel="times the base (side 32, channels 64, kernel 3)", ylabel="time / ms")
    figure.legend(
        *left.get_legend_handles_labels(),
        title="varied: exponent of the time (claimed)",
        loc="outside upper center",
        ncols=3,
        fontsize="small",
    )
    right.set(xlabel="operations / billion", ylabel="billion operations a second", ylim=0)
    return Measured(exponents, n=rounds, figure=study.save_figure(figure, "q42_conv_cost.png"))


def judge_conv_cost(values: Values) -> Verdict:
    evidence = table(
        ("varied", "exponent claimed", "of the operations", "of the time"),
        [
            (axis, f"{v['claimed']:.0f}", f"{v['of_operations']:.2f}", f"{v['of_time']:.2f}")
            for axis, v in values.items()
        ],
    )

    def off(axis: str, what: str) -> float:
        return abs(values[axis][what] - values[axis]["claimed"])

    wrong = [axis for axis in values if off(axis, "of_operations") > 0.15]
    if wrong:
        return Verdict(
            FAILS, f"The operations do not grow as claimed with the {wrong[0]}.", evidence
        )
    # 0.2 is a factor of 1.5 in time over a range of 8.
    slower = [axis for axis in values if off(axis, "of_time") > 0.2]
    if slower:
        return Verdict(
            CAVEAT,
            "The number of operations grows as claimed. The time does not with "
            + " and ".join(
                f"{axis} (exponent {values[axis]['of_time']:.2f}, "
                f"not {values[axis]['claimed']:.0f})"
                for axis in slower
            )
            + ".",
            evidence,
        )
    return Verdict(HOLDS, "Operations and time grow as claimed.", evidence)


def _plan(widths: list[int], macs: list[int], activations: list[int], mean: float) -> Values:
    return {
        "widths": widths,
        "multiply_accumulates_by_layer": macs,
        "activations_by_layer": activations,
        "accuracy": spread_at(mean),
    }


CLAIMS = [
    Claim(
        question=6,
        says="Stride 2 moves the kernel by 2 pixels, skips every other pixel and halves the size: "
        "an alternative to max pooling.",
        measure=measure_stride,
        judge=judge_stride,
        refuted_by={
            "side_stride_1_pixels": 32,
            "side_stride_2_pixels": 32,
            "difference_from_every_other_output": 0.0,
            "pixels_seen_kernel_3_stride_2_percent": 25.0,
            "pixels_seen_kernel_1_stride_2_percent": 25.0,
            "outputs_at_stride_2_percent": 25.0,
            "accuracy_with_strides": spread_at(60),
            "accuracy_with_pools": spread_at(60),
        },
    ),
    Claim(
        question=7,
        says="Max pooling removes 75 % of the data, and if a feature shifts by 1 pixel the maximum "
        "remains the same.",
        measure=measure_max_pool,
        judge=judge_max_pool,
        refuted_by={
            "values_removed_percent": 75.0,
            "changed_pooled_features": spread_at(2),
            "changed_unpooled_features": spread_at(80),
            "changed_pooled_pixels_percent": 2.0,
            "changed_unpooled_pixels_percent": 90.0,
            "size_of_change_max": spread_at(3),
            "size_of_change_average": spread_at(3),
            "size_of_change_unpooled": spread_at(50),
            "size_of_change_max_to_unpooled": spread_at(6),
        },
    ),
    Claim(
        question=8,
        says="Stacked 3x3 convolutions see 3x3, 5x5, ... pixels, and the final neuron the entire "
        "image.",
        measure=measure_receptive_field,
        judge=judge_receptive_field,
        refuted_by={
            "sides_of_1_to_5_convolutions_pixels": [3, 5, 7, 9, 11],
            "sides_in_cnn_by_convolution_pixels": [3, 8, 18],
            "sides_by_theory_pixels": [3, 8, 18],
            "pixels_seen_by_a_logit_percent": 60.0,
            "side_with_95_percent_of_a_logits_gradient_pixels": 20,
        },
    ),
    Claim(
        question=10,
        says="PyTorch uses NCHW, TensorFlow and matplotlib NHWC, so an image must be permuted "
        "(1, 2, 0) before plotting.",
        measure=measure_layout,
        judge=judge_layout,
        refuted_by={
            "torch_convolution_gives": [2, 16, 32, 32],
            "flax_convolution_gives": [2, 32, 32, 16],
            "tensorflow_default": "NHWC",
            "imshow_takes_chw": True,
            "imshow_takes_hwc": True,
            "torch_strides": [3072, 1024, 32, 1],
            "torch_channels_last_shape": [2, 3, 32, 32],
            "torch_channels_last_strides": [3072, 1, 96, 3],
        },
    ),
    Claim(
        question=12,
        says="Doubling the channels after each pool keeps the computation and the capacity for "
        "information about constant.",
        measure=measure_doubling,
        judge=judge_doubling,
        refuted_by={
            "constant": _plan([27] * 3, [746496, 1679616, 419904], [27648, 6912, 1728], 60),
            "doubling": _plan([16, 32, 64], [442368, 1179648, 4718592], [16384, 8192, 4096], 60),
            "quadrupling": _plan([7, 30, 120], [193536, 483840, 2073600], [7168, 7680, 7680], 60),
        },
    ),
    Claim(
        question=25,
        says="permute(1, 2, 0) turns [3, 32, 32] into [32, 32, 3] and is fast, as it changes only "
        "metadata.",
        measure=measure_permute,
        judge=judge_permute,
        refuted_by={
            "axes_as_claimed": True,
            "values_wrong_by_reshape_percent": 99.0,
            "torch_shares_memory": False,
            "numpy_shares_memory": True,
            "jax_shares_memory": False,
            "torch_permute_small_and_large_us": [2.0, 20000.0],
            "torch_copy_small_and_large_us": [5.0, 20000.0],
            "jax_transpose_small_and_large_us": [50.0, 20000.0],
        },
    ),
    Claim(
        question=37,
        says="Without padding the kernel sees corners less often than the centre; padding makes it "
        "more equal; objects are mostly in the centre, so for classification the effects of the "
        "border are negligible.",
        measure=measure_corners,
        judge=judge_corners,
        refuted_by={
            "corner_and_centre_seen_without_padding_times": [9, 9],
            "corner_and_centre_seen_with_padding_times": [9, 9],
            "gradient_in_corners_of_that_in_centre": spread_at(100),
            "first_layer_at_the_edge_off_by": spread_at(0),
            "accuracy": spread_at(60),
            "accuracy_with_mirrored_borders": spread_at(70),
            "accuracy_lost_without_a_block": {"top left": spread_at(9), "centre": spread_at(9)},
        },
    ),
    Claim(
        question=38,
        says="Convolutions work on any image size; Flatten fixes it; global average pooling frees "
        "it again.",
        measure=measure_sizes,
        judge=judge_sizes,
        refuted_by={
            "sides_tried_pixels": [16, 64],
            "flatten_accepts_sides_pixels": [32],
            "flatten_in_torch_accepts_sides_pixels": [32],
            "sides_refused_by_average_pooling": 48,
            "accuracy_by_side": [{"side_pixels": side, **spread_at(60)} for side in (16, 32, 64)],
        },
    ),
    Claim(
        question=42,
        says="A convolution costs O(H W C_out C_in K^2): linear in the pixels, quadratic in the "
        "channels.",
        measure=measure_conv_cost,
        judge=judge_conv_cost,
        refuted_by={
            axis: {"claimed": claimed, "of_operations": 1.0, "of_time": 1.0}
            for axis, (_, claimed) in _STEPS.items()
        },
    ),
]
