"""What the table says of each layer, against the network itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_layout import random_variables

from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.layer_table import LayerRow, layer_table
from cifar_jax.networks.layers import trace_layers
from cifar_jax.networks.models import MODELS, create_model

CONFIGS = {name: TrainConfig(model=name) for name in MODELS} | {  # type: ignore[arg-type]
    "cnn with options": TrainConfig(model="cnn", batch_norm=True, dropout=0.1, widths=(5, 7)),
    "patches": TrainConfig(model="cnn-gap", patch_size=2, widths=(4, 4)),
}
# What an output sees does not depend on the widths.
NARROW = {
    "linear": TrainConfig(model="linear"),
    "mlp": TrainConfig(model="mlp", hidden=(3,)),
    "cnn": TrainConfig(model="cnn", widths=(4, 4, 4), hidden=(4,)),
    "cnn-wide": TrainConfig(model="cnn-wide", widths=(4, 4, 4, 4, 4, 4), hidden=(4,)),
    "cnn-gap": TrainConfig(model="cnn-gap", widths=(4, 4, 4)),
    "resnet9": TrainConfig(model="resnet9", widths=(4, 4, 4, 4)),
    "airbench": TrainConfig(model="airbench", widths=(4, 4)),
    "patches": TrainConfig(model="cnn-gap", patch_size=2, widths=(4, 4)),
}

# An odd side too, of which a pool leaves out the last; patches would not fit into it.
SIZES = [(name, size) for name in CONFIGS for size in (32, 38 if name == "patches" else 37)]


def rows_by_name(rows: list[LayerRow]) -> dict[str, LayerRow]:
    return {row.name: row for row in rows}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_parameters_and_shapes_are_those_of_the_network(name: str, size: int) -> None:
    model = create_model(CONFIGS[name], 10)
    rows = layer_table(model, (size, size, 3), batch_size=2)
    images = np.zeros((2, size, size, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = {
        layer: sum(math.prod(leaf.shape) for leaf in leaves.values())
        for layer, leaves in variables["params"].items()
    }
    assert {row.name: row.params for row in rows if row.params} == counted
    for row in rows:
        if row.params:
            terms = [math.prod(map(int, t.split("*"))) for t in row.arithmetic.split(" + ")]
            assert sum(terms) == row.params

    _, captured = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]),
        variables,
        images,
    )
    table = rows_by_name(rows)
    for layer in counted:
        output = captured["intermediates"][layer]["__call__"][0]
        assert table[layer].output_shape == output.shape
        assert table[layer].activation_bytes == 4 * output.size
    assert rows[-1].output_shape == (2, 10)


def test_the_tutorials_network_by_hand() -> None:
    rows = rows_by_name(layer_table(create_model(TrainConfig(model="cnn"), 10), (32, 32, 3), 1))
    assert dataclasses.astuple(rows["Conv_0"])[3:6] == (448, "3*3*3*16 + 16", 32 * 32 * 16 * 27)
    assert rows["Conv_1"].macs == 16 * 16 * 32 * 3 * 3 * 16
    assert rows["Dense_0"].params == 1024 * 512 + 512
    assert rows["Dense_0"].macs == 1024 * 512
    assert [(r.receptive_field, r.stride) for r in rows.values() if r.kind in ("conv", "pool")] == [
        (3, 1), (4, 2), (8, 2), (10, 4), (18, 4), (22, 8),
    ]  # fmt: skip


def test_a_pool_of_three_pixels_sees_two() -> None:
    model = create_model(TrainConfig(model="cnn", widths=(4, 4, 4, 4)), 10)
    pool = rows_by_name(layer_table(model, (24, 24, 3), 1))["pool_3"]  # 24, 12, 6, 3, 1
    assert (pool.receptive_field, pool.stride) == (46, 16)


class Changed(nn.Module):
    """As a reader may change the network: strides, dilation, layers that are not in the zoo."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        layers = [
            nn.Conv(4, (3, 3), strides=2, padding=1),
            nn.leaky_relu,
            nn.Conv(4, (3, 3), kernel_dilation=2, padding=2),
            nn.LayerNorm(),
            functools.partial(nn.leaky_relu, negative_slope=0.1),
            nn.Conv(4, (5, 5), strides=(3, 3), padding=0, feature_group_count=2),
        ]
        return nn.Sequential(layers)(x)


def test_strides_dilation_and_layers_of_a_readers_own() -> None:
    rows = layer_table(Changed(), (32, 32, 3), 1)
    # 3, then 2 * 2 * 2 more, then 4 * 2 more; padded by 1 pixel, then by 2 of 2 pixels.
    seen = [(row.kind, row.receptive_field, row.stride, row.start) for row in rows]
    # Each output of the last reads half of its input's channels.
    assert [row.macs for row in rows if row.kind == "conv"] == [
        16 * 16 * 4 * 3 * 3 * 3,
        16 * 16 * 4 * 3 * 3 * 4,
        4 * 4 * 4 * 5 * 5 * 2,
    ]
    assert seen == [
        ("conv", 3, 2, -1),
        ("leaky_relu", 3, 2, -1),
        ("conv", 11, 2, -5),
        ("LayerNorm", 11, 2, -5),
        ("partial", 11, 2, -5),
        ("conv", 19, 6, -5),
    ]


