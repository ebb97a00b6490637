"""Each notebook runs from top to bottom, in a real kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# Of the runs in them, which are there for the pictures.
FULL, SMALL = "epochs=6, max_train_examples=5000", "epochs=1, max_train_examples=500"

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
    notebook = nbformat.reads(path.read_text().replace(FULL, SMALL), as_version=4)
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute(cwd=tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
