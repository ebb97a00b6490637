"""Classify images with a trained network: ``python -m cifar_jax.predict``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_jax import cli
from cifar_jax.checkpoints.workdir import step_folder
from cifar_jax.config import FitName
from cifar_jax.errors import CifarJaxError, DataError, shown
from cifar_jax.options import CHECKPOINT_HELP, REQUIRED, Options, option

if TYPE_CHECKING:  # slow to import: wrong options are reported before
    from cifar_jax.checkpoints.trained import TrainedNetwork
    from cifar_jax.scoring.inference import Logits

DESCRIPTION = """\
Classify images with a trained network: the probability of each class.

IMAGE is a file of any format and mode that Pillow reads, a folder (all images below it), or - for
an image on standard input. Each is rotated as its EXIF says, resized to the network's size, and
otherwise read as in training: without transparency, 8 bits per channel. A file that is not an image
is reported, and the others are classified; the exit code is then 3.

examples:
  python -m cifar_jax.predict --checkpoint runs/20261122-101500-cnn frog.jpg holiday/
  python -m cifar_jax.predict --checkpoint runs/20261122-101500-cnn --json - < frog.jpg
"""

BATCH_SIZE = 32  # images decoded before the first answer
_STDIN = "-"


@dataclasses.dataclass(frozen=True)
class PredictOptions(Options):
    """Which network to use, and how to show its predictions."""

    checkpoint: str = option(REQUIRED, CHECKPOINT_HELP)
    top: int = option(3, "show this many classes", at_least=1)
    json: bool = option(
        False,
        "one JSON object a line: file, class, probability, probabilities; or file, error",
    )
    fit: FitName = option(
        "stretch",
        "how to fit an image of other proportions: stretch it, as in training, or cut out its "
        "middle",
    )


def predict(
    network: TrainedNetwork, logits: Logits, files: Sequence[str], fit: FitName = "stretch"
) -> Iterator[dict[str, Any]]:
    """What ``--json`` prints for each image in ``files``, in order.

    Args:
        logits: of ``network``, from :func:`cifar_jax.scoring.inference.make_logits`.
        files: paths; ``-`` is standard input.

    Yields:
        ``file, class, probability, probabilities`` (name -> probability), or ``file, error``.
    """
    import numpy as np

    from cifar_jax.data.images import read_image
    from cifar_jax.scoring.inference import softmax

    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        images = np.zeros((len(batch), *network.image_shape), np.uint8)
        errors: dict[int, CifarJaxError] = {}
        for i, file in enumerate(batch):
            source = sys.stdin.buffer if file == _STDIN else Path(file)
            try:
                images[i] = read_image(source, file, network.image_shape, fit=fit)
            except CifarJaxError as error:
                errors[i] = error
        for i, (file, probabilities) in enumerate(zip(batch, softmax(logits(images)), strict=True)):
            if i in errors:
                yield {"file": file, "error": str(errors[i])}
                continue
            named = dict(zip(network.class_names, probabilities.tolist(), strict=True))
            best = max(named, key=named.__getitem__)
            yield {
                "file": file,
                "class": best,
                "probability": named[best],
                "probabilities": named,
            }


def find_images(names: Sequence[str]) -> list[str]:
    """The files that ``names`` stand for: for a folder, all images below it, sorted.

    Raises:
        DataError: a folder contains no image.
    """
    from cifar_jax.data.images import image_suffixes

    suffixes = image_suffixes()
    files: list[str] = []
    for name in names:
        path = Path(name)
        if name == _STDIN or not os.path.isdir(name):  # Path.is_dir raises without permission
            files.append(name)
            continue
        below = [
            found
            for found in sorted(path.rglob("*"))
            if found.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in found.relative_to(path).parts)
            and (found.is_file() or not found.exists())  # a broken link is to be reported
        ]
        if not below:
            raise DataError(f"the folder {name} holds no image", fix="give one that does")
        files += map(os.fspath, below)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        PredictOptions, prog="python -m cifar_jax.predict", description=DESCRIPTION
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a file, a folder, or -")
    given = parser.parse_given(argv)
    names = given.pop("images")
    options = PredictOptions(**given)
    step_folder(Path(options.checkpoint))  # fail early, before the slow imports of trained.load
    import numpy as np

    from cifar_jax.checkpoints import trained
    from cifar_jax.scoring.inference import make_logits

    files = find_images(names)
    network = trained.load(Path(options.checkpoint))
    logits = make_logits(network)
    for size in {min(len(files), BATCH_SIZE), len(files) % BATCH_SIZE}:  # compiles
        logits(np.zeros((size, *network.image_shape), np.uint8))
    started = time.perf_counter()
    n_refused = 0
    for answer in predict(network, logits, files, options.fit):
        n_refused += "error" in answer
        if options.json:
            print(json.dumps(answer), flush=True)
        elif "error" in answer:
            print(f"cifar_jax: {answer['error']}", file=sys.stderr)
        else:
            print(_describe(answer, options.top), flush=True)
    n_answered = len(files) - n_refused
    if n_answered and not options.json:
        milliseconds = 1000 * (time.perf_counter() - started) / n_answered
        print(f"{n_answered} image(s), {milliseconds:.1f} ms each, reading included")
    if n_refused:
        raise DataError(
            f"{n_refused} of {len(files)} image(s) could not be read",
            fix="repair or remove the files named above",
        )


def _describe(answer: dict[str, Any], top: int) -> str:
    ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:top]
    best = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in ranked)
    return f"{shown(answer['file'])}: {best}"


if __name__ == "__main__":
    cli.run(main, beside_training=True)
