"""What XLA made of each layout."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from layouts.timings import compile_jax_step


def inspect_hlo(quick: bool) -> dict[str, Any]:
    """What is in the optimized program of a train step, for each layout."""
    found: dict[str, Any] = {}
    for model in ("cnn",) if quick else ("cnn", "cnn-wide", "resnet9"):
        found[model] = {}
        for name in ("NHWC", "NCHW"):
            spec = {"model": model, "layout": name, "batch_size": 128}
            compiled, _, _ = compile_jax_step(spec, "train")
            text: Any = compiled.as_text()
            cost: Any = compiled.cost_analysis()
            memory: Any = compiled.memory_analysis()
            found[model][name] = {
                **count_moves(text),
                "flops": cost["flops"],
                "bytes_accessed": cost["bytes accessed"],
                "temporaries_mb": memory.temp_size_in_bytes / 2**20,
            }
    return found


def count_moves(hlo: str) -> dict[str, Any]:
    """Transposes and copies in the text of an optimized program, and the elements they move.

    A fused transpose costs no pass over memory of its own; it is counted all the same.
    """
    counts: dict[str, Any] = {}
    for instruction, plural in (("transpose", "transposes"), ("copy", "copies")):
        shapes = re.findall(rf"= \w+\[([\d,]*)\]\S* {instruction}\(", hlo)
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
        counts[plural] = len(sizes)
        counts[f"elements_in_{plural}"] = sum(sizes)
    return counts
