"""Train a network: ``python -m cifar_jax.train``, or :func:`train_and_evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_jax import __version__, cli
from cifar_jax.checkpoints.workdir import checkpoints_of, is_converted, saved_steps, step_folder
from cifar_jax.config import (
    OF_THIS_START,
    PRESETS,
    TrainConfig,
    check_preset,
    check_resumable,
    from_json,
)
from cifar_jax.errors import CheckpointError, ResourceError, UsageError
from cifar_jax.system.allocator import keep_freed_memory
from cifar_jax.system.lock import locked
from cifar_jax.system.stop_signals import signals_held

DESCRIPTION = """\
Train a network on CIFAR-10, or on a folder of images of your own, and score it on the test set.

Without options it trains the tutorial's convolutional network for 10 epochs: on CIFAR-10 if that is
prepared or can be downloaded, else on 'shapes', generated figures. An interrupted run loses
nothing: --resume --workdir DIR continues to the same result, bit for bit on a CPU.

examples:
  python -m cifar_jax.train --data cifar10
  python -m cifar_jax.train --data photos/ --model cnn-gap --image-size 64 --epochs 30
  python -m cifar_jax.train --preset tutorial --model cnn-wide --seed 1
  python -m cifar_jax.train --resume --workdir runs/20261122-101500-cnn
"""

_PUT_CONFIG_BACK = (
    "put it back: it is the 'config' in checkpoints/<step>/metadata/metadata; or give another "
    "--workdir"
)


def train_and_evaluate(config: TrainConfig, workdir: str | Path) -> dict[str, Any]:
    """Train, save the run to ``workdir``, and score its best epoch on the test set, once.

    With ``config.resume`` the run in ``workdir`` continues from its newest checkpoint.

    Returns:
        The contents of ``workdir/report.json``.

    Raises:
        CifarJaxError: something that the user can fix: options, data, checkpoints, divergence.
        Stopped: SIGINT or SIGTERM during training or the test; the run is saved and can be resumed.
    """
    check_preset(config)
    workdir = Path(workdir)
    report = _finished(config, workdir)
    if report is not None:
        return report
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ResourceError(
            "--tensorboard needs the package tensorboardX",
            fix="pip install tensorboardX, or leave --tensorboard out: metrics.jsonl has the same",
        )
    if config.initial_weights is not None and not saved_steps(checkpoints_of(workdir)):
        step_folder(Path(config.initial_weights))  # fail early: it is read after the slow imports
    with contextlib.ExitStack() as run:
        if config.coordinator is None:
            run.enter_context(locked(workdir))
        # Late imports, so that wrong options are reported before NumPy, JAX and TensorFlow start.
        from cifar_jax.data.sources import check_source

        check_source(config.data, config.image_size)
        _prepare_runtime(config)
        with signals_held():  # an exception during JAX's import can abort the process
            from cifar_jax.training.distributed import is_first, joined
            from cifar_jax.training.loop import train_and_test

        run.enter_context(joined(config, workdir))
        if config.coordinator is not None and is_first():
            run.enter_context(locked(workdir))
        return train_and_test(config, workdir)


def _finished(config: TrainConfig, workdir: Path) -> dict[str, Any] | None:
    """The report of the run in ``workdir`` if it is complete; None if there is more to do.

    Raises:
        UsageError: ``workdir`` contains another run, or files that a run would overwrite.
        CheckpointError: ``workdir`` contains a damaged run.
    """
    saved = _saved_config(workdir)
    if saved is not None:
        if not config.resume:
            raise UsageError(
                f"--workdir {workdir} contains another run",
                fix="add --resume to continue it, or give another --workdir",
            )
        if is_converted(workdir):
            raise CheckpointError(
                f"--resume: --workdir {workdir} has a converted network, not a run",
                fix=f"start a run from it: --initial-weights {workdir} and another --workdir",
            )
        check_resumable(config, saved)
        report = _saved_report(workdir)
        if report is not None and config.epochs == saved.epochs:
            print(f"already complete: {report['steps']} steps; see {workdir / 'report.json'}")
            return report
    elif saved_steps(checkpoints_of(workdir)):
        raise CheckpointError(
            f"--workdir {workdir} has the checkpoints of a run, but not its config.json",
            fix=_PUT_CONFIG_BACK,
        )
    elif strangers := [path for path in _overwritten(workdir) if path.exists()]:
        raise UsageError(
            f"--workdir {workdir} has no run, but has {strangers[0]}, which a run would overwrite",
            fix="give another --workdir, such as a new folder",
        )
    return None


def _prepare_runtime(config: TrainConfig) -> None:
    """Configure memory, and print what is starting, before JAX and TensorFlow are imported."""
    keep_freed_memory()
    started = "JAX" if config.input == "device" else "JAX and TensorFlow"
    print(f"cifar_jax {__version__}: starting {started} ...", flush=True)


def _overwritten(workdir: Path) -> list[Path]:
    """Files that a run would delete or overwrite; a run's own folder has a config.json too."""
    names = ("report.json", "metrics.jsonl", "plots/curves.png", "tensorboard")
    return [workdir / name for name in names]


