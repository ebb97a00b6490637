"""Files, memory, time, and what 32x32 pixels can carry.

Questions 9, 14, 15, 16, 24, 30, 32, 34, 46, 47, 56. What is timed, or measured for its memory, runs
in a process of its own, as this one has frameworks and data in it that would count too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import TrainConfig
from cifar_jax.data.archive import extract_once
from cifar_jax.data.dataset import Dataset, ImageFiles, Split, channel_statistics, epoch_order
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.models import ConvNet, create_model
from cifar_jax.scoring.inference import make_logits
from cifar_jax.steps.step_memory import step_memory
from cifar_jax.steps.train_step import create_train_state
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, table
from claims.spread import noise, percent, spread, spread_at
from claims.study import Study

_MB = 2**20
_CIFAR10_IMAGES = 50_000  # of training, by the tutorial


def _apart(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call ``function``, which must import all it needs, in a bare process that sees a CPU only."""
    code = (
        f"from __future__ import annotations\n{inspect.getsource(function)}\n"
        "import json, sys\n"
        f"print(json.dumps({function.__name__}(**json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__} failed apart:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _image_folder(study: Study, n: int, side: int) -> Iterator[Path]:
    """A temporary folder of ``n`` training images, ``class/00000.jpg``, enlarged to ``side``."""
    dataset, order = study.dataset, epoch_order(len(study.dataset.train), seed=0, epoch=0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        for name in dataset.class_names:
            (root / name).mkdir(parents=True)
        for i, index in enumerate(order[:n]):
            pixels = dataset.train.pixels[index]
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            if side != image.width:
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            name = dataset.class_names[dataset.train.labels[index]]
            image.save(root / name / f"{i:05}.jpg", quality=90)
        yield root


# ------------------------------------------------------------------ 9: lazy and eager loading


def _growth_while_reading(folder: str, side: int, limit: int, how: str) -> float:
    """MB by which the peak of this process's memory grows; needs Linux's /proc."""
    import re
    from pathlib import Path

    import numpy as np
    from PIL import Image

    def peak() -> float:
        # Not getrusage, whose peak begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    paths = sorted(Path(folder).glob("*/*.jpg"))[:limit]
    np.stack([read(path) for path in paths[:128]])  # a batch: what reading itself takes
    before = peak()
    if how == "lazy":
        for start in range(0, len(paths), 128):
            np.stack([read(path) for path in paths[start : start + 128]])
    else:
        images = np.empty((len(paths), side, side, 3), how)
        for i, path in enumerate(paths):
            images[i] = read(path)
    return peak() - before


def measure_image_folder(study: Study) -> Measured:
    """Read a folder of JPEGs of 128x128 pixels batch by batch, and into one array.

    By how much does the peak memory of a process grow beyond that for a batch, for half of the
    images and for all? As they are asked for, as an array of uint8, and of float32 as in a
    TensorDataset. That folders become labels is checked with this project's reader of the same
    layout. The claim fails if lazy loading grows with the number of images, or if a label is not
    that of its folder. A caveat if CIFAR-10 fits into this machine's memory. Cost: 1 minute.
    """
    from cifar_jax.data.sources import load_splits

    side, n = 128, study.scaled(4000, 600)
    with _image_folder(study, n, side) as root:

        def growth(how: str, limit: int) -> float:
            arguments = {"folder": str(root), "side": side, "limit": limit, "how": how}
            return max(_apart(_growth_while_reading, **arguments), 0.0)

        half, whole = ({h: growth(h, m) for h in ("lazy", "uint8", "float32")} for m in (n // 2, n))
        found = load_splits(str(root))
        folders = sorted(path.name for path in root.iterdir())
        right = total = 0
        for split in (found.train, found.val, found.test):
            assert split is not None
            assert isinstance(split.images, ImageFiles)
            for path, label in zip(split.images.paths, split.labels, strict=True):
                right += Path(os.fsdecode(path)).parent.name == folders[label]
                total += 1
    pixels = np.prod(study.dataset.image_shape)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _MB
    return Measured(
        {
            "images": n,
            "images_found": total,
            "labels_of_their_folder": right,
            "lazy_growth_mb": {"half": half["lazy"], "all": whole["lazy"]},
            "eager_uint8_growth_mb": {"half": half["uint8"], "all": whole["uint8"]},
            "eager_float32_growth_mb": {"half": half["float32"], "all": whole["float32"]},
            "cifar10_as_float32_mb": float(4 * _CIFAR10_IMAGES * pixels / _MB),
            "imagenet_224_pixels_as_float32_mb": 4 * 1_281_167 * 224 * 224 * 3 / _MB,
            "machine_memory_mb": machine,
        },
        n=1,
    )


def judge_image_folder(values: Values) -> Verdict:
    lazy, eager = values["lazy_growth_mb"], values["eager_float32_growth_mb"]
    images, eager_uint8 = values["images"], values["eager_uint8_growth_mb"]
    cifar, machine = values["cifar10_as_float32_mb"], values["machine_memory_mb"]
    evidence = table(
        ("memory that the process needs for", f"{images // 2:,} images", f"{images:,} images"),
        [
            (how, f"{growth['half']:,.0f} MB", f"{growth['all']:,.0f} MB")
            for how, growth in (
                ("images read as they are asked for", lazy),
                ("one array of uint8", eager_uint8),
                ("one array of float32", eager),
            )
        ],
    )
    evidence += "\n\n" + bullets(
        f"labels that are those of their folder: {values['labels_of_their_folder']:,} of "
        f"{images:,}",
        f"as float32, CIFAR-10 takes {cifar:,.0f} MB and ImageNet at 224x224 "
        f"{values['imagenet_224_pixels_as_float32_mb']:,.0f} MB; the machine has {machine:,.0f} MB",
    )
    if not images == values["images_found"] == values["labels_of_their_folder"]:
        return Verdict(FAILS, "Not every image has the label of its folder.", evidence)
    # Lazy loading that took a fifth of the array's memory would still be growing with the data.
    if lazy["all"] > eager["all"] / 5:
        return Verdict(FAILS, "Reading images as they are asked for saves little.", evidence)
    if cifar < machine / 4:
        return Verdict(
            CAVEAT,
            "Reading images as they are asked for needs no memory for those not yet asked for. But "
            f"not all real data is too large: CIFAR-10 takes {cifar:,.0f} MB of this machine's "
            f"{machine:,.0f} MB.",
            evidence,
        )
    return Verdict(HOLDS, "Reading images as they are asked for saves the memory.", evidence)


# ------------------------------------------------------------------------- 14: out of memory


def measure_out_of_memory(study: Study) -> Measured:
    """What XLA allocates for a training step of the tutorial's network, by batch and image size.

    Also with 16 times the filters in each convolution (1024 in the last), and without the hidden
    Dense layers; and which share of the parameters the first Dense layer has, by image size, in the
    tutorial's network, in cnn-wide, and in cnn-gap, which does not flatten. Nothing is run. The
    claim fails if memory does not grow with the batch, the resolution or the filters, if at 32
    pixels the first Dense layer has less than half of the parameters, or if without the hidden ones
    a step needs more than nine tenths of the memory. A caveat if that share is not 70 to 90 %.
    Cost: a minute of compiling.
    """
    classes, channels = len(study.dataset.class_names), study.dataset.image_shape[2]
    cnn = ConvNet(
        num_classes=classes,
        widths=(4,) if study.quick else (16, 32, 64),
        hidden=(16,) if study.quick else (512, 256),
    )
    config = TrainConfig(flip=False, crop=0)

    @functools.cache
    def step_mb(model: ConvNet, side: int, batch: int) -> float:
        return step_memory(config, model, (side, side, channels), batch).xla_total / _MB

    def activations_mb(model: ConvNet, side: int) -> float:
        rows = layer_table(model, (side, side, channels), 128)
        return sum(row.activation_bytes for row in rows) / _MB

    def share_percent(name: str, side: int) -> float:
        model = create_model(TrainConfig(model=name), classes, None)  # type: ignore[arg-type]
        rows = layer_table(model, (side, side, channels), 1)
        first = next(row.params for row in rows if row.kind == "dense")
        return 100 * first / sum(row.params for row in rows)

    sides = (32, 64, 128, 224, 512)
    batches = (128, 2048) if study.quick else (128, 512, 2048)
    wide = cnn.clone(widths=tuple(16 * w for w in cnn.widths))
    values = {
        "step_by_batch_mb": {str(b): step_mb(cnn, 32, b) for b in batches},
        "step_by_side_pixels_mb": {str(s): step_mb(cnn, s, 128) for s in (32, 512)},
        "activations_by_side_pixels_mb": {str(s): activations_mb(cnn, s) for s in sides},
        "filters_of_last_convolution": [cnn.widths[-1], wide.widths[-1]],
        "step_with_wide_filters_mb": step_mb(wide, 32, 128),
        "step_without_hidden_dense_mb": step_mb(cnn.clone(hidden=()), 32, 128),
        "first_dense_share_percent": {
            name: {str(s): share_percent(name, s) for s in sides}
            for name in ("cnn", "cnn-wide", "cnn-gap")
        },
    }
    return Measured(values, n=1, figure=_memory_figure(study, values))


def _memory_figure(study: Study, values: Values) -> str:
    figure = Figure((7.5, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_side = values["activations_by_side_pixels_mb"]
    left.loglog([int(s) for s in by_side], list(by_side.values()), "o-", label="activations")
    steps = values["step_by_side_pixels_mb"]
    left.loglog([int(s) for s in steps], list(steps.values()), "s", label="XLA, whole step")
    left.set(xlabel="side of the images (pixels)", ylabel="memory for 128 images (MB)")
    for name, shares in values["first_dense_share_percent"].items():
        right.semilogx([int(s) for s in shares], list(shares.values()), "o-", label=name)
    right.axhline(80, color="grey", linestyle=":", label="the claim's 80 %")
    right.set(xlabel="side of the images (pixels)", ylabel="first Dense layer (% of parameters)")
    for axes in (left, right):
        axes.set_xticks([32, 64, 128, 224, 512], ["32", "64", "128", "224", "512"])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    return study.save_figure(figure, "q14_memory.png")


def judge_out_of_memory(values: Values) -> Verdict:
    by_batch, by_side = values["step_by_batch_mb"], values["step_by_side_pixels_mb"]
    smallest, largest_batch = min(by_batch, key=int), max(by_batch, key=int)
    largest_side = max(by_side, key=int)
    plain, wide = by_batch[smallest], values["step_with_wide_filters_mb"]
    no_dense = values["step_without_hidden_dense_mb"]
    shares = values["first_dense_share_percent"]
    dense = shares["cnn"]["32"]
    before, after = values["filters_of_last_convolution"]
    evidence = table(
        ("memory of a training step of `cnn`", "MB"),
        [
            (f"{smallest} images of 32 pixels a side", f"{plain:,.0f}"),
            (f"{int(largest_batch):,} images", f"{by_batch[largest_batch]:,.0f}"),
            (f"{smallest} images of {largest_side} pixels a side", f"{by_side[largest_side]:,.0f}"),
            (f"{after / before:.0f} times the filters in each convolution", f"{wide:,.0f}"),
            ("without the hidden Dense layers", f"{no_dense:,.0f}"),
        ],
    )
    sides = list(shares["cnn"])
    evidence += "\n\n" + table(
        ("share of the parameters in the first Dense layer", *(f"{s} pixels" for s in sides)),
        [
            (f"`{name}`", *(f"{by_size[side]:.0f} %" for side in sides))
            for name, by_size in shares.items()
        ],
    )
    growing = by_batch[largest_batch] > 2 * plain and by_side[largest_side] > 50 * plain
    if not growing or wide < 2 * plain or dense < 50 or no_dense > 0.9 * by_side["32"]:
        return Verdict(FAILS, "One of the four does not need much memory.", evidence)
    finding = (
        "All four need memory. The first Dense layer has "
        f"{dense:.0f} % of the parameters of `cnn`, and {shares['cnn-gap']['32']:.0f} % of "
        "`cnn-gap`, which does not flatten"
    )
    if abs(dense - 80) <= 10:  # "often consumes 80 %" is no exact number
        return Verdict(HOLDS, f"{finding}.", evidence)
    return Verdict(CAVEAT, f"{finding}: that is not 80 %.", evidence)


# --------------------------------------------------------- 15, 16: archives and their extraction


@functools.cache
def _archive_numbers(study: Study) -> Values:
    """Many files and the archive of them: copied, read, extracted; the best of some rounds.

    On this machine's own disk, through the operating system's cache. A minute.
    """
    n = study.scaled(5000, 300)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    with _image_folder(study, n, study.dataset.image_shape[0]) as root:
        packed = root.parent / "images.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(root, "images")
        files = [path for path in root.rglob("*") if path.is_file()]
        stats = [path.stat() for path in files]

        def read_archive() -> int:
            with tarfile.open(packed, "r|gz") as archive:
                contents = (archive.extractfile(member) for member in archive)
                return sum(len(content.read()) for content in contents if content)

        def extract(source: Path, name: str) -> Path:
            with tarfile.open(source, "r|gz") as archive:
                archive.extractall(root.parent / name, filter="data")
            return root.parent / name

        for turn in range(study.scaled(3, 1)):
            copy, copied, once = (root.parent / f"{name}{turn}" for name in ("a", "b", "once"))
            timed("copy_files", functools.partial(shutil.copytree, root, copy))
            timed("copy_archive", functools.partial(shutil.copyfile, packed, copied))
            timed("read_files", lambda: sum(len(path.read_bytes()) for path in files))
            timed("read_archive", read_archive)
            unpacked = timed("extractall", functools.partial(extract, packed, f"c{turn}"))
            timed("first_call", functools.partial(extract_once, packed, once))
            extracted = timed("second_call", functools.partial(extract_once, packed, once))
            for path in (copy, unpacked):
                shutil.rmtree(path)

        classes = [path for path in (extracted / "images").iterdir() if path.is_dir()]
        # An extraction that stops half-way, as by Ctrl-C, a full disk, or half a download.
        half = root.parent / "half.tar.gz"
        half.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
        with suppress(EOFError, tarfile.TarError):
            extract(half, "interrupted")
        interrupted = root.parent / "interrupted"
        with suppress(CifarJaxError):
            extract_once(half, root.parent / "none")
        left_by_us = [path for path in (root.parent / "none").rglob("*/*") if path.is_file()]
        return {
            "files": n,
            "bytes": sum(stat.st_size for stat in stats),
            "bytes_on_disk": sum(512 * stat.st_blocks for stat in stats),
            "archive_bytes": packed.stat().st_size,
            "seconds": {name: min(times) for name, times in seconds.items()},
            "files_extracted": sum(path.is_file() for path in extracted.rglob("*")),
            "class_folders": len(classes),
            "interrupted_folder_exists": interrupted.exists(),
            "interrupted_files": sum(path.is_file() for path in interrupted.rglob("*")),
            "interrupted_files_of_extract_once": len(left_by_us),
        }


def measure_archive(study: Study) -> Measured:
    """Copy and read thousands of JPEGs one by one and as one ``.tar.gz``, and extract that.

    On a local disk, through the cache. A network adds a round trip for each file, so this is the
    least that an archive saves. The claim fails if the files are copied as fast as the archive. A
    caveat if copying and extracting the archive takes longer than copying the files. Cost: a
    minute, shared with question 16.
    """
    found = _archive_numbers(study)
    seconds = found["seconds"]
    return Measured(
        {
            "files": found["files"],
            "files_mb": found["bytes"] / _MB,
            "files_on_disk_mb": found["bytes_on_disk"] / _MB,
            "archive_mb": found["archive_bytes"] / _MB,
            "copy_files_seconds": seconds["copy_files"],
            "copy_archive_seconds": seconds["copy_archive"],
            "read_files_seconds": seconds["read_files"],
            "read_archive_seconds": seconds["read_archive"],
            "extract_seconds": seconds["extractall"],
        },
        n=study.scaled(3, 1),
    )


def judge_archive(values: Values) -> Verdict:
    files, archive = values["copy_files_seconds"], values["copy_archive_seconds"]
    extract = values["extract_seconds"]
    evidence = table(
        ("", f"{values['files']:,} files", "their archive"),
        [
            ("copying", f"{files:.2f} s", f"{archive:.4f} s"),
            (
                "reading all images",
                f"{values['read_files_seconds']:.2f} s",
                f"{values['read_archive_seconds']:.2f} s",
            ),
            ("extracting", "", f"{extract:.2f} s"),
            (
                "on the disk",
                f"{values['files_on_disk_mb']:.0f} MB, of which {values['files_mb']:.0f} are used",
                f"{values['archive_mb']:.0f} MB",
            ),
        ],
    )
    evidence += "\n\nOn a local disk; each time is the shortest of its rounds."
    # Copying the same bytes twice can differ by some tens of per cent; by a factor of 2 it is not
    # the bytes.
    if files < 2 * archive:
        return Verdict(FAILS, "The files are copied as fast as their archive.", evidence)
    finding = f"Copying the archive takes {files / archive:.0f} times less time than the files."
    if archive + extract > files:
        return Verdict(
            CAVEAT,
            f"{finding} But extracting it takes {extract:.1f} s, longer than copying the files "
            f"({files:.1f} s): an archive saves time on the way between machines, not on one disk.",
            evidence,
        )
    return Verdict(HOLDS, f"{finding} Extracting it takes {extract:.1f} s.", evidence)


def measure_extraction(study: Study) -> Measured:
    """Extract an archive of class folders twice with ``extract_once``, and stop half-way.

    The tutorial checks ``if not os.path.exists(path)``. After an ``extractall`` that ends early,
    because the archive is cut in half, does the folder exist, and what is in it? The claim fails if
    files are missing after the first call, or if the second call takes as long. A caveat if the
    check passes after an interruption. Cost: shared with question 15.
    """
    found = _archive_numbers(study)
    return Measured(
        {
            "files": found["files"],
            "files_extracted": found["files_extracted"],
            "class_folders": found["class_folders"],
            "extractall_seconds": found["seconds"]["extractall"],
            "first_call_seconds": found["seconds"]["first_call"],
            "second_call_seconds": found["seconds"]["second_call"],
            "interrupted_passes_exists_check": found["interrupted_folder_exists"],
            "interrupted_files": found["interrupted_files"],
            "interrupted_files_of_extract_once": found["interrupted_files_of_extract_once"],
        },
        n=study.scaled(3, 1),
    )


def judge_extraction(values: Values) -> Verdict:
    first, second = values["first_call_seconds"], values["second_call_seconds"]
    files, left = values["files"], values["interrupted_files"]
    left_of_ours = values["interrupted_files_of_extract_once"]
    evidence = table(
        ("", "`extractall`", "`extract_once`, of this project"),
        [
            ("extracting", f"{values['extractall_seconds']:.2f} s", f"{first:.2f} s"),
            ("a second call", "", f"{second:.3f} s"),
            (f"files of {files:,} after an interruption", f"{left:,}", f"{left_of_ours:,}"),
        ],
    )
    evidence += "\n\n" + bullets(
        f"files extracted: {values['files_extracted']:,} of {files:,}, in "
        f"{values['class_folders']} class folders",
        "`os.path.exists` is "
        f"{'true' if values['interrupted_passes_exists_check'] else 'false'} after the "
        "interruption of `extractall`",
    )
    if values["files_extracted"] != files or values["class_folders"] < 2:
        return Verdict(FAILS, "Files or class folders are missing.", evidence)
    if second > first / 2:
        return Verdict(FAILS, "The second time takes as long as the first.", evidence)
    if values["interrupted_passes_exists_check"] and left < files:
        return Verdict(
            CAVEAT,
            "The check saves the second extraction. But it also passes after an extraction that "
            f"stopped half-way, with {left:,} of {files:,} files. `extract_once` gives a folder "
            "its name only when it is complete.",
            evidence,
        )
    return Verdict(HOLDS, "The check saves the second extraction.", evidence)


# -------------------------------------------------------------- 24, 46: training, answers on CPU


def _time_training(
    networks: list[dict[str, Any]], image_shape: list[int]
) -> dict[str, dict[str, float]]:
    """Seconds of training for an image, and steps timed, of each network; compiling not counted."""
    import functools
    import time

    import jax
    import numpy as np

    from cifar_jax.config import TrainConfig
    from cifar_jax.networks.models import create_model
    from cifar_jax.steps.augment import make_augmentation
    from cifar_jax.steps.optim import make_optimizer, make_schedule
    from cifar_jax.steps.parallel import compile_lowered
    from cifar_jax.steps.train_step import create_train_state, train_step
    from cifar_jax.system.allocator import keep_freed_memory

    keep_freed_memory()  # as every command does
    height, width, channels = image_shape
    mean, std = (0.5,) * channels, (0.25,) * channels
    rng = np.random.default_rng(0)
    found = {}
    for network in networks:
        config = TrainConfig(model=network["model"])
        model, batch_size = create_model(config, 10, None), network["batch_size"]
        tx = make_optimizer(config, make_schedule(config, 1000))
        state = create_train_state(model, tx, (height, width, channels), 0)
        step = functools.partial(
            train_step,
            model=model,
            tx=tx,
            augment=make_augmentation(config, mean),
            mean=mean,
            std=std,
            seed=0,
        )
        images = rng.integers(0, 256, (8, batch_size, *image_shape)).astype(np.uint8)
        labels = rng.integers(0, 10, (8, batch_size)).astype(np.int32)
        batches = [{"image": i, "label": y} for i, y in zip(images, labels, strict=True)]
        lowered = jax.jit(step, donate_argnums=0).lower(state, batches[0])
        compiled = compile_lowered(lowered, "cpu")
        state, sums = compiled(state, batches[0])
        jax.block_until_ready(sums)
        started = time.perf_counter()
        for i in range(network["steps"]):
            state, sums = compiled(state, batches[i % 8])
        jax.block_until_ready(sums)
        seconds = (time.perf_counter() - started) / (network["steps"] * batch_size)
        found[network["model"]] = {"seconds_an_image": seconds, "steps": network["steps"]}
    return found


def measure_cpu_training(study: Study) -> Measured:
    """Time training steps on this machine's CPU, and multiply to an epoch of 50,000 images.

    A whole epoch of the tutorial's network (391 steps of 128), and 12 steps of cnn-wide and
    resnet9. The images are random, with the default augmentation: pixels do not change the time.
    The claim fails if an epoch of the tutorial's network takes less than an hour. That a GPU takes
    seconds is not measured here. Cost: 1 minute 30.
    """
    networks: list[dict[str, Any]] = [
        {"model": "cnn", "batch_size": 128, "steps": study.scaled(391, 5)}
    ]
    if not study.quick:
        networks.append({"model": "cnn-wide", "batch_size": 128, "steps": 12})
        networks.append({"model": "resnet9", "batch_size": 128, "steps": 12})
    shape = list(study.dataset.image_shape)
    found = _apart(_time_training, networks=networks, image_shape=shape)
    seconds = {name: row["seconds_an_image"] * _CIFAR10_IMAGES for name, row in found.items()}
    return Measured(
        {
            "cores": len(os.sched_getaffinity(0)),
            "epoch_seconds": seconds,
            "ten_epochs_of_cnn_minutes": seconds["cnn"] / 6,
        },
        n=min(row["steps"] for row in found.values()),
    )


def judge_cpu_training(values: Values) -> Verdict:
    seconds, cores = values["epoch_seconds"], values["cores"]
    evidence = table(
        (f"on {cores} CPU cores", "an epoch of 50,000 images"),
        [(f"`{name}`", f"{s:,.0f} s") for name, s in seconds.items()],
    )
    finding = (
        f"On {cores} CPU cores an epoch of the tutorial's network takes {seconds['cnn']:.0f} "
        f"seconds, ten epochs {values['ten_epochs_of_cnn_minutes']:.0f} minutes."
    )
    slowest = max(seconds, key=lambda name: seconds[name])
    if seconds["cnn"] >= 3600:
        return Verdict(HOLDS, finding, evidence)
    if seconds[slowest] >= 3600:
        return Verdict(CAVEAT, f"{finding} Only `{slowest}` takes hours.", evidence)
    return Verdict(
        FAILS,
        f"{finding} Even `{slowest}` takes only {seconds[slowest] / 60:.0f} minutes an epoch.",
        evidence,
    )


def _time_inference(
    networks: list[str], image_shape: list[int], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each answer to one image, of each network in turn; compiling not counted."""
    import time

    import numpy as np
    import optax

    from cifar_jax.checkpoints.trained import TrainedNetwork
    from cifar_jax.config import TrainConfig
    from cifar_jax.networks.models import create_model
    from cifar_jax.scoring.inference import make_logits, softmax
    from cifar_jax.steps.train_step import create_train_state

    height, width, channels = image_shape
    shape = height, width, channels
    images = np.random.default_rng(0).integers(0, 256, (rounds + 5, *shape)).astype(np.uint8)
    answers = {}
    for name in networks:
        config = TrainConfig(model=name)  # type: ignore[arg-type]
        state = create_train_state(create_model(config, 10, None), optax.sgd(1.0), shape, 0)
        names, mean, std = tuple("abcdefghij"), (0.5,) * channels, (0.25,) * channels
        network = TrainedNetwork(config, names, shape, mean, std, state.variables)
        answers[name] = make_logits(network)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for image in images:
        for name, logits in answers.items():
            started = time.perf_counter()
            softmax(logits(image[None]))
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: found[5:] for name, found in times.items()}


def measure_latency(study: Study) -> Measured:
    """Time the way from one image in memory to its probabilities, 300 times, for three networks.

    With this project's ``inference`` on this machine's CPU, the networks in turn, after compiling
    and five answers to warm up; with initial weights. The claim fails if the tutorial's network
    takes longer than 50 ms in the median. A caveat if it does at the 95th percentile, because
    people notice the slow answers. Cost: half a minute.
    """
    networks = ["cnn"] if study.quick else ["cnn", "cnn-wide", "resnet9"]
    rounds = study.scaled(300, 20)
    shape = list(study.dataset.image_shape)
    times = _apart(_time_inference, networks=networks, image_shape=shape, rounds=rounds)
    return Measured(
        {
            "median_ms": {name: float(np.median(found)) for name, found in times.items()},
            "p95_ms": {name: float(np.percentile(found, 95)) for name, found in times.items()},
        },
        n=rounds,
    )


def judge_latency(values: Values) -> Verdict:
    median, p95 = values["median_ms"], values["p95_ms"]
    evidence = table(
        ("one image", "median", "95 % take at most"),
        [(f"`{name}`", f"{median[name]:.2f} ms", f"{p95[name]:.2f} ms") for name in median],
    )
    if median["cnn"] > 50:
        return Verdict(FAILS, f"One image takes {median['cnn']:.0f} ms.", evidence)
    if p95["cnn"] > 50:
        return Verdict(CAVEAT, "The slowest answers take more than 50 ms.", evidence)
    return Verdict(
        HOLDS,
        f"One image takes the tutorial's network {median['cnn']:.1f} ms, far less than 50.",
        evidence,
    )


# ------------------------------------------------------------------- 30: parallel input workers


def _torch_images_a_second(folder: str, counts: list[int], epochs: int) -> dict[str, float]:
    """Of a DataLoader by ``num_workers``, the best epoch after the first, its workers running."""
    import time
    from pathlib import Path

    import numpy as np
    import torch
    from PIL import Image

    class Folder(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.paths = sorted(Path(folder).glob("*/*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(self.paths[index]) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255

    found = {}
    for workers in counts:
        loader = torch.utils.data.DataLoader(
            Folder(), batch_size=64, num_workers=workers, persistent_workers=workers > 0
        )
        rates = []
        for _ in range(epochs):
            started = time.perf_counter()
            images = sum(len(batch) for batch in loader)
            rates.append(images / (time.perf_counter() - started))
        found[str(workers)] = max(rates[1:])
        del loader
    return found


def _tf_images_a_second(folder: str, counts: list[int], epochs: int) -> dict[str, float]:
    """Of tf.data by ``num_parallel_calls``, the best epoch after the first."""
    import time
    from pathlib import Path

    from cifar_jax.data import input_pipeline  # noqa: F401 - TensorFlow with this project's settings

    import tensorflow as tf  # isort: skip

    paths = sorted(map(str, Path(folder).glob("*/*.jpg")))

    def read(path: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method="INTEGER_ACCURATE")
        return tf.cast(image, tf.float32) / 255

    found = {}
    for calls in counts:
        batches = tf.data.Dataset.from_tensor_slices(paths).map(read, num_parallel_calls=calls)
        rates = []
        for _ in range(epochs):
            started = time.perf_counter()
            images = sum(len(batch) for batch in batches.batch(64).prefetch(2).as_numpy_iterator())
            rates.append(images / (time.perf_counter() - started))
        found[str(calls)] = max(rates[1:])
    return found


def _reading_and_decoding(folder: str) -> dict[str, float]:
    """Milliseconds a file: to read it from the disk, to read it from the cache, to decode it."""
    import io
    import os
    import time
    from pathlib import Path

    import numpy as np
    from PIL import Image

    paths = sorted(Path(folder).glob("*/*.jpg"))
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    found = {}
    for name in ("read_cold", "read_cached"):
        started = time.perf_counter()
        contents = [path.read_bytes() for path in paths]
        found[name] = 1000 * (time.perf_counter() - started) / len(paths)
    started = time.perf_counter()
    for content in contents:
        np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    found["decode"] = 1000 * (time.perf_counter() - started) / len(paths)
    return found


def measure_workers(study: Study) -> Measured:
    """Read a folder of JPEGs of 128x128 pixels with 1, 2, 4 and 8 workers; images per second.

    With PyTorch's DataLoader (also without workers, 0) and with parallel calls of tf.data, which
    this project uses, each in a process of its own that only reads and decodes. Also, how long a
    file takes to read (from the disk, and from the cache) and to decode. The claim fails if neither
    2 nor 4 workers come within 10 % of the fastest, or if 0 or 1 do as well. A caveat if 8 are no
    worse, or if decoding takes longer than reading, so that the disk is not the bottleneck. Cost: 1
    minute 30.
    """
    with _image_folder(study, study.scaled(4000, 128), 128) as root:
        arguments = {"folder": str(root), "epochs": study.scaled(4, 2)}
        torch_rates = _apart(_torch_images_a_second, counts=[0, 1, 2, 4, 8], **arguments)
        tf_rates = _apart(_tf_images_a_second, counts=[1, 2, 4, 8], **arguments)
        parts = _apart(_reading_and_decoding, folder=str(root))
    values = {
        "cores": len(os.sched_getaffinity(0)),
        "dataloader_images_a_second": torch_rates,
        "tf_data_images_a_second": tf_rates,
        "read_from_disk_ms": parts["read_cold"],
        "read_from_cache_ms": parts["read_cached"],
        "decode_ms": parts["decode"],
    }
    return Measured(values, n=study.scaled(3, 1), figure=_workers_figure(study, values))


def _workers_figure(study: Study, values: Values) -> str:
    figure = Figure((5, 3.2), layout="constrained")
    axes = figure.subplots()
    series = {
        "PyTorch DataLoader, num_workers": values["dataloader_images_a_second"],
        "tf.data, num_parallel_calls": values["tf_data_images_a_second"],
    }
    for label, rates in series.items():
        counts = [count for count in rates if count != "0"]
        axes.plot([int(c) for c in counts], [rates[c] for c in counts], "o-", label=label)
    axes.axhline(
        values["dataloader_images_a_second"]["0"],
        color="grey",
        linestyle=":",
        label="DataLoader, no workers",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=f"workers ({values['cores']} cores)", ylabel="128x128 JPEGs decoded (1/s)")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return study.save_figure(figure, "q30_workers.png")


def judge_workers(values: Values) -> Verdict:
    rates, ours = values["dataloader_images_a_second"], values["tf_data_images_a_second"]
    best = max(rates.values())
    cold, decode = values["read_from_disk_ms"], values["decode_ms"]
    evidence = table(
        (f"images per second on {values['cores']} cores, by workers", *rates),
        [
            ("PyTorch's DataLoader", *(f"{rate:,.0f}" for rate in rates.values())),
            ("tf.data", *(f"{ours[w]:,.0f}" if w in ours else "" for w in rates)),
        ],
    )
    evidence += "\n\n" + bullets(
        f"one file: reading it takes {cold:.2f} ms from the disk and "
        f"{values['read_from_cache_ms']:.2f} ms from the cache; decoding it takes {decode:.2f} ms",
        "each rate is the best epoch's",
    )
    # Rounds on a shared machine differ by up to a tenth.
    if max(rates["2"], rates["4"]) < 0.9 * best:
        return Verdict(FAILS, "2 to 4 workers are not the best.", evidence)
    if max(rates["0"], rates["1"]) > 0.9 * best:
        return Verdict(FAILS, "2 to 4 workers gain nothing.", evidence)
    caveats = []
    if rates["8"] > 0.9 * best:
        caveats.append("8 are no worse.")
    if decode > cold:
        caveats.append(
            f"The disk is not the bottleneck: decoding a file takes {decode / cold:.1f} times as "
            "long as reading it."
        )
    finding = "2 to 4 workers are best"
    if caveats:
        return Verdict(CAVEAT, f"{finding}, but {' '.join(caveats)}", evidence)
    return Verdict(HOLDS, f"{finding}, and the disk is the bottleneck.", evidence)


# ------------------------------------------------------------------------- 34: dataset.classes

_CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
_CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]  # in label order


def measure_class_names(study: Study) -> Measured:
    """Make folders in a mixed order, and read class names and labels from them.

    CIFAR-10's names, and names whose order by characters is not that of people: with capitals, and
    with numbers. The claim fails if CIFAR-10's labels do not come in the known order. The rule of
    ImageFolder, sorted(os.scandir), is written out beside this project's reader. Cost: a second.
    """
    from cifar_jax.data.sources import load_splits

    rng = np.random.default_rng(0)
    pixels = study.dataset.train.pixels
    tests = {
        "cifar10": _CIFAR10_CLASSES,
        "with_capitals": ["apple", "Zebra", "bird"],
        "with_numbers": ["2", "10", "1"],
    }
    found = {}
    for test, names in tests.items():
        with tempfile.TemporaryDirectory() as folder:
            for name in rng.permutation(names):
                Path(folder, name).mkdir()
                for i in range(3):
                    image = Image.fromarray(np.repeat(pixels[i][..., :1], 3, axis=-1))
                    image.save(Path(folder, name, f"{i}.png"))
            ours = list(load_splits(folder).class_names)
            theirs = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        found[test] = {"names": ours, "as_image_folder": ours == theirs}
    return Measured(found, n=1)


def judge_class_names(values: Values) -> Verdict:
    cifar = values["cifar10"]
    evidence = table(
        ("folders", "in the order of their labels"),
        [(name.replace("_", " "), ", ".join(found["names"])) for name, found in values.items()],
    )
    if cifar["names"] != _CIFAR10_CLASSES or not all(v["as_image_folder"] for v in values.values()):
        return Verdict(FAILS, "CIFAR-10's folders do not get their known labels.", evidence)
    finding = "CIFAR-10's ten folders get the labels 0 to 9 in the known order."
    capitals, numbers = values["with_capitals"]["names"], values["with_numbers"]["names"]
    if capitals != sorted(capitals, key=str.casefold) or numbers != sorted(numbers, key=int):
        return Verdict(
            CAVEAT,
            f"{finding} But the order is that of code points, not of the alphabet: capitals come "
            "first, and 10 comes before 2.",
            evidence,
        )
    return Verdict(HOLDS, finding, evidence)


# --------------------------------------------------------------------- 32: what 32 pixels carry

# Shared by questions 32 and 47. At a constant rate, an epoch does not depend on how many follow.
_SHORT_RUN = TrainConfig(epochs=6, learning_rate=1e-3, schedule="constant")
_SHORT_RUN_IMAGES = 10_000


def _short_run(study: Study) -> TrainConfig:
    if study.quick:
        return dataclasses.replace(_SHORT_RUN, epochs=1, widths=(4,), hidden=(16,))
    return _SHORT_RUN


def shrunk(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Images ``[N, H, W, C]`` averaged down to ``side`` pixels, and repeated up to their size."""
    n, height, width, channels = images.shape
    blocks = images.reshape(n, side, height // side, side, width // side, channels)
    means = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return means.repeat(height // side, axis=1).repeat(width // side, axis=2)


def grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images ``[N, H, W, C]`` with their luminance (ITU-R BT.601) in every channel."""
    if images.shape[-1] != 3:
        return images
    luminance = np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return luminance[..., None].repeat(3, axis=-1)


_VIEWS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "32 pixels": lambda images: images,
    "32 pixels, grey": grey,
    "16 pixels": lambda images: shrunk(images, 16),
    "8 pixels": lambda images: shrunk(images, 8),
    "8 pixels, grey": lambda images: grey(shrunk(images, 8)),
    "1 pixel": lambda images: shrunk(images, 1),
}


def _seen(dataset: Dataset, name: str, n_train: int) -> Dataset:
    """``dataset`` with other pixels in training and validation."""
    from claims.study import first_of_each_class

    if name == "32 pixels":
        return dataset
    view = _VIEWS[name]
    train = first_of_each_class(dataset.train, n_train)
    train, val = (Split(view(split.pixels), split.labels) for split in (train, dataset.val))
    mean, std = channel_statistics(train.pixels)
    digest = f"{dataset.digest} at {name}"
    return dataclasses.replace(dataset, train=train, val=val, mean=mean, std=std, digest=digest)


def measure_resolution(study: Study) -> Measured:
    """Train the tutorial's network on images without detail or colour.

    10,000 training images for 6 epochs, as they are and averaged to 16, 8 and 1 pixels a side (one
    pixel is the mean colour), in colour and in grey; each network is scored on validation images
    treated alike. What a view keeps is its accuracy above chance, relative to that of the images as
    they are. Also, how the network trained on the images as they are does on each view. "Blobs" are
    refuted if 8 pixels keep less than half; "dominant colours", if grey keeps more than half and
    the mean colour less. What people can see is not measured. Cost: 18 runs, 9 minutes, of which 3
    runs are shared with question 47.
    """
    n_train, config = study.scaled(_SHORT_RUN_IMAGES, 500), _short_run(study)
    val = study.dataset.val
    trained_so: dict[str, list[float]] = {name: [] for name in _VIEWS}
    trained_as_is: dict[str, list[float]] = {name: [] for name in _VIEWS}
    for seed in study.seeds:
        as_is = study.fit(config, seed=seed, n_train=n_train)
        for name, view in _VIEWS.items():
            seen = Split(view(val.pixels), val.labels)
            trained_as_is[name].append(100 * study.accuracy(as_is, seen))
            if study.quick:  # no time to train on each: the same numbers
                trained_so[name].append(trained_as_is[name][-1])
                continue
            dataset = _seen(study.dataset, name, n_train)
            run = study.fit(config, seed=seed, n_train=n_train, dataset=dataset)
            trained_so[name].append(100 * run.history[-1]["val_accuracy"])
    values = {
        "chance_percent": 100 / len(study.dataset.class_names),
        "accuracy": {name: spread(found) for name, found in trained_so.items()},
        "accuracy_trained_as_they_are": {n: spread(f) for n, f in trained_as_is.items()},
    }
    return Measured(values, n=len(study.seeds), figure=_views_figure(study, values))


def _views_figure(study: Study, values: Values) -> str:
    figure = Figure((7.5, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, len(_VIEWS), height_ratios=(1, 1.3))
    dataset = study.dataset
    example = dataset.val.pixels[np.flatnonzero(dataset.val.labels == 6)[:1]]
    for column, (name, view) in enumerate(_VIEWS.items()):
        axes = figure.add_subplot(grid[0, column])
        image = view(example)[0]
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="grey")
        axes.set_title(name.replace(", ", ",\n"), fontsize=9)
        axes.set_axis_off()
    axes = figure.add_subplot(grid[1, :])
    bars = {
        "trained on such images": values["accuracy"],
        "trained on images as they are": values["accuracy_trained_as_they_are"],
    }
    for shift, (label, spreads) in zip((-0.2, 0.2), bars.items(), strict=True):
        means = [spread["mean_percent"] for spread in spreads.values()]
        stds = [spread["std_percent"] for spread in spreads.values()]
        places = np.arange(len(means)) + shift
        axes.bar(places, means, width=0.4, yerr=stds, capsize=3, label=label)
    axes.set_xticks(range(len(_VIEWS)), list(_VIEWS))
    axes.axhline(values["chance_percent"], color="black", linestyle=":", label="chance")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("validation accuracy (%)")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    return study.save_figure(figure, "q32_resolution.png")


def judge_resolution(values: Values) -> Verdict:
    chance, accuracy = values["chance_percent"], values["accuracy"]
    base = accuracy["32 pixels"]["mean_percent"] - chance
    kept = {n: 100 * (a["mean_percent"] - chance) / max(base, 1.0) for n, a in accuracy.items()}
    evidence = table(
        (
            "images",
            "accuracy, trained on such images",
            "kept above chance",
            "accuracy, trained on the images as they are",
        ),
        [
            (
                name,
                percent(accuracy[name]),
                f"{kept[name]:.0f} %",
                percent(values["accuracy_trained_as_they_are"][name]),
            )
            for name in accuracy
        ],
    )
    told = (
        f"Of what accuracy there is above chance, 8x8 pixels keep {kept['8 pixels']:.0f} %, grey "
        f"images {kept['32 pixels, grey']:.0f} %, and the mean colour alone "
        f"{kept['1 pixel']:.0f} %:"
    )
    # "Relies on": half or more of what there is goes with it.
    blobs = kept["8 pixels"] >= 50
    colours = kept["32 pixels, grey"] <= 50 or kept["1 pixel"] >= 50
    if blobs and colours:
        return Verdict(HOLDS, f"{told} colours and blobs carry most of it.", evidence)
    if blobs:
        return Verdict(CAVEAT, f"{told} blobs carry most of it, colours do not.", evidence)
    if colours:
        return Verdict(CAVEAT, f"{told} colours carry most of it, blobs do not.", evidence)
    return Verdict(FAILS, f"{told} neither blobs nor colours carry half of it.", evidence)


# ----------------------------------------------------------------------------------- 47: an epoch


def measure_epoch(study: Study) -> Measured:
    """How far one step, one epoch and several move the weights, and how accurate that makes it.

    The tutorial's network on 10,000 images at a constant rate, in batches of 128; the movement is
    the distance from the initial weights relative to their norm. Also, which images an epoch of
    this project visits. The claim fails if a step moves the weights by 5 % or more, or if one epoch
    is as good as several. A caveat if an epoch does not visit all images. Cost: the runs of
    question 32, and short ones of 1 minute.
    """
    config, dataset = _short_run(study), study.dataset
    one = dataclasses.replace(config, epochs=1)
    n_train = study.scaled(_SHORT_RUN_IMAGES, 500)
    model = create_model(config, len(dataset.class_names), None)
    lengths = ("step", "epoch", "epochs")
    moved: dict[str, list[float]] = {name: [] for name in lengths}
    accuracy: dict[str, list[float]] = {name: [] for name in lengths}
    for seed in study.seeds:
        import optax

        state = create_train_state(model, optax.sgd(1.0), dataset.image_shape, seed)
        start = _flat(jax.device_get(state.params))
        runs = {
            "step": study.fit(one, seed=seed, n_train=config.batch_size),
            "epoch": study.fit(one, seed=seed, n_train=n_train),
            "epochs": study.fit(config, seed=seed, n_train=n_train),
        }
        for name, run in runs.items():
            distance = np.linalg.norm(_flat(run.variables["params"]) - start)
            moved[name].append(100 * float(distance / np.linalg.norm(start)))
            accuracy[name].append(100 * run.history[-1]["val_accuracy"])
    images = len(dataset.train)
    visited = epoch_order(images, 0, 0)[: images // config.batch_size * config.batch_size]
    return Measured(
        {
            "epochs": config.epochs,
            "steps_of_an_epoch": n_train // config.batch_size,
            "weights_moved": {name: spread(moved[name]) for name in lengths},
            "accuracy": {name: spread(accuracy[name]) for name in lengths},
            "images_of_training_and_validation": images + len(dataset.val),
            "different_images_in_a_full_epoch": len(np.unique(visited)),
            "repeated_images_in_a_full_epoch": len(visited) - len(np.unique(visited)),
        },
        n=len(study.seeds),
    )


def _flat(tree: Any) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def judge_epoch(values: Values) -> Verdict:
    moved, accuracy = values["weights_moved"], values["accuracy"]
    visited, there = (
        values["different_images_in_a_full_epoch"],
        values["images_of_training_and_validation"],
    )
    names = {
        "step": "one step",
        "epoch": f"an epoch of {values['steps_of_an_epoch']} steps",
        "epochs": f"{values['epochs']} epochs",
    }
    evidence = table(
        ("after", "weights moved, of their norm", "validation accuracy"),
        [(name, percent(moved[key]), percent(accuracy[key])) for key, name in names.items()],
    )
    evidence += "\n\n" + bullets(
        f"images that a full epoch visits: {visited:,} of {there:,}, of which "
        f"{values['repeated_images_in_a_full_epoch']:,} more than once"
    )
    # By 5 % a step, twenty would be as far as the weights are long: no nudge.
    if moved["step"]["mean_percent"] >= 5:
        return Verdict(FAILS, "One step moves the weights far.", evidence)
    gained = accuracy["epochs"]["mean_percent"] - accuracy["epoch"]["mean_percent"]
    if gained <= noise(accuracy["epochs"], accuracy["epoch"]):
        return Verdict(FAILS, "One epoch is enough.", evidence)
    if values["repeated_images_in_a_full_epoch"]:
        return Verdict(FAILS, "An epoch visits images twice.", evidence)
    finding = (
        f"One step moves the weights by {moved['step']['mean_percent']:.1f} % of their norm, and "
        f"accuracy rises from {accuracy['epoch']['mean_percent']:.0f} % after one epoch to "
        f"{accuracy['epochs']['mean_percent']:.0f} % after {values['epochs']}."
    )
    if visited < there:
        return Verdict(
            CAVEAT,
            f"{finding} But an epoch is not all {there:,} images: without those held out for "
            f"validation, and in full batches, it is {visited:,}, each once.",
            evidence,
        )
    return Verdict(HOLDS, finding, evidence)


# ------------------------------------------------------------------------------ 56: top-5 accuracy


def measure_top_5(study: Study) -> Measured:
    """How often the true class is among the k most probable, for k of 1 to 9.

    By the default run of the tutorial's network (all training images, 10 epochs), on validation
    images. The claim fails if top-5 accuracy leaves more than a tenth of the mistakes of top-1.
    Cost: 10 minutes, shared with other questions.
    """
    config, dataset = TrainConfig(epochs=study.scaled(10, 1)), study.dataset
    ks = range(1, len(dataset.class_names))
    found: dict[int, list[float]] = {k: [] for k in ks}
    for seed in study.seeds:
        fitted = study.fit(config, seed=seed)
        network = TrainedNetwork(
            config,
            dataset.class_names,
            dataset.image_shape,
            dataset.mean,
            dataset.std,
            fitted.variables,
        )
        logits = make_logits(network)(dataset.val.pixels)
        true = np.take_along_axis(logits, dataset.val.labels[:, None].astype(int), axis=1)
        rank = (logits > true).sum(axis=1)
        for k in ks:
            found[k].append(100 * float(np.mean(rank < k)))
    values = {
        "top_k": {str(k): spread(percents) for k, percents in found.items()},
        "chance_top_5_percent": 500 / len(dataset.class_names),
    }
    return Measured(values, n=len(study.seeds), figure=_top_k_figure(study, values))


def _top_k_figure(study: Study, values: Values) -> str:
    figure = Figure((5, 3.2), layout="constrained")
    axes = figure.subplots()
    ks = [int(k) for k in values["top_k"]]
    spreads = values["top_k"].values()
    means, stds = [s["mean_percent"] for s in spreads], [s["std_percent"] for s in spreads]
    axes.errorbar(ks, means, stds, fmt="o-", capsize=4, label="trained network, mean and std")
    axes.plot(ks, [values["chance_top_5_percent"] * k / 5 for k in ks], ":k", label="chance")
    axes.set(xlabel="k", ylabel="true class among the k first (%)", ylim=(0, 103))
    axes.legend()
    return study.save_figure(figure, "q56_top_k.png")


def judge_top_5(values: Values) -> Verdict:
    top_k = values["top_k"]
    first, fifth = top_k["1"]["mean_percent"], top_k["5"]["mean_percent"]
    evidence = table(
        ("k", *top_k),
        [("true class among the k most probable", *map(percent, top_k.values()))],
    )
    room = (100 - fifth) / (100 - first)
    finding = (
        f"Top-5 accuracy is {fifth:.1f} %, of which chance gives "
        f"{values['chance_top_5_percent']:.0f} %; {100 * room:.0f} % of the mistakes are left by "
        "which it could tell networks apart."
    )
    # Where a tenth of the mistakes is left, so is a tenth of what could tell networks apart.
    return Verdict(HOLDS if room <= 0.1 else FAILS, finding, evidence)


CLAIMS = [
    Claim(
        question=9,
        says="ImageFolder walks the class folders, maps their names to labels and reads an image "
        "when it is asked for; real data is too large for one tensor in memory.",
        measure=measure_image_folder,
        judge=judge_image_folder,
        refuted_by={
            "images": 100,
            "images_found": 100,
            "labels_of_their_folder": 100,
            "lazy_growth_mb": {"half": 50.0, "all": 100.0},
            "eager_uint8_growth_mb": {"half": 12.0, "all": 25.0},
            "eager_float32_growth_mb": {"half": 50.0, "all": 100.0},
            "cifar10_as_float32_mb": 600.0,
            "imagenet_224_pixels_as_float32_mb": 700_000.0,
            "machine_memory_mb": 500.0,
        },
    ),
    Claim(
        question=14,
        says="Training runs out of memory by large batches and images, by many filters, and by the "
        "first Dense layer, which often has 80 % of the parameters.",
        measure=measure_out_of_memory,
        judge=judge_out_of_memory,
        refuted_by={
            "step_by_batch_mb": {"128": 50.0, "2048": 50.0},
            "step_by_side_pixels_mb": {"32": 50.0, "512": 50.0},
            "activations_by_side_pixels_mb": {"32": 50.0, "512": 50.0},
            "filters_of_last_convolution": [64, 1024],
            "step_with_wide_filters_mb": 50.0,
            "step_without_hidden_dense_mb": 40.0,
            "first_dense_share_percent": {
                "cnn": {"32": 20.0, "64": 20.0},
                "cnn-wide": {"32": 20.0, "64": 20.0},
                "cnn-gap": {"32": 1.0, "64": 1.0},
            },
        },
    ),
    Claim(
        question=15,
        says="Thousands of small files are slow to move; one .tar.gz of them is not, so download "
        "the archive and extract it locally.",
        measure=measure_archive,
        judge=judge_archive,
        refuted_by={
            "files": 1000,
            "files_mb": 10.0,
            "files_on_disk_mb": 10.0,
            "archive_mb": 10.0,
            "copy_files_seconds": 0.1,
            "copy_archive_seconds": 0.1,
            "read_files_seconds": 0.1,
            "read_archive_seconds": 0.1,
            "extract_seconds": 0.1,
        },
    ),
    Claim(
        question=16,
        says="extractall makes the folders of an archive; a check whether they exist saves doing "
        "it again.",
        measure=measure_extraction,
        judge=judge_extraction,
        refuted_by={
            "files": 1000,
            "files_extracted": 1000,
            "class_folders": 10,
            "extractall_seconds": 1.0,
            "first_call_seconds": 1.0,
            "second_call_seconds": 1.0,
            "interrupted_passes_exists_check": False,
            "interrupted_files": 0,
            "interrupted_files_of_extract_once": 0,
        },
    ),
    Claim(
        question=24,
        says="Without a GPU, an epoch on CIFAR-10 takes hours, and CNNs are practically unusable.",
        measure=measure_cpu_training,
        judge=judge_cpu_training,
        refuted_by={
            "cores": 2,
            "epoch_seconds": {"cnn": 7200.0, "cnn-wide": 72_000.0},
            "ten_epochs_of_cnn_minutes": 1200.0,
        },
    ),
    Claim(
        question=30,
        says="num_workers reads data in parallel, as the disk is the bottleneck; 2 to 4 are best, "
        "more overwhelm the CPU.",
        measure=measure_workers,
        judge=judge_workers,
        refuted_by={
            "cores": 2,
            "dataloader_images_a_second": {"0": 9.0, "1": 10.0, "2": 20.0, "4": 40.0, "8": 80.0},
            "tf_data_images_a_second": {"1": 10.0, "2": 20.0, "4": 40.0, "8": 80.0},
            "read_from_disk_ms": 1.0,
            "read_from_cache_ms": 0.1,
            "decode_ms": 0.1,
        },
    ),
    Claim(
        question=32,
        says="At 32x32 pixels fine detail is lost, and the network relies on dominant colours and "
        "blobs.",
        measure=measure_resolution,
        judge=judge_resolution,
        refuted_by={
            "chance_percent": 10.0,
            "accuracy": {
                "32 pixels": spread_at(60.0),
                "32 pixels, grey": spread_at(60.0),
                "16 pixels": spread_at(30.0),
                "8 pixels": spread_at(15.0),
                "8 pixels, grey": spread_at(15.0),
                "1 pixel": spread_at(10.0),
            },
            "accuracy_trained_as_they_are": {
                "32 pixels": spread_at(60.0),
                "32 pixels, grey": spread_at(60.0),
                "16 pixels": spread_at(30.0),
                "8 pixels": spread_at(15.0),
                "8 pixels, grey": spread_at(15.0),
                "1 pixel": spread_at(10.0),
            },
        },
    ),
    Claim(
        question=34,
        says="dataset.classes are the folders' names in alphabetical order; the first is class 0.",
        measure=measure_class_names,
        judge=judge_class_names,
        refuted_by={
            "cifar10": {"names": _CIFAR10_CLASSES[::-1], "as_image_folder": False},
            "with_capitals": {"names": ["apple", "bird", "Zebra"], "as_image_folder": False},
            "with_numbers": {"names": ["1", "2", "10"], "as_image_folder": False},
        },
    ),
    Claim(
        question=46,
        says="On a CPU, inference for one image is fast enough for web applications, about 50 ms.",
        measure=measure_latency,
        judge=judge_latency,
        refuted_by={"median_ms": {"cnn": 200.0}, "p95_ms": {"cnn": 300.0}},
    ),
    Claim(
        question=47,
        says="An epoch is one pass through all 50,000 images; it takes several, as one step moves "
        "the weights only slightly.",
        measure=measure_epoch,
        judge=judge_epoch,
        refuted_by={
            "epochs": 8,
            "steps_of_an_epoch": 78,
            "weights_moved": {
                "step": spread_at(40.0),
                "epoch": spread_at(45.0),
                "epochs": spread_at(45.0),
            },
            "accuracy": {
                "step": spread_at(60.0),
                "epoch": spread_at(60.0),
                "epochs": spread_at(60.0),
            },
            "images_of_training_and_validation": 50_000,
            "different_images_in_a_full_epoch": 50_000,
            "repeated_images_in_a_full_epoch": 0,
        },
    ),
    Claim(
        question=56,
        says="Top-5 accuracy is not reported for ten classes: it says little.",
        measure=measure_top_5,
        judge=judge_top_5,
        refuted_by={
            "top_k": {"1": spread_at(75.0), "2": spread_at(80.0), "5": spread_at(85.0)},
            "chance_top_5_percent": 50.0,
        },
    ),
]
