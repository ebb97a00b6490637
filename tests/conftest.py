"""Four fake CPU devices for every test, and small real data to train on."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Also where there is a GPU: it would be one device, and it rounds differently.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compiling, and many of them, and the processes that they start, compile
# the same programs: those are kept for the session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="cifar_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# And compiled without most of XLA's optimizations, in two thirds of the time: the README's training
# command, which .ci/run types, is run with them.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as cifar_jax.torch_reference says

# Started in the background by a shell, this process and its children would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_num_cpu_devices", 4)

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SIZE = 8
# Smooth, as photographs are: noise would hide what a resize does. 24 high, 20 wide.
GREY = (128 + 100 * np.sin(np.arange(24)[:, None] / 5 + np.arange(20) / 7)).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]


def pixels_of(uri: str | None) -> np.ndarray:
    """The pixels of a PNG that stands in a page as a ``data:`` address."""
    assert uri is not None
    kind, content = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def write_images(
    folder: Path, labels_of: dict[str, int], *, seed: int = 0, mode: str = "RGB", size: int = SIZE
) -> None:
    """Write ``labels_of[class]`` PNGs a class: noise around a brightness that tells the class."""
    rng = np.random.default_rng(seed)
    for k, (name, count) in enumerate(labels_of.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            level = 255 * (k + 0.5) / len(labels_of)
            pixels = np.clip(rng.normal(level, 25, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels, mode).save(folder / name / f"{i:03d}.png")


@pytest.fixture(params=["cpu", "gpu"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form of a computation that is for a CPU; then, computed here too, that for a GPU."""
    if request.param == "gpu":

        def for_gpu(*args: Any, cpu: Any, default: Any) -> Any:
            return default(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", for_gpu)
    return request.param


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` with 3 x 30 and ``test/`` with 3 x 7 images of 8x8 pixels."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"bird": 30, "cat": 30, "frog": 30})
    write_images(root / "test", {"bird": 7, "cat": 7, "frog": 7}, seed=1)
    return root


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """The workdir of a small `cnn` that was trained on ``image_folder``."""
    from cifar_jax.config import TrainConfig
    from cifar_jax.train import train_and_evaluate

    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        data=str(image_folder), model="cnn", widths=(4, 8, 16), hidden=(16,), epochs=3, batch_size=9
    )
    train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture(scope="module")  # its event loop would be in the way of other modules' own
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright; ``.ci/run`` installs it and demands it."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if path is None and "CIFAR_JAX_TESTS_NEED_A_BROWSER" not in os.environ:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-quic", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()
