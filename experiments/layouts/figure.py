"""The figure of the study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter


def draw(results: dict[str, Any], path: Path) -> None:
    """Step times, curves, and the drift in float32 and float64, as one PNG."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (steps_axes, curves_axes), (drift_axes, float64_axes) = figure.subplots(2, 2)
    _draw_steps(steps_axes, results["timings"])
    _draw_curves(curves_axes, results["training"])
    _draw_drift(drift_axes, results["models"], "float32")
    if results["quick"]:
        float64_axes.set_axis_off()
    else:
        float64 = {name: row["float64"] for name, row in results["models"].items()}
        _draw_drift(float64_axes, float64, "float64")
    figure.suptitle(f"NHWC and NCHW, JAX and PyTorch ({results['machine']}, {results['date']})")
    figure.savefig(path, dpi=110)


def _draw_steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["pass"] == "train"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    programs = list(dict.fromkeys((r["framework"], r["layout"], r["mode"]) for r in rows))
    height = 0.8 / len(programs)
    for i, program in enumerate(programs):
        chosen = [r for r in rows if (r["framework"], r["layout"], r["mode"]) == program]
        medians = [row["step_ms_median"] for row in chosen]
        below = [row["step_ms_median"] - row["step_ms_min"] for row in chosen]
        above = [row["step_ms_max"] - row["step_ms_median"] for row in chosen]
        places = np.arange(len(models)) + i * height
        label = " ".join(program).replace(" compiled", "") if program[0] == "jax" else None
        # Points: on a logarithmic axis the length of a bar means nothing.
        axes.errorbar(
            medians,
            places,
            xerr=[below, above],
            fmt="o",
            capsize=2,
            label=label or " ".join(program),
        )
    sizes = {row["model"]: row["batch_size"] for row in rows}
    names = [f"{model}\n{sizes[model]} images" for model in models]
    axes.set_yticks(np.arange(len(models)) + 0.4 - height / 2, names)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title="a training step")
    if len(models) > 1:  # a single one is read from zero
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _draw_curves(axes: Axes, training: dict[str, Any]) -> None:
    for weights, colour in (("flax", "#1f77b4"), ("torch", "#d62728")):
        if (run := training.get(f"{weights}_initial_weights")) is None:  # if quick
            continue
        curves = run["val_accuracy"]
        for framework, style in (("jax", "-"), ("torch", "--")):
            accuracies = [100 * accuracy for accuracy in curves[framework]]
            axes.plot(
                range(1, len(accuracies) + 1),
                accuracies,
                style,
                color=colour,
                label=f"{framework}, from {weights}'s initial weights",
            )
    axes.set(
        xlabel="epoch",
        ylabel="validation accuracy, %",
        title=f"the same run in both, on {training['data']}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_drift(axes: Axes, rows: dict[str, Any], dtype: str) -> None:
    for name, row in rows.items():
        axes.plot(*row["param_difference"].values(), "o-", markersize=3, label=name)
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="distance / distance travelled",
        title=f"parameters, JAX from PyTorch, {dtype}",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
