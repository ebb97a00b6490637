r"""How fast to 94 % on CIFAR-10? Whole runs of airbench, each one program on the device.

    python experiments/speedrun.py --smoke --output smoke.json       # under three minutes on a CPU
    python experiments/speedrun.py --data cifar10.tar.gz --runs 200 --output speedrun.json   # a GPU

Network and recipe are those of https://github.com/KellerJordan/cifar10-airbench. Writes one JSON:

mean_accuracy, std, n   on the test images, by six views of each; interval_95 is that of the mean
seconds_mean          by that project's rule: from the images (uint8) and first parameters on the
                      device to the answers; without compiling
seconds_strict_mean   from the images on the device to the accuracy on the host; drawing the first
                      parameters counts too
compile_seconds       cold, and warm: with what an earlier compilation left on the disk
tflop                 of a run's convolutions and head as they are written, in whatever form they
                      are computed; share_of_ceiling compares with the best that a product of two
                      matrices of the same type reached just before the runs
beside                with --beside: the author's own script, run afterwards on the same data and
                      card; ratio is its seconds over ours
kernels               on a GPU: where the time of one run goes, and how long each kind would take
                      at the ceiling
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from airbench.recipe import RECIPES, Recipe
from cifar_jax import cli
from cifar_jax.data.dataset import ImageFiles, Split, array_digest, stratified_choice
from cifar_jax.data.sources import check_source, load_splits
from cifar_jax.errors import DataError, NumericsError, ResourceError, UsageError, first_line
from cifar_jax.system.files import check_is_new, write_atomically
from machine import environment
from output import check_output

_SMOKE = Recipe(widths=(16, 32, 32), epochs=4, batch_size=100, whitening_epochs=2)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="how many, seeds 0 .. N-1")
    parser.add_argument("--data", default="auto", help="as in cifar_jax.train")
    parser.add_argument("--data-dir", help="as in cifar_jax.train")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="94",
        help="94, or the networks and epochs for 95 and 96: five and eighteen times the work, "
        "not yet run on a GPU [%(default)s]",
    )
    parser.add_argument(
        "--widths",
        type=_widths,
        metavar="N,N,N",
        help="channels of the stages instead of the recipe's; 16,64,64 takes minutes on a CPU",
    )
    parser.add_argument(
        "--score",
        choices=("test", "val"),
        default="test",
        help="val: the validation images, so that the test set is not tuned on",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="SCRIPT",
        help="that project's airbench94_muon.py, to run on the same card; needs torchvision",
    )
    parser.add_argument(
        "--beside-runs", type=int, default=20, metavar="N", help="how many runs of it"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="does it work? a narrow network, on a few built-in shapes",
    )
    arguments = parser.parse_args()
    _check(arguments)
    recipe = _SMOKE if arguments.smoke else RECIPES[arguments.recipe]
    if arguments.widths:
        recipe = dataclasses.replace(recipe, widths=arguments.widths)
    source = "shapes" if arguments.smoke else arguments.data
    check_source(source)

    train, test, name, classes = _load(source, arguments)
    if len(train) < recipe.batch_size:
        raise DataError(
            f"--data {source} has {len(train):,} images to train on, and a step takes "
            f"{recipe.batch_size:,}",
            fix="give more images",
        )
    print(f"{name}: {len(train):,} images to train on, {len(test):,} to score")
    found: dict[str, Any] = {
        **environment(*_PACKAGES),
        "data": name,
        "scored_on": arguments.score,
        "n_train": len(train),
        "n_test": len(test),
        "data_digest": array_digest(train, test),
    }
    if arguments.beside:  # on the same card, of which JAX would take three quarters
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    _measure(recipe, train, test, classes, found, arguments)


def _measure(
    recipe: Recipe,
    train: Split,
    test: Split,
    classes: int,
    found: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Compile, run, and write what comes of it; JAX starts here."""
    import jax

    from airbench.measure import (
        ceiling_flops,
        compile_run,
        kernels,
        make_setting,
        run_flop,
        shows_progress,
        takes_kernels,
    )

    on_cpu = jax.default_backend() == "cpu"
    if arguments.beside and on_cpu:
        raise ResourceError("--beside needs a GPU, and JAX finds none", fix="leave it out")
    recipe = dataclasses.replace(recipe, fused=takes_kernels())
    if on_cpu:  # which has no fast half precision
        recipe = dataclasses.replace(recipe, dtype="float32")
    setting = make_setting(recipe, train, classes)
    device = jax.devices()[0].device_kind
    print(f"compiling for {device}, cold and warm ...", end=" ", flush=True)
    run, compile_seconds = compile_run(setting, train, test)
    print(" and ".join(f"{seconds:.1f} s" for seconds in compile_seconds.values()))
    flop = run_flop(setting, len(train), len(test), train.image_shape)
    found.update(
        device=device,
        recipe=dataclasses.asdict(recipe),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        progress_bar=shows_progress(),
        compile_seconds=compile_seconds,
        tflop=sum(flop.values()) / 1e12,
        ceiling_tflops=ceiling_flops(recipe.dtype, 2048 if on_cpu else 8192) / 1e12,
    )
    if not on_cpu:
        for _ in range(2):  # the first fills the caches, the second captures what is launched
            run(0)
    run_seeds(run, arguments.runs, found, arguments.output)
    print(
        f"{_described(found)}, {found['tflops']:.4g} TFLOP/s, {found['share_of_ceiling']:.0%} of "
        f"the ceiling; in {arguments.output}"
    )
    if not on_cpu:
        try:
            found["kernels"] = kernels(run)
        except Exception as error:  # the profiler's, of any kind: the author's script comes yet
            print(f"warning: the run cannot be profiled: {first_line(error)}", file=sys.stderr)
        else:
            at_ceiling = {kind: n / 1e12 / found["ceiling_tflops"] for kind, n in flop.items()}
            found["kernels"]["seconds_by_kind_at_the_ceiling"] = at_ceiling
            _write(found, arguments.output)
            for kind, seconds in found["kernels"]["seconds_by_kind"].items():
                floor = f", {at_ceiling[kind]:.3f} s at the ceiling" if kind in at_ceiling else ""
                print(f"  {kind:38s} {seconds:.3f} s{floor}")
    if arguments.beside:
        print(f"{arguments.beside.name}, {arguments.beside_runs} runs ...", flush=True)
        run_beside(arguments.beside, train, test, arguments.beside_runs, found, arguments.output)


