"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TRAIN, _VAL = "#1f77b4", "#d62728"


def save_curves(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy by epoch, for training and validation, as a PNG.

    Args:
        history: the rows of ``metrics.jsonl``.
    """
    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: row["val_accuracy"])
    # Figure, not pyplot: it needs no display and leaves no global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"loss": ("cross-entropy loss", 1), "accuracy": ("accuracy, %", 100)}
    for axes, (quantity, (label, scale)) in zip(
        figure.subplots(1, 2), panels.items(), strict=True
    ):
        for split, name, colour in (
            ("train", "training (as augmented)", _TRAIN),
            ("val", "validation", _VAL),
        ):
            values = [scale * row[f"{split}_{quantity}"] for row in history]
            axes.plot(epochs, values, "o-", markersize=4, color=colour, label=name)
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
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
