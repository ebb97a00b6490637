"""Several processes as one run, by ``jax.distributed``: they start, agree and end together.

When one process dies, JAX aborts the others with a C++ trace and no advice; a helper process, which
outlives this one, prints that advice. The runtime's own messages go to a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import cifar_jax
from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError, ExitCode, ResourceError, Stopped, UsageError, first_line
from cifar_jax.steps.parallel import select_devices

# How long a process may be silent before the others consider it dead; and how long they wait for
# each other at the start and at the end.
_HEARTBEAT_SECONDS = 30
_MEETING_SECONDS = 60
_PARTING_SECONDS = 5


@contextlib.contextmanager
def joined(config: TrainConfig, workdir: Path) -> Iterator[None]:
    """Join the run of several processes that ``config`` describes, if it does.

    Inside, only the first process prints.

    Raises:
        ResourceError: the others cannot be reached, or one of them is lost.
    """
    if config.coordinator is None:
        yield
        return
    name = socket.gethostname() if config.process_id is None else config.process_id
    log = workdir / f"process-{name}.log"
    workdir.mkdir(parents=True, exist_ok=True)
    with _advice_if_aborted(workdir, log) as withhold_advice:
        _keep_runtime_messages(log)
        if config.process_id:  # the first one is the coordinator
            _wait_for_coordinator(str(config.coordinator))
        with _bounded_meeting(config, withhold_advice):
            _meet(config)
        try:
            select_devices(config.devices)  # before anything else starts them
            _check_device_counts()
            with contextlib.ExitStack() as stack:
                if not is_first():
                    silence = stack.enter_context(open(os.devnull, "w"))
                    stack.enter_context(contextlib.redirect_stdout(silence))
                yield
        except BaseException as error:
            if _is_of_a_shared_gpu(error):
                _leave_alone_after(_PARTING_SECONDS, ExitCode.ENVIRONMENT)
                raise ResourceError(
                    f"process {jax.process_index()} shares a GPU with another process: "
                    + first_line(error),
                    fix="give each process GPUs of its own, by CUDA_VISIBLE_DEVICES or "
                    "JAX_LOCAL_DEVICE_IDS=0 (then 1, ...), or start one process per machine",
                ) from error
            if not _is_of_a_lost_peer(error):
                _leave_alone_after(_PARTING_SECONDS, _exit_status(error))
                raise
            _leave_alone_after(0, ExitCode.ENVIRONMENT)
            raise ResourceError(
                f"process {jax.process_index()} lost another one: " + first_line(error),
                fix=_how_to_go_on(workdir),
            ) from error


def is_first() -> bool:
    """Whether this process prints and writes files: the only one, or number 0."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Block until every process has reached the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def check_agreement(facts: Mapping[str, str]) -> None:
    """Check that all processes run the same code from the same starting point.

    Args:
        facts: what else must be equal, by the name that errors use.

    Raises:
        UsageError: names a process that differs from the first, and in what.
    """
    for name, fact in {**facts, "code": _code_digest()}.items():
        first, *others = _gather(fact)
        for process, other in enumerate(others, start=1):
            if other != first:
                raise UsageError(
                    f"process {process} differs from process 0 in its {name}: "
                    + _difference(other, first),
                    fix="start all processes with the same command, code and data, on machines of "
                    "one kind",
                )


def holds_for_all(fact: bool) -> bool:
    """Whether ``fact`` holds in every process; all of them must call this at the same place."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.process_allgather(np.array(fact)).all())


def agreed_signal(received: int | None) -> int | None:
    """A signal received by any of the processes; all of them must call this at the same place."""
    if jax.process_count() == 1:
        return received
    return int(multihost_utils.process_allgather(np.array(received or 0)).max()) or None


def _code_digest() -> str:
    """SHA-256 over the package's own source files."""
    sha256 = hashlib.sha256()
    for path in sorted(Path(cifar_jax.__file__).parent.rglob("*.py")):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


