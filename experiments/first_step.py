"""``cifar_jax.train`` as a process: its data, its memory, the time to its first step and end."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_jax.data.sources import NAMES
from cifar_jax.errors import ResourceError


def data_options(source: str, data_dir: str | None) -> list[str]:
    """``--data`` and ``--data-dir`` for a command that runs in another folder."""
    options = ["--data", source if source in NAMES else str(Path(source).resolve())]
    return [*options, "--data-dir", str(Path(data_dir).resolve())] if data_dir else options


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run took.

    Attributes:
        to_first_step: seconds from the command to its first step.
        seconds: from the command to its end.
        peak_mb: the process's largest resident size.
    """

    to_first_step: float
    seconds: float
    peak_mb: int


def train(
    options: Sequence[str], *, stop: bool = False, environment: Mapping[str, str] | None = None
) -> Run:
    """What ``cifar_jax.train`` took with ``options``.

    Args:
        stop: end it by SIGTERM as soon as it reaches its first step.
        environment: variables added to those of this process.

    Raises:
        ResourceError: training failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_jax.train", *options],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if stop else None,  # it would say that it was stopped
        text=True,
    )
    assert process.stdout is not None
    to_first_step = None
    with process.stdout as lines:
        for line in lines:
            if line.lstrip().startswith("epoch "):  # the table's head: the first step comes next
                to_first_step = time.perf_counter() - started
                if stop:
                    process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (128 + signal.SIGTERM if stop else 0) or to_first_step is None:
        raise ResourceError(
            f"cifar_jax.train {' '.join(options)} ended with {process.returncode}",
            fix="run it by itself to see why",
        )
    return Run(to_first_step, time.perf_counter() - started, usage.ru_maxrss >> 10)
