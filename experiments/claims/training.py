"""What training depends on: questions 22, 23, 33, 35, 41."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from cifar_jax.data.dataset import Dataset, ImageShape
from cifar_jax.networks.models import flatten
from cifar_jax.networks.pooling import max_pool
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import initial_train_state, normalize
from claims.accuracy import SMALL, tutorial_config
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, table
from claims.spread import difference, gain, percent, spread_at, spread_of_shares
from claims.study import Fitted, Study

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
}
_INITIALIZERS = {
    "zero": nn.initializers.zeros,
    "constant": nn.initializers.constant(0.01),
    "small": nn.initializers.normal(0.001),
    # Of the variance times fan-in: 2 is Kaiming's for ReLU, 1 LeCun's (Flax's default), and 1/3
    # what PyTorch's reset_parameters() comes to (kaiming_uniform_ with a = sqrt(5)).
    "kaiming": nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal"),
    "lecun": nn.initializers.lecun_normal(),
    "pytorch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


class Plain(nn.Module):
    """Convolutions with a pooling after each of the first three, and one Dense layer.

    Attributes:
        widths: channels of each convolution.
        kernel: side of their kernels, pixels.
        repeats: convolutions in a row, each time, before the pooling.
        activation, init_name: keys of ``_ACTIVATIONS`` and ``_INITIALIZERS``. Biases begin at 0,
            but ``pytorch`` draws them too.
    """

    num_classes: int
    widths: tuple[int, ...]
    kernel: int = 3
    repeats: int = 1
    activation: str = "relu"
    init_name: str = "lecun"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train  # the same in both modes
        init = _INITIALIZERS[self.init_name]

        def biases(fan_in: int) -> nn.initializers.Initializer:
            if self.init_name != "pytorch":
                return nn.initializers.zeros
            limit = 1 / math.sqrt(fan_in)  # the range of the weights
            return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)

        for index, features in enumerate(self.widths):
            for _ in range(self.repeats):
                size, padding = (self.kernel, self.kernel), self.kernel // 2
                bias = biases(x.shape[-1] * self.kernel**2)
                x = nn.Conv(features, size, padding=padding, kernel_init=init, bias_init=bias)(x)
                x = _ACTIVATIONS[self.activation](x)
                self.sow("intermediates", "activations", x)
            if index < 3:
                x = max_pool(x)
        x = flatten(x)
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=biases(x.shape[-1]))(x)


def _classes(study: Study) -> int:
    return len(study.dataset.class_names)


def _fits(study: Study, model: nn.Module, epochs: int, **options: Any) -> list[Fitted]:
    """``model`` on 10,000 images by the tutorial's recipe, a run of each seed."""
    config = tutorial_config(study, epochs=study.scaled(epochs, 1), **options)
    n_train = study.scaled(SMALL, 500)
    return [study.fit(config, seed=seed, n_train=n_train, model=model) for seed in study.seeds]


def _val(fits: list[Fitted]) -> Values:
    return spread_of_shares([fitted.history[-1]["val_accuracy"] for fitted in fits])


def _kernels(params: Any) -> list[Any]:
    """The kernels of a :class:`Plain`, first to last."""
    names = sorted(params, key=lambda name: (name.startswith("Dense"), int(name.split("_")[1])))
    return [params[name]["kernel"] for name in names]


def _images(study: Study, count: int) -> tuple[jax.Array, jax.Array]:
    """Training images, normalised, and their labels."""
    split = study.subset(count)
    images = normalize(jnp.asarray(split.pixels), study.dataset.mean, study.dataset.std)
    return images, jnp.asarray(split.labels)


def _initial(study: Study, model: nn.Module, seed: int) -> Any:
    """The parameters that a run of that seed begins with."""
    return _initializer(model, study.dataset.image_shape)(seed)


@functools.cache
def _initializer(model: nn.Module, image_shape: ImageShape) -> Callable[[int], Any]:
    """Compiled once a network, not once a seed."""
    return jax.jit(
        lambda seed: initial_train_state(model, optax.identity(), image_shape, seed).params
    )


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """As training is: with jax's own options a CPU is slower, to compile and to run."""
    return compile_lowered(jax.jit(function).lower(*arguments), jax.default_backend())


