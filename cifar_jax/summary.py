"""A network layer by layer, and the memory of training it: ``python -m cifar_jax.summary``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from cifar_jax import cli
from cifar_jax.config import ModelName, OptimizerName, TrainConfig
from cifar_jax.options import Options, option, option_of

DESCRIPTION = """\
Show a network layer by layer: output shapes, parameters and how they add up, multiply-accumulates
per image, receptive fields, and the memory of the outputs; then the memory of a training step.
Needs no data.

examples:
  python -m cifar_jax.summary --model cnn
  python -m cifar_jax.summary --model resnet9 --image-size 64 --batch-size 256 --memory 8
"""

_NETWORK, _TRAINING, _OUTPUT = "network", "training", "output"


@dataclasses.dataclass(frozen=True)
class SummaryOptions(Options):
    """Which network to show, and how it is trained."""

    model: ModelName = option_of(TrainConfig, "model", group=_NETWORK)
    image_size: int = option(
        32, "side of the images", group=_NETWORK, unit="pixels", at_least=1, at_most=10_000
    )
    channels: int = option(
        3, "3 for colour, 1 for greyscale", group=_NETWORK, at_least=1, at_most=10_000
    )
    classes: int = option(10, "how many", group=_NETWORK, at_least=1, at_most=1_000_000)
    widths: tuple[int, ...] = option_of(TrainConfig, "widths", group=_NETWORK)
    hidden: tuple[int, ...] = option_of(TrainConfig, "hidden", group=_NETWORK)
    patch_size: int = option_of(TrainConfig, "patch_size", group=_NETWORK)
    batch_norm: bool = option_of(TrainConfig, "batch_norm", group=_NETWORK)
    dropout: float = option_of(TrainConfig, "dropout", group=_NETWORK)
    batch_size: int = option(128, "images per step", group=_TRAINING, at_least=1, at_most=2**24)
    optimizer: OptimizerName = option("adam", "the optimizer", group=_TRAINING)
    memory: float = option(
        0.0,
        "find the largest batch, a power of two, whose step fits into this; 0 = off",
        group=_TRAINING,
        unit="GB of 1e9 bytes",
        at_least=0,
    )
    json: bool = option(False, "one JSON object instead of the table", group=_OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config  # noqa: B018  (which checks the combination)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            **{
                name: getattr(self, name)
                for name in ("model", "widths", "hidden", "patch_size", "batch_norm", "dropout")
            },
            batch_size=self.batch_size,
            optimizer=self.optimizer,
        )


def summarize(options: SummaryOptions) -> dict[str, Any]:
    """What ``--json`` prints.

    ``layers`` (the fields of :class:`cifar_jax.networks.layer_table.LayerRow`), ``total_params``,
    ``total_macs`` of one image, ``total_activation_bytes``, ``training`` (bytes, see
    :class:`cifar_jax.steps.step_memory.StepMemory`) and ``largest_batch``, None unless asked for.

    Raises:
        DataError: the images are too small for the network.
    """
    import jax

    from cifar_jax.networks.layer_table import layer_table
    from cifar_jax.networks.models import create_model
    from cifar_jax.steps.parallel import select_devices
    from cifar_jax.steps.step_memory import largest_batch, step_memory

    select_devices("all")  # raises if there are none
    image_shape = (options.image_size, options.image_size, options.channels)
    model = create_model(options.config, options.classes)
    rows = layer_table(model, image_shape, options.batch_size)
    _note(f"compiling a training step with {options.batch_size} images ...")
    memory = step_memory(options.config, model, image_shape, options.batch_size)
    largest = None
    if options.memory:
        _note(f"looking for the largest batch that fits {options.memory:g} GB ...")
        largest = largest_batch(options.config, model, image_shape, options.memory * 1e9, memory)
    return {
        "model": options.model,
        "optimizer": options.optimizer,
        "memory": options.memory,
        "batch_size": options.batch_size,
        "image_shape": image_shape,
        "layers": [dataclasses.asdict(row) for row in rows],
        "total_params": sum(row.params for row in rows),
        "total_macs": sum(row.macs for row in rows),
        "total_activation_bytes": sum(row.activation_bytes for row in rows),
        "training": {**dataclasses.asdict(memory), "backend": jax.default_backend()},
        "largest_batch": largest and dataclasses.asdict(largest),
    }


def describe(summary: dict[str, Any]) -> str:
    """``summary`` as tables for a terminal."""
    n, training = summary["batch_size"], summary["training"]
    params, activations = summary["total_params"], summary["total_activation_bytes"]
    table = [
        ("layer", "output", "parameters", "share", "MACs", "sees", "stride", "memory", "share")
    ]
    for layer in summary["layers"]:
        own, memory = layer["params"], layer["activation_bytes"]
        table.append(
            (
                layer["name"],
                "x".join(map(str, layer["output_shape"])),
                f"{layer['arithmetic']} = {own:,}" if own else "",
                f"{100 * own / params:.1f} %" if own else "",
                f"{layer['macs']:,}" if layer["macs"] else "",
                f"{layer['receptive_field']} px" if layer["receptive_field"] else "",
                f"{layer['stride']} px" if layer["stride"] else "",
                _size(memory),
                f"{100 * memory / activations:.1f} %",
            )
        )
    total = (f"{params:,}", "", f"{summary['total_macs']:,}", "", "", _size(activations), "")
    table.append(("total", "", *total))
    shape = "x".join(map(str, summary["image_shape"]))
    held = training["params"] + training["batch_stats"] + training["opt_state"]
    lines = [
        f"{summary['model']} for images of {shape}; outputs and memory are for a batch of {n}",
        "",
        *_aligned(table),
        "",
        "sees: side of the square of the image that an output depends on; MACs are for one image",
        "",
        f"to train with {n} images a step",
        f"  {_size(training['params']):>9s}  parameters",
        f"  {_size(training['opt_state']):>9s}  state of the optimizer, {summary['optimizer']}",
        f"  {_size(activations):>9s}  outputs of all layers, if each is kept for the backward pass",
        f"  {_size(training['xla_total']):>9s}  in total, as XLA will allocate it on this "
        f"{training['backend']}: {_size(training['xla_arguments'])} for the state and the images, "
        f"{_size(training['xla_temporaries'])} for the rest",
    ]
    if summary["memory"]:
        largest = summary["largest_batch"]
        lines.append(
            f"the largest batch, a power of two, in {summary['memory']:g} GB: "
            + (
                f"{largest['batch_size']} images ({_size(largest['xla_total'])})"
                if largest
                else f"none; the state alone takes {_size(held)}"
            )
        )
    return "\n".join(lines)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _size(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def _note(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        SummaryOptions, prog="python -m cifar_jax.summary", description=DESCRIPTION
    )
    options = SummaryOptions(**parser.parse_given(argv))
    summary = summarize(options)
    print(json.dumps(summary, indent=1) if options.json else describe(summary))


if __name__ == "__main__":
    cli.run(main, beside_training=True)
