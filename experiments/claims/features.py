"""What networks see, and where: questions 1, 3, 39, 43, 53, 60."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.networks.layers import trace_layers
from cifar_jax.networks.models import create_model
from cifar_jax.steps.train_step import create_train_state, normalize
from claims.accuracy import (
    SMALL,
    logits_of,
    on_all_images,
    tutorial_config,
)
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, listed, table
from claims.spread import difference, gain, noise, percent, spread_at, spread_of_shares
from claims.study import Fitted, Study, some_of

_SHIFTS = (0, 1, 2, 3, 4, 6, 8)


def _trained(study: Study, model: str) -> list[Fitted]:
    """On 10,000 images for 8 epochs: the networks that the claims of this module look into."""
    config = tutorial_config(study, model, epochs=study.scaled(8, 1))
    n_train = study.scaled(SMALL, 500)
    return [study.fit(config, seed=seed, n_train=n_train) for seed in study.seeds]


def _untrained(study: Study, model: str, seed: int) -> Fitted:
    import optax

    network = create_model(tutorial_config(study, model), len(study.dataset.class_names), None)
    shape = study.dataset.image_shape
    state = create_train_state(network, optax.identity(), shape, seed)
    return Fitted(network, jax.device_get(state.variables), [], 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _layers(model: nn.Module, variables: Any, images: Any) -> dict[str, jax.Array]:
    """What comes out of each block: of each convolution after its pooling, and of Dense layers."""
    outputs: dict[str, jax.Array] = {"pixels": images}
    name = ""
    for layer in trace_layers(model, variables, images):
        if layer.kind in ("conv", "dense"):
            name = layer.name
        if layer.kind in ("relu", "pool"):
            outputs[name] = layer.output
    return outputs


def _features(study: Study, fitted: Fitted, split: Split) -> dict[str, NDArray[np.float32]]:
    """Each layer's output on a split, averaged over a grid of 4x4 where it has positions."""
    data, parts = study.dataset, []
    for start in range(0, len(split), 500):
        images = normalize(jnp.asarray(split.pixels[start : start + 500]), data.mean, data.std)
        outputs = jax.device_get(_layers(fitted.model, fitted.variables, images))
        parts.append({name: _on_a_grid(output) for name, output in outputs.items()})
    names = ["pixels", *sorted(set(parts[0]) - {"pixels"})]  # a jitted function sorts them all
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _on_a_grid(output: NDArray[np.float32]) -> NDArray[np.float32]:
    if output.ndim == 2:
        return output
    n, height, width, channels = output.shape
    grid = output.reshape(n, 4, height // 4, 4, width // 4, channels).mean(axis=(2, 4))
    return grid.reshape(n, -1)


# --- 1: why not an MLP ----------------------------------------------------------------------------


def _permuted(dataset: Dataset) -> Dataset:
    """The same pixels, each at another place, the same one in all images."""
    height, width, channels = dataset.image_shape
    order = np.random.default_rng(0).permutation(height * width)

    def permute(split: Split) -> Split:
        flat = split.pixels.reshape(len(split), height * width, channels)
        return Split(flat[:, order].reshape(split.pixels.shape), split.labels)

    return dataclasses.replace(
        dataset,
        digest=f"{dataset.digest} permuted",
        train=permute(dataset.train),
        val=permute(dataset.val),
        test=permute(dataset.test),
    )


def measure_dense(study: Study) -> Measured:
    """Count the weights; then permute all pixels, and move images, and see what that costs.

    The weights of a Dense layer of 1,000 on 256x256x3. ``mlp`` and ``cnn`` trained (10,000 images,
    8 epochs) and tested on images whose pixels are permuted, all in the same way; and tested on
    images moved by 4 pixels. The claim fails if the count is not 200 million to 2 %, if moves cost
    the MLP no more than the CNN, or if permuting clearly costs it a quarter as much: it would then
    use what is next to what. By symmetry it should lose nothing, as all pixels have the same
    initial weights; that there is something to lose is shown by the CNN, or else the claim fails
    too. A caveat if the seeds leave it open. Cost: 4 minutes, most of it shared with question 43.
    """
    inputs = jax.ShapeDtypeStruct((1, 256 * 256 * 3), jnp.float32)
    dense = jax.eval_shape(nn.Dense(1000).init, jax.random.key(0), inputs)
    permuted = _permuted(study.dataset)
    moved = _shifted(study.dataset.test, 4)
    n_train = study.scaled(SMALL, 500)
    values: Values = {
        "weights_of_the_dense_layer": int(dense["params"]["kernel"].size),
        "memory_mb": float(4 * dense["params"]["kernel"].size / 1e6),
    }
    for name in ("mlp", "cnn"):
        config = tutorial_config(study, name, epochs=study.scaled(8, 1))
        fits = _trained(study, name)
        others = [
            study.fit(config, seed=seed, n_train=n_train, dataset=permuted) for seed in study.seeds
        ]
        values[name] = {
            "test": spread_of_shares([study.accuracy(f, study.dataset.test) for f in fits]),
            "test_permuted": spread_of_shares(
                [study.accuracy(f, permuted.test, permuted) for f in others]
            ),
            "test_moved_4_pixels": spread_of_shares(
                [float(np.mean([study.accuracy(f, split) for split in moved])) for f in fits]
            ),
        }
    return Measured(values, n=len(study.seeds))


def judge_dense(values: Values) -> Verdict:
    mlp, cnn = values["mlp"], values["cnn"]
    weights = values["weights_of_the_dense_layer"]
    evidence = table(
        (
            "test accuracy",
            "images as they are",
            "trained and tested with all pixels permuted",
            "points lost by that",
            "images moved by 4 pixels",
        ),
        [
            (
                f"`{name}`",
                percent(value["test"]),
                percent(value["test_permuted"]),
                gain(value["test"], value["test_permuted"]),
                percent(value["test_moved_4_pixels"]),
            )
            for name, value in (("mlp", mlp), ("cnn", cnn))
        ],
    )
    evidence += "\n\n" + bullets(
        f"weights of the Dense layer: {weights / 1e6:.1f} million, {values['memory_mb']:.0f} MB"
    )
    # What is left of the accuracy above chance: points alone would favour who has few to lose.
    kept = [
        (value["test_moved_4_pixels"]["mean_percent"] - 10)
        / max(value["test"]["mean_percent"] - 10, 1e-9)
        for value in (mlp, cnn)
    ]
    if abs(weights / 200e6 - 1) > 0.02:
        return Verdict(FAILS, f"The layer has {weights / 1e6:.0f} million weights.", evidence)
    if kept[0] >= kept[1]:
        return Verdict(FAILS, "Moved images cost an MLP no more than a CNN.", evidence)
    by_cnn, clear = difference(cnn["test"], cnn["test_permuted"])
    if not clear or by_cnn < 0:
        return Verdict(FAILS, "A CNN does not use what is next to what either.", evidence)
    by_mlp, clear = difference(mlp["test"], mlp["test_permuted"])
    lost = (
        "Permuting all pixels costs a CNN "
        f"{gain(cnn['test'], cnn['test_permuted']).removeprefix('+')} points and an MLP "
        f"{gain(mlp['test'], mlp['test_permuted']).removeprefix('+')}"
    )
    if clear and by_mlp > by_cnn / 4:
        return Verdict(FAILS, f"{lost}: an MLP too uses what is next to what.", evidence)
    if by_mlp + noise(mlp["test"], mlp["test_permuted"]) > by_cnn / 4:
        return Verdict(
            CAVEAT, f"{lost}: whether an MLP uses what is next to what is not clear.", evidence
        )
    return Verdict(
        HOLDS,
        f"The layer has {weights / 1e6:.0f} million weights. {lost}: flattening keeps the pixels, "
        "but not which ones are neighbours.",
        evidence,
    )


# --- 43: translation ------------------------------------------------------------------------------


def _shifted(split: Split, pixels: int) -> list[Split]:
    """A split moved right, left, down and up; what comes in is the mirrored border."""
    if pixels == 0:
        return [split]
    padding = [(0, 0), (pixels, pixels), (pixels, pixels), (0, 0)]
    padded = np.pad(split.pixels, padding, mode="reflect")
    height, width, _ = split.image_shape
    moved = []
    for row, column in ((1, 0), (1, 2), (0, 1), (2, 1)):
        top, left = row * pixels, column * pixels
        moved.append(Split(padded[:, top : top + height, left : left + width], split.labels))
    return moved


def _equivariance_error(study: Study, fitted: Fitted, kind: str) -> float:
    """Of the first ``conv`` or ``pool``: moving the image 1 pixel against moving the output.

    The largest difference away from the border, in units of the largest output. A pooled output
    moves by half a step, which no move of the output fits: the nearer of 0 and 1 step counts.
    """
    images = jnp.asarray(some_of(study.dataset.test, 100).pixels)
    data = study.dataset

    def first(x: jax.Array) -> NDArray[np.float32]:
        inputs = normalize(x, data.mean, data.std)
        layers = trace_layers(fitted.model, fitted.variables, inputs)
        return np.asarray(next(layer.output for layer in layers if layer.kind == kind))

    here, moved = first(images), first(jnp.roll(images, 1, axis=2))
    errors = [np.abs(moved - np.roll(here, by, axis=2))[:, 2:-2, 2:-2].max() for by in (0, 1)]
    return float(min(errors) / np.abs(here).max())


def _left_or_right(dataset: Dataset, n: int) -> Dataset:
    """Noise with a white square of 6 pixels in its left (0) or right half (1), to tell which."""
    height, width, channels = dataset.image_shape
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        labels = np.arange(n, dtype=np.int32) % 2
        pixels = rng.integers(0, 192, (n, height, width, channels)).astype(np.uint8)
        tops = rng.integers(height - 5, size=n)
        lefts = rng.integers(width // 2 - 5, size=n) + labels * (width // 2)
        for image, top, left in zip(pixels, tops, lefts, strict=True):
            image[top : top + 6, left : left + 6] = 255
        return Split(pixels, labels)

    return dataclasses.replace(
        dataset,
        digest="left or right",
        class_names=("left", "right"),
        train=split(n),
        val=split(n // 2),
        test=split(n // 2),
    )


def measure_translation(study: Study) -> Measured:
    """Move test images by 0 to 8 pixels in four directions: accuracy, and changed answers.

    ``mlp``, ``cnn`` and ``cnn-gap``, trained on 10,000 images without augmentation. How exactly the
    output of the first layer of ``cnn`` moves with the image (equivariance), before and after
    pooling. What pooling loses: the two CNNs learn, from 2,000 images of a white square in noise,
    in which half it is (16 epochs). The claim fails if the CNN loses as much as the MLP of its
    accuracy above chance. A caveat if a CNN changes its answers on more than 5 % of the images
    moved by one pixel, or tells the halves apart on more than 55 %: then it is not invariant. Cost:
    8 minutes.
    """
    test = some_of(study.dataset.test, study.scaled(4000, 200))
    shifts = (0, 1, 4) if study.quick else _SHIFTS
    values: Values = {"shifts_pixels": list(shifts)}
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("mlp", "cnn", "cnn-gap"):
        accuracies: list[list[float]] = []
        changes: list[list[float]] = []
        for fitted in _trained(study, name):
            answers = [
                np.stack(
                    [
                        logits_of(fitted, split.pixels, study.dataset).argmax(axis=1)
                        for split in _shifted(test, shift)
                    ]
                )
                for shift in shifts
            ]
            accuracies.append([float((a == test.labels).mean()) for a in answers])
            changes.append([float((a != answers[0]).mean()) for a in answers])
        found = {
            "accuracy": [spread_of_shares(column) for column in zip(*accuracies, strict=True)],
            "changed_answers": [spread_of_shares(column) for column in zip(*changes, strict=True)],
        }
        values[name.replace("-", "_")] = found
        for axes, spreads in zip((left, right), found.values(), strict=True):
            means = [at_shift["mean_percent"] for at_shift in spreads]
            stds = [at_shift["std_percent"] for at_shift in spreads]
            axes.errorbar(shifts, means, stds, fmt="o-", capsize=2, label=name)
    left.set(xlabel="shift (pixels)", ylabel="test accuracy (%)", ylim=(0, None))
    right.set(xlabel="shift (pixels)", ylabel="changed answers (%)", ylim=(0, None))
    right.legend(fontsize="small")
    first = _trained(study, "cnn")[0]
    halves = _left_or_right(study.dataset, study.scaled(2000, 200))
    for name in ("cnn", "cnn-gap"):
        config = tutorial_config(study, name, epochs=study.scaled(16, 1))
        fits = [study.fit(config, seed=seed, dataset=halves) for seed in study.seeds]
        values[name.replace("-", "_")]["left_or_right"] = spread_of_shares(
            [study.accuracy(fitted, halves.test, halves) for fitted in fits]
        )
    values["convolution_equivariance_error"] = _equivariance_error(study, first, "conv")
    values["pooled_equivariance_error"] = _equivariance_error(study, first, "pool")
    name = study.save_figure(figure, "q43_translation.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_translation(values: Values) -> Verdict:
    shifts = values["shifts_pixels"]
    at = shifts.index(4)
    halves, gap_halves = (values[name]["left_or_right"] for name in ("cnn", "cnn_gap"))
    names = {"mlp": "`mlp`", "cnn": "`cnn`", "cnn_gap": "`cnn-gap`"}

    def kept(name: str) -> float:
        before, after = (values[name]["accuracy"][i]["mean_percent"] - 10 for i in (0, at))
        return 100 * after / max(before, 1e-9)

    def changed(name: str) -> float:
        return values[name]["changed_answers"][1]["mean_percent"]

    evidence = table(
        (
            "",
            "answers changed by a move of 1 pixel",
            "accuracy above chance kept after 4 pixels",
            "tells in which half a square is",
        ),
        [
            (
                label,
                f"{changed(name):.0f} %",
                f"{kept(name):.0f} %",
                percent(values[name]["left_or_right"]) if name != "mlp" else "",
            )
            for name, label in names.items()
        ],
    )
    evidence += "\n\n" + bullets(
        "how exactly the output of a convolution moves with the image: to "
        f"{values['convolution_equivariance_error']:.1g} of its largest value; after pooling, to "
        f"{values['pooled_equivariance_error']:.1g}"
    )
    if kept("cnn") <= kept("mlp") or values["convolution_equivariance_error"] > 1e-4:
        return Verdict(
            FAILS, "A CNN loses as much as an MLP, or a convolution does not move along.", evidence
        )
    # Invariant is an answer that stays; one in twenty may be a tie.
    best = max(value["mean_percent"] for value in (halves, gap_halves))
    if max(changed("cnn"), changed("cnn_gap")) > 5 or best > 55:
        points, clear = difference(gap_halves, halves)
        where = ""
        if clear and points < 0:
            where = " Global pooling does lose some of where a thing is."
        elif gap_halves["mean_percent"] > 55:
            where = " Even with global pooling it tells in which half a square is."
        return Verdict(
            CAVEAT,
            "A convolution moves with the image, and moves cost a CNN less than an MLP. But it "
            f"is not invariant: a move by one pixel changes {changed('cnn'):.0f} % of its answers."
            f"{where}",
            evidence,
        )
    return Verdict(HOLDS, "A CNN's answers do not depend on where things are.", evidence)


# --- 3 and 39: what deeper layers know ------------------------------------------------------------


def _selectivity(activations: NDArray[np.float32], labels: NDArray[np.int32]) -> Any:
    """Of each column: the share of its variance that the class explains, and its best AUC."""
    columns = activations.astype(np.float64)
    overall, total = columns.mean(axis=0), columns.var(axis=0) + 1e-12
    between = np.zeros(columns.shape[1])
    ranks = np.asarray(jax.scipy.stats.rankdata(columns, axis=0), np.float64)
    aucs = []
    for label in np.unique(labels):
        inside = labels == label
        between += inside.mean() * (columns[inside].mean(axis=0) - overall) ** 2
        n, m = inside.sum(), (~inside).sum()
        aucs.append((ranks[inside].sum(axis=0) - n * (n + 1) / 2) / (n * m))
    return between / total, np.max(aucs, axis=0)


def measure_channels(study: Study) -> Measured:
    """How much does a channel of each layer know about the class, before and after training?

    For each channel of ``cnn``, averaged over the image: the share of its variance over test images
    that the ten classes explain, and the area under the curve (AUC) of its best class against the
    rest; means over the channels of a layer that are not dead, that is, zero on all these images.
    The units of the Dense layers stand beside them, but the claim is about channels. The claim
    fails if the class explains clearly more than in the first convolution in no later one, or in
    the last one no more than before training. A caveat if in some only, or if few channels of the
    last one have an AUC of 0.9 or more, as one that stands for one concept would. Cost: half a
    minute after question 43.
    """
    split = some_of(study.dataset.test, study.scaled(4000, 200))
    rows: dict[str, list[Any]] = {"trained": [], "untrained": []}
    for seed, fitted in zip(study.seeds, _trained(study, "cnn"), strict=True):
        for kind, network in (("trained", fitted), ("untrained", _untrained(study, "cnn", seed))):
            found = {}
            for name, features in _features(study, network, split).items():
                if name == "pixels":
                    continue
                if name.startswith("Conv"):  # over the whole image: the mean of the grid's means
                    features = features.reshape(len(split), 16, -1).mean(axis=1)
                live = features.any(axis=0)
                explained, auc = _selectivity(features[:, live], split.labels)
                shares = (explained.mean(), (auc > 0.9).mean(), 1 - live.mean())
                found[name] = [float(share) for share in shares]
            rows[kind].append(found)
    layers = list(rows["trained"][0])
    values: Values = {"layers": layers}
    for kind, runs in rows.items():
        values[kind] = {
            what: [spread_of_shares([run[name][index] for run in runs]) for name in layers]
            for index, what in enumerate(("explained_by_class", "channels_of_one_class", "dead"))
        }
    return Measured(values, n=len(study.seeds))


def judge_channels(values: Values) -> Verdict:
    layers, trained = values["layers"], values["trained"]
    explained, selective = trained["explained_by_class"], trained["channels_of_one_class"]
    later = [i for i, name in enumerate(layers) if name.startswith("Conv")][1:]
    steps = {i: difference(explained[i], explained[0]) for i in range(1, len(layers))}
    risen = [layers[i] for i in later if steps[i][1] and steps[i][0] > 0]
    untrained = values["untrained"]["explained_by_class"]
    evidence = table(
        ("", *layers),
        [
            ("variance of a channel or unit that the class explains", *map(percent, explained)),
            (
                f"gain over {layers[0]}, points",
                "",
                *(gain(explained[i], explained[0]) for i in steps),
            ),
            ("before training", *map(percent, untrained)),
            ("channels or units with an AUC above 0.9 for one class", *map(percent, selective)),
            ("dead", *map(percent, trained["dead"])),
        ],
    )
    gained, learned = difference(explained[later[-1]], untrained[later[-1]])
    if not risen or not learned or gained < 0:
        return Verdict(FAILS, "No later convolution clearly knows more of the class.", evidence)
    told = listed([f"{value['mean_percent']:.0f}" for value in explained[: later[-1] + 1]])
    finding = f"The class explains {told} % of a channel's variance in the three convolutions."
    caveats = []
    if len(risen) < len(later):
        caveats.append(f"Only {listed(risen)} clearly knows more than the first one.")
    # "Each channel": at least half of those of the last convolution.
    if selective[later[-1]]["mean_percent"] < 50:
        caveats.append("Few channels of the last one stand for one class.")
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


def _low_level(split: Split) -> NDArray[np.float64]:
    """Of each image: mean colour (3), and the strength of its edges along rows and columns (2)."""
    images = split.pixels / 255.0
    grey = images.mean(axis=-1)
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    return np.column_stack([images.mean(axis=(1, 2)), *edges])


def _probe(train: Any, test: Any, targets: Any) -> NDArray[np.float64]:
    """Ridge regression on standardised features: the predictions for ``test``.

    Each target has the penalty that does best on a quarter of ``train`` held out, so that layers of
    more features are not punished for them.
    """
    mean, std = train.mean(axis=0), train.std(axis=0)
    # A unit that answers to one image in a thousand is not made as large as the others.
    std = np.maximum(std, 0.1 * np.sqrt((std**2).mean()))
    a, b = (train - mean) / std, (test - mean) / std
    held = len(a) // 4

    def predict(x: Any, y: Any, new: Any, ridge: float) -> NDArray[np.float64]:
        gram = x.T @ x + ridge * len(x) * np.eye(x.shape[1], dtype=x.dtype)
        return new @ np.linalg.solve(gram, x.T @ (y - y.mean(axis=0))) + y.mean(axis=0)

    ridges = (0.001, 0.01, 0.1, 1.0)
    errors = [
        ((predict(a[held:], targets[held:], a[:held], ridge) - targets[:held]) ** 2).mean(axis=0)
        for ridge in ridges
    ]
    best = np.argmin(errors, axis=0)
    whole = np.stack([predict(a, targets, b, ridge) for ridge in ridges])
    return whole[best, :, np.arange(len(best))].T


def measure_hierarchy(study: Study) -> Measured:
    """Linear probes: what can be read, linearly, from each layer of ``cnn``?

    From each layer's output (averaged over a 4x4 grid), ridge regression on 4,000 validation images
    reads the class, as test accuracy, and colours and edges of the whole image, as R2. The same for
    the network before training. The claim fails if the class is not easier to read from each
    convolution than from the one before, or if training does not matter. A caveat if colours and
    edges are not lost on the way: the layers then add rather than replace. Cost: 1 minute after
    question 43.
    """
    # Not training images: what a network has memorised reads better there than elsewhere.
    train = some_of(study.dataset.val, study.scaled(4000, 300))
    test = some_of(study.dataset.test, study.scaled(4000, 200))
    classes = np.eye(len(study.dataset.class_names))
    targets = np.column_stack([classes[train.labels], _low_level(train)])
    simple = _low_level(test)
    rows: dict[str, list[Any]] = {"trained": [], "untrained": []}
    for seed, fitted in zip(study.seeds, _trained(study, "cnn"), strict=True):
        for kind, network in (("trained", fitted), ("untrained", _untrained(study, "cnn", seed))):
            seen, unseen = (_features(study, network, split) for split in (train, test))
            found = {}
            for name in seen:
                read = _probe(seen[name], unseen[name], targets)
                right = read[:, : len(classes)].argmax(axis=1) == test.labels
                error = ((read[:, len(classes) :] - simple) ** 2).mean(axis=0)
                r2 = 1 - error / simple.var(axis=0)
                found[name] = (float(right.mean()), float(r2[:3].mean()), float(r2[3:].mean()))
            rows[kind].append(found)
    layers = list(rows["trained"][0])
    values: Values = {"layers": layers}
    for kind, found in rows.items():
        values[kind] = {
            what: [spread_of_shares([run[name][index] for run in found]) for name in layers]
            for index, what in enumerate(("class", "colour_r2", "edges_r2"))
        }
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, marker in (("trained", "o-"), ("untrained", "s--")):
        for axes, what in ((left, "class"), (right, "colour_r2"), (right, "edges_r2")):
            means = [max(value["mean_percent"], 0) for value in values[kind][what]]
            label = kind if what == "class" else f"{what.removesuffix('_r2')}, {kind}"
            axes.plot(layers, means, marker, label=label)
    left.set(ylabel="class: accuracy of a probe (%)", ylim=(0, None))
    right.set(ylabel="colour and edges: R2 (%)", ylim=(0, None))
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=30)
        axes.legend(fontsize="small")
    name = study.save_figure(figure, "q39_probes.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_hierarchy(values: Values) -> Verdict:
    layers, trained, untrained = values["layers"], values["trained"], values["untrained"]
    convolutions = [i for i, name in enumerate(layers) if name.startswith("Conv")]
    first, last = convolutions[0], convolutions[-1]
    evidence = table(
        ("what a linear probe reads", *layers),
        [
            (what, *map(percent, network[key]))
            for what, key, network in (
                ("class, accuracy", "class", trained),
                ("class before training", "class", untrained),
                ("colours, R²", "colour_r2", trained),
                ("edges, R²", "edges_r2", trained),
            )
        ],
    )
    steps = [
        difference(trained["class"][b], trained["class"][a])
        for a, b in itertools.pairwise(convolutions)
    ]
    learned, clear = difference(trained["class"][last], untrained["class"][last])
    rises = all(points > 0 and differs for points, differs in steps)
    if not rises or not clear or learned < 0:
        return Verdict(
            FAILS, "The class is not easier to read with depth, or training adds nothing.", evidence
        )
    finding = (
        "The class gets easier to read from convolution to convolution, from "
        f"{trained['class'][first]['mean_percent']:.0f} to "
        f"{trained['class'][last]['mean_percent']:.0f} %."
    )
    # "Replaced" would be to lose a tenth of it or more.
    low = [
        trained[what][last]["mean_percent"] < 0.9 * trained[what][first]["mean_percent"]
        for what in ("colour_r2", "edges_r2")
    ]
    if not all(low):
        return Verdict(
            CAVEAT,
            f"{finding} But colours and edges are not replaced: they can still be read from the "
            "last one.",
            evidence,
        )
    return Verdict(HOLDS, finding, evidence)


# --- 53: the first layer's filters ----------------------------------------------------------------


def _gabors() -> NDArray[np.float64]:
    """Gabor functions on a 3x3 grid, unit norm, ``[M, 9]``; with some of no wave: blobs."""
    y, x = np.mgrid[-1:2, -1:2].astype(np.float64)
    found = []
    for theta in np.arange(0, np.pi, np.pi / 12):
        along = x * np.cos(theta) + y * np.sin(theta)
        for wavelength in (2.0, 2.5, 3.0, 4.0, 6.0, 12.0):
            for phase in np.arange(0, np.pi, np.pi / 8):
                for sigma in (0.7, 1.0, 1.5, 3.0):
                    envelope = np.exp(-(x**2 + y**2) / (2 * sigma**2))
                    found.append(envelope * np.cos(2 * np.pi * along / wavelength + phase))
    flat = np.array(found).reshape(len(found), 9)
    norms = np.linalg.norm(flat, axis=1)
    return flat[norms > 1e-3] / norms[norms > 1e-3, None]


def _explained_by_gabor(kernel: NDArray[Any]) -> NDArray[np.float64]:
    """Of each filter ``[3, 3, C, D]``: what the best Gabor, in the best colour, explains, 0..1."""
    filters = np.asarray(kernel, np.float64).reshape(9, kernel.shape[2], kernel.shape[3])
    # For a unit pattern g the best colour is W^T g, and explains its squared length.
    projections = np.einsum("mp,pcd->mcd", _gabors(), filters)
    energy = np.maximum((filters**2).sum(axis=(0, 1)), 1e-12)  # a dead filter has no update
    return (projections**2).sum(axis=1).max(axis=0) / energy


def measure_filters(study: Study) -> Measured:
    """Fit Gabor functions to the first layer of ``cnn``, and to what training has added to it.

    Each filter is approximated by the best of some 2,300 Gabor functions (12 orientations, 6
    wavelengths, 8 phases, 4 sizes) times the best colour; the share of its energy explained, as
    median over filters. A network of real images is compared with one of the same pixels permuted,
    in which there are colours but no edges; noise would not be a fair comparison for an update,
    which is smooth in either. Both are those of question 1 (10,000 images, 8 epochs), from the same
    initial weights. "Look like" means that half of the filters are explained to nine tenths. The
    claim fails if neither the filters nor their updates are clearly more like Gabor functions on
    real images. A caveat if one of them is, but the filters do not look so. Cost: seconds after
    question 1.
    """
    config = tutorial_config(study, "cnn", epochs=study.scaled(8, 1))
    n_train = study.scaled(SMALL, 500)

    def kernel(network: Fitted) -> NDArray[np.float64]:
        return np.asarray(network.variables["params"]["Conv_0"]["kernel"], np.float64)

    def medians(kernels: list[NDArray[np.float64]]) -> Values:
        return spread_of_shares([float(np.median(_explained_by_gabor(k))) for k in kernels])

    before = [kernel(_untrained(study, "cnn", seed)) for seed in study.seeds]
    values: Values = {"untrained": medians(before), "weights_shape": list(before[0].shape)}
    pictures: list[NDArray[np.float64]] = []
    for kind, dataset in (("real", study.dataset), ("permuted", _permuted(study.dataset))):
        fits = [study.fit(config, seed=s, n_train=n_train, dataset=dataset) for s in study.seeds]
        after = [kernel(fitted) for fitted in fits]
        added = [a - b for a, b in zip(after, before, strict=True)]
        values[kind] = {
            "filters": medians(after),
            "updates": medians(added),
            "filters_to_nine_tenths": spread_of_shares(
                [float((_explained_by_gabor(k) >= 0.9).mean()) for k in after]
            ),
            "moved": spread_of_shares(
                [
                    float(np.linalg.norm(a) / np.linalg.norm(b))
                    for a, b in zip(added, before, strict=True)
                ]
            ),
        }
        pictures = pictures or [after[0], added[0]]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    for part, weights, title in zip(
        figure.subfigures(2, 1),
        pictures,
        ("first layer; what the best Gabor explains", "what training has added to it"),
        strict=True,
    ):
        part.suptitle(title, fontsize=9)
        explained, channels = _explained_by_gabor(weights), weights.shape[2]
        for index, panel in enumerate(part.subplots(2, 8).ravel()):
            panel.set_axis_off()
            if index < len(explained) and channels in (1, 3):
                shown = weights[..., index] / (2 * np.abs(weights[..., index]).max() + 1e-12) + 0.5
                panel.imshow(np.repeat(shown, 3 // channels, axis=-1), interpolation="nearest")
                panel.set_title(f"{100 * explained[index]:.0f} %", fontsize=8)
    name = study.save_figure(figure, "q53_filters.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_filters(values: Values) -> Verdict:
    real, permuted = values["real"], values["permuted"]
    shape = "x".join(str(size) for size in values["weights_shape"])
    kinds = {"filters": "the filters", "updates": "what training adds to them"}
    more = {what: difference(real[what], permuted[what]) for what in kinds}
    clear = [what for what, (points, differs) in more.items() if differs and points > 0]
    evidence = table(
        (
            "energy that the best Gabor function explains",
            "trained",
            "with permuted pixels",
            "points",
        ),
        [
            (name, percent(real[what]), percent(permuted[what]), gain(real[what], permuted[what]))
            for what, name in kinds.items()
        ],
    )
    evidence += "\n\n" + bullets(
        f"of the filters before training: {percent(values['untrained'])}",
        f"training changes the weights by {percent(real['moved'])} of their norm",
        f"filters that are explained to nine tenths: {percent(real['filters_to_nine_tenths'])}",
        f"weights: {shape}, in Flax's order; medians over the filters",
    )
    if not clear:
        return Verdict(
            FAILS, "They look no more like Gabors than without edges to learn.", evidence
        )
    which = listed([kinds[what] for what in clear])
    finding = f"Gabor functions fit {which} better than without edges to learn"
    finding += f" ({', '.join(gain(real[what], permuted[what]) for what in clear)} points)."
    if real["filters_to_nine_tenths"]["mean_percent"] < 50:
        return Verdict(CAVEAT, f"Few filters look like one. But {finding}", evidence)
    return Verdict(HOLDS, finding, evidence)


# --- 60: sample efficiency ------------------------------------------------------------------------


def measure_sample_efficiency(study: Study) -> Measured:
    """Train ``linear``, ``mlp`` and ``cnn`` on more and more images.

    500, 2,000, 8,000 (24, 16 and 8 epochs of the tutorial's recipe) and all 45,000 (6 epochs): the
    best validation accuracy by epoch, because each overfits at another time. The claim fails if the
    CNN never gets as good as the MLP, is ahead at no size, or needs more than half of the images. A
    caveat if it is not ahead at every size, or needs more than a fifth of the images. Cost: 6
    minutes after question 20.
    """
    sizes = (200, 1000) if study.quick else (500, 2000, 8000, 45_000)
    epochs = (1,) if study.quick else (24, 16, 8)
    everything = len(study.dataset.train)
    values: Values = {"images": [min(size, everything) for size in sizes]}
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    for name in ("linear", "mlp", "cnn"):
        configs = [tutorial_config(study, name, epochs=n) for n in epochs]
        configs.append(on_all_images(study, name))
        values[name] = []
        for config, size in zip(configs, sizes, strict=True):
            n_train = None if size == sizes[-1] else size
            fits = [study.fit(config, seed=seed, n_train=n_train) for seed in study.seeds]
            best = [max(row["val_accuracy"] for row in fitted.history) for fitted in fits]
            values[name].append(spread_of_shares(best))
        means, stds = zip(
            *((v["mean_percent"], v["std_percent"]) for v in values[name]), strict=True
        )
        axes.errorbar(values["images"], means, stds, fmt="o-", capsize=2, label=name)
    axes.set(xlabel="training images", ylabel="validation accuracy (%)", xscale="log")
    axes.legend(fontsize="small")
    name = study.save_figure(figure, "q60_sample_efficiency.png")
    return Measured(values, n=len(study.seeds), figure=name)


def _images_needed(images: list[int], spreads: list[Values], wanted: float) -> float | None:
    """Where the line through the means, over the logarithm, first reaches ``wanted``."""
    means = [value["mean_percent"] for value in spreads]
    if means[0] >= wanted:
        return float(images[0])
    for i in range(1, len(means)):
        if means[i] >= wanted:
            share = (wanted - means[i - 1]) / (means[i] - means[i - 1])
            return float(images[i - 1] * (images[i] / images[i - 1]) ** share)
    return None


def judge_sample_efficiency(values: Values) -> Verdict:
    images, mlp, cnn = values["images"], values["mlp"], values["cnn"]
    evidence = table(
        ("validation accuracy, by training images", *(f"{n:,}" for n in images)),
        [(f"`{name}`", *map(percent, values[name])) for name in ("linear", "mlp", "cnn")],
    )
    needed = _images_needed(images, cnn, mlp[-1]["mean_percent"])
    if needed is None:
        return Verdict(FAILS, "The CNN never gets as good as the MLP.", evidence)
    times = images[-1] / needed
    # Found on a line between sizes four times apart: no more than two digits of it mean anything.
    about = f"{float(f'{needed:.2g}'):,.0f}"
    finding = f"The CNN needs some {about} images for what the MLP gets from {images[-1]:,}."
    ahead = [difference(a, b) for a, b in zip(cnn, mlp, strict=True)]
    behind = [
        n for n, (points, clear) in zip(images, ahead, strict=True) if not clear or points < 0
    ]
    if len(behind) == len(images) or times < 2:
        return Verdict(FAILS, finding, evidence)
    if behind:
        finding += f" With {behind[0]:,} images it is not clearly ahead."
    return Verdict(CAVEAT if behind or times < 5 else HOLDS, finding, evidence)


_FIVE = ["pixels", "Conv_0", "Conv_1", "Conv_2", "Dense_0"]

CLAIMS = [
    Claim(
        question=1,
        says="A Dense layer of 1,000 on a 256x256 RGB image has 200 million weights; flattening "
        "destroys what is next to what; an MLP has to learn each position anew.",
        measure=measure_dense,
        judge=judge_dense,
        refuted_by={
            "weights_of_the_dense_layer": 196_608_000,
            "memory_mb": 786.4,
            **{
                name: {
                    "test": spread_at(50),
                    "test_permuted": spread_at(50),
                    "test_moved_4_pixels": spread_at(45),
                }
                for name in ("mlp", "cnn")
            },
        },
    ),
    Claim(
        question=3,
        says="Each channel stands for one visual feature, in deeper layers for higher concepts.",
        measure=measure_channels,
        judge=judge_channels,
        refuted_by={
            "layers": _FIVE[1:],
            "trained": {
                "explained_by_class": [spread_at(5), spread_at(10), spread_at(20), spread_at(40)],
                "channels_of_one_class": [
                    spread_at(0),
                    spread_at(20),
                    spread_at(60),
                    spread_at(80),
                ],
                "dead": [spread_at(0)] * 4,
            },
            "untrained": {
                "explained_by_class": [spread_at(5)] * 4,
                "channels_of_one_class": [spread_at(0)] * 4,
                "dead": [spread_at(0)] * 4,
            },
        },
    ),
    Claim(
        question=39,
        says="Training makes a hierarchy: edges and colours first, then textures and parts, "
        "objects last.",
        measure=measure_hierarchy,
        judge=judge_hierarchy,
        refuted_by={
            "layers": _FIVE,
            **{
                kind: {what: [spread_at(40)] * 5 for what in ("class", "colour_r2", "edges_r2")}
                for kind in ("trained", "untrained")
            },
        },
    ),
    Claim(
        question=43,
        says="A CNN's structure makes its answer independent of where things are; with much "
        "pooling it may not know where.",
        measure=measure_translation,
        judge=judge_translation,
        refuted_by={
            "shifts_pixels": list(_SHIFTS),
            **{
                name: {
                    "accuracy": [spread_at(60 - 4 * shift) for shift in _SHIFTS],
                    "changed_answers": [spread_at(4 * shift) for shift in _SHIFTS],
                    "left_or_right": spread_at(50),
                }
                for name in ("mlp", "cnn", "cnn_gap")
            },
            "convolution_equivariance_error": 0.0,
            "pooled_equivariance_error": 0.0,
        },
    ),
    Claim(
        question=53,
        says="The filters of the first layer can be shown as pictures, and look like Gabor "
        "functions or blobs of colour.",
        measure=measure_filters,
        judge=judge_filters,
        refuted_by={
            "untrained": spread_at(40),
            "weights_shape": [3, 3, 3, 16],
            **{
                kind: {
                    "filters": spread_at(40),
                    "updates": spread_at(70),
                    "filters_to_nine_tenths": spread_at(0),
                    "moved": spread_at(40),
                }
                for kind in ("real", "permuted")
            },
        },
    ),
    Claim(
        question=60,
        says="Its assumptions about images make a CNN need far fewer of them than an MLP.",
        measure=measure_sample_efficiency,
        judge=judge_sample_efficiency,
        refuted_by={
            "images": [500, 2000, 8000, 45_000],
            "linear": [spread_at(20), spread_at(30), spread_at(35), spread_at(38)],
            "mlp": [spread_at(30), spread_at(38), spread_at(45), spread_at(53)],
            "cnn": [spread_at(29), spread_at(37), spread_at(45), spread_at(53)],
        },
    ),
]
