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

from cifar_jax.archive import extract_once
from cifar_jax.config import TrainConfig
from cifar_jax.dataset import Dataset, ImageFiles, Split, channel_statistics, epoch_order
from cifar_jax.errors import CifarJaxError
from cifar_jax.inference import make_logits
from cifar_jax.layer_table import layer_table
from cifar_jax.models import ConvNet, create_model
from cifar_jax.step_memory import step_memory
from cifar_jax.train_step import create_train_state
from cifar_jax.trained import TrainedNetwork
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
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

    By how much the peak memory of a process grows beyond that for a batch, for half of the images
    and for all: as they come, as an array of uint8, and of float32 as in a TensorDataset. That
    folders are walked and mapped is checked on this project's reader of the same layout. Refuted if
    lazy loading grows with the number of images, or a label is not that of its folder; that data is
    too large for memory is refuted, for CIFAR-10, if it is smaller than this machine's. 1 minute.
    """
    from cifar_jax.sources import load_splits

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
    found = (
        f"reading {values['images']} JPEGs as they come adds {lazy['all']:.0f} MB to the peak, one "
        f"array of uint8 {values['eager_uint8_growth_mb']['all']:.0f} MB, of float32 "
        f"{eager['all']:.0f} MB ({eager['half']:.0f} MB for half of them)"
    )
    if not values["images"] == values["images_found"] == values["labels_of_their_folder"]:
        return Verdict(FAILS, f"of {values['images']} files {values['labels_of_their_folder']} fit")
    # Lazy loading that took a fifth of the array's memory would still be growing with the data.
    if lazy["all"] > eager["all"] / 5:
        return Verdict(FAILS, f"lazy loading saves little: {found}")
    cifar, machine = values["cifar10_as_float32_mb"], values["machine_memory_mb"]
    if cifar < machine / 4:
        return Verdict(
            CAVEAT,
            f"{found}; but CIFAR-10 is not too large for memory: 50,000 images are {cifar:,.0f} MB "
            f"of this machine's {machine:,.0f} MB as float32 (ImageNet's at 224x224 would be "
            f"{values['imagenet_224_pixels_as_float32_mb']:,.0f} MB)",
        )
    return Verdict(HOLDS, found)


# ------------------------------------------------------------------------- 14: out of memory


def measure_out_of_memory(study: Study) -> Measured:
    """What XLA will allocate for a training step of the tutorial's network, by batch and by size.

    Beside it the memory of the activations by counting, the step with 16 times the filters in each
    convolution (1024 in the last), the step without the hidden Dense layers, and which share of the
    parameters the first of them has by image size, from shapes alone; for the tutorial's network,
    cnn-wide, and cnn-gap, which does not flatten. Nothing is run. Refuted if memory does not grow
    with batch, resolution or filters, if at 32 pixels the first Dense layer has less than half of
    the parameters, or if without the hidden ones a step takes over nine tenths of the memory;
    qualified if the share is not 80 % to within 10. A minute of compiling.
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
    by_batch = list(values["step_by_batch_mb"].values())
    by_side = list(values["step_by_side_pixels_mb"].values())
    wide = values["step_with_wide_filters_mb"]
    dense = values["first_dense_share_percent"]["cnn"]["32"]
    batches = [int(b) for b in values["step_by_batch_mb"]]
    before, after = values["filters_of_last_convolution"]
    by_dense = 100 * (1 - values["step_without_hidden_dense_mb"] / by_side[0])
    found = (
        f"a step takes {by_batch[0]:.0f} MB for {batches[0]} images of 32 pixels, "
        f"{by_batch[-1]:.0f} MB for {batches[-1]}, {by_side[-1]:,.0f} MB for 128 of 512 pixels, "
        f"{wide:,.0f} MB with {after / before:.0f} times the filters in each convolution; of the "
        f"first the hidden Dense layers take {by_dense:.0f} %"
    )
    growing = by_batch[-1] > 2 * by_batch[0] and by_side[-1] > 50 * by_side[0]
    if not growing or wide < 2 * by_batch[0] or dense < 50 or by_dense < 10:
        return Verdict(FAILS, f"one of the four is no cause: {found}")
    shares = values["first_dense_share_percent"]
    share = (
        f"the first Dense layer has {dense:.0f} % of the parameters of cnn, "
        f"{shares['cnn-wide']['32']:.0f} % of cnn-wide (at 64 pixels "
        f"{shares['cnn']['64']:.0f} and {shares['cnn-wide']['64']:.0f} %), and "
        f"{shares['cnn-gap']['32']:.0f} % of cnn-gap, which does not flatten"
    )
    if abs(dense - 80) <= 10:  # "often consumes 80 %" is no exact number
        return Verdict(HOLDS, f"{found}; {share}")
    return Verdict(CAVEAT, f"{found}; but {share}, which is not 80 %")


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

    On a local disk through the cache: a network adds a round trip for each file, so this is the
    least that an archive saves. Refuted if files are copied as fast as the archive. Shares its
    minute with question 16.
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
    found = (
        f"copying {values['files']:,} files takes {files:.2f} s, their archive {archive:.3f} s "
        f"({files / archive:.0f} times; each time is the least of its rounds), and "
        f"{values['files_mb']:.0f} MB of images, which take "
        f"{values['files_on_disk_mb']:.0f} MB of disk, are {values['archive_mb']:.0f} MB in it"
    )
    # Copying the same bytes twice can differ by some tens of per cent; by a factor of 2 it is not
    # the bytes.
    if files < 2 * archive:
        return Verdict(FAILS, f"files are not slower: {found}")
    if archive + extract > files:
        return Verdict(
            CAVEAT,
            f"{found}; but extracting takes {extract:.2f} s, so on one disk nothing is gained: "
            "an archive saves the way there. Read without extracting, it takes "
            f"{values['read_archive_seconds']:.2f} s, and the files "
            f"{values['read_files_seconds']:.2f} s",
        )
    return Verdict(HOLDS, f"{found}; extracting takes {extract:.2f} s")


