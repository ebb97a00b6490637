"""The training loop: epochs of steps, validated and saved, until the run is done or stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cifar_jax.checkpoints import checkpoint
from cifar_jax.checkpoints.network_metadata import Description, describe
from cifar_jax.checkpoints.workdir import write_config
from cifar_jax.config import TrainConfig
from cifar_jax.errors import Stopped
from cifar_jax.steps.metrics import (
    TABLE_HEADER,
    EpochRow,
    RunningSums,
    best_row,
    epochs_without_progress,
    table_row,
)
from cifar_jax.steps.parallel import sum_on_host
from cifar_jax.steps.train_step import Sums
from cifar_jax.system.files import write_atomically
from cifar_jax.system.stop_signals import StopSignals
from cifar_jax.training.distributed import agreed_signal, is_first, wait_for_all
from cifar_jax.training.events import event_log
from cifar_jax.training.finish import draw_curves, test_and_report
from cifar_jax.training.run import Progress, Run, diverged, versions
from cifar_jax.training.start import start

# Steps in flight before the host blocks on the oldest: enough to keep a device busy.
_STEPS_IN_FLIGHT = 2


def train_and_test(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Train from the start, or from the newest checkpoint, to the end; test; return the report."""
    run, progress = start(config, workdir)
    try:
        _train(run, progress)
    finally:
        if progress.history and is_first():
            draw_curves(run, progress)
    try:
        return test_and_report(run, progress)
    except (Stopped, KeyboardInterrupt) as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        raise _stopped(run, signum, "training is saved, the test was not run") from None


def _train(run: Run, progress: Progress) -> None:
    """Advance ``progress`` to the end of the last epoch, saving on the way.

    Raises:
        Stopped: a signal came; the run is saved a few steps later.
    """
    config = run.config
    _write_history(run, progress)
    if len(progress.history) < config.epochs:
        print(TABLE_HEADER, flush=True)
    events: contextlib.AbstractContextManager[Callable[[EpochRow], None]]
    events = contextlib.nullcontext(lambda row: None)
    if config.tensorboard and is_first():
        events = event_log(run.workdir / "tensorboard", progress.history)
    with StopSignals() as stop, events as add_event:
        while len(progress.history) < config.epochs:
            if 0 < config.early_stopping <= epochs_without_progress(progress.history):
                print(f"early stop: {config.early_stopping} epochs without a lower val loss")
                break
            signum = _train_epoch(run, progress, stop)
            ended = progress.step == (len(progress.history) + 1) * run.steps_per_epoch
            if ended:
                _validate(run, progress)
            path = _save(run, progress)  # first: printing fails if the reader of stdout is gone
            if ended:
                print(table_row(progress.history[-1]), flush=True)
                add_event(progress.history[-1])
            signum = signum or agreed_signal(stop.received)
            if signum is not None:
                raise _stopped(run, signum, f"step {progress.step} is saved in {path}")


def _stopped(run: Run, signum: int, what: str) -> Stopped:
    return Stopped(
        signum,
        f"{what}. Continue with: python -m cifar_jax.train --resume --workdir {run.workdir}",
    )


class _StepsInFlight:
    """Dispatched steps whose sums the host has not read yet.

    Attributes:
        signum: a signal that a finished step has reported; 0 for none.
    """

    def __init__(self, run: Run, sums: RunningSums) -> None:
        self.signum = 0
        self._run, self._sums = run, sums
        self._waiting: deque[tuple[int, Sums]] = deque()  # (steps done after them, sums)

    def add(self, step: int, sums: Sums) -> None:
        """Append ``sums``, of steps up to ``step``; wait for the oldest if there are many."""
        self._waiting.append((step, sums))
        self.settle(_STEPS_IN_FLIGHT)

    def settle(self, at_most: int = 0) -> None:
        """Wait until ``at_most`` are left; raises ``NumericsError`` if the loss has diverged."""
        while len(self._waiting) > at_most:
            step, sums = self._waiting.popleft()
            self.signum = self.signum or int(np.max(np.asarray(sums["signal"])))
            self._sums.add(sum_on_host(sums))
            losses = np.atleast_1d(np.asarray(sums["loss"]))
            for at_step, loss in enumerate(losses, step - len(losses) + 1):
                if not math.isfinite(loss):
                    raise diverged(
                        self._run,
                        f"the training loss is {loss} at step {at_step}, "
                        f"learning rate {self._run.schedule(at_step - 1):g}",
                    )


