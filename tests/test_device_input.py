"""Images on the device: the same batches as tf.data's, many steps a dispatch, no TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from cifar_jax.config import TrainConfig
from cifar_jax.data import input_pipeline
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.data.sources import load_dataset, load_splits
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.networks.models import create_model
from cifar_jax.steps import device_input, host_input
from cifar_jax.steps.augment import make_augmentation
from cifar_jax.steps.parallel import AXIS_NAME, select_devices
from cifar_jax.steps.train_step import augment_batch
from cifar_jax.train import train_and_evaluate

RNG = np.random.default_rng(0)
SPLIT = Split(
    RNG.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8), RNG.integers(0, 10, 50).astype(np.int32)
)
CONFIG = TrainConfig(batch_size=8, crop=1)  # six steps an epoch, and two images left over


def seen(make_advance: Any, devices: int, first_step: int, last_step: int) -> dict[str, Any]:
    """The images that reach the loss, augmented, and their labels, at each step."""

    def look(step: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(0), step)
        augment = make_augmentation(CONFIG, (0.5, 0.5, 0.5))
        device = lax.axis_index(AXIS_NAME)
        image = augment_batch(key, batch["image"], augment, device)
        both = lax.all_gather((image, batch["label"]), AXIS_NAME, tiled=True)
        return step + 1, {"image": both[0], "label": both[1]}

    used = select_devices(devices)
    state: Any = np.int32(first_step)
    advance = make_advance(look, state, SPLIT, CONFIG, used, first_step)
    found, step = [], first_step
    while step < last_step:
        before = min(last_step, (step // 6 + 1) * 6)
        state, batches, done = advance(state, step, before, 0)
        assert 1 <= done <= before - step
        step += done
        found.append({name: np.asarray(x).reshape(8 * done, -1) for name, x in batches.items()})
    assert int(state) == last_step
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize(("devices", "first_step", "last_step"), [(1, 0, 12), (4, 0, 6), (2, 4, 9)])
def test_the_batches_are_tf_datas(devices: int, first_step: int, last_step: int) -> None:
    ours = seen(device_input.make_advance, devices, first_step, last_step)
    theirs = seen(host_input.make_advance, 1, first_step, last_step)
    assert len(np.unique(theirs["image"], axis=0)) > 8
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_an_epoch_is_one_dispatch_but_on_a_cpu() -> None:
    assert device_input._steps_at_once("gpu", 351, 351) == 351
    assert device_input._steps_at_once("gpu", 351, 100) == 100
    assert device_input._steps_at_once("cpu", 351, 351) == 27
    assert device_input._steps_at_once("cpu", 350, 100) == 25
    assert device_input._steps_at_once("cpu", 353, 353) == 1


@pytest.mark.parametrize(("every", "lengths"), [(0, {5}), (2, {2, 1}), (9, {5})])
def test_an_accelerator_has_few_programs_in_all_epochs_together(
    every: int, lengths: set[int], image_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Each number of steps takes a program; saves are counted from an epoch's start."""
    compile_step, compiled, ran = device_input.compile_step, [], set()

    def noted(step: Any, state: Any, batch: Any, devices: Any, **options: Any) -> Any:
        program = compile_step(step, state, batch, devices, **options)
        if "signal" not in batch:  # an evaluation
            return program
        assert not ran, "compiled ahead of the first step"
        compiled.append(batch["signal"].shape[1])

        def run(state: Any, batch: Any) -> Any:
            ran.add(batch["signal"].shape[1])
            return program(state, batch)

        return run

    steps_at_once = device_input._steps_at_once
    monkeypatch.setattr(device_input, "compile_step", noted)
    monkeypatch.setattr(
        device_input, "_steps_at_once", lambda platform, *args: steps_at_once("gpu", *args)
    )
    config = TrainConfig(
        data=str(image_folder), batch_size=16, epochs=3, model="linear", input="device",
        checkpoint_every=every,
    )  # fmt: skip
    assert train_and_evaluate(config, tmp_path)["steps"] == 15
    assert ran == lengths
    assert sorted(compiled) == sorted(lengths), "once each"


