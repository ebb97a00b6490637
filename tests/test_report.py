from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import pixels_of, write_images
from jax import lax
from PIL import Image
from test_trained import rewrite_metadata

from cifar_jax.checkpoints import checkpoint, trained
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.networks.layers import trace_layers
from cifar_jax.networks.models import create_model, space_to_depth
from cifar_jax.report import figures as report_figures
from cifar_jax.report import html
from cifar_jax.report import page as report_page
from cifar_jax.report.__main__ import ReportOptions, main, write_report
from cifar_jax.report.run import read_run
from cifar_jax.scoring.inference import make_logits
from cifar_jax.scoring.labelled import load_labelled
from cifar_jax.scoring.scores import wilson_interval
from cifar_jax.steps.metrics import best_row

HOSTILE = ("<b>bold", "<img src=x onerror=alert(1)>", "{{ 7 * 7 }} & 'so' \"on\"")


class Elements(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and the cells of its tables' rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def values(self, key: str) -> list[Any]:
        """Every ``data-value`` of ``data-key`` ``key``; numbers as such."""
        found = [a["data-value"] for _, a in self.elements if a.get("data-key") == key]
        return [json.loads(v) if v and re.fullmatch(r"[-\d.e\[\], ]+", v) else v for v in found]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def copy_of(run: Path, folder: Path, **report: Any) -> Path:
    """A copy of ``run``, whose ``report.json`` has other values for ``report``."""
    shutil.copytree(run, folder)
    path = folder / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **report}))
    return folder


def make_page(*workdirs: Path, output: Path, **options: Any) -> Elements:
    write_report(workdirs, ReportOptions(output=str(output), **options))
    return Elements(output.read_text())


def untrained(
    workdir: Path, config: TrainConfig, classes: tuple[str, ...], shape: tuple[int, int, int]
) -> TrainedNetwork:
    """A network with random weights, as the workdir of a run without any epoch."""
    model, rng = create_model(config, len(classes)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shape), np.float32))
    variables = {"batch_stats": {}} | jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / leaf.size**0.25).astype(np.float32),
        dict(shapes),
    )
    channels = shape[2]
    network = TrainedNetwork(
        config, classes, shape, (0.5,) * channels, (0.25,) * channels, variables
    )
    trained.save(network, workdir, source="a test")
    return network


@pytest.fixture(scope="module")
def page_file(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ``trained_run``."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([trained_run], ReportOptions(output=str(output)))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an mlp on classes whose names are HTML."""
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "test"):
        write_images(root / "data" / split, dict.fromkeys(HOSTILE, 10))
    config = TrainConfig(model="mlp", hidden=(8,), data="<script>alert(1)</script>")
    untrained(root / "run<i>", config, HOSTILE, (8, 8, 3))
    output = root / "page.html"
    return write_report(
        [root / "run<i>"], ReportOptions(output=str(output), data=str(root / "data"))
    )


