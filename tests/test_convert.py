"""Real files in both directions, and what becomes of bad ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import CIFAR10_NAMES
from torch import nn

from cifar_jax.checkpoints import trained
from cifar_jax.checkpoints.checkpoint import tree_sha256
from cifar_jax.config import TrainConfig
from cifar_jax.convert import ConvertOptions, convert, main
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.identify import identify, variables_of
from cifar_jax.networks.models import create_model
from cifar_jax.state_dicts import read_state_dict, write_state_dict
from cifar_jax.torch_reference import make_twin

ZOO = {
    "linear": TrainConfig(model="linear"),
    "mlp": TrainConfig(model="mlp", hidden=(6, 5)),
    "mlp-dropout": TrainConfig(model="mlp", hidden=(6, 5), dropout=0.5),
    "cnn": TrainConfig(model="cnn", widths=(4, 5, 6), hidden=(7,)),
    "cnn-dropout": TrainConfig(model="cnn", widths=(4, 5, 6), hidden=(7,), dropout=0.5),
    "cnn-norm": TrainConfig(model="cnn", widths=(4, 5), hidden=(7, 3), batch_norm=True),
    "cnn-both": TrainConfig(
        model="cnn", widths=(4, 5, 6), hidden=(7,), batch_norm=True, dropout=0.5
    ),
    "cnn-own": TrainConfig(model="cnn"),
    "cnn-wide": TrainConfig(model="cnn-wide", widths=(4, 5, 6), hidden=(7,)),
    "cnn-wide-both": TrainConfig(
        model="cnn-wide", widths=(2, 3, 4, 5, 6, 7), hidden=(8, 9), batch_norm=True, dropout=0.5
    ),
    "cnn-gap": TrainConfig(model="cnn-gap", widths=(4, 5, 6)),
    "cnn-gap-norm": TrainConfig(model="cnn-gap", widths=(4, 5), batch_norm=True),
    "patches": TrainConfig(model="cnn-gap", widths=(4, 5), patch_size=2, batch_norm=True),
    "patches-flat": TrainConfig(model="cnn", widths=(4,), hidden=(7,), patch_size=2),
    "large-patches": TrainConfig(model="cnn", widths=(4,), hidden=(7,), patch_size=4),
    "cnn-gap-hidden": TrainConfig(model="cnn-gap", widths=(4,), hidden=(6,), dropout=0.5),
    "resnet9": TrainConfig(model="resnet9", widths=(2, 3, 4, 5)),
    "airbench": TrainConfig(model="airbench", widths=(3, 5, 4)),
    "airbench-two": TrainConfig(model="airbench", widths=(3, 5)),
}


class Tutorial(nn.Module):
    """As the tutorial's reader writes it; a batch norm makes the convolutions' biases useless."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()

        def block(channels: int, features: int) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1)]
            layers += [nn.BatchNorm2d(features)] if norm else []
            return [*layers, nn.ReLU(), nn.MaxPool2d(2, 2)]

        self.network = nn.Sequential(
            *block(3, 4),
            *block(4, 6),
            *block(6, 8),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )

    def forward(self, xb: torch.Tensor) -> torch.Tensor:
        return self.network(xb)


