"""Every kind of ``--data`` but archives: real files and tfds data, written by the tests."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CIFAR10_NAMES, write_images
from PIL import Image

from cifar_jax.data import folders, images, shapes, sources
from cifar_jax.data.dataset import Dataset, ImageFiles, Split
from cifar_jax.data.sources import load_dataset, load_splits
from cifar_jax.errors import CifarJaxError, ExitCode


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# ------------------------------------------------------------------------------------- folders


@pytest.mark.fault("C24")
def test_a_folder_with_train_and_test(image_folder: Path) -> None:
    dataset = load_dataset(str(image_folder), val_fraction=0.2)
    assert dataset.class_names == ("bird", "cat", "frog")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (72, 18, 21)
    assert np.bincount(dataset.val.labels).tolist() == [6, 6, 6]
    assert dataset.image_shape == (8, 8, 3)
    # The class is told by the brightness: a swapped label would show.
    for label, level in enumerate([42, 128, 212]):
        pixels = dataset.train.pixels[dataset.train.labels == label]
        assert abs(pixels.mean() - level) < 10
    assert isinstance(dataset.test.images, ImageFiles), "the test set is read when it is scored"
    # Mean and std are those of the training split alone.
    np.testing.assert_allclose(dataset.mean, dataset.train.pixels.mean((0, 1, 2)) / 255, rtol=1e-6)


def test_the_split_is_a_function_of_the_seed(image_folder: Path) -> None:
    def val_bytes(seed: int) -> bytes:
        return load_dataset(str(image_folder), seed=seed).val.pixels.tobytes()

    assert val_bytes(0) == val_bytes(0)
    assert val_bytes(0) != val_bytes(1)

    def drawn_for_the_test(seed: int) -> Any:
        images = load_splits(str(image_folder / "train"), seed=seed).test.images
        assert isinstance(images, ImageFiles)
        return images.paths.tolist()

    assert drawn_for_the_test(0) == drawn_for_the_test(0)
    assert drawn_for_the_test(0) != drawn_for_the_test(1)


def test_a_flat_folder_is_split_three_ways(image_folder: Path) -> None:
    dataset = load_dataset(str(image_folder / "train"), val_fraction=0.2)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (58, 14, 18)
    assert isinstance(dataset.test.images, ImageFiles)
    assert np.bincount(dataset.test.labels).tolist() == [6, 6, 6]


def test_val_is_validation_beside_test_and_the_test_set_without(
    image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder / "train", tmp_path / "train")
    shutil.copytree(image_folder / "test", tmp_path / "val")
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (81, 9, 21)
    write_images(tmp_path / "test", {"bird": 2, "cat": 2, "frog": 2})
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (90, 21, 6)


@pytest.mark.fault("C11", "C12", "C15")
def test_what_is_no_class_or_image_does_not_count(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "wrapped" / "images"
    shutil.copytree(image_folder, inner)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (inner / "train" / name).mkdir()
    nested = inner / "train" / "bird" / "more"
    nested.mkdir()
    (inner / "train" / "bird" / "000.png").rename(nested / "000.png")
    (nested / "round").symlink_to(inner / "train" / "bird")
    (tmp_path / "wrapped" / "README").touch()
    load_dataset(str(tmp_path / "wrapped"))
    assert capsys.readouterr().out == ""
    for name in ("bird/Thumbs.db", "cat/a.gif", "cat/README", "frog/1.GIF", "frog/.DS_Store"):
        (inner / "train" / name).touch()
    (inner / "test" / "frog" / "b.gif").touch()
    dataset = load_dataset(str(tmp_path / "wrapped"))
    assert dataset.class_names == ("bird", "cat", "frog")
    assert len(dataset.train) + len(dataset.val) == 90
    assert capsys.readouterr().out == (
        f"{inner}: ignored 5 file(s) that are not JPEG or PNG: 3 .gif, 1 .db, 1 without ending\n"
    )


@pytest.mark.fault("C12")
def test_the_five_most_frequent_endings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, dict.fromkeys(("cat", "dog"), 3))
    for ending in range(6):
        for i in range(9 - ending):
            (tmp_path / "cat" / f"{i}.n{ending}").touch()
    load_dataset(str(tmp_path))
    assert "JPEG or PNG: 9 .n0, 8 .n1, 7 .n2, 6 .n3, 5 .n4, ...\n" in capsys.readouterr().out


@pytest.mark.fault("C17")
def test_a_link_that_leads_round_is_not_followed(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to(tmp_path)
    with pytest.raises(CifarJaxError, match="holds 1 class folder"):
        load_dataset(str(tmp_path))


@pytest.mark.fault("C21")
def test_classes_that_read_the_same_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, dict.fromkeys(("Cat", "cat", "dog", "caf\u00e9", "cafe\u0301"), 3))
    assert len(load_dataset(str(tmp_path)).class_names) == 5
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split(" which ")[0] for line in warnings] == [
        f"warning: {tmp_path} has the classes 'cafe\\u0301' and 'caf\\xe9',",
        f"warning: {tmp_path} has the classes 'Cat' and 'cat',",
    ]


def test_max_train_examples_keeps_the_other_splits(image_folder: Path) -> None:
    full = load_dataset(str(image_folder))
    dataset = load_dataset(str(image_folder), max_train_examples=30)
    assert np.bincount(dataset.train.labels).tolist() == [10, 10, 10]
    assert np.array_equal(dataset.val.pixels, full.val.pixels)
    assert len(dataset.test) == len(full.test)


def test_a_split_that_does_not_fit_stays_on_disk(image_folder: Path) -> None:
    megabytes = 90 * 8 * 8 * 3 / 2**20  # of training and validation
    dataset = load_dataset(str(image_folder), cache_mb=0.99 * megabytes)
    decoded = load_dataset(str(image_folder), cache_mb=megabytes)
    assert isinstance(dataset.train.images, ImageFiles)
    assert isinstance(decoded.train.images, np.ndarray)
    assert (dataset.mean, dataset.std) == (decoded.mean, decoded.std)
    assert dataset.digest == decoded.digest


def test_mean_and_std_of_many_images_are_of_a_stratified_sample(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_STATISTICS_SAMPLE", 9)
    counts = []

    def decode(split: Split) -> Split:
        counts.append(np.bincount(split.labels).tolist())
        return images.decode(split)

    load_dataset(str(image_folder), cache_mb=0, decode=decode)
    monkeypatch.setattr(sources, "_STATISTICS_BYTES", 6 * 8 * 8 * 3)
    load_dataset(str(image_folder), cache_mb=0, decode=decode)
    assert counts == [[3, 3, 3], [2, 2, 2]]


def test_a_folder_has_its_name_from_inside_too(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder)
    assert load_splits(".").name == image_folder.name


def test_greyscale_and_other_sizes(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 10, "b": 10}, mode="L", size=12)
    assert load_dataset(str(tmp_path)).image_shape == (12, 12, 1)
    assert load_dataset(str(tmp_path), image_size=6).image_shape == (6, 6, 1)
    with pytest.raises(CifarJaxError, match=r"--image-size 6 with --data shapes, whose .* 32x32"):
        load_dataset("shapes", image_size=6)


@pytest.mark.fault("C5")
def test_one_image_in_colour_makes_a_data_set_colour(tmp_path: Path) -> None:
    """Also where each class and each split begin with grey ones."""
    for split in ("train", "test"):
        write_images(tmp_path / split, {"a": 10, "b": 10}, mode="L")
    assert load_dataset(str(tmp_path)).image_shape == (8, 8, 1)
    for path in ("test/b/007.png", "train/a/004.png"):
        grey = (tmp_path / path).read_bytes()
        Image.new("RGB", (8, 8), "red").save(tmp_path / path)
        assert load_dataset(str(tmp_path)).image_shape == (8, 8, 3)
        (tmp_path / path).write_bytes(grey)


@pytest.mark.fault("C5")
def test_of_each_class_an_image_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_SHAPE_SAMPLE", 1)
    write_images(tmp_path, {"a": 3, "b": 3}, mode="L")
    write_images(tmp_path, {"c": 3})
    assert load_splits(str(tmp_path)).train.image_shape == (8, 8, 3)


@pytest.mark.fault("C5")
def test_one_that_was_passed_over_is_not_made_grey_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_SHAPE_SAMPLE", 2)
    write_images(tmp_path, {"a": 10, "b": 10}, mode="L")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a" / "004.png")
    with pytest.raises(CifarJaxError, match=r"a/004\.png is in colour, .*greyscale\. Fix: make it"):
        load_dataset(str(tmp_path))


@pytest.mark.fault("C24")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Train", "Test"), r"has Train/ and Test/, .* Fix: rename Train/ to train/, Test/ to te"),
        (("train", "test", "valid"), "has valid/, .* Fix: rename valid/ to val/"),
        (("training", "val"), "has training/, .* Fix: rename training/ to train/"),
    ],
)
def test_splits_by_another_name_are_no_classes(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        write_images(tmp_path / name, {"a": 3, "b": 3})
    with pytest.raises(CifarJaxError, match=message):
        load_dataset(str(tmp_path))


def test_folders_beside_the_splits_are_told_and_classes_may_be_called_as_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test", "drafts"):
        write_images(tmp_path / "splits" / name, {"a": 3, "b": 3})
    load_dataset(str(tmp_path / "splits"))
    assert "splits: ignored beside train/ and test/: drafts/" in capsys.readouterr().out
    for names in (("Bus", "Car", "Train"), ("bus", "train"), ("invalid", "valid")):
        write_images(tmp_path / names[0], dict.fromkeys(names, 3))
        assert load_dataset(str(tmp_path / names[0])).class_names == names


def test_what_is_drawn_at_random_is_told(image_folder: Path, tmp_path: Path) -> None:
    def drawn(source: Path, **options: Any) -> set[str]:
        return set(load_splits(str(source), **options).drawn)

    assert drawn(image_folder) == {"train", "val"}
    assert drawn(image_folder / "train") == {"train", "val", "test"}
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(image_folder / "test", tmp_path / "data" / "val")
    assert drawn(tmp_path / "data") == set()
    assert drawn(tmp_path / "data", max_train_examples=10) == {"train"}


def test_the_digest_follows_names_and_sizes(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "copy")
    digest = load_dataset(str(image_folder)).digest
    assert load_dataset(str(tmp_path / "copy")).digest == digest
    (tmp_path / "copy" / "test" / "cat" / "003.png").unlink()
    without_one = load_dataset(str(tmp_path / "copy")).digest
    assert without_one != digest
    (tmp_path / "copy" / "train" / "cat" / "003.png").unlink()
    assert load_dataset(str(tmp_path / "copy")).digest not in (digest, without_one)


def remove_it(root: Path) -> None:
    shutil.rmtree(root)


def empty_a_class(root: Path) -> None:
    for file in (root / "train" / "cat").iterdir():
        file.unlink()


def drop_a_test_class(root: Path) -> None:
    shutil.rmtree(root / "test" / "cat")


def leave_one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "frog")


def wrap_one_class(root: Path) -> None:
    (root / "train" / "cat").rename(root / "cat")
    for split in ("train", "test"):
        shutil.rmtree(root / split)


def drop_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def empty_an_image(root: Path) -> None:
    (root / "train" / "cat" / "011.png").write_bytes(b"")


def cut_an_image(root: Path) -> None:
    path = root / "train" / "cat" / "011.png"
    path.write_bytes(path.read_bytes()[:-30])


def replace_an_image_by_text(root: Path) -> None:
    (root / "train" / "cat" / "011.png").write_text("not an image")


def resize_an_image(root: Path) -> None:
    write_images(root / "train", {"cat": 1}, size=9)


def put_images_at_the_root(root: Path) -> None:
    for file in (root / "train" / "cat").iterdir():
        file.rename(root / file.name)
    for split in ("train", "test"):
        shutil.rmtree(root / split)


def spell_a_test_class_otherwise(root: Path) -> None:
    for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        (root / split / "cat").rename(root / split / name)


@pytest.mark.fault("C1", "C2", "C9", "C10", "C13", "C14", "C20")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_it, "does not exist"),
        (empty_a_class, "class folder .*train/cat holds no .jpg or .jpeg or .png image"),
        (drop_a_test_class, r"other classes than .*missing \['cat'\], extra \[\]"),
        (
            spell_a_test_class_otherwise,
            r"other classes than .*missing \['caf\\xe9'\], extra \['cafe\\u0301'\]",
        ),
        (leave_one_class, "holds 1 class folder"),
        (wrap_one_class, "/data holds 1 class folder"),
        (put_images_at_the_root, "holds 0 class folder"),
        (drop_test, "has train/ only"),
        (empty_an_image, "train/cat/011.png is empty"),
        (cut_an_image, "train/cat/011.png is cut short"),
        (replace_an_image_by_text, "train/cat/011.png is not a JPEG or PNG"),
        (resize_an_image, "train/cat/000.png is 9x9, the first is 8x8"),
    ],
)
def test_a_bad_folder_is_named_with_its_cure(
    image_folder: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    shutil.copytree(image_folder, tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(CifarJaxError, match=f"{message}.* Fix: ") as caught:
        load_dataset(str(tmp_path / "data"))
    assert caught.value.exit_code == ExitCode.DATA


# ------------------------------------------------------------------------ CIFAR-10 and shapes


@pytest.mark.usefixtures("offline")
def test_auto_offline_is_shapes_under_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "N_TRAIN", 100)
    dataset = load_dataset("auto", data_dir=str(tmp_path))
    assert dataset.name == "shapes"
    assert dataset.notice is not None
    for said in (
        "CIFAR-10 is not available",
        str(tmp_path),
        "no route to host",
        "SAYS NOTHING ABOUT CIFAR-10",
        "--data cifar10",
    ):
        assert said in dataset.notice
    assert "train" not in dataset.notice, "evaluate prints it too"
    plain = load_dataset("shapes")
    assert plain.notice is None
    trained_on = {image.tobytes() for image in plain.train.pixels}
    assert not any(image.tobytes() in trained_on for image in plain.test.pixels)
    assert plain.digest == dataset.digest


@pytest.mark.usefixtures("offline")
def test_cifar10_offline_is_an_error_and_no_substitute(tmp_path: Path) -> None:
    with pytest.raises(
        CifarJaxError, match=r"not prepared in .* no route to host.*Fix: "
    ) as caught:
        load_dataset("cifar10", data_dir=str(tmp_path))
    assert caught.value.exit_code == ExitCode.DATA


def test_a_host_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> None:
        never.wait()
        raise OSError("given up")

    monkeypatch.setattr("urllib.request.urlopen", hang)
    monkeypatch.setattr(sources, "_DOWNLOAD_TIMEOUT_SECONDS", 0.1)
    obstacle = sources._download_obstacle()
    never.set()
    assert obstacle == "no answer in 0.1 s"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["cifar10", "auto"])
def test_cifar10_prepared_by_tfds(
    prepared: tuple[Path, Any], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir, expected = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")  # what is given comes first
    dataset: Dataset = load_dataset(source, data_dir=str(data_dir))
    assert dataset.name == "cifar10"
    assert dataset.notice is None
    assert dataset.class_names == tuple(CIFAR10_NAMES)
    # tfds shuffles once, when it prepares; the ten test images have a class each.
    order = np.argsort(dataset.test.labels)
    assert np.array_equal(dataset.test.labels[order], expected.labels)
    assert np.array_equal(dataset.test.pixels[order], expected.pixels)
    assert len(dataset.train) + len(dataset.val) == 20
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert load_dataset(source).digest == dataset.digest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """A data_dir that tfds has prepared, under the name and version of its cifar10."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(30) % 10

    def examples(start: int, stop: int) -> list[dict[str, Any]]:
        return [
            {"id": f"{i}", "image": images[i], "label": CIFAR10_NAMES[labels[i]]}
            for i in range(start, stop)
        ]

    import tensorflow as tf

    def as_dataset(rows: list[dict[str, Any]]) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(
            {key: [row[key] for row in rows] for key in rows[0]}
        )

    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version=str(tfds.builder("cifar10", data_dir=data_dir).version),
        features=tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=CIFAR10_NAMES),
            }
        ),
        split_datasets={
            "train": as_dataset(examples(0, 20)),
            "test": as_dataset(examples(20, 30)),
        },
        data_dir=data_dir,
    )
    return data_dir, Split(images[20:], labels[20:].astype(np.int32))
