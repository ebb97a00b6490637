r"""An hour of accidents: is anything lost?

    python experiments/soak.py --output soak.json             # an hour
    python experiments/soak.py --minutes 2 --output mine.json

Trains the linear network of processes.py again and again. Each run is ended by SIGKILL, SIGTERM,
SIGINT or a full disk at random instants, and resumed on another number of devices. Between two
starts, a bit of its newest checkpoint may flip, or half of one of its files disappear. Once a run
is complete, its losses must be those of an undisturbed run, and the network is evaluated and used.
Whatever breaks a promise of the program goes to `surprises`. The JSON is written after each run.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cifar_jax import __version__, cli
from cifar_jax.data import shapes
from cifar_jax.data.images import png
from cifar_jax.errors import ExitCode
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output
from processes import losses, start

RELATIVE = 1e-5


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="for the accidents")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    check_output(options.output)
    # Started in the background by a shell, this process and its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(options.seed)
    done: collections.Counter[str] = collections.Counter()
    surprises: list[str] = []
    largest_difference = 0.0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        image.write_bytes(png(shapes.draw(1, seed=5)[0][0]))
        undisturbed = Path(folder) / "undisturbed"
        said, _ = start(undisturbed, 1).communicate()
        seconds = time.monotonic() - started
        if not (undisturbed / "report.json").exists():
            raise SystemExit(f"the undisturbed run failed:\n{said}")
        expected = losses(undisturbed)
        while time.monotonic() - started < 60 * options.minutes:
            workdir = Path(folder) / f"run{done['runs']}"
            disturb_to_the_end(workdir, seconds, draw, done, surprises)
            found = losses(workdir)
            difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            largest_difference = max(largest_difference, difference)
            if difference > RELATIVE:
                surprises.append(f"run {done['runs']}: a loss differs by {difference:.1e}")
            use(workdir, image, done, surprises)
            done["runs"] += 1
            result = {
                "seed": options.seed,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "done": dict(sorted(done.items())),
                "largest_relative_difference_of_a_loss": largest_difference,
                "surprises": surprises,
                **environment("jax", "jaxlib"),
                "version": __version__,
            }
            write_atomically(options.output, json.dumps(result, indent=1) + "\n")
            print(f"{result['minutes']:5.1f} min: {dict(done)}", *surprises[-1:], flush=True)
    raise SystemExit(1 if surprises else 0)


def disturb_to_the_end(
    workdir: Path,
    seconds: float,
    draw: random.Random,
    done: collections.Counter[str],
    surprises: list[str],
) -> None:
    """Start the run until it is complete; undisturbed, that would take ``seconds``."""
    while True:
        damaged = None
        complete = (workdir / "report.json").exists()  # its checkpoints will not be read again
        if len(whole_steps(workdir)) > 1 and not complete and draw.random() < 0.3:
            damaged = damage(workdir, draw, done)
        whole = whole_steps(workdir)
        devices = draw.choice([1, 2, 3, 4])
        done["starts"] += 1
        accident = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "full disk", "none"])
        process = start(workdir, devices, "--devices", str(devices), "--resume")
        allowed = [0]
        if accident == "full disk":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))
            allowed.append(ExitCode.ENVIRONMENT)
        elif accident != "none":
            time.sleep(draw.uniform(0, seconds))
            signum = signal.Signals[accident]
            if not (workdir / "report.json").exists():  # else the signal may come too late
                allowed = [128 + signum]
            process.send_signal(signum)
            allowed.append(-signum)  # a kill, or a signal before it is handled
        said, _ = process.communicate(timeout=600)
        code = process.returncode
        done[f"{accident}, exit {code}"] += 1
        told = f"{accident} on {devices} devices: exit {code}"
        if code not in allowed:
            surprises.append(f"{told}: {said}")
        if "Traceback" in said and code != -signal.SIGINT:  # Python itself may end so
            surprises.append(f"{told}, and a traceback: {said}")
        if damaged and "resumed at" in said and f"{damaged}" not in said:
            surprises.append(f"{told}: the damage of {damaged} was not named: {said}")
        if whole and (now := whole_steps(workdir))[-1:] < whole[-1:]:
            surprises.append(f"{told}: steps {whole} were saved, now {now}: {said}")
        if code == 0:
            return


def whole_steps(workdir: Path) -> list[int]:
    """The steps whose files match their manifests, ascending.

    Judged here, independently of the code under test.
    """
    found = []
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        files = [(manifest.parent / n, d) for n, d in json.loads(manifest.read_text()).items()]
        if manifest.parent.name.isdecimal() and all(
            file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == digest
            for file, digest in files
        ):
            found.append(int(manifest.parent.name))
    return sorted(found)


def damage(workdir: Path, draw: random.Random, done: collections.Counter[str]) -> Path:
    """Flip a bit of the newest checkpoint, or cut one of its files."""
    newest = workdir / "checkpoints" / str(whole_steps(workdir)[-1])
    files = [file for file in sorted(newest.rglob("*")) if file.is_file() and file.stat().st_size]
    file = draw.choice([file for file in files if file.name != "manifest.json"])
    content = bytearray(file.read_bytes())
    if draw.random() < 0.5:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        done["bits flipped"] += 1
    else:
        del content[len(content) // 2 :]
        done["files cut"] += 1
    file.write_bytes(content)
    return newest


def use(workdir: Path, image: Path, done: collections.Counter[str], surprises: list[str]) -> None:
    for name, options in (
        ("evaluate", ["--data", "shapes", "--output", str(workdir / "evaluation")]),
        ("predict", [str(image)]),
    ):
        command = [sys.executable, "-m", f"cifar_jax.{name}", "--checkpoint", str(workdir)]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
        done[name] += 1
        if ran.returncode:
            surprises.append(f"{name}: exit {ran.returncode}: {ran.stderr[-2000:]}")


if __name__ == "__main__":
    cli.run(main)
