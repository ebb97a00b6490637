"""The sixty claims: all run, on little data, and each verdict follows from its numbers."""

from __future__ import annotations

import datetime
import io
import json
import math
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import EXPERIMENTS

from cifar_jax.data.dataset import Split
from cifar_jax.errors import CifarJaxError
from claims import CLAIMS, code
from claims.claim import CAVEAT, FAILS, HOLDS, from_json, to_json
from claims.markdown import bullets, listed, table
from claims.spread import spread_at
from claims.study import some_of

BY_QUESTION = {claim.question: claim for claim in CLAIMS}


def run(*arguments: str | Path) -> str:
    """What the command prints; in this process, where all that it needs is imported already."""
    main = runpy.run_path(str(EXPERIMENTS / "claims.py"), run_name="a_script")["main"]
    argv = ["claims.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def test_some_images_of_a_folder_are_of_all_classes_and_in_no_order() -> None:
    labels = np.repeat(np.arange(10, dtype=np.int32), 100)  # as a folder's images come
    split = Split(np.zeros((1000, 2, 2, 3), np.uint8), labels)
    chosen = some_of(split, 200).labels
    assert (np.bincount(chosen) == 20).all()
    assert len(set(chosen[:50])) == 10
    assert (some_of(split, 200).labels == chosen).all(), "always the same"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The rows of ``--quick``, by question."""
    output = tmp_path_factory.mktemp("claims") / "quick.json"
    command = [sys.executable, EXPERIMENTS / "claims.py", "--quick", "--output", output]
    first = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    long_ago = output.read_text().replace(datetime.date.today().isoformat(), "2001-02-03")
    output.write_text(long_ago)
    assert "question" not in run("--quick", "--output", output), "all of it is there"
    assert output.read_text() == long_ago, "what is not measured keeps its date"
    page = output.with_suffix(".md").read_text()
    rows = json.loads(output.read_text())["claims"]
    for row in rows:
        assert f"| [{row['question']}](#question-{row['question']}) |" in page
        assert f"\n### Question {row['question']}\n" in page
        assert row["evidence"] in page
        if row["figure"]:
            assert f"]({output.stem}/{Path(row['figure']).name})" in page
            assert (output.parent / row["figure"]).stat().st_size > 1000
    return {row["question"]: row for row in rows}


@pytest.mark.timeout(900)
def test_every_claim_gives_a_number_and_a_verdict(quick: dict[int, dict[str, Any]]) -> None:
    assert set(quick) == set(BY_QUESTION)
    for question, row in quick.items():
        assert row["verdict"] in (HOLDS, CAVEAT, FAILS), question
        assert any(map(_has_number, row["value"].values())), question
        assert len(row["method"]) > 80, question
        assert row["finding"].endswith("."), question
        assert "{" not in row["finding"] + row["evidence"], question
        assert len(row["evidence"]) > 40, question
        assert row["n"] >= 1, question
        assert row["command"] == f"python experiments/claims.py --only {question} --quick"
        path, line = row["source"].split("#L")
        assert "def measure" in (EXPERIMENTS.parent / path).read_text().splitlines()[int(line) - 1]
        # The refuting numbers have the form of the measured ones.
        assert set(BY_QUESTION[question].refuted_by) == set(row["value"]), question


def test_no_verdict_could_only_come_out_as_it_did() -> None:
    """Of the committed results: other numbers would have given another verdict."""
    results = EXPERIMENTS / "results"
    content = json.loads((results / "claims.json").read_text(), parse_constant=_refuse)
    assert [row["question"] for row in content["claims"]] == list(range(1, 61))
    for row in content["claims"]:
        assert row["figure"] is None or (results / row["figure"]).exists(), row["question"]
        claim = BY_QUESTION[row["question"]]
        assert set(claim.refuted_by) == set(row["value"]), row["question"]
        verdict = claim.judge(from_json(row["value"]))
        found = (verdict.verdict, verdict.finding, verdict.evidence)
        assert found == (row["verdict"], row["finding"], row["evidence"])
        assert claim.judge(claim.refuted_by).verdict != row["verdict"], row["question"]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_row_keeps_when_and_with_what_it_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "two.json"
    run("--quick", "--only", "2", "--output", output)
    (row,) = json.loads(output.read_text())["claims"]
    row["date"], row["data_name"], row["versions"]["jax"] = "2001-02-03", "other", "0.0.1"
    output.write_text(json.dumps({"claims": [row]}))
    run("--quick", "--only", "55", "--output", output)
    old, new = json.loads(output.read_text())["claims"]
    assert old == row
    assert new["versions"]["jax"] == jax.__version__
    assert new["date"] == datetime.date.today().isoformat()
    page = output.with_suffix(".md").read_text()
    assert "Measured on other or shapes, 2001-02-03 to " in page
    assert f"jax 0.0.1 or {jax.__version__}, torch " in page
    assert f", 2001-02-03 to {new['date']}, " in page


def test_markdown_is_what_it_shows() -> None:
    assert table(("a", "b|c"), [("1", "2*3")]) == "| a | b\\|c |\n|---|---|\n| 1 | 2\\*3 |"
    with pytest.raises(AssertionError):
        table(("a", "b"), [("1",)])
    assert bullets("one", "two") == "- one\n- two"
    assert [listed(range(n)) for n in (1, 2, 3)] == ["0", "0 and 1", "0, 1 and 2"]


def test_evidence_has_each_value_in_its_place() -> None:
    names = ("test", "test_permuted", "test_moved_4_pixels")
    values = {
        "weights_of_the_dense_layer": 196_608_000,
        "memory_mb": 786.4,
        "mlp": {name: spread_at(40 + i) for i, name in enumerate(names)},
        "cnn": {name: spread_at(60 - 8 * i) for i, name in enumerate(names)},
    }
    verdict = BY_QUESTION[1].judge(values)
    assert verdict.evidence.splitlines()[2:] == [
        "| `mlp` | 40.0 ± 0.5 % | 41.0 ± 0.5 % | -1.0 ± 1.1 | 42.0 ± 0.5 % |",
        "| `cnn` | 60.0 ± 0.5 % | 52.0 ± 0.5 % | +8.0 ± 1.1 | 44.0 ± 0.5 % |",
        "",
        "- weights of the Dense layer: 196.6 million, 786 MB",
    ]
    assert verdict.verdict == FAILS  # moved images cost the MLP less
    assert verdict.finding == "Moved images cost an MLP no more than a CNN."


def test_a_run_that_diverged_is_named_and_is_json() -> None:
    assert to_json({"a": [1.0, math.nan], "b": -math.inf}) == {"a": [1.0, None], "b": None}
    claim = BY_QUESTION[23]
    diverged = {**claim.refuted_by["pixels_0_255_sgd"], "first_layer_mean_in_stds": math.nan}
    values = {**claim.refuted_by, "pixels_0_255_sgd": diverged}
    stored = json.loads(json.dumps(to_json(values), allow_nan=False))
    evidence = claim.judge(from_json(stored)).evidence
    assert evidence == claim.judge(values).evidence
    (row,) = [line for line in evidence.splitlines() if "diverged" in line]
    assert row.startswith("| 0 to 255 |")
    assert row.count("diverged") == 1


def test_the_code_of_a_number_is_what_it_comes_from() -> None:
    """A change of anything else costs no measuring."""
    for claim in CLAIMS:
        found: dict[str, str] = {}
        code._reach(claim.measure.__module__, claim.measure.__name__, found)
        names = {where.rpartition(".")[2] for where in found}
        assert {"Measured", "Study", "fit"} <= names, claim.question  # through its annotations
        assert not {name for name in names if name.startswith("judge_")}, claim.question
        assert {name for name in names if name.startswith("measure_")} == {claim.measure.__name__}
        assert "CLAIMS" not in names
    assert len({code.code_of(claim.measure) for claim in CLAIMS}) == len(CLAIMS)


def _has_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and math.isfinite(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only 77 --output x.json", "--only 77"),
        ("--quick", "--quick would overwrite"),
        ("--quick --output other.json", "holds no claims"),
        ("--quick --output old.json", "holds no claims: KeyError.'data_name'"),
        ("--data none --output x.json", "does not exist"),
    ],
)
def test_wrong_use_is_one_line(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[]")
    row = json.loads((EXPERIMENTS / "results" / "claims.json").read_text())["claims"][0]
    del row["data_name"]  # as before 2026-11-28
    Path("old.json").write_text(json.dumps({"claims": [row]}))
    with pytest.raises(CifarJaxError, match=message) as told:
        run(*options.split())
    assert "\n" not in str(told.value)