def random_state_dict(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers that no symmetry hides, and running statistics that are not at their start."""
    rng = np.random.default_rng(seed)
    fixed = [n for n, p in module.named_parameters() if "norm" in n and not p.requires_grad]
    return {
        name: torch.from_numpy(rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32))
        if tensor.is_floating_point() and name not in fixed
        else tensor
        for name, tensor in module.state_dict().items()
    }


def tutorial_state_dict(*, norm: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Tutorial(norm=norm)
    with torch.no_grad():
        module.train()(torch.randn(8, 3, 32, 32))
    return module.state_dict()


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.shape == b[name].shape
        assert torch.equal(tensor, b[name]), name


def refusal(
    source: Path, destination: Path, options: ConvertOptions | None = None
) -> CifarJaxError:
    """The one line with which a conversion is refused, which leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(CifarJaxError) as caught:
        convert(source, destination, options or ConvertOptions())
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize("name", ZOO)
def test_every_network_goes_there_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    config, image_shape = ZOO[name], (16, 16, 3)
    twin = make_twin(create_model(config, 7), image_shape)
    tensors = random_state_dict(twin)
    torch.save(tensors, tmp_path / "net.pth")
    options = ConvertOptions(image_size=image_shape[0])
    convert(tmp_path / "net.pth", tmp_path / "run", options)
    network = trained.load(tmp_path / "run")
    assert network.config == config
    assert network.image_shape == image_shape
    assert network.class_names == tuple(f"class {k}" for k in range(7))

    images = np.random.default_rng(1).normal(size=(3, *image_shape)).astype(np.float32)
    twin.load_state_dict(tensors)
    with torch.inference_mode():
        theirs = twin.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(network.model.apply)(network.variables, images)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()

    for last in ("back.pt", "net.safetensors"):
        convert(tmp_path / "run", tmp_path / last, ConvertOptions())
    assert_same_tensors(torch.load(tmp_path / "back.pt", weights_only=True), tensors)
    twin.load_state_dict(safetensors.torch.load_file(tmp_path / "net.safetensors"))
    assert_same_tensors(twin.state_dict(), tensors)


def test_a_scale_that_airbench_has_none_of_is_refused(tmp_path: Path) -> None:
    twin = make_twin(create_model(ZOO["airbench"], 10), (32, 32, 3))
    tensors = random_state_dict(twin)
    tensors["layers.2.norm1.weight"][1] = 1.5
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(CifarJaxError, match=r"layers\.2\.norm1\.weight .* is not all ones.*Fix: "):
        convert(tmp_path / "net.pth", tmp_path / "run", ConvertOptions())


@pytest.mark.parametrize("name", ZOO)
def test_a_network_of_usual_images_needs_no_option(name: str) -> None:
    config = ZOO[name]
    twin = make_twin(create_model(config, 10), (32, 32, 3))
    # Files keep no order of layers: here 'network.10' comes before 'network.2'.
    tensors = {n: t.numpy() for n, t in sorted(twin.state_dict().items()) if "num" not in n}
    assert identify(tensors) == (config, (32, 32, 3), 10)


def test_all_that_is_known_of_a_network_goes_through_safetensors(tmp_path: Path) -> None:
    config = TrainConfig(
        model="cnn-gap",
        widths=(4,),
        hidden=(5,),
        dropout=0.3,
        learning_rate=0.0123,
        data="/home/me",
        epochs=7,
    )
    network = trained.TrainedNetwork(config, ("ant", "bee"), (20, 30, 1), (0.1,), (1 / 3,), {})
    variables = jax.jit(network.model.init)(jax.random.key(0), np.zeros((1, 20, 30, 1)))
    variables = {"params": jax.device_get(variables["params"]), "batch_stats": {}}
    network = trained.TrainedNetwork(**{**vars(network), "variables": variables})
    trained.save(network, tmp_path / "a", source="test")
    convert(tmp_path / "a", tmp_path / "b.safetensors", ConvertOptions())
    assert b"/home/me" not in (tmp_path / "b.safetensors").read_bytes()
    convert(tmp_path / "b.safetensors", tmp_path / "c", ConvertOptions())
    back = trained.load(tmp_path / "c")
    assert back.config == TrainConfig(**{**vars(config), "data": "auto"})
    for field in ("class_names", "image_shape", "mean", "std"):
        assert getattr(back, field) == getattr(network, field)
    assert tree_sha256(back.variables) == tree_sha256(variables)
    error = refusal(tmp_path / "a", tmp_path / "d", ConvertOptions(classes=("x", "y")))
    assert error.exit_code == ExitCode.USAGE
    assert "--classes with" in str(error)


@pytest.mark.parametrize("norm", [False, True])
def test_the_tutorials_file_gives_the_same_logits(
    tmp_path: Path, norm: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a convolution has a bias that the batch norm after it subtracts."""
    tensors = tutorial_state_dict(norm=norm)
    torch.save(tensors, tmp_path / "cifar10-cnn.pth")
    convert(tmp_path / "cifar10-cnn.pth", tmp_path / "net.safetensors", ConvertOptions())
    convert(tmp_path / "net.safetensors", tmp_path / "run", ConvertOptions())
    assert capsys.readouterr().out.count("convolutions bias=False") == norm
    network = trained.load(tmp_path / "run")
    assert network.config == TrainConfig(widths=(4, 6, 8), hidden=(16,), batch_norm=norm)
    assert network.class_names == tuple(CIFAR10_NAMES)
    assert (network.mean, network.std) == ((0.0,) * 3, (1.0,) * 3)

    module = Tutorial(norm=norm).eval()
    module.load_state_dict(tensors)
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    with torch.inference_mode():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(network.model.apply)(network.variables, images)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def as_data_parallel(tensors: dict[str, Any]) -> Any:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def as_compiled(tensors: dict[str, Any]) -> Any:
    return {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()}


def as_bare_sequential(tensors: dict[str, Any]) -> Any:
    return {name.removeprefix("network."): tensor for name, tensor in tensors.items()}


def as_other_attribute(tensors: dict[str, Any]) -> Any:
    return {name.replace("network.", "layers."): tensor for name, tensor in tensors.items()}


def as_parameters(tensors: dict[str, Any]) -> Any:
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def with_an_optimizer(tensors: dict[str, Any]) -> Any:
    return {"epoch": 3, "loss": 0.5, "model_state_dict": tensors, "optimizer": {"state": {}}}


@pytest.mark.parametrize(
    "spelled",
    [
        as_data_parallel, as_compiled, as_bare_sequential, as_other_attribute, as_parameters,
        with_an_optimizer,
        lambda tensors: {"state_dict": as_data_parallel(tensors)},
        lambda tensors: {"model": tensors},
        lambda tensors: {"net": tensors, "acc": 90.0, "epoch": 3},
        lambda tensors: {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
                         for n, t in tensors.items()},
        lambda tensors: {n: t.double() for n, t in tensors.items()},
    ],
)  # fmt: skip
def test_other_spellings_of_the_same_file(tmp_path: Path, spelled: Any) -> None:
    tensors = tutorial_state_dict()
    torch.save(spelled(tensors), tmp_path / "net.pth")
    read, _ = read_state_dict(tmp_path / "net.pth")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == np.float32
        assert np.array_equal(read[name], tensor.numpy())


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype, ending: str) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tutorial_state_dict().items()}
    path = tmp_path / f"net{ending}"
    if ending == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    read, _ = read_state_dict(path)
    for name, tensor in tensors.items():
        assert read[name].dtype == np.float32
        assert np.array_equal(read[name], tensor.float().numpy())


def test_a_linear_model_keeps_its_name(tmp_path: Path) -> None:
    """Of two tensors all names begin with 'network.1', which is the layer and no wrapper."""
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).state_dict(), tmp_path / "a.pth")
    tensors, _ = read_state_dict(tmp_path / "a.pth")
    assert identify(tensors) == (TrainConfig(model="linear"), (28, 28, 1), 10)


@pytest.mark.parametrize("name", ["patches-flat", "large-patches"])
def test_patches_of_grey_images_are_not_taken_for_channels(name: str) -> None:
    twin = make_twin(create_model(ZOO[name], 10), (32, 32, 1))
    tensors = {n: t.numpy() for n, t in twin.state_dict().items()}
    assert identify(tensors) == (ZOO[name], (32, 32, 1), 10)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "kernel",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2).transpose(3, 2, 1, 0),
        np.arange(48, dtype=np.float32).reshape(4, 12)[:, ::2],
        np.arange(24, dtype=np.float32).reshape(4, 6)[::-1],
        np.broadcast_to(np.float32(3), (4, 5)),
        np.float32(2).reshape(()),
    ],
    ids=["transposed", "strided", "reversed", "broadcast", "scalar"],
)
def test_memory_order_does_not_matter(tmp_path: Path, kernel: Any, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    write_state_dict(path, {"a.weight": kernel, "b.weight": kernel}, {})
    load = safetensors.torch.load_file if ending == ".safetensors" else torch.load
    found = load(path)["b.weight"]
    assert found.shape == kernel.shape
    assert np.array_equal(found.numpy(), kernel)


@pytest.mark.fault("D18")
def test_missing_extra_and_mis_shaped_tensors_are_listed(tmp_path: Path) -> None:
    tensors = tutorial_state_dict()
    tensors["network.3.bias"] = torch.zeros(7)
    del tensors["network.0.bias"], tensors["network.12.bias"]
    tensors["classes.weight"] = torch.zeros(2, 3, 4)
    torch.save(tensors, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run", ConvertOptions(model="cnn"))
    assert error.exit_code == ExitCode.CHECKPOINT
    assert (
        f"tensors in {tmp_path / 'net.pth'} are not those of cnn: missing: network.0.bias [4], "
        "network.12.bias [10]; "
        "extra: classes.weight [2, 3, 4]; of another shape: network.3.bias [7] instead of [6]"
    ) in str(error)


@pytest.mark.fault("D18")
@pytest.mark.parametrize("missing", ["network.0", "network.6", "network.10", "network.12"])
def test_a_weight_that_is_missing_is_told_by_its_bias(missing: str, tmp_path: Path) -> None:
    tensors = tutorial_state_dict()
    del tensors[f"{missing}.weight"]
    torch.save(tensors, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert f"are not those of cnn: missing: {missing}.weight [" in str(error)
    assert "extra" not in str(error)


@pytest.mark.fault("D18")
def test_a_bias_that_is_none_is_extra(tmp_path: Path) -> None:
    tensors = tutorial_state_dict()
    tensors["network.20.bias"] = torch.tensor(1.0)
    torch.save(tensors, tmp_path / "net.pth")
    assert "extra: network.20.bias []" in str(refusal(tmp_path / "net.pth", tmp_path / "run"))


@pytest.mark.fault("D18")
def test_the_closest_network_is_named_with_at_most_five_differences(tmp_path: Path) -> None:
    tensors = tutorial_state_dict(norm=True)
    torch.save(tensors, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run", ConvertOptions(model="resnet9"))
    assert re.search(
        r"those of resnet9: missing: .* and \d+ more; extra: .* and \d+ more", str(error)
    )
    del tensors["network.1.running_mean"]
    torch.save(tensors, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert "those of cnn with batch norm: missing: network.1.running_mean [4]" in str(error)


@pytest.mark.fault("D18")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_network_under_other_names_is_told_ours(tmp_path: Path, ending: str) -> None:
    names = {"0": "conv1", "3": "conv2", "6": "conv3", "10": "fc1", "12": "fc2"}
    tensors = {
        f"{names[name.split('.')[1]]}.{name.split('.')[2]}": tensor
        for name, tensor in tutorial_state_dict().items()
    }
    path = tmp_path / f"net{ending}"
    torch.save(tensors, path) if ending == ".pth" else safetensors.torch.save_file(tensors, path)
    error = refusal(path, tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert "have the shapes of cnn, but other names; in order" in str(error)
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            assert f"{ours}.{kind} is network.{theirs}.{kind}" in str(error)


def test_a_network_that_is_none_of_ours_is_refused_as_such(tmp_path: Path) -> None:
    """Also one of so many convolutions that ours would have no pixels left."""
    layers = [nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(8)]
    torch.save({**nn.Sequential(*layers).state_dict()}, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert "are not those of" in str(error)


def test_a_network_for_other_images_is_refused(tmp_path: Path) -> None:
    twin = make_twin(create_model(TrainConfig(model="cnn-gap", widths=(4,)), 3), (8, 8, 4))
    torch.save(twin.state_dict(), tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert "takes images of 4 channels" in str(error)


def test_an_ending_of_another_format_is_no_folders_name(tmp_path: Path) -> None:
    torch.save(tutorial_state_dict(), tmp_path / "net.pth")
    for name in ("net.onnx", "net.npz", "net.txt"):
        error = refusal(tmp_path / "net.pth", tmp_path / name)
        assert error.exit_code == ExitCode.USAGE
        assert "is not a known format. Fix: use .pth, .pt, .safetensors" in str(error)
    main([str(tmp_path / "net.pth"), str(tmp_path / "v1.2")])
    assert trained.load(tmp_path / "v1.2").config.model == "cnn"


def test_a_bias_before_a_batch_norm_must_fit_too() -> None:
    tensors = {n: t.numpy() for n, t in tutorial_state_dict(norm=True).items() if "num" not in n}
    tensors["network.0.bias"] = np.zeros(1, np.float32)  # which would be broadcast
    with pytest.raises(CifarJaxError, match=r"network\.0\.bias \[1\] instead of \[4\]"):
        variables_of(tensors, identify(tensors), Path("net.pth"))


def test_shapes_that_contradict_each_other_take_no_memory() -> None:
    tensors = {
        f"network.{2 * i + 1}.weight": np.broadcast_to(np.float32(0), (10**6, 1)) for i in range(3)
    }
    with pytest.raises(CifarJaxError, match=r"instead of \[1000000, 1000000\]"):
        variables_of(tensors, identify(tensors), Path("net.pth"))


@pytest.mark.parametrize("wrapped", ["whole module", "torch.save", "pickle"])
@pytest.mark.fault("D15")
def test_a_payload_does_not_run(tmp_path: Path, wrapped: str) -> None:
    path, touched = tmp_path / "net.pth", tmp_path / "touched"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(touched),)

    if wrapped == "whole module":
        torch.save(nn.Linear(2, 2), path)
    elif wrapped == "torch.save":
        torch.save({"network.0.weight": torch.zeros(2), "x": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    error = refusal(path, tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert "torch.save(model.state_dict(), path)" in str(error)
    assert not touched.exists()
    if wrapped == "torch.save":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert touched.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"epoch": 3}, "has 'epoch', a int"),
        ({0: torch.zeros(2)}, "has 0, a Tensor"),
        ({"a.weight": torch.zeros(2, dtype=torch.int32)}, "a.weight in .* is int32\\[2\\]"),
        ({"a.weight": torch.zeros(2, dtype=torch.bool)}, "is bool"),
        ({"a.weight": torch.zeros(2, dtype=torch.complex64).conj()}, "is complex64"),
        ({"a.weight": torch.zeros(2, 0)}, "float32\\[2, 0\\]"),
        ({"a.weight": torch.eye(2).to_sparse()}, "a.weight, which is sparse"),
        ({}, "has no tensors"),
    ],
)
@pytest.mark.fault("D15", "D18")
def test_what_is_no_state_dict_is_refused(tmp_path: Path, payload: Any, message: str) -> None:
    torch.save(payload, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert re.search(message, str(error))


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.fault("D15", "D17")
def test_damaged_files_are_refused(tmp_path: Path, ending: str) -> None:
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"net{ending}"
    write_state_dict(whole, {n: t.numpy() for n, t in tutorial_state_dict().items()}, {})
    content = whole.read_bytes()
    cut = (content[:-100], content[: len(content) // 2], content[:30])
    for damaged in (b"", b"abc" * 50, b"<!DOCTYPE html>", *cut):
        path.write_bytes(damaged)
        error = refusal(path, tmp_path / "run")
        assert error.exit_code == ExitCode.CHECKPOINT
        assert f"{path} is damaged, or not " in error.what
        assert error.fix.startswith("use another copy")


@pytest.mark.parametrize("how", ["deflated", "repeated"])
@pytest.mark.fault("D15")
def test_a_pth_that_unpacks_to_more_than_it_has_is_refused(tmp_path: Path, how: str) -> None:
    path, packed = tmp_path / "net.pth", io.BytesIO()
    torch.save({"network.1.weight": torch.zeros(10, 100_000)}, packed)
    with zipfile.ZipFile(packed) as entries, zipfile.ZipFile(path, "w") as bomb:
        for entry in entries.infolist():
            bomb.writestr(entry.filename, entries.read(entry), zipfile.ZIP_DEFLATED)
    if how == "repeated":  # a copy of the view would have 4 TB
        torch.save({"network.1.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    else:
        assert torch.load(path)["network.1.weight"].shape == (10, 100_000), "torch would take it"
    error = refusal(path, tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert re.search(r"[\d,]+ bytes unpack to 4,00|of 4,000,000,000,000 bytes in 1,", str(error))


@pytest.mark.fault("D15")
def test_numbers_of_types_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    for dtype in (torch.bits8, torch.float4_e2m1fn_x2):
        tensor = torch.zeros(4, dtype=torch.uint8).view(dtype)
        torch.save({"network.1.weight": tensor}, tmp_path / "net.pth")
        error = refusal(tmp_path / "net.pth", tmp_path / "run")
        assert error.exit_code == ExitCode.CHECKPOINT
        assert "of a type that NumPy lacks" in str(error)


def as_safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(packed) if length is None else length).to_bytes(8, "little") + packed + data


def entry(start: Any, stop: Any, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


TWICE = b'{"a.b": %b, "a.b": %b}' % (
    json.dumps(entry(0, 8)).encode(),
    json.dumps(entry(0, 8, (1, 2))).encode(),
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_safetensors({}, length=2**63), "a header of 9,223,372,036,854,775,808 bytes"),
        (as_safetensors({}, length=2**64 - 1), "a header of 18,446,744,073,709,551,615 bytes"),
        (as_safetensors(b"{}" + b" " * 2**20), "a header of 1,048,578 bytes"),
        (as_safetensors({"a.b": entry(0, 8)})[:30], "invalid header length"),
        (b"", "header too small"),
        (as_safetensors(b"{a}"), "invalid JSON"),
        (as_safetensors(b"\xff\xfe"), "invalid UTF-8"),
        (as_safetensors([]), "invalid type: sequence"),
        (as_safetensors(b"[" * 100_000), "invalid type: sequence"),
        (as_safetensors(b'{"a.b": ' * 100_000), "missing|invalid|recursion"),
        (as_safetensors({}, b""), "has no tensors"),
        (as_safetensors({"a.b": entry(0, 8), "a.c": entry(4, 12)}, bytes(12)), "tensor `a.c`"),
        (as_safetensors({"a.b": entry(0, 8), "a.c": entry(12, 20)}, bytes(20)), "tensor `a.c`"),
        (as_safetensors({"a.b": entry(0, 8)}, bytes(7)), "not fully covered"),
        (as_safetensors({"a.b": entry(0, 8)}, bytes(9)), "not fully covered"),
        (as_safetensors({"a.b": entry(-8, 0)}), "integer `-8`"),
        (as_safetensors({"a.b": entry(8, 0)}), "tensor `a.b`"),
        (as_safetensors({"a.b": entry(0.0, 8.0)}), "floating point"),
        (as_safetensors({"a.b": entry(0, 8, (2**32, 2**32, 4))}), "overflow"),
        (as_safetensors({"a.b": entry(0, 8, (10**9,))}), "invalid shape"),
        (as_safetensors({"a.b": entry(0, 8, dtype="F" * 10**5)}), "unknown variant `FFFF"),
        (as_safetensors({"a.b": entry(0, 8, (8,), "F8_E4M3")}), "numpy"),
        (as_safetensors({"a.b": entry(0, 0, (0, 3))}, b""), "a.b in .* is float32\\[0, 3\\]"),
        (as_safetensors(TWICE), "a name comes twice among a.b, a.b"),
        (as_safetensors({"__metadata__": {"config": 3}, "a.b": entry(0, 8)}), "integer `3`"),
        (as_safetensors({"__metadata__": [], "a.b": entry(0, 8)}), "invalid type: sequence"),
        (as_safetensors({"." * 10**5: entry(0, 8)}), "with names of up to 100,000 characters"),
        (
            as_safetensors({f"a.{i}": entry(8 * i, 8 * i + 8) for i in range(301)}, bytes(2408)),
            "has 301 tensors",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "file",
)
@pytest.mark.fault("D17")
def test_malformed_safetensors_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    started = time.perf_counter()
    tracemalloc.start()
    error = refusal(path, tmp_path / "run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < 50 * 2**20
    assert error.exit_code == ExitCode.CHECKPOINT
    assert re.search(message, str(error))
    assert str(path) in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.fault("A14")
def test_weights_that_are_no_finite_numbers_are_refused(
    tmp_path: Path, ending: str, number: float
) -> None:
    path = tmp_path / f"net{ending}"
    tensors = {n: t.numpy().astype(np.float64) for n, t in tutorial_state_dict().items()}
    tensors["network.3.bias"][4] = number
    write_state_dict(path, tensors, {})
    error = refusal(path, tmp_path / "run")
    assert error.exit_code == ExitCode.CHECKPOINT
    assert f"network.3.bias in {path} has 1 of 6 numbers that are NaN, infinite" in str(error)


@pytest.mark.fault("A14")
def test_a_variance_below_zero_is_refused(tmp_path: Path) -> None:
    tensors = tutorial_state_dict(norm=True)
    tensors["network.1.running_var"][2] = -0.5
    torch.save(tensors, tmp_path / "net.pth")
    error = refusal(tmp_path / "net.pth", tmp_path / "run")
    assert f"network.1.running_var in {tmp_path / 'net.pth'} has -0.5, which cannot" in str(error)


def test_no_tensor_is_lost_to_another_of_its_name(tmp_path: Path) -> None:
    """A bare Sequential's ``0.weight`` becomes ``network.0.weight``, which is here already."""
    tensors = {n: t.numpy() for n, t in tutorial_state_dict().items()}
    write_state_dict(tmp_path / "a.pth", {**tensors, "0.weight": tensors["network.0.weight"]}, {})
    assert "extra: 0.weight" in str(refusal(tmp_path / "a.pth", tmp_path / "run"))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    os.mkfifo(tmp_path / "pipe.pth")  # whose other end nobody opens
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.pth").mkdir()
    for name, code, message in (
        ("net.onnx", ExitCode.USAGE, "does not end in .pth, .pt, .safetensors"),
        ("folder.pth", ExitCode.CHECKPOINT, "is neither a run's workdir nor a checkpoint"),
        ("absent.pth", ExitCode.CHECKPOINT, "does not exist"),
        ("pipe.pth", ExitCode.CHECKPOINT, "not a regular file"),
        ("pipe.safetensors", ExitCode.CHECKPOINT, "not a regular file"),
    ):
        error = refusal(tmp_path / name, tmp_path / "run")
        assert error.exit_code == code
        assert message in str(error)


@pytest.mark.fault("D20")
def test_metadata_that_is_not_ours_is_refused_or_ignored(tmp_path: Path) -> None:
    tensors = {n: t.numpy() for n, t in tutorial_state_dict().items()}
    path = tmp_path / "net.safetensors"
    write_state_dict(path, tensors, {})
    convert(path, tmp_path / "good.safetensors", ConvertOptions())
    with safetensors.safe_open(tmp_path / "good.safetensors", "np") as file:
        good = file.metadata()
    assert good["format"] == "pt"
    config = json.loads(good["config"])
    for changed in (
        {"config": "{"},
        {"config": "[]"},
        {"config": json.dumps({**config, "model": "vgg"})},
        {"config": json.dumps({**config, "help": True})},
        {"config": json.dumps({**config, "batch_size": "many"})},
        {"config": "[" * 100_000},
        {"class_names": "3"},
        {"class_names": '"abcdefghij"'},
        {"class_names": json.dumps(list(range(10)))},
        {"class_names": json.dumps(["a"] * 10)},
        {"class_names": json.dumps([*"abcdefghi", "\ud800"])},
        {"class_names": "[]"},
        {"image_shape": "[32, 32]"},
        {"image_shape": "[0, 32, 3]"},
        {"image_shape": "[32.5, 32, 3]"},
        {"image_shape": "[Infinity, 32, 3]"},
        {"image_shape": '{"32": 1, "33": 1, "3": 1}'},
        {"mean": "[0.5]"},
        {"mean": "[NaN, 0, 0]"},
        {"mean": f"[1{'0' * 400}, 0, 0]"},
        {"std": "[0, 0, 0]"},
        {"std": "[1, 1, Infinity]"},
        {"std": "null"},
    ):
        write_state_dict(path, tensors, {**good, **changed})
        error = refusal(path, tmp_path / "run")
        assert error.exit_code == ExitCode.CHECKPOINT
        assert "the metadata of" in str(error), changed
    write_state_dict(path, tensors, {**good, "class_names": '["a"]'})
    assert "network.12.bias [10] instead of [1]" in str(refusal(path, tmp_path / "run"))
    for changed, message in (
        ({"image_shape": f"[{10**9}, {10**9}, 3]"}, "at most 64,000,000 pixels"),
        ({"image_shape": "[64, 64, 3]"}, "are not those of cnn"),
        ({"image_shape": "[2, 2, 3]"}, "which is impossible: the images are too small"),
        ({"config": json.dumps({**config, "widths": [10**30]})}, "is out of range"),
        ({"config": json.dumps({**config, "hidden": [1] * 5000})}, "more layers than the file has"),
    ):
        write_state_dict(path, tensors, {**good, **changed})
        error = refusal(path, tmp_path / "run")
        assert error.exit_code == ExitCode.CHECKPOINT
        assert message in str(error), changed


def test_options_that_contradict_the_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(tutorial_state_dict(), path)
    for options, message in (
        (ConvertOptions(mean=(0.5,)), "--mean has 1 number"),
        (ConvertOptions(std=(1.0, 1.0)), "--std has 2 number"),
        (ConvertOptions(classes=("a", "b")), "--classes has 2 name"),
        (ConvertOptions(classes=tuple("abcdefghija")), "--classes has 11 name"),
        (ConvertOptions(classes=tuple("abcdefghia")), "--classes has a more than once"),
        (ConvertOptions(image_size=4), "--image-size 4 is too small for cnn"),
    ):
        error = refusal(path, tmp_path / "run", options)
        assert error.exit_code == ExitCode.USAGE
        assert message in str(error)
    airbench = make_twin(create_model(ZOO["airbench"], 10), (32, 32, 3)).state_dict()
    tensors = {name: tensor.numpy() for name, tensor in airbench.items()}
    assert identify(tensors, image_size=9).image_shape == (9, 9, 3)
    with pytest.raises(CifarJaxError, match=r"size 8 is too small for airbench.*Fix: give 9 or mo"):
        identify(tensors, image_size=8)
    resnet9 = make_twin(create_model(ZOO["resnet9"], 10), (32, 32, 3)).state_dict()
    with pytest.raises(CifarJaxError, match=r"size 7 is too small for resnet9.*Fix: give 8 or mo"):
        identify({name: tensor.numpy() for name, tensor in resnet9.items()}, image_size=7)
    error = refusal(path, tmp_path / "run", ConvertOptions(image_size=64))
    assert "network.10.weight [16, 128] instead of [16, 512]" in str(error)
    with pytest.raises(CifarJaxError, match="--std 0"):
        main([str(path), str(tmp_path / "run"), "--std", "1,0,1"])
    with pytest.raises(CifarJaxError, match="--mean 125"):  # of pixels 0..255
        main([str(path), str(tmp_path / "run"), "--mean", "0.5,125.3,0.5"])


def test_what_is_assumed_is_said_with_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = make_twin(create_model(TrainConfig(model="cnn-gap", widths=(4,)), 12), (8, 8, 3))
    torch.save(twin.state_dict(), tmp_path / "net.pth")
    main([str(tmp_path / "net.pth"), str(tmp_path / "a")])
    lines = capsys.readouterr().out.splitlines()
    for option in ("--image-size", "--mean", "--std", "--classes"):
        assert sum(option in line and line.startswith("assumed: ") for line in lines) == 1
    assert "how the network pads, pools and activates" in lines[0]
    assert trained.load(tmp_path / "a").class_names[9:11] == ("class 09", "class 10")
    assert lines[-1].startswith("converted cnn-gap, 172 parameters, 12 classes, images of 32x32x3")
    options = ["--image-size", "8", "--mean=-1,0.5,0.25", "--std", "1,2,3"]
    classes = ",".join("abcdefghijkl")
    main([str(tmp_path / "net.pth"), str(tmp_path / "b"), *options, "--classes", classes])
    assert "assumed: " not in capsys.readouterr().out
    network = trained.load(tmp_path / "b")
    assert network.image_shape == (8, 8, 3)
    assert (network.mean, network.std) == ((-1.0, 0.5, 0.25), (1.0, 2.0, 3.0))
    assert network.class_names == tuple("abcdefghijkl")
    for name, message in (
        ("resnet9", "multiplied by 0.125"),
        ("airbench", "divided by its number of inputs"),
        ("mlp-dropout", "dropout of 0.5"),
    ):
        twin = make_twin(create_model(ZOO[name], 10), (16, 16, 3))
        torch.save(twin.state_dict(), tmp_path / "net.pth")
        main([str(tmp_path / "net.pth"), str(tmp_path / f"{name}.safetensors")])
        assert message in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "net.pth", "net.safetensors"])
