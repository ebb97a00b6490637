"""Every kind of file, loaded as its users load it, against the network it was made of."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cifar_jax.checkpoints import trained
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import ExportFormat, TrainConfig
from cifar_jax.convert import ConvertOptions, convert
from cifar_jax.data import shapes
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.export import __main__ as command
from cifar_jax.export import formats
from cifar_jax.export.__main__ import TOLERANCE, export_network, main
from cifar_jax.networks.models import create_model
from cifar_jax.scoring.inference import make_logits
from cifar_jax.state_dicts import read_state_dict
from cifar_jax.torch_reference import make_twin

FORMATS: tuple[ExportFormat, ...] = ("stablehlo", "onnx", "safetensors", "pth")
ZOO = {
    "linear": (TrainConfig(model="linear"), (8, 8, 3)),
    "mlp": (TrainConfig(model="mlp", hidden=(6, 5), dropout=0.5), (6, 9, 3)),
    # Of so many channels, and 4 pixels wide, is what cifar_jax.networks.winograd computes on a CPU.
    "cnn": (TrainConfig(model="cnn", widths=(32, 33, 6), hidden=(7,)), (8, 8, 3)),
    "cnn-norm-grey": (
        TrainConfig(model="cnn", widths=(4, 5), hidden=(7,), batch_norm=True),
        (7, 12, 1),
    ),
    "cnn-gap": (TrainConfig(model="cnn-gap", widths=(4, 5), patch_size=2), (8, 8, 3)),
    "resnet9": (TrainConfig(model="resnet9", widths=(4, 5, 6, 7), dropout=0.5), (8, 8, 3)),
    "airbench": (TrainConfig(model="airbench", widths=(6, 9)), (18, 19, 3)),
}
CLASSES = ("bird", "cat", "Ærø")


@functools.cache
def images_of(name: str) -> np.ndarray:
    """128 dark, bright and coloured images of noise."""
    rng, (*side, channels) = np.random.default_rng(1), ZOO[name][1]
    tint = rng.integers(0, 129, (128, 1, 1, channels))
    return (rng.integers(0, 128, (128, *side, channels)) + tint).astype(np.uint8)


@functools.cache
def make_network(name: str) -> TrainedNetwork:
    """Random numbers for all its variables, so that no symmetry hides a mistake."""
    config, image_shape = ZOO[name]
    model = create_model(config, len(CLASSES))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *image_shape), "f4"))
    rng = np.random.default_rng(0)
    variables = {"batch_stats": {}} | jax.tree.map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 1.5, leaf.shape).astype("f4")
            if path[-1].key in ("scale", "var")
            else (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype("f4")
        ),
        dict(shapes),
    )
    mean, std = (0.4, 0.5, 0.6)[: image_shape[-1]], (0.3, 0.25, 0.2)[: image_shape[-1]]
    network = TrainedNetwork(config, CLASSES, image_shape, mean, std, variables)
    # The images get answers that differ, and none is all but certain.
    logits = make_logits(network)(images_of(name))
    last = variables["params"][max(n for n in variables["params"] if n.startswith("Dense"))]
    if "bias" in last:  # resnet9 has none
        last["bias"] -= logits.mean(axis=0)
        logits -= logits.mean(axis=0)
    for leaf in last.values():
        leaf /= logits.std()
    return network


@functools.cache
def probabilities_of(name: str) -> np.ndarray:
    network = make_network(name)
    pixels = normalised(network, images_of(name))
    probabilities = softmax(jax.jit(network.model.apply)(network.variables, pixels))
    assert probabilities.std(axis=0).max() > 0.05
    return probabilities


def normalised(network: TrainedNetwork, images: np.ndarray) -> np.ndarray:
    return ((images / 255 - network.mean) / network.std).astype(np.float32)


def softmax(logits: Any) -> np.ndarray:
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def as_told(lines: str, network: TrainedNetwork, images: np.ndarray) -> np.ndarray:
    """The probabilities by the lines of Python that the command prints, as they stand there."""
    if "model.eval()" not in lines:
        names: dict[str, Any] = {"images": images}
        exec(lines, names)
        return np.asarray(names["probabilities"])
    mean, std = map(ast.literal_eval, re.findall(r"(?:mean|std) (\(.*?\))", lines))
    pixels = torch.tensor(((images / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    names = {"model": make_twin(network.model, network.image_shape), "images": pixels}
    exec(lines, names)
    return softmax(names["logits"].detach())


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_MAX_IMAGES", 128)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The workdir of ``make_network(name)``."""
    root = tmp_path_factory.mktemp("saved")

    def workdir(name: str) -> Path:
        if not (root / name).exists():
            trained.save(make_network(name), root / name, source="a test")
        return root / name

    return workdir


