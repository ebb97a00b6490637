"""The export formats: how each is written, and read back as its users read it.

torch and onnxruntime are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from numpy.typing import NDArray

from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import ExportFormat
from cifar_jax.identify import network_of
from cifar_jax.layout import StateDict, nhwc_to_nchw
from cifar_jax.scoring.inference import make_logits, softmax
from cifar_jax.state_dicts import read_state_dict, write_state_dict
from cifar_jax.steps.train_step import exact_logits

Classify = Callable[[NDArray[np.uint8]], NDArray[Any]]  # images -> probabilities [N, K]


def classify_here(network: TrainedNetwork) -> Classify:
    """``network`` as this package runs it."""
    logits = make_logits(network)

    return lambda images: softmax(logits(images))


def _write_stablehlo(network: TrainedNetwork, path: Path) -> None:
    model = network.model

    def classify(images: jax.Array) -> jax.Array:
        logits = exact_logits(model, network.variables, images, network.mean, network.std)
        return jax.nn.softmax(logits)

    batch = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*batch, *network.image_shape), np.uint8)
    # No paths of this machine's sources in the file.
    frames = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        exported = export.export(jax.jit(classify), platforms=("cpu", "cuda"))(images)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    path.write_bytes(exported.serialize())


def _read_stablehlo(network: TrainedNetwork, path: Path) -> Classify:
    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


def _write_onnx(network: TrainedNetwork, path: Path) -> None:
    from cifar_jax.torch_reference import write_onnx

    twin = _twin(network, network.state_dict())
    write_onnx(path, twin, network.image_shape, network.mean, network.std, network.metadata())


def _read_onnx(network: TrainedNetwork, path: Path) -> Classify:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _write_state_dict(network: TrainedNetwork, path: Path) -> None:
    write_state_dict(path, network.state_dict(), network.metadata())


def _read_safetensors(network: TrainedNetwork, path: Path) -> Classify:
    return classify_here(network_of(path, *read_state_dict(path)))


def _read_pth(network: TrainedNetwork, path: Path) -> Classify:
    from cifar_jax.torch_reference import logits, read_pth

    twin = _twin(network, read_pth(path))
    mean, std = np.array(network.mean, np.float32), np.array(network.std, np.float32)

    def classify(images: NDArray[np.uint8]) -> NDArray[Any]:
        return softmax(logits(twin, nhwc_to_nchw((images / np.float32(255) - mean) / std)))

    return classify


def _twin(network: TrainedNetwork, state_dict: StateDict) -> Any:
    from cifar_jax.torch_reference import load, make_twin

    twin = make_twin(network.model, network.image_shape)
    load(twin, dict(state_dict))
    return twin


# How each format is written, and how its users load it.
FORMATS: dict[ExportFormat, tuple[Callable[..., None], Callable[..., Classify]]] = {
    "stablehlo": (_write_stablehlo, _read_stablehlo),
    "onnx": (_write_onnx, _read_onnx),
    "safetensors": (_write_state_dict, _read_safetensors),
    "pth": (_write_state_dict, _read_pth),
}


def how_to_use(network: TrainedNetwork, format: ExportFormat, output: Path) -> str:
    """A few lines of Python that load and call the file ``output``."""
    height, width, channels = network.image_shape
    file = repr(str(output))  # quoted: any name is valid Python
    images = f"images: uint8 [N, {height}, {width}, {channels}]"
    normalised = f"float32 [N, {channels}, {height}, {width}], in 0..1, then normalised"
    of_state_dict = (
        f"logits = model.eval()(images)  # {normalised} by mean {network.mean}, std {network.std}"
    )
    model = "# model: yours, with the same names, or cifar_jax.torch_reference.make_twin's\n"
    return {
        "stablehlo": "import pathlib\nimport jax.export  # pip install jax flatbuffers\n"
        f"program = pathlib.Path({file}).read_bytes()\n"
        "classify = jax.jit(jax.export.deserialize(program).call)\n"
        f"probabilities = classify(images)  # {images}",
        "onnx": "import onnxruntime\n"
        f"session = onnxruntime.InferenceSession({file})\n"
        f'(probabilities,) = session.run(None, {{"images": images}})  # {images}',
        "safetensors": f"{model}import safetensors.torch\n"
        f"model.load_state_dict(safetensors.torch.load_file({file}))\n{of_state_dict}",
        "pth": f"{model}import torch\nmodel.load_state_dict(torch.load({file}))\n{of_state_dict}",
    }[format]