def test_a_destination_is_never_overwritten_nor_half_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = tmp_path / "source.pth", tmp_path / "new" / name
    torch.save(tutorial_state_dict(), source)
    error = refusal(source, source / name)  # a folder that is a file
    assert error.exit_code == ExitCode.ENVIRONMENT

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full_disk)
        with pytest.raises(CifarJaxError, match=r"cannot .*No space left") as caught:
            convert(source, destination, ConvertOptions())
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert list(destination.parent.iterdir()) == []

    destination.write_text("mine")
    error = refusal(source, destination)
    assert error.exit_code == ExitCode.USAGE
    assert "exists" in str(error)
    assert destination.read_text() == "mine"
    destination.unlink()
    destination.symlink_to("nowhere")
    assert "exists" in str(refusal(source, destination))


@pytest.mark.fault("D15")
def test_torch_is_demanded_only_for_a_pth_and_only_a_safe_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pth"
    torch.save(tutorial_state_dict(), path)
    convert(path, tmp_path / "net.safetensors", ConvertOptions())
    for unsafe in ("2.5.1", "2.9.1+cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", torch.torch_version.TorchVersion(unsafe))
            error = refusal(path, tmp_path / "run")
        assert error.exit_code == ExitCode.ENVIRONMENT
        assert f"torch {unsafe}" in str(error)
    monkeypatch.delitem(sys.modules, "cifar_jax.torch_reference")
    monkeypatch.setitem(sys.modules, "torch", None)
    for source, destination in ((path, "run"), (tmp_path / "net.safetensors", "b.pth")):
        error = refusal(source, tmp_path / destination)
        assert error.exit_code == ExitCode.ENVIRONMENT
        assert "pip install torch==2.13.0" in str(error)
    convert(tmp_path / "net.safetensors", tmp_path / "run", ConvertOptions())


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cifar_jax.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(tutorial_state_dict(), path)
    done = run_command(path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "converted cnn, " in done.stdout
    assert trained.load(tmp_path / "run").n_params == sum(
        tensor.numel() for tensor in tutorial_state_dict().values()
    )
    (tmp_path / "broken.pth").write_bytes(path.read_bytes()[:-9])
    done = run_command(tmp_path / "broken.pth", tmp_path / "other")
    assert done.returncode == ExitCode.CHECKPOINT
    assert re.fullmatch(r"cifar_jax: error: .* Fix: .*\.\n", done.stderr), done.stderr
    assert not (tmp_path / "other").exists()


def test_a_plain_torch_takes_what_is_written(tmp_path: Path) -> None:
    """Without our code: a fresh module of the tutorial's takes the file."""
    write_state_dict(
        tmp_path / "net.pth", {n: t.numpy() for n, t in tutorial_state_dict().items()}, {}
    )
    Tutorial().load_state_dict(torch.load(tmp_path / "net.pth"))