def _saved_config(workdir: Path) -> TrainConfig | None:
    path = workdir / "config.json"
    try:
        return from_json(json.loads(path.read_text()), where=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RecursionError, ValueError, TypeError) as error:
        has_checkpoints = bool(saved_steps(checkpoints_of(workdir)))
        raise UsageError(
            f"cannot read {path}: {error}",
            fix=_PUT_CONFIG_BACK if has_checkpoints else "give another --workdir",
        ) from error


def _saved_report(workdir: Path) -> dict[str, Any] | None:
    """The run's report; None if it is missing or cannot be read, and so must be made again."""
    try:
        report = json.loads((workdir / "report.json").read_text())
    except (OSError, RecursionError, ValueError):
        return None
    return report if isinstance(report, dict) and "steps" in report else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(TrainConfig, prog="python -m cifar_jax.train", description=DESCRIPTION)
    parser.add_argument(
        "--workdir",
        type=os.path.expanduser,
        metavar="DIR",
        help="the run's folder: config, metrics, checkpoints, plots, report "
        "[default runs/DATE-TIME-MODEL]",
    )
    given = parser.parse_given(argv)
    workdir = given.pop("workdir", None)
    if given.get("resume") and workdir is None:
        raise UsageError(
            "--resume without --workdir",
            fix="give the run's folder: --workdir runs/DATE-TIME-MODEL",
        )
    if given.get("coordinator") and workdir is None:
        raise UsageError(
            "--coordinator without --workdir",
            fix="give all processes the same one, which all of them can read and write",
        )
    # With --resume, options that are not given again keep their values.
    base = _saved_config(Path(workdir)) if given.get("resume") else None
    if base is None and given.get("resume") and given.keys() <= OF_THIS_START:
        raise UsageError(
            f"--resume: there is no run in --workdir {workdir}",
            fix="give the folder of a run; or, to start one there, its options too",
        )
    preset = PRESETS[given.get("preset", "default")]
    config = dataclasses.replace(base or preset, **given)
    # Not checked in TrainConfig: presets set a momentum, and may be given another optimizer.
    if "momentum" in given and config.optimizer in ("adam", "adamw"):
        raise UsageError(
            f"--momentum with --optimizer {config.optimizer}, which has none to set",
            fix="drop it, or give --optimizer sgd",
        )
    train_and_evaluate(config, workdir or _new_workdir(config))


def _new_workdir(config: TrainConfig) -> Path:
    """A folder that does not exist yet, named after the time and the model."""
    name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{config.model}"
    workdir, n = Path("runs") / name, 1
    while workdir.exists():
        n += 1
        workdir = Path("runs") / f"{name}-{n}"
    return workdir


if __name__ == "__main__":
    cli.run(main)
