"""A network from inside: the output of each layer, including ReLU, pooling and flatten."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from cifar_jax.layout import Variables

ACTIVATIONS = ("relu", "gelu", "silu", "leaky_relu")

# What the layers of models.py and airbench.py are called, if not by their class or function.
_KINDS = {
    "_space_to_depth": "space_to_depth",
    "Conv": "conv",
    "Whitening": "conv",
    "BatchNorm": "batch_norm",
    "max_pool": "pool",
    "global_max_pool": "global_pool",
    "global_average_pool": "global_pool",
    "_checked_flatten": "flatten",
    "Dense": "dense",
    "Dropout": "dropout",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, as it was applied.

    Attributes:
        name: Flax's path in ``variables["params"]``, such as ``Block_0/Conv_0``; for a plain
            function, its kind and number.
        kind: ``space_to_depth``, ``conv``, ``batch_norm``, ``relu``, ``gelu``, ``pool``,
            ``global_pool``, ``flatten``, ``dense``, ``dropout``, ``add`` (the end of a residual
            block), ``scale``; for any other layer, the name of its class or function.
        input, output: ``[B, H, W, C]`` or ``[B, F]``; under ``jax.eval_shape``, only their shapes.
        stride, dilation, padding: of a convolution, along the image's first axis; the padding is
            that before the first row, None if the layer does not give it as a number.
    """

    name: str
    kind: str
    input: Any
    output: Any
    stride: int = 1
    dilation: int = 1
    padding: int | None = None


def trace_layers(model: nn.Module, variables: Variables, images: Any) -> list[Layer]:
    """Each layer of ``model`` in evaluation mode, in the order of the computation.

    Pure, so that it can be jitted, differentiated, or run on shapes alone.

    Args:
        images: normalised, ``[B, H, W, C]``.
    """
    traced: list[Layer] = []
    unnamed: collections.Counter[str] = collections.Counter()

    def intercept(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, nn.Sequential):
            return run(*args, **kwargs)
        (x,) = args
        for layer in context.module.layers:
            called = getattr(layer, "__name__", type(layer).__name__)
            kind = _KINDS.get(called, called)
            if isinstance(layer, nn.Module):
                name = "/".join(layer.path)
            else:
                name = f"{kind}_{unnamed[kind]}"
                unnamed[kind] += 1
            output = layer(x)
            stride, dilation, padding = (
                _first(getattr(layer, option, None))
                for option in ("strides", "kernel_dilation", "padding")
            )
            traced.append(Layer(name, kind, x, output, stride or 1, dilation or 1, padding))
            x = output
        return x

    with nn.intercept_methods(intercept):
        model.apply(variables, images, train=False)
    return traced


def params_of(variables: Variables, name: str) -> dict[str, Any]:
    """The parameters of the layer called ``name``, without those of layers inside it."""
    params = variables.get("params", {})
    for part in name.split("/"):
        params = params.get(part, {})
    return {key: leaf for key, leaf in params.items() if not isinstance(leaf, dict)}


def _first(option: Any) -> int | None:
    """The first number in an option of ``nn.Conv``; None if it is not given in numbers.

    Such an option is one number, or a number or a pair for each axis.
    """
    while isinstance(option, Sequence) and not isinstance(option, str):
        option = option[0]
    return option if isinstance(option, int) else None


jax.tree_util.register_dataclass(
    Layer, ["input", "output"], ["name", "kind", "stride", "dilation", "padding"]
)
