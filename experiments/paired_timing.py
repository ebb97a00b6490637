"""Time several programs in turn, each in a process of its own.

Timings on a shared machine drift by a third within minutes, so programs are compared by letting
each run a few steps, then the next, round after round; the median over the rounds is a program's
figure. A process of its own each: two frameworks in one would share threads, memory and a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
RunSteps = Callable[[int], None]  # runs that many steps and waits until they are done


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of one program.

    Attributes:
        step_ms: of each round, the mean time of a step in milliseconds.
        info: what the program said of itself: device, compilation time, memory.
    """

    spec: Spec
    step_ms: list[float]
    info: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The program with its median, fastest and slowest round."""
        return {
            **self.spec,
            "step_ms_median": statistics.median(self.step_ms),
            "step_ms_min": min(self.step_ms),
            "step_ms_max": max(self.step_ms),
            "images_per_second": self.spec["batch_size"] / statistics.median(self.step_ms) * 1e3,
            "rounds": len(self.step_ms),
            **self.info,
        }


def serve(
    spec: Spec, make: Callable[[Spec], tuple[RunSteps, Callable[[], dict[str, Any]]]]
) -> None:
    """The worker's side: build the program of ``spec``, then run steps as it is told.

    Args:
        make: returns the program, and what it has to say of itself when it is done.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no answer
        baseline = _peak_memory_mb()
        started = time.perf_counter()
        run, describe = make(spec)
        run(1)
        first = time.perf_counter() - started
        print("ready", file=out, flush=True)
        while steps := int(sys.stdin.readline() or 0):
            started = time.perf_counter()
            run(steps)
            print((time.perf_counter() - started) / steps * 1e3, file=out, flush=True)
        info = {
            "build_and_first_step_s": round(first, 2),
            "peak_memory_mb": round(_peak_memory_mb()),
            "memory_before_mb": round(baseline),
            **describe(),
        }
        print(json.dumps(info), file=out, flush=True)


def _peak_memory_mb() -> float:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins with the size of the parent process
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def time_in_turn(
    command: Sequence[str], specs: Sequence[Spec], *, rounds: int, steps: int, cwd: Path
) -> list[Timing]:
    """Time the programs of ``specs``, each served by ``command SPEC``, in turn.

    Args:
        rounds: how often each gets its turn; the first is not counted.
        steps: in one turn.
        cwd: where ``command`` is run.

    Raises:
        RuntimeError: a worker died; with its last words.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for spec in specs:
            workers.append(stack.enter_context(_Worker(command, spec, cwd)))
            workers[-1].read()  # one at a time: compilations side by side would swell the memory
        times: list[list[float]] = [[] for _ in specs]
        for round_ in range(rounds + 1):
            for worker, measured in zip(workers, times, strict=True):
                step_ms = float(worker.ask(steps))
                if round_:
                    measured.append(step_ms)
        return [
            Timing(spec, measured, json.loads(worker.ask(0)))
            for spec, worker, measured in zip(specs, workers, times, strict=True)
        ]


class _Worker:
    """A process that serves one program; killed when its context ends."""

    def __init__(self, command: Sequence[str], spec: Spec, cwd: Path) -> None:
        self._spec = spec
        # A file, as a pipe could fill up and block the worker.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            [*command, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=cwd,
            text=True,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def ask(self, steps: int) -> str:
        print(steps, file=self._process.stdin, flush=True)
        return self.read()

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last_words = self._errors.read().strip().splitlines()[-1:]
            raise RuntimeError(f"the program of {self._spec} died: {last_words}")
        return line