def run_seeds(
    run: Callable[[int], dict[str, Any]], n: int, found: dict[str, Any], output: Path
) -> None:
    """Run seeds 0 .. n - 1; store each, with a summary so far, in ``found`` and ``output``.

    Raises:
        NumericsError: a loss is not finite.
    """
    from airbench.measure import summary

    runs: list[dict[str, Any]] = []
    for seed in range(n):
        row = run(seed)
        losses = row.pop("loss")
        if not np.isfinite(losses).all():
            raise NumericsError(
                f"seed {seed}: the loss is {losses[-1]} in the end",
                fix="report it" + (f"; the runs before it are in {output}" if runs else ""),
            )
        row["loss_first_and_last"] = [float(losses[0]), float(losses[-1])]
        runs.append(row)
        found.update(summary(runs))
        found["tflops"] = found["tflop"] / found["seconds_mean"]
        found["share_of_ceiling"] = found["tflops"] / found["ceiling_tflops"]
        found["runs"] = runs
        _write(found, output)
        print(
            f"  seed {seed}: {row['accuracy']:.2%} in {row['seconds']:.3f} s "
            f"({row['seconds_strict']:.3f} s strictly)",
            flush=True,
        )


def run_beside(
    script: Path, train: Split, test: Split, n: int, found: dict[str, Any], output: Path
) -> None:
    """Store what the author's script reaches, by its own clock, in ``found`` and ``output``.

    Also if it is cut off: it writes each run to a file beside ``output``.

    Raises:
        ResourceError: it failed, after saying why.
    """
    from airbench.measure import summary

    theirs = output.with_suffix(".author.json").absolute()
    theirs.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(
            data,
            train_images=train.pixels,
            train_labels=train.labels,
            test_images=test.pixels,
            test_labels=test.labels,
        )
        command = [sys.executable, "-m", "airbench.author", str(script.resolve()), str(data)]
        where = Path(__file__).parent
        try:
            done = subprocess.run([*command, str(n), str(theirs)], check=False, cwd=where)
        finally:
            if theirs.exists():
                beside = json.loads(theirs.read_text())
                beside.update(summary(beside["runs"]))
                found.update(beside=beside, ratio=beside["seconds_mean"] / found["seconds_mean"])
                _write(found, output)
                theirs.unlink()
                print(f"{_described(beside)}: {found['ratio']:.2f} times ours")
    if done.returncode:
        raise ResourceError(
            f"--beside {script} ended with status {done.returncode}, after what it says above",
            fix=f"mend it, or leave it out; all runs before that are in {output}",
        )


