"""Trained networks between JAX and PyTorch: ``python -m cifar_jax.convert SOURCE DESTINATION``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_jax import cli
from cifar_jax.checkpoints.workdir import step_folder
from cifar_jax.config import ModelName
from cifar_jax.errors import CheckpointError, UsageError
from cifar_jax.options import Options, flag, option
from cifar_jax.system.files import check_is_new, new_path

if TYPE_CHECKING:  # slow to import: wrong options are reported before
    from cifar_jax.checkpoints.trained import TrainedNetwork
    from cifar_jax.layout import StateDict

DESCRIPTION = """\
Convert a trained network between PyTorch and JAX, exactly: float32 weights keep every bit.

The ending names the format: .pth and .pt are PyTorch state_dicts (they need
`pip install torch==2.13.0`), .safetensors holds the same tensors under the same names, and a folder
is a checkpoint of this program: a --workdir of cifar_jax.train (its best step is used), or one
checkpoints/<step>. A DESTINATION folder becomes such a workdir.

The network is recognised by the names and shapes of the tensors. No code in a file is run, and so a
pickled model is refused; save its weights instead: torch.save(model.state_dict(), 'net.pth').
Nothing is overwritten.

examples:
  python -m cifar_jax.convert cifar10-cnn.pth runs/from-torch
  python -m cifar_jax.convert photos.pth runs/photos --classes ant,bee --mean 0.5,0.5,0.5 \\
      --std 0.5,0.5,0.5
  python -m cifar_jax.convert runs/20261122-101500-cnn net.safetensors
