from __future__ import annotations

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.config import ModelName, TrainConfig
from cifar_jax.errors import CifarJaxError
from cifar_jax.identify import identify
from cifar_jax.networks.models import MODELS, create_model

CNN_CONVS = (
    (3 * 3 * 3 * 16 + 16)  # 448: the tutorial's question 11
    + (3 * 3 * 16 * 32 + 32)
    + (3 * 3 * 32 * 64 + 64)
)
HEAD = (1024 * 512 + 512) + (512 * 256 + 256) + (256 * 10 + 10)
COUNTS = {
    "linear": 3072 * 10 + 10,
    "mlp": (3072 * 512 + 512) + (512 * 256 + 256) + (256 * 10 + 10),
    "cnn": CNN_CONVS + HEAD,
    "cnn-wide": (3 * 3 * 3 * 32 + 32)
    + (3 * 3 * 32 * 64 + 64)
    + (3 * 3 * 64 * 128 + 128)
    + (3 * 3 * 128 * 128 + 128)
    + (3 * 3 * 128 * 256 + 256)
    + (3 * 3 * 256 * 256 + 256)
    + (4096 * 1024 + 1024)
    + (1024 * 512 + 512)
    + (512 * 10 + 10),
    "cnn-gap": (3 * 3 * 3 * 32 + 32)
    + (3 * 3 * 32 * 64 + 64)
    + (3 * 3 * 64 * 128 + 128)
    + (128 * 10 + 10),
    # Each convolution has a batch norm's scale and bias instead of a bias of its own.
    "resnet9": (3 * 3 * 3 * 64 + 2 * 64)
    + (3 * 3 * 64 * 128 + 2 * 128)
    + 2 * (3 * 3 * 128 * 128 + 2 * 128)
    + (3 * 3 * 128 * 256 + 2 * 256)
    + (3 * 3 * 256 * 512 + 2 * 512)
    + 2 * (3 * 3 * 512 * 512 + 2 * 512)
    + 512 * 10,
    # As its author's has it.
    "airbench": (2 * 2 * 3 * 24 + 24)
    + (3 * 3 * 24 * 64 + 64)
    + (3 * 3 * 64 * 64 + 64)
    + (3 * 3 * 64 * 256 + 256)
    + 3 * (3 * 3 * 256 * 256 + 256)
    + 256 * 10,
}


def shapes_of(
    config: TrainConfig, image_shape: tuple[int, int, int], classes: int = 10
) -> typing.Any:
    model = create_model(config, classes)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits = jax.eval_shape(model.apply, variables, images)
    assert logits.shape == (2, classes)
    return variables


def count(variables: typing.Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


def test_the_options_name_the_zoo() -> None:
    assert tuple(MODELS) == typing.get_args(ModelName)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: typing.Any) -> None:
    assert count(shapes_of(TrainConfig(model=name), (32, 32, 3))) == COUNTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_channels_and_classes_follow_the_data(name: typing.Any) -> None:
    shapes_of(TrainConfig(model=name), (28, 28, 1), classes=3)


def test_the_parts_of_the_tutorials_network() -> None:
    params = shapes_of(TrainConfig(), (32, 32, 3))["params"]
    assert {name: leaf["kernel"].shape for name, leaf in params.items()} == {
        "Conv_0": (3, 3, 3, 16),
        "Conv_1": (3, 3, 16, 32),
        "Conv_2": (3, 3, 32, 64),
        "Dense_0": (64 * 4 * 4, 512),
        "Dense_1": (512, 256),
        "Dense_2": (256, 10),
    }


def test_widths_and_hidden_replace_the_models_own() -> None:
    params = shapes_of(TrainConfig(widths=(4, 8), hidden=(7,)), (32, 32, 3))["params"]
    assert params["Conv_1"]["kernel"].shape == (3, 3, 4, 8)
    assert params["Dense_0"]["kernel"].shape == (8 * 8 * 8, 7)
    assert set(params) == {"Conv_0", "Conv_1", "Dense_0", "Dense_1"}


def test_batch_norm_normalises_in_training_and_remembers_for_evaluation() -> None:
    model = create_model(TrainConfig(batch_norm=True, widths=(4,), hidden=()), 10)
    x = np.random.default_rng(0).normal(5, 3, (64, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    conv = variables["params"]["Conv_0"]
    y = jax.lax.conv_general_dilated(
        x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = updated["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * y.mean(axis=(0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var(axis=(0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(model="mlp", hidden=(256,), dropout=0.25),
        TrainConfig(model="resnet9", widths=(4, 4, 4, 256), dropout=0.25),
    ],
    ids=["mlp", "resnet9"],
)
def test_dropout_acts_in_training_only(config: TrainConfig) -> None:
    """On a quarter of the 256 numbers that the last Dense layer reads."""
    model = create_model(config, 10)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    @jax.vmap
    def train(key: jax.Array) -> tuple[jax.Array, typing.Any]:
        return model.apply(
            variables,
            x,
            train=True,
            rngs={"dropout": key},
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )

    evaluate = jax.jit(model.apply)
    logits, captured = train(jax.random.split(jax.random.key(0), 8))
    assert not np.allclose(logits[0], logits[1])
    assert np.array_equal(evaluate(variables, x), evaluate(variables, x))
    kept = np.asarray(captured["intermediates"]["Dropout_0"]["__call__"][0]) != 0
    assert kept.shape == (8, 4, 256)
    active = kept.any(axis=0)  # the others are zeros of a ReLU
    assert kept[:, active].mean() == pytest.approx(0.75, abs=0.03)


def test_a_network_of_ones_own_has_the_options_that_it_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the README tells how to add one."""

    class Own(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
            return nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(self.num_classes)])(x)

    monkeypatch.setitem(MODELS, "cnn", Own)
    assert count(shapes_of(TrainConfig(), (8, 8, 3))) == 3 * 10 + 10
    with pytest.raises(CifarJaxError, match=r"--widths with --model cnn, .* no field widths\."):
        create_model(TrainConfig(widths=(4,)), 10)
    with pytest.raises(CifarJaxError, match="--dtype with --model cnn"):
        create_model(TrainConfig(), 10, dtype=jnp.bfloat16)
    # Files of the others are still recognised.
    tensors = {"network.1.weight": np.zeros((10, 3072)), "network.1.bias": np.zeros(10)}
    assert identify(tensors).config.model == "linear"
    with pytest.raises(CifarJaxError, match=r"Own has no torch_layout with .* Fix: write one"):
        identify(tensors, model="cnn")


@pytest.mark.parametrize("name", ["cnn", "linear", "cnn-wide"])
def test_another_image_size_is_explained(name: typing.Any) -> None:
    variables = shapes_of(TrainConfig(model=name), (16, 16, 3))
    model = create_model(TrainConfig(model=name), 10)
    images = jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32)
    with pytest.raises(CifarJaxError, match=r"takes one image size.*Fix: .*cnn-gap"):
        jax.eval_shape(model.apply, variables, images)


@pytest.mark.parametrize("name", ["cnn-gap", "resnet9", "airbench"])
def test_some_networks_take_any_image_size(name: typing.Any) -> None:
    variables = shapes_of(TrainConfig(model=name), (16, 16, 3))
    model = create_model(TrainConfig(model=name), 10)
    images = jax.ShapeDtypeStruct((1, 24, 20, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (1, 10)


def test_images_that_are_not_of_whole_squares_are_an_error() -> None:
    config = TrainConfig(model="cnn-gap", patch_size=3)
    with pytest.raises(CifarJaxError, match=r"32x32 pixels cannot be cut into .* 3\. Fix: resize"):
        shapes_of(config, (32, 32, 3))
