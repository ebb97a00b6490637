r"""Data larger than memory: does training's memory stay flat as the folder grows tenfold?

    python experiments/streaming.py --output streaming.json    # about ten minutes, 1.5 GB of disk
    python experiments/streaming.py --images 1000 5000 --output small.json

Makes folders of small JPEGs, copies of 200 pictures, and trains a linear network on each for one
epoch, streaming (--cache-mb 0): peak memory, time to the first step, images a second. Then starts
again on the last, whose listing is kept by then.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import first_step
from cifar_jax import cli
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output

CLASSES, SIDE, PICTURES = 10, 64, 200


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[30_000, 300_000],
        metavar="N",
        help="in each folder [30000 300000]",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the images are made, and deleted [a temporary folder]"
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    check_output(arguments.output)
    found = {**environment("jax", "jaxlib", "numpy"), "image": f"{SIDE}x{SIDE} JPEG"}
    rows = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_atomically(arguments.output, json.dumps({**found, "rows": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for count in arguments.images:
            print(f"{count:,} images ...", flush=True)
            size = make_images(folder / "images", count)
            keep({"images": count, "folder_mb": size >> 20, **train(folder, "first")})
            print(f"  {rows[-1]}", flush=True)
        keep({"images": count, "folder_mb": size >> 20, **train(folder, "again", stop=True)})
        print(f"  with the listing kept: {rows[-1]}", flush=True)
    print(f"in {arguments.output}")


def make_images(root: Path, count: int) -> int:
    """Write ``count`` copies of ``PICTURES`` pictures to ``CLASSES`` folders; their bytes."""
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    size = 0
    for i in range(count):
        folder = root / f"class{i % CLASSES}"
        if i < CLASSES:
            folder.mkdir(parents=True)
        content = pictures[i % PICTURES]
        (folder / f"{i:07d}.jpg").write_bytes(content)
        size += len(content)
    return size


def train(folder: Path, name: str, *, stop: bool = False) -> dict[str, Any]:
    """Seconds and peak memory of training on ``folder/images``; ``stop``: to its first step."""
    workdir = folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    options = ["--data", str(folder / "images"), "--data-dir", str(folder / "data")]
    options += ["--cache-mb", "0", "--model", "linear", "--epochs", "1", "--batch-size", "500"]
    run = first_step.train([*options, "--workdir", str(workdir)], stop=stop)
    found: dict[str, Any] = {
        "to_first_step_seconds": round(run.to_first_step, 1),
        "seconds": round(run.seconds, 1),
        "peak_mb": run.peak_mb,
        "listing_kept": stop,
    }
    if not stop:
        report = json.loads((workdir / "report.json").read_text())
        found["images_per_second"] = round(report["images_per_second"])
    return found


if __name__ == "__main__":
    cli.run(main)