@pytest.mark.fault("B10")
@pytest.mark.parametrize("devices", [1, 3])
def test_evaluation_counts_every_image_once(devices: int) -> None:
    model = create_model(TrainConfig(model="linear"), 10)
    variables = {"params": model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]}
    other = Split(SPLIT.images[-7:], SPLIT.labels[-7:])
    dataset = Dataset("x", "x", ("a",) * 10, SPLIT, SPLIT, other, (0.5,) * 3, (0.2,) * 3)
    used = select_devices(devices)
    ours = device_input.make_evaluate(model, dataset, variables, used, 16)
    theirs = host_input.make_evaluate(model, dataset, variables, used, 16)
    for split in (dataset.val, dataset.test):
        found, expected = ours(variables, split), theirs(variables, split)
        assert found.count == expected.count == len(split)
        assert found.correct == expected.correct
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_training_agrees_with_tf_data(image_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(image_folder), batch_size=16, epochs=3, widths=(4,), hidden=(8,), seed=1
    )
    theirs = train_and_evaluate(config, tmp_path / "tf")
    ours = train_and_evaluate(dataclasses.replace(config, input="device"), tmp_path / "device")
    assert ours["steps"] == theirs["steps"] == 15
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
    losses = [
        [
            json.loads(line)["train_loss"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (tmp_path / "device", tmp_path / "tf")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_no_tensorflow_is_imported(image_folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from cifar_jax.train import main\n"
        f"main(['--data', {str(image_folder)!r}, '--input', 'device', '--model', 'linear',"
        f" '--batch-size', '16', '--epochs', '1', '--workdir', {str(tmp_path / 'run')!r}])\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "starting JAX ..." in done.stdout
    assert (tmp_path / "run" / "report.json").exists()


def test_files_decode_to_the_same_pixels(image_folder: Path) -> None:
    split = load_splits(str(image_folder)).train
    np.testing.assert_array_equal(
        device_input.decode(split).pixels, input_pipeline.decode(split).pixels
    )
    resized = load_splits(str(image_folder), image_size=5).train
    np.testing.assert_array_equal(
        device_input.decode(resized).pixels, input_pipeline.decode(resized).pixels
    )


@pytest.mark.parametrize("room", [0, 0.018])  # 0.018: for training and validation, not for the test
def test_what_does_not_fit_is_refused_with_figures(
    room: float, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_input, "room_mb", lambda devices: room)
    config = TrainConfig(data=str(image_folder), input="device")
    with pytest.raises(
        CifarJaxError, match=rf"111 images of 8x8x3 take 0.02 MB.*room for {room} MB"
    ) as e:
        train_and_evaluate(config, tmp_path / "run")
    assert e.value.exit_code == ExitCode.ENVIRONMENT
    monkeypatch.undo()
    assert 100 < device_input.room_mb(jax.devices()) < 10_000_000


def test_a_run_may_change_its_input_on_the_way(image_folder: Path, tmp_path: Path) -> None:
    """Resumed at a step that no dispatch of its own would have ended at."""
    config = TrainConfig(
        data=str(image_folder), batch_size=16, epochs=2, model="linear", schedule="constant"
    )
    whole = train_and_evaluate(config, tmp_path / "whole")
    dataset = load_dataset(str(image_folder))
    assert len(dataset.train) // 16 == 5
    advance = functools.partial(train_and_evaluate, workdir=tmp_path / "parts")
    advance(dataclasses.replace(config, epochs=1, checkpoint_every=3))
    # As if it had been stopped after step 3: the newer checkpoint is gone.
    (tmp_path / "parts" / "report.json").unlink()
    (tmp_path / "parts" / "checkpoints" / "5" / "manifest.json").unlink()
    resumed = advance(dataclasses.replace(config, input="device", resume=True))
    assert resumed["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("limit_gb", "host_gb", "room_gb"), [(10, 100, 8), (10, 5, 5), (None, 5, 5)]
)
def test_an_accelerators_room_is_what_it_and_the_host_have_free(
    limit_gb: int | None, host_gb: int, room_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are decoded on the host; and not every device tells its limit."""

    class Accelerator:
        process_index = jax.process_index()

        def memory_stats(self) -> dict[str, int]:
            limit = {} if limit_gb is None else {"bytes_limit": limit_gb << 30}
            return {**limit, "bytes_in_use": 2 << 30}

    monkeypatch.setattr(device_input, "_available_bytes", lambda: host_gb << 30)
    room = device_input.room_mb([Accelerator()])  # type: ignore[list-item]
    assert room == int(device_input._SHARE_FOR_IMAGES * room_gb * 1024)


def test_the_devices_of_a_cpu_share_the_hosts_memory_with_the_decoded_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_input, "_available_bytes", lambda: 10 << 30)
    for devices, room_gb in ((1, 5), (4, 2)):
        room = device_input.room_mb(jax.devices()[:devices])
        assert room == int(device_input._SHARE_FOR_IMAGES * room_gb * 1024)


def test_where_the_host_does_not_tell_its_memory_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert device_input._available_bytes() == 1 << 50
