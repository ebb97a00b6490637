"""The training run: data, model, resume, the loop over steps, the test, the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cifar_jax import __version__, checkpoint, trained
from cifar_jax.augment import check_augmentation, make_augmentation
from cifar_jax.config import TrainConfig, check_batch_divides, to_json
from cifar_jax.dataset import Dataset, ImageFiles, Split
from cifar_jax.distributed import (
    agreed_signal,
    check_agreement,
    is_first,
    wait_for_all,
)
from cifar_jax.errors import CifarJaxError, ExitCode, Stopped
from cifar_jax.events import event_log
from cifar_jax.files import write_atomically
from cifar_jax.initializers import whiten, whitening_stride
from cifar_jax.metrics import (
    TABLE_HEADER,
    EpochRow,
    RunningSums,
    best_row,
    epochs_without_progress,
    table_row,
)
from cifar_jax.models import create_model
from cifar_jax.optim import make_optimizer, make_schedule
from cifar_jax.parallel import (
    AXIS_NAME,
    Advance,
    Evaluate,
    select_devices,
    to_floats,
)
from cifar_jax.sources import load_dataset
from cifar_jax.stop_signals import StopSignals, signals_held
from cifar_jax.train_step import (
    Batch,
    Sums,
    TrainState,
    create_train_state,
    normalize,
    train_step,
)
from cifar_jax.workdir import checkpoints_of, saved_steps

# Steps that may be under way before the host waits for the oldest: enough to keep a device busy.
_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of, and does not change as it goes."""

    config: TrainConfig
    workdir: Path
    dataset: Dataset
    devices: Sequence[jax.Device]
    schedule: optax.Schedule
    advance: Advance
    evaluate: Evaluate

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset.train) // self.config.batch_size

    @property
    def checkpoints(self) -> Path:
        return checkpoints_of(self.workdir)


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint holds, and all that a resumed run needs.

    Attributes:
        state: the training state after ``state.step`` steps.
        history: a row for each epoch done.
        sums: training sums of the epoch under way.
        seconds: what the epoch under way has taken.
    """

    state: TrainState
    history: list[EpochRow] = dataclasses.field(default_factory=list)
    sums: RunningSums = dataclasses.field(default_factory=RunningSums)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return int(self.state.step)


def train_and_test(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Carry a run from its start, or its newest checkpoint, to its report.

    With several processes each does the same, on its share of the data, and the first one writes.
    """
    devices = select_devices(config.devices)
    check_batch_divides(config, len(devices))
    dataset = _load(config, devices)
    if dataset.notice:
        _print_banner(dataset.notice)
    if config.batch_size > len(dataset.train):
        raise CifarJaxError(
            ExitCode.USAGE,
            f"--batch-size {config.batch_size} is more than the {len(dataset.train)} images to "
            "train on",
            fix="give a smaller --batch-size",
        )
    check_augmentation(config, dataset.image_shape)
    total_steps = config.epochs * (len(dataset.train) // config.batch_size)
    schedule = make_schedule(config, total_steps)
    model = create_model(
        config,
        len(dataset.class_names),
        axis_name=AXIS_NAME if config.sync_batch_norm else None,
        dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None,
    )
    scored_model = create_model(config, len(dataset.class_names), None)
    tx = make_optimizer(config, schedule)
    # On the host: the compiled steps place it on the devices, and a checkpoint restores to it.
    with signals_held():
        state = jax.device_get(create_train_state(model, tx, dataset.image_shape, config.seed))
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"model: {config.model}, {n_params:,} parameters, on {len(devices)} "
        f"{devices[0].device_kind} device(s)\n"
        f"data: {dataset.name}, {len(dataset.train):,} training, {len(dataset.val):,} validation "
        f"and {len(dataset.test):,} test images of {'x'.join(map(str, dataset.image_shape))} in "
        f"{len(dataset.class_names)} classes\n"
        f"run: {config.epochs} epoch(s), {total_steps:,} steps of {config.batch_size} images, "
        f"{config.optimizer}, {config.schedule} learning rate {config.learning_rate:g}, "
        f"seed {config.seed}, in {workdir}"
    )

    progress, dataset = _start_or_resume(config, checkpoints_of(workdir), state, dataset)
    _agree(config, workdir, dataset, progress)
    print("compiling the steps ...", end=" ", flush=True)
    started = time.perf_counter()
    bound_step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        augment=make_augmentation(config, dataset.mean),
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        accumulate=config.accumulate,
        axis_name=AXIS_NAME,
    )
    if config.input == "device":
        from cifar_jax import device_input as images
    else:
        from cifar_jax import host_input as images  # type: ignore[no-redef]
    run = Run(
        config,
        workdir,
        dataset,
        devices,
        schedule,
        advance=images.make_advance(
            _with_signal(bound_step), state, dataset.train, config, devices, progress.step
        ),
        evaluate=images.make_evaluate(
            scored_model, dataset, state.variables, devices, config.batch_size
        ),
    )
    print(f"{time.perf_counter() - started:.1f} s")

    try:
        _train(run, progress)
    finally:
        if progress.history and is_first():
            _draw_curves(run, progress)
    try:
        return _test_and_report(run, progress, n_params)
    except (Stopped, KeyboardInterrupt) as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        raise _stopped(run, signum, "all training is saved, the test is not done") from None


