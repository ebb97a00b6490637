"""Parameters, arithmetic, memory and receptive field of each layer, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.data.dataset import ImageShape
from cifar_jax.errors import UsageError
from cifar_jax.networks.layers import Layer, params_of, trace_layers

_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name, kind: as in :class:`cifar_jax.networks.layers.Layer`.
        output_shape: ``(B, H, W, C)`` or ``(B, F)``.
        params: the number of trained parameters, without the running statistics of a norm.
        arithmetic: ``params`` as a sum of products, such as ``3*3*3*16 + 16``; empty if 0.
        macs: multiply-accumulates for one image, as textbooks count them: for a convolution
            ``H*W*C_out * kh*kw*C_in`` (border outputs in full), for a Dense layer ``F_in*F_out``;
            biases, norms, ReLUs and pools count nothing.
        receptive_field: side of the square of the image that one output depends on, ignoring the
            image's border; after a global pool or flatten, the part of the image that is seen at
            all; 0 if a layer has changed the size of the image in a way that is not known here.
        stride: pixels of the image from one output to the next; 0 if there is only one position.
        start: the first pixel that the first output sees; negative within the padding.
        activation_bytes: size of the output for the whole batch, in float32.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    arithmetic: str
    macs: int
    receptive_field: int
    stride: int
    start: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class View:
    """What the outputs of a layer see of the image, along one axis.

    Output i sees the pixels ``start + i * stride`` to ``start + i * stride + size - 1``, of which
    those outside the image are padding.
    """

    start: int = 0
    size: int = 1
    stride: int = 1

    def through(self, window: int, step: int, padding: int) -> View:
        """After a convolution or pool.

        Source: Araujo, Norris and Sim, "Computing receptive fields of convolutional neural
        networks", Distill 2019: size += (window - 1) * stride, stride *= step.
        """
        return View(
            self.start - padding * self.stride,
            self.size + (window - 1) * self.stride,
            self.stride * step,
        )

    def of_all(self, outputs: tuple[int, ...], pixels: tuple[int, ...]) -> View:
        """What all ``outputs`` together see of the image's ``pixels``, along the longer axis."""
        start = max(self.start, 0)
        ends = [self.start + (n - 1) * self.stride + self.size for n in outputs]
        size = max(min(end, limit) for end, limit in zip(ends, pixels, strict=True)) - start
        return View(start, size, stride=0)


_UNKNOWN = View(0, 0, 0)


def layer_table(model: nn.Module, image_shape: ImageShape, batch_size: int) -> list[LayerRow]:
    """A row for each layer of ``model``, for images ``(H, W, C)``; nothing is computed.

    Raises:
        UsageError: some parameters are in layers that no ``nn.Sequential`` runs.
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    layers = jax.eval_shape(lambda v, x: trace_layers(model, v, x), variables, images)
    view, size = View(), image_shape[:2]
    rows = []
    for layer in layers:
        if layer.input.shape[1:-1] != size:  # a separate branch, such as a strided shortcut
            view = _UNKNOWN
        size = layer.output.shape[1:-1]
        leaves = params_of(variables, layer.name)
        view = _view_after(layer, view, leaves, image_shape)
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                output_shape=layer.output.shape,
                params=sum(math.prod(leaf.shape) for leaf in leaves.values()),
                arithmetic=" + ".join(
                    "*".join(map(str, leaves[name].shape)) or "1"
                    for name in dict.fromkeys(("kernel", "scale", "bias", *leaves))
                    if name in leaves
                ),
                macs=_macs(layer, leaves),
                receptive_field=view.size,
                stride=view.stride,
                start=view.start,
                activation_bytes=_FLOAT_BYTES * math.prod(layer.output.shape),
            )
        )
    listed = sum(row.params for row in rows)
    there = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    if listed != there:
        raise UsageError(
            f"the layers of {type(model).__name__} cannot be listed: {there - listed:,} of its "
            f"{there:,} parameters are in layers that no nn.Sequential runs",
            fix="let nn.Sequential run them, in its blocks too, as in networks/models.py",
        )
    return rows


def _view_after(layer: Layer, view: View, leaves: dict[str, Any], image_shape: ImageShape) -> View:
    """What the outputs of ``layer`` see, if its inputs see ``view``.

    Unknown if the layer changes the size of the image in another way than those handled here.
    """
    if not view.stride:  # a single position, or unknown: unchanged
        return view
    if layer.kind == "conv":
        window = (leaves["kernel"].shape[0] - 1) * layer.dilation + 1
        padding = layer.padding
        if padding is None:  # "SAME", which pads the first edge less, or "VALID"
            spanned = (layer.output.shape[1] - 1) * layer.stride + window
            padding = max(0, spanned - layer.input.shape[1]) // 2
        return view.through(window, step=layer.stride, padding=padding)
    if layer.kind == "pool":
        return view.through(2, step=2, padding=0)  # an odd last pixel is dropped
    if layer.kind == "space_to_depth":
        side = layer.input.shape[1] // layer.output.shape[1]
        return view.through(side, step=side, padding=0)
    if layer.kind in ("global_pool", "flatten"):
        return view.of_all(layer.input.shape[1:3], image_shape[:2])
    if layer.output.shape[1:-1] != layer.input.shape[1:-1]:
        return _UNKNOWN
    return view


def _macs(layer: Layer, leaves: dict[str, Any]) -> int:
    """Multiply-accumulates: each weight of a kernel is used once per output position."""
    if "kernel" not in leaves:
        return 0
    positions = math.prod(layer.output.shape[1:-1])
    return positions * math.prod(leaves["kernel"].shape)
