"""The machine that numbers are measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name and its vector instructions, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    name = about.get("model name") or platform.processor() or "unknown processor"
    flags = about.get("flags", "").split()
    return next((f"{name}, {what}" for flag, what in _VECTORS if flag in flags), name)


# From the widest on: a name such as "AMD EPYC" says nothing of them, and times depend on them.
_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"))
