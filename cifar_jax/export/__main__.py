"""Trained networks as files for other programs: ``python -m cifar_jax.export``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_jax import cli
from cifar_jax.checkpoints.workdir import step_folder, workdir_of
from cifar_jax.config import ExportFormat
from cifar_jax.errors import CifarJaxError, NumericsError, ResourceError, UsageError
from cifar_jax.options import CHECKPOINT_HELP, REQUIRED, Options, option
from cifar_jax.system.files import check_is_new, new_path

if TYPE_CHECKING:  # slow to import: wrong options are reported before
    import numpy as np
    from numpy.typing import NDArray

    from cifar_jax.checkpoints.trained import TrainedNetwork
    from cifar_jax.export.formats import Classify

DESCRIPTION = """\
Write a trained network as one file for other programs, and verify it: the file is loaded back and
must give the checkpoint's probabilities to 1e-5, at batch sizes 1, 7 and 128; otherwise it is
deleted.

  stablehlo    the whole classifier for JAX without this package, on CPU and NVIDIA GPU: images
               uint8 [N, H, W, C] in, probabilities float32 [N, K] out, any N. JAX promises to load
               it up to 6 months later, and 3 weeks earlier, than the version that wrote it.
  onnx         the same classifier for ONNX Runtime and others; its metadata has the class names.
               Needs `pip install torch==2.13.0 onnx onnxruntime onnxscript`.
  safetensors  the bare weights, as PyTorch's state_dict, with mean, std and class names as
               metadata: the format that cifar_jax.convert writes and reads.
  pth          the bare weights as a state_dict. Needs `pip install torch==2.13.0`.

examples:
  python -m cifar_jax.export --checkpoint runs/20261122-101500-cnn --format onnx
  python -m cifar_jax.export --checkpoint runs/from-torch --format stablehlo --data cifar10.tar.gz