def _loss(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- 22: kernel size ------------------------------------------------------------------------------


def _gradient(function: Callable[..., jax.Array], *arguments: Any) -> Callable[[], Any]:
    """Forward and backward pass of a scalar, compiled: the gradient for the first two arguments."""
    compiled = _compiled(jax.grad(function, argnums=(0, 1)), *arguments)
    return functools.partial(compiled, *arguments)


def _stack(kernel: int, repeats: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    """:func:`_gradient` of convolutions with as many channels in as out; ``shape`` is ``x``'s."""
    pairs = [(nn.Conv(shape[-1], (kernel, kernel)), nn.relu) for _ in range(repeats)]
    model = nn.Sequential([layer for pair in pairs for layer in pair])
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    return _gradient(lambda x, v: model.apply(v, x).var(), x, variables)


def _in_turn(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(rounds + 1):  # a busy minute hits all alike
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: float(np.median(found)) for name, found in times.items()}


def measure_kernel_size(study: Study) -> Measured:
    """Train convolutions with kernels of 1, 3 and 5 pixels, and with two of 3 instead of each one.

    Three of them, with 16, 32 and 64 channels, and one Dense layer, 5 epochs on 10,000 images;
    their weights and multiply-accumulates, and the time of a forward and backward pass of 128
    images. The usual argument for the stack assumes equal channels: at each of the three widths and
    sides, one 5x5 convolution and two 3x3 with as many channels in as out. All passes are timed in
    turn, 21 rounds. The claim fails if 5x5 is not more expensive than 3x3, or if 1x1 is as accurate
    as 3x3. A caveat if two 3x3 are clearly less accurate than one 5x5, or take longer. Cost: 6
    minutes.
    """
    widths = (4, 8) if study.quick else (16, 32, 64)
    side, (images, labels) = study.dataset.image_shape[0], _images(study, study.scaled(128, 8))
    kinds = {"1x1": (1, 1), "3x3": (3, 1), "5x5": (5, 1), "two_3x3": (3, 2)}
    values: Values = {}
    programs = {}
    for name, (kernel, repeats) in kinds.items():
        model = Plain(_classes(study), widths, kernel=kernel, repeats=repeats)
        fits = _fits(study, model, 5)
        params = fits[0].variables["params"]
        sizes = [kernel.size for kernel in _kernels(params)[:-1]]
        areas = [(side >> index // repeats) ** 2 for index in range(len(sizes))]
        values[name] = {
            "val": _val(fits),
            "conv_weights": int(sum(sizes)),
            "conv_million_macs": float(np.dot(sizes, areas) / 1e6),
        }
        loss = functools.partial(_loss, model)
        programs[name] = _gradient(lambda x, p, loss=loss: loss(p, x, labels), images, params)
    compared = {name: kinds[name] for name in ("5x5", "two_3x3")}
    equal = widths[: study.scaled(3, 1)]
    for index, channels in enumerate(equal):
        for name, kind in compared.items():
            shape = (len(images), side >> index, side >> index, channels)
            programs[f"{name} {channels}"] = _stack(*kind, shape)
    ms = _in_turn(programs, study.scaled(21, 1))
    for name in kinds:
        values[name]["ms_per_pass"] = ms[name]
    values["equal_channels"] = {
        "channels": list(equal),
        **{f"{name}_ms": [ms[f"{name} {channels}"] for channels in equal] for name in compared},
    }
    return Measured(values, n=len(study.seeds))


def judge_kernel_size(values: Values) -> Verdict:
    kinds = ("1x1", "3x3", "5x5", "two_3x3")
    one, three, five, two = (values[name] for name in kinds)
    equal = values["equal_channels"]
    ratios = [a / b for a, b in zip(equal["two_3x3_ms"], equal["5x5_ms"], strict=True)]
    times, macs = (two[key] / five[key] for key in ("ms_per_pass", "conv_million_macs"))
    evidence = table(
        (
            "kernels",
            "validation accuracy",
            "weights",
            "million multiply-accumulates an image",
            "a pass of 128 images",
        ),
        [
            (
                name.replace("_", " "),
                percent(values[name]["val"]),
                f"{values[name]['conv_weights']:,}",
                f"{values[name]['conv_million_macs']:.1f}",
                f"{values[name]['ms_per_pass']:.0f} ms",
            )
            for name in kinds
        ],
    )
    evidence += "\n\nIn this network the second 3x3 of each two has more channels in.\n\n" + table(
        ("channels in and out", *map(str, equal["channels"])),
        [
            ("one 5x5", *(f"{ms:.0f} ms" for ms in equal["5x5_ms"])),
            ("two 3x3", *(f"{ms:.0f} ms" for ms in equal["two_3x3_ms"])),
        ],
    )
    points, clear = difference(three["val"], one["val"])
    if not (clear and points > 0) or five["ms_per_pass"] <= 1.1 * three["ms_per_pass"]:
        return Verdict(FAILS, "5x5 costs no more than 3x3, or 1x1 is as accurate.", evidence)
    stacked, differ = difference(two["val"], five["val"])
    slower_at_equal, slower_here = float(np.median(ratios)) > 1, times > 1
    finding = (
        f"3x3 is {gain(three['val'], one['val']).removeprefix('+')} points better than 1x1 and "
        "costs less than 5x5. "
        f"With as many channels in as out, two 3x3 take {min(ratios):.1f} to {max(ratios):.1f} "
        f"times as long as one 5x5; in this network they have {macs:.1f} times the work, take "
        f"{times:.1f} times as long, and change accuracy by {gain(two['val'], five['val'])} points."
    )
    worse = slower_at_equal or slower_here or (differ and stacked < 0)
    return Verdict(CAVEAT if worse else HOLDS, finding, evidence)


# --- 23: normalisation ----------------------------------------------------------------------------

# Mean and standard deviation, of pixels of 0..1; None is the data's own. The last four are the two
# by two of "is the mean subtracted?" and "is it divided by the standard deviation?".
_SCALES: dict[str, tuple[float | None, float | None]] = {
    "pixels_0_255": (0.0, 1 / 255),
    "pixels_0_1": (0.0, 1.0),
    "mean_subtracted": (None, 1.0),
    "divided_by_std": (0.0, None),
    "normalised": (None, None),
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.02, "momentum": 0.9},
}


def _scaled_by(data: Dataset, scale: str) -> Dataset:
    mean, std = (
        own if constant is None else (constant,) * len(own)
        for constant, own in zip(_SCALES[scale], (data.mean, data.std), strict=True)
    )
    return dataclasses.replace(data, mean=mean, std=std)


def _share_of_one_sign(study: Study, model: nn.Module, data: Dataset) -> float:
    """Of the gradients of a first-layer filter's weights, how many have the more frequent sign.

    At initialisation, of 128 training images, in percent; mean over filters and seeds.
    """
    split = study.subset(128)
    images = normalize(jnp.asarray(split.pixels), data.mean, data.std)
    labels = jnp.asarray(split.labels)
    gradient = _compiled(
        jax.grad(functools.partial(_loss, model)), _initial(study, model, 0), images, labels
    )
    shares = []
    for seed in study.seeds:
        first = _kernels(gradient(_initial(study, model, seed), images, labels))[0]
        positive = np.mean(np.asarray(first) > 0, axis=(0, 1, 2))  # [H, W, C, F] -> [F]
        shares.append(np.maximum(positive, 1 - positive).mean())
    return 100 * float(np.mean(shares))


def measure_normalisation(study: Study) -> Measured:
    """Train ``cnn`` on pixels of 0..255, of 0..1, and normalised, with Adam and with SGD.

    And with half of the normalising: with the mean subtracted, or divided by the standard
    deviation, which leaves all pixels positive. 4 epochs on 10,000 images; Adam at 1e-3, SGD at
    0.02 with momentum 0.9. For the tutorial's reasons: the mean of the first layer's weights after
    training, in their standard deviations, as positive pixels are said to push it below zero; and,
    before training, how many of a filter's gradients have one sign (58 % by chance), for the
    zig-zag. The claim fails if normalised pixels are not clearly better with either optimizer. A
    caveat if not with both, or if, of pixels with the same spread, positive ones are not clearly
    worse after one epoch, do not push the weights, or are not the main reason why gradients have
    one sign. Cost: 10 minutes.
    """
    values: Values = {}
    for scale in _SCALES:
        data = _scaled_by(study.dataset, scale)
        for name, options in _OPTIMIZERS.items():
            config = tutorial_config(study, epochs=study.scaled(4, 1), **options)
            n_train = study.scaled(SMALL, 500)
            fits = [
                study.fit(config, seed=seed, n_train=n_train, dataset=data) for seed in study.seeds
            ]
            first = [_kernels(fitted.variables["params"])[0] for fitted in fits]
            values[f"{scale}_{name}"] = {
                "val": _val(fits),
                "first_epoch_val": spread_of_shares([f.history[0]["val_accuracy"] for f in fits]),
                "first_layer_mean_in_stds": float(np.mean([w.mean() / w.std() for w in first])),
                "gradients_of_one_sign_percent": _share_of_one_sign(study, fits[0].model, data),
            }
    return Measured(values, n=len(study.seeds))


def judge_normalisation(values: Values) -> Verdict:
    scales = {  # by name in ``values``
        "pixels_0_255": "0 to 255",
        "pixels_0_1": "0 to 1",
        "mean_subtracted": "mean subtracted",
        "divided_by_std": "divided by the standard deviation",
        "normalised": "both: normalised",
    }

    def row(scale: str) -> tuple[str, ...]:
        cells = []
        for optimizer in _OPTIMIZERS:
            value = values[f"{scale}_{optimizer}"]
            if math.isfinite(value["first_layer_mean_in_stds"]):
                cells += [percent(value["first_epoch_val"]), percent(value["val"])]
            else:
                cells += ["", "diverged"]
        signs = values[f"{scale}_adam"]["gradients_of_one_sign_percent"]  # before training
        return (scales[scale], *cells, f"{signs:.0f} %")

    accuracies = [
        f"{optimizer.upper() if optimizer == 'sgd' else 'Adam'}, {when}"
        for optimizer in _OPTIMIZERS
        for when in ("epoch 1", "epoch 4")
    ]
    evidence = table(
        ("pixels", *accuracies, "a filter's gradients of one sign"), list(map(row, scales))
    )

    def change(better: str, worse: str, key: str = "val") -> tuple[float, bool]:
        return difference(values[better][key], values[worse][key])

    helped = [
        clear and points > 0
        for scale in ("pixels_0_255", "pixels_0_1")
        for optimizer in _OPTIMIZERS
        for points, clear in [change(f"normalised_{optimizer}", f"{scale}_{optimizer}")]
    ]
    # Centred and positive pixels of the same spread: a small one and a large one.
    pairs = [
        (f"{centred}_{optimizer}", f"{positive}_{optimizer}")
        for centred, positive in (
            ("mean_subtracted", "pixels_0_1"),
            ("normalised", "divided_by_std"),
        )
        for optimizer in _OPTIMIZERS
    ]
    first, last = (
        sum(clear and points > 0 for points, clear in (change(*pair, key) for pair in pairs))
        for key in ("first_epoch_val", "val")
    )
    drifts = [
        values[positive]["first_layer_mean_in_stds"] - values[centred]["first_layer_mean_in_stds"]
        for centred, positive in pairs
    ]
    # A tenth of a standard deviation is what a mean over 16 filters may be off by chance.
    pushed = sum(drift < -0.1 for drift in drifts)
    signs = [  # before training: the same with both optimizers
        tuple(values[name]["gradients_of_one_sign_percent"] for name in pair) for pair in pairs[::2]
    ]
    # What is above chance even without positive pixels is not owed to them.
    owed = [positive - centred > centred - 58 for centred, positive in signs]
    gains = {
        key: ", ".join(
            gain(values[centred][key], values[positive][key]) for centred, positive in pairs
        )
        for key in ("first_epoch_val", "val")
    }
    evidence += (
        "\n\nCentred against positive pixels of the same spread, in four pairs:\n\n"
        + bullets(
            f"points gained after one epoch: {gains['first_epoch_val']}",
            f"points gained at the end: {gains['val']}",
            "how far positive pixels move the mean weight of the first layer, in standard "
            f"deviations (0.1 may be chance): {', '.join(f'{drift:+.2f}' for drift in drifts)}",
            "a filter's gradients would be of one sign in 58 % of the cases by chance",
        )
    )
    if not any(helped):
        return Verdict(FAILS, "Normalised pixels are not clearly better.", evidence)
    n_pairs = len(pairs)
    finding = f"Normalising clearly helps in {sum(helped)} of {len(helped)} comparisons."
    if first < n_pairs:
        finding += f" Positive pixels clearly hinder in {first} of {n_pairs} pairs."
    else:
        finding += (
            " Positive pixels do slow down the first epoch, and make a clear difference at the end "
            f"in {last} of {n_pairs} pairs."
        )
    reasons = []
    if pushed < n_pairs:
        reasons.append(f"positive pixels clearly push the weights down in {pushed} of {n_pairs}")
    if not all(owed):
        reasons.append("a filter's gradients mostly have one sign without them too")
    if reasons:
        finding += f" As for the tutorial's reasons, {', and '.join(reasons)}."
    caveat = not all(helped) or first < n_pairs or reasons
    return Verdict(CAVEAT if caveat else HOLDS, finding, evidence)


# --- 33: sigmoid against ReLU ---------------------------------------------------------------------


def _gradient_norms(study: Study, model: nn.Module) -> list[list[float]]:
    """For each seed, of each kernel at initialisation, over 128 training images; first first."""
    images, labels = _images(study, 128)
    gradient = _compiled(
        jax.grad(functools.partial(_loss, model)), _initial(study, model, 0), images, labels
    )
    trees = [gradient(_initial(study, model, seed), images, labels) for seed in study.seeds]
    return [[float(jnp.linalg.norm(kernel)) for kernel in _kernels(tree)] for tree in trees]


def _saturated_share(model: nn.Module, params: Any, images: jax.Array) -> float:
    """Of all sigmoid outputs: how many have a slope below a fifth of the largest, which is 1/4."""
    _, kept = model.apply({"params": params}, images, mutable=["intermediates"])
    outputs = jnp.concatenate([a.ravel() for a in kept["intermediates"]["activations"]])
    return float(jnp.mean(outputs * (1 - outputs) < 0.05))


def measure_sigmoid(study: Study) -> Measured:
    """Networks of 3 and 8 convolutions with ReLU and with sigmoid: first gradients, then accuracy.

    16 channels each, pooled after each of the first three, with LeCun's initialisation. The norm of
    the loss's gradient for each kernel, first over last; validation accuracy after 5 epochs on
    10,000 images; and how many of the sigmoids' outputs are saturated, before and after. The claim
    fails if sigmoid's gradients do not shrink more towards the first layer than ReLU's, or if
    sigmoid is as accurate with 8 layers. A caveat if the gradients of 8 layers vanish with less
    than a tenth of the outputs saturated. The tutorial's other reason, that positive outputs make
    gradients zig-zag, is not tested: ReLU has no negative outputs either. Cost: 5 minutes.
    """
    images, _ = _images(study, 128)
    width = study.scaled(16, 4)
    values: Values = {}
    norms = {}
    for depth in (3, 8):
        for activation in _ACTIVATIONS:
            model = Plain(_classes(study), (width,) * depth, activation=activation)
            norms[depth, activation] = np.exp(
                np.mean(np.log(_gradient_norms(study, model)), axis=0)
            )
            fits = _fits(study, model, 5)
            values[f"{activation}_{depth}_layers"] = {
                "val": _val(fits),
                "gradient_norms": [float(norm) for norm in norms[depth, activation]],
            }
            if activation == "sigmoid":
                values[f"sigmoid_{depth}_layers"] |= {
                    "saturated_at_the_start": spread_of_shares(
                        [
                            _saturated_share(model, _initial(study, model, seed), images)
                            for seed in study.seeds
                        ]
                    ),
                    "saturated_at_the_end": spread_of_shares(
                        [_saturated_share(model, f.variables["params"], images) for f in fits]
                    ),
                }
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    for (depth, activation), line in norms.items():
        marker = "o-" if activation == "relu" else "s--"
        axes.semilogy(range(1, len(line) + 1), line, marker, label=f"{activation}, {depth} layers")
    axes.set(xlabel="layer (the last is Dense)", ylabel="norm of the gradient")
    axes.legend(fontsize="small")
    name = study.save_figure(figure, "q33_gradient_norms.png")
    return Measured(values, n=len(study.seeds), figure=name)


def _first_over_last(value: Values) -> float:
    return value["gradient_norms"][0] / value["gradient_norms"][-1]


def judge_sigmoid(values: Values) -> Verdict:
    ratios = {name: _first_over_last(value) for name, value in values.items()}
    deep = values["sigmoid_8_layers"]
    start, end = deep["saturated_at_the_start"], deep["saturated_at_the_end"]
    evidence = table(
        ("", "validation accuracy", "gradient of the first layer, relative to the last"),
        [
            (name.replace("_", " "), percent(value["val"]), f"{ratios[name]:.2g}")
            for name, value in values.items()
        ],
    )
    evidence += "\n\n" + bullets(
        f"of the sigmoids of 8 layers, {percent(start)} are saturated before training and "
        f"{percent(end)} after it",
        "not tested: that positive outputs make gradients zig-zag, as those of ReLU would too",
    )
    gains = [
        difference(values[f"relu_{depth}_layers"]["val"], values[f"sigmoid_{depth}_layers"]["val"])
        for depth in (3, 8)
    ]
    better = [clear and points > 0 for points, clear in gains]
    # Vanishing: at 8 layers, ten times less of the gradient arrives than with ReLU.
    vanishes = ratios["sigmoid_8_layers"] < ratios["relu_8_layers"] / 10
    if not vanishes or not better[1]:
        return Verdict(FAILS, "Gradients do not vanish, or ReLU is not better.", evidence)
    finding = (
        f"In 8 layers of sigmoids the first layer's gradient is {ratios['sigmoid_8_layers']:.0e} "
        f"of the last one's, and ReLU is {gains[1][0]:.0f} points better."
    )
    if not better[0]:
        return Verdict(CAVEAT, f"{finding} With 3 layers it is not clearly better.", evidence)
    if start["mean_percent"] < 10:
        return Verdict(
            CAVEAT,
            f"{finding} But only {start['mean_percent']:.0f} % of the sigmoids are saturated then: "
            "it is enough that a sigmoid's slope is at most a quarter.",
            evidence,
        )
    return Verdict(HOLDS, finding, evidence)


# --- 35: batch size -------------------------------------------------------------------------------

_BATCHES = (32, 128, 256, 1024)
# Epochs that get each batch size to the fit at which they are compared.
_EPOCHS_TO_FIT = {32: 16, 128: 24, 256: 30, 1024: 60}
_FITTED = 0.95


def _noise(study: Study, fitted: Fitted, sizes: tuple[int, ...], batches: int) -> dict[int, Any]:
    """Variance of the minibatch gradient over its squared mean, and std of the minibatch loss."""
    split = study.subset(study.scaled(SMALL, 500))
    rng = np.random.default_rng(0)
    model, data = fitted.model, study.dataset

    @jax.jit
    def gradient(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        inputs = normalize(images, data.mean, data.std)
        loss, tree = jax.value_and_grad(functools.partial(_loss, model))(
            fitted.variables["params"], inputs, labels
        )
        return loss, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    def at(indices: Any) -> tuple[float, Any]:
        loss, flat = gradient(split.pixels[indices], split.labels[indices])
        return float(loss), np.asarray(flat, np.float64)

    found = {}
    for size in sizes:
        losses, flats = zip(
            *(at(rng.choice(len(split), size)) for _ in range(batches)), strict=True
        )
        stacked = np.stack(flats)
        variance = float(stacked.var(axis=0, ddof=1).sum())
        # The squared norm of a mean of few is too large by its share of the variance.
        signal = float((stacked.mean(axis=0) ** 2).sum()) - variance / batches
        found[size] = (variance, signal, float(np.std(losses, ddof=1)))
    return found


def _val_once_fitted(fitted: Fitted) -> float:
    """Validation accuracy from the epoch on that gets `_FITTED` of the training images right.

    The mean over those epochs; NaN where there are none.
    """
    reached = [epoch["train_accuracy"] >= _FITTED for epoch in fitted.history]
    if not any(reached):
        return math.nan
    return float(np.mean([e["val_accuracy"] for e in fitted.history[reached.index(True) :]]))


def measure_batch_size(study: Study) -> Measured:
    """Train ``cnn`` with batches of 32, 128, 256 and 1,024 for 5 epochs at one learning rate.

    10,000 images, Adam at 1e-3: validation accuracy, seconds per epoch, and the gap to training.
    The noise is the variance of the minibatch gradient, and the spread of the minibatch loss, at
    fixed weights (trained with batches of 128), over 16 batches of each size. At equal fit:
    validation accuracy from the epoch on that gets 95 % of the training images right, as the mean
    over those epochs, in 16 epochs (the largest batch: 60). The claim fails if noise does not fall
    with the batch, or if an epoch of the largest is no faster than one of the smallest. A caveat if
    the largest is not the fastest, or if at equal fit it is not clearly less accurate than the
    smallest. Cost: 25 minutes.
    """
    sizes = (16, 64, 128, 256) if study.quick else _BATCHES
    trained = sizes[::3] if study.quick else sizes
    n_train = study.scaled(SMALL, 500)
    values: Values = {"batch_sizes": list(sizes), "trained_batch_sizes": list(trained)}
    fits = {}
    for size in trained:
        config = tutorial_config(study, epochs=study.scaled(5, 1), batch_size=size)
        fits[size] = [study.fit(config, seed=s, n_train=n_train) for s in study.seeds]
    base = fits[trained[1]][0]
    noise = _noise(study, base, sizes, study.scaled(16, 4))
    values["gradient_variance"] = [noise[size][0] for size in sizes]
    values["loss_std_nats"] = [noise[size][2] for size in sizes]
    values["val"] = [_val(fits[size]) for size in trained]
    values["gap"] = [
        spread_of_shares(
            [study.accuracy(f, study.subset(n_train)) - f.history[-1]["val_accuracy"] for f in runs]
        )
        for runs in fits.values()
    ]
    values["seconds_per_epoch"] = [
        float(np.median([f.seconds / len(f.history) for f in fits[size]])) for size in trained
    ]
    values["val_at_equal_fit"] = []
    for size in trained:
        epochs = 1 if study.quick else _EPOCHS_TO_FIT[size]
        config = tutorial_config(study, epochs=epochs, batch_size=size)
        runs = [study.fit(config, seed=s, n_train=n_train) for s in study.seeds]
        values["val_at_equal_fit"].append(spread_of_shares([_val_once_fitted(f) for f in runs]))
    slope = np.polyfit(np.log(sizes), np.log(values["gradient_variance"]), 1)[0]
    values["variance_exponent"] = float(slope)
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(sizes, values["gradient_variance"], "o-", label=f"measured, exponent {slope:.2f}")
    left.loglog(
        sizes,
        values["gradient_variance"][0] * sizes[0] / np.array(sizes),
        "k:",
        label="1 / batch size",
    )
    left.set(xlabel="batch size (images)", ylabel="variance of the gradient")
    left.legend(fontsize="small")
    for label, kind in (("5 epochs", "val"), ("at equal fit", "val_at_equal_fit")):
        means = [value["mean_percent"] for value in values[kind]]
        stds = [value["std_percent"] for value in values[kind]]
        right.errorbar(trained, means, stds, fmt="o-", capsize=3, label=label)
    right.set(xlabel="batch size (images)", ylabel="validation accuracy (%)", xscale="log")
    right.legend(fontsize="small")
    name = study.save_figure(figure, "q35_batch_size.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_batch_size(values: Values) -> Verdict:
    sizes, trained = values["batch_sizes"], values["trained_batch_sizes"]
    seconds, fitted = values["seconds_per_epoch"], values["val_at_equal_fit"]
    exponent = values["variance_exponent"]
    evidence = table(
        ("batch", *map(str, trained)),
        [
            ("seconds an epoch", *(f"{s:.1f}" for s in seconds)),
            ("validation accuracy after 5 epochs", *map(percent, values["val"])),
            (
                "gap to training, points",
                *(f"{gap['mean_percent']:.1f}" for gap in values["gap"]),
            ),
            (
                f"validation accuracy once {100 * _FITTED:.0f} % of the training images are right",
                *map(percent, fitted),
            ),
        ],
    )
    evidence += "\n\n" + table(
        ("batch", *map(str, sizes)),
        [
            ("variance of the gradient", *(f"{x:.2f}" for x in values["gradient_variance"])),
            ("spread of the loss, nats", *(f"{x:.3f}" for x in values["loss_std_nats"])),
        ],
    )
    # 1 / batch is what independent images give: an exponent of -1, here within a quarter.
    if abs(exponent + 1) > 0.25 or seconds[-1] >= seconds[0]:
        return Verdict(
            FAILS, "Noise does not fall as 1 / batch, or large batches are no faster.", evidence
        )
    finding = f"The variance of the gradient falls as batch^{exponent:.2f}."
    caveats = []
    fastest = trained[int(np.argmin(seconds))]
    if fastest != trained[-1]:
        caveats.append(f"The fastest batch is {fastest}, not {trained[-1]}.")
    points, clear = difference(fitted[-1], fitted[0])
    if not (clear and points < 0):
        caveats.append(
            f"Batches of {trained[-1]} do not clearly generalise worse than of {trained[0]} once "
            f"both fit the training images equally well ({gain(fitted[-1], fitted[0])} points)."
        )
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


# --- 41: initialisation ---------------------------------------------------------------------------


def _pytorch_variance_times_fan_in() -> float:
    """Of ``torch.nn.Conv2d`` as it is made, 64 to 64 channels."""
    from cifar_jax import torch_reference  # noqa: F401  sets how torch's threads wait

    import torch  # isort: skip

    torch.manual_seed(0)
    weight = torch.nn.Conv2d(64, 64, 3).weight
    return float(weight.detach().var()) * 64 * 9


def _activation_stds(study: Study, model: nn.Module, images: jax.Array) -> tuple[Any, Any]:
    """Of each convolution's output after its ReLU, before training, the mean over seeds.

    The standard deviation of all of it, and over images alone: what biases give is the same for all
    images, and tells nothing of them.
    """

    def stds(params: Any, images: jax.Array) -> list[Any]:
        _, kept = model.apply({"params": params}, images, mutable=["intermediates"])
        activations = kept["intermediates"]["activations"]
        return [
            [a.std() for a in activations],
            [jnp.sqrt(a.var(axis=0).mean()) for a in activations],
        ]

    forward = _compiled(stds, _initial(study, model, 0), images)
    found = [forward(_initial(study, model, seed), images) for seed in study.seeds]
    whole, over_images = np.mean(found, axis=0)
    return whole, over_images


def measure_initialisation(study: Study) -> Measured:
    """Initialise 8 convolutions with zeros, a constant, small, Kaiming's, and PyTorch's numbers.

    And with LeCun's, Flax's default; 16 channels, ReLU, pooled after the first three. Biases are 0,
    but drawn where PyTorch draws them. The standard deviation of the activations by layer before
    training, in all and over images alone; how many of the first layer's filters differ, and
    validation accuracy, after 4 epochs on 10,000 images. The claim fails if zeros learn, or if
    Kaiming's activations fade as small numbers' do. A caveat if PyTorch's scale is not Kaiming's.
    Cost: 5 minutes.
    """
    width, depth = study.scaled(16, 4), study.scaled(8, 2)
    images, _ = _images(study, 200)
    values: Values = {"torch_variance_times_fan_in": _pytorch_variance_times_fan_in()}
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    for name in _INITIALIZERS:
        model = Plain(_classes(study), (width,) * depth, init_name=name)
        whole, over_images = _activation_stds(study, model, images)
        fits = _fits(study, model, 4)
        filters = fits[0].variables["params"]["Conv_0"]["kernel"].reshape(-1, width)
        # Equal filters get equal gradients but for rounding.
        distinct = np.unique(np.round(filters, 5), axis=1).shape[1]
        values[name] = {
            "activation_std": whole.tolist(),
            "activation_std_over_images": over_images.tolist(),
            "distinct_filters": int(distinct),
            "val": _val(fits),
        }
        label = name if over_images.any() else f"{name}: 0 in all"
        axes.plot(range(1, depth + 1), np.maximum(over_images, 1e-30), "o-", label=label)
    axes.set(xlabel="layer", ylabel="std over images", yscale="log", ylim=(1e-20, 10))
    axes.legend(fontsize="small", ncols=2)
    name = study.save_figure(figure, "q41_initialisation.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_initialisation(values: Values) -> Verdict:
    schemes = {name: value for name, value in values.items() if isinstance(value, dict)}
    kept, kept_over_images = (  # of the first layer's activations, what the last layer still has
        {name: value[key][-1] / max(value[key][0], 1e-30) for name, value in schemes.items()}
        for key in ("activation_std", "activation_std_over_images")
    )
    torch_scale = values["torch_variance_times_fan_in"]
    evidence = table(
        (
            "initial weights",
            "validation accuracy",
            "activations of layer 8, relative to layer 1",
            "the same over images",
            "distinct filters",
        ),
        [
            (
                name,
                percent(value["val"]),
                f"{kept[name]:.1g}",
                f"{kept_over_images[name]:.1g}",
                str(value["distinct_filters"]),
            )
            for name, value in schemes.items()
        ],
    )
    evidence += "\n\n" + bullets(
        f"variance of the weights times the fan-in: {torch_scale:.2f} in PyTorch, 2 by Kaiming"
    )
    chance = 15  # percent; ten classes give 10
    zero, kaiming = schemes["zero"], schemes["kaiming"]
    # Kaiming's keeps the variance: within a factor of 10 over the layers.
    if zero["val"]["mean_percent"] > chance or not 0.1 < kept["kaiming"] < 10:
        return Verdict(FAILS, "Zeros learn, or Kaiming's activations fade or grow.", evidence)
    if kaiming["val"]["mean_percent"] <= chance or zero["distinct_filters"] > 1:
        return Verdict(FAILS, "Kaiming's weights do not learn, or zeros differ.", evidence)
    finding = "Zeros never learn, and Kaiming's scale keeps the activations."
    # PyTorch "handles this" if its scale is Kaiming's, to a factor of 2.
    if not 1 < torch_scale < 4:
        pytorch = schemes["pytorch"]["val"]
        clear = difference(pytorch, kaiming["val"])[1]
        return Verdict(
            CAVEAT,
            f"{finding} But PyTorch's default has {torch_scale / 2:.2f} of Kaiming's variance, and "
            f"changes accuracy by {gain(pytorch, kaiming['val'])} points"
            f"{'' if clear else ', not clearly'}.",
            evidence,
        )
    return Verdict(HOLDS, f"{finding} PyTorch's default is of that scale.", evidence)


CLAIMS = [
    Claim(
        question=22,
        says="3x3 kernels are the efficient choice; 5x5 see more but cost more; 1x1 see no "
        "neighbours; small kernels in a stack are better than large ones.",
        measure=measure_kernel_size,
        judge=judge_kernel_size,
        refuted_by={
            **{
                name: {
                    "val": spread_at(val),
                    "conv_weights": 1000,
                    "conv_million_macs": 1.0,
                    "ms_per_pass": 30.0,
                }
                for name, val in (("1x1", 60), ("3x3", 60), ("5x5", 62), ("two_3x3", 55))
            },
            "equal_channels": {"channels": [16], "5x5_ms": [30.0], "two_3x3_ms": [30.0]},
        },
    ),
    Claim(
        question=23,
        says="Pixels of 0..255 or 0..1 are all positive, which hinders training; normalised to "
        "mean 0 and std 1 it converges better.",
        measure=measure_normalisation,
        judge=judge_normalisation,
        refuted_by={
            f"{scale}_{optimizer}": {
                "val": spread_at(60),
                "first_epoch_val": spread_at(45),
                "first_layer_mean_in_stds": 0.0,
                "gradients_of_one_sign_percent": 58.0,
            }
            for scale in _SCALES
            for optimizer in _OPTIMIZERS
        },
    ),
    Claim(
        question=33,
        says="Sigmoid saturates: gradients vanish on the way to the first layers, and ReLU is "
        "better in deep networks.",
        measure=measure_sigmoid,
        judge=judge_sigmoid,
        refuted_by={
            f"{activation}_{depth}_layers": {
                "val": spread_at(60),
                "gradient_norms": [1.0] * (depth + 1),
                "saturated_at_the_start": spread_at(50),
                "saturated_at_the_end": spread_at(50),
            }
            for activation in _ACTIVATIONS
            for depth in (3, 8)
        },
    ),
    Claim(
        question=35,
        says="Small batches have noisier gradients and slower epochs; large batches are smoother "
        "and faster but may generalise worse.",
        measure=measure_batch_size,
        judge=judge_batch_size,
        refuted_by={
            "batch_sizes": [32, 1024],
            "trained_batch_sizes": [32, 1024],
            "gradient_variance": [1.0, 1.0],
            "loss_std_nats": [0.1, 0.1],
            "val": [spread_at(60), spread_at(60)],
            "gap": [spread_at(5), spread_at(5)],
            "val_at_equal_fit": [spread_at(60), spread_at(60)],
            "seconds_per_epoch": [4.0, 4.0],
            "variance_exponent": 0.0,
        },
    ),
    Claim(
        question=41,
        says="Weights of zero never learn; a deep network needs a variance that fits the fan-in "
        "(Kaiming), and PyTorch's default takes care of it.",
        measure=measure_initialisation,
        judge=judge_initialisation,
        refuted_by={
            "torch_variance_times_fan_in": 2.0,
            **{
                name: {
                    "activation_std": [1.0] * 8,
                    "activation_std_over_images": [1.0] * 8,
                    "distinct_filters": 16,
                    "val": spread_at(55),
                }
                for name in _INITIALIZERS
            },
        },
    ),
]