class Block(nn.Module):
    """As a reader may write one: a residual block with a stride in both of its branches."""

    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        branch = nn.Sequential([nn.Conv(4, (3, 3), strides), nn.relu, nn.Conv(4, (3, 3))])
        return branch(x) + nn.Sequential([nn.Conv(4, (1, 1), strides)])(x)


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Sequential([Block(1), Block(2), nn.Conv(4, (3, 3))])(x)


def test_blocks_of_a_readers_own() -> None:
    rows = layer_table(Blocks(), (32, 32, 3), 1)
    # What is behind two branches with strides is not known, and 0. "SAME" pads the strided
    # convolution of an even side below alone.
    assert [(row.name, row.params, row.receptive_field, row.start) for row in rows] == [
        ("Block_0/Conv_0", 3 * 3 * 3 * 4 + 4, 3, -1),
        ("relu_0", 0, 3, -1),
        ("Block_0/Conv_1", 3 * 3 * 4 * 4 + 4, 5, -2),
        ("Block_0/Conv_2", 3 * 4 + 4, 5, -2),
        ("Block_0", 0, 5, -2),
        ("Block_1/Conv_0", 3 * 3 * 4 * 4 + 4, 7, -2),
        ("relu_1", 0, 7, -2),
        ("Block_1/Conv_1", 3 * 3 * 4 * 4 + 4, 11, -4),
        ("Block_1/Conv_2", 4 * 4 + 4, 0, 0),
        ("Block_1", 0, 0, 0),
        ("Conv_0", 3 * 3 * 4 * 4 + 4, 0, 0),
    ]


def test_what_follows_a_change_of_size_that_is_not_known() -> None:
    def every_third(x: jax.Array) -> jax.Array:
        return x[:, ::3, ::3]

    (row,) = layer_table(nn.Sequential([every_third]), (9, 9, 3), 1)
    assert (row.receptive_field, row.stride) == (0, 0)


def test_layers_that_cannot_be_listed_are_an_error() -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
            return nn.Sequential([nn.Dense(2)])(nn.Conv(4, (3, 3))(x))

    with pytest.raises(CifarJaxError, match=r"of Plain .*: 112 of its 122 parameters .* Fix: let"):
        layer_table(Plain(), (8, 8, 3), 1)


@pytest.mark.parametrize(("name", "size"), [pair for pair in SIZES if pair[0] in NARROW])
def test_what_an_output_sees_is_where_its_gradient_is(name: str, size: int) -> None:
    """For the first, a middle and the last output of each layer, on a real gradient."""
    model = create_model(NARROW[name], 10)
    # All positive, so that no ReLU is in the way; several, so that each pixel wins some maximum.
    images = np.random.default_rng(0).random((16, size, size, 3), np.float32)
    drawn = random_variables(NARROW[name], (size, size, 3))
    variables = jax.tree.map(lambda x: abs(x) + 0.01, drawn)

    @jax.jit
    def pulled_back(images: Any, cotangents: Any) -> Any:
        def outputs(images: Any) -> list[Any]:
            return [layer.output for layer in trace_layers(model, variables, images)]

        (gradient,) = jax.vjp(outputs, images)[1](cotangents)
        return (gradient != 0).any(axis=(0, 3))  # [H, W]

    rows = layer_table(model, (size, size, 3), len(images))
    nothing = [np.zeros(row.output_shape, np.float32) for row in rows]
    for k, row in enumerate(rows):
        spatial = len(row.output_shape) == 4
        n = row.output_shape[1] if spatial else 1
        for i in sorted({0, n // 2, n - 1}):
            cotangents = list(nothing)
            cotangents[k] = nothing[k].copy()
            cotangents[k][(slice(None), i, n // 2) if spatial else ...] = 1
            seen = np.flatnonzero(pulled_back(images, cotangents).any(axis=1))
            first = row.start + i * row.stride
            last = first + row.receptive_field - 1
            assert (seen[0], seen[-1]) == (max(first, 0), min(last, size - 1)), (row, i)


@pytest.mark.parametrize("name", NARROW)
def test_every_layer_is_traced_and_the_last_gives_the_logits(name: str) -> None:
    model = create_model(NARROW[name], 10)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = random_variables(NARROW[name], (16, 16, 3))
    both = jax.jit(lambda v, x: (trace_layers(model, v, x), model.apply(v, x)))
    layers, logits = both(variables, images)
    np.testing.assert_allclose(layers[-1].output, logits, rtol=1e-5)
    assert len({layer.name for layer in layers}) == len(layers)
    for before, after in itertools.pairwise(layers):
        if after.kind != "add":  # whose input is that of its branch
            np.testing.assert_array_equal(after.input, before.output)
