"""Layouts: against the definition, index by index, and against PyTorch's own modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cifar_jax import layout, torch_reference
from cifar_jax.config import TrainConfig
from cifar_jax.networks.models import create_model, space_to_depth

# Every model with every option that changes its layers. The images are oblong, so that a height
# taken for a width shows; one has odd sides, of which pooling drops the last row or column.
CASES: dict[str, tuple[TrainConfig, tuple[int, int, int]]] = {
    "the tutorial's": (TrainConfig(), (32, 32, 3)),
    "linear": (TrainConfig(model="linear"), (4, 6, 3)),
    "mlp": (TrainConfig(model="mlp", hidden=(16, 8)), (4, 6, 3)),
    "mlp greyscale dropout": (TrainConfig(model="mlp", hidden=(16, 8), dropout=0.5), (4, 6, 1)),
    "cnn": (TrainConfig(widths=(4, 8), hidden=(16,)), (8, 12, 3)),
    "cnn odd": (TrainConfig(widths=(4, 8), hidden=(16,)), (9, 7, 3)),
    "cnn greyscale": (TrainConfig(widths=(4, 8), hidden=(16,)), (8, 12, 1)),
    "cnn batch norm": (TrainConfig(widths=(4, 8), hidden=(16,), batch_norm=True), (8, 12, 3)),
    "cnn batch norm dropout": (
        TrainConfig(widths=(4, 8), hidden=(16, 8), batch_norm=True, dropout=0.5),
        (8, 12, 3),
    ),
    "cnn-wide": (TrainConfig(model="cnn-wide", widths=(4, 6, 8, 8), hidden=(16,)), (8, 12, 3)),
    "cnn-wide batch norm": (
        TrainConfig(model="cnn-wide", widths=(4, 6, 8, 8), hidden=(16,), batch_norm=True),
        (8, 12, 3),
    ),
    "cnn-gap": (TrainConfig(model="cnn-gap", widths=(4, 8)), (48, 48, 3)),
    "cnn-gap greyscale": (TrainConfig(model="cnn-gap", widths=(4, 8)), (48, 48, 1)),
    # In colour: of one channel of noise, the gradient of the first norm's bias cancels to 1 in 700.
    "cnn-gap batch norm": (
        TrainConfig(model="cnn-gap", widths=(4, 8), batch_norm=True),
        (48, 48, 3),
    ),
    "cnn-gap patches": (
        TrainConfig(model="cnn-gap", widths=(4, 8), patch_size=2, batch_norm=True),
        (48, 48, 3),
    ),
    "cnn patches greyscale": (TrainConfig(widths=(4, 8), hidden=(16,), patch_size=2), (16, 8, 1)),
    "resnet9": (TrainConfig(model="resnet9", widths=(4, 6, 8, 8)), (16, 24, 3)),
    "resnet9 greyscale dropout": (
        TrainConfig(model="resnet9", widths=(4, 6, 8, 8), dropout=0.5),
        (16, 24, 1),
    ),
    # Once odd and once even where a pool comes.
    "airbench": (TrainConfig(model="airbench", widths=(4, 6)), (12, 10, 3)),
    "airbench greyscale": (TrainConfig(model="airbench", widths=(6, 4)), (11, 14, 1)),
}


def random_variables(
    config: TrainConfig, image_shape: tuple[int, int, int], dtype: Any = np.float32
) -> layout.Variables:
    """Weights of the size of initial ones, and no bias, scale or statistic at its trivial value."""
    model = create_model(config, 10)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> NDArray[Any]:
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            value = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif path[-1].key in ("scale", "var"):
            value = np.exp(0.1 * noise)
        else:
            value = 0.1 * noise
        return value.astype(dtype)

    variables: layout.Variables = {"batch_stats": {}, **shapes}
    return jax.tree_util.tree_map_with_path(draw, variables)


def assert_same_trees(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_pixel_keeps_its_place() -> None:
    images = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # [B, H, W, C]
    nchw = layout.nhwc_to_nchw(images)
    assert nchw.shape == (2, 5, 3, 4)
    assert nchw[1, 4, 2, 3] == images[1, 2, 3, 4]
    assert nchw[0, 1, 2, 0] == images[0, 2, 0, 1]
    np.testing.assert_array_equal(layout.nchw_to_nhwc(nchw), images)


def test_a_kernel_element_keeps_its_place() -> None:
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # [H, W, I, O]
    oihw = layout.hwio_to_oihw(kernel)
    assert oihw.shape == (5, 4, 2, 3)
    assert oihw[4, 3, 1, 2] == kernel[1, 2, 3, 4]
    assert oihw[0, 2, 1, 0] == kernel[1, 0, 2, 0]
    np.testing.assert_array_equal(layout.oihw_to_hwio(oihw), kernel)


def test_a_dense_kernel_is_transposed() -> None:
    kernel = np.arange(6).reshape(2, 3)  # [I, O]
    np.testing.assert_array_equal(layout.dense_to_torch(kernel), [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(layout.dense_from_torch(layout.dense_to_torch(kernel)), kernel)


def test_rows_after_a_flatten_go_where_the_other_flatten_puts_their_input() -> None:
    """The kernel that copies its input: its column names the place in one order, its row in the
    other, so multiplying by it reorders a flattened image.
    """
    shape = (2, 3, 4)  # H, W, C
    image = np.arange(24).reshape(1, *shape)
    hwc, chw = image.ravel(), layout.nhwc_to_nchw(image).ravel()
    assert chw[:7].tolist() == [0, 4, 8, 12, 16, 20, 1]
    weight = layout.dense_to_torch(np.eye(24, dtype=int), shape)
    np.testing.assert_array_equal(weight @ chw, hwc)
    np.testing.assert_array_equal(layout.dense_from_torch(weight, shape), np.eye(24, dtype=int))
    # By hand: what Flax reads at h=1, w=2, c=3 comes in PyTorch at channel 3, row 1, column 2.
    assert weight[:, 3 * 6 + 1 * 3 + 2].argmax() == (1 * 3 + 2) * 4 + 3


def test_results_lie_in_memory_in_their_own_order() -> None:
    """A view with strides would be written to files such as safetensors in the old order."""
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    results = [
        layout.nhwc_to_nchw(x),
        layout.nchw_to_nhwc(x),
        layout.hwio_to_oihw(x),
        layout.oihw_to_hwio(x),
        layout.dense_to_torch(x.reshape(24, 5)),
        layout.dense_to_torch(x.reshape(24, 5), (2, 3, 4)),
        layout.dense_from_torch(x.reshape(5, 24)),
        layout.dense_from_torch(x.reshape(5, 24), (2, 3, 4)),
    ]
    assert all(result.flags.c_contiguous for result in results)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("config", "image_shape"), CASES.values(), ids=CASES)
def test_round_trips_are_exact(
    config: TrainConfig, image_shape: tuple[int, int, int], dtype: Any
) -> None:
    """Through a PyTorch module too, whose ``state_dict`` has what ours has, and nothing else."""
    variables = random_variables(config, image_shape, dtype)
    model = create_model(config, 10)
    torch_layout = model.torch_layout(image_shape)
    state_dict = layout.to_torch(variables, torch_layout)
    assert all(array.flags.c_contiguous for array in state_dict.values())
    assert_same_trees(layout.from_torch(state_dict, torch_layout), variables)

    twin = torch_reference.make_twin(model, image_shape)
    initial = twin.state_dict()
    assert {n: a.shape for n, a in state_dict.items()} == {n: t.shape for n, t in initial.items()}
    torch_reference.load(twin, state_dict)
    loaded = torch_reference.state_dict_of(twin)
    assert_same_trees(state_dict, loaded)
    assert_same_trees(
        layout.to_torch(layout.from_torch(loaded, torch_layout), torch_layout), loaded
    )


def test_the_tutorials_names() -> None:
    names = create_model(TrainConfig(), 10).torch_layout((32, 32, 3)).names
    assert names == {
        "Conv_0": "network.0",  # Conv2d, ReLU, MaxPool2d
        "Conv_1": "network.3",
        "Conv_2": "network.6",
        "Dense_0": "network.10",  # after Flatten
        "Dense_1": "network.12",
        "Dense_2": "network.14",
    }


def test_the_norms_of_airbench_are_its_authors() -> None:
    """Both frameworks take the numbers from one place, so parity does not tell."""
    config, image_shape = CASES["airbench"]
    twin = torch_reference.make_twin(create_model(config, 10), image_shape)
    norm = twin.get_submodule("layers.2.norm1")
    assert (norm.momentum, norm.eps) == (pytest.approx(0.4), 1e-12)


def test_a_state_dict_without_a_layer_is_refused() -> None:
    config, image_shape = CASES["cnn batch norm"]
    torch_layout = create_model(config, 10).torch_layout(image_shape)
    state_dict = layout.to_torch(random_variables(config, image_shape), torch_layout)
    without = {name: a for name, a in state_dict.items() if not name.startswith("network.4.")}
    with pytest.raises(KeyError, match=r"network\.4"):
        layout.from_torch(without, torch_layout)


def test_running_variance_is_that_of_pytorchs_batch_norm() -> None:
    """Flax's average over batches of the variance divided by n, kept here by hand."""
    rng = np.random.default_rng(0)
    norm = torch.nn.BatchNorm2d(5, dtype=torch.float64).train()
    start = rng.uniform(0.5, 2, 5)
    norm.running_var.copy_(torch.from_numpy(start))
    flax = start
    for steps in range(1, 6):
        batch = rng.normal(1, 2, (2, 5, 3, 4))
        norm(torch.from_numpy(batch))
        flax = 0.9 * flax + 0.1 * batch.var(axis=(0, 2, 3))
        ours = layout.torch_running_variance(
            flax, momentum=0.9, start=start, n=2 * 3 * 4, steps=steps
        )
        np.testing.assert_allclose(ours, norm.running_var, rtol=1e-14)
        assert not np.allclose(flax, norm.running_var, rtol=1e-3)  # the factor is seen