def measure_extraction(study: Study) -> Measured:
    """Extract an archive of class folders twice with ``extract_once``; and stop half-way.

    Beside it the tutorial's check, ``if not os.path.exists(path)``: after an ``extractall`` that an
    archive cut in half ends early, does the folder exist, and what is in it? Refuted if files are
    missing after the first call or the second call takes as long. Shares its cost with question 15.
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
    if values["files_extracted"] != values["files"] or values["class_folders"] < 2:
        return Verdict(FAILS, f"{values['files_extracted']} of {values['files']} files came out")
    found = (
        f"{values['files']:,} files in {values['class_folders']} folders take {first:.2f} s the "
        f"first time and {second:.3f} s the second, in which extract_once hashes the archive (each "
        "the least of its rounds)"
    )
    if second > first / 2:
        return Verdict(FAILS, f"the second time is no faster: {found}")
    if values["interrupted_passes_exists_check"] and values["interrupted_files"] < values["files"]:
        return Verdict(
            CAVEAT,
            f"{found}; but os.path.exists is also true of an extraction that stopped half-way, "
            f"with {values['interrupted_files']:,} files; extract_once, which renames a finished "
            f"folder, leaves {values['interrupted_files_of_extract_once']}",
        )
    return Verdict(HOLDS, found)


# -------------------------------------------------------------- 24, 46: training, answers on CPU


def _time_training(
    networks: list[dict[str, Any]], image_shape: list[int]
) -> dict[str, dict[str, float]]:
    """Seconds of training for an image, and steps timed, of each network; compiling not counted."""
    import functools
    import time

    import jax
    import numpy as np

    from cifar_jax.allocator import keep_freed_memory
    from cifar_jax.augment import make_augmentation
    from cifar_jax.config import TrainConfig
    from cifar_jax.models import create_model
    from cifar_jax.optim import make_optimizer, make_schedule
    from cifar_jax.parallel import compile_lowered
    from cifar_jax.train_step import create_train_state, train_step

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

    Of the tutorial's network a whole epoch (391 steps of 128), of cnn-wide and resnet9 12 steps of
    128; random images with the default augmentation, as pixels do not change the time. Refuted if
    an epoch of the tutorial's network takes less than an hour. "Seconds on a GPU" is not measured
    here. 1 minute 30.
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
    seconds = values["epoch_seconds"]
    found = (
        f"on {values['cores']} cores an epoch takes "
        + ", ".join(f"{s:,.0f} s ({s / 3600:.3f} h) with {name}" for name, s in seconds.items())
        + f"; ten epochs of cnn {values['ten_epochs_of_cnn_minutes']:.1f} minutes"
    )
    if seconds["cnn"] >= 3600:
        return Verdict(HOLDS, found)
    if max(seconds.values()) >= 3600:
        return Verdict(CAVEAT, f"not of the tutorial's network: {found}")
    return Verdict(FAILS, f"{found}: none takes hours")


def _time_inference(
    networks: list[str], image_shape: list[int], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each answer to one image, of each network in turn; compiling not counted."""
    import time

    import numpy as np
    import optax

    from cifar_jax.config import TrainConfig
    from cifar_jax.inference import make_logits, softmax
    from cifar_jax.models import create_model
    from cifar_jax.train_step import create_train_state
    from cifar_jax.trained import TrainedNetwork

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
    """The time from one image in memory to its probabilities, 300 times, for three networks.

    With this project's ``inference`` on this machine's CPU, networks in turn, after compiling and
    five answers to warm up; weights as initialized. Refuted if the tutorial's network takes longer
    than 50 ms in the median; qualified, as people notice the slow answers, if at the 95th
    percentile. Half a minute.
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
    found = "one image takes " + ", ".join(
        f"{median[name]:.2f} ms (95 % within {p95[name]:.2f}) with {name}" for name in median
    )
    if median["cnn"] > 50:
        return Verdict(FAILS, f"{found}: more than 50 ms")
    if p95["cnn"] > 50:
        return Verdict(CAVEAT, f"{found}: the slowest answers take more than 50 ms")
    return Verdict(HOLDS, f"{found}; 50 ms are {50 / median['cnn']:.0f} times as much as cnn takes")


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

    from cifar_jax import input_pipeline  # noqa: F401 - TensorFlow with this project's settings

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
    """Images a second from a folder of JPEGs of 128x128 pixels, with 1, 2, 4 and 8 workers.

    Of PyTorch's DataLoader (and without workers, 0) and of tf.data's parallel calls, which this
    project uses; each in its own process, nothing else but reading and decoding. Beside it, how
    long a file takes to read (from the disk, and from the cache) and to decode. Refuted if neither
    2 nor 4 workers come within 10 % of the fastest, or if 1 does as well; that the disk is the
    bottleneck is refuted if decoding takes longer than reading. 1 minute 30.
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
    rates = values["dataloader_images_a_second"]
    best = max(rates.values())
    found = (
        f"the DataLoader gives {rates['0']:,.0f} images a second without workers and "
        + ", ".join(f"{rates[c]:,.0f} with {c}" for c in ("1", "2", "4", "8"))
        + f" on {values['cores']} cores (tf.data "
        + ", ".join(f"{r:,.0f}" for r in values["tf_data_images_a_second"].values())
        + ")"
    )
    # Rounds on a shared machine differ by up to a tenth.
    if max(rates["2"], rates["4"]) < 0.9 * best:
        return Verdict(FAILS, f"2 to 4 are not the best: {found}")
    if max(rates["0"], rates["1"]) > 0.9 * best:
        return Verdict(FAILS, f"2 to 4 workers gain nothing: {found}")
    cold, decode = values["read_from_disk_ms"], values["decode_ms"]
    caveats = []
    if rates["8"] > 0.9 * best:
        caveats.append("8 workers are no worse for the DataLoader")
    if decode > cold:
        caveats.append("the disk is not the bottleneck")
    found = (
        f"{found}; reading a file takes {cold:.2f} ms from the disk "
        f"({values['read_from_cache_ms']:.2f} from the cache), decoding {decode:.2f} ms; each rate "
        "is the best epoch's"
    )
    return (
        Verdict(CAVEAT, f"{' and '.join(caveats)}: {found}") if caveats else Verdict(HOLDS, found)
    )