Saved = Callable[[str], Path]


def write_stablehlo(name: str, output: Path) -> None:
    """As the command writes it, without the checks after that."""
    write, _ = formats.FORMATS["stablehlo"]
    write(make_network(name), output)


def refusal(checkpoint: Path, format: ExportFormat, output: Path, **options: Any) -> CifarJaxError:
    """The one line with which an export is refused, which leaves nothing behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(CifarJaxError) as caught:
        export_network(checkpoint, format, output, **options)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "linear"])
def test_every_network_in_every_format_gives_the_same_answers(
    name: str,
    format: ExportFormat,
    tmp_path: Path,
    saved: Saved,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, output = make_network(name), tmp_path / f'my "net\'s".{format}'
    assert 0 <= export_network(saved(name), format, output) <= TOLERANCE
    assert list(tmp_path.iterdir()) == [output]
    lines = capsys.readouterr().out.split("\n\n")[1]
    images, expected = images_of(name), probabilities_of(name)
    for n in (1, 7, 128):
        answers = as_told(lines, network, images[:n])
        np.testing.assert_allclose(answers, expected[:n], atol=TOLERANCE, rtol=0)
        if format in ("stablehlo", "onnx"):
            assert answers.dtype == np.float32
    for here in (Path(command.__file__).parent, tmp_path):
        assert str(here).encode() not in output.read_bytes(), "a path of this machine"


def test_a_stablehlo_file_needs_only_jax(tmp_path: Path) -> None:
    output, images_file = tmp_path / "net.stablehlo", tmp_path / "images.npy"
    write_stablehlo("cnn", output)
    images, expected = images_of("cnn"), probabilities_of("cnn")
    np.save(images_file, images[:9])
    program = f"""if True:
        import sys
        import jax.export, numpy as np
        exported = jax.export.deserialize(bytearray(open({str(output)!r}, "rb").read()))
        np.save({str(images_file)!r}, jax.jit(exported.call)(np.load({str(images_file)!r})))
        assert exported.platforms == ("cpu", "cuda"), exported.platforms
        assert not {{"cifar_jax", "flax", "tensorflow", "torch"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
    np.testing.assert_allclose(np.load(images_file), expected[:9], atol=TOLERANCE, rtol=0)


def test_the_gpus_program_in_the_same_file_gives_the_same_answers(tmp_path: Path) -> None:
    """A file has a program for each platform: here the GPU's runs on the CPU."""
    output = tmp_path / "net.stablehlo"
    write_stablehlo("cnn", output)
    images, expected = images_of("cnn"), probabilities_of("cnn")
    exported = jax.export.deserialize(bytearray(output.read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    on_gpu = jax.jit(dataclasses.replace(exported, platforms=("cuda", "cpu")).call)
    for program, has_windows_of_4 in ((jax.jit(exported.call), True), (on_gpu, False)):
        compiled = program.lower(images).compile()
        assert ("size=4x4 stride=2x2" in compiled.as_text()) == has_windows_of_4
        np.testing.assert_allclose(compiled(images), expected, atol=TOLERANCE, rtol=0)
    text = exported.mlir_module()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert products
    assert all("DEFAULT" not in p and "HIGHEST" in p for p in products), "or a GPU rounds to TF32"


def test_an_onnx_file_says_what_it_is(tmp_path: Path, saved: Saved) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("torch.onnx").addHandler(handler)
    export_network(saved("cnn-gap"), "onnx", tmp_path / "net.onnx")
    logging.getLogger("torch.onnx").removeHandler(handler)
    assert [record.getMessage() for record in logged] == []
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["class_names"] == list(CLASSES)
    assert metadata["image_shape"] == [8, 8, 3]
    assert metadata["mean"] == [0.4, 0.5, 0.6]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_modelmeta().custom_metadata_map["class_names"] == json.dumps(CLASSES)
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 8, 8, 3])
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["N", 3])
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Gather", "Range", "Shape"})


def test_the_weights_are_those_that_convert_writes(tmp_path: Path, saved: Saved) -> None:
    export_network(saved("cnn-norm-grey"), "safetensors", tmp_path / "a.safetensors")
    convert(saved("cnn-norm-grey"), tmp_path / "b.safetensors", ConvertOptions())
    (tensors, metadata), (tensors_b, metadata_b) = (
        read_state_dict(tmp_path / f"{name}.safetensors") for name in "ab"
    )
    assert metadata == metadata_b
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    of_this_machine = {"data", "data_dir", "initial_weights"}
    assert not of_this_machine & json.loads(metadata["config"]).keys()
    assert list(tensors) == list(tensors_b)
    assert all(np.array_equal(tensors[name], tensors_b[name]) for name in tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_file_is_found_and_removed(
    format: ExportFormat, tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = formats.FORMATS[format]

    def write_wrong(network: TrainedNetwork, path: Path) -> None:
        off = (network.mean[0] + 0.001, *network.mean[1:])
        if format == "pth":  # which holds no mean
            network.variables["params"]["Dense_2"]["bias"][0] += 0.001
        write(dataclasses.replace(network, mean=off), path)
        assert path.stat().st_size > 0

    monkeypatch.setattr(formats, "FORMATS", {format: (write_wrong, read)})
    error = refusal(saved("mlp"), format, tmp_path / f"net.{format}")
    assert error.exit_code == ExitCode.NUMERICS
    assert re.search(rf"the {format} file gave probabilities up to \S+ from .* removed", str(error))


def test_a_difference_at_any_one_image_or_batch_size_counts() -> None:
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    expected = np.zeros((10, 2))

    def largest(wrong: Callable[[int, Any], bool], by: float = 0.25) -> float:
        def classify(images: Any) -> Any:
            answers = np.zeros((len(images), 2), np.float32)
            for k, image in enumerate(images.ravel()):
                answers[k, 1] = by if wrong(len(images), image) else 0
            return answers

        return command._largest_difference(classify, images, expected)

    assert largest(lambda size, image: False) == 0
    for size in (1, 7, 128):
        assert largest(lambda n, image, size=size: n == size and image == 9) == 0.25
    assert np.isnan(largest(lambda n, image: image == 9, by=np.nan))


def test_a_network_of_nan_is_not_exported(tmp_path: Path) -> None:
    network = copy.deepcopy(make_network("linear"))
    network.variables["params"]["Dense_0"]["bias"][0] = np.nan
    trained.save(network, tmp_path / "run", source="a test")
    error = refusal(tmp_path / "run", "safetensors", tmp_path / "net.safetensors")
    assert error.exit_code == ExitCode.NUMERICS
    assert "logits are not finite" in str(error)


def test_a_file_that_gives_nan_is_no_agreement(
    tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nan(*_: Any) -> Callable[[Any], np.ndarray]:
        return lambda images: np.full((len(images), len(CLASSES)), np.nan)

    write, _ = formats.FORMATS["safetensors"]
    monkeypatch.setitem(formats.FORMATS, "safetensors", (write, read_nan))
    error = refusal(saved("linear"), "safetensors", tmp_path / "net.safetensors")
    assert error.exit_code == ExitCode.NUMERICS
    assert "gave probabilities up to nan" in str(error)


def test_a_network_is_checked_on_the_test_images_of_its_training(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--checkpoint", str(trained_run), "--format", "stablehlo"])
    printed = capsys.readouterr().out
    assert (tmp_path / "run.stablehlo").is_file()
    folder = Path(trained.load(trained_run).config.data).name
    assert re.search(
        rf"checked on 21 test images of {folder} at batch sizes 1, 7, 128: largest difference \S+$",
        printed,
        re.MULTILINE,
    ), printed
    assert "classes in order: bird, cat, frog" in printed
    step = next(iter((trained_run / "checkpoints").iterdir()))
    main(["--checkpoint", str(step), "--format", "safetensors"])
    assert (tmp_path / "run.safetensors").is_file()


def test_without_its_data_a_network_is_checked_on_drawn_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "N_TRAIN", 300)
    monkeypatch.setattr(shapes, "N_TEST", 200)
    network, empty = make_network("linear"), tmp_path / "empty"
    empty.mkdir()
    for source, message in (
        ("auto", ""),
        (str(tmp_path / "absent"), ""),
        (str(empty), f"checking on images of 'shapes' instead: {empty} holds 0 class folder(s)"),
    ):
        config = dataclasses.replace(network.config, data=source, data_dir=str(tmp_path / "none"))
        workdir = tmp_path / f"run-{len(source)}"
        trained.save(dataclasses.replace(network, config=config), workdir, source="a test")
        export_network(workdir, "safetensors", workdir / "net.safetensors")
        printed = capsys.readouterr().out
        assert "checked on 128 test images of shapes at batch sizes" in printed
        assert message in printed
        assert ("instead" in printed) == bool(message)
    output = tmp_path / "net.safetensors"
    error = refusal(workdir, "safetensors", output, data=str(empty))
    assert error.exit_code == ExitCode.DATA, "data that is asked for is not replaced"


def test_a_bad_output_is_refused_and_nothing_is_half_written(
    tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = saved("linear"), tmp_path / "net.safetensors"
    error = refusal(checkpoint, "onnx", output)
    assert error.exit_code == ExitCode.USAGE
    assert f"--output {output} does not end in .onnx. Fix: use the ending .onnx." in str(error)
    for nameless in (Path(), Path("/")):
        with pytest.raises(CifarJaxError, match=r"^--output [./] does not end in .onnx. Fix: use"):
            export_network(checkpoint, "onnx", nameless)
    with monkeypatch.context() as patch:

        def full_disk(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(Path, "rename", full_disk)
        error = refusal(checkpoint, "safetensors", output)
    assert error.exit_code == ExitCode.ENVIRONMENT
    assert "No space left" in str(error)
    output.write_text("mine")
    error = refusal(checkpoint, "safetensors", output)
    assert error.exit_code == ExitCode.USAGE
    assert "exists, and is not overwritten" in str(error)
    assert output.read_text() == "mine"
    error = refusal(
        checkpoint, "safetensors", output / "net.safetensors"
    )  # a folder that is a file
    assert error.exit_code == ExitCode.ENVIRONMENT
    output.unlink()
    output.symlink_to("nowhere")
    assert "exists" in str(refusal(checkpoint, "safetensors", output))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "is neither a run's workdir nor a checkpoint"),
    ):
        error = refusal(path, "safetensors", tmp_path / "net.safetensors")
        assert error.exit_code == ExitCode.CHECKPOINT
        assert message in str(error)


@pytest.mark.parametrize(
    ("format", "missing"),
    [("pth", "torch"), ("onnx", "torch"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")],
)
def test_what_is_not_installed_is_named_with_its_cure(
    format: ExportFormat,
    missing: str,
    tmp_path: Path,
    saved: Saved,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if missing == "torch":
        monkeypatch.delitem(sys.modules, "cifar_jax.torch_reference")
    monkeypatch.setitem(sys.modules, missing, None)
    error = refusal(saved("linear"), format, tmp_path / f"net.{format}")
    assert error.exit_code == ExitCode.ENVIRONMENT
    assert missing in str(error)
    others = " onnx onnxruntime onnxscript" if format == "onnx" else ""
    assert f"Fix: pip install torch==2.13.0{others}." in str(error)
    export_network(saved("linear"), "safetensors", tmp_path / "net.safetensors")


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifar_jax.export", "--checkpoint", "absent"]
    command += ["--format", "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == ExitCode.CHECKPOINT
    assert re.fullmatch(r"cifar_jax: error: .* Fix: .*\.\n", done.stderr), done.stderr