@pytest.mark.parametrize("case", ["cnn batch norm", "resnet9"])
def test_a_bias_before_a_batch_norm_can_be_folded_into_it(case: str) -> None:
    """From the tutorials' module, with its bias, to ours: the same logits in evaluation."""
    config, image_shape = CASES[case]
    model = create_model(config, 10)
    torch_layout = model.torch_layout(image_shape)
    variables = random_variables(config, image_shape, np.float64)
    rng = np.random.default_rng(1)
    state_dict = layout.to_torch(variables, torch_layout)
    with_biases = torch_reference.make_twin(model, image_shape)
    for layer, name in torch_layout.names.items():
        if layer.startswith("Conv"):
            bias = rng.normal(size=variables["params"][layer]["kernel"].shape[-1])
            state_dict[f"{name}.bias"] = bias
            with_biases.get_submodule(name).bias = torch.nn.Parameter(torch.from_numpy(bias))
    torch_reference.load(with_biases, state_dict)

    folded = layout.fold_bias_into_batch_norm(state_dict, torch_layout)
    twin = torch_reference.make_twin(model, image_shape)
    torch_reference.load(twin, folded)  # strict: refuses a bias that is left
    images = rng.normal(size=(4, image_shape[2], *image_shape[:2]))
    expected = torch_reference.logits(with_biases, images)
    np.testing.assert_allclose(torch_reference.logits(twin, images), expected, rtol=1e-12)
    torch_reference.load(twin, layout.to_torch(variables, torch_layout))
    assert not np.allclose(torch_reference.logits(twin, images), expected, rtol=1e-2)


def test_folding_leaves_other_biases_alone() -> None:
    config, image_shape = CASES["cnn batch norm"]
    plain = dataclasses.replace(config, batch_norm=False)
    for c in (config, plain):
        torch_layout = create_model(c, 10).torch_layout(image_shape)
        state_dict = layout.to_torch(random_variables(c, image_shape), torch_layout)
        assert_same_trees(layout.fold_bias_into_batch_norm(state_dict, torch_layout), state_dict)


def test_squares_of_pixels_become_channels_as_in_pytorch() -> None:
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    ours = np.asarray(space_to_depth(jnp.asarray(images), 2))
    theirs = torch.nn.PixelUnshuffle(2)(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(ours, theirs.permute(0, 2, 3, 1))
