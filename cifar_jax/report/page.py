"""The content of a report, as plain data: gathered from a run, its network and its images."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray

from cifar_jax.checkpoints import checkpoint, trained
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.checkpoints.workdir import checkpoints_of, saved_steps
from cifar_jax.data.dataset import ImageShape, stratified_choice
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.layers import ACTIVATIONS, Layer, params_of, trace_layers
from cifar_jax.report.run import StoredRun
from cifar_jax.scoring.labelled import LabelledImages, load_labelled, logits_of
from cifar_jax.scoring.scores import Scores, score, wilson_interval
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import normalize

_SAMPLES = 20
_MISTAKES = 12
_IMAGES_WITH_MAPS = 3
_MAPS = 8  # channels of a layer
_FILTERS = 64


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in numbers; what is not known (yet) is None.

    Attributes:
        data, digest: the data's name, and the digest that identifies it.
        test_interval: the 95 % interval of the test accuracy.
        seconds: of training and validation, all epochs.
    """

    run: StoredRun
    data: str | None
    digest: str | None
    n_params: int | None
    best_epoch: int | None
    val_accuracy: float | None
    test_accuracy: float | None
    test_interval: tuple[float, float] | None
    test_loss: float | None
    epochs: int
    steps: int | None
    seconds: float | None
    images_per_second: float | None
    devices: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Example:
    """An image, its class, and the network's prediction."""

    file: str
    pixels: NDArray[np.uint8]
    label: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        return self.label == self.predicted


@dataclasses.dataclass(frozen=True)
class Scored:
    """The network's predictions for one split.

    Attributes:
        samples: images of every class, or of as many classes as there are samples.
        mistakes: the most confident wrong predictions.
    """

    split: Literal["val", "test"]
    data: str
    scores: Scores
    samples: list[Example]
    mistakes: list[Example]


