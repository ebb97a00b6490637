"""Render a report as HTML. All names are untrusted: the templates escape them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cifar_jax.config import to_json
from cifar_jax.options import flag
from cifar_jax.report import figures
from cifar_jax.report.page import Comparison, RunPage, Summary, images_with_maps
from cifar_jax.scoring.scores import Scores

_MOST_CLASSES_IN_A_TABLE = 20  # of the confusion matrix; more are a picture
_NBSP = "\N{NO-BREAK SPACE}"
_UNKNOWN = "\N{EN DASH}"


def render_run(page: RunPage) -> str:
    """The HTML of one run."""
    run = page.summary.run
    curves = None
    if run.history:
        curves = {
            "loss": figures.loss_curves(run.history, run.best),
            "accuracy": figures.accuracy_curves(run.history, run.best),
            "gap": figures.gap_curve(run.history, run.best),
            "rate": figures.learning_rate_curve(run.history, run.best),
        }
    scored = page.scored
    return _template("run.html").render(
        page=page,
        run=run,
        glance=_glance(page.summary),
        curves=curves,
        scored=scored,
        classes=_class_rows(page.class_names, scored.scores) if scored else [],
        confusion=_confusion(scored.scores) if scored else None,
        pictured=images_with_maps(scored.samples) if scored else [],
        layers=[
            (
                layer,
                [
                    [figures.map_png(m, image.max()) for m in np.moveaxis(image, -1, 0)]
                    for image in layer.maps
                ],
            )
            for layer in page.feature_maps
        ],
        options=_options(to_json(run.config)),
    )


def render_comparison(comparison: Comparison) -> str:
    """The HTML of several runs side by side."""
    histories = [summary.run.history for summary in comparison.summaries]
    return _template("comparison.html").render(
        comparison=comparison,
        runs=list(zip(comparison.names, comparison.summaries, strict=True)),
        accuracy=figures.compared_curves(histories, "val_accuracy"),
        loss=figures.compared_curves(histories, "val_loss"),
        has_curves=any(histories),
        options={
            flag(option): [_value(value) for value in values]
            for option, values in comparison.differing.items()
        },
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        duration=duration,
        count=count,
        image_png=figures.image_png,
        filter_png=figures.filter_png,
    )
    environment.globals["line_key"] = figures.line_key
    return environment.get_template(name)


def percent(share: float | None, digits: int = 2) -> str:
    """0.7724 -> "77.24 %"."""
    return _UNKNOWN if share is None else f"{100 * share:.{digits}f}{_NBSP}%"


def count(number: float | None) -> str:
    """45000 -> "45,000"."""
    return _UNKNOWN if number is None else f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """189.4 -> "3 min 9 s"."""
    if seconds is None:
        return _UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f}{_NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min {rest}{_NBSP}s"
    return f"{minutes // 60}{_NBSP}h {minutes % 60}{_NBSP}min"


def _glance(summary: Summary) -> list[tuple[str, str, Any, str]]:
    """Key, label, exact value and displayed text of each figure; unknown ones are left out."""
    config, report = summary.run.config, summary.run.report or {}
    epochs = f"{summary.epochs} of {config.epochs}"
    speed = None if summary.images_per_second is None else count(summary.images_per_second)
    loss = None if summary.test_loss is None else f"{summary.test_loss:.4f}"
    rows = [
        ("model", "model", config.model, config.model),
        ("data", "data", summary.data, summary.data),
        ("n_params", "parameters", summary.n_params, count(summary.n_params)),
        ("n_train", "training images", report.get("n_train"), count(report.get("n_train"))),
        ("n_val", "validation images", report.get("n_val"), count(report.get("n_val"))),
        ("n_test", "test images", report.get("n_test"), count(report.get("n_test"))),
        ("best_epoch", "best epoch", summary.best_epoch, str(summary.best_epoch)),
        ("test_loss", "test loss, nats", summary.test_loss, loss),
        ("epochs", "epochs", summary.epochs, epochs),
        ("steps", "steps", summary.steps, count(summary.steps)),
        ("train_seconds", "training time", summary.seconds, duration(summary.seconds)),
        ("images_per_second", "images/s in training", summary.images_per_second, speed),
        ("devices", "devices", summary.devices, summary.devices),
        ("seed", "seed", config.seed, str(config.seed)),
    ]
    return [(key, label, value, str(text)) for key, label, value, text in rows if value is not None]


def _class_rows(names: tuple[str, ...], scores: Scores) -> list[dict[str, Any]]:
    """A row per class: its scores, and the class it is most often mistaken for."""
    rows = []
    for k, name in enumerate(names):
        other = scores.taken_for(k)
        rows.append(
            {
                "name": name,
                "n": int(scores.confusion[k].sum()),
                "precision": scores.precision[k],
                "recall": scores.recall[k],
                "taken_for": f"{names[other[0]]} ({other[1]:,})" if other else _UNKNOWN,
            }
        )
    return rows


def _confusion(scores: Scores) -> dict[str, Any]:
    """Rows of (count, depth of the colour 0..1), or a picture if there are many classes."""
    confusion = scores.confusion
    if len(confusion) > _MOST_CLASSES_IN_A_TABLE:
        return {"rows": None, "picture": figures.confusion_png(scores.shares)}
    # The square root, so that a few per cent are visible.
    depths = np.sqrt(scores.shares)
    return {
        "rows": [
            list(zip(counts, row, strict=True))
            for counts, row in zip(confusion.tolist(), depths.tolist(), strict=True)
        ],
        "picture": None,
    }


def _options(config: dict[str, Any]) -> dict[str, str]:
    return {flag(name): _value(value) for name, value in config.items()}


def _value(value: Any) -> str:
    """An option's value as on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or _UNKNOWN
    return _UNKNOWN if value is None else str(value)
