"""``cifar_jax.evaluate``: what it finds equals what training found, and is written down."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from cifar_jax.checkpoints import trained
from cifar_jax.data import shapes
from cifar_jax.data.sources import load_splits
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.evaluate import EvaluateOptions, describe, evaluate, main
from cifar_jax.scoring import plots
from cifar_jax.scoring.inference import make_logits
from cifar_jax.scoring.labelled import load_labelled
from cifar_jax.scoring.scores import score


@pytest.fixture(scope="module")
def evaluation(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("evaluation")
    found = evaluate(EvaluateOptions(str(trained_run), output=str(output)))
    assert json.loads((output / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    for picture in ("confusion", "calibration", "mistakes"):
        with Image.open(output / "plots" / f"{picture}.png") as image:
            assert image.width > 300
    return found


def test_the_test_split_gives_what_training_reported(
    trained_run: Path, evaluation: dict[str, Any]
) -> None:
    report = json.loads((trained_run / "report.json").read_text())
    assert evaluation["correct"] == report["test_correct"]
    assert evaluation["n"] == report["n_test"]
    assert evaluation["loss"] == pytest.approx(report["test_loss"], rel=1e-6)
    assert evaluation["data"] == report["data"]
    low, high = evaluation["accuracy_interval"]
    assert low < report["test_accuracy"] < high


def test_the_confusion_matrix_has_the_true_class_in_its_rows(
    trained_run: Path, image_folder: Path, evaluation: dict[str, Any]
) -> None:
    confusion = np.array(evaluation["confusion"])
    assert confusion.sum(axis=1).tolist() == [7, 7, 7]
    logits = make_logits(trained.load(trained_run))
    for row, name in zip(confusion, evaluation["classes"], strict=True):
        files = sorted((image_folder / "test" / name).iterdir())
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        counts = np.bincount(logits(images).argmax(axis=-1), minlength=3)
        assert row.tolist() == counts.tolist()
    called = confusion.sum(axis=0)
    assert (called != 7).any(), "else precision would be recall"
    for k, name in enumerate(evaluation["classes"]):
        right = confusion[k, k]
        assert evaluation["recall"][name] == right / 7
        assert evaluation["precision"][name] == (right / called[k] if called[k] else None)


def test_mistakes_name_their_files(evaluation: dict[str, Any], image_folder: Path) -> None:
    assert len(evaluation["mistakes"]) == evaluation["n"] - evaluation["correct"] > 0
    for mistake in evaluation["mistakes"]:
        assert (image_folder / "test" / mistake["file"]).is_file()
        assert mistake["file"].startswith(mistake["class"] + "/")
        assert mistake["predicted"] != mistake["class"]
    confidences = [mistake["confidence"] for mistake in evaluation["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)


def test_the_validation_split_is_that_of_training(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    of_the_test = [tmp_path / "evaluation.json", tmp_path / "plots" / "mistakes.png"]
    for path in of_the_test:
        path.write_text("of the test")
    found = evaluate(EvaluateOptions(str(trained_run), split="val", output=str(tmp_path)))
    assert {path.read_text() for path in of_the_test} == {"of the test"}
    written = json.loads((tmp_path / "evaluation-val.json").read_text())
    assert written == json.loads(json.dumps(found))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        *("mistakes.png", "confusion-val.png", "calibration-val.png", "mistakes-val.png"),
    }
    rows = (trained_run / "metrics.jsonl").read_text().splitlines()
    best = max(map(json.loads, rows), key=lambda row: row["val_accuracy"])
    assert found["accuracy"] == pytest.approx(best["val_accuracy"])
    assert found["loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def test_a_step_writes_to_its_run(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    step = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    evaluate(EvaluateOptions(str(step)))
    assert (run / "evaluation.json").is_file()
    assert (run / "plots" / "curves.png").is_file()


def test_a_step_by_another_way_writes_to_its_run_too(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And into no checkpoint, which would count as damaged from then on."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    step = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "best").symlink_to(step)
    for folder, way in ((step / "state", ".."), (tmp_path / "here", "best")):
        monkeypatch.chdir(folder)
        evaluate(EvaluateOptions(way))
        (run / "evaluation.json").unlink()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["best"]
    trained.load(step)


def test_a_step_elsewhere_writes_to_no_folder_that_is_not_its_runs(
    trained_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    step = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    copy = shutil.copytree(step, tmp_path / "away" / "step")
    with pytest.raises(CifarJaxError, match=r"not in the checkpoints.*--output"):
        evaluate(EvaluateOptions(str(copy)))
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    evaluate(EvaluateOptions(str(step)))
    assert (run / "evaluation.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "disk", "run"]


def test_labels_follow_the_network_not_the_folder(trained_run: Path, tmp_path: Path) -> None:
    """A network whose classes are in another order than sorted folder names."""
    network = trained.load(trained_run)
    order = [2, 0, 1]
    last = network.variables["params"]["Dense_1"]
    for leaf in ("kernel", "bias"):
        last[leaf] = last[leaf][..., order]
    names = tuple(network.class_names[k] for k in order)
    moved = trained.TrainedNetwork(**{**vars(network), "class_names": names})
    trained.save(moved, tmp_path / "moved", source="a test")
    data = network.config.data
    before = evaluate(EvaluateOptions(str(trained_run), output=str(tmp_path / "a")))
    after = evaluate(EvaluateOptions(str(tmp_path / "moved"), data=data))
    assert tuple(after["classes"]) == names
    assert after["recall"] == before["recall"]
    assert after["correct"] == before["correct"]


def test_images_of_another_size_are_resized(trained_run: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / "data" / split, {"bird": 1, "cat": 1, "frog": 1}, size=13)
    found = evaluate(
        EvaluateOptions(str(trained_run), data=str(tmp_path / "data"), output=str(tmp_path))
    )
    assert found["n"] == 3
    grey = dataclasses.replace(trained.load(trained_run), image_shape=(5, 5, 1))
    labelled = load_labelled(grey, "test", data=str(tmp_path / "data"), data_dir=None)
    assert labelled.pixels(np.arange(3)).shape == (3, 5, 5, 1), "and made greyscale"


def test_other_classes_are_refused_and_both_listed(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", {"bird": 3, "cat": 3, "toad": 3})
    with pytest.raises(CifarJaxError, match=r"bird, cat, toad; .* bird, cat, frog") as caught:
        evaluate(EvaluateOptions(str(trained_run), data=str(tmp_path / "data")))
    assert caught.value.exit_code == ExitCode.DATA
    network = trained.load(trained_run)
    monkeypatch.setattr(shapes, "N_TRAIN", 100)
    converted = dataclasses.replace(
        network, config=dataclasses.replace(network.config, data="shapes")
    )
    with pytest.raises(
        CifarJaxError, match=r"^shapes, taken as no --data is given, has the classes"
    ):
        load_labelled(converted, "test", data=None, data_dir=None)


def test_no_split_is_drawn_from_other_data_than_in_training(
    trained_run: Path, image_folder: Path, tmp_path: Path
) -> None:
    """It would hold images that were trained on. A test set of its own may be of any data."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    network = trained.load(trained_run)
    assert len(load_labelled(network, "val", data=str(data), data_dir=None)) == 9
    (data / "train" / "cat" / "003.png").unlink()
    for split in ("train", "val"):
        with pytest.raises(CifarJaxError, match=f"^the {split} images of data are drawn") as caught:
            load_labelled(network, split, data=str(data), data_dir=None)
        assert caught.value.exit_code == ExitCode.DATA
    assert len(load_labelled(network, "test", data=str(data), data_dir=None)) == 21
    with pytest.raises(CifarJaxError, match=r"^the test images of train are drawn"):
        load_labelled(network, "test", data=str(data / "train"), data_dir=None)


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_fraction": 0.3}, {"max_train_examples": 30}])
def test_images_are_split_as_the_networks_own_run_split_them(
    trained_run: Path, image_folder: Path, change: dict[str, Any]
) -> None:
    """Or images that were trained on pass for a test set."""
    data = str(image_folder / "train")  # flat: all three splits are drawn
    expected, network = load_splits(data, **change), trained.load(trained_run)
    config = dataclasses.replace(network.config, data=data, **change)
    network = dataclasses.replace(network, config=config, data_digest=expected.digest)
    for name in ("train", "val", "test"):
        found = load_labelled(network, name, data=None, data_dir=None).split.images
        assert found.paths.tolist() == getattr(expected, name).images.paths.tolist(), name


