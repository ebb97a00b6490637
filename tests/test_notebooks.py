"""Each notebook runs from top to bottom, in a real kernel; and so does the README's Python."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import cifar_jax.train
from cifar_jax.checkpoints import trained
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import TrainConfig
from cifar_jax.convert import ConvertOptions, convert
from cifar_jax.data import shapes
from cifar_jax.data.shapes import CLASS_NAMES

# Runs, images and steps, which are there for the pictures and the figures, give way to few: what
# runs is every line. Each stands in some notebook.
SMALLER = {
    r"epochs=\d+, max_train_examples=\d+": (
        "epochs=1, max_train_examples=100, batch_size=20, widths=(4, 6, 8)"
    ),
    r"\[:128\]": "[:16]",  # images of a step
    r"range\(41\)": "range(11)",  # steps, of which each tenth is printed
    r"range\(10\)": "range(1)",  # epochs beside PyTorch
}
FEW_SHAPES = "from cifar_jax.data import shapes; shapes.N_TRAIN, shapes.N_TEST = 300, 100"

README = Path(__file__).parent.parent / "README.md"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel of this environment, whatever kernels the user has installed.
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    text = path.read_text()
    for full, small in SMALLER.items():
        text = re.sub(full, small, text)
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_SHAPES))
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute(cwd=tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_all_that_is_made_smaller_stands_in_a_notebook() -> None:
    text = "".join(path.read_text() for path in NOTEBOOKS)
    assert all(re.search(full, text) for full in SMALLER)


def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is typed, but for the training, whose place a small network takes."""
    config = TrainConfig(model="linear")
    network = TrainedNetwork(config, CLASS_NAMES, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, {})
    variables = network.model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    network = dataclasses.replace(network, variables={"batch_stats": {}, **variables})

    def train(config: TrainConfig, workdir: str) -> dict[str, float]:
        trained.save(network, Path(workdir), source="a test")
        return {"test_accuracy": 0.1}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "N_TRAIN", 300)
    monkeypatch.setattr(shapes, "N_TEST", 20)
    monkeypatch.setattr(cifar_jax.train, "train_and_evaluate", train)
    run = Path("runs/20261122-101500-cnn")
    trained.save(network, run, source="a test")
    convert(run, Path("net.safetensors"), ConvertOptions())
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("epochs=2", 'epochs=1, model="linear"'), {})
    assert trained.load("runs/own-loop").n_params == 30730