"""

TOLERANCE = 1e-5
_BATCH_SIZES = (1, 7, 128)
_MAX_IMAGES = 1000


@dataclasses.dataclass(frozen=True)
class ExportOptions(Options):
    """Which network to export, as what, and the images to check it on."""

    checkpoint: str = option(REQUIRED, CHECKPOINT_HELP)
    format: ExportFormat = option(REQUIRED, "the kind of file")
    output: str | None = option(
        None,
        "the new file [default the workdir's name with the format's ending, in this folder]",
    )
    data: str | None = option(
        None,
        "data whose test images to check on, as in cifar_jax.train [default the training data if "
        "it is on this machine, else 'shapes']",
    )
    data_dir: str | None = option(
        None, "where it is prepared or extracted [default that of training]"
    )


def export_network(
    checkpoint: Path,
    format: ExportFormat,
    output: Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
) -> float:
    """Write the network in ``checkpoint`` as ``output``, which must end in ``.{format}``.

    Prints each stage, and how to load the file.

    Args:
        data, data_dir: data whose test images to compare on, as in :class:`ExportOptions`.

    Returns:
        The largest difference between the probabilities of the file and of the checkpoint.

    Raises:
        UsageError: ``output`` exists, or has another ending.
        CheckpointError: there is none.
        ResourceError: packages are missing, or ``output`` cannot be written.
        DataError: ``data`` cannot be read.
        NumericsError: the file's probabilities differ from the checkpoint's.
    """
    if output.suffix != f".{format}":
        raise UsageError(
            f"--output {output} does not end in .{format}",
            fix=f"use the ending .{format}",
        )
    check_is_new(output, "--output")
    step = step_folder(checkpoint)  # fail early, before the slow imports of trained.load
    _check_installed(format)
    from cifar_jax.checkpoints import trained
    from cifar_jax.export.formats import FORMATS, classify_here, how_to_use

    print(f"reading the checkpoint {step}", flush=True)
    network = trained.load(step)
    shape = "x".join(map(str, network.image_shape))
    print(
        f"exporting {network.config.model}, {network.n_params:,} parameters, "
        f"{len(network.class_names)} classes, images of {shape}",
        flush=True,
    )
    images, their_name = _images_to_check_on(network, data, data_dir)
    expected = classify_here(network)(images)
    write, read = FORMATS[format]
    with new_path(output, "--output") as path:
        print(f"writing {format}", flush=True)
        write(network, path)
        size = path.stat().st_size
        print(f"checking the {size:,} bytes written on {len(images):,} {their_name}", flush=True)
        difference = _largest_difference(read(network, path), images, expected)
        if not difference <= TOLERANCE:  # so that NaN fails too
            raise NumericsError(
                f"the {format} file gave probabilities up to {difference:.1g} from the "
                f"checkpoint's, more than {TOLERANCE:g}, and was removed",
                fix="export another --format, and report this with the output of pip freeze",
            )
    print(
        f"checked on {len(images):,} {their_name} at batch sizes "
        f"{', '.join(map(str, _BATCH_SIZES))}: largest difference {difference:.1g}\n"
        f"wrote {output}; to use it:\n\n{how_to_use(network, format, output)}\n\n"
        f"classes in order: {', '.join(network.class_names)}"
    )
    return difference


def _check_installed(format: ExportFormat) -> None:
    try:
        if format in ("onnx", "pth"):
            importlib.import_module("cifar_jax.torch_reference")
        if format == "onnx":
            for name in ("onnx", "onnxruntime", "onnxscript"):
                importlib.import_module(name)
    except ImportError as error:
        others = " onnx onnxruntime onnxscript" if format == "onnx" else ""
        raise ResourceError(
            f"--format {format} needs packages that are not all installed: {error}",
            fix=f"pip install torch==2.13.0{others}",
        ) from error


def _images_to_check_on(
    network: TrainedNetwork, data: str | None, data_dir: str | None
) -> tuple[NDArray[np.uint8], str]:
    """At most 1,000 test images, stratified by class, and what to call them."""
    import numpy as np

    from cifar_jax.data import shapes
    from cifar_jax.data.dataset import stratified_choice
    from cifar_jax.data.sources import is_here
    from cifar_jax.scoring.labelled import load_labelled

    config = network.config
    if data or (config.data != "shapes" and is_here(config.data, data_dir or config.data_dir)):
        try:
            print(f"reading test images of {data or config.data}", flush=True)
            labelled = load_labelled(
                network, "test", data=data, data_dir=data_dir, may_be_trained_on=True
            )
            chosen = stratified_choice(labelled.split.labels, _MAX_IMAGES, np.random.default_rng(0))
            return labelled.pixels(chosen), f"test images of {labelled.name}"
        except CifarJaxError as error:
            if data:
                raise
            print(f"checking on images of 'shapes' instead: {error}")
    drawn, _ = shapes.draw(_MAX_IMAGES, seed=1)  # the first of the test images of 'shapes'
    nearest = (
        np.arange(wanted) * found // wanted
        for wanted, found in zip(network.image_shape, drawn.shape[1:], strict=True)
    )
    return drawn[np.ix_(np.arange(len(drawn)), *nearest)], "test images of shapes"


def _largest_difference(
    classify: Classify, images: NDArray[np.uint8], expected: NDArray[Any]
) -> float:
    """The largest difference from ``expected`` ``[N, K]``, over all images at each batch size."""
    import numpy as np
    from tqdm import tqdm

    differences = []
    for size in _BATCH_SIZES:
        starts = range(0, len(images), size)
        for start in tqdm(starts, f"batches of {size}", leave=False, disable=None):
            batch = np.arange(start, start + size) % len(images)  # the last is filled up
            answers = np.asarray(classify(images[batch]))
            assert answers.shape == (size, expected.shape[1]), answers.shape
            differences.append(np.abs(answers - expected[batch]).max())
    return float(np.max(differences))


def _default_output(checkpoint: Path, format: ExportFormat) -> Path:
    """A file in the current folder, named after the run."""
    return Path(f"{workdir_of(checkpoint).resolve().name}.{format}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        ExportOptions, prog="python -m cifar_jax.export", description=DESCRIPTION
    )
    options = ExportOptions(**parser.parse_given(argv))
    checkpoint = Path(options.checkpoint)
    output = Path(options.output or _default_output(checkpoint, options.format))
    export_network(checkpoint, options.format, output, data=options.data, data_dir=options.data_dir)


if __name__ == "__main__":
    cli.run(main, beside_training=True)