def _widths(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not of the form 16,64,64")
    return tuple(map(int, numbers))


def _write(found: dict[str, Any], output: Path) -> None:
    write_atomically(output, json.dumps(found, indent=1) + "\n")


def _check(arguments: argparse.Namespace) -> None:
    """Check now what would otherwise fail after minutes."""
    for option, value in (("--runs", arguments.runs), ("--beside-runs", arguments.beside_runs)):
        if value < 1:
            raise UsageError(f"{option} {value} is out of range", fix="give 1 or more")
    check_output(arguments.output)
    check_is_new(arguments.output, "--output")
    changed = arguments.recipe != "94" or arguments.widths
    if arguments.beside and (changed or arguments.smoke):
        raise UsageError(
            "--beside runs the recipe 94, and another is asked for",
            fix="leave out --beside, or --recipe, --widths and --smoke",
        )
    if arguments.smoke and (changed or arguments.data != "auto" or arguments.score != "test"):
        raise UsageError(
            "--smoke has a recipe, data and score of its own",
            fix="leave out --smoke, or --recipe, --widths, --data and --score",
        )
    if arguments.beside:
        if not arguments.beside.is_file():
            raise UsageError(
                f"--beside {arguments.beside} is not a file",
                fix="give airbench94_muon.py, or leave it out",
            )
        for package in ("torch", "torchvision"):
            if importlib.util.find_spec(package) is None:
                raise ResourceError(
                    f"--beside needs the package {package}",
                    fix=f"pip install {package}, or leave --beside out",
                )


def _described(found: dict[str, Any]) -> str:
    spread = f" +- {100 * found['std']:.2f}" if found["std"] is not None else ""
    accuracy = f"{100 * found['mean_accuracy']:.2f}{spread} %"
    return f"{accuracy} over {found['n']} runs of {found['seconds_mean']:.3f} s"


def _load(source: str, arguments: argparse.Namespace) -> tuple[Split, Split, str, int]:
    """The decoded splits to train on and to score, the data's name, and the number of classes."""
    found = load_splits(source, data_dir=arguments.data_dir)
    if found.notice:
        print(found.notice)
    train, val, test = (_decoded(split) for split in (found.train, found.val, found.test))
    if arguments.smoke:
        rng = np.random.default_rng(0)
        train = train.take(stratified_choice(train.labels, 2000, rng))
        test = test.take(stratified_choice(test.labels, 500, rng))
    elif arguments.score == "val":
        test = val
    else:
        train = Split(
            np.concatenate([train.pixels, val.pixels]), np.concatenate([train.labels, val.labels])
        )
    return train, test, found.name, len(found.class_names)


def _decoded(split: Split) -> Split:
    from cifar_jax.data import images

    return images.decode(split) if isinstance(split.images, ImageFiles) else split


if __name__ == "__main__":
    cli.run(main)
