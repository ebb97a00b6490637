"""The start of a training run: its data, network, compiled steps, and saved progress."""

from __future__ import annotations

import dataclasses
import json
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.checkpoints import checkpoint, trained
from cifar_jax.checkpoints.workdir import checkpoints_of, write_config
from cifar_jax.config import TrainConfig, check_batch_divides, to_json
from cifar_jax.data.dataset import Dataset, ImageFiles
from cifar_jax.data.sources import load_dataset, warn_of_absent_classes
from cifar_jax.errors import CheckpointError, ResourceError, UsageError
from cifar_jax.networks.initializers import whiten, whitening_stride
from cifar_jax.networks.models import create_model
from cifar_jax.options import flag
from cifar_jax.steps.augment import check_augmentation
from cifar_jax.steps.metrics import RunningSums
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import (
    AXIS_NAME,
    Advance,
    Evaluate,
    compile_lowered,
    place_state,
    select_devices,
)
from cifar_jax.steps.train_step import (
    Batch,
    Sums,
    TrainState,
    create_train_state,
    make_train_step,
    normalize,
)
from cifar_jax.system.stop_signals import signals_held
from cifar_jax.training.distributed import check_agreement, is_first, wait_for_all
from cifar_jax.training.run import Progress, Run, versions


def start(config: TrainConfig, workdir: Path) -> tuple[Run, Progress]:
    """A run with compiled steps, and its progress: empty, or restored from its newest checkpoint.

    With several processes, each does the same on its share of the data, and the first one writes.
    """
    devices = select_devices(config.devices)
    check_batch_divides(config, len(devices))
    dataset = _load(config, devices)
    if dataset.notice:
        _print_banner(dataset.notice)
    warn_of_absent_classes(dataset)
    if config.batch_size > len(dataset.train):
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {len(dataset.train)} images to "
            "train on",
            fix="give a smaller --batch-size",
        )
    check_augmentation(config, dataset.image_shape)
    total_steps = config.epochs * (len(dataset.train) // config.batch_size)
    schedule = make_schedule(config, total_steps)
    tx = make_optimizer(config, schedule)
    model = create_model(
        config,
        len(dataset.class_names),
        axis_name=AXIS_NAME if config.sync_batch_norm else None,
        dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None,
    )
    # On the host, where checkpoints are restored.
    with signals_held():
        state = jax.device_get(create_train_state(model, tx, dataset.image_shape, config.seed))
    print(
        f"model: {config.model}, {state.n_params:,} parameters, on {len(devices)} "
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
    step = make_train_step(config, model, tx, dataset.mean, dataset.std, AXIS_NAME)
    image_input = _image_input(config)
    advance: Advance = image_input.make_advance(
        _with_signal(step), state, dataset.train, config, devices, progress.step
    )
    scored_model = create_model(config, len(dataset.class_names))
    evaluate: Evaluate = image_input.make_evaluate(
        scored_model,
        dataset,
        state.variables,
        devices,
        config.batch_size,
        deterministic=config.deterministic,
    )
    progress.state = place_state(progress.state, devices)
    print(f"{time.perf_counter() - started:.1f} s")
    return Run(config, workdir, dataset, devices, schedule, advance, evaluate), progress


def _image_input(config: TrainConfig) -> types.ModuleType:
    """The module of ``config.input``, with ``decode``, ``make_advance`` and ``make_evaluate``."""
    # Imported late, as only one of them needs TensorFlow.
    if config.input == "device":
        from cifar_jax.steps import device_input

        return device_input
    from cifar_jax.steps import host_input

    return host_input


def _load(config: TrainConfig, devices: Sequence[jax.Device]) -> Dataset:
    """The data, decoded as ``config.input`` requires."""
    cache_mb = config.cache_mb
    if config.input == "device":
        from cifar_jax.steps.device_input import check_fits, room_mb

        cache_mb = room_mb(devices)
    dataset = load_dataset(
        config.data,
        data_dir=config.data_dir,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        max_train_examples=config.max_train_examples,
        cache_mb=cache_mb,
        decode=_image_input(config).decode,
        seed=config.seed,
    )
    if config.input == "device":
        check_fits(dataset, cache_mb)
    return dataset


def _with_signal(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step``, which also informs every process of a signal received by any of them.

    The batch holds a ``signal`` for each device, 0 for none; the sums hold the largest.
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
    """The progress of the newest readable checkpoint, or the start of a new run.

    Also returns ``dataset`` with the run's mean and std: the data's own, or those of given weights.
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
    if trained_on["digest"] != dataset.digest:
        raise CheckpointError(
            f"--resume: {saved.path} was trained on {trained_on['name']} with digest "
            f"{trained_on['digest'][:12]}, --data now gives {dataset.name} with "
            f"{dataset.digest[:12]}",
            fix="give the --data of the run's start, or start a new run in another --workdir",
        )
    begun = -(-int(saved.state.step) // (len(dataset.train) // config.batch_size))
    if config.epochs < begun:
        raise UsageError(
            f"--resume with --epochs {config.epochs} for a run that is already in epoch {begun}",
            fix=f"give --epochs {begun} or more, or start a new run in another --workdir",
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
    """Step 0 with ``state``, or with the weights that ``config`` names and their normalisation."""
    if config.initial_weights is None:
        if config.model == "airbench":
            with signals_held():
                state = jax.device_get(_whitened(state, dataset, config))
        return Progress(state), dataset
    given = trained.load(Path(config.initial_weights))
    if given.class_names != dataset.class_names:
        raise UsageError(
            f"--initial-weights {config.initial_weights} is for {', '.join(given.class_names)}; "
            f"{dataset.name} has {', '.join(dataset.class_names)}",
            fix="give --data with the same classes, or convert the weights again with these as "
            "--classes",
        )
    if jax.tree.map(np.shape, given.variables) != jax.tree.map(np.shape, state.variables):
        shape = "x".join(map(str, given.image_shape))
        raise UsageError(
            f"--initial-weights {config.initial_weights} is {given.config.model} for {shape}, "
            f"{given.n_params:,} parameters; the run's network has other layers",
            fix=f"give {_network_options(given.config)}, no other option of the network, and "
            "images of its size",
        )
    print(f"starting from the weights, mean and std of {config.initial_weights}")
    progress = Progress(state.replace(**given.variables))  # the optimizer starts from zeros
    return progress, dataclasses.replace(dataset, mean=given.mean, std=given.std)


def _network_options(config: TrainConfig) -> str:
    """The command-line options that make the network of ``config``, except for dropout."""
    options = [f"--model {config.model}"]
    for name in ("widths", "hidden", "patch_size"):
        if (value := getattr(config, name)) != getattr(TrainConfig, name):
            numbers = ",".join(map(str, value)) if isinstance(value, tuple) else value
            options.append(f"{flag(name)} {numbers}")
    return " ".join([*options, *(["--batch-norm"] if config.batch_norm else [])])


def _whitened(state: TrainState, dataset: Dataset, config: TrainConfig) -> TrainState:
    """``state`` of airbench, with a first convolution that whitens the training images."""
    train = dataset.train
    some = train.take(np.arange(0, len(train), whitening_stride(len(train))))
    if isinstance(some.images, ImageFiles):
        some = _image_input(config).decode(some)

    def params_for(params: Any, pixels: Any) -> Any:
        return whiten(params, normalize(pixels, dataset.mean, dataset.std))

    lowered = jax.jit(params_for).lower(state.params, some.pixels)
    compiled = compile_lowered(lowered, jax.default_backend(), deterministic=config.deterministic)
    return state.replace(params=compiled(state.params, some.pixels))


def _tidy(checkpoints: Path) -> None:
    """Remove what a kill left half done, and report what else is there."""
    for path in checkpoint.remove_unfinished(checkpoints):
        print(f"removed {path}, left by an interrupted save or deletion")
    if strangers := checkpoint.strangers(checkpoints):
        names = ", ".join(path.name for path in strangers[:5])
        print(f"warning: ignored in {checkpoints}: {names}, which are not checkpoints")


def _agree(config: TrainConfig, workdir: Path, dataset: Dataset, progress: Progress) -> None:
    """Check that all processes are about to do the same; the first one then starts the workdir."""
    settings = to_json(config)
    where = ("data", "data_dir")  # paths may differ between machines
    if jax.process_count() > 1:
        weights = checkpoint.tree_sha256((progress.state, dataset.mean, dataset.std))
        check_agreement(
            {
                "options": json.dumps(
                    {n: v for n, v in settings.items() if n not in where}, indent=2
                ),
                "packages": json.dumps(versions(), indent=2),
                "data": f"{dataset.name} {dataset.digest}",
                "checkpoint": f"step {progress.step}",
                "weights at the start": f"SHA-256 {weights[:16]}",
            }
        )
    if is_first():
        (workdir / "report.json").unlink(missing_ok=True)  # from a run of fewer epochs
        write_config(config, workdir)
    wait_for_all("begun")
    if not (workdir / "config.json").exists():
        raise ResourceError(
            f"--workdir {workdir} is not the folder that process 0 writes to",
            fix="give a --workdir on a disk that all processes share",
        )


def _print_banner(notice: str) -> None:
    lines = notice.splitlines()
    width = max(map(len, lines))
    print("#" * (width + 4))
    for line in lines:
        print(f"# {line.ljust(width)} #")
    print("#" * (width + 4))