def test_arrays_of_another_shape_are_refused(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "N_TRAIN", 100)
    network = trained.load(trained_run)
    other = trained.TrainedNetwork(**{**vars(network), "class_names": shapes.CLASS_NAMES})
    params = other.model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    other = dataclasses.replace(other, variables={"params": params, "batch_stats": {}})
    trained.save(other, tmp_path / "run", source="a test")
    with pytest.raises(CifarJaxError, match="32x32x3, the network's 8x8x3"):
        evaluate(EvaluateOptions(str(tmp_path / "run"), data="shapes"))


def test_a_split_without_images_is_refused(trained_run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "flat", {"bird": 1, "cat": 1, "frog": 1})
    network = trained.load(trained_run)
    all_held_out = dataclasses.replace(network.config, val_fraction=0.99)
    network = dataclasses.replace(network, config=all_held_out, data_digest=trained.UNKNOWN_DATA)
    with pytest.raises(CifarJaxError, match="--split train: flat has no such images"):
        load_labelled(network, "train", data=str(tmp_path / "flat"), data_dir=None)


def test_a_class_without_images_or_answers_has_no_share() -> None:
    logits = np.array([[2.0, 0, 0], [0, 2, 0], [2, 0, 0]])
    shown = describe(score(logits, np.array([0, 0, 0], np.int32)), ["$a", "b", "c"])
    assert shown.startswith("accuracy 66.67 % (2 of 3; 95 % interval ")
    assert [line.split() for line in shown.splitlines()[-3:]] == [
        ["$a", "3", "100.0", "%", "66.7", "%", "b", "(1)"],
        ["b", "0", "0.0", "%", "-"],
        ["c", "0", "-", "-"],
    ]


