"""What the experiments' scripts share: wrong use, the command they time, runs that are kept."""

from __future__ import annotations

import json
import runpy
import subprocess
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
import scaling
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


def test_accuracies_are_told_with_their_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(command: list[str]) -> Any:
        seed, workdir = (command[command.index(name) + 1] for name in ("--seed", "--workdir"))
        Path(workdir).mkdir(parents=True)
        options = {"data": "here", "data_dir": "there", "seed": int(seed), "epochs": 10}
        Path(workdir, "config.json").write_text(json.dumps(options))
        found = {"test_accuracy": 0.7 + int(seed) / 50, "val_accuracy": 0.6, "data": "some"}
        found |= dict.fromkeys(("n_params", "n_train", "n_test", "device_kind", "versions"), 1)
        Path(workdir, "report.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    output = tmp_path / "out.json"
    argv = ["accuracy.py", "--output", str(output), "--workdirs", str(tmp_path), "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    accuracy.main()
    found = json.loads(output.read_text())
    assert found["test_accuracies"] == pytest.approx([0.7, 0.72, 0.74])
    assert (found["mean"], found["std"]) == pytest.approx((0.72, 0.02))  # of a sample
    assert (found["n"], found["config"]) == (3, {"epochs": 10})


def test_more_devices_are_predicted_from_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "make_program", lambda size, devices: size)
    monkeypatch.setattr(  # 2 ms and half of one an image
        scaling, "milliseconds", lambda sizes: {n: {"ms_median": 2 + n / 2} for n in sizes}
    )
    predicted = scaling.predict(10**9)
    assert len(predicted) == len(scaling.NETWORKS) * len(scaling.PREDICTED_DEVICES)
    for row in predicted:
        bandwidth, latency = scaling.NETWORKS[row["network"]]
        others = row["devices"] - 1
        exchange = 1e3 * 2 * others * (1e9 / row["devices"] / bandwidth + latency)
        ms = 2 + 512 / row["devices"] / 2 + exchange
        assert row["images_per_second"] == pytest.approx(512e3 / ms)
        assert row["efficiency"] == pytest.approx((2 + 512 / 2) / ms / row["devices"])


def test_a_step_exchanges_what_all_devices_must_have_the_same() -> None:
    assert scaling.exchanged_bytes() == 4 * (682_282 + 3)  # gradients, and three sums


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
        (file / "x.json", r"cannot write --output .*out.json/x.json: .* Fix: give another"),
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
    assert 100 < run.peak_mb < 10_000
    with pytest.raises(CifarJaxError, match="--no-such ended with 2"):
        first_step.train(["--no-such"], stop=True)


@pytest.fixture
def runs_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``time_to_75`` for given options; returns the ``--data`` of each of its trainings."""

    def call(*options: str | Path) -> list[list[str]]:
        trained: list[list[str]] = []

        def fast(program: str, seed: int, data: list[str]) -> dict[str, Any]:
            trained.append(data)
            accuracies = {"val_accuracy": [0.7, 0.8 - 0.1 * seed], "test_accuracy": 0.8 + seed / 50}
            return {"seconds": 1.0 + seed, **accuracies}

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
    (row,) = found["summary"]
    assert (row["n"], row["validated_at_75"], row["seconds_mean"]) == (3, 1, 2)
    assert row["test_accuracy_mean"] == pytest.approx(0.82)
    assert row["test_accuracy_std"] == pytest.approx(0.02)  # of a sample
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