def _load(config: TrainConfig, devices: Sequence[jax.Device]) -> Dataset:
    """The data, decoded as ``config.input`` wants it."""
    cache_mb = config.cache_mb
    if config.input == "device":
        from cifar_jax.device_input import check_fits, room_mb

        cache_mb = room_mb(devices)
    dataset = load_dataset(
        config.data,
        data_dir=config.data_dir,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        max_train_examples=config.max_train_examples,
        cache_mb=cache_mb,
        decode=_decoder(config),
        seed=config.seed,
    )
    if config.input == "device":
        check_fits(dataset, cache_mb)
    return dataset


def _decoder(config: TrainConfig) -> Callable[[Split], Split]:
    """From files to pixels, as ``config.input`` has them."""
    if config.input == "device":
        from cifar_jax.device_input import decode
    else:
        from cifar_jax.input_pipeline import decode
    return decode


def _whitened(state: TrainState, dataset: Dataset, decode: Callable[[Split], Split]) -> TrainState:
    """``state`` of airbench, whose first convolution whitens the training images."""
    train = dataset.train
    some = train.take(np.arange(0, len(train), whitening_stride(len(train))))
    if isinstance(some.images, ImageFiles):
        some = decode(some)

    @jax.jit
    def params_for(params: Any, pixels: jax.Array) -> Any:
        return whiten(params, normalize(pixels, dataset.mean, dataset.std))

    return state.replace(params=params_for(state.params, some.pixels))


def _agree(config: TrainConfig, workdir: Path, dataset: Dataset, progress: Progress) -> None:
    """See that all processes are about to do the same, and have the first begin the workdir."""
    settings = to_json(config)
    where = ("data", "data_dir")  # may be another place on another machine
    check_agreement(
        {
            "options": json.dumps({n: v for n, v in settings.items() if n not in where}, indent=2),
            "packages": json.dumps(_versions(), indent=2),
            "data": f"{dataset.name} {dataset.digest}",
            "checkpoint": f"step {progress.step}",
        }
    )
    if is_first():
        (workdir / "report.json").unlink(missing_ok=True)  # of fewer epochs, if there is one
        _write_config(config, workdir)
    wait_for_all("begun")
    if not (workdir / "config.json").exists():
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"--workdir {workdir} is not the folder that process 0 writes to",
            fix="give a --workdir on a disk that all processes share",
        )


