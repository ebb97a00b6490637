"""The figure: how long a step takes, by network and program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.steps import program_name


def draw(results: dict[str, Any], path: Path) -> None:
    """Training steps and inference, each relative to this project's, as one PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, pass_, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("train", "forward"),
        ("a training step", "an inference"),
        strict=True,
    ):
        rows = [row for row in results["programs"] if row["pass"] == pass_]
        models = list(dict.fromkeys(row["model"] for row in rows))
        programs = list(dict.fromkeys(program_name(row) for row in rows))
        ours = {r["model"]: r["step_ms_median"] for r in rows if r["framework"] == "cifar_jax"}
        height = 0.8 / len(programs)
        for i, program in enumerate(programs):
            chosen = [row for row in rows if program_name(row) == program]
            places = np.array([models.index(row["model"]) for row in chosen]) + i * height
            scale = np.array([ours[row["model"]] for row in chosen])
            low, middle, high = (
                np.array([row[f"step_ms_{name}"] for row in chosen]) / scale
                for name in ("min", "median", "max")
            )
            axes.barh(places, middle, height, xerr=[middle - low, high - middle], label=program)
        axes.set_yticks(np.arange(len(models)) + 0.4 - height / 2, models)
        for k, model in enumerate(models):
            axes.text(1.02, k - 0.45 * height, f"{ours[model]:.0f} ms", fontsize=8, va="center")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="time, this project's = 1", title=f"{title} of 128 images")
        axes.grid(alpha=0.3, axis="x")
    figure.axes[0].invert_yaxis()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{results['machine']}, {results['date']}")
    figure.savefig(path, dpi=110)
