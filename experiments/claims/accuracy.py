"""How well networks do, and what helps: questions 17, 20, 26, 27, 40, 48, 52, 57."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar_jax.config import PRESETS, TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.scoring.inference import softmax
from cifar_jax.steps.train_step import normalize
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, listed, table
from claims.spread import difference, gain, percent, spread_at, spread_of_shares
from claims.study import Fitted, Study

# A quarter of the training images: a run takes a minute, and overfitting comes early.
SMALL = 10_000
OVERFITTING_EPOCHS = 15


def tutorial_config(study: Study, model: str = "cnn", **options: Any) -> TrainConfig:
    """Preset ``tutorial`` (Adam 1e-3, constant, no augmentation); a tiny network when quick."""
    small: dict[str, Any] = {"hidden": (16,)} if model in ("mlp", "cnn") else {}
    if model in ("cnn", "cnn-gap"):
        small["widths"] = (4, 8)
    defaults = small if study.quick else {}
    return dataclasses.replace(PRESETS["tutorial"], **{**defaults, "model": model, **options})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(model: nn.Module, mean: Any, std: Any, variables: Any, images: Any) -> jax.Array:
    return model.apply(variables, normalize(images, mean, std), train=False)


def logits_of(fitted: Fitted, images: NDArray[np.uint8], dataset: Dataset) -> NDArray[np.float32]:
    """Of a trained network, ``[N, K]``; in batches of 500, or one of all."""
    size = min(500, len(images))
    padded = np.pad(images, [(0, -len(images) % size), (0, 0), (0, 0), (0, 0)])
    mean, std, variables = dataset.mean, dataset.std, fitted.variables
    batches = [
        _logits(fitted.model, mean, std, variables, padded[start : start + size])
        for start in range(0, len(padded), size)
    ]
    return np.concatenate(jax.device_get(batches))[: len(images)]


def _tests(study: Study, config: TrainConfig, n_train: int | None = None) -> Values:
    fits = [study.fit(config, seed=seed, n_train=n_train) for seed in study.seeds]
    return spread_of_shares([study.accuracy(fitted, study.dataset.test) for fitted in fits])


# --- 20 and 17: what each kind of network reaches -------------------------------------------------


def on_all_images(study: Study, model: str) -> TrainConfig:
    """The run on all training images that several claims share: 6 epochs, about the best ones."""
    return tutorial_config(study, model, epochs=study.scaled(6, 1))


def measure_guessing(study: Study) -> Measured:
    """Guess at random, guess the most frequent class, then train ``linear`` and ``cnn``.

    Both train for 6 epochs on all training images by the tutorial's recipe, and are scored on the
    test images. The claim fails if guessing does not get 10 %, or ``linear`` less than 15 %. A
    caveat if a network is outside the range claimed for it by more than a point and two standard
    errors of an accuracy on 10,000 images. Cost: 6 minutes, shared with question 17.
    """
    labels = study.dataset.test.labels
    classes = len(study.dataset.class_names)
    rng = np.random.default_rng(0)
    guesses = [float((rng.integers(classes, size=len(labels)) == labels).mean()) for _ in range(30)]
    frequent = np.bincount(study.dataset.train.labels).argmax()
    return Measured(
        {
            "random_guess": spread_of_shares(guesses),
            "most_frequent_class_percent": float(100 * (labels == frequent).mean()),
            "linear": _tests(study, on_all_images(study, "linear")),
            "cnn": _tests(study, on_all_images(study, "cnn")),
        },
        n=len(study.seeds),
    )


def _outside(value: Values, low: float, high: float) -> bool:
    """Whether a mean is outside the range by more than "about" and chance may cover.

    A point, and two standard errors of an accuracy on CIFAR-10's test images: seeds share them, so
    the spread of seeds does not show how far another 10,000 would be.
    """
    mean = value["mean_percent"]
    slack = 1 + 2 * math.sqrt(mean * (100 - mean) / 10_000)
    return not low - slack <= mean <= high + slack


def _place(value: Values, low: int, high: int) -> str:
    """``72.4 % (within 70 to 75)``, or ``77.4 % (2.4 points above 70 to 75)``."""
    below, above = low - value["mean_percent"], value["mean_percent"] - high
    place = f"{max(below, above):.1f} points {'below' if below > 0 else 'above'}"
    place = place if max(below, above) > 0 else "within"
    return f"{value['mean_percent']:.1f} % ({place} {low} to {high})"


def judge_guessing(values: Values) -> Verdict:
    evidence = table(
        ("test accuracy", "claimed", "measured"),
        [
            ("guessing", "10 %", percent(values["random_guess"])),
            ("the most frequent class", "", f"{values['most_frequent_class_percent']:.1f} %"),
            ("`linear`", "30 to 40 %", percent(values["linear"])),
            ("`cnn`", "70 to 75 %", percent(values["cnn"])),
        ],
    )
    if _outside(values["random_guess"], 10, 10) or values["linear"]["mean_percent"] < 15:
        return Verdict(FAILS, "Guessing does not get 10 %, or a linear model no more.", evidence)
    finding = (
        f"Guessing gets {values['random_guess']['mean_percent']:.1f} %, a linear model "
        f"{_place(values['linear'], 30, 40)}, the tutorial's CNN {_place(values['cnn'], 70, 75)}."
    )
    if _outside(values["linear"], 30, 40) or _outside(values["cnn"], 70, 75):
        return Verdict(CAVEAT, finding, evidence)
    return Verdict(
        HOLDS, f"{finding} A point and two standard errors more or less may be chance.", evidence
    )


def _larger(study: Study) -> TrainConfig:
    """A network meant for 80 % in a quarter of an hour a seed: residual, batch norm, OneCycle."""
    if study.quick:  # a residual network would take longer to compile than all the rest
        return on_all_images(study, "cnn")
    return TrainConfig(model="resnet9", widths=(16, 32, 64, 128), epochs=5)


def measure_mlp_and_cnn(study: Study) -> Measured:
    """Train ``mlp``, ``cnn`` and a larger CNN on all images; score them on the test images.

    The first two for 6 epochs by the tutorial's recipe. ``cnn-wide`` would need 5 minutes an epoch
    here, so the larger one is ``resnet9`` with a quarter of its channels, 5 epochs with OneCycle,
    flips and crops, and one seed. The claim fails if the MLP reaches 80 % or no CNN does. A caveat
    if the MLP is outside 40-50 % by more than a point and two standard errors, or if the tutorial's
    CNN stays below 80 %. Cost: 25 minutes.
    """
    larger = study.fit(_larger(study), seed=0)
    return Measured(
        {
            "mlp": _tests(study, on_all_images(study, "mlp")),
            "cnn": _tests(study, on_all_images(study, "cnn")),
            "narrow_resnet9": spread_of_shares([study.accuracy(larger, study.dataset.test)]),
        },
        n=len(study.seeds),
    )


def judge_mlp_and_cnn(values: Values) -> Verdict:
    mlp, cnn, larger = values["mlp"], values["cnn"], values["narrow_resnet9"]
    evidence = table(
        ("", "test accuracy"),
        [
            ("`mlp`", percent(mlp)),
            ("`cnn`, the tutorial's", percent(cnn)),
            (
                "`resnet9` with a quarter of its channels",
                f"{larger['mean_percent']:.1f} %, one seed",
            ),
        ],
    )
    if mlp["mean_percent"] >= 80 or max(cnn["mean_percent"], larger["mean_percent"]) < 80:
        return Verdict(FAILS, "The MLP reaches 80 %, or no CNN does.", evidence)
    finding = f"The MLP gets {_place(mlp, 40, 50)}"
    if _outside(mlp, 40, 50):
        return Verdict(CAVEAT, f"{finding}.", evidence)
    if cnn["mean_percent"] < 80:
        return Verdict(
            CAVEAT,
            f"{finding}. The tutorial's CNN gets {cnn['mean_percent']:.1f} %; 80 % takes a larger "
            f"one, such as a narrow resnet9 ({larger['mean_percent']:.1f} %).",
            evidence,
        )
    return Verdict(HOLDS, f"{finding}, the tutorial's CNN more than 80 %.", evidence)


# --- 26: underfitting -----------------------------------------------------------------------------


def measure_underfitting(study: Study) -> Measured:
    """Train a tiny network, then one that is deeper, wider or trained longer, on 10,000 images.

    Tiny: one convolution with 4 channels, a pool, and 10 logits, 5 epochs. Deeper: four
    convolutions with as many channels before the one pool. Wider: 32 channels. Longer: 20 epochs;
    and the deeper one for as long. Training accuracy is that of the final weights. The claim fails
    if the tiny network gets more than 60 %, or if none of the three clearly helps. A caveat if one
    does not. Cost: 6 minutes.
    """
    classes = len(study.dataset.class_names)
    epochs, n_train = study.scaled(5, 1), study.scaled(SMALL, 500)
    wide = study.scaled(32, 8)

    def network(*widths: int, convs_per_pool: int = 1) -> nn.Module:
        from cifar_jax.networks.models import ConvNet

        return ConvNet(classes, widths, (), convs_per_pool=convs_per_pool)

    tiny, deeper, longer = network(4), network(4, 4, 4, 4, convs_per_pool=4), study.scaled(20, 2)
    tried = {
        "tiny": (tiny, epochs),
        "deeper": (deeper, epochs),
        "wider": (network(wide), epochs),
        "longer": (tiny, longer),
        "deeper_and_longer": (deeper, longer),
    }
    values: Values = {}
    for name, (model, n_epochs) in tried.items():
        config = tutorial_config(study, epochs=n_epochs)
        fits = [study.fit(config, seed=s, n_train=n_train, model=model) for s in study.seeds]
        values[name] = {
            "train": spread_of_shares([study.accuracy(f, study.subset(n_train)) for f in fits]),
            "val": spread_of_shares([f.history[-1]["val_accuracy"] for f in fits]),
        }
    return Measured(values, n=len(study.seeds))


def judge_underfitting(values: Values) -> Verdict:
    tiny = values["tiny"]
    cures = ("deeper", "wider", "longer")
    changes = {cure: difference(values[cure]["train"], tiny["train"]) for cure in cures}
    evidence = table(
        ("network", "training accuracy", "validation accuracy", "gain in training, points"),
        [
            ("tiny", percent(tiny["train"]), percent(tiny["val"]), ""),
            *(
                (
                    cure,
                    percent(values[cure]["train"]),
                    percent(values[cure]["val"]),
                    gain(values[cure]["train"], tiny["train"]),
                )
                for cure in cures
            ),
            (
                "deeper and longer",
                percent(values["deeper_and_longer"]["train"]),
                percent(values["deeper_and_longer"]["val"]),
                gain(values["deeper_and_longer"]["train"], values["longer"]["train"])
                + " over longer",
            ),
        ],
    )
    helped = [cure for cure, (points, clear) in changes.items() if clear and points > 0]
    # Underfitting is bad on both: a gap above 10 points would be overfitting instead.
    gap = tiny["train"]["mean_percent"] - tiny["val"]["mean_percent"]
    if not helped or tiny["train"]["mean_percent"] > 60 or gap > 10:
        return Verdict(FAILS, "The tiny network does not underfit, or nothing helps.", evidence)
    finding = (
        f"The tiny network gets {tiny['train']['mean_percent']:.0f} % of its training images and "
        f"{tiny['val']['mean_percent']:.0f} % of the validation images right. "
        f"Clearly better: {listed(helped)}"
    )
    others = [cure for cure in cures if cure not in helped]
    if others:
        return Verdict(
            CAVEAT,
            f"{finding}. Not clearly, in as many epochs: {listed(others)}.",
            evidence,
        )
    return Verdict(HOLDS, f"{finding}.", evidence)


# --- 27, 40, 57: overfitting, its signs and its cures ---------------------------------------------

_CURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "weight_decay": {"optimizer": "adamw", "weight_decay": 0.3},
    "augmentation": {"flip": True, "crop": 2},
    "onecycle": {"schedule": "onecycle", "learning_rate": 3e-3},
}


def overfitting_runs(study: Study, cure: str) -> list[Fitted]:
    """``cnn`` on 10,000 images for 15 epochs, with one change; a run of each seed, one minute."""
    config = tutorial_config(study, epochs=study.scaled(OVERFITTING_EPOCHS, 2), **_CURES[cure])
    n_train = study.scaled(SMALL, 500)
    return [study.fit(config, seed=seed, n_train=n_train) for seed in study.seeds]


def lowest_loss_epoch(fitted: Fitted) -> int:
    """The epoch, from 1, after which the validation loss was lowest."""
    return 1 + int(np.argmin([row["val_loss"] for row in fitted.history]))


def _stopped_early(study: Study) -> list[Fitted]:
    """The plain runs, stopped at the lowest validation loss: at a constant rate, the same steps."""
    n_train = study.scaled(SMALL, 500)
    return [
        study.fit(tutorial_config(study, epochs=lowest_loss_epoch(run)), seed=seed, n_train=n_train)
        for seed, run in zip(study.seeds, overfitting_runs(study, "plain"), strict=True)
    ]


def measure_overfitting(study: Study) -> Measured:
    """Overfit ``cnn`` on 10,000 images in 15 epochs; then do so with each cure alone.

    Dropout of 0.5 in the Dense layers; decoupled weight decay of 0.3 (times the rate, 1e-3); flips
    and crops by 2 pixels; or stopping at the lowest validation loss. Training accuracy is that of
    the final weights on unaugmented images. The claim fails if the plain run does not reach 90 % in
    training, if its gap to validation is less than 10 points, or if none of the tutorial's three
    cures clearly narrows it. A caveat if one of them does not narrow it, does not clearly raise
    validation accuracy, or leaves 10 points or more. Early stopping, which the tutorial does not
    name here, decides nothing. Cost: 13 minutes, shared with questions 40 and 57.
    """
    n_train = study.scaled(SMALL, 500)
    runs = {
        cure: overfitting_runs(study, cure)
        for cure in ("plain", "dropout", "weight_decay", "augmentation")
    }
    runs["early_stopping"] = _stopped_early(study)
    values: Values = {}
    for cure, fits in runs.items():
        train = [study.accuracy(fitted, study.subset(n_train)) for fitted in fits]
        val = [fitted.history[-1]["val_accuracy"] for fitted in fits]
        values[cure] = {
            "train": spread_of_shares(train),
            "val": spread_of_shares(val),
            "gap": spread_of_shares([a - b for a, b in zip(train, val, strict=True)]),
            "val_best": spread_of_shares([max(r["val_accuracy"] for r in f.history) for f in fits]),
        }
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    del runs["early_stopping"]
    for cure, fits in runs.items():
        epochs = range(1, 1 + len(fits[0].history))
        for axes, key, scale in ((left, "val_loss", 1), (right, "val_accuracy", 100)):
            mean = np.mean([[row[key] for row in f.history] for f in fits], axis=0)
            axes.plot(epochs, scale * mean, label=cure.replace("_", " "))
    left.set(xlabel="epoch", ylabel="validation loss (nats)")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    right.legend(fontsize="small")
    name = study.save_figure(figure, "q27_overfitting.png")
    return Measured(values, n=len(study.seeds), figure=name)


def judge_overfitting(values: Values) -> Verdict:
    plain, named = values["plain"], ("dropout", "weight_decay", "augmentation")
    narrowed, raised = (
        [
            cure
            for cure in named
            for points, clear in [difference(values[cure][key], plain[key])]
            if clear and sign * points > 0
        ]
        for key, sign in (("gap", -1), ("val", 1))
    )
    cured = [cure for cure in named if values[cure]["gap"]["mean_percent"] < 10]
    evidence = table(
        (
            "",
            "training accuracy",
            "validation accuracy",
            "the best epoch's",
            "gap, points",
            "gain in validation, points",
        ),
        [
            (
                cure.replace("_", " "),
                percent(values[cure]["train"]),
                percent(values[cure]["val"]),
                percent(values[cure]["val_best"]),
                f"{values[cure]['gap']['mean_percent']:.1f}",
                gain(values[cure]["val"], plain["val"]) if cure != "plain" else "",
            )
            for cure in ("plain", *named, "early_stopping")
        ],
    )
    evidence += "\n\nOne strength of each cure. Question 57 has the test images of these runs."
    if plain["train"]["mean_percent"] < 90 or plain["gap"]["mean_percent"] < 10:
        return Verdict(FAILS, "The plain run does not overfit.", evidence)
    finding = (
        f"The plain run ends at {plain['train']['mean_percent']:.0f} % of the training and "
        f"{plain['val']['mean_percent']:.0f} % of the validation images."
    )
    if not narrowed:
        return Verdict(FAILS, f"{finding} None of the cures clearly narrows the gap.", evidence)
    if min(map(len, (narrowed, raised, cured))) < len(named):
        return Verdict(
            CAVEAT,
            f"{finding} Each alone, {len(narrowed)} of {len(named)} cures clearly narrow the gap "
            f"and {len(raised)} clearly raise validation accuracy, but "
            f"{f'{len(cured)} close' if cured else 'none closes'} it to less than 10 points.",
            evidence,
        )
    return Verdict(HOLDS, f"{finding} Each of the three cures closes the gap.", evidence)


def measure_loss_and_accuracy(study: Study) -> Measured:
    """In the overfitting runs, compare validation loss with accuracy, epoch by epoch.

    After which epoch is the loss lowest, and after which is the accuracy highest? From the lowest
    loss to the last epoch, how much does the loss rise, and how does the accuracy change? How
    confident is the network in its wrong answers, at both? The claim fails if the loss does not
    rise, or if the accuracy falls with it by more than 2 points, as it would then show as much. A
    caveat if the loss turns no earlier than the accuracy. Cost: 1 minute after question 27.
    """
    runs, stopped = overfitting_runs(study, "plain"), _stopped_early(study)
    best = [1 + int(np.argmax([row["val_accuracy"] for row in run.history])) for run in runs]
    rises = [
        run.history[-1]["val_loss"] / min(row["val_loss"] for row in run.history) for run in runs
    ]
    changes = [
        run.history[-1]["val_accuracy"] - run.history[lowest_loss_epoch(run) - 1]["val_accuracy"]
        for run in runs
    ]
    val = study.dataset.val

    def sureness(fitted: Fitted) -> float:
        probabilities = softmax(logits_of(fitted, val.pixels, study.dataset))
        wrong = probabilities.argmax(axis=1) != val.labels
        return float(probabilities.max(axis=1)[wrong].mean())

    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, 1 + len(runs[0].history))
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        mean = np.mean([[row[key] for row in run.history] for run in runs], axis=0)
        axes.plot(epochs, mean, label=f"{label} loss")
    right = axes.twinx()
    mean = np.mean([[100 * row["val_accuracy"] for row in run.history] for run in runs], axis=0)
    right.plot(epochs, mean, "k--")
    axes.plot([], [], "k--", label="validation accuracy (right)")
    axes.set(xlabel="epoch", ylabel="loss (nats)")
    right.set(ylabel="accuracy (%)", ylim=(0, 100))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", fontsize="small")
    name = study.save_figure(figure, "q40_loss_and_accuracy.png")
    return Measured(
        {
            "lowest_loss_epoch": float(np.mean([lowest_loss_epoch(run) for run in runs])),
            "highest_accuracy_epoch": float(np.mean(best)),
            "loss_rise_percent": float(100 * (np.mean(rises) - 1)),
            "accuracy_change": spread_of_shares(changes),
            "confidence_in_wrong_answers_at_lowest_loss": spread_of_shares(
                [sureness(f) for f in stopped]
            ),
            "confidence_in_wrong_answers_at_the_end": spread_of_shares([sureness(f) for f in runs]),
        },
        n=len(runs),
        figure=name,
    )


def judge_loss_and_accuracy(values: Values) -> Verdict:
    change, rise = values["accuracy_change"]["mean_percent"], values["loss_rise_percent"]
    lowest, highest = values["lowest_loss_epoch"], values["highest_accuracy_epoch"]
    before = values["confidence_in_wrong_answers_at_lowest_loss"]["mean_percent"]
    after = values["confidence_in_wrong_answers_at_the_end"]["mean_percent"]
    evidence = bullets(
        f"validation loss is lowest after epoch {lowest:.1f}; accuracy is highest after epoch "
        f"{highest:.1f} (means over the seeds)",
        f"from the lowest loss to the end the loss rises by {rise:.0f} % and accuracy changes by "
        f"{change:+.1f} points",
        f"meanwhile the confidence in wrong answers goes from {before:.0f} to {after:.0f} %",
    )
    # 10 % is far above what the loss moves between epochs of the same accuracy.
    if rise < 10 or change < -2 or after <= before:
        return Verdict(FAILS, "The loss does not rise, or accuracy falls along with it.", evidence)
    finding = (
        f"Validation loss rises by {rise:.0f} % after its lowest point, while accuracy changes by "
        f"{change:+.1f} points: the network gets more confident in its wrong answers."
    )
    if lowest >= highest:
        return Verdict(CAVEAT, f"{finding} But the loss gave no earlier warning.", evidence)
    return Verdict(HOLDS, finding, evidence)


def measure_improvements(study: Study) -> Measured:
    """Add each of the tutorial's five improvements alone to the plain run of question 27.

    Augmentation (flips, crops by 2), weight decay, dropout, OneCycle to 3e-3, and a residual
    network (``resnet9`` with a quarter of its channels) instead of ``cnn``; 10,000 images, 15
    epochs, final weights, test images. The claim fails if none is clearly better than the plain
    run. A caveat if one is not, or if the plain run does not get the tutorial's 75 %, from where
    the gains may be others. What ``resnet9`` owes to its residuals, its batch norm and its further
    convolutions is not separated. Cost: 8 minutes after question 27.
    """
    test = study.dataset.test
    values: Values = {}
    for cure in _CURES:
        fits = overfitting_runs(study, cure)
        values[cure] = spread_of_shares([study.accuracy(fitted, test) for fitted in fits])
    if study.quick:  # as for question 17
        config = on_all_images(study, "cnn")
    else:
        config = tutorial_config(
            study, "resnet9", epochs=OVERFITTING_EPOCHS, widths=(16, 32, 64, 128)
        )
    values["residual_network"] = _tests(study, config, study.scaled(SMALL, 500))
    return Measured(values, n=len(study.seeds))


def judge_improvements(values: Values) -> Verdict:
    plain, names = values["plain"], [name for name in values if name != "plain"]
    labels = {name: name.replace("_", " ").replace("onecycle", "OneCycle") for name in names}
    evidence = table(
        ("", "test accuracy", "gain, points"),
        [
            ("plain", percent(plain), ""),
            *((labels[name], percent(values[name]), gain(values[name], plain)) for name in names),
        ],
    )
    evidence += (
        "\n\nThe residual network is `resnet9`, which also has batch norm and more convolutions. "
        "Question 27 has the validation images of four of these runs."
    )
    changes = {name: difference(values[name], plain) for name in names}
    helped = [name for name, (points, clear) in changes.items() if clear and points > 0]
    if not helped:
        return Verdict(FAILS, "None of them clearly improves on the plain run.", evidence)
    finding = f"Alone, {listed([labels[name] for name in helped])} clearly help"
    others = [labels[name] for name in names if name not in helped]
    if others:
        finding += f"; for {listed(others)} it is not clear"
    if _outside(plain, 75, 75):
        finding += (
            f". The plain run gets {plain['mean_percent']:.0f} %, so this is not the tutorial's 75"
        )
        return Verdict(CAVEAT, f"{finding}.", evidence)
    return Verdict(CAVEAT if others else HOLDS, f"{finding}.", evidence)


# --- 48: bias and variance ------------------------------------------------------------------------


def measure_bias_and_variance(study: Study) -> Measured:
    """Train ``cnn`` on three disjoint sets of 10,000 images, and decompose the error by epoch.

    Of the squared error of the probabilities, the bias is that of the networks' mean prediction,
    and the variance is how far each is from it; they add up exactly. (The bias of three networks
    still contains a third of their variance, which is subtracted.) After 1, 3, 6 and 15 epochs. The
    claim fails if the bias does not fall or the variance does not rise. A caveat if their sum is
    not least in between. Cost: 5 minutes.
    """
    train, sets = study.dataset.train, study.scaled(3, 2)
    size, checked = study.scaled(SMALL, 250), ((1, 2) if study.quick else (1, 3, 6, 15))
    order = np.random.default_rng(0).permutation(len(train))
    val = study.dataset.val
    truth = np.eye(len(study.dataset.class_names))[val.labels]
    rows: dict[str, list[float]] = {"bias": [], "variance": [], "train_loss": [], "val_loss": []}
    for epochs in checked:
        config = tutorial_config(study, epochs=epochs)
        fits = []
        for index in range(sets):
            part = train.take(np.sort(order[index * size : (index + 1) * size]))
            own = dataclasses.replace(
                study.dataset, train=part, digest=f"{study.dataset.digest} part {index}"
            )
            fits.append(study.fit(config, seed=index, dataset=own))
        p = np.stack([softmax(logits_of(f, val.pixels, study.dataset)) for f in fits])
        variance = ((p - p.mean(axis=0)) ** 2).sum(axis=-1).sum(axis=0).mean() / (sets - 1)
        bias = ((p.mean(axis=0) - truth) ** 2).sum(axis=-1).mean() - variance / sets
        rows["bias"].append(float(bias))
        rows["variance"].append(float(variance))
        rows["train_loss"].append(float(np.mean([f.history[-1]["train_loss"] for f in fits])))
        rows["val_loss"].append(float(np.mean([f.history[-1]["val_loss"] for f in fits])))
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    total = np.add(rows["bias"], rows["variance"])
    for label, line in (("bias", rows["bias"]), ("variance", rows["variance"]), ("sum", total)):
        axes.plot(checked, line, "o-", label=label)
    axes.set(xlabel="epochs", ylabel="squared error of the probabilities", ylim=(0, None))
    axes.legend(fontsize="small")
    name = study.save_figure(figure, "q48_bias_variance.png")
    return Measured({"epochs": list(checked), **rows}, n=sets, figure=name)


def judge_bias_and_variance(values: Values) -> Verdict:
    bias, variance, epochs = values["bias"], values["variance"], values["epochs"]
    total = np.add(bias, variance)
    best = int(total.argmin())
    evidence = table(
        ("after epoch", *map(str, epochs)),
        [
            ("bias", *(f"{x:.3f}" for x in bias)),
            ("variance", *(f"{x:.3f}" for x in variance)),
            ("their sum", *(f"{x:.3f}" for x in total)),
            ("training loss", *(f"{x:.2f}" for x in values["train_loss"])),
            ("validation loss", *(f"{x:.2f}" for x in values["val_loss"])),
        ],
    )
    finding = (
        f"From epoch {epochs[0]} to {epochs[-1]} the bias falls from {bias[0]:.2f} to "
        f"{bias[-1]:.2f} and the variance rises from {variance[0]:.2f} to {variance[-1]:.2f}"
    )
    # A fifth is well above how far either moves with another choice of images.
    if bias[-1] > 0.8 * bias[0] or variance[-1] < 1.2 * variance[0]:
        return Verdict(FAILS, "The bias does not fall, or the variance does not rise.", evidence)
    if best in (0, len(total) - 1):
        return Verdict(CAVEAT, f"{finding}. But the best time is not in between.", evidence)
    return Verdict(HOLDS, f"{finding}; their sum is least after epoch {epochs[best]}.", evidence)


# --- 52: tuning on the test set -------------------------------------------------------------------

_CONFIGURATIONS = (1, 2, 5, 10, 20, 50, 100, 200)


def _leak(right: NDArray[np.bool_], chosen_from: int, size: int, rng: np.random.Generator) -> float:
    """By how much the best of some classifiers on ``size`` images is below its score there, else.

    Args:
        right: ``[classifiers, images]``.
    """
    some = rng.choice(len(right), chosen_from, replace=False)
    order = rng.permutation(right.shape[1])
    seen, unseen = right[some][:, order[:size]], right[some][:, order[size : 2 * size]]
    best = seen.mean(axis=1).argmax()
    return float(seen[best].mean() - unseen[best].mean())


def _linear_classifiers(study: Study, count: int) -> NDArray[np.bool_]:
    """Which test images each of ``count`` real classifiers gets right, ``[count, N]``.

    Configurations of a kind of search: ridge regression on random convolutional features (3x3 on
    images of 8x8, ReLU, averaged over 2x2 regions), each with its own filters, their number and its
    penalty.
    """
    rng = np.random.default_rng(1)
    train, test = study.subset(study.scaled(4000, 300)), study.dataset.test

    def patches(split: Split) -> NDArray[np.float32]:
        images = (split.pixels.astype(np.float32) / 255 - study.dataset.mean) / study.dataset.std
        side = images.shape[1] // 8
        small = images[:, : 8 * side, : 8 * side]
        small = small.reshape(len(images), 8, side, 8, side, -1).mean(axis=(2, 4))
        windows = np.lib.stride_tricks.sliding_window_view(small, (3, 3), axis=(1, 2))
        return np.ascontiguousarray(windows).reshape(len(images), 36, -1).astype(np.float32)

    train_patches, test_patches = patches(train), patches(test)
    targets = np.eye(len(study.dataset.class_names), dtype=np.float32)[train.labels]
    right = []
    for _ in range(count):
        filters = rng.normal(size=(train_patches.shape[-1], rng.integers(8, 17)))
        filters = filters.astype(np.float32)

        def features(x: NDArray[np.float32], filters: Any = filters) -> NDArray[np.float32]:
            responses = np.maximum(x @ filters, 0).reshape(len(x), 2, 3, 2, 3, -1)
            return responses.mean(axis=(2, 4)).reshape(len(x), -1)

        a = features(train_patches)
        mean, penalty = a.mean(axis=0), 10 ** rng.uniform(-4, -2) * len(a)
        a = a - mean
        gram = a.T @ a + penalty * np.eye(a.shape[1], dtype=np.float32)
        weights = np.linalg.solve(gram, a.T @ (targets - targets.mean(axis=0)))
        logits = (features(test_patches) - mean) @ weights + targets.mean(axis=0)
        right.append(logits.argmax(axis=1) == test.labels)
    return np.stack(right)


def measure_leak(study: Study) -> Measured:
    """Choose the best of k configurations by the images that are then reported: how much too good?

    In a simulation, each of the k is right with a probability of 75 %, independently, on 10,000
    images: what the best shows above 75 % is all leak. With 15 real networks (those of question 27)
    and 200 linear classifiers, one half of the test images chooses and the other half tells the
    truth, for 500 random halves and choices. The same with 500 images, as a small test set. The
    claim fails if the best is no better where it was chosen than elsewhere. A caveat if the leak is
    less than half a point. Cost: 2 minutes after question 27.
    """
    rng = np.random.default_rng(0)
    rounds = study.scaled(500, 20)
    simulated = [
        float(100 * (rng.binomial(10_000, 0.75, (rounds, k)).max(axis=1) / 10_000 - 0.75).mean())
        for k in _CONFIGURATIONS
    ]
    test = study.dataset.test
    networks = [run for cure in _CURES for run in overfitting_runs(study, cure)]
    pools = {
        "networks": np.stack(
            [
                logits_of(run, test.pixels, study.dataset).argmax(axis=1) == test.labels
                for run in networks
            ]
        ),
        "linear": _linear_classifiers(study, study.scaled(200, 10)),
    }
    values: Values = {"configurations": list(_CONFIGURATIONS), "simulated_leak_points": simulated}
    for name, right in pools.items():
        k = len(right)
        for size in (len(test) // 2, len(test) // 20):
            leaks = [100 * _leak(right, k, size, rng) for _ in range(rounds)]
            values[f"{name}_leak_on_{'half' if size == len(test) // 2 else 'a_twentieth'}"] = {
                "configurations": k,
                "images": size,
                "mean_points": float(np.mean(leaks)),
                "std_points": float(np.std(leaks)),
                "rounds": rounds,
            }
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(_CONFIGURATIONS, simulated, "o-", label="equal coins, 10,000 images")
    right = pools["linear"]
    for size in (len(test) // 2, len(test) // 20):
        counts = [k for k in _CONFIGURATIONS if k <= len(right)]
        means = [100 * np.mean([_leak(right, k, size, rng) for _ in range(rounds)]) for k in counts]
        axes.plot(counts, means, "s--", label=f"linear classifiers, {size:,} images")
    axes.set(xlabel="configurations to choose from", ylabel="too good by (points)")
    figure.legend(loc="outside upper center", fontsize="small")
    return Measured(values, n=rounds, figure=study.save_figure(figure, "q52_leak.png"))


def judge_leak(values: Values) -> Verdict:
    names = {"networks": "networks of question 27", "linear": "linear classifiers"}
    parts = ("half", "a_twentieth")
    pools = [values[f"{name}_leak_on_half"] for name in names]
    most, simulated = values["configurations"][-1], values["simulated_leak_points"][-1]
    evidence = table(
        (
            "points too good, chosen on",
            *(f"{values[f'linear_leak_on_{part}']['images']:,} images" for part in parts),
        ),
        [
            (
                f"the best of {values[f'{name}_leak_on_half']['configurations']} {label}",
                *(f"{values[f'{name}_leak_on_{part}']['mean_points']:.2f}" for part in parts),
            )
            for name, label in names.items()
        ],
    )
    evidence += "\n\n" + bullets(
        f"in a simulation, the best of {most} equal classifiers looks {simulated:.1f} points too "
        "good on 10,000 images"
    )
    # The rounds share their images: the error of their mean is that of resampling alone.
    errors = [2 * pool["std_points"] / math.sqrt(pool["rounds"]) for pool in pools]
    leaking = [pool["mean_points"] > error for pool, error in zip(pools, errors, strict=True)]
    if simulated <= 0 or not any(leaking):
        return Verdict(FAILS, "The best is no better where it was chosen.", evidence)
    few, many = (pool["mean_points"] for pool in pools)
    finding = (
        f"Chosen on {pools[0]['images']:,} test images, the best of {pools[0]['configurations']} "
        f"networks looks {few:.1f} points too good there, the best of "
        f"{pools[1]['configurations']} linear classifiers {many:.1f}"
    )
    # Half a point is what seeds differ by: less than that, nobody would notice.
    if not all(leaking) or min(few, many) < 0.5:
        small = values["linear_leak_on_a_twentieth"]
        return Verdict(
            CAVEAT,
            f"Real, but small on a large test set. {finding}; on {small['images']} images, "
            f"{small['mean_points']:.1f}.",
            evidence,
        )
    return Verdict(HOLDS, f"{finding}.", evidence)


def _cured(train: float, val: float) -> Values:
    return {
        "train": spread_at(train),
        "val": spread_at(val),
        "gap": spread_at(train - val),
        "val_best": spread_at(val),
    }


CLAIMS = [
    Claim(
        question=17,
        says="A simple MLP gets only 40-50 % on CIFAR-10; 80 % takes a CNN.",
        measure=measure_mlp_and_cnn,
        judge=judge_mlp_and_cnn,
        refuted_by={"mlp": spread_at(82), "cnn": spread_at(81), "narrow_resnet9": spread_at(85)},
    ),
    Claim(
        question=20,
        says="Guessing gets 10 % of ten classes, a linear model 30-40 %, a basic CNN 70-75 %.",
        measure=measure_guessing,
        judge=judge_guessing,
        refuted_by={
            "random_guess": spread_at(20),
            "most_frequent_class_percent": 20.0,
            "linear": spread_at(35),
            "cnn": spread_at(72),
        },
    ),
    Claim(
        question=26,
        says="A network that is too simple is bad on training and validation images alike; more "
        "layers, more channels or more epochs help.",
        measure=measure_underfitting,
        judge=judge_underfitting,
        refuted_by={
            "tiny": {"train": spread_at(50), "val": spread_at(49)},
            "deeper": {"train": spread_at(50), "val": spread_at(49)},
            "wider": {"train": spread_at(49), "val": spread_at(49)},
            "longer": {"train": spread_at(50), "val": spread_at(49)},
            "deeper_and_longer": {"train": spread_at(50), "val": spread_at(49)},
        },
    ),
    Claim(
        question=27,
        says="Overfitting shows as high training accuracy (90 %) with validation accuracy that "
        "stops rising (70 %); dropout, weight decay and augmentation cure it.",
        measure=measure_overfitting,
        judge=judge_overfitting,
        refuted_by={
            "plain": _cured(72, 70),
            "dropout": _cured(72, 70),
            "weight_decay": _cured(72, 70),
            "augmentation": _cured(72, 70),
            "early_stopping": _cured(72, 70),
        },
    ),
    Claim(
        question=40,
        says="Validation loss shows overfitting early: it turns up while accuracy stays flat.",
        measure=measure_loss_and_accuracy,
        judge=judge_loss_and_accuracy,
        refuted_by={
            "lowest_loss_epoch": 15.0,
            "highest_accuracy_epoch": 12.0,
            "loss_rise_percent": 0.0,
            "accuracy_change": spread_at(0),
            "confidence_in_wrong_answers_at_lowest_loss": spread_at(50),
            "confidence_in_wrong_answers_at_the_end": spread_at(50),
        },
    ),
    Claim(
        question=48,
        says="Early in training the error is bias, late it is variance; the best time to stop is "
        "in between.",
        measure=measure_bias_and_variance,
        judge=judge_bias_and_variance,
        refuted_by={
            "epochs": [1, 3, 15],
            "bias": [0.5, 0.5, 0.5],
            "variance": [0.1, 0.1, 0.1],
            "train_loss": [1.0, 1.0, 1.0],
            "val_loss": [1.0, 1.0, 1.0],
        },
    ),
    Claim(
        question=52,
        says="Choosing hyperparameters by test accuracy leaks the test set: the score of the "
        "chosen one is too good.",
        measure=measure_leak,
        judge=judge_leak,
        refuted_by={
            "configurations": [1, 200],
            "simulated_leak_points": [0.0, 0.0],
            **{
                f"{name}_leak_on_{size}": {
                    "configurations": 200,
                    "images": 5000,
                    "mean_points": 0.0,
                    "std_points": 0.5,
                    "rounds": 500,
                }
                for name in ("networks", "linear")
                for size in ("half", "a_twentieth")
            },
        },
    ),
    Claim(
        question=57,
        says="A residual network, augmentation, weight decay and dropout, and OneCycle each "
        "improve on the tutorial's 75 %.",
        measure=measure_improvements,
        judge=judge_improvements,
        refuted_by={name: spread_at(65) for name in [*_CURES, "residual_network"]},
    ),
]
