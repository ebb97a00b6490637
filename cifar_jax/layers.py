"""A network seen from inside: what each of its layers gives, ReLU, pooling and flatten too."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import flax.linen as nn
import jax

from cifar_jax.train_step import Variables

ACTIVATIONS = ("relu", "gelu")

# The layers of models.py, by the names of their classes and functions.
_KINDS = {
    "_space_to_depth": "space_to_depth",
    "Conv": "conv",
    "Whitening": "conv",
    "BatchNorm": "batch_norm",
    "relu": "relu",
    "gelu": "gelu",
    "max_pool": "pool",
    "global_max_pool": "global_pool",
    "global_average_pool": "global_pool",
    "_checked_flatten": "flatten",
    "Dense": "dense",
    "Dropout": "dropout",
    "add": "add",
    "scale": "scale",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer at work.

    Attributes:
        name: Flax's, as in ``variables["params"]``; of a plain function, its kind and number.
        kind: ``space_to_depth``, ``conv``, ``batch_norm``, ``relu``, ``gelu``, ``pool``,
            ``global_pool``, ``flatten``, ``dense``, ``dropout``, ``add`` (the end of a residual
            block), ``scale``.
        input, output: ``[B, H, W, C]`` or ``[B, F]``; under ``jax.eval_shape``, only their shapes.
    """

    name: str
    kind: str
    input: Any
    output: Any


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
            if isinstance(layer, nn.Module):
                kind, name = _KINDS[type(layer).__name__], str(layer.name)
            else:
                kind = _KINDS[layer.__name__]
                name = f"{kind}_{unnamed[kind]}"
                unnamed[kind] += 1
            output = layer(x)
            traced.append(Layer(name, kind, x, output))
            x = output
        return x

    with nn.intercept_methods(intercept):
        model.apply(variables, images, train=False)
    return traced


jax.tree_util.register_dataclass(Layer, ["input", "output"], ["name", "kind"])
