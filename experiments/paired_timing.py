"""Time several programs in turn, each in a process of its own.

Timings on a shared machine drift by a third within minutes. So each program runs a few steps, then
the next does, round after round; a program's figure is its median over the rounds. Each has its own
process, as two frameworks in one would share threads, memory and a GPU.
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

from cifar_jax.errors import ResourceError

Spec = dict[str, Any]
RunSteps = Callable[[int], None]  # runs so many steps, and waits until they are done
Describe = Callable[[], dict[str, Any]]  # what a worker tells about itself at the end


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of one program.

    Attributes:
        spec: the worker's, with the program's name as ``pass``.
        step_ms: of each round, the mean time of a step in milliseconds.
        info: what the worker reported of itself: its device, its memory.
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


def serve(spec: Spec, make: Callable[[Spec], tuple[dict[str, RunSteps], Describe]]) -> None:
    """The worker's side: build the programs of ``spec``, then run the steps it is asked for.

    Args:
        make: returns the programs by name.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a library may print, which is not an answer
        baseline = _peak_memory_mb()
        programs, describe = make(spec)
        for run in programs.values():
            run(1)
        print(json.dumps(list(programs)), file=out, flush=True)
        while order := sys.stdin.readline().split():
            run, steps = programs[order[0]], int(order[1])
            started = time.perf_counter()
            run(steps)
            print((time.perf_counter() - started) / steps * 1e3, file=out, flush=True)
        info = {
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
    """Time the programs of ``specs``, each served by a process ``command SPEC``, in turn.

    All workers have programs of the same names; those of each name are timed in turn.

    Args:
        rounds: how often each is timed, after one round that is not counted.
        steps: how many it runs in one turn.
        cwd: where ``command`` is run.

    Raises:
        ResourceError: a worker died: with its last words.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for spec in specs:
            workers.append(stack.enter_context(_Worker(command, spec, cwd)))
        programs = [json.loads(worker.read()) for worker in workers]
        times: dict[tuple[int, str], list[float]] = {}
        for name in programs[0]:
            for round_ in range(rounds + 1):
                for i, worker in enumerate(workers):
                    time.sleep(0.2)  # the last one's threads may spin before they sleep
                    step_ms = float(worker.ask(f"{name} {steps}"))
                    if round_:
                        times.setdefault((i, name), []).append(step_ms)
        infos = [json.loads(worker.ask("")) for worker in workers]
        return [
            Timing({**specs[i], "pass": name}, measured, infos[i])
            for (i, name), measured in times.items()
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
        self._process.communicate()  # closes the pipes
        self._errors.close()

    def ask(self, order: str) -> str:
        with contextlib.suppress(BrokenPipeError):  # it died since: read() says so
            print(order, file=self._process.stdin, flush=True)
        return self.read()

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["no last words"]
            raise ResourceError(
                f"the program of {self._spec} ended with {self._process.wait()}: {said[-1]}",
                fix="install what it lacks, or free memory: -9 mostly means a lack of it",
            )
        return line
