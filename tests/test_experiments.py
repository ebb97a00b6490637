"""What the experiments' scripts share: wrong use, the command they time, runs that are kept."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS

import accuracy
import bench_cpu
import cpu_gains
import first_step
import machine
import time_to_75
from cifar_jax.errors import CifarJaxError, ExitCode

SCRIPTS = sorted(path for path in EXPERIMENTS.glob("*.py") if "cli.run(main)" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_wrong_options_are_told_in_one_line(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--no-such"])
    with pytest.raises(CifarJaxError, match=r"--output|--no-such") as told:
        runpy.run_path(str(script), run_name="a_script")["main"]()
    assert told.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("script", ["processes", "scaling", "soak", "streaming"])
def test_no_trial_overwrites_the_committed_results(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(CifarJaxError, match="required: --output"):
        runpy.run_path(str(EXPERIMENTS / f"{script}.py"), run_name="a_script")["main"]()


@pytest.mark.parametrize("option", ["--seed", "--workdir"])
def test_what_is_another_for_each_run_is_not_taken_for_all(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["accuracy.py", "--output", "x.json", "--data", "shapes", f"{option}=7"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(CifarJaxError, match=f"{option} is another for each run.*give {option}s"):
        accuracy.main()


@pytest.mark.parametrize(
    ("script", "work"),
    [(bench_cpu, "bench.steps.measure"), (cpu_gains, "paired_timing.time_in_turn")],
)
def test_the_folder_of_the_results_is_made_before_the_work(
    script: Any, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    monkeypatch.setattr(work, begin)
    file = tmp_path / "new" / "out.json"
    monkeypatch.setattr(sys, "argv", ["script", "--output", str(file)])
    with pytest.raises(Begun):
        script.main()
    assert file.parent.is_dir()
    file.touch()
    for output, told in (
        (file.parent, "--output .*new is a folder"),
        (file / "x.json", r"--output .*out.json/x.json cannot be written: .* Fix: give another"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", "--output", str(output)])
        with pytest.raises(CifarJaxError, match=told):
            script.main()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("fpu avx2 avx512f", "Some EPYC, AVX-512"),
        ("fpu avx2", "Some EPYC, AVX2"),
        ("fpu", "Some EPYC"),
    ],
)
def test_a_machine_is_told_with_its_cores_and_vector_instructions(
    flags: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some EPYC\nflags\t\t: {flags}\n")
    monkeypatch.setattr(machine, "Path", lambda _: cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = machine.environment("jax")
    assert found["machine"] == f"x86_64, 2 cores, {told}"
    assert set(found) == {"date", "machine", "versions"}
    assert set(found["versions"]) == {"python", "jax"}


def test_a_command_is_timed_to_its_first_step(tmp_path: Path) -> None:
    options = ["--data", "shapes", "--max-train-examples", "200", "--model", "linear"]
    options += ["--epochs", "100000", "--workdir", str(tmp_path / "run")]
    run = first_step.train(options, stop=True)
    assert 0 < run.to_first_step < run.seconds
    assert run.peak_mb > 100
    with pytest.raises(CifarJaxError, match="--no-such ended with 2"):
        first_step.train(["--no-such"], stop=True)


@pytest.fixture
def runs_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``time_to_75`` for given options; returns the ``--data`` of each of its trainings."""

    def call(*options: str | Path) -> list[list[str]]:
        trained: list[list[str]] = []

        def fast(program: str, seed: int, data: list[str]) -> dict[str, Any]:
            trained.append(data)
            return {"seconds": 1.0, "val_accuracy": [0.8], "test_accuracy": 0.8}

        monkeypatch.setattr(time_to_75, "_fast", fast)
        argv = ["time_to_75.py", "--torch-seeds", "0", *map(str, options)]
        monkeypatch.setattr(sys, "argv", argv)
        time_to_75.main()
        return trained

    return call


def test_data_by_name_stay_a_name_and_a_path_holds_from_anywhere(
    runs_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos", "frog").mkdir(parents=True)
    Path("cifar10").mkdir()  # as in cifar_jax.train, the name is meant
    for given, passed in (("cifar10", "cifar10"), ("photos", str(tmp_path / "photos"))):
        output = f"{given}.json"
        assert runs_of("--data", given, "--seeds", 1, "--output", output) == [["--data", passed]]
    with pytest.raises(CifarJaxError, match="--data none does not exist"):
        runs_of("--data", "none", "--output", "none.json")


def test_runs_are_gone_on_with_on_the_same_data_machine_and_versions_alone(
    runs_of: Any, tmp_path: Path
) -> None:
    output = tmp_path / "runs.json"
    assert len(runs_of("--data", "shapes", "--seeds", 1, "--output", output)) == 1
    assert len(runs_of("--data", "shapes", "--seeds", 3, "--output", output)) == 2
    found = json.loads(output.read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    with pytest.raises(CifarJaxError, match=r"holds runs of data shapes, and these are of auto"):
        runs_of("--data", "auto", "--seeds", 4, "--output", output)
    assert found["machine"] == machine.environment()["machine"]
    without_architecture = found["machine"].partition(", ")[2]  # as files of before have it
    output.write_text(json.dumps({**found, "machine": without_architecture}))
    assert len(runs_of("--data", "shapes", "--seeds", 4, "--output", output)) == 1
    output.write_text(json.dumps({**found, "machine": "another"}))
    with pytest.raises(CifarJaxError, match=r"holds runs of machine another"):
        runs_of("--data", "shapes", "--seeds", 4, "--output", output)
    output.write_text(json.dumps({**found, "versions": {"python": "3.9"}}))
    with pytest.raises(CifarJaxError, match=r"holds runs of versions .*3.9"):
        runs_of("--data", "shapes", "--seeds", 4, "--output", output)
    output.write_text("[]")
    with pytest.raises(CifarJaxError, match=r"holds no runs"):
        runs_of("--data", "shapes", "--output", output)