"""

_GROUP = "what the tensors do not say"

# In the order of torchvision's ImageFolder, which numbers classes by name.
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclasses.dataclass(frozen=True)
class ConvertOptions(Options):
    """What a file that holds only tensors does not say about its network."""

    model: ModelName | None = option(
        None, "the network [default: recognised by its tensors]", group=_GROUP
    )
    image_size: int | None = option(
        None,
        "side of the training images, if the network takes any size [default 32]",
        group=_GROUP,
        unit="pixels",
        at_least=1,
        at_most=8000,
    )
    mean: tuple[float, ...] = option(
        (),
        "what training subtracted from each channel of pixels 0..1 [default 0,0,0]",
        group=_GROUP,
        at_most=1,  # more is of pixels 0..255
    )
    std: tuple[float, ...] = option(
        (), "what it then divided each channel by [default 1,1,1]", group=_GROUP, above=0
    )
    classes: tuple[str, ...] = option(
        (),
        "names of the classes in label order, comma-separated [default for 10 classes CIFAR-10's "
        "in alphabetical order, else 'class 0' and so on]",
        group=_GROUP,
    )

    @property
    def given(self) -> list[str]:
        fields = dataclasses.fields(self)
        return [flag(f.name) for f in fields if getattr(self, f.name) != f.default]


def convert(source: Path, destination: Path, options: ConvertOptions) -> None:
    """Write the network in ``source`` as ``destination``, in the formats that their endings name.

    Prints what was assumed about the network, and what was converted.

    Raises:
        UsageError: ``destination`` exists, or ``options`` contradict the network.
        CheckpointError: ``source`` holds no network of the zoo, or holds NaN.
        ResourceError: torch is needed for a ``.pth`` and missing, or ``destination`` cannot be
            written.
    """
    check_is_new(destination, "DESTINATION")
    if not source.exists():
        raise CheckpointError(f"SOURCE {source} does not exist", fix="check the path")
    if source.is_dir():
        step_folder(source)  # fail early: trained.load would refuse it too, seconds later
    from cifar_jax.checkpoints import trained
    from cifar_jax.state_dicts import ENDINGS, SAFETENSORS_ENDING, write_state_dict
    from cifar_jax.steps.parallel import select_devices

    ending = destination.suffix.lower()
    if ending not in ENDINGS and ending[1:].isidentifier():  # runs/v1.2 is a folder's name
        raise UsageError(
            f"DESTINATION {destination} ends in {ending}, which is not a known format",
            fix=f"use {', '.join(ENDINGS)}, or for a folder a name without an ending; "
            "python -m cifar_jax.export writes .onnx",
        )
    select_devices("all")  # raises if there are none
    network = _read(source, options)
    with new_path(destination, "DESTINATION") as path:
        if ending in ENDINGS:
            write_state_dict(path, network.state_dict(), network.metadata())
        else:
            trained.save(network, path, source=f"converted from {source.name}")
    print(
        f"converted {network.config.model}, {network.n_params:,} parameters, "
        f"{len(network.class_names)} classes, images of "
        f"{'x'.join(map(str, network.image_shape))}: {source} -> {destination}"
    )
    if ending == SAFETENSORS_ENDING:
        print(f'in PyTorch: model.load_state_dict(safetensors.torch.load_file("{destination}"))')
    elif ending in ENDINGS:
        print(
            f'in PyTorch: model.load_state_dict(torch.load("{destination}"))\n'
            f"a {ending} does not hold mean, std and class names; a {SAFETENSORS_ENDING} does"
        )


def _read(source: Path, options: ConvertOptions) -> TrainedNetwork:
    from cifar_jax.checkpoints import trained
    from cifar_jax.identify import network_of
    from cifar_jax.state_dicts import check_numbers, read_state_dict

    if source.is_dir():
        network = trained.load(source)
    else:
        state_dict, metadata = read_state_dict(source)
        check_numbers(state_dict, source)
        if "config" not in metadata:
            return _from_tensors(source, state_dict, options)
        network = network_of(source, state_dict, metadata)
    if options.given:
        raise UsageError(
            f"{', '.join(options.given)} with {source}, which describes its network itself",
            fix="leave it out",
        )
    return network


def _from_tensors(path: Path, state_dict: StateDict, options: ConvertOptions) -> TrainedNetwork:
    """The network with these tensors; what they do not say comes from ``options`` or is assumed."""
    from cifar_jax.checkpoints.trained import TrainedNetwork
    from cifar_jax.identify import identify, takes_one_size, variables_of
    from cifar_jax.layout import fold_bias_into_batch_norm

    network = identify(state_dict, model=options.model, image_size=options.image_size)
    variables = variables_of(state_dict, network, path)
    config, image_shape, num_classes = network
    side, _, channels = image_shape
    if channels not in (1, 3):
        raise CheckpointError(
            f"the network in {path} takes images of {channels} channels",
            fix="use a network for 1 channel (greyscale) or 3 (colour)",
        )
    for name, values in (("--mean", options.mean), ("--std", options.std)):
        if values and len(values) != channels:
            raise UsageError(
                f"{name} has {len(values)} number(s), the network's images have {channels} "
                "channel(s)",
                fix="give one for each channel",
            )
    if options.classes and len(options.classes) != num_classes:
        raise UsageError(
            f"--classes has {len(options.classes)} name(s), the network {num_classes} class(es)",
            fix="give a name for each, in the order of the labels",
        )
    if twice := sorted({name for name in options.classes if options.classes.count(name) > 1}):
        raise UsageError(
            f"--classes has {twice[0]} more than once",
            fix="give each class a name of its own, in the order of the labels",
        )
    if config.model not in ("linear", "mlp"):
        print(
            "note: the tensors do not say how the network pads, pools and activates: compare both "
            "networks' predictions for one image"
        )
    if len(fold_bias_into_batch_norm(state_dict, network.layout)) < len(state_dict):
        print(
            "note: biases of convolutions before a batch norm are folded into the norm; to load "
            "the weights in PyTorch again, give those convolutions bias=False"
        )
    if not options.image_size:
        how = "from the first Linear" if takes_one_size(config) else "if not, give --image-size"
        print(f"assumed: {side}x{side} images; {how}")
    if not options.mean:
        print("assumed: training subtracted no mean from pixels 0..1; if it did, give --mean")
    if not options.std:
        print("assumed: training did not divide them by a std; if it did, give --std")
    if not options.classes:
        print(f"assumed: {_describe(_default_classes(num_classes))}; if not, give --classes")
    if config.model == "resnet9":
        print(
            "assumed: the classifier's outputs are multiplied by 0.125, as resnet9's here are; if "
            "not, multiply classifier.3.weight by 8 and save the file again"
        )
    if config.model == "airbench":
        print("assumed: the head's outputs are divided by its number of inputs, as airbench's are")
    if config.dropout:
        print(f"assumed: dropout of {config.dropout}, which matters only in training")
    return TrainedNetwork(
        config,
        options.classes or _default_classes(num_classes),
        image_shape,
        options.mean or (0.0,) * channels,
        options.std or (1.0,) * channels,
        variables,
    )


def _default_classes(count: int) -> tuple[str, ...]:
    if count == len(_CIFAR10):
        return _CIFAR10
    digits = len(str(count - 1))  # so that they sort as they are numbered
    return tuple(f"class {k:0{digits}}" for k in range(count))


def _describe(classes: tuple[str, ...]) -> str:
    if len(classes) < 3:
        return f"classes called {' and '.join(classes)}"
    return f"classes called {classes[0]}, {classes[1]} ... {classes[-1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        ConvertOptions, prog="python -m cifar_jax.convert", description=DESCRIPTION
    )
    parser.add_argument("source", metavar="SOURCE", help="the network: a file or a folder")
    parser.add_argument("destination", metavar="DESTINATION", help="a new file or folder")
    given = parser.parse_given(argv)
    source, destination = Path(given.pop("source")), Path(given.pop("destination"))
    convert(source, destination, ConvertOptions(**given))


if __name__ == "__main__":
    cli.run(main, beside_training=True)