def _gather(text: str) -> list[str]:
    """The ``text`` of every process."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(mine)))
    padded = np.pad(mine, (0, int(lengths.max()) - len(mine)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def _difference(ours: str, theirs: str) -> str:
    """The lines in which the two differ: ``learning_rate 0.1 instead of 0.01``."""
    left, right = ours.splitlines(), theirs.splitlines()
    pairs = [
        f"{a.strip().rstrip(',')} instead of {b.strip().rstrip(',')}"
        for a, b in zip(left, right, strict=False)
        if a != b
    ]
    return "; ".join(pairs)[:300] or "more or fewer lines"


@contextlib.contextmanager
def _bounded_meeting(config: TrainConfig, withhold_advice: Callable[[], None]) -> Iterator[None]:
    """End this process if the others do not come; JAX would abort it, and claim that one died."""

    def give_up() -> None:
        withhold_advice()
        error = ResourceError(
            f"--coordinator {config.coordinator}: not all processes came within "
            f"{_MEETING_SECONDS} s"
            + (f"; --num-processes is {config.num_processes}" if config.num_processes else ""),
            fix="start the others too, with the same --coordinator, which they must reach",
        )
        print(f"cifar_jax: error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    if config.process_id == 0:
        print(f"waiting for the others at {config.coordinator} ...", flush=True)
    timer = threading.Timer(_MEETING_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(config: TrainConfig) -> None:
    """Join the others, before JAX starts."""
    if "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
        # Only process 0 writes to the cache. On machines with separate homes it would find a
        # program that the others must compile, and XLA compiles for GPUs only with all of them
        # together.
        jax.config.update("jax_enable_compilation_cache", False)
    timing: dict[str, Any] = {
        "initialization_timeout": 2 * _MEETING_SECONDS,  # longer than ours
        "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": _MEETING_SECONDS,
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize(**timing)
            if _has_all_gpus_it_sees(os.environ):
                jax.config.update("jax_cuda_visible_devices", "all")
        else:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                cluster_detection_method="deactivate",
                **timing,
            )
    except (ValueError, RuntimeError) as error:
        fix = "check that --coordinator is an address of process 0 with a free port"
        if config.coordinator == "auto":
            fix = (
                "under SLURM start it with srun, under Open MPI with mpirun; or give --coordinator "
                "HOST:PORT --num-processes N --process-id I"
            )
        raise ResourceError(
            f"--coordinator {config.coordinator}: the processes cannot meet: {error}",
            fix=fix,
        ) from error
    signal.signal(signal.SIGTERM, on_sigterm)  # JAX's handler only records it, and nothing polls it


def _check_device_counts() -> None:
    """Raise unless all processes have as many devices: process_allgather needs equal shapes."""
    first, *others = (
        len(jax.local_devices(process_index=index)) for index in range(jax.process_count())
    )
    for process, count in enumerate(others, start=1):
        if count != first:
            raise ResourceError(
                f"process {process} has {count} device(s), and process 0 has {first}",
                fix="give each process as many, by CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS",
            )


def _has_all_gpus_it_sees(environment: Mapping[str, str]) -> bool:
    """Whether a cluster's task has all GPUs that it sees to itself.

    JAX assumes one task per GPU: of the GPUs that a task sees, it uses only the one whose number is
    the task's number on its machine.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return False
    # Open MPI first, as in JAX: inside SLURM, mpirun may start one SLURM task per machine.
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        is_alone = environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    else:
        nodes = environment.get("SLURM_STEP_NUM_NODES")
        is_alone = nodes is not None and nodes == environment.get("SLURM_STEP_NUM_TASKS")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return is_alone or (visible != "" and "," not in visible)


def _wait_for_coordinator(address: str) -> None:
    host, _, port = address.rpartition(":")
    give_up = time.monotonic() + _MEETING_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise ResourceError(
                    f"--coordinator {address}: no process 0 there after {_MEETING_SECONDS} s "
                    f"({error})",
                    fix="start process 0 on that host, and check that the port can be reached",
                ) from error
            time.sleep(0.2)


def _leave_alone_after(patience_seconds: float, status: int) -> None:
    """Limit how long this process takes to exit: there, JAX waits for others, who may wait for it.

    Args:
        patience_seconds: time for the others to exit too, from the end of the main thread.
        status: the exit status if they do not.
    """

    def leave() -> None:
        threading.main_thread().join()
        time.sleep(patience_seconds)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    threading.Thread(target=leave, daemon=True).start()


def _exit_status(error: BaseException) -> int:
    """The exit status of a command that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return error.exit_code if isinstance(error, CifarJaxError | Stopped) else ExitCode.BUG


def _is_of_a_shared_gpu(error: BaseException) -> bool:
    """Whether this is NCCL refusing two processes on one GPU."""
    known = isinstance(error, ValueError | jax.errors.JaxRuntimeError)
    return known and any(word in str(error) for word in ("Duplicate GPU", "invalid usage"))


def _is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed. Gloo's errors come as ``ValueError``, others as JAX's own."""
    known = isinstance(error, ValueError | jax.errors.JaxRuntimeError)
    return known and any(
        word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "coordination service")
    )


def _how_to_go_on(workdir: Path) -> str:
    return (
        "check the output of the others; then start all of them again, with --resume "
        f"--workdir {workdir}, from the last checkpoint"
    )


def _keep_runtime_messages(log: Path) -> None:
    """Redirect what C++ code writes to stdout and stderr to ``log``, but not what Python writes."""
    with log.open("ab") as file:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            getattr(sys, name).flush()
            kept = os.fdopen(os.dup(descriptor), "w", buffering=1, errors="backslashreplace")
            setattr(sys, name, kept)
            os.dup2(file.fileno(), descriptor)


@contextlib.contextmanager
def _advice_if_aborted(workdir: Path, log: Path) -> Iterator[Callable[[], None]]:
    """Have a helper process print what to do if this process is aborted inside.

    Yields a function that tells the helper to print nothing.
    """
    message = (
        "cifar_jax: error: this process was killed, or was ended because another one is gone "
        f"(the runtime's own messages are in {log}). Fix: {_how_to_go_on(workdir)}."
    )
    script = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
    # In a session of its own: a Ctrl-C is for the run, which reports it itself.
    with subprocess.Popen(
        [sys.executable, "-ISc", script, message], stdin=subprocess.PIPE, start_new_session=True
    ) as speaker:
        stdin = speaker.stdin
        assert stdin is not None

        def withhold() -> None:
            with contextlib.suppress(OSError):
                stdin.write(b"all is said")
                stdin.flush()

        try:
            yield withhold
        finally:
            withhold()