@dataclasses.dataclass(frozen=True)
class FeatureMaps:
    """Some channels of a layer's output for some images: ``maps`` is ``[images, H, W, shown]``.

    Attributes:
        layer: the convolution; its maps are taken after the activation.
        channels: the indices of the channels shown, out of ``n_channels``.
    """

    layer: str
    n_channels: int
    channels: list[int]
    maps: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """The square of the image that one unit of a layer depends on.

    Attributes:
        size: its side in pixels.
        stride: pixels between the squares of neighbouring units.
        start: the middle of the first unit's square, in pixels from the image's edge.
        units: rows and columns of units in the layer.
    """

    layer: str
    kind: str
    size: int
    stride: int
    start: float
    units: tuple[int, ...]

    @property
    def middle(self) -> tuple[float, float]:
        """(row, column) of the centre of the square of the layer's middle unit."""
        row, column = (self.start + n // 2 * self.stride for n in self.units)
        return row, column


@dataclasses.dataclass
class RunPage:
    """Everything on the page of one run; filled as far as the run allows.

    Attributes:
        missing: what is not on the page and why, in a sentence each.
        warnings: what a reader must know before believing the page, in a sentence each.
        filters: kernels of the first convolution, ``[shown, h, w, C]``, of ``n_filters``.
    """

    summary: Summary
    missing: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    class_names: tuple[str, ...] = ()
    image_shape: ImageShape | None = None
    scored: Scored | None = None
    filters: NDArray[np.float32] | None = None
    n_filters: int = 0
    feature_maps: list[FeatureMaps] = dataclasses.field(default_factory=list)
    receptive_fields: list[ReceptiveField] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        names: of each run, the name of its folder, or the whole path if two folders share a name.
        differing: the options in which the runs differ, with every run's value.
    """

    summaries: list[Summary]
    names: list[str]
    differing: dict[str, list[Any]]

    @property
    def same_data(self) -> bool:
        """Whether all runs are known to use the same data."""
        digests = {summary.digest for summary in self.summaries}
        return len(digests) == 1 and None not in digests


def gather_run(run: StoredRun, *, data: str | None, data_dir: str | None) -> RunPage:
    """The page of ``run``, scored on the test images if it is complete, else on validation images.

    What cannot be read is left out, and reported on the page and on stderr.

    Args:
        data: a source as in ``cifar_jax.train``; None is the one that the run was trained on.

    Raises:
        DataError: ``data`` is given and cannot be read.
    """
    summary = summarize(run)
    page = RunPage(summary)
    if not run.history:
        why = "a converted network has none" if run.is_converted else "no epoch is done yet"
        if summary.epochs:
            why = "metrics.jsonl is missing or empty"
        _miss(page, f"The curves: {why}.")
    try:
        network = _load(run)
    except CifarJaxError as error:
        _miss(page, f"Everything about the network: {error}")
        return page
    page.class_names, page.image_shape = network.class_names, network.image_shape
    traced = _trace_shapes(network)
    convs = [layer.name for layer in traced if layer.kind == "conv"]
    if convs:
        kernel = params_of(network.variables, convs[0])["kernel"]
        shown = np.moveaxis(kernel, -1, 0)[:_FILTERS]
        page.filters = _on_pixels(shown, run.config.patch_size)
        page.n_filters = kernel.shape[-1]
    try:
        page.receptive_fields = receptive_fields(network)
    except CifarJaxError as error:
        _miss(page, f"What each layer sees: {error}")
    split: Literal["val", "test"] = "val" if run.report is None else "test"
    try:
        labelled = load_labelled(network, split, data=data, data_dir=data_dir)
        print(f"scoring {len(labelled):,} {split} images of {labelled.name} ...", flush=True)
        scored = _score(network, labelled, split)
    except CifarJaxError as error:
        if data is not None:
            raise
        _miss(page, f"Scores of each class, images and feature maps: {error}")
        return page
    page.scored = scored
    page.warnings.extend(_disagreements(summary, labelled, scored))
    if convs:
        page.feature_maps = _feature_maps(network, scored.samples)
    return page


def _on_pixels(kernels: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """``[N, h, w, C*side*side]`` -> ``[N, h*side, w*side, C]``: undoes ``space_to_depth``."""
    n, height, width, channels = kernels.shape
    squares = kernels.reshape(n, height, width, channels // side**2, side, side)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(n, height * side, width * side, -1)


def gather_comparison(runs: Sequence[StoredRun]) -> Comparison:
    """``runs`` side by side, in the order given."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.workdir) for run in runs]
    configs = [dataclasses.asdict(run.config) for run in runs]
    differing = {
        option: [config[option] for config in configs]
        for option in configs[0]
        if any(config[option] != configs[0][option] for config in configs)
    }
    return Comparison([summarize(run) for run in runs], names, differing)


def summarize(run: StoredRun) -> Summary:
    """``run`` in numbers: from ``report.json``, else from its history and newest checkpoint."""
    if run.report is not None:
        report = run.report
        return Summary(
            run=run,
            data=report["data"]["name"],
            digest=report["data"]["digest"],
            n_params=report["n_params"],
            best_epoch=run.best["epoch"] if run.best else None,
            val_accuracy=report["val_accuracy"],
            test_accuracy=report["test_accuracy"],
            test_interval=wilson_interval(report["test_correct"], report["n_test"]),
            test_loss=report["test_loss"],
            epochs=report["epochs"],
            steps=report["steps"],
            seconds=report["train_seconds"],
            images_per_second=report["images_per_second"],
            devices=f"{report['devices']} {report['device_kind']}",
            versions=report["versions"],
        )
    metadata, n_params = _newest(run)
    history = run.history
    data, versions = (_texts(metadata.get(name)) for name in ("data", "versions"))
    saved = metadata.get("history")
    saved_history = saved if isinstance(saved, list) else []
    speeds = [row["images_per_second"] for row in history]
    return Summary(
        run=run,
        data=data.get("name"),
        digest=None if data.get("digest") == trained.UNKNOWN_DATA else data.get("digest"),
        n_params=n_params,
        best_epoch=run.best["epoch"] if run.best else None,
        val_accuracy=run.best["val_accuracy"] if run.best else None,
        test_accuracy=None,
        test_interval=None,
        test_loss=None,
        epochs=len(history or saved_history),
        steps=history[-1]["step"] if history else None,
        seconds=sum(row["seconds"] for row in history) if history else None,
        images_per_second=statistics.harmonic_mean(speeds) if speeds else None,
        devices=str(run.config.devices),
        versions=versions,
    )


def receptive_fields(network: TrainedNetwork) -> list[ReceptiveField]:
    """The receptive field of each convolution and pooling where it is known, in order."""
    return [
        ReceptiveField(
            layer=row.name,
            kind=row.kind,
            size=row.receptive_field,
            stride=row.stride,
            start=row.start + row.receptive_field / 2,
            units=row.output_shape[1:3],
        )
        for row in layer_table(network.model, network.image_shape, batch_size=1)
        if row.kind in ("conv", "pool") and row.receptive_field
    ]


def _miss(page: RunPage, what: str) -> None:
    page.missing.append(what)
    print(f"warning: the page lacks: {what}", file=sys.stderr)


def _newest(run: StoredRun) -> tuple[dict[str, Any], int | None]:
    """The newest checkpoint's metadata and number of parameters; without one ({}, None)."""
    folder = checkpoints_of(run.workdir)
    steps = saved_steps(folder)
    metadata: dict[str, Any] = {}
    try:
        if steps:
            metadata = checkpoint.restore_metadata(folder / str(steps[-1]))
            return metadata, trained.load(folder / str(steps[-1])).n_params
    except CifarJaxError as error:
        print(f"warning: {error}", file=sys.stderr)
    return metadata, None


def _texts(values: Any) -> dict[str, str]:
    """The entries of ``values`` that are text: a checkpoint is untrusted."""
    items = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in items if isinstance(value, str)}


