r"""NHWC against NCHW, JAX against PyTorch: what is the same, what is faster, what trips people up?

    python experiments/nhwc_vs_nchw.py --quick --output quick.json            # two minutes
    python experiments/nhwc_vs_nchw.py --data cifar10.tar.gz \
        --output experiments/results/nhwc_vs_nchw.json                        # 15 to 30 minutes

Needs the test extra, which brings torch. Writes one JSON and, beside it, one figure:

models     how far each network is from its PyTorch twin with the same weights:
           activations, logits, gradients and 200 steps of training, relative to the largest value
optimizers the same 200 steps with SGD, Nesterov, Adam and AdamW
timings    JAX in NHWC and NCHW, PyTorch contiguous and channels_last: in turn, a process each
hlo        what XLA made of each layout: transposes, copies, FLOPs, bytes
training   the same run in both frameworks, image for image
pitfalls   what goes wrong when layouts are mixed up, in numbers

Each section is written as soon as it is measured. A study that was stopped continues where it was;
a complete one is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cifar_jax import cli
from cifar_jax.data.sources import check_source
from cifar_jax.errors import UsageError
from cifar_jax.system.files import write_atomically
from layouts.figure import draw
from layouts.hlo import inspect_hlo
from layouts.models import compare_models, compare_optimizers
from layouts.pitfalls import measure_pitfalls
from layouts.timings import time_all
from layouts.training import train_in_both
from machine import environment
from output import check_output

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="the JSON to write; the figure goes beside it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small networks, few rounds, the built-in shapes"
    )
    parser.add_argument("--data", help="for the training [default shapes if --quick, else auto]")
    parser.add_argument("--data-dir", help="as in cifar_jax.train")
    arguments = parser.parse_args()
    source = arguments.data or ("shapes" if arguments.quick else "auto")
    # JAX alone would take three quarters of a GPU, in each of the processes that take turns on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    check_source(source)  # like the folder: before minutes of work
    check_output(arguments.output)
    study = Study(arguments.output, {"quick": arguments.quick, "data": Path(source).name})
    study.measure("models", _in_float32(lambda: compare_models(arguments.quick)))
    if not arguments.quick:
        study.measure("optimizers", _in_float32(compare_optimizers))
    study.measure("timings", lambda: time_all(arguments.quick))
    study.measure("hlo", lambda: inspect_hlo(arguments.quick))
    study.measure(
        "training",
        _in_float32(lambda: train_in_both(source, arguments.data_dir, quick=arguments.quick)),
    )
    study.measure("pitfalls", _in_float32(lambda: measure_pitfalls(study.results["training"])))
    study.finish()
    figure = arguments.output.with_suffix(".png")
    draw(study.results, figure)
    print(f"wrote {arguments.output} and {figure}")


def _in_float32(section: Callable[[], Any]) -> Callable[[], Any]:
    """By its default a GPU computes products in TF32, and PyTorch's beside it are the CPU's."""

    def measure() -> Any:
        precision = None if jax.default_backend() == "cpu" else "highest"
        with jax.default_matmul_precision(precision):
            return section()

    return measure


class Study:
    """Results that are on the disk as soon as they are measured.

    A file that is not ``complete`` is continued if it was begun with the same settings, on the same
    machine, with the same versions.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.results: dict[str, Any] = {
            **settings,
            **environment(*_PACKAGES),
            "backend": jax.default_backend(),
            "complete": False,
        }
        if path.exists():
            found = self._read()
            begun = {**self.results, "date": found.get("date")}  # it may take more than a day
            if not found["complete"] and begun.items() <= found.items():
                self.results = found

    def _read(self) -> dict[str, Any]:
        try:
            return {"complete": True} | dict(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"--output {self._path} exists, and holds no result of this study: {error}",
                fix="give another --output",
            ) from error

    def measure(self, name: str, section: Callable[[], Any]) -> None:
        if name in self.results:
            return
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        self.results[name] = section()
        self._write()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)

    def finish(self) -> None:
        self.results["complete"] = True
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self.results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