@pytest.fixture(scope="module")
def compared(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of ``trained_run``, the same on other data, and one that is not finished."""
    root = tmp_path_factory.mktemp("compared")
    other = copy_of(
        trained_run, root / "other", data={"name": "<b>else", "digest": "0" * 64}, val_accuracy=0.5
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "learning_rate": 0.25, "flip": False}))
    unfinished = copy_of(trained_run, root / ("unfinished-" + 20 * "long-name-"))
    (unfinished / "report.json").unlink()
    output = root / "comparison.html"
    return write_report([trained_run, other, unfinished], ReportOptions(output=str(output)))


Opened = Callable[[Path, int, str], Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opened]:
    """A function that opens a file at a width, in light or dark; nothing may go wrong there."""
    wrong: list[str] = []
    opened = []

    def run(path: Path, width: int, scheme: str) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))

        def on_request(request: Any) -> None:
            if request.url != path.as_uri() and not request.url.startswith("data:"):
                wrong.append(f"asked for {request.url}")

        page.on("request", on_request)
        page.goto(path.as_uri())
        return page

    yield run
    for context in opened:
        context.close()
    assert wrong == []


def test_the_page_says_what_report_and_metrics_say(page_file: Path, trained_run: Path) -> None:
    page = Elements(page_file.read_text())
    report = json.loads((trained_run / "report.json").read_text())
    history = [json.loads(x) for x in (trained_run / "metrics.jsonl").read_text().splitlines()]
    for key in (
        *("model", "n_params", "n_train", "n_val", "n_test", "val_accuracy", "test_accuracy"),
        *("test_loss", "epochs", "steps", "train_seconds", "images_per_second", "seed"),
    ):
        assert page.values(key) == [report[key]], key
    best = max(history, key=lambda row: row["val_accuracy"])
    assert page.values("best_epoch") == [best["epoch"]]
    assert page.values("data") == [report["data"]["name"]]
    assert page.values("devices") == [f"{report['devices']} {report['device_kind']}"]
    low, high = wilson_interval(report["test_correct"], report["n_test"])
    assert page.values("test_interval") == [[low, high]]
    # What is scored anew is the same network on the same images.
    assert page.values("correct") == [report["test_correct"]]
    assert page.values("scored_accuracy") == [report["test_accuracy"]]
    assert f"{100 * report['test_accuracy']:.2f}\xa0%" in page.text
    for name, version in report["versions"].items():
        assert name in page.text
        assert version in page.text
    rows = [a["data-class"] for tag, a in page.elements if tag == "tr" and "data-class" in a]
    assert rows == ["bird", "cat", "frog"]
    assert not page.with_class("note")


def test_the_curves_are_those_of_metrics(trained_run: Path) -> None:
    run = read_run(trained_run)
    history = run.history

    def line(svg: str, colour: str) -> np.ndarray:
        (path,) = re.findall(rf'<path d="([^"]*)"[^>]*clip-path[^>]*stroke: var\({colour}\);', svg)
        return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)

    def assert_drawn(points: np.ndarray, values: list[float]) -> None:
        """Up to the scale of the axes, ``values`` are where the line goes."""
        assert len(points) == len(history)
        for place, value, sign in ((points[:, 0], range(3), 1), (-points[:, 1], values, 1)):
            slope, offset = np.polyfit(value, place, 1)
            assert np.sign(slope) == sign
            np.testing.assert_allclose(np.polyval((slope, offset), value), place, atol=1e-3)

    loss = report_figures.loss_curves(history, None)
    accuracy = report_figures.accuracy_curves(history, None)
    assert_drawn(line(loss, "--accent"), [row["val_loss"] for row in history])
    assert_drawn(line(loss, "--other"), [row["train_loss"] for row in history])
    assert_drawn(line(accuracy, "--accent"), [row["val_accuracy"] for row in history])
    assert_drawn(line(accuracy, "--other"), [row["train_accuracy"] for row in history])

    def markers(svg: str) -> Counter[tuple[str, ...]]:
        return Counter(re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg))

    best = best_row(history)
    ((dot, _),) = (markers(report_figures.loss_curves(history, best)) - markers(loss)).items()
    place = line(loss, "--accent")[best["epoch"] - 1]
    np.testing.assert_allclose(np.array(dot, float), place, atol=1e-3)
    gaps = [row["train_accuracy"] - row["val_accuracy"] for row in history]
    assert_drawn(line(report_figures.gap_curve(history, None), "--accent"), gaps)
    rates = [row["learning_rate"] for row in history]
    assert_drawn(line(report_figures.learning_rate_curve(history, None), "--accent"), rates)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
@pytest.mark.parametrize("which", ["page_file", "hostile_page", "compared"])
def test_it_opens_in_a_browser(
    which: str, width: int, scheme: str, open_page: Opened, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(which), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert page.evaluate("[...document.images].every(i => i.alt)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    targets = page.evaluate(
        "[...document.querySelectorAll('[href^=\"#\"]')].map(e => e.getAttribute('href'))"
        ".concat([...document.querySelectorAll('[clip-path]')]"
        ".map(e => e.getAttribute('clip-path').slice(4, -1)))"
    )
    assert {target[1:] for target in targets} <= set(ids)
    outside = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')"
    assert page.evaluate(f"[...document.querySelectorAll('main *')].filter({outside}).length") == 0
    # Text is text, in the colour of the scheme: the axis labels contrast with their card.
    if which != "hostile_page":
        fill = page.evaluate("getComputedStyle(document.querySelector('.plot text')).fill")
        assert (sum(map(int, re.findall(r"\d+", fill)[:3])) > 380) == (scheme == "dark")
        assert page.locator(".plot text", has_text="epoch").count() >= 2


def test_nothing_in_the_file_leads_outside(page_file: Path, compared: Path) -> None:
    for path in (page_file, compared):
        html = path.read_text(encoding="ascii")
        assert "://" not in html
        assert "@import" not in html
        assert "<script" not in html
        assert "default-src 'none'" in html
    assert page_file.stat().st_size < 2_000_000


def test_names_are_shown_as_they_are(hostile_page: Path, open_page: Opened) -> None:
    page = open_page(hostile_page, 1200, "light")
    shown = page.locator("#classes tbody th").all_inner_texts()
    assert sorted(shown) == sorted(HOSTILE)
    assert page.title() == "mlp on unknown data (a test)"
    assert "run<i>" in page.locator("header").inner_text()
    page.locator("summary").click()
    assert page.locator("tr", has_text="--data ").first.locator("td").inner_text() == (
        "<script>alert(1)</script>"
    )
    assert page.locator("main b, main i, main script, main img[onerror]").count() == 0


def test_the_tables_count_each_answer(hostile_page: Path) -> None:
    network = trained.load(hostile_page.with_name("run<i>"))
    data = str(hostile_page.with_name("data"))
    labelled = load_labelled(network, "val", data=data, data_dir=None)
    answers = make_logits(network)(labelled.pixels(np.arange(len(labelled)))).argmax(axis=1)
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (labelled.split.labels, answers), 1)
    assert (counts != counts.T).any()
    rows = [row for row in Elements(hostile_page.read_text()).rows if len(row) > 1]
    assert rows[:3] == [[str(count or "\N{MIDDLE DOT}") for count in row] for row in counts]
    for k, (n, precision, recall, taken_for) in enumerate(rows[3:]):
        assert n == str(counts[k].sum())
        for shown, of in ((precision, counts[:, k].sum()), (recall, counts[k].sum())):
            assert shown == (f"{100 * counts[k, k] / of:.1f}\xa0%" if of else "\N{EN DASH}")
        most, other = max((counts[k, j], -j) for j in range(3) if j != k)
        assert taken_for == (f"{HOSTILE[-other]} ({most})" if most else "\N{EN DASH}")


def test_a_network_without_convolutions(hostile_page: Path) -> None:
    page = Elements(hostile_page.read_text())
    assert "This network was converted" in page.text
    assert not page.with_class("warning")  # that its data is unknown is no disagreement
    ids = {a.get("id") for _, a in page.elements}
    assert {"glance", "samples", "confusion", "classes", "mistakes"} <= ids
    assert not {"curves", "filters", "maps", "fields"} & ids


def test_the_same_run_gives_the_same_file(page_file: Path, trained_run: Path) -> None:
    again = page_file.with_name("again.html")
    write_report([trained_run], ReportOptions(output=str(again)))
    assert again.read_bytes() == page_file.read_bytes()
    assert list(page_file.parent.glob(".*")) == []


def test_an_unfinished_run_is_scored_on_validation(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = copy_of(trained_run, tmp_path / "run")
    report = json.loads((workdir / "report.json").read_text())
    (workdir / "report.json").unlink()
    write_report([workdir], ReportOptions())
    page = Elements((workdir / "report.html").read_text())
    assert "This run is not finished" in page.text
    (confusion,) = [a for _, a in page.elements if a.get("id") == "confusion"]
    assert confusion["data-split"] == "val"
    assert confusion["data-n"] == str(report["n_val"])
    assert page.values("scored_accuracy") == page.values("val_accuracy") == [report["val_accuracy"]]
    assert page.values("n_params") == [report["n_params"]]
    history = read_run(workdir).history
    seconds, speeds = ([row[k] for row in history] for k in ("seconds", "images_per_second"))
    assert page.values("train_seconds") == [pytest.approx(sum(seconds))]
    assert page.values("images_per_second") == [pytest.approx(3 / sum(1 / s for s in speeds))]
    assert page.values("test_accuracy") == page.values("test_loss") == []
    assert report["versions"]["jax"] in page.text
    printed = capsys.readouterr()
    assert f"scoring {report['n_val']} val images" in printed.out
    assert printed.out.endswith(f"the page is {workdir / 'report.html'}\n")
    assert printed.err == ""


def test_a_checkpoint_of_a_stranger_may_say_anything_of_its_data(tmp_path: Path) -> None:
    config = TrainConfig(model="mlp", hidden=(8,), data="nowhere")
    network = untrained(tmp_path / "run", config, ("a", "b"), (8, 8, 3))
    step = tmp_path / "run" / "checkpoints" / "0"
    rewrite_metadata(
        step, lambda metadata: metadata.update(data={"name": ["x"], "digest": {}}, versions=["x"])
    )
    page = make_page(tmp_path / "run", output=tmp_path / "page.html")
    assert page.values("n_params") == [network.n_params]
    assert page.values("data") == []
    zeros = {"Dense_0": {"kernel": np.zeros(10**7, np.float32)}}  # a small file
    saved = checkpoint.restore_metadata(step)
    shutil.rmtree(step)
    checkpoint.save(step.parent, 0, {"params": zeros}, saved, best_step=0)
    page = make_page(tmp_path / "run", output=tmp_path / "page.html")
    assert page.values("n_params") == []
    assert "cannot be used" in page.text


def test_a_run_before_its_first_epoch(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trained_run / "config.json").read_text())
    page = make_page(tmp_path, output=tmp_path / "page.html")
    assert "0 of 3 epochs" in page.text
    assert "The curves: no epoch is done yet." in page.text
    assert "Everything about the network" in page.text


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_whose_history_is_lost(trained_run: Path, tmp_path: Path, is_finished: bool) -> None:
    workdir = copy_of(trained_run, tmp_path / "run")
    (workdir / "metrics.jsonl").write_text("")
    if not is_finished:
        (workdir / "report.json").unlink()
    page = make_page(workdir, output=tmp_path / "page.html")
    assert "The curves: metrics.jsonl is missing or empty." in page.text


def test_without_its_data_the_page_shows_the_rest(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, gone = tmp_path / "run", tmp_path / "gone"
    network = trained.load(trained_run)
    moved = dataclasses.replace(network.config, data=str(gone))
    trained.save(dataclasses.replace(network, config=moved), workdir, source="a test")
    report = json.loads((trained_run / "report.json").read_text())
    (workdir / "report.json").write_text(json.dumps({**report, "best_step": 0}))
    shutil.copy(trained_run / "metrics.jsonl", workdir)
    page = make_page(workdir, output=tmp_path / "page.html")
    ids = {a.get("id") for _, a in page.elements}
    assert {"missing", "curves", "filters", "fields"} <= ids
    assert not {"samples", "confusion", "mistakes", "maps"} & ids
    assert f"--data {gone} does not exist" in page.text
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the page lacks: Scores of each class, images and feature maps")
    assert str(gone) in line
    with pytest.raises(CifarJaxError, match="nowhere does not exist"):
        write_report([workdir], ReportOptions(data=str(tmp_path / "nowhere")))


def test_images_of_other_data_are_told(trained_run: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / "data" / split, {"bird": 10, "cat": 9, "frog": 8}, seed=5)
    page = make_page(trained_run, output=tmp_path / "page.html", data=str(tmp_path / "data"))
    assert len(page.with_class("warning")) == 1
    assert "are not the data of the run" in page.text


def test_a_report_of_another_network_is_told(trained_run: Path, tmp_path: Path) -> None:
    workdir = copy_of(trained_run, tmp_path / "run", test_correct=1)
    page = make_page(workdir, output=tmp_path / "page.html")
    assert len(page.with_class("warning")) == 1
    assert "the run recorded 1." in page.text


def test_another_step_than_the_best_is_told(trained_run: Path, tmp_path: Path) -> None:
    workdir = copy_of(trained_run, tmp_path / "run")
    (workdir / "report.json").unlink()
    first, *_ = (workdir / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(first), "step": 1, "val_accuracy": 0.0}  # a step that is not saved
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = make_page(workdir, output=tmp_path / "page.html")
    assert len(page.with_class("warning")) == 1
    assert "the run recorded 0." in page.text


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_of_patches_are_shown_on_pixels(
    tmp_path: Path, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile, laid over every patch in turn, gives what the first convolution does."""
    monkeypatch.setattr(report_page, "_FILTERS", 4)
    config = TrainConfig(model="cnn-gap", widths=(5,), patch_size=2, data="nowhere")
    network = untrained(tmp_path / "run", config, ("bird", "cat"), (8, 8, channels))
    kernel = network.variables["params"]["Conv_0"]["kernel"]
    tiles = report_page._on_pixels(np.moveaxis(kernel, -1, 0), 2)
    assert tiles.shape == (5, 6, 6, channels)
    image = jax.random.normal(jax.random.key(1), (1, 8, 8, channels))
    layout = ("NHWC", "HWIO", "NHWC")

    def convolved(x: Any, kernel: Any, stride: int) -> Any:
        return lax.conv_general_dilated(x, kernel, (stride,) * 2, "VALID", dimension_numbers=layout)

    np.testing.assert_allclose(
        convolved(image, np.moveaxis(tiles, 0, -1), 2),
        convolved(space_to_depth(image, 2), kernel, 1),
        atol=1e-5,
    )
    page = make_page(tmp_path / "run", output=tmp_path / "page.html")
    assert "This network was converted: nothing is known of its training." in page.text
    assert "The curves: a converted network has none." in page.text
    shown = [a for _, a in page.elements if (a.get("alt") or "").startswith("filter ")]
    assert len(shown) == 4
    assert "The first 4 of 5." in page.text
    assert pixels_of(shown[0]["src"]).shape == ((6, 6, 3) if channels == 3 else (6, 6))


def test_greyscale_mistakes_and_filters(tmp_path: Path) -> None:
    classes = ("bird", "cat", "frog")
    for split in ("train", "test"):
        write_images(tmp_path / split, dict.fromkeys(classes, 30), mode="L")
    config = TrainConfig(model="cnn", widths=(3, 9), hidden=(4,), data=str(tmp_path))
    network = untrained(tmp_path / "run", config, classes, (8, 8, 1))
    page = make_page(tmp_path / "run", output=tmp_path / "page.html")
    (confusion,) = [a for _, a in page.elements if a.get("id") == "confusion"]
    n, (correct,) = int(str(confusion["data-n"])), page.values("correct")
    assert n == 9

    kernel = network.variables["params"]["Conv_0"]["kernel"]
    tiles = [a for _, a in page.elements if (a.get("alt") or "").startswith("filter ")]
    assert len(tiles) == 3
    for k, tile in enumerate(tiles):
        scaled = kernel[:, :, 0, k] / np.abs(kernel[..., k]).max()
        np.testing.assert_allclose(pixels_of(tile["src"]) / 127.5 - 1, scaled, atol=0.01)

    place_of = {a.get("id"): i for i, (_, a) in enumerate(page.elements)}
    samples = page.elements[place_of["samples"] : place_of["confusion"]]
    assert [a["alt"] for tag, a in samples if tag == "img"] == [
        f"an image of {name}" for name in classes for _ in range(3)
    ]
    mistakes = [
        a for tag, a in page.elements[place_of["mistakes"] : place_of["filters"]] if tag == "img"
    ]
    assert len(mistakes) == n - correct
    files = re.findall(r"(?:bird|cat|frog)/\d+\.png", page.text)
    assert len(files) == len(mistakes)
    for file, image in zip(files, mistakes, strict=True):
        np.testing.assert_array_equal(
            pixels_of(image["src"]), np.asarray(Image.open(tmp_path / "train" / file))
        )
        assert image["alt"] == f"an image of {file.partition('/')[0]}"
    told = re.findall(r"<p>is (\w+)</p>\s*<p[^>]*>(\w+)/", (tmp_path / "page.html").read_text())
    assert len(told) == len(files)
    assert all(truth == folder for truth, folder in told)
    wrong = [a for a in page.with_class("wrong") if a["data-right"] == "false"]
    assert len(wrong) >= len(mistakes)
    assert page.text.count("\N{BALLOT X}") == len(wrong)  # not told by colour alone

    maps = [a["alt"] for _, a in page.elements if (a.get("alt") or "").startswith("channel ")]
    assert len(maps) == 3 * 3 + 3 * 8  # three images; all of 3 channels, and 8 of 9
    assert {str(alt).split()[-1] for alt in maps} == set(classes)
    square = next(a for tag, a in page.elements if tag == "rect")  # of 3x3, around the unit 4, 4
    assert [square[name] for name in ("x", "y", "width", "height")] == ["3.0"] * 4
    headings = re.findall(r"Conv_\d: .*", page.text)
    assert headings == [
        "Conv_0: 8\N{MULTIPLICATION SIGN}8, 3 of 3 channels",
        "Conv_1: 4\N{MULTIPLICATION SIGN}4, 8 of 9 channels, those most active here",
    ]


def test_feature_maps_are_the_layers_outputs(trained_run: Path, page_file: Path) -> None:
    run = read_run(trained_run)
    page = report_page.gather_run(run, data=None, data_dir=None)
    assert page.scored is not None
    network = trained.load(trained_run)
    pixels = np.stack([e.pixels for e in report_page.images_with_maps(page.scored.samples)])
    images = (pixels / 255 - network.mean) / network.std
    traced = trace_layers(network.model, network.variables, images.astype(np.float32))
    relus = [layer.output for layer in traced if layer.kind == "relu" and layer.output.ndim == 4]
    assert [each.layer for each in page.feature_maps] == ["Conv_0", "Conv_1", "Conv_2"]
    for each, relu in zip(page.feature_maps, relus, strict=True):
        assert each.n_channels == relu.shape[-1]
        np.testing.assert_allclose(each.maps, relu[..., each.channels], atol=1e-5)
        activity = np.asarray(relu).mean(axis=(0, 1, 2))
        left_out = sorted(set(range(each.n_channels)) - set(each.channels))
        assert len(each.channels) == min(8, each.n_channels)
        assert not left_out or activity[left_out].max() <= activity[each.channels].min() + 1e-6
    elements = Elements(page_file.read_text()).elements
    drawn = [a for _, a in elements if (a.get("alt") or "").startswith("channel ")]
    for each in page.feature_maps:
        for image in each.maps:
            for channel, values in zip(each.channels, np.moveaxis(image, -1, 0), strict=True):
                a = drawn.pop(0)
                assert str(a["alt"]).startswith(f"channel {channel} of {each.layer} for the image")
                scaled = 255 * values / image.max()
                np.testing.assert_allclose(pixels_of(a["src"]), scaled, atol=1)
    assert drawn == []


def test_receptive_fields_are_what_a_unit_depends_on() -> None:
    config = TrainConfig(model="cnn", widths=(2, 2, 2), hidden=())
    model = create_model(config, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 1)))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    without_bias = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key == "kernel"), ones
    )
    # One image for each pixel, where that pixel alone is not 0: a unit that sees it is not 0.
    images = np.eye(32 * 32, dtype=np.float32).reshape(-1, 32, 32, 1)
    traced = [
        layer
        for layer in trace_layers(model, without_bias, images)
        if layer.kind in ("conv", "pool")
    ]
    network = TrainedNetwork(config, ("a", "b"), (32, 32, 1), (0.5,), (0.5,), without_bias)
    fields = report_page.receptive_fields(network)
    assert [(f.size, f.stride) for f in fields] == [
        (3, 1),
        (4, 2),
        (8, 2),
        (10, 4),
        (18, 4),
        (22, 8),
    ]
    for field, layer in zip(fields, traced, strict=True):
        rows, columns = field.units
        seen = np.asarray(layer.output)[:, rows // 2, columns // 2, 0].reshape(32, 32) > 0
        for place, middle in zip(np.nonzero(seen), field.middle, strict=True):
            assert place.min() == middle - field.size / 2
            assert place.max() + 1 == middle + field.size / 2


def test_a_comparison(compared: Path, trained_run: Path) -> None:
    page = Elements(compared.read_text())
    report = json.loads((trained_run / "report.json").read_text())
    assert page.values("test_accuracy") == [report["test_accuracy"]] * 2 + ["None"]
    assert page.values("val_accuracy") == [report["val_accuracy"], 0.5, report["val_accuracy"]]
    assert page.values("n_params") == [report["n_params"]] * 3
    options = [a["data-option"] for _, a in page.elements if "data-option" in a]
    assert options == ["--learning-rate", "--flip"]
    low, high = wilson_interval(report["test_correct"], report["n_test"])
    assert page.rows[1][0].endswith(f"{100 * low:.2f} to {100 * high:.2f}\xa0%")
    assert page.rows[-2:] == [["0.003", "0.25", "0.003"], ["on", "off", "on"]]
    # A line in the legend and in each plot has the colour of its run.
    lines = re.findall(r"stroke: var\(--series-(\d)\)", compared.read_text())
    assert lines == 3 * ["0", "1", "2"]
    assert "different-data" in {a.get("id") for _, a in page.elements}
    assert "<b>else" in page.text
    for name in ("run", "other", "unfinished-long-name-"):
        assert name in page.text
    assert len(page.with_class("key")) == 3


def test_a_comparison_of_the_same_data(trained_run: Path, tmp_path: Path) -> None:
    copy = copy_of(trained_run, tmp_path / "run")
    page = make_page(trained_run, copy, output=tmp_path / "page.html")
    assert "different-data" not in {a.get("id") for _, a in page.elements}
    assert "None: all runs have the same configuration." in page.text
    assert str(copy) in page.text  # both folders are called "run"
    assert str(trained_run) in page.text


def test_unknown_data_is_not_the_same_data(hostile_page: Path, tmp_path: Path) -> None:
    run = hostile_page.with_name("run<i>")
    page = make_page(run, run, output=tmp_path / "page.html")
    ids = {a.get("id") for _, a in page.elements}
    assert "different-data" in ids
    assert "curves" not in ids
    assert page.text.count("converted") == 2
    assert "not finished" not in page.text


def test_many_lines_differ() -> None:
    assert len({report_figures.line_key(number) for number in range(32)}) == 32


def test_many_classes_are_a_picture() -> None:
    confusion = np.diag(np.full(30, 4))
    confusion[2, 5] = 12
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    pixels = pixels_of(report_figures.confusion_png(shares))
    assert pixels.shape == (30, 30)
    assert (pixels[0, 0], pixels[2, 5], pixels[2, 2], pixels[5, 2]) == (0, 64, 191, 255)
    assert not pixels_of(report_figures.confusion_png(np.eye(300))).diagonal().any()


def test_images_and_numbers_of_any_size_have_their_place() -> None:
    large = np.zeros((300, 150, 1), np.uint8)
    assert pixels_of(report_figures.image_png(large)).shape == (128, 64)
    assert pixels_of(report_figures.map_png(np.array([[-1.0, 1, 4]]), 4)).tolist() == [[0, 64, 255]]
    shown = [html.duration(seconds) for seconds in (None, 59.44, 60, 3599.6, 7325)]
    told = "\N{EN DASH}, 59.4 s, 1 min 0 s, 1 h 0 min, 2 h 2 min"
    assert ", ".join(shown).replace("\xa0", " ") == told


def edit(path: Path, **values: Any) -> None:
    """Give other ``values`` to each JSON object of a file, one a line or one in all."""
    text = path.read_text()
    objects = text.splitlines() if path.suffix == ".jsonl" else [text]
    path.write_text("".join(json.dumps(json.loads(each) | values) + "\n" for each in objects))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda run: shutil.rmtree(run), "is not a folder"),
        (lambda run: (run / "config.json").unlink(), "holds no run"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json cannot be used"),
        (lambda run: (run / "config.json").write_text('{"a": 1}'), "config.json cannot be used"),
        (lambda run: (run / "report.json").write_text("{"), "report.json cannot be used"),
        (lambda run: (run / "report.json").write_text('{"data": 1}'), "data is missing"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1: epoch is missing"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl cannot be"),
        (lambda run: (run / "metrics.jsonl").write_text("1,\n"), "line 1 is not JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 10**5), "line 1 is not JSON"),
        (lambda run: edit(run / "metrics.jsonl", val_loss=math.nan), "line 1: val_loss is nan"),
        (lambda run: edit(run / "metrics.jsonl", images_per_second=-1.0), "line 1: images_per"),
        (lambda run: edit(run / "report.json", val_accuracy=math.nan), "val_accuracy is nan"),
        (lambda run: edit(run / "report.json", data={}), "name is missing"),
        (lambda run: edit(run / "report.json", n_test=0, test_correct=0), "or that is 0"),
        (lambda run: edit(run / "report.json", n_test=1, test_correct=2), "more than n_test"),
    ],
)
def test_a_workdir_without_a_sound_run(
    spoil: Callable[[Path], None], what: str, trained_run: Path, tmp_path: Path
) -> None:
    workdir = copy_of(trained_run, tmp_path / "run")
    spoil(workdir)
    with pytest.raises(CifarJaxError, match=what) as raised:
        main([str(workdir)])
    assert raised.value.exit_code == ExitCode.CHECKPOINT
    assert str(workdir) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "WORKDIR"),
        (["{run}", "{run}", "--data", "shapes"], "--data with 2 runs"),
        (["{run}", "{run}", "--data-dir", "x"], "--data-dir with 2 runs"),
        (["{run}", "--output", "{run}"], "is not a regular file"),
        (["{run}", "--output", "{pipe}"], "is not a regular file"),
        (["{run}", "--outptu", "x"], "did you mean --output"),
    ],
)
def test_wrong_usage(arguments: list[str], what: str, trained_run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CifarJaxError, match=what) as raised:
        main([argument.format(run=trained_run, pipe=tmp_path / "pipe") for argument in arguments])
    assert raised.value.exit_code == ExitCode.USAGE


def test_an_output_that_cannot_be_written_is_said_at_once(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CifarJaxError, match="cannot write") as raised:
        write_report([trained_run] * 2, ReportOptions(output=str(tmp_path / "file" / "page.html")))
    assert raised.value.exit_code == ExitCode.ENVIRONMENT
    assert raised.value.fix == "give another --output"
    assert "reading" not in capsys.readouterr().out
