"""The figures of a report: curves as SVG in the page's colours, pixels as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from cifar_jax.data.images import png_uri
from cifar_jax.steps.metrics import EpochRow

# Placeholders: Matplotlib draws in these colours, which are then replaced by the names that the
# style sheet defines for light and dark pages.
_TEXT, _LINE, _ACCENT, _OTHER = "#010001", "#010002", "#010003", "#010004"
_SERIES = [f"#0200{number:02x}" for number in range(8)]
_CSS = {
    **{_TEXT: "var(--quiet)", _LINE: "var(--line)", _ACCENT: "var(--accent)"},
    **{_OTHER: "var(--other)"},
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))

_REFERENCE = re.compile(r"(?:url\(|(?<!\S))#([\w.-]+)")

_MOST_MARKERS = 30  # epochs; with more, the markers would hide the line
_LARGEST_PNG = 128  # pixels a side; larger images are shown smaller


def loss_curves(history: list[EpochRow], best: EpochRow | None) -> Markup:
    return _curves(
        history,
        best,
        "Loss by epoch",
        "cross-entropy, nats",
        [[row["train_loss"] for row in history], [row["val_loss"] for row in history]],
    )


def accuracy_curves(history: list[EpochRow], best: EpochRow | None) -> Markup:
    return _curves(
        history,
        best,
        "Accuracy by epoch",
        "accuracy, %",
        [
            [100 * row["train_accuracy"] for row in history],
            [100 * row["val_accuracy"] for row in history],
        ],
    )


def gap_curve(history: list[EpochRow], best: EpochRow | None) -> Markup:
    gaps = [100 * (row["train_accuracy"] - row["val_accuracy"]) for row in history]
    return _curves(history, best, "Generalisation gap by epoch", "points", [gaps], zero=True)


def learning_rate_curve(history: list[EpochRow], best: EpochRow | None) -> Markup:
    rates = [row["learning_rate"] for row in history]
    return _curves(history, best, "Learning rate by epoch", "learning rate", [rates])


def compared_curves(histories: Sequence[list[EpochRow]], what: str) -> Markup:
    """``val_accuracy`` or ``val_loss`` of several runs; their keys are :func:`line_key`."""
    is_accuracy = what == "val_accuracy"
    figure, axes = _axes("accuracy, %" if is_accuracy else "cross-entropy, nats")
    for number, history in enumerate(histories):
        colour, dashes = _style(number)
        axes.plot(
            [row["epoch"] for row in history],
            [(100 if is_accuracy else 1) * row[what] for row in history],  # type: ignore[literal-required]
            color=colour,
            dashes=dashes,
            **_marked(len(history), alone=True),
        )
    return _svg(figure, f"Validation {'accuracy' if is_accuracy else 'loss'} of each run by epoch")


def line_key(number: int) -> Markup:
    """A sample of the line of run ``number``, for a legend."""
    colour, dashes = _style(number)
    return Markup(
        '<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><line x1="1" x2="27" y1="4" y2="4" '
        'style="stroke: {}; stroke-width: 2.5; stroke-dasharray: {}"/></svg>'
    ).format(_CSS[colour], ",".join(str(2 * length) for length in dashes) or "none")


def _style(number: int) -> tuple[str, tuple[float, ...]]:
    """The colour and dashes of line ``number``: 32 are distinct, neighbours even without colour."""
    dashes = _DASHES[(number + number // len(_SERIES)) % len(_DASHES)]
    return _SERIES[number % len(_SERIES)], dashes


def _curves(
    history: list[EpochRow],
    best: EpochRow | None,
    title: str,
    y_label: str,
    lines: list[list[float]],
    *,
    zero: bool = False,
) -> Markup:
    """One line, or training dashed and validation solid; the best epoch is dotted."""
    figure, axes = _axes(y_label)
    epochs = [row["epoch"] for row in history]
    if zero:
        axes.axhline(0, color=_OTHER, linewidth=0.8)
    if len(lines) == 2:
        axes.plot(epochs, lines[0], "--", color=_OTHER, **_marked(len(epochs)))
    axes.plot(epochs, lines[-1], "-", color=_ACCENT, **_marked(len(epochs)))
    if best is not None:
        axes.axvline(best["epoch"], color=_ACCENT, linestyle=":", linewidth=1)
        value = lines[-1][epochs.index(best["epoch"])]
        axes.plot([best["epoch"]], [value], "o", color=_ACCENT, markersize=5)
    return _svg(figure, title)


def _marked(n: int, *, alone: bool = False) -> dict[str, Any]:
    few = n == 1 if alone else n <= _MOST_MARKERS
    return {"marker": "o" if few else "", "markersize": 2.5, "linewidth": 1.5}


def _axes(y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("epoch", color=_TEXT, fontsize=8)
    axes.set_ylabel(y_label, color=_TEXT, fontsize=8)
    axes.tick_params(color=_LINE, labelcolor=_TEXT, labelsize=8)
    axes.yaxis.get_offset_text().set(color=_TEXT, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    """``figure`` as an element of an HTML page, with ``title`` as its text for screen readers.

    What Matplotlib writes but does not belong inside a page is removed: namespaces, metadata, a
    style for all elements, and ids, which would be duplicated; those in use get ``title`` as a
    prefix.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    prefix = title.lower().replace(" ", "-")
    used = set(_REFERENCE.findall(" ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        identity = attributes.pop("id", "")
        element.attrib = {
            name: re.sub(r"(url\(|^)#", rf"\1#{prefix}-", value)
            for name, value in attributes.items()
        }
        if identity in used:
            element.set("id", f"{prefix}-{identity}")
        if "style" in attributes:  # the page has a font of its own
            element.set("style", re.sub(r"font-family: [^;]*;? ?", "", element.attrib["style"]))
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img"}
    root.set("aria-label", title)
    label = ElementTree.Element("title")
    label.text = title
    root.insert(0, label)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    return Markup(text)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def image_png(pixels: NDArray[np.uint8]) -> str:
    """Pixels ``[H, W]`` or ``[H, W, C]`` as the URI of a PNG, reduced if they are large."""
    if max(pixels.shape[:2]) > _LARGEST_PNG:
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels)
        image.thumbnail((_LARGEST_PNG, _LARGEST_PNG), Image.Resampling.BOX)
        pixels = np.asarray(image)
    return png_uri(pixels)


def filter_png(kernel: NDArray[np.float32]) -> str:
    """A kernel ``[h, w, C]``: 0 is mid grey, and the largest magnitude is black or white."""
    scale = max(float(np.abs(kernel).max()), 1e-12)
    return image_png((127.5 * (1 + kernel / scale)).round().astype(np.uint8))


def map_png(values: NDArray[np.float32], largest: float) -> str:
    """A feature map ``[H, W]``: 0 or less is black, ``largest`` is white."""
    return image_png((255 * values / max(largest, 1e-12)).clip(0, 255).round().astype(np.uint8))


def confusion_png(shares: NDArray[np.float64]) -> str:
    """The confusion matrix as fractions 0..1 of each true class (rows): 0 is white, 1 is black."""
    # In full size: reduced, the diagonal of many classes would fade.
    return png_uri((255 * (1 - shares)).round().astype(np.uint8))
