"""The date, machine and versions that a measurement is stored with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def environment(*packages: str) -> dict[str, Any]:
    """``date``, ``machine``, and ``versions`` of Python and of ``packages``.

    ``machine`` tells the processor, its cores and its vector instructions.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _processor() -> str:
    """Its name and its vector instructions, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    name = about.get("model name") or platform.processor() or "unknown processor"
    flags = about.get("flags", "").split()
    return next((f"{name}, {what}" for flag, what in _VECTORS if flag in flags), name)


# The widest first: times depend on them, and a name such as "AMD EPYC" does not tell them.
_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"))
