"""The end of a training run: its curves, and its score on the test set."""

from __future__ import annotations

import json
import math
import os
import statistics
from typing import Any

import jax

from cifar_jax.checkpoints import checkpoint
from cifar_jax.errors import CifarJaxError
from cifar_jax.steps.metrics import best_row
from cifar_jax.steps.parallel import compiler_options, replicate
from cifar_jax.system.files import write_atomically
from cifar_jax.training.distributed import holds_for_all, is_first
from cifar_jax.training.run import Progress, Run, diverged, versions


def test_and_report(run: Run, progress: Progress) -> dict[str, Any]:
    """Score the best epoch on the test set, which was not used until now, and write the report."""
    config, dataset, history = run.config, run.dataset, progress.history
    best = best_row(history)
    state, problem = progress.state, ""
    try:
        state = checkpoint.restore(run.checkpoints / str(best["step"]), like=progress.state).state
    except CifarJaxError as error:
        problem = str(error)
    if not holds_for_all(not problem):  # all must score the same
        problem = problem or "Another process cannot read the best checkpoint."
        print(f"warning: {problem} The last epoch is scored instead.")
        best, state = history[-1], progress.state
    test = run.evaluate(replicate(state.variables, run.devices), dataset.test)
    if not math.isfinite(test.mean_loss):  # as with a logit that overflows for a test image alone
        raise diverged(run, f"the test loss is {test.mean_loss} with epoch {best['epoch']}")
    report = {
        "data": {"name": dataset.name, "digest": dataset.digest},
        "model": config.model,
        "n_params": progress.state.n_params,
        "n_train": len(dataset.train),
        "n_val": len(dataset.val),
        "n_test": len(dataset.test),
        "val_accuracy": best["val_accuracy"],
        "test_accuracy": test.accuracy,
        "test_loss": test.mean_loss,
        "test_correct": int(test.correct),
        "epochs": len(history),
        "steps": progress.step,
        "best_step": best["step"],
        "train_seconds": sum(row["seconds"] for row in history),
        # Epochs have equally many images, so the harmonic mean is total images over total time.
        "images_per_second": statistics.harmonic_mean(
            [row["images_per_second"] for row in history]
        ),
        "devices": len(run.devices),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": compiler_options(
            run.devices[0].platform, deterministic=config.deterministic
        ),
        "device_kind": run.devices[0].device_kind,
        "seed": config.seed,
        "versions": versions(),
        # After the last step, to compare with a resumed run; what was scored is best_step.
        "params_sha256": checkpoint.tree_sha256(jax.device_get(progress.state.params)),
    }
    if is_first():
        write_atomically(run.workdir / "report.json", json.dumps(report, indent=2) + "\n")
    print(
        f"test on {dataset.name}: accuracy {100 * test.accuracy:.2f} % ({test.correct:.0f} of "
        f"{test.count:.0f}), loss {test.mean_loss:.4f}, with epoch {best['epoch']}"
        f"{', the best by validation' if best == best_row(history) else ''}\n"
        f"in {run.workdir}: report.json, metrics.jsonl, config.json, plots/curves.png, checkpoints/"
    )
    return report


def draw_curves(run: Run, progress: Progress) -> None:
    from cifar_jax.scoring.plots import save_curves  # takes half a second, for matplotlib

    title = f"{run.config.model} on {run.dataset.name}"
    path = run.workdir / "plots" / "curves.png"
    try:
        save_curves(progress.history, title, path)
    except OSError as error:  # a full disk, for example, which the next save reports in full
        print(f"warning: cannot draw {path}: {error.strerror}")
