"""Whole runs: what lies in the workdir, and that stopping and resuming changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import write_images
from jax import lax

from cifar_jax import cli
from cifar_jax.__main__ import COMMANDS
from cifar_jax.checkpoints import checkpoint, trained
from cifar_jax.checkpoints.workdir import saved_steps
from cifar_jax.config import PRESETS, TrainConfig
from cifar_jax.convert import main as convert_main
from cifar_jax.data.sources import load_dataset
from cifar_jax.errors import CifarJaxError, ExitCode, Stopped
from cifar_jax.scoring import plots
from cifar_jax.scoring.labelled import load_labelled, logits_of
from cifar_jax.scoring.scores import score
from cifar_jax.steps import host_input
from cifar_jax.steps.metrics import (
    TABLE_HEADER,
    EpochRow,
    RunningSums,
    best_row,
    epochs_without_progress,
    table_row,
)
from cifar_jax.steps.parallel import select_devices
from cifar_jax.steps.train_step import normalize
from cifar_jax.system.stop_signals import signals_held
from cifar_jax.train import _saved_report, main, train_and_evaluate
from cifar_jax.training import start as start_module

STEPS_PER_EPOCH = 5  # of 16 images: 81 are trained on, of 90


@pytest.fixture
def config(image_folder: Path) -> TrainConfig:
    return TrainConfig(
        data=str(image_folder), widths=(4,), hidden=(8,), batch_size=16, epochs=3, dropout=0.2
    )


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def at_step(k: int, accident: Callable[[], Any]) -> Iterator[None]:
    """Let ``accident`` happen while the run prepares its ``k``-th step."""
    train_batches = host_input.train_batches

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for n, batch in enumerate(train_batches(*args, **kwargs), start=1):
            if n == k:
                accident()
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_input, "train_batches", counted)
        yield


def signal_at_step(k: int, *signals: int) -> contextlib.AbstractContextManager[None]:
    """Send real signals to this process while the run prepares its ``k``-th step."""
    # To this thread: two of os.kill can become one.
    return at_step(k, lambda: [signal.raise_signal(each) for each in signals])


@pytest.fixture(scope="module")
def reference(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The report and workdir of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    config = TrainConfig(
        data=str(image_folder), widths=(4,), hidden=(8,), batch_size=16, epochs=3, dropout=0.2
    )
    return train_and_evaluate(config, workdir), workdir


def test_an_epoch_is_saved_before_it_is_told(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the table may be gone, as `head` goes when it has read enough."""

    def gone(row: EpochRow) -> str:
        raise BrokenPipeError

    monkeypatch.setattr("cifar_jax.training.loop.table_row", gone)
    with pytest.raises(BrokenPipeError):
        train_and_evaluate(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints") == [STEPS_PER_EPOCH]


@pytest.mark.fault("C24")
def test_the_workdir_holds_what_it_should(reference: tuple[dict[str, Any], Path]) -> None:
    report, workdir = reference
    assert json.loads((workdir / "report.json").read_text()) == report
    assert {
        "data", "model", "n_params", "n_train", "n_val", "n_test", "val_accuracy",
        "test_accuracy", "test_loss", "test_correct", "epochs", "steps", "train_seconds",
        "images_per_second", "devices", "seed", "versions", "params_sha256",
    } <= set(report)  # fmt: skip
    assert (report["n_train"], report["n_val"], report["n_test"]) == (81, 9, 21)
    assert (report["epochs"], report["steps"]) == (3, 3 * STEPS_PER_EPOCH)
    assert report["n_params"] == (3 * 3 * 3 * 4 + 4) + (4 * 4 * 4 * 8 + 8) + (8 * 3 + 3)
    assert report["test_accuracy"] == report["test_correct"] / 21
    assert report["data"]["name"] == Path(report["data"]["name"]).name
    assert len(report["data"]["digest"]) == len(report["params_sha256"]) == 64

    rows = read_rows(workdir)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 5), (2, 10), (3, 15)]
    assert {
        "epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
        "learning_rate", "images_per_second", "seconds",
    } == set(rows[0])  # fmt: skip
    assert report["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    computing = sum(16 * STEPS_PER_EPOCH / row["images_per_second"] for row in rows)
    assert report["images_per_second"] == pytest.approx(3 * 16 * STEPS_PER_EPOCH / computing)
    assert report["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))

    assert (workdir / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert saved_steps(workdir / "checkpoints")[-1] == 15
    metadata = checkpoint.restore_metadata(workdir / "checkpoints" / "15")
    assert metadata["class_names"] == ["bird", "cat", "frog"]
    assert metadata["history"] == rows
    assert len(metadata["mean"]) == len(metadata["std"]) == 3


@pytest.mark.fault("A3")
@pytest.mark.parametrize("stop_in_step", [1, 3, 5, 8])
def test_a_resumed_run_arrives_at_the_same_bits(
    reference: tuple[dict[str, Any], Path], config: TrainConfig, tmp_path: Path, stop_in_step: int
) -> None:
    """Stopped at the start, inside an epoch, at an epoch's end and inside the second epoch."""
    with (
        signal_at_step(stop_in_step, signal.SIGTERM),
        pytest.raises(Stopped, match=r"stopped by SIGTERM: step \d+ is saved in") as stop,
    ):
        train_and_evaluate(config, tmp_path)
    assert stop.value.exit_code == 143
    assert f"python -m cifar_jax.train --resume --workdir {tmp_path}" in str(stop.value)
    (stopped_at,) = re.findall(r"step (\d+) is saved", str(stop.value))
    assert stop_in_step <= int(stopped_at) <= stop_in_step + 3, "the steps in flight, and one"
    assert not (tmp_path / "report.json").exists()
    has_an_epoch = int(stopped_at) >= STEPS_PER_EPOCH
    assert (tmp_path / "plots" / "curves.png").exists() == has_an_epoch

    report = train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path)
    for name in ("params_sha256", "test_loss", "test_correct", "val_accuracy", "steps", "epochs"):
        assert report[name] == reference[0][name], name
    timings = {"seconds", "images_per_second"}
    for row, expected in zip(read_rows(tmp_path), read_rows(reference[1]), strict=True):
        assert {k: v for k, v in row.items() if k not in timings} == {
            k: v for k, v in expected.items() if k not in timings
        }


def test_the_seed_and_the_options_of_data_reach_the_run(image_folder: Path, tmp_path: Path) -> None:
    """At a rate that changes nothing, the network stays as the seed has drawn it."""
    config = TrainConfig(
        data=shutil.make_archive(str(tmp_path / "images"), "gztar", image_folder),
        data_dir=str(tmp_path / "extracted"), image_size=5, val_fraction=0.2,
        max_train_examples=60, seed=1, model="linear", batch_size=60, epochs=1,
        optimizer="sgd", learning_rate=1e-12,
    )  # fmt: skip
    report = train_and_evaluate(config, tmp_path / "run")
    assert (report["n_train"], report["n_val"], report["n_test"]) == (60, 18, 21)
    assert (tmp_path / "extracted").is_dir()
    network = trained.load(tmp_path / "run")
    assert network.image_shape == (5, 5, 3)
    drawn = network.model.init(jax.random.key(1), np.zeros((1, 5, 5, 3)))
    kernels = (each["params"]["Dense_0"]["kernel"] for each in (network.variables, drawn))
    np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-9)
    val = load_labelled(network, "val", data=None, data_dir=None)
    (row,) = read_rows(tmp_path / "run")
    loss = score(logits_of(network, val), val.split.labels).loss
    assert row["val_loss"] == pytest.approx(loss, rel=1e-5), "the split is the seed's"


@pytest.mark.fault("C26")
def test_a_class_without_training_images_is_warned_of(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the three classes, two keep an image each."""
    config = TrainConfig(
        data=str(image_folder), input="device", model="linear", batch_size=2, epochs=1,
        max_train_examples=2,
    )  # fmt: skip
    train_and_evaluate(config, tmp_path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert re.fullmatch("warning: no image of (bird|cat|frog) to train on", warnings[0])


def test_bfloat16_is_trained_in_and_not_scored_in(image_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(image_folder), model="mlp", hidden=(8,), batch_size=27, epochs=1, dtype="bfloat16"
    )
    report = train_and_evaluate(config, tmp_path / "half")
    whole = train_and_evaluate(dataclasses.replace(config, dtype="float32"), tmp_path / "whole")
    assert report["params_sha256"] != whole["params_sha256"]
    network = trained.load(tmp_path / "half")
    test = load_labelled(network, "test", data=None, data_dir=None)
    in_float32 = score(logits_of(network, test), test.split.labels)
    assert report["test_loss"] == pytest.approx(in_float32.loss, rel=1e-6)


def test_the_rate_is_that_of_each_epochs_last_step(image_folder: Path, tmp_path: Path) -> None:
    """Of 81 images, 30 a step: six steps in three epochs, though 3 * 81 are eight times 30."""
    config = TrainConfig(
        data=str(image_folder), model="linear", batch_size=30, epochs=3, schedule="linear"
    )
    train_and_evaluate(config, tmp_path)
    rates = [row["learning_rate"] for row in read_rows(tmp_path)]
    assert rates == pytest.approx([3e-3 * (1 - step / 6) for step in (1, 3, 5)])


@pytest.mark.fault("A5")
def test_ctrl_c_twice_does_not_wait_for_a_save(config: TrainConfig, tmp_path: Path) -> None:
    with (
        signal_at_step(3, signal.SIGINT, signal.SIGINT),
        pytest.raises(KeyboardInterrupt),
    ):
        train_and_evaluate(config, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == []


def test_a_signal_that_is_ignored_stays_ignored(config: TrainConfig, tmp_path: Path) -> None:
    """As of a run that a shell or nohup has put in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signal_at_step(2, signal.SIGINT):
            report = train_and_evaluate(config, tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert report["epochs"] == config.epochs


@pytest.mark.fault("A15", "A16")
def test_another_run_is_not_overwritten(
    reference: tuple[dict[str, Any], Path], config: TrainConfig
) -> None:
    _, workdir = reference
    before = {f: f.stat().st_mtime_ns for f in workdir.rglob("*")}
    with pytest.raises(CifarJaxError, match=r"contains another run. Fix: add --resume") as caught:
        train_and_evaluate(config, workdir)
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(CifarJaxError, match=r"--learning-rate 0.1 \(was 0.003\)"):
        train_and_evaluate(dataclasses.replace(config, resume=True, learning_rate=0.1), workdir)
    # Complete already: nothing is trained, nothing written.
    report = train_and_evaluate(dataclasses.replace(config, resume=True), workdir)
    assert report == reference[0]
    assert {f: f.stat().st_mtime_ns for f in workdir.rglob("*")} == before


@pytest.mark.fault("A10")
def test_other_data_are_refused_on_resume(config: TrainConfig, tmp_path: Path) -> None:
    write_images(tmp_path / "other", {"bird": 30, "cat": 30, "frog": 31})
    with signal_at_step(2, signal.SIGTERM), pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path / "run")
    changed = dataclasses.replace(config, resume=True, data=str(tmp_path / "other"))
    with pytest.raises(CifarJaxError, match=r"was trained on .* --data now gives other") as caught:
        train_and_evaluate(changed, tmp_path / "run")
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_a_constant_rate_allows_more_epochs(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, schedule="constant", optimizer="sgd", epochs=1)
    train_and_evaluate(config, tmp_path / "a")
    longer = dataclasses.replace(config, epochs=2)
    resumed = dataclasses.replace(longer, resume=True)
    with signal_at_step(2, signal.SIGTERM), pytest.raises(Stopped):
        train_and_evaluate(resumed, tmp_path / "a")
    with pytest.raises(CifarJaxError, match=r"--epochs 1 .* already in epoch 2"):
        train_and_evaluate(dataclasses.replace(resumed, epochs=1), tmp_path / "a")
    assert not (tmp_path / "a" / "report.json").exists(), "it would pass for the report of two"
    more = train_and_evaluate(resumed, tmp_path / "a")
    at_once = train_and_evaluate(longer, tmp_path / "b")
    assert more["params_sha256"] == at_once["params_sha256"]
    with pytest.raises(CifarJaxError, match=r"--epochs 1 .* already in epoch 2") as caught:
        train_and_evaluate(dataclasses.replace(resumed, epochs=1), tmp_path / "a")
    assert caught.value.exit_code == ExitCode.USAGE
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == more, "left as it was"


@pytest.mark.fault("A22")
def test_a_damaged_report_or_history_is_made_anew(
    reference: tuple[dict[str, Any], Path], config: TrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(reference[1], tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    for text in ("{}", "[1]", '{"steps": ', ""):
        path.write_text(text)
        assert _saved_report(path.parent) is None, text
    history = path.parent / "metrics.jsonl"
    whole = history.read_text()
    history.write_text(whole[: len(whole) // 2])
    again = train_and_evaluate(dataclasses.replace(config, resume=True), path.parent)
    assert again == reference[0] == json.loads(path.read_text())
    assert history.read_text() == whole


def test_saving_is_no_part_of_the_rate(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that save more or less often are to be comparable. Validation is of the time alone."""
    perf_counter, save, late = time.perf_counter, checkpoint.save, [0]
    make_evaluate = host_input.make_evaluate

    def slow(*args: Any, **options: Any) -> None:
        save(*args, **options)
        late[0] += 1_000_000

    def slow_to_evaluate(*args: Any, **options: Any) -> Any:
        evaluate = make_evaluate(*args, **options)

        def slow(*args: Any) -> Any:
            late[0] += 1000
            return evaluate(*args)

        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + late[0])
    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(host_input, "make_evaluate", slow_to_evaluate)
    config = dataclasses.replace(config, model="linear", widths=(), hidden=(), dropout=0.0)
    train_and_evaluate(dataclasses.replace(config, checkpoint_every=2), tmp_path)
    assert late[0] == 9 * 1_000_000 + 4 * 1000
    assert all(1000 < row["seconds"] < 1_000_000 for row in read_rows(tmp_path))
    assert min(row["images_per_second"] for row in read_rows(tmp_path)) > 1


def test_the_time_of_an_epoch_is_that_of_all_its_parts(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data=str(image_folder), model="linear", batch_size=16, epochs=1)
    perf_counter, late = time.perf_counter, [0]
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + late[0])

    def be_late_and_stop() -> None:
        late[0] += 1000
        signal.raise_signal(signal.SIGTERM)

    with at_step(1, be_late_and_stop), pytest.raises(Stopped, match=r"step [1-4] is saved"):
        train_and_evaluate(config, tmp_path)
    train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path)
    (row,) = read_rows(tmp_path)
    assert row["seconds"] > 1000
    assert row["images_per_second"] < 1


@pytest.mark.fault("A13")
@pytest.mark.parametrize(
    ("source", "decay", "checkpoint_every"),  # with a decay, the parameters at once
    [
        ("tf.data", 0.0, 0),
        ("tf.data", 0.0, 1),
        ("device", 0.0, 0),
        ("device", 0.0, 1),
        ("tf.data", 1e9, 1),
    ],
)
def test_a_diverging_run_says_where_and_what_to_do(
    config: TrainConfig, tmp_path: Path, source: Any, decay: float, checkpoint_every: int
) -> None:
    config = dataclasses.replace(
        config, optimizer="sgd", schedule="linear", learning_rate=1e30, weight_decay=decay,
        input=source, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    with pytest.raises(
        CifarJaxError, match=r"(loss is|not finite).*step .*saved.*Fix: .*--learn"
    ) as caught:
        train_and_evaluate(config, tmp_path)
    if not checkpoint_every:  # of that very step, however many are dispatched at once
        assert "step 2, learning rate 9.33333e+29;" in str(caught.value)
    assert caught.value.exit_code == ExitCode.NUMERICS
    for step in saved_steps(tmp_path / "checkpoints"):
        saved = trained.load(tmp_path / "checkpoints" / str(step)).variables
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved)), step


@pytest.mark.fault("A13")
@pytest.mark.parametrize("what", ["validation loss is inf after step 5", "test loss is inf with"])
def test_a_score_that_is_not_finite_ends_a_run(
    what: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [math.inf] if "validation" in what else [1.0, math.inf]
    sums = (RunningSums(loss=loss, correct=1, count=9) for loss in losses)
    monkeypatch.setattr(host_input, "make_evaluate", lambda *_, **__: lambda *_: next(sums))
    config = dataclasses.replace(
        config, model="linear", widths=(), hidden=(), dropout=0.0, epochs=1
    )
    with pytest.raises(CifarJaxError, match=f"the {what}") as caught:
        train_and_evaluate(config, tmp_path)
    assert caught.value.exit_code == ExitCode.NUMERICS
    assert not (tmp_path / "report.json").exists()


@pytest.mark.fault("A13")
def test_nothing_is_saved_that_is_not_finite(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a batch norm's statistics, of which no training loss tells."""
    initial = start_module.create_train_state

    def with_nan(*args: Any) -> Any:
        state = initial(*args)
        nan = jax.tree.map(lambda x: x * np.nan, state.batch_stats)
        return state.replace(batch_stats=nan)

    monkeypatch.setattr(start_module, "create_train_state", with_nan)
    config = dataclasses.replace(
        config, model="cnn-gap", hidden=(), dropout=0.0, batch_norm=True, checkpoint_every=1
    )
    with pytest.raises(CifarJaxError, match="is not finite after step 1; nothing is saved"):
        train_and_evaluate(config, tmp_path)


@pytest.mark.fault("B8", "B9")
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"batch_size": 100}, ExitCode.USAGE, "--batch-size 100 is more than the 81 images"),
        ({"crop": 9}, ExitCode.USAGE, "--crop 9 is more than there is in images of 8x8"),
        ({"devices": 8}, ExitCode.ENVIRONMENT, "jax sees 4 cpu device.*device_count=8"),
        ({"devices": "all", "batch_size": 18}, ExitCode.USAGE, "use --batch-size 16 or 20"),
    ],
)
def test_what_only_shows_with_data_or_devices_is_said_too(
    config: TrainConfig, tmp_path: Path, options: dict[str, Any], code: ExitCode, message: str
) -> None:
    with pytest.raises(CifarJaxError, match=message) as caught:
        train_and_evaluate(dataclasses.replace(config, **options), tmp_path / "run")
    assert caught.value.exit_code == code
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("A18")
def test_a_workdir_that_cannot_be_made_is_said_at_once(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CifarJaxError, match="run cannot be written: Not a directory") as caught:
        train_and_evaluate(config, tmp_path / "file" / "run")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_early_stopping_waits_as_long_as_told(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate that changes nothing, the first epoch stays the best."""
    config = dataclasses.replace(
        config, epochs=9, early_stopping=2, learning_rate=1e-12, schedule="constant", dropout=0
    )
    report = train_and_evaluate(config, tmp_path)
    assert report["epochs"] == 3
    assert "early stop: 2 epochs without a lower val loss" in capsys.readouterr().out


def rows_of(*val: tuple[float, float]) -> list[EpochRow]:
    return [
        EpochRow(
            epoch=i, step=7 * i, train_loss=0, train_accuracy=0, val_loss=loss,
            val_accuracy=accuracy, learning_rate=0, images_per_second=0, seconds=0,
        )
        for i, (loss, accuracy) in enumerate(val, start=1)
    ]  # fmt: skip


def test_the_curves_are_of_training_and_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.save_curves(rows_of((0.9, 0.5), (0.7, 0.75)), "", tmp_path / "curves.png")
    drawn = [
        {line.get_label().split()[0]: list(line.get_ydata()) for line in axes.lines[:2]}
        for axes in figures[0].axes
    ]
    best = figures[0].axes[0].lines[2]
    assert (best.get_xdata()[0], best.get_label()) == (2, "best validation accuracy: 75.0 %")
    assert drawn == [
        {"training": [0, 0], "validation": [0.9, 0.7]},
        {"training": [0, 0], "validation": [50, 75]},
    ]


def test_what_follows_from_a_history() -> None:
    history = rows_of((0.9, 0.5), (0.7, 0.6), (0.8, 0.7), (0.9, 0.7))
    assert best_row(history)["epoch"] == 3, "the earliest of the most accurate"
    assert epochs_without_progress(history) == 2
    assert epochs_without_progress([]) == 0


def test_each_figure_of_the_table_is_under_its_name() -> None:
    row = EpochRow(
        epoch=1, step=84, train_loss=2.2489, train_accuracy=0.1501, val_loss=2.0176,
        val_accuracy=0.265, learning_rate=8.3e-4, images_per_second=5743, seconds=2.04,
    )  # fmt: skip
    assert len(TABLE_HEADER) == len(table_row(row))
    assert table_row(row).split("  ")[-1].strip() == "2.0 s"
    assert table_row(row).split()[:-2] == [
        *("1", "84", "2.2489", "15.01", "2.0176", "26.50", "8.30e-04", "5,743"),
    ]


@pytest.mark.fault("A11")
def test_greyscale_on_four_devices_resumes_on_one(tmp_path: Path) -> None:
    write_images(tmp_path / "grey", {"a": 60, "b": 60}, mode="L", size=9)
    config = TrainConfig(
        data=str(tmp_path / "grey"), model="cnn-gap", widths=(4, 4), batch_norm=True,
        batch_size=16, epochs=2, devices=4,
    )  # fmt: skip
    whole = train_and_evaluate(dataclasses.replace(config, devices=1), tmp_path / "one")
    with signal_at_step(8, signal.SIGTERM), pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path / "four")
    resumed = dataclasses.replace(config, devices=1, resume=True)
    report = train_and_evaluate(resumed, tmp_path / "four")
    assert math.isclose(report["test_loss"], whole["test_loss"], rel_tol=1e-4)


def test_batch_norm_is_over_all_devices_unless_told_otherwise(
    image_folder: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        data=str(image_folder), model="cnn-gap", widths=(4,), batch_norm=True, batch_size=16,
        epochs=1, devices=2,
    )  # fmt: skip
    together, apart = (
        train_and_evaluate(dataclasses.replace(config, sync_batch_norm=sync), tmp_path / str(sync))
        for sync in (True, False)
    )
    assert together["params_sha256"] != apart["params_sha256"]


@pytest.mark.fault("A19")
def test_a_workdir_that_is_taken_away_is_made_anew(
    reference: tuple[dict[str, Any], Path],
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = tmp_path / "run"
    with at_step(8, lambda: shutil.rmtree(workdir)):
        report = train_and_evaluate(config, workdir)
    assert "was removed; creating it again" in capsys.readouterr().out
    assert report["params_sha256"] == reference[0]["params_sha256"]
    assert len(read_rows(workdir)) == 3
    again = train_and_evaluate(dataclasses.replace(config, resume=True), workdir)
    assert again == report


def as_it_was_before_its_test(run: Path, workdir: Path) -> None:
    shutil.copytree(run, workdir)
    (workdir / "report.json").unlink()


@pytest.mark.fault("A7")
def test_if_the_best_checkpoint_is_lost_the_last_is_scored(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate that changes nothing, the first epoch stays the best."""
    config = dataclasses.replace(config, learning_rate=1e-12, schedule="constant", dropout=0)
    train_and_evaluate(config, tmp_path / "whole")
    as_it_was_before_its_test(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "5" / "manifest.json").write_text("[]")
    report = train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path / "run")
    assert report["best_step"] == 15
    out = capsys.readouterr().out
    assert "checkpoints/5 cannot be used" in out
    assert "The last epoch is scored instead" in out


@pytest.mark.fault("A2", "A20")
def test_what_does_not_belong_among_the_checkpoints_is_named(
    reference: tuple[dict[str, Any], Path],
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_it_was_before_its_test(reference[1], tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "99").mkdir()
    (checkpoints / ".unfinished-16" / "state").mkdir(parents=True)
    report = train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path / "run")
    assert report["params_sha256"] == reference[0]["params_sha256"]
    out = capsys.readouterr().out
    assert f"warning: ignored in {checkpoints}: 99, which are not checkpoints" in out
    assert f"removed {checkpoints / '.unfinished-16'}, left by an interrupted save" in out
    assert (checkpoints / "99").exists()
    assert not (checkpoints / ".unfinished-16").exists()


@pytest.mark.fault("A8")
def test_checkpoints_without_their_config_are_not_trained_over(
    reference: tuple[dict[str, Any], Path], config: TrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(reference[1], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    for resume in (False, True):
        with pytest.raises(CifarJaxError, match=r"has the checkpoints of a run, but not") as caught:
            train_and_evaluate(dataclasses.replace(config, resume=resume), tmp_path / "run")
        assert caught.value.exit_code == ExitCode.CHECKPOINT
    (tmp_path / "run" / "config.json").write_text("")
    with pytest.raises(CifarJaxError, match=r"cannot read .*config.json.*Fix: put it back"):
        train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path / "run")


@pytest.mark.parametrize(
    "of_this_start",
    [
        [],
        ["--coordinator", "auto"],
        ["--coordinator", "localhost:9876", "--num-processes", "2", "--process-id", "1"],
    ],
)
def test_resume_of_no_run_begins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_this_start: list[str]
) -> None:
    """A mistyped folder, with nothing said of the run itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CifarJaxError, match=r"--resume: there is no run in --workdir") as caught:
        main(["--resume", "--workdir=~/none", *of_this_start])
    assert str(tmp_path / "none") in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name", ["report.json", "metrics.jsonl", "plots/curves.png", "tensorboard/events"]
)
def test_files_of_something_else_are_not_overwritten(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    """As with ``--workdir .`` in a project that has a ``report.json`` of its own."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    for resume in (False, True):
        with pytest.raises(CifarJaxError, match=r"no run, but has .* Fix: give another") as error:
            train_and_evaluate(dataclasses.replace(config, resume=resume), tmp_path)
        assert error.value.exit_code == ExitCode.USAGE
        assert str(tmp_path / name).startswith(str(error.value).split("but has ")[1].split(",")[0])
    assert (tmp_path / name).read_text() == "years of work"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def start(image_folder: Path, workdir: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "cifar_jax.train", "--data", str(image_folder),
        "--widths", "4", "--hidden", "8", "--batch-size", "16", "--workdir", str(workdir),
        *options,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=workdir.parent
    )


@pytest.mark.parametrize("source", ["tf.data", "device"])
def test_deterministic_is_of_one_run_and_also_where_jax_is_in_use_already(
    source: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA reads its flags only once."""
    compile_, passed = jax.stages.Lowered.compile, []

    def noted(lowered: Any, compiler_options: Any = None) -> Any:
        passed.append(compiler_options or {})
        return compile_(lowered, compiler_options)

    flags = os.environ.get("XLA_FLAGS")
    assert jax.numpy.ones(2).sum() == 2
    monkeypatch.setattr("jax.stages.Lowered.compile", noted)
    config = TrainConfig(
        data=str(image_folder), model="airbench", widths=(4,), batch_size=16, epochs=1,
        input=source, deterministic=True,
    )  # fmt: skip
    report = train_and_evaluate(config, tmp_path / "run")
    first, *others = passed
    assert first.keys() == {"xla_backend_optimization_level"}, "random draws alone"
    assert len(others) >= 3, "whitening, training, scoring"
    assert all(options == report["compiler_options"] for options in others)
    assert report["compiler_options"]["xla_gpu_deterministic_ops"] is True
    assert report["compiler_options"]["xla_gpu_per_fusion_autotune_cache_dir"] == "", "none found"
    assert os.environ.get("XLA_FLAGS") == flags
    other = train_and_evaluate(dataclasses.replace(config, deterministic=False), tmp_path / "other")
    assert "xla_gpu_deterministic_ops" not in other["compiler_options"]


def wait_for_a_step_after(step: int, workdir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(saved > step for saved in saved_steps(workdir / "checkpoints")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault("A1", "A22")
def test_killed_runs_resume_to_the_same_bits(image_folder: Path, tmp_path: Path) -> None:
    """Real processes: SIGKILL inside an epoch, SIGTERM after the resume, then to the end."""
    options = ("--epochs", "8", "--checkpoint-every", "2")
    whole = start(image_folder, tmp_path / "whole", *options)

    workdir = tmp_path / "killed"
    process = start(image_folder, workdir, *options)
    wait_for_a_step_after(5, workdir, process)
    process.kill()
    process.communicate()
    assert not (workdir / "report.json").exists()

    process = start(image_folder, workdir, "--resume")
    wait_for_a_step_after(saved_steps(workdir / "checkpoints")[-1], workdir, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, (out, err)
    assert "resumed at step" in out
    assert "stopped by SIGTERM: step" in err
    assert f"--resume --workdir {workdir}" in err
    assert "Traceback" not in err

    process = start(image_folder, workdir, "--resume")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    assert whole.communicate(timeout=200)[0].count("\n") > 8, "a line an epoch"
    assert whole.returncode == 0
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")
    ]
    assert reports[0]["params_sha256"] == reports[1]["params_sha256"]
    assert reports[0]["test_loss"] == reports[1]["test_loss"]
    assert reports[0]["steps"] == 8 * STEPS_PER_EPOCH


# In a process of its own, `cifar_jax.train` with a function that first meets with an accident.
LAUNCH = """if True:
    import importlib, os, signal, sys
    name, accident, *sys.argv[1:] = sys.argv[1:]
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    def with_accident(*args, **kwargs):
        setattr(module, function_name, function)
        exec(accident)
        return function(*args, **kwargs)
    setattr(module, function_name, with_accident)
    from cifar_jax import cli, train
    cli.run(train.main)
"""


def launch(
    image_folder: Path, workdir: Path, function: str, accident: str, *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-c", LAUNCH, function, accident, "--workdir", str(workdir)),
            *("--data", str(image_folder), "--model", "linear", "--input", "device"),
            *("--batch-size", "16", "--epochs", "2", *options),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.fault("A4", "A5")
@pytest.mark.parametrize(
    ("where", "signum", "said"),
    [
        ("cifar_jax.training.start.load_dataset", signal.SIGTERM, "nothing more was saved"),
        ("cifar_jax.steps.device_input.make_advance", signal.SIGTERM, "nothing more was saved"),
        ("cifar_jax.training.loop._validate", signal.SIGTERM, "step 5 is saved"),
        ("cifar_jax.checkpoints.checkpoint.save", signal.SIGINT, "step 5 is saved"),
        ("cifar_jax.training.loop.test_and_report", signal.SIGTERM, "training is saved"),
        ("cifar_jax.training.loop.test_and_report", signal.SIGINT, "--resume --workdir"),
    ],
)
def test_a_signal_in_any_phase_ends_the_run_cleanly(
    image_folder: Path, tmp_path: Path, where: str, signum: int, said: str
) -> None:
    accident = f"signal.raise_signal({int(signum)})"
    done = launch(image_folder, tmp_path / "run", where, accident)
    assert done.returncode == 128 + signum, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    config = TrainConfig(
        data=str(image_folder), model="linear", input="device", batch_size=16, epochs=2, resume=True
    )
    train_and_evaluate(config, tmp_path / "run")
    assert len(read_rows(tmp_path / "run")) == 2


@pytest.mark.fault("A4")
@pytest.mark.parametrize("nth", [1, 2])  # the initial state, the step
def test_a_signal_waits_for_the_compiler(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """What a signal's exception cuts off there has the program crash when it exits."""
    compile_, begun, compiled = jax.stages.Lowered.compile, [], []

    def with_signal(*args: Any, **options: Any) -> Any:
        begun.append(args)
        if len(begun) == nth:
            signal.raise_signal(signal.SIGINT)
        compiled.append(compile_(*args, **options))
        return compiled[-1]

    monkeypatch.setattr("jax.stages.Lowered.compile", with_signal)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path)
    assert len(compiled) == len(begun) == nth


@pytest.mark.fault("A4")
def test_a_signal_is_not_lost_to_an_error_of_the_compiler() -> None:
    def compile_what_is_too_large() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(KeyboardInterrupt), contextlib.suppress(jax.errors.JaxRuntimeError):
        compile_what_is_too_large()


@pytest.mark.fault("A4")
def test_a_signal_waits_for_the_import_of_jax(image_folder: Path, tmp_path: Path) -> None:
    """Its exception there can abort the process."""
    program = f"""if True:
        import atexit, signal, sys
        from cifar_jax import cli, train
        class Finder:
            def find_spec(self, name, path, target=None):
                if name == "cifar_jax.training.loop":
                    signal.raise_signal(signal.SIGTERM)
        sys.meta_path.insert(0, Finder())
        options = ["--data", {str(image_folder)!r}, "--workdir", {str(tmp_path / "run")!r}]
        def main():
            atexit.register(lambda: print("cifar_jax.training.loop" in sys.modules, flush=True))
            train.main(options)
        cli.run(main)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout.splitlines()[-1] == "True", "imported to the end"


@pytest.mark.fault("B7")
def test_what_does_not_fit_into_memory_is_said(image_folder: Path, tmp_path: Path) -> None:
    """As a GPU says it: of a CPU, Linux promises more memory than there is."""
    accident = "import jax; raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')"
    where = "cifar_jax.steps.device_input.make_advance"
    done = launch(image_folder, tmp_path / "run", where, accident)
    assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
    assert "out of memory: RESOURCE_EXHAUSTED: Out of memory" in done.stderr
    assert "--batch-size" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.fault("B7")
@pytest.mark.parametrize(
    ("message", "said", "cure"),
    [
        ("RESOURCE_EXHAUSTED: 9 GB", "out of memory", "a smaller --batch-size"),
        ("RESOURCE_EXHAUSTED: 9 GB\nCUDA_ERROR_OUT_OF_MEMORY: out of memory",
         "out of memory", "close another program"),
        ("FAILED_PRECONDITION: DNN library initialization failed. Look above",
         "the GPU cannot be used", "another process may hold the GPU: stop it"),
        ("INTERNAL: operation gpublasCreate(&handle) failed: not initialized",
         "the GPU cannot be used", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ("INTERNAL: failed\nCUDA_ERROR_OUT_OF_MEMORY: out of memory",
         "the GPU cannot be used", "another process may hold the GPU: stop it"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_taken_is_no_bug(message: str, said: str, cure: str) -> None:
    told = cli._told(jax.errors.JaxRuntimeError(message))
    assert told.exit_code == ExitCode.ENVIRONMENT
    assert told.what.startswith(said)
    assert cure in told.fix


@pytest.mark.fault("B7")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_but_train_leaves_memory_to_others(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(cli, "run", lambda main, **options: found.append(options))
    runpy.run_module(f"cifar_jax.{command}", run_name="__main__")
    assert found == [{} if command == "train" else {"beside_training": True}]


@pytest.mark.fault("B7")
@pytest.mark.parametrize(
    ("options", "given", "used"),
    [("", None, None), ("beside_training=True", None, "false"), ("beside_training=True", "1", "1")],
)
def test_memory_of_a_gpu_is_left_to_others_unless_it_is_asked_for(
    options: str, given: str | None, used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    program = (
        f"import os; from cifar_jax import cli; show = lambda: print(os.environ.get({name!r}))"
    )
    program += f"; cli.run(show, {options})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{used}\n"), done.stderr


@pytest.mark.fault("B6", "B12", "B13")
@pytest.mark.parametrize(
    ("name", "value", "code", "said"),
    [
        ("JAX_PLATFORMS", "cuda", ExitCode.ENVIRONMENT, "error: JAX_PLATFORMS=cuda, and jax"),
        ("XLA_FLAGS", "--xla_no_such_flag=1", 1, "Unknown flag in XLA_FLAGS: --xla_no_such"),
        ("JAX_COMPILATION_CACHE_DIR", "open", ExitCode.ENVIRONMENT, "can be written by others"),
    ],
)
def test_an_environment_that_cannot_be_is_said(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    code: int,
    said: str,
) -> None:
    if value == "open":
        (tmp_path / value).mkdir()
        (tmp_path / value).chmod(0o777)
        value = str(tmp_path / value)
    monkeypatch.setenv(name, value)
    done = launch(image_folder, tmp_path / "run", "os.getcwd", "")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.fault("B12")
def test_where_nothing_is_to_be_compiled_that_is_said() -> None:
    with jax.disable_jit(), pytest.raises(CifarJaxError, match="JAX_DISABLE_JIT is set") as caught:
        select_devices(1)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.fault("B6")
def test_commands_that_do_not_train_say_so_too(trained_run: Path, tmp_path: Path) -> None:
    program = f"""if True:
        from cifar_jax import convert, predict, summary
        from cifar_jax.errors import CifarJaxError
        def refused(main, *options):
            try:
                main(options)
            except CifarJaxError as error:
                print(int(error.exit_code), error)
        refused(predict.main, "--checkpoint", {str(trained_run)!r}, "image.png")
        refused(convert.main, {str(tmp_path / "net.safetensors")!r}, {str(tmp_path / "net")!r})
        refused(summary.main)
    """
    convert_main([str(trained_run), str(tmp_path / "net.safetensors")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    assert len(said) == 3, done
    assert all(line.startswith("6 JAX_PLATFORMS=cuda, and jax finds no") for line in said), said
    assert "AssertionError" not in done.stdout


@pytest.mark.fault("B14")
def test_tensorflow_is_kept_off_the_accelerators(tmp_path: Path) -> None:
    """Also where it was imported before, and Triton, after it, would crash the process."""
    (tmp_path / "triton.py").write_text("raise SystemExit('after TensorFlow')")
    program = """if True:
        import tensorflow as tf
        calls = []
        tf.config.set_visible_devices = lambda *args: calls.append(args)
        from cifar_jax.data import input_pipeline
        assert calls == [([], "GPU")], calls
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_tensorflow_is_imported_without_keras() -> None:
    """Which it would not need, and takes a fifth of its import's time; who asks for it gets it."""
    program = """if True:
        import sys
        from cifar_jax.data import input_pipeline
        assert "keras" not in sys.modules
        assert input_pipeline.tf.keras.__version__.startswith("3.")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "where", [{"input": "device"}, {"cache_mb": 0}], ids=["device", "streamed"]
)
def test_airbench_whitens_its_own_training_images(
    where: dict[str, Any], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded beforehand or not; training leaves that kernel as it is, and so does resuming."""
    monkeypatch.setattr(
        "cifar_jax.training.start.whitening_stride", lambda n: 3
    )  # as of many images
    preset = PRESETS["airbench"]
    config = dataclasses.replace(
        preset, data=str(image_folder), widths=(4,), batch_size=16, epochs=2, **where
    )
    with signal_at_step(7, signal.SIGINT), contextlib.suppress(Stopped):
        train_and_evaluate(config, tmp_path / "run")
    train_and_evaluate(dataclasses.replace(config, resume=True), tmp_path / "run")
    assert len(read_rows(tmp_path / "run")) == 2
    kernel = trained.load(tmp_path / "run").variables["params"]["Whitening"]["kernel"]
    dataset = load_dataset(str(image_folder))
    images = normalize(dataset.train.pixels[::3], dataset.mean, dataset.std)
    outputs = lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1, 24)[:, :12]
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), np.eye(12), atol=0.01)


def test_the_command_names_a_new_workdir_by_itself(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(image_folder), "--model", "linear", "--epochs", "1", "--batch-size", "27"]
    main(argv)
    main(argv)
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert all((run / "report.json").exists() and run.name.endswith("linear") for run in runs)
