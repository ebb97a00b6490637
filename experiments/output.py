"""Where a measurement is written."""

from __future__ import annotations

from pathlib import Path

from cifar_jax.errors import UsageError
from cifar_jax.system.files import try_to_write, writing


def check_output(output: Path) -> None:
    """Create the folder of ``output``, and check before the work that a file can be written there.

    Raises:
        UsageError: it is a folder.
        ResourceError: nothing can be written there.
    """
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder", fix="name a file in it")
    with writing(f"--output {output}", "another"):
        try_to_write(output.parent)
