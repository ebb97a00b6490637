"""The author's own script on the same data: ``python -m airbench.author SCRIPT DATA N OUTPUT``.

For ``airbench94_muon.py`` of https://github.com/KellerJordan/cifar10-airbench (commit f1c599c),
which needs torch and torchvision. Its network is compiled and warmed up as in the script itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.system.files import write_atomically


def main() -> None:
    script, data, n, output = sys.argv[1:]
    import torch

    # How much the compiler tries.
    settings = {k: v for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_MAX_AUTOTUNE")}
    found: dict[str, Any] = {"torch": torch.__version__, **settings, "runs": []}
    arrays = np.load(data)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            # It whitens by the first 5,000 images, which must have all classes.
            order = np.random.default_rng(0).permutation(len(labels))
            tensors = {
                "images": torch.tensor(images[order]),
                "labels": torch.tensor(labels[order]).long(),
                "classes": [],
            }
            torch.save(tensors, Path(folder) / "cifar10" / f"{split}.pt")
        os.chdir(folder)
        sys.argv = [script]  # it reads its own source from here
        spec = importlib.util.spec_from_file_location("author", script)
        assert spec is not None
        assert spec.loader is not None
        author = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(author)

        last: dict[str, Any] = {}
        vars(author)["print_training_details"] = lambda found, is_final_entry: last.update(found)
        model = author.CifarNet().cuda().to(memory_format=torch.channels_last)
        model.compile(mode="max-autotune")
        started = time.perf_counter()
        author.main("warmup", model)
        found["warmup_seconds"] = time.perf_counter() - started
        print(f"  compiled and warmed up in {found['warmup_seconds']:.0f} s", flush=True)
        for run in range(int(n)):
            accuracy = author.main(run, model)
            found["runs"].append({"accuracy": accuracy, "seconds": last["time_seconds"]})
            write_atomically(Path(output), json.dumps(found))


if __name__ == "__main__":
    main()