def _load(run: StoredRun) -> TrainedNetwork:
    """The network that ``report.json`` describes; without a report, the best so far."""
    if run.report is None:
        return trained.load(run.workdir)
    return trained.load(checkpoints_of(run.workdir) / str(run.report["best_step"]))


def _score(
    network: TrainedNetwork, labelled: LabelledImages, split: Literal["val", "test"]
) -> Scored:
    labels = labelled.split.labels
    scores = score(logits_of(network, labelled), labels)

    def examples(indices: NDArray[np.int64]) -> list[Example]:
        if not len(indices):
            return []
        return [
            Example(
                labelled.file_name(index),
                pixels,
                network.class_names[labels[index]],
                network.class_names[scores.predicted[index]],
                float(scores.confidence[index]),
            )
            for index, pixels in zip(indices, labelled.pixels(indices), strict=True)
        ]

    chosen = stratified_choice(labels, _SAMPLES, np.random.default_rng(0))
    by_class = chosen[np.argsort(labels[chosen], kind="stable")]
    return Scored(
        split,
        labelled.name,
        scores,
        examples(by_class),
        examples(scores.mistakes(labels, _MISTAKES)),
    )


def _disagreements(summary: Summary, labelled: LabelledImages, scored: Scored) -> list[str]:
    """Warnings where the run's own record and the scores computed now disagree."""
    if summary.digest not in (None, labelled.digest):
        return [
            f"The images found ({labelled.name}) are not the data of the run ({summary.data}): "
            "their digests differ. The scores below are for the images found."
        ]
    report, scores = summary.run.report, scored.scores
    if report is not None:
        recorded = report["test_correct"]
    elif summary.val_accuracy is not None:
        recorded = round(summary.val_accuracy * scores.n)
    else:
        return []
    if recorded == scores.correct:
        return []
    return [
        f"Scored again, {scores.correct:,} {scored.split} images are right; the run recorded "
        f"{recorded:,}. Another machine rounds differently, but more than a few mean another "
        "network or other images."
    ]


def _trace_shapes(network: TrainedNetwork) -> list[Layer]:
    images = np.zeros((1, *network.image_shape), np.float32)
    return jax.eval_shape(functools.partial(trace_layers, network.model), network.variables, images)


def _feature_maps(network: TrainedNetwork, samples: list[Example]) -> list[FeatureMaps]:
    """The most active channels after each convolution, on :func:`images_with_maps`."""
    pixels = np.stack([each.pixels for each in images_with_maps(samples)])
    shapes = _trace_shapes(network)
    chosen: dict[int, str] = {}  # its place, the convolution's name
    conv = None
    for place, layer in enumerate(shapes):
        conv = layer.name if layer.kind == "conv" else conv
        if layer.kind in ACTIVATIONS and conv is not None and len(layer.output.shape) == 4:
            chosen[place] = conv

    def run(variables: Any, images: Any) -> list[Any]:
        normalised = normalize(images, network.mean, network.std)
        traced = trace_layers(network.model, variables, normalised)
        return [traced[place].output for place in chosen]

    lowered = jax.jit(run).lower(network.variables, pixels)
    outputs = compile_lowered(lowered, jax.default_backend())(network.variables, pixels)
    found = []
    for name, output in zip(chosen.values(), outputs, strict=True):
        values = np.asarray(output)
        activity = values.mean(axis=(0, 1, 2))
        channels = sorted(np.argsort(-activity, kind="stable")[:_MAPS].tolist())
        found.append(FeatureMaps(name, values.shape[-1], channels, values[..., channels]))
    return found


def images_with_maps(samples: list[Example]) -> list[Example]:
    """The samples whose feature maps are shown: spaced apart, to differ in class."""
    places = np.linspace(0, len(samples) - 1, min(len(samples), _IMAGES_WITH_MAPS)).round()
    return [samples[int(place)] for place in places]
