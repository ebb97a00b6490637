from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import write_images

from cifar_jax.checkpoints import checkpoint
from cifar_jax.checkpoints.trained import TrainedNetwork, load, save
from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.networks.models import create_model
from cifar_jax.steps.metrics import EpochRow
from cifar_jax.train import train_and_evaluate


def make_network(value: float = 0.5, channels: int = 1) -> TrainedNetwork:
    config = TrainConfig(model="cnn-gap", widths=(4,), batch_norm=True, label_smoothing=0.25)
    shape, mean, std = (9, 9, channels), (0.1,) * channels, (0.3,) * channels
    network = TrainedNetwork(config, ("ant", "bee"), shape, mean, std, {})
    shapes = jax.eval_shape(network.model.init, jax.random.key(0), np.zeros((1, *shape)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), dict(shapes))
    return dataclasses.replace(network, variables=variables)


@pytest.fixture(scope="module")
def _saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(make_network(), workdir, source="a test")
    return workdir


@pytest.fixture
def saved(_saved_once: Path, tmp_path: Path) -> Path:
    """The workdir of ``make_network()``, to spoil."""
    return Path(shutil.copytree(_saved_once, tmp_path / "run"))


def add_step(workdir: Path, step: int) -> None:
    """A copy of step 0 whose parameters are all ``step``."""
    network = load(workdir / "checkpoints" / "0")
    variables = jax.tree.map(lambda leaf: np.full_like(leaf, step), network.variables)
    save(dataclasses.replace(network, variables=variables), workdir / "other", source="a test")
    (workdir / "other" / "checkpoints" / "0").rename(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "other")


def step_of(network: TrainedNetwork) -> float:
    return float(network.variables["params"]["Dense_0"]["bias"][0])


def write_history(workdir: Path, accuracy_at: dict[int, float]) -> None:
    zeros = dict.fromkeys(EpochRow.__annotations__, 0)
    rows = [{**zeros, "step": step, "val_accuracy": value} for step, value in accuracy_at.items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    network = make_network()
    save(network, tmp_path, source="a test")
    for path in (tmp_path, tmp_path / "checkpoints" / "0"):
        loaded = load(path)
        for field in ("config", "class_names", "image_shape", "mean", "std"):
            assert getattr(loaded, field) == getattr(network, field)
        assert jax.tree.structure(loaded.variables) == jax.tree.structure(network.variables)
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded.variables))
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded.variables, network.variables))
    logits = network.model.apply(loaded.variables, np.ones((2, 9, 9, 1), np.float32))
    assert logits.shape == (2, 2)
    assert network.n_params == 3 * 3 * 4 + 2 * 4 + 4 * 2 + 2


def test_the_best_step_is_taken_else_the_newest(tmp_path: Path) -> None:
    save(make_network(), tmp_path, source="a test")
    add_step(tmp_path, 9)
    add_step(tmp_path, 10)
    assert step_of(load(tmp_path)) == 10, "no history: the newest, as numbers go"
    write_history(tmp_path, {})
    assert step_of(load(tmp_path)) == 10
    write_history(tmp_path, {8: 0.1, 9: 0.3, 10: 0.2})
    assert step_of(load(tmp_path)) == 9
    assert step_of(load(tmp_path / "checkpoints" / "10")) == 10
    write_history(tmp_path, {8: 0.9, 9: 0.3, 10: 0.2})
    assert step_of(load(tmp_path)) == 10, "the best is not saved"


def test_a_run_that_was_trained_is_loaded(image_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(image_folder), model="linear", batch_size=27, epochs=2, crop=0, flip=False
    )
    report = train_and_evaluate(config, tmp_path)
    network = load(tmp_path)
    assert network.config == config
    assert network.class_names == ("bird", "cat", "frog")
    assert network.image_shape == (8, 8, 3)
    assert network.n_params == report["n_params"]
    best, last = (load(tmp_path / "checkpoints" / str(report[k])) for k in ("best_step", "steps"))
    digests = [checkpoint.tree_sha256(each.variables["params"]) for each in (network, best, last)]
    assert digests[0] == digests[1]
    assert digests[2] == report["params_sha256"]
    assert network.variables["batch_stats"] == {}


def save_mlp(config: TrainConfig, workdir: Path) -> None:
    """Save weights of 2 hidden units for the images of ``image_folder``, as a conversion does."""
    variables = {
        "params": {
            "Dense_0": {"kernel": np.zeros((192, 2), "f4"), "bias": np.zeros(2, "f4")},
            "Dense_1": {"kernel": np.zeros((2, 3), "f4"), "bias": np.zeros(3, "f4")},
        },
        "batch_stats": {},
    }
    names, ones = ("bird", "cat", "frog"), (1.0, 1.0, 1.0)
    save(TrainedNetwork(config, names, (8, 8, 3), ones, ones, variables), workdir, source="x.pth")


def test_a_converted_network_is_no_run_to_resume(image_folder: Path, tmp_path: Path) -> None:
    """Said before any data are looked for."""
    config = TrainConfig(data=str(image_folder), model="mlp", hidden=(2,), batch_size=27, epochs=1)
    save_mlp(config, tmp_path)
    resumed = dataclasses.replace(config, data=str(tmp_path / "absent"), resume=True)
    with pytest.raises(CifarJaxError, match=r"has a converted network.* Fix: .* --initial-weights"):
        train_and_evaluate(resumed, tmp_path)