# ------------------------------------------------------------------------- 34: dataset.classes

_CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
_CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]  # in label order


def measure_class_names(study: Study) -> Measured:
    """Make folders in a mixed order, and read class names and labels from them.

    CIFAR-10's names, and names that tell the order of characters from that of people: with
    capitals, and with numbers. Refuted if CIFAR-10's labels do not come out in the known order. The
    rule of ImageFolder (sorted(os.scandir)) is written out beside this project's reader. A second.
    """
    from cifar_jax.sources import load_splits

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
    if cifar["names"] != _CIFAR10_CLASSES or not all(v["as_image_folder"] for v in values.values()):
        return Verdict(FAILS, f"the names come as {', '.join(cifar['names'])}")
    found = "CIFAR-10's ten folders get 0 to 9 in the known order, airplane to truck"
    capitals, numbers = values["with_capitals"]["names"], values["with_numbers"]["names"]
    if capitals != sorted(capitals, key=str.casefold) or numbers != sorted(numbers, key=int):
        return Verdict(
            CAVEAT,
            f"{found}; but the order is by code points, not the alphabet: {', '.join(capitals)}; "
            f"and {', '.join(numbers)}",
        )
    return Verdict(HOLDS, found)


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
    """Train the tutorial's network on images with detail or colour taken away.

    10,000 training images for 6 epochs, as they are and averaged to 16, 8 and 1 pixels a side (one
    pixel is the mean colour), in colour and in grey; each scored on validation images that are
    treated alike. What a view keeps is its accuracy above chance relative to that of the images as
    they are. "Blobs" are refuted if 8 pixels keep less than half; "dominant colours" if grey
    keeps nearly all, or the mean colour nearly nothing. Beside it, what the network trained on the
    images as they are makes of each view. What people can see is not measured. 18 runs, 9 minutes,
    of which 3 runs are shared with question 47.
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
    untrained = values["accuracy_trained_as_they_are"]
    base = accuracy["32 pixels"]["mean_percent"] - chance
    kept = {n: 100 * (a["mean_percent"] - chance) / max(base, 1.0) for n, a in accuracy.items()}
    found = (
        f"of the {percent(accuracy['32 pixels'])} on the images as they are, above chance, 8x8 "
        f"pixels keep {kept['8 pixels']:.0f} % ({percent(accuracy['8 pixels'])}), 16x16 "
        f"{kept['16 pixels']:.0f} %, grey {kept['32 pixels, grey']:.0f} %, and the mean colour "
        f"alone {kept['1 pixel']:.0f} % (each trained on such images; the network of the images as "
        f"they are gets {percent(untrained['8 pixels'])} at 8x8 and "
        f"{percent(untrained['32 pixels, grey'])} in grey)"
    )
    # "Relies on": half or more of what there is goes with it.
    blobs = kept["8 pixels"] >= 50
    colours = kept["32 pixels, grey"] <= 50 or kept["1 pixel"] >= 50
    if blobs and colours:
        return Verdict(HOLDS, f"{found}: colours and blobs carry most")
    if blobs:
        return Verdict(CAVEAT, f"{found}: blobs carry most of it, dominant colours do not")
    if colours:
        return Verdict(CAVEAT, f"{found}: colours carry most of it, blobs do not")
    return Verdict(FAILS, f"{found}: neither blobs nor dominant colours carry half")


# ----------------------------------------------------------------------------------- 47: an epoch


def measure_epoch(study: Study) -> Measured:
    """How far one step, one epoch and several move the weights, and what the network then knows.

    The tutorial's network on 10,000 images at a constant rate, batches of 128; movement is the
    distance from the initial weights relative to their norm. And which images an epoch of this
    project visits, counted. Refuted if a step moves the weights by 5 % or more, or if accuracy
    after an epoch is as good as after several. The runs of question 32 and short ones: 1 minute.
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
    found = (
        f"one step moves the weights by {percent(moved['step'])} of their norm, to "
        f"{percent(accuracy['step'])} of the validation images right; an epoch of "
        f"{values['steps_of_an_epoch']} steps, of a part of the images, by "
        f"{percent(moved['epoch'])}, to {percent(accuracy['epoch'])}; {values['epochs']} epochs by "
        f"{percent(moved['epochs'])}, to "
        f"{percent(accuracy['epochs'])}"
    )
    gained = accuracy["epochs"]["mean_percent"] - accuracy["epoch"]["mean_percent"]
    least = noise(accuracy["epochs"], accuracy["epoch"])
    # By 5 % a step, twenty would be as far as the weights are long: no nudge.
    if moved["step"]["mean_percent"] >= 5 or gained <= least:
        return Verdict(FAILS, f"a step is no nudge, or one epoch is enough: {found}")
    if values["repeated_images_in_a_full_epoch"]:
        return Verdict(FAILS, "an epoch visits images twice")
    visited, there = (
        values["different_images_in_a_full_epoch"],
        values["images_of_training_and_validation"],
    )
    if visited < there:
        return Verdict(
            CAVEAT,
            f"{found}; but an epoch is not all {there:,} images: without those held out for "
            f"validation, and in full batches, it is {visited:,}, each once",
        )
    return Verdict(HOLDS, found)


# ------------------------------------------------------------------------------ 56: top-5 accuracy


def measure_top_5(study: Study) -> Measured:
    """How often the true class is among the k most probable, for k of 1 to 9.

    Of the default run of the tutorial's network (all training images, 10 epochs), on validation
    images. Refuted if there is more than a tenth as much room above the top-5 accuracy as above the
    top-1. The default run is shared; alone, 10 minutes.
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
    first, fifth = values["top_k"]["1"], values["top_k"]["5"]
    found = (
        f"top-1 is {percent(first)}, top-2 {percent(values['top_k']['2'])}, "
        f"top-5 {percent(fifth)}, of which chance gives {values['chance_top_5_percent']:.0f} %"
    )
    room = (100 - fifth["mean_percent"]) / (100 - first["mean_percent"])
    # Where a tenth of the mistakes is left, so is a tenth of what could tell networks apart.
    if room <= 0.1:
        return Verdict(HOLDS, f"{found}: {100 * room:.0f} % of the mistakes are left")
    return Verdict(FAILS, f"{found}: {100 * room:.0f} % of the mistakes are left to tell by")


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
                "32 pixels, grey": spread_at(60.0),
                "8 pixels": spread_at(15.0),
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
