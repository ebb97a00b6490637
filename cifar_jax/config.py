"""``TrainConfig``: every choice that a training run depends on, with its unit and bounds."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

from cifar_jax.errors import CifarJaxError, UsageError
from cifar_jax.options import Options, flag, option

ModelName = Literal["linear", "mlp", "cnn", "cnn-wide", "cnn-gap", "resnet9", "airbench"]
OptimizerName = Literal["sgd", "adam", "adamw", "muon"]
ScheduleName = Literal["constant", "linear", "cosine", "onecycle"]
InputName = Literal["tf.data", "device"]
DtypeName = Literal["float32", "bfloat16"]
PresetName = Literal["default", "tutorial", "fast", "airbench"]
SplitName = Literal["train", "val", "test"]
FitName = Literal["stretch", "crop"]
ExportFormat = Literal["stablehlo", "onnx", "safetensors", "pth"]

# All their convolutions have a batch norm.
ALWAYS_NORMALISED: tuple[ModelName, ...] = ("resnet9", "airbench")

_DATA, _MODEL, _OPTIMIZER = "data", "model", "optimizer"
_REGULARISATION, _RUN = "augmentation and regularisation", "run"
_PROCESSES = "several processes"


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """The options of a run. On a CPU, the same config, data and devices give the same bits."""

    preset: PresetName = option(
        "default",
        "a named set of defaults for all the other options: 'default' generalises, 'tutorial' "
        "(Adam 1e-3, constant, no augmentation) shows the overfitting that the tutorial describes, "
        "'fast' reaches 75 % on CIFAR-10 in a minute on two cores, 'airbench' is the network of "
        "the speed record for 94 %, for a GPU",
        group=_RUN,
    )
    epochs: int = option(
        10, "passes over the training images", group=_RUN, at_least=1, at_most=100_000
    )
    batch_size: int = option(
        128, "global batch, over all devices", group=_RUN, unit="images", at_least=1
    )
    seed: int = option(
        0,
        "decides the initial weights, split, order, augmentation and dropout",
        group=_RUN,
        at_least=0,
        below=2**32,
    )
    devices: Literal["all"] | int = option(
        1, "devices of each process that share each batch", group=_RUN, at_least=1
    )
    resume: bool = option(
        False, "continue the run in --workdir, exactly as if it had not stopped", group=_RUN
    )
    deterministic: bool = option(
        False,
        "give the same bits in each run on a GPU too, where it makes some operations slower; a CPU "
        "always does",
        group=_RUN,
    )
    checkpoint_every: int = option(
        0,
        "also save within an epoch, every this many steps; 0 = only at the end of each epoch. On a "
        "GPU with --input device, Ctrl-C and SIGTERM take effect only at such a step",
        group=_RUN,
        unit="steps",
        at_least=0,
    )

    tensorboard: bool = option(
        False,
        "write TensorBoard event files too, to tensorboard/ in the workdir (needs "
        "pip install tensorboardX)",
        group=_RUN,
    )

    coordinator: str | None = option(
        None,
        "run as one of several processes, usually one per machine, all started alike: HOST:PORT of "
        "process 0, or 'auto' under SLURM, Open MPI (up to 4) or Kubernetes",
        group=_PROCESSES,
    )
    num_processes: int | None = option(None, "number of processes", group=_PROCESSES, at_least=1)
    process_id: int | None = option(
        None, "number of this process, from 0", group=_PROCESSES, at_least=0
    )

    data: str = option(
        "auto",
        "a folder of class folders (or of train/ and test/ with them), a .tar.gz of one, an "
        "official CIFAR-10 .tar.gz, 'cifar10' (tensorflow-datasets), 'shapes' (generated, needs "
        "no network), or 'auto': cifar10 if it is prepared or can be downloaded, else shapes",
        group=_DATA,
    )
    data_dir: str | None = option(
        None,
        "where tensorflow-datasets and extracted archives are kept "
        "[default $TFDS_DATA_DIR or ~/tensorflow_datasets]",
        group=_DATA,
    )
    image_size: int | None = option(
        None,
        "resize the images of a folder to squares of this side; otherwise all must have one size",
        group=_DATA,
        unit="pixels",
        at_least=1,
        at_most=8000,
    )
    val_fraction: float = option(
        0.1,
        "fraction of the training images held out for validation (of a flat folder, as many again "
        "for the test)",
        group=_DATA,
        above=0,
        below=1,
    )
    max_train_examples: int | None = option(
        None, "train on at most this many images", group=_DATA, unit="images", at_least=1
    )
    input: InputName = option(
        "tf.data",
        "where a step's images come from: 'tf.data' streams them from the host; 'device' keeps all "
        "images, decoded, on each accelerator and runs whole epochs there, without TensorFlow, "
        "which then starts only to read 'cifar10' or to resize",
        group=_DATA,
    )
    cache_mb: int = option(
        2048,
        "for tf.data: training and validation images are decoded once if they fit into this; "
        "otherwise they are streamed from disk",
        group=_DATA,
        unit="MB",
        at_least=0,
    )

    model: ModelName = option("cnn", "the network", group=_MODEL)
    widths: tuple[int, ...] = option(
        (),
        "channels of the convolutions; by default the model's own",
        group=_MODEL,
        at_least=1,
        at_most=1_000_000,
    )
    hidden: tuple[int, ...] = option(
        (),
        "units of the hidden Dense layers; by default the model's own",
        group=_MODEL,
        at_least=1,
        at_most=1_000_000,
    )
    patch_size: int = option(
        1,
        "before the first convolution, turn each square of this side into one pixel with the "
        "channels of all of them, which makes every convolution cheaper; 1 = off",
        group=_MODEL,
        unit="pixels",
        at_least=1,
    )
    batch_norm: bool = option(
        False, "batch norm after each convolution (resnet9 and airbench: always)", group=_MODEL
    )
    sync_batch_norm: bool = option(
        True,
        "batch norm over the whole batch, so that the number of devices does not matter; off: over "
        "each device's own share, so that devices need not wait for each other",
        group=_MODEL,
    )
    initial_weights: str | None = option(
        None,
        "start from the weights of this run, checkpoint or converted network of the same model, "
        "classes and image size, and normalise images as it does [default random weights]",
        group=_MODEL,
    )
    dropout: float = option(
        0.0,
        "fraction of units dropped after each hidden Dense layer (resnet9: before its last layer; "
        "cnn-gap has a hidden layer only with --hidden)",
        group=_MODEL,
        at_least=0,
        below=1,
    )

    dtype: DtypeName = option(
        "float32",
        "type of activations in training; parameters, statistics, loss and scores are float32",
        group=_MODEL,
    )

    optimizer: OptimizerName = option(
        "adam",
        "the optimizer; 'muon' trains the kernels of convolutions, and Adam at a tenth of the "
        "learning rate everything else",
        group=_OPTIMIZER,
    )
    learning_rate: float = option(3e-3, "the schedule's peak", group=_OPTIMIZER, above=0)
    schedule: ScheduleName = option("onecycle", "how the learning rate changes", group=_OPTIMIZER)
    momentum: float = option(0.9, "momentum of sgd and muon", group=_OPTIMIZER, at_least=0, below=1)
    nesterov: bool = option(False, "Nesterov momentum for sgd", group=_OPTIMIZER)
    weight_decay: float = option(
        0.0, "on kernels only; decoupled for adamw, else L2", group=_OPTIMIZER, at_least=0
    )
    clip_norm: float = option(
        0.0, "largest global gradient norm; 0 = unclipped", group=_OPTIMIZER, at_least=0
    )
    accumulate: int = option(
        1,
        "split each device's share of a batch into this many micro-batches, to save memory",
        group=_OPTIMIZER,
        at_least=1,
    )

    flip: bool = option(True, "mirror half of the images", group=_REGULARISATION)
    crop: int = option(
        2,
        "reflect-pad by this much, then crop at random; 0 = off",
        group=_REGULARISATION,
        unit="pixels",
        at_least=0,
    )
    cutout: int = option(
        0,
        "side of a square blanked at random; 0 = off",
        group=_REGULARISATION,
        unit="pixels",
        at_least=0,
    )
    label_smoothing: float = option(
        0.0, "probability spread over the classes", group=_REGULARISATION, at_least=0, below=1
    )
    early_stopping: int = option(
        0,
        "stop after this many epochs without a lower validation loss; 0 = off",
        group=_REGULARISATION,
        unit="epochs",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.optimizer != "sgd":
            raise UsageError(
                f"--nesterov with --optimizer {self.optimizer}", fix="use --optimizer sgd"
            )
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov with --momentum 0", fix="give --momentum 0.9, for example")
        for name, (models, why, fix) in _HAS_NO_USE_FOR.items():
            value = getattr(self, name)
            if value != getattr(TrainConfig, name) and self.model in models:
                given = flag(name)
                if value == getattr(PRESETS[self.preset], name):
                    given += f" (set by --preset {self.preset})"
                raise UsageError(f"{given} with --model {self.model}, which {why}", fix=fix)
        if self.dropout and self.model == "cnn-gap" and not self.hidden:
            raise UsageError(
                "--dropout with --model cnn-gap, which has no hidden Dense layer of its own",
                fix="give --hidden 256, say, too",
            )
        if self.widths and self.model == "resnet9" and len(self.widths) != 4:
            raise UsageError(
                f"--widths with {len(self.widths)} numbers for resnet9, which has 4 stages",
                fix="give four, such as --widths 64,128,256,512",
            )
        if self.optimizer == "muon" and not (self.batch_norm or self.model in ALWAYS_NORMALISED):
            raise UsageError(
                "--optimizer muon without --batch-norm: Muon fixes the norms of kernels, and batch "
                "norm restores the scale",
                fix="give --batch-norm too, or --optimizer adam",
            )
        if self.optimizer == "muon" and self.weight_decay:
            raise UsageError(
                "--weight-decay with --optimizer muon, which fixes the norms of kernels",
                fix="give --weight-decay 0",
            )
        if isinstance(self.devices, int):
            check_batch_divides(self, self.devices * (self.num_processes or 1))
        _check_processes(self)


# Options that some models cannot have: which models, why, and the fix.
_HAS_NO_USE_FOR: dict[str, tuple[tuple[ModelName, ...], str, str]] = {
    "widths": (("linear", "mlp"), "has no convolutions", "drop --widths"),
    "hidden": (("linear", *ALWAYS_NORMALISED), "has no hidden Dense layer", "drop --hidden"),
    "batch_norm": (("linear", "mlp"), "has no convolutions", "give --no-batch-norm"),
    "patch_size": (
        ("linear", "mlp", *ALWAYS_NORMALISED),
        "does not support patches",
        "give --patch-size 1",
    ),
    "dropout": (("linear", "airbench"), "has none", "drop it, or use --model mlp or resnet9"),
}


def _check_processes(config: TrainConfig) -> None:
    numbers = (config.num_processes, config.process_id)
    if config.coordinator in (None, "auto"):
        if numbers != (None, None):
            raise UsageError(
                "--num-processes and --process-id without the address of a --coordinator",
                fix="give --coordinator HOST:PORT too, or leave them out",
            )
        return
    host, _, port = str(config.coordinator).rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(
            f"--coordinator {config.coordinator} is not HOST:PORT",
            fix="give --coordinator localhost:9876, for example",
        )
    if config.num_processes is None or config.process_id is None:
        raise UsageError(
            "--coordinator HOST:PORT without --num-processes and --process-id",
            fix="give both, or --coordinator auto under SLURM, Open MPI or Kubernetes",
        )
    if config.process_id >= config.num_processes:
        raise UsageError(
            f"--process-id {config.process_id} of --num-processes {config.num_processes}",
            fix=f"give a number from 0 to {config.num_processes - 1}",
        )


def check_batch_divides(config: TrainConfig, devices: int) -> None:
    """Raise ``UsageError`` unless the batch divides over devices and micro-batches."""
    parts = devices * config.accumulate
    if config.batch_size % parts:
        below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(
            f"--batch-size {config.batch_size} does not divide over {devices} device(s) x "
            f"{config.accumulate} micro-batch(es)",
            fix=f"use --batch-size {nearest}",
        )


PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    "tutorial": TrainConfig(
        preset="tutorial", learning_rate=1e-3, schedule="constant", flip=False, crop=0
    ),
    "fast": TrainConfig(
        preset="fast",
        epochs=3,
        batch_size=256,
        model="cnn-gap",
        patch_size=2,
        batch_norm=True,
        optimizer="muon",
        learning_rate=0.1,
        momentum=0.6,
        schedule="linear",
        label_smoothing=0.1,
    ),
    "airbench": TrainConfig(
        preset="airbench",
        epochs=8,
        batch_size=2000,
        model="airbench",
        optimizer="muon",
        learning_rate=0.24,
        momentum=0.6,
        schedule="linear",
        label_smoothing=0.2,
    ),
}

# How a run is started this time: not saved with it.
OF_THIS_START = frozenset({"resume", "coordinator", "num_processes", "process_id"})
# What a resumed run may change: where things are and what they run on, not what is computed.
NOT_PART_OF_THE_RUN = OF_THIS_START | {
    "data",
    "data_dir",
    "input",
    "cache_mb",
    "devices",
    "checkpoint_every",
    "tensorboard",
}


def check_preset(config: TrainConfig) -> None:
    """Raise ``UsageError`` if ``config`` names a preset but has none of its options.

    The command line applies the preset; in Python the caller must do so.
    """
    plain, preset = TrainConfig(), PRESETS[config.preset]
    names = [field.name for field in dataclasses.fields(config) if field.name != "preset"]
    its_own = [name for name in names if getattr(preset, name) != getattr(plain, name)]
    if its_own and all(getattr(config, name) == getattr(plain, name) for name in its_own):
        raise UsageError(
            f"the config names preset {config.preset!r}, but has none of its options",
            fix=f"start from dataclasses.replace(PRESETS[{config.preset!r}], ...)",
        )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values, without the options that concern only this start."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in OF_THIS_START
    }


def from_json(values: Any, where: str) -> TrainConfig:
    """The inverse of :func:`to_json`.

    Args:
        where: where ``values`` come from, such as a file's path, for errors.

    Raises:
        UsageError: a key that is not an option, or a value that it cannot have.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if not isinstance(values, dict):
        raise UsageError(
            f"{where} is not a JSON object of options", fix="use the file that the run wrote"
        )
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"{where} has {name!r}, which is not an option of this version",
                fix=f"did you mean {near[0]}?" if near else "use the version that wrote it",
            )
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    for name in ("data_dir", "initial_weights"):  # "" was taken for None before 2026-11-29
        if fields.get(name) == "":
            fields[name] = None
    try:
        return TrainConfig(**fields)
    except CifarJaxError as error:
        fix = "use the file that the run wrote"
        raise UsageError(f"{where} is not the config of a run: {error.what}", fix=fix) from error


def check_resumable(config: TrainConfig, saved: TrainConfig) -> None:
    """Raise ``UsageError`` naming the options in which ``config`` is not ``saved``.

    With a constant learning rate the past does not depend on ``epochs``, which may then change.
    """
    free = NOT_PART_OF_THE_RUN | ({"epochs"} if saved.schedule == "constant" else set())
    differing = [
        f"{flag(field.name)} {getattr(config, field.name)} (was {getattr(saved, field.name)})"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in free and getattr(config, field.name) != getattr(saved, field.name)
    ]
    if differing:
        raise UsageError(
            f"--resume with other options than the run started with: {', '.join(differing)}",
            fix="leave them out, or start a new run in another --workdir, with --initial-weights "
            "to start from these weights",
        )
