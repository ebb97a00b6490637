"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar_jax.metrics import EpochRow, best_row

_TRAIN, _VAL = "#1f77b4", "#d62728"


def save_curves(history: list[EpochRow], title: str, path: Path) -> None:
    """Loss and accuracy by epoch, for training and validation, as a PNG."""
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    # Figure, not pyplot: it needs no display and leaves no global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    def draw(axes: Axes, label: str, train: list[float], val: list[float]) -> None:
        axes.plot(epochs, train, "o-", markersize=4, color=_TRAIN, label="training (as augmented)")
        axes.plot(epochs, val, "o-", markersize=4, color=_VAL, label="validation")
        axes.axvline(
            best["epoch"],
            color="grey",
            linestyle=":",
            label=f"best validation accuracy: {100 * best['val_accuracy']:.1f} %",
        )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