@pytest.mark.parametrize("model", ["cnn", "airbench"])
def test_a_run_may_begin_with_the_weights_of_another_network(tmp_path: Path, model: Any) -> None:
    """As they are, with their normalisation, also where the run is resumed without them."""
    data, given = tmp_path / "images", tmp_path / "given"
    write_images(data, {"bird": 30, "cat": 30, "frog": 30}, size=16)
    config = TrainConfig(
        data=str(data), model=model, widths=(4, 8), epochs=2, batch_size=9, schedule="constant"
    )
    config = dataclasses.replace(config, optimizer="sgd", learning_rate=1e-12, momentum=0)
    net = create_model(config, 3)
    drawn = jax.jit(net.init)(jax.random.key(7), np.zeros((1, 16, 16, 3), np.float32))
    variables = {"params": drawn["params"], "batch_stats": drawn.get("batch_stats", {})}
    names, mean, std = ("bird", "cat", "frog"), (0.25, 0.5, 0.0), (0.5, 2.0, 1.0)
    network = TrainedNetwork(config, names, (16, 16, 3), mean, std, variables)
    save(network, given, source="x.pth")

    begun = dataclasses.replace(config, initial_weights=str(given), epochs=1)
    train_and_evaluate(begun, tmp_path / "run")
    shutil.rmtree(given)
    train_and_evaluate(dataclasses.replace(begun, epochs=2, resume=True), tmp_path / "run")
    trained = load(tmp_path / "run")
    assert (trained.mean, trained.std) == (mean, std)
    for a, b in zip(
        jax.tree.leaves(trained.variables["params"]), jax.tree.leaves(drawn["params"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "linear", "hidden": ()},
            "is mlp for 8x8x3, 395 parameters; .* Fix: give --model mlp --hidden 2, no other",
        ),
        (
            {"data": "shapes"},
            "is for bird, cat, frog; shapes has circle, .* Fix: give --data .* --classes",
        ),
        ({"initial_weights": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    image_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = TrainConfig(data=str(image_folder), model="mlp", hidden=(2,), epochs=1, batch_size=27)
    save_mlp(config, tmp_path / "given")
    options = {"initial_weights": str(tmp_path / "given"), **change}
    with pytest.raises(CifarJaxError, match=message):
        train_and_evaluate(dataclasses.replace(config, **options), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["absent", "empty folder", "file", "checkpoints"])
def test_what_is_no_checkpoint_is_refused(saved: Path, kind: str) -> None:
    path = saved / kind
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(CifarJaxError, match=r"does not exist|is neither a run's workdir") as caught:
        load(path)
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert str(path) in str(caught.value)


def test_a_damaged_history_or_checkpoint_is_named(saved: Path, tmp_path: Path) -> None:
    row = {**dict.fromkeys(EpochRow.__annotations__, 0), "val_accuracy": float("nan")}
    texts = ('{"step": ', '{"step": 0, "val_accuracy": 1}', "[]", "\xff", "[" * 10**5)
    for text in (*texts, json.dumps(row)):
        (saved / "metrics.jsonl").write_text(text, encoding="latin-1")
        with pytest.raises(CifarJaxError, match=r"cannot read .*metrics\.jsonl") as caught:
            load(saved)
        assert caught.value.exit_code == ExitCode.CHECKPOINT
        assert "\n" not in str(caught.value)
        assert f"Fix: say which step: {saved}/checkpoints/<step>." in str(caught.value)
    (saved / "metrics.jsonl").unlink()
    manifest = saved / "checkpoints" / "0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("a", "b"))
    with pytest.raises(CifarJaxError, match="is not the file that was saved"):
        load(saved)
    other = tmp_path / "other"
    checkpoint.save(other / "checkpoints", 1, {"x": np.zeros(1)}, {"a": 1}, best_step=1)
    with pytest.raises(CifarJaxError, match=r"contains no network .*KeyError .config"):
        load(other)


def rewrite_metadata(step: Path, change: Any) -> None:
    """As a stranger could have made it: with a manifest that is right."""
    file = step / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["metadata/metadata"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.fault("D20")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"].update(code="import os"),
        lambda m: m["config"].update(model="vgg"),
        lambda m: m["config"].update(widths=[10**9]),
        lambda m: m["config"].update(epochs="many"),
        lambda m: m.update(config=[]),
        lambda m: m.update(image_shape=[9, 9]),
        lambda m: m.update(image_shape=[-9, 9, 1]),
        lambda m: m.update(image_shape=[9.5, 9, 1]),
        lambda m: m.update(image_shape=[10**9, 10**9, 1]),
        lambda m: m.update(class_names=3),
        lambda m: m.update(class_names=[]),
        lambda m: m.update(class_names=["ant"] * 100_000),
        lambda m: m.update(class_names=["ant", "ant"]),
        lambda m: m.update(class_names=["ant", 2]),
        lambda m: m.update(class_names=["ant", "\ud800"]),  # half of a pair: it prints nowhere
        lambda m: m.update(mean=["a"]),
        lambda m: m.update(mean=[float("inf")]),
        lambda m: m.update(std=[0.0]),
        lambda m: m.update(std=[float("nan")]),
        lambda m: m.update(mean=[0.1, 0.2]),
        lambda m: m.pop("std"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_checked(saved: Path, change: Any) -> None:
    rewrite_metadata(saved / "checkpoints" / "0", change)
    with pytest.raises(CifarJaxError) as caught:
        load(saved)
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"the checkpoint {saved}/checkpoints/0 ")
    assert "config.json" not in str(caught.value)  # which is another file
    assert str(caught.value).count("Fix:") == 1


@pytest.mark.fault("D20")
def test_a_network_for_no_kind_of_image_is_refused(tmp_path: Path) -> None:
    save(make_network(channels=2), tmp_path, source="a test")
    with pytest.raises(CifarJaxError, match="images of 9x9x2"):
        load(tmp_path)