def _write_config(config: TrainConfig, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")


def _with_signal(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step``, which also tells every process of a signal that came to any of them.

    In the batch each device has a ``signal``, 0 for none; the sums hold the largest.
    """

    def step_with_signal(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        signal = batch["signal"]
        rest = {name: x for name, x in batch.items() if name != "signal"}
        state, sums = step(state, rest)
        return state, {**sums, "signal": jax.lax.pmax(signal, AXIS_NAME)}

    return step_with_signal


def _start_or_resume(
    config: TrainConfig, checkpoints: Path, state: TrainState, dataset: Dataset
) -> tuple[Progress, Dataset]:
    """The progress of the newest checkpoint that can be read, or the start.

    And ``dataset`` with the normalisation of the run: the data's own, but for given weights.
    """
    if not is_first():
        wait_for_all("restored")  # the first one sets damaged checkpoints aside
    else:
        _tidy(checkpoints)
    saved, rejected = checkpoint.restore_newest(checkpoints, like=state)
    if is_first():
        wait_for_all("restored")
    for error in rejected:
        print(f"warning: {error}")
    if saved is None:
        if config.resume:
            print(f"no checkpoint in {checkpoints}: starting at step 0")
        return _begin(config, state, dataset)
    trained_on = saved.metadata["data"]
    if trained_on["digest"] == trained.UNKNOWN_DATA:
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"--resume: {saved.path} is of no training that could go on: {trained_on['name']}",
            fix=f"begin a run with it: --initial-weights {checkpoints.parent} and another "
            "--workdir",
        )
    if trained_on["digest"] != dataset.digest:
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"--resume: {saved.path} was trained on {trained_on['name']} with digest "
            f"{trained_on['digest'][:12]}, --data now gives {dataset.name} with "
            f"{dataset.digest[:12]}",
            fix="give the --data that the run began with, or start a new run in another --workdir",
        )
    done = len(saved.metadata["history"])
    if config.epochs < done:
        raise CifarJaxError(
            ExitCode.USAGE,
            f"--resume with --epochs {config.epochs}, of a run that has done {done}",
            fix=f"give --epochs {done} or more, or start a new run in another --workdir",
        )
    print(f"resumed at step {saved.state.step}, from {saved.path}")
    progress = Progress(
        saved.state,
        saved.metadata["history"],
        RunningSums(**saved.metadata["sums"]),
        saved.metadata["seconds"],
    )
    mean, std = (tuple(saved.metadata[name]) for name in ("mean", "std"))
    return progress, dataclasses.replace(dataset, mean=mean, std=std)


def _begin(config: TrainConfig, state: TrainState, dataset: Dataset) -> tuple[Progress, Dataset]:
    """Step 0: of ``state``, or of the weights that ``config`` names, with their normalisation."""
    if config.initial_weights is None:
        if config.model == "airbench":
            with signals_held():
                state = jax.device_get(_whitened(state, dataset, _decoder(config)))
        return Progress(state), dataset
    given = trained.load(Path(config.initial_weights))
    if given.class_names != dataset.class_names:
        raise CifarJaxError(
            ExitCode.USAGE,
            f"--initial-weights {config.initial_weights} is for {', '.join(given.class_names)}; "
            f"{dataset.name} has {', '.join(dataset.class_names)}",
            fix="give --data with the same classes",
        )
    if jax.tree.map(np.shape, given.variables) != jax.tree.map(np.shape, state.variables):
        shape = "x".join(map(str, given.image_shape))
        raise CifarJaxError(
            ExitCode.USAGE,
            f"--initial-weights {config.initial_weights} is {given.config.model} for {shape}, "
            f"{given.n_params:,} parameters; the run's network has other layers",
            fix=f"give --model {given.config.model} with its options, and images of its size",
        )
    print(f"with the weights of {config.initial_weights}, and its mean and std of each channel")
    progress = Progress(state.replace(**given.variables))  # the optimizers begin with zeros
    return progress, dataclasses.replace(dataset, mean=given.mean, std=given.std)


def _tidy(checkpoints: Path) -> None:
    """Remove what a kill left half done, and say what else is there."""
    for path in checkpoint.remove_unfinished(checkpoints):
        print(f"removed {path}: a save, or a deletion, that was cut short")
    if strangers := checkpoint.strangers(checkpoints):
        names = ", ".join(path.name for path in strangers[:5])
        print(f"warning: ignored in {checkpoints}: {names}, which are no checkpoints")


def _train(run: Run, progress: Progress) -> None:
    """Carry ``progress`` to the end of the last epoch, saving on the way.

    Raises:
        Stopped: a signal came; the run is saved, a few steps after.
    """
    config = run.config
    _write_history(run, progress)
    if len(progress.history) < config.epochs:
        print(TABLE_HEADER)
    events: contextlib.AbstractContextManager[Callable[[EpochRow], None]]
    events = contextlib.nullcontext(lambda row: None)
    if config.tensorboard and is_first():
        events = event_log(run.workdir / "tensorboard", progress.history)
    with StopSignals() as stop, events as add_event:
        while len(progress.history) < config.epochs:
            if 0 < config.early_stopping <= epochs_without_progress(progress.history):
                print(f"early stop: {config.early_stopping} epochs without a lower val loss")
                break
            signum = _train_epoch(run, progress, stop)
            if progress.step == (len(progress.history) + 1) * run.steps_per_epoch:
                _validate(run, progress)
                print(table_row(progress.history[-1]), flush=True)
                add_event(progress.history[-1])
            path = _save(run, progress)
            signum = signum or agreed_signal(stop.received)
            if signum is not None:
                raise _stopped(run, signum, f"step {progress.step} is saved in {path}")


def _stopped(run: Run, signum: int, what: str) -> Stopped:
    return Stopped(
        signum,
        f"{what}. Go on with: python -m cifar_jax.train --resume --workdir {run.workdir}",
    )


def _draw_curves(run: Run, progress: Progress) -> None:
    from cifar_jax.plots import save_curves  # half a second of matplotlib, which no step needs

    title = f"{run.config.model} on {run.dataset.name}"
    path = run.workdir / "plots" / "curves.png"
    try:
        save_curves(progress.history, title, path)
    except OSError as error:  # a full disk, say, of which the run itself has more to tell
        print(f"warning: cannot draw {path}: {error.strerror}")


def _train_epoch(run: Run, progress: Progress, stop: StopSignals) -> int | None:
    """Train to the end of the epoch, or to a step soon after a signal; returns the signal."""
    config = run.config
    save_every = config.checkpoint_every or run.steps_per_epoch
    step, signum = progress.step, 0
    first_step = len(progress.history) * run.steps_per_epoch
    last_step = first_step + run.steps_per_epoch
    in_flight: deque[tuple[int, Sums]] = deque()  # and how many steps are done with them

    def settle(at_most: int) -> None:
        nonlocal signum
        while len(in_flight) > at_most:
            done, sums = in_flight.popleft()
            signum = signum or int(np.max(np.asarray(sums.pop("signal"))))
            progress.sums.add(to_floats(sums))
            losses = np.atleast_1d(np.asarray(sums["loss"]))
            for at_step, loss in enumerate(losses, done - len(losses) + 1):
                if not math.isfinite(loss):
                    raise _diverged(
                        run,
                        f"the training loss is {loss} at step {at_step}, "
                        f"learning rate {run.schedule(at_step - 1):g}",
                    )

    before, started = progress.seconds, time.perf_counter()
    with tqdm(
        total=run.steps_per_epoch,
        initial=step - first_step,
        desc=f"epoch {len(progress.history) + 1}/{config.epochs}",
        unit="steps",
        leave=False,
        # Silent where there is no terminal, and in all processes but one.
        disable=None if is_first() else True,
    ) as bar:
        while step < last_step and not signum:
            next_save = min(last_step, step + save_every - (step - first_step) % save_every)
            progress.state, sums, done = run.advance(
                progress.state, step, next_save, stop.received or 0
            )
            step += done
            in_flight.append((step, sums))
            settle(_STEPS_IN_FLIGHT)
            bar.update(done)
            if step == next_save < last_step:
                settle(0)
                progress.seconds = before + time.perf_counter() - started
                _save(run, progress)
                before, started = progress.seconds, time.perf_counter()  # without the save
        settle(0)
    progress.seconds = before + time.perf_counter() - started
    return signum or None


def _validate(run: Run, progress: Progress) -> None:
    """End an epoch: a row for the history, and fresh sums."""
    started = time.perf_counter()
    val = run.evaluate(progress.state.variables, run.dataset.val)
    progress.history.append(
        EpochRow(
            epoch=len(progress.history) + 1,
            step=progress.step,
            train_loss=progress.sums.mean_loss,
            train_accuracy=progress.sums.accuracy,
            val_loss=val.mean_loss,
            val_accuracy=val.accuracy,
            learning_rate=float(run.schedule(progress.step - 1)),
            images_per_second=progress.sums.count / progress.seconds,
            seconds=progress.seconds + time.perf_counter() - started,
        )
    )
    progress.sums, progress.seconds = RunningSums(), 0.0
    if not math.isfinite(val.loss):
        raise _diverged(run, f"the validation loss is {val.loss} after step {progress.step}")


def _diverged(run: Run, what: str) -> CifarJaxError:
    saved = saved_steps(run.checkpoints)
    return CifarJaxError(
        ExitCode.NUMERICS,
        f"{what}; " + (f"step {saved[-1]} is saved" if saved else "nothing is saved yet"),
        fix="start again with a lower --learning-rate, or with --clip-norm 1",
    )


def _save(run: Run, progress: Progress) -> Path:
    state = jax.device_get(progress.state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        # The loss does not show it yet: it was computed before the update.
        raise _diverged(run, f"a parameter is not finite after step {progress.step}")
    metadata = {
        "config": to_json(run.config),
        "data": {"name": run.dataset.name, "digest": run.dataset.digest},
        "class_names": run.dataset.class_names,
        "image_shape": run.dataset.image_shape,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "history": progress.history,
        "sums": dataclasses.asdict(progress.sums),
        "seconds": progress.seconds,
        "versions": _versions(),
    }
    best_step = best_row(progress.history)["step"] if progress.history else 0
    if is_first():
        if not (run.workdir / "config.json").exists():
            print(f"warning: {run.workdir} was taken away; it is made anew")
            _write_config(run.config, run.workdir)
        checkpoint.save(run.checkpoints, progress.step, state, metadata, best_step=best_step)
    wait_for_all(f"saved step {progress.step}")
    _write_history(run, progress)
    return run.checkpoints / str(progress.step)


def _test_and_report(run: Run, progress: Progress, n_params: int) -> dict[str, Any]:
    """Score the best epoch on the test set, which nothing has seen before, and write the report."""
    config, dataset, history = run.config, run.dataset, progress.history
    best = best_row(history)
    try:
        state = checkpoint.restore(run.checkpoints / str(best["step"]), like=progress.state).state
    except CifarJaxError as error:
        print(f"warning: {error} The last epoch is scored in its place.")
        best, state = history[-1], progress.state
    test = run.evaluate(state.variables, dataset.test)
    report = {
        "data": {"name": dataset.name, "digest": dataset.digest},
        "model": config.model,
        "n_params": n_params,
        "n_train": len(dataset.train),
        "n_val": len(dataset.val),
        "n_test": len(dataset.test),
        "val_accuracy": best["val_accuracy"],
        "test_accuracy": test.accuracy,
        "test_loss": test.mean_loss,
        "test_correct": int(test.correct),
        "epochs": len(history),
        "steps": progress.step,
        "best_step": best["step"],
        "train_seconds": sum(row["seconds"] for row in history),
        # The epochs have equal numbers of images, so this is all images by all their time.
        "images_per_second": statistics.harmonic_mean(
            [row["images_per_second"] for row in history]
        ),
        "devices": len(run.devices),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device_kind": run.devices[0].device_kind,
        "seed": config.seed,
        "versions": _versions(),
        # After the last step, where a resumed run must arrive; what was scored is best_step.
        "params_sha256": checkpoint.tree_sha256(jax.device_get(progress.state.params)),
    }
    if is_first():
        write_atomically(run.workdir / "report.json", json.dumps(report, indent=2) + "\n")
    print(
        f"test on {dataset.name}: accuracy {100 * test.accuracy:.2f} % ({test.correct:.0f} of "
        f"{test.count:.0f}), loss {test.mean_loss:.4f}, with epoch {best['epoch']}"
        f"{', the best by validation' if best == best_row(history) else ''}\n"
        f"in {run.workdir}: report.json, metrics.jsonl, config.json, plots/curves.png, checkpoints/"
    )
    return report


def _write_history(run: Run, progress: Progress) -> None:
    """``metrics.jsonl``, anew from the history, so that no line can be torn or come twice."""
    if is_first():
        lines = "".join(json.dumps(row) + "\n" for row in progress.history)
        write_atomically(run.workdir / "metrics.jsonl", lines)


def _versions() -> dict[str, str]:
    packages = (
        *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
        *("tensorflow-cpu", "tensorflow"),  # the one or the other
    )
    versions = {"cifar_jax": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _print_banner(notice: str) -> None:
    lines = notice.splitlines()
    width = max(map(len, lines))
    print("#" * (width + 4))
    for line in lines:
        print(f"# {line.ljust(width)} #")
    print("#" * (width + 4))
