"""Where a run keeps its checkpoints; for commands that answer before JAX is there, too."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"  # written last: a step's folder without one is no checkpoint


def checkpoints_of(workdir: Path) -> Path:
    """The folder of a run's checkpoints, one folder ``<step>`` each."""
    return workdir / "checkpoints"


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    manifests = checkpoints.glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in manifests if path.parent.name.isdecimal())


def is_step(path: Path) -> bool:
    """Whether ``path`` is one step's folder, and no workdir."""
    return (path / MANIFEST).is_file()


def workdir_of(path: Path) -> Path:
    """The workdir of a run: ``path`` itself, or what one step's folder belongs to."""
    return path.resolve().parents[1] if is_step(path) else path
