"""NHWC <-> NCHW: the same numbers in the layouts of Flax and of PyTorch. NumPy only, and exact.

| | Flax | PyTorch |
|---|---|---|
| images | ``[B, H, W, C]`` | ``[B, C, H, W]`` |
| a convolution's kernel | ``[H, W, I, O]`` | ``[O, I, H, W]`` |
| a Dense kernel | ``[I, O]`` | ``[O, I]`` |
| inputs of the first Dense after a flatten | in the order h, w, c | in the order c, h, w |
| batch norm's ``momentum`` | 0.9, of the old statistics | 0.1, of the new ones |
| batch norm's running variance | of batches, divided by n | divided by n - 1 |
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_jax.data.dataset import ImageShape

Array = NDArray[Any]
Variables = dict[str, Any]  # {"params": {layer: {leaf: array}}, "batch_stats": the same}
StateDict = dict[str, Array]

# Flax's name of a leaf -> its collection, and PyTorch's name.
_LEAVES = {
    "kernel": ("params", "weight"),
    "scale": ("params", "weight"),
    "bias": ("params", "bias"),
    "mean": ("batch_stats", "running_mean"),
    "var": ("batch_stats", "running_var"),
}


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """How the layers of a Flax network are named and shaped in PyTorch.

    Attributes:
        names: Flax's name of each layer with parameters -> PyTorch's, in the order of the network:
            ``{"Conv_0": "network.0", ...}``.
        flattened: the Dense layer that follows a flatten, and the ``(H, W, C)`` that is flattened.
        scaled_norms: whether batch norms have a scale; if not, PyTorch's is all ones.
    """

    names: dict[str, str]
    flattened: tuple[str, ImageShape] | None
    scaled_norms: bool = True


def nhwc_to_nchw(x: Array) -> Array:
    """``[B, H, W, C]`` -> ``[B, C, H, W]``."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def nchw_to_nhwc(x: Array) -> Array:
    """``[B, C, H, W]`` -> ``[B, H, W, C]``."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def hwio_to_oihw(kernel: Array) -> Array:
    """``[H, W, I, O]`` -> ``[O, I, H, W]``."""
    return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))


def oihw_to_hwio(weight: Array) -> Array:
    """``[O, I, H, W]`` -> ``[H, W, I, O]``."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def dense_to_torch(kernel: Array, flattened: ImageShape | None = None) -> Array:
    """``[I, O]`` -> ``[O, I]``; inputs ``flattened`` from ``(H, W, C)`` are reordered to chw."""
    if flattened:
        kernel = kernel.reshape(*flattened, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return np.ascontiguousarray(kernel.T)


def dense_from_torch(weight: Array, flattened: ImageShape | None = None) -> Array:
    """The inverse of :func:`dense_to_torch`."""
    kernel = weight.T
    if flattened:
        height, width, channels = flattened
        kernel = kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(kernel.reshape(weight.shape[::-1]))


def to_torch(variables: Variables, layout: TorchLayout) -> StateDict:
    """The variables of a Flax network as the ``state_dict`` of the same network in PyTorch."""
    state_dict: StateDict = {}
    for layer, torch_name in layout.names.items():
        for leaf, (collection, torch_leaf) in _LEAVES.items():
            leaves = variables.get(collection, {}).get(layer, {})
            value = leaves.get(leaf)
            if leaf == "scale" and layer.startswith("BatchNorm") and not layout.scaled_norms:
                value = np.ones_like(leaves["bias"])
            if value is not None:
                array = np.asarray(value)
                if leaf == "kernel":
                    array = _kernel_to_torch(layer, array, layout)
                state_dict[f"{torch_name}.{torch_leaf}"] = array
        if f"{torch_name}.running_mean" in state_dict:
            # A count that PyTorch requires, but with a fixed momentum never uses.
            state_dict[f"{torch_name}.num_batches_tracked"] = np.zeros((), np.int64)
    return state_dict


def from_torch(state_dict: StateDict, layout: TorchLayout) -> Variables:
    """The inverse of :func:`to_torch`; also for gradients, which have the layout of parameters.

    The scale of a batch norm that has none in our network is dropped, whatever its values.

    Raises:
        KeyError: ``state_dict`` lacks all tensors of a layer.
    """
    variables: Variables = {"params": {}, "batch_stats": {}}
    for layer, torch_name in layout.names.items():
        has_statistics = layer.startswith("BatchNorm")
        found = False
        for leaf, (collection, torch_leaf) in _LEAVES.items():
            tensor = state_dict.get(f"{torch_name}.{torch_leaf}")
            if tensor is None or leaf == ("kernel" if has_statistics else "scale"):
                continue
            if leaf == "scale" and not layout.scaled_norms:
                continue
            array = np.asarray(tensor)
            if leaf == "kernel":
                array = _kernel_from_torch(layer, array, layout)
            variables[collection].setdefault(layer, {})[leaf] = array
            found = True
        if not found:
            raise KeyError(torch_name)
    return variables


def _kernel_to_torch(layer: str, kernel: Array, layout: TorchLayout) -> Array:
    if kernel.ndim == 4:
        return hwio_to_oihw(kernel)
    return dense_to_torch(kernel, _flattened_before(layer, layout))


def _kernel_from_torch(layer: str, weight: Array, layout: TorchLayout) -> Array:
    if weight.ndim == 4:
        return oihw_to_hwio(weight)
    return dense_from_torch(weight, _flattened_before(layer, layout))


def _flattened_before(layer: str, layout: TorchLayout) -> ImageShape | None:
    if layout.flattened and layout.flattened[0] == layer:
        return layout.flattened[1]
    return None


def torch_running_variance(
    variance: Array, *, momentum: float, start: Array, n: int, steps: int
) -> Array:
    """PyTorch's running variance after the training that gives Flax's ``variance``.

    Both average over the past with the same momentum; Flax averages the variances of batches, and
    PyTorch those times n / (n - 1).

    Args:
        momentum: as in Flax, the weight of the old statistics.
        start: the running variance before the first step, which has no such factor.
        n: the number of values that a batch's variance is over, B * H * W; the same at every step.
        steps: training steps since ``start``.
    """
    kept = start * momentum**steps
    return kept + (variance - kept) * (n / (n - 1))


def fold_bias_into_batch_norm(state_dict: StateDict, layout: TorchLayout) -> StateDict:
    """Drop the bias of each convolution before a batch norm, which our networks do without.

    PyTorch's tutorials often leave it in. The batch norm subtracts it again: in training as part of
    the batch's mean, and in evaluation as part of the running mean, from which it is subtracted
    here.
    """
    folded = dict(state_dict)
    pairs = itertools.pairwise(layout.names.items())
    for (_, torch_name), (following, torch_following) in pairs:
        bias = folded.get(f"{torch_name}.bias")
        mean = folded.get(f"{torch_following}.running_mean")
        if following.startswith("BatchNorm") and bias is not None and mean is not None:
            del folded[f"{torch_name}.bias"]
            folded[f"{torch_following}.running_mean"] = mean - bias
    return folded