def test_the_picture_of_the_confusion_matrix_has_the_true_class_in_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    scores = score(np.array([[0.0, 1], [0, 1], [0, 1]]), np.array([0, 0, 1], np.int32))
    plots.save_confusion(scores, ["a", "b"], "", tmp_path / "confusion.png")
    (axes,) = figures[0].axes
    x, y = 1, 0  # of "a", taken for "b"
    assert {text.get_position(): text.get_text() for text in axes.texts}[x, y] == "2"
    assert axes.images[0].get_array()[y, x] == 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_the_picture_of_calibration_has_accuracy_over_confidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    plots.save_calibration(score(logits, np.array([0, 1, 1], np.int32)), "", tmp_path / "a.png")
    axes, histogram = figures[0].axes
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.6, 1], [0.9, 0.5]])
    assert [bar.get_height() for bar in histogram.patches] == [1, 2]


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    from cifar_jax.scoring.plots import save_confusion, save_mistakes

    scores = score(np.eye(2), np.array([0, 1], np.int32))
    save_confusion(scores, ["$\\x$", "b"], "$\\x$", tmp_path / "a.png")
    mistake = {"class": "$\\x$", "predicted": "b", "confidence": 0.5, "file": "$\\x$/1.png"}
    save_mistakes(np.zeros((1, 4, 4, 1), np.uint8), [mistake], "$\\x$", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 0
    save_mistakes(np.zeros((0, 4, 4, 1), np.uint8), [], "", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_pictures_stay_small_whatever_the_classes_are(tmp_path: Path) -> None:
    """Matplotlib's warnings, as of labels that leave no room, would be errors here."""
    from cifar_jax.scoring.plots import save_confusion, save_mistakes

    names = ["\N{CJK UNIFIED IDEOGRAPH-718A}", "a" * 200]
    save_confusion(score(np.eye(2), np.array([0, 1], np.int32)), names, "two", tmp_path / "a.png")
    mistake = {"class": names[0], "predicted": names[1], "confidence": 0.5, "file": "b" * 200}
    save_mistakes(np.zeros((1, 4, 4, 1), np.uint8), [mistake], "two", tmp_path / "b.png")
    many = 150
    scores = score(np.eye(many), np.arange(many, dtype=np.int32))
    save_confusion(scores, [str(k) for k in range(many)], "many", tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as image:
            assert max(image.size) <= 2400


def test_an_output_that_cannot_be_written_is_said_behind_the_scores(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CifarJaxError, match="cannot write to") as caught:
        evaluate(EvaluateOptions(str(trained_run), output=str(tmp_path / "file")))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert caught.value.fix == "give another --output", "room is not what it lacks"
    assert "accuracy" in capsys.readouterr().out


def test_one_epoch_is_drawn_at_a_whole_number(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifar_jax.scoring import plots
    from cifar_jax.steps.metrics import read_history

    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.save_curves(read_history(trained_run / "metrics.jsonl")[:1], "one", tmp_path / "a.png")
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CifarJaxError, match="--checkpoint") as caught:
        main([])
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(CifarJaxError, match="does not exist") as caught:
        main(["--checkpoint", str(tmp_path / "none")])
    assert caught.value.exit_code == ExitCode.CHECKPOINT
