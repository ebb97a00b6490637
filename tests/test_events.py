"""TensorBoard event files, read by TensorFlow's own reader."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.data.input_pipeline import tf
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.train import train_and_evaluate


def events(workdir: Path) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = {}
    for path in (workdir / "tensorboard").iterdir():
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                assert (value.tag, event.step) not in found, "an epoch twice"
                found[value.tag, event.step] = value.simple_value
    return found


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_events_are_the_metrics_also_after_a_resume(image_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(image_folder), widths=(4,), hidden=(8,), batch_size=27, epochs=2,
        schedule="constant", tensorboard=True,
    )  # fmt: skip
    train_and_evaluate(config, tmp_path)
    train_and_evaluate(dataclasses.replace(config, epochs=3, resume=True), tmp_path)
    found = events(tmp_path)
    history = rows(tmp_path)
    assert len(history) == 3
    assert len(found) == 6 * 3
    for row in history:
        for tag, name in (
            ("loss/train", "train_loss"),
            ("loss/val", "val_loss"),
            ("accuracy/train", "train_accuracy"),
            ("accuracy/val", "val_accuracy"),
            ("learning_rate", "learning_rate"),
            ("images_per_second", "images_per_second"),
        ):
            assert found[tag, row["step"]] == pytest.approx(row[name], rel=1e-6)


def test_without_the_package_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CifarJaxError, match="pip install tensorboardX") as caught:
        train_and_evaluate(TrainConfig(data="shapes", tensorboard=True), tmp_path / "run")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert not (tmp_path / "run").exists()
