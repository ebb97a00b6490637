"""Score a trained network on labelled images: ``python -m cifar_jax.evaluate``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_jax import cli
from cifar_jax.checkpoints.workdir import step_folder, workdir_of
from cifar_jax.config import SplitName
from cifar_jax.options import CHECKPOINT_HELP, REQUIRED, Options, option
from cifar_jax.system.files import write_atomically, writing

if TYPE_CHECKING:  # slow to import: wrong options are reported before
    from cifar_jax.scoring.scores import Scores

DESCRIPTION = """\
Score a trained network on labelled images: loss, accuracy with its 95 % interval, precision and
recall of each class, the confusion matrix, how well its confidence is calibrated, and its most
confident mistakes. Writes evaluation.json (evaluation-val.json for --split val, and so on) and
pictures.

The test split is for the end: choose networks and options by --split val.

examples:
  python -m cifar_jax.evaluate --checkpoint runs/20261122-101500-cnn
  python -m cifar_jax.evaluate --checkpoint runs/20261122-101500-cnn --split val
  python -m cifar_jax.evaluate --checkpoint runs/from-torch --data cifar10.tar.gz --output scores
"""

_MISTAKES = 24


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(Options):
    """Which network to score, and on which images."""

    checkpoint: str = option(REQUIRED, CHECKPOINT_HELP)
    data: str | None = option(
        None, "images, as in cifar_jax.train [default: what it was trained on]"
    )
    data_dir: str | None = option(None, "as in cifar_jax.train")
    split: SplitName = option("test", "which of the images")
    output: str | None = option(None, "the folder to write to [default: the run's own]")


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Score a network, print its scores, and write them and pictures to the output folder.

    Returns:
        The contents of ``evaluation.json`` (of another split, ``evaluation-val.json`` and so on).

    Raises:
        CheckpointError: there is no such network.
        DataError: the images cannot be read.
        ResourceError: the output folder cannot be written.
    """
    checkpoint = Path(options.checkpoint)
    step = step_folder(checkpoint)  # fail early, before the slow imports of trained.load
    output = Path(options.output or workdir_of(checkpoint))
    from cifar_jax.checkpoints import trained
    from cifar_jax.scoring.labelled import load_labelled, logits_of
    from cifar_jax.scoring.plots import save_calibration, save_confusion, save_mistakes
    from cifar_jax.scoring.scores import score

    network = trained.load(step)
    print(f"the network of {step}")
    print(f"reading {options.data or network.config.data} ...", flush=True)
    labelled = load_labelled(network, options.split, data=options.data, data_dir=options.data_dir)
    if labelled.notice:
        print(f"note: {' '.join(labelled.notice.split())}")
    print(f"scoring {len(labelled):,} {options.split} images of {labelled.name} ...", flush=True)
    labels = labelled.split.labels
    scores = score(logits_of(network, labelled), labels)
    chosen = scores.mistakes(labels, _MISTAKES)
    names = network.class_names
    mistakes = [
        {
            "file": labelled.file_name(index),
            "class": names[labels[index]],
            "predicted": names[scores.predicted[index]],
            "confidence": float(scores.confidence[index]),
        }
        for index in chosen
    ]
    evaluation = {
        "checkpoint": str(checkpoint),
        "data": {"name": labelled.name, "digest": labelled.digest},
        "split": options.split,
        "n": scores.n,
        "correct": scores.correct,
        "accuracy": scores.accuracy,
        "accuracy_interval": scores.accuracy_interval,
        "loss": scores.loss,
        "calibration_error": scores.calibration_error,
        "classes": names,
        "confusion": scores.confusion.tolist(),
        "precision": dict(zip(names, scores.precision, strict=True)),
        "recall": dict(zip(names, scores.recall, strict=True)),
        "calibration": scores.calibration,
        "mistakes": mistakes,
    }
    title = f"{network.config.model} on {options.split} of {labelled.name}"
    suffix = "" if options.split == "test" else f"-{options.split}"
    written = [f"evaluation{suffix}.json"]
    written += [f"plots/{name}{suffix}.png" for name in ("confusion", "calibration", "mistakes")]
    table, confusion, calibration, worst = (output / name for name in written)
    print(f"{options.split} of {labelled.name}: {describe(scores, names)}", flush=True)
    with writing(f"to {output}", "another --output"):
        confusion.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(table, json.dumps(evaluation, indent=1) + "\n")
        save_confusion(scores, names, title, confusion)
        save_calibration(scores, title, calibration)
        save_mistakes(labelled.pixels(chosen), mistakes, title, worst)
    print(f"in {output}: {', '.join(written)}")
    return evaluation


def describe(scores: Scores, class_names: Sequence[str]) -> str:
    """``scores`` for a terminal: totals, and a row per class."""
    low, high = scores.accuracy_interval
    lines = [
        f"accuracy {100 * scores.accuracy:.2f} % ({scores.correct} of {scores.n}; 95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f}), loss {scores.loss:.4f}, expected calibration error "
        f"{100 * scores.calibration_error:.1f} %",
        "",
        f"{'class':16s} {'images':>7s} {'precision':>10s} {'recall':>8s}   most often taken for",
    ]
    for k, name in enumerate(class_names):
        precision, recall = (
            "-" if share is None else f"{100 * share:.1f} %"
            for share in (scores.precision[k], scores.recall[k])
        )
        other = scores.taken_for(k)
        confused = f"{class_names[other[0]]} ({other[1]})" if other else ""
        n = scores.confusion[k].sum()
        lines.append(f"{name:16s} {n:7d} {precision:>10s} {recall:>8s}   {confused}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        EvaluateOptions, prog="python -m cifar_jax.evaluate", description=DESCRIPTION
    )
    evaluate(EvaluateOptions(**parser.parse_given(argv)))


if __name__ == "__main__":
    cli.run(main, beside_training=True)