def _train_epoch(run: Run, progress: Progress, stop: StopSignals) -> int | None:
    """Train to the end of the epoch, or until soon after a signal; returns the signal."""
    save_every = run.config.checkpoint_every or run.steps_per_epoch
    step = progress.step
    first_step = len(progress.history) * run.steps_per_epoch
    last_step = first_step + run.steps_per_epoch
    in_flight = _StepsInFlight(run, progress.sums)
    started = time.perf_counter()
    with tqdm(
        total=run.steps_per_epoch,
        initial=step - first_step,
        desc=f"epoch {len(progress.history) + 1}/{run.config.epochs}",
        unit="steps",
        leave=False,
        # Silent where there is no terminal, and in all processes but one.
        disable=None if is_first() else True,
    ) as bar:
        while step < last_step and not in_flight.signum:
            next_save = min(last_step, step + save_every - (step - first_step) % save_every)
            progress.state, sums, done = run.advance(
                progress.state, step, next_save, stop.received or 0
            )
            step += done
            in_flight.add(step, sums)
            bar.update(done)
            if step == next_save < last_step:
                in_flight.settle()
                progress.seconds += time.perf_counter() - started
                _save(run, progress)
                started = time.perf_counter()  # do not count the save
        in_flight.settle()
    progress.seconds += time.perf_counter() - started
    return in_flight.signum or None


def _validate(run: Run, progress: Progress) -> None:
    """End an epoch: validate, append a row to the history, and reset the sums."""
    started = time.perf_counter()
    val = run.evaluate(progress.state.variables, run.dataset.val)
    progress.history.append(
        EpochRow(
            epoch=len(progress.history) + 1,
            step=progress.step,
            train_loss=progress.sums.mean_loss,
            train_accuracy=progress.sums.accuracy,
            val_loss=val.mean_loss,
            val_accuracy=val.accuracy,
            learning_rate=float(run.schedule(progress.step - 1)),
            images_per_second=progress.sums.count / progress.seconds,
            seconds=progress.seconds + time.perf_counter() - started,
        )
    )
    progress.sums, progress.seconds = RunningSums(), 0.0
    if not math.isfinite(val.loss):
        raise diverged(run, f"the validation loss is {val.loss} after step {progress.step}")


def _save(run: Run, progress: Progress) -> Path:
    state = jax.device_get(progress.state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        # The loss does not show this yet: it was computed before the update.
        raise diverged(run, f"a parameter is not finite after step {progress.step}")
    dataset = run.dataset
    description = Description(
        run.config, dataset.class_names, dataset.image_shape, dataset.mean, dataset.std
    )
    metadata = {
        **describe(description),
        "data": {"name": dataset.name, "digest": dataset.digest},
        "history": progress.history,
        "sums": dataclasses.asdict(progress.sums),
        "seconds": progress.seconds,
        "versions": versions(),
    }
    best_step = best_row(progress.history)["step"] if progress.history else 0
    if is_first():
        if not (run.workdir / "config.json").exists():
            print(f"warning: {run.workdir} was removed; creating it again")
            write_config(run.config, run.workdir)
        checkpoint.save(run.checkpoints, progress.step, state, metadata, best_step=best_step)
    wait_for_all(f"saved step {progress.step}")
    _write_history(run, progress)
    return run.checkpoints / str(progress.step)


def _write_history(run: Run, progress: Progress) -> None:
    """Rewrite ``metrics.jsonl`` from the history, so that no line is torn or duplicated."""
    if is_first():
        lines = "".join(json.dumps(row) + "\n" for row in progress.history)
        write_atomically(run.workdir / "metrics.jsonl", lines)
