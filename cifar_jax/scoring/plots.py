"""Pictures of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cifar_jax.scoring.scores import Scores
from cifar_jax.steps.metrics import EpochRow, best_row

_TRAIN, _VAL = "#1f77b4", "#d62728"
_LARGEST_SIDE = 20.0  # inches: without a limit, hundreds of classes would take gigabytes
# Classes of a confusion matrix whose numbers are still readable.
_MOST_CLASSES_WITH_NUMBERS, _MOST_CLASSES_WITH_NAMES = 30, 100
_LONGEST_NAME = 20  # letters; with a percentage after it, as wide as the picture of a mistake


def save_curves(history: list[EpochRow], title: str, path: Path) -> None:
    """Loss and accuracy by epoch, for training and validation, as a PNG."""
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    # Figure, not pyplot: no display, no global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    def draw(axes: Axes, label: str, train: list[float], val: list[float]) -> None:
        axes.plot(
            epochs, train, "o-", markersize=4, color=_TRAIN, label="training (during the epoch)"
        )
        axes.plot(epochs, val, "o-", markersize=4, color=_VAL, label="validation")
        axes.axvline(
            best["epoch"],
            color="grey",
            linestyle=":",
            label=f"best validation accuracy: {100 * best['val_accuracy']:.1f} %",
        )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()

    draw(
        loss_axes,
        "cross-entropy loss, nats",
        [row["train_loss"] for row in history],
        [row["val_loss"] for row in history],
    )
    draw(
        accuracy_axes,
        "accuracy, %",
        [100 * row["train_accuracy"] for row in history],
        [100 * row["val_accuracy"] for row in history],
    )
    figure.suptitle(title, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def save_confusion(scores: Scores, class_names: Sequence[str], title: str, path: Path) -> None:
    """The confusion matrix ``[K, K]``, coloured by the fraction of the true class, as a PNG."""
    size = min(max(5.0, 0.62 * len(class_names) + 2), _LARGEST_SIDE)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = scores.shares
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= _MOST_CLASSES_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(scores.confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            shown = str(count) if count else "·"
            axes.text(column, row, shown, ha="center", va="center", color=colour, fontsize=8)
    if len(class_names) <= _MOST_CLASSES_WITH_NAMES:
        places, names = range(len(class_names)), [_shortened(name) for name in class_names]
        axes.set_xticks(places, names, rotation=90, parse_math=False)
        axes.set_yticks(places, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)
    _save(figure, path)


def save_calibration(scores: Scores, title: str, path: Path) -> None:
    """Accuracy by confidence, and the number of predictions at each, as a PNG."""
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    counts, confidence, accuracy = zip(*scores.calibration, strict=True)
    axes.plot([0, 1], [0, 1], ":", color="grey", label="perfectly calibrated")
    axes.plot(
        confidence,
        accuracy,
        "o-",
        color=_TRAIN,
        label=f"expected calibration error {100 * scores.calibration_error:.1f} %",
    )
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, parse_math=False)
    axes.legend()
    histogram.bar(confidence, counts, width=0.03, color=_TRAIN)
    histogram.set(xlabel="confidence", ylabel="images")
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    histogram.grid(alpha=0.3)
    _save(figure, path)


def save_mistakes(
    images: NDArray[np.uint8], mistakes: Sequence[dict[str, Any]], title: str, path: Path
) -> None:
    """Images ``[N, H, W, C]`` with their wrong predictions, as a PNG; no file without any."""
    if not len(images):
        path.unlink(missing_ok=True)  # an earlier network's
        return
    columns = 6
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.35 * rows + 0.5), layout="constrained")
    for axes, image, mistake in zip(
        figure.subplots(rows, columns, squeeze=False).flat, images, mistakes, strict=False
    ):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)  # the map is for greyscale only
        axes.set_title(
            f"{_shortened(mistake['predicted'])} {100 * mistake['confidence']:.1f} %\n"
            f"is {_shortened(mistake['class'])}\n{_shortened(mistake['file'])}",
            fontsize=8,
            parse_math=False,  # a $ in a name is a $
        )
    for axes in figure.axes:
        axes.axis("off")
    figure.suptitle(f"the most confident mistakes of {title}", parse_math=False)
    _save(figure, path)


def _shortened(name: str) -> str:
    """``name``, with its middle left out if it is too long for the plot."""
    if len(name) <= _LONGEST_NAME:
        return name
    kept = _LONGEST_NAME - 1
    return f"{name[: kept // 2]}\N{HORIZONTAL ELLIPSIS}{name[-(kept - kept // 2) :]}"


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # The font lacks some letters of a file's or class's name, and draws boxes for them.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(path, dpi=120)
