r"""A run on two processes is stopped, loses one, and goes on elsewhere: is it the same run?

    python experiments/processes.py --output processes.json     # about two minutes

The network is linear. Both processes are on this machine, each with two devices of its own (parts
of the CPU). The run is stopped by a SIGTERM to one of them, and resumed; it loses one to SIGKILL,
and is resumed in one process with three devices, to its end. Its losses are compared with those of
an undisturbed run with the same options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cifar_jax import cli
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output

# 48 images divide evenly among 1, 2, 3 and 4 devices. The loss is convex, and no maximum of nearly
# equal numbers could be decided by rounding: a larger difference at the end has another cause.
RUN = "--data shapes --max-train-examples 1920 --epochs 6 --batch-size 48 --model linear"
RUN += " --input device --checkpoint-every 10 --optimizer sgd --learning-rate 0.01"
RUN += " --schedule constant"


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    output: Path = parser.parse_args().output
    check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            **environment("jax", "jaxlib"),
            **disturbed(Path(folder) / "disturbed"),
            **alone(Path(folder) / "alone"),
        }
    pairs = zip(found["losses"], found["undisturbed_losses"], strict=True)
    found["largest_difference"] = max(abs(a - b) / b for a, b in pairs)
    write_atomically(output, json.dumps(found, indent=1) + "\n")
    print(f"largest relative difference of a loss: {found['largest_difference']:.1e}; in {output}")


def disturbed(workdir: Path) -> dict[str, Any]:
    """The run with its accidents: how each process ended, and the losses."""
    print("two processes of two devices; SIGTERM to the second ...", flush=True)
    processes = start_two(workdir)
    wait_for_rows(workdir, 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    stopped = [finish(process) for process in processes]
    print("the same again; SIGKILL to the second ...", flush=True)
    processes = start_two(workdir, "--resume")
    wait_for_rows(workdir, 3, processes)
    killed_at = time.monotonic()
    processes[1].kill()
    survivor = finish(processes[0])
    seconds = time.monotonic() - killed_at
    finish(processes[1])
    print("on three devices, to the end ...", flush=True)
    last = finish(start(workdir, 3, "--devices", "3", "--resume"))
    return {
        "stopped": stopped,
        "survivor": survivor,
        "survivor_seconds": round(seconds, 1),
        "last": last,
        "losses": losses(workdir),
    }


def alone(workdir: Path) -> dict[str, Any]:
    """The run on one device, undisturbed."""
    print("on one device, undisturbed ...", flush=True)
    finish(start(workdir, 1))
    return {"undisturbed_losses": losses(workdir)}


def start_two(workdir: Path, *options: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = ["--coordinator", address, "--num-processes", "2", "--devices", "2", *options]
    return [start(workdir, 2, *common, "--process-id", str(i)) for i in range(2)]


def start(workdir: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "cifar_jax.train", *RUN.split(), *options]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_rows(workdir: Path, rows: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the run's history has so many epochs, and some steps of the next are done."""
    history = workdir / "metrics.jsonl"
    while not history.exists() or len(history.read_text().splitlines()) < rows:
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"a process ended early:\n{finish(process)['said']}")
        time.sleep(0.01)
    time.sleep(0.2)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """How a process ended, and the last line it said."""
    said, _ = process.communicate(timeout=300)
    lines = [line for line in said.splitlines() if line.strip()]
    return {"exit": process.returncode, "said": lines[-1] if lines else ""}


def losses(workdir: Path) -> list[float]:
    """The losses of training and validation, epoch by epoch, and that of the test."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((workdir / "report.json").read_text())
    both = [loss for row in rows for loss in (row["train_loss"], row["val_loss"])]
    return [*both, report["test_loss"]]


if __name__ == "__main__":
    cli.run(main)
