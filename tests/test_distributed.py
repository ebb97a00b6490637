"""Several real processes on this machine, as one run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.errors import CifarJaxError, DataError, ExitCode, Stopped
from cifar_jax.evaluate import EvaluateOptions, evaluate
from cifar_jax.steps.parallel import local_devices, local_rows, select_devices
from cifar_jax.steps.train_step import TrainState
from cifar_jax.train import train_and_evaluate
from cifar_jax.training import distributed
from cifar_jax.training import start as start_module
from cifar_jax.training.run import Progress

ROOT = Path(__file__).resolve().parents[1]
RUN = ("--model", "linear", "--batch-size", "16", "--epochs", "2", "--input", "device")


# `cifar_jax.train`, with less patience with the silence of others.
PATIENCE_SECONDS = 10
LAUNCH = f"""if True:
    from cifar_jax import cli, train
    from cifar_jax.training import distributed
    distributed._HEARTBEAT_SECONDS = {PATIENCE_SECONDS}
    cli.run(train.main)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def start(
    process_id: int,
    environment: dict[str, str],
    *options: str,
    launch: str = LAUNCH,
    where: Path | None = None,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", launch, *RUN, *options],
        env={**os.environ, **environment},
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(
    workdir: Path,
    *options: str,
    of_second: tuple[str, ...] = (),
    launch: str = LAUNCH,
    where: tuple[Path | None, Path | None] = (None, None),
    environments: tuple[dict[str, str], dict[str, str]] = ({}, {}),
) -> list[subprocess.Popen[str]]:
    address = f"localhost:{free_port()}"
    return [
        start(
            i,
            environments[i],
            *("--workdir", str(workdir), "--coordinator", address),
            *("--num-processes", "2", "--process-id", str(i)),
            *options,
            *(of_second if i else ()),
            launch=launch,
            where=where[i],
        )
        for i in range(2)
    ]


def wait_for_an_epoch(workdir: Path, processes: list[subprocess.Popen[str]]) -> None:
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):  # it is there, empty, from the start
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *both) for p, both in zip(processes, said, strict=True)]


@pytest.mark.long
@pytest.mark.fault("A11", "B1", "B5")
@pytest.mark.timeout(400)
def test_stopped_killed_and_resumed_elsewhere_it_is_the_same_run(tmp_path: Path) -> None:
    output = tmp_path / "processes.json"
    script = [sys.executable, str(ROOT / "experiments" / "processes.py"), "--output", str(output)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    first, second = found["stopped"]
    assert (first["exit"], second["exit"]) == (143, 143)
    assert first["said"] == second["said"], "both stop at the same step"
    assert "is saved in" in first["said"]
    assert found["survivor"]["exit"] in (ExitCode.ENVIRONMENT, -6)  # JAX may abort it first
    assert "--resume --workdir" in found["survivor"]["said"]
    assert found["survivor_seconds"] < distributed._HEARTBEAT_SECONDS
    assert found["last"]["exit"] == 0
    assert found["losses"] == pytest.approx(found["undisturbed_losses"], rel=1e-5)


def test_only_the_first_process_speaks_and_writes(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    first, second = finish(start_two(workdir, "--data", str(image_folder)))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "test on images" in first[1]
    assert second[1].splitlines() == [line for line in first[1].splitlines() if "starting" in line]
    assert first[2] == second[2] == ""
    assert not list(cache.iterdir()), "it would be of process 0 alone"
    report = json.loads((workdir / "report.json").read_text())
    assert report["processes"] == report["devices"] == 2
    config = TrainConfig(
        data=str(image_folder), model="linear", batch_size=16, epochs=2, input="device"
    )
    alone = train_and_evaluate(config, tmp_path / "alone")
    assert report["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)
    assert report["test_correct"] == alone["test_correct"]
    saved = json.loads((workdir / "config.json").read_text())
    assert not {"coordinator", "num_processes", "process_id"} & set(saved)


@pytest.mark.fault("B4")
@pytest.mark.parametrize(
    ("of_second", "named"),
    [
        (("--learning-rate", "0.1"), "process 1 differs from process 0 in its options.*0.1"),
        (("--data", "shapes"), "process 1 differs from process 0 in its data: shapes"),
    ],
)
def test_a_process_that_differs_is_named(
    of_second: tuple[str, ...], named: str, image_folder: Path, tmp_path: Path
) -> None:
    options = ("--data", str(image_folder), "--max-train-examples", "40")
    for code, _, error in finish(start_two(tmp_path / "run", *options, of_second=of_second)):
        assert code == ExitCode.USAGE, error
        assert re.search(named, error)
        assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.fault("B4")
def test_processes_compare_all_that_they_must_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def gather(fact: str) -> list[str]:
        compared.append(fact)
        return [fact, fact]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_gather", gather)
    monkeypatch.setattr(start_module, "wait_for_all", lambda where: None)
    split = Split(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32))
    dataset = Dataset("photos", "f00d", ("a", "b"), split, split, split, (0.5,) * 3, (0.2,) * 3)
    state: Any = TrainState(np.int32(7), {}, {}, ())
    config = TrainConfig(data="/elsewhere/photos")
    start_module._agree(config, tmp_path, dataset, Progress(state))
    said = "\n".join(compared)
    for fact in (
        '"optimizer": "adam"',
        f'"jax": "{jax.__version__}"',
        "photos f00d",
        "step 7",
        distributed._code_digest(),
    ):
        assert fact in said
    assert "elsewhere" not in said, "it may be another place on each machine"


def test_a_workdir_that_is_not_shared_is_noticed_before_training(
    image_folder: Path, tmp_path: Path
) -> None:
    of_second = ("--workdir", str(tmp_path / "elsewhere"))
    first, second = finish(
        start_two(tmp_path / "run", "--data", str(image_folder), of_second=of_second)
    )
    assert second[0] == ExitCode.ENVIRONMENT, second[2]
    assert "is not the folder that process 0 writes to" in second[2]
    assert first[0] in (ExitCode.ENVIRONMENT, -6)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fault("B4")
def test_processes_with_other_weights_do_not_train(image_folder: Path, tmp_path: Path) -> None:
    """The same option names another file on each machine."""
    config = TrainConfig(data=str(image_folder), model="linear", batch_size=16, epochs=1)
    machines = (tmp_path / "0", tmp_path / "1")
    for seed, machine in enumerate(machines):
        train_and_evaluate(dataclasses.replace(config, seed=seed), machine / "given")
    options = ("--data", str(image_folder), "--initial-weights", "given")
    for code, _, error in finish(start_two(tmp_path / "run", *options, where=machines)):
        assert code == ExitCode.USAGE, error
        assert "process 1 differs from process 0 in its weights at the start: SHA-256" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("unreadable_in", [0, 1])
def test_all_processes_score_the_same_network(
    unreadable_in: int, image_folder: Path, tmp_path: Path
) -> None:
    """Also where one of them cannot read the best checkpoint."""
    launch = f"""if True:
        import sys
        from cifar_jax import cli, train
        from cifar_jax.checkpoints import checkpoint
        from cifar_jax.errors import CheckpointError
        def unreadable(*arguments, **options):
            raise CheckpointError("it cannot be read", fix="wait")
        if sys.argv[sys.argv.index("--process-id") + 1] == "{unreadable_in}":
            checkpoint.restore = unreadable
        cli.run(train.main)
    """
    workdir = tmp_path / "run"
    # With such steps the first epoch is the best one.
    options = ("--data", str(image_folder), "--learning-rate", "1")
    first, second = finish(start_two(workdir, *options, launch=launch))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "The last epoch is scored instead." in first[1]
    report = json.loads((workdir / "report.json").read_text())
    last = evaluate(EvaluateOptions(str(workdir / "checkpoints" / str(report["steps"]))))
    assert report["test_correct"] == last["correct"]
    assert report["test_loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_a_process_of_several_devices_gives_each_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three each, two are asked for."""

    class Device(NamedTuple):
        process_index: int
        number: int

    of_processes = [[Device(process, number) for number in range(3)] for process in range(2)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    monkeypatch.setattr(jax, "devices", lambda: [*of_processes[0], *of_processes[1]])
    monkeypatch.setattr(jax, "local_devices", lambda process_index: of_processes[process_index])
    devices: Any = select_devices(2)
    assert devices == [*of_processes[0][:2], *of_processes[1][:2]]
    for process, rows in enumerate((slice(0, 8), slice(8, 16))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert local_devices(devices) == of_processes[process][:2]
        assert local_rows(16, devices) == rows


def test_unequal_numbers_of_devices_are_told(image_folder: Path, tmp_path: Path) -> None:
    environments = ({}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    run = (tmp_path / "run", "--data", str(image_folder))
    for code, _, error in finish(start_two(*run, environments=environments)):
        assert code == ExitCode.ENVIRONMENT, error
        assert "process 1 has 2 device(s), and process 0 has 1. Fix: give" in error
        assert error.count("\n") == 1


@pytest.mark.fault("B1")
def test_one_that_fails_alone_says_why_and_the_others_do_not_wait(
    image_folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    of_second = ("--data", str(tmp_path / "empty"))
    first, second = finish(
        start_two(tmp_path / "run", "--data", str(image_folder), of_second=of_second)
    )
    assert second[0] == ExitCode.DATA
    assert "empty" in second[2]
    assert first[0] in (ExitCode.ENVIRONMENT, -6)
    assert "another one" in first[2]
    assert "--resume" in first[2]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (Stopped(signal.SIGTERM, ""), 143),
        (DataError("what", fix="how"), ExitCode.DATA),
        (KeyError("a bug"), ExitCode.BUG),
    ],
)
def test_one_that_leaves_alone_has_the_exit_status_of_its_error(
    error: BaseException, status: int, tmp_path: Path
) -> None:
    script = (
        "import sys, threading; from cifar_jax.training import distributed;"
        "distributed._leave_alone_after(0.2, int(sys.argv[1])); print('the end');"
        "threading.Thread(target=threading.Event().wait).start()"  # never ends: as a lost peer
    )
    told = [sys.executable, "-c", script, str(int(distributed._exit_status(error)))]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "the end\n"), done.stderr


def test_two_processes_on_one_gpu_are_told_so_and_not_to_start_again(tmp_path: Path) -> None:
    message = (
        "INTERNAL: NCCL operation ncclCommInitRankConfig(...) failed: invalid usage. Last NCCL "
        "warning(error) log entry (may be unrelated) 'Duplicate GPU detected : rank 1 and rank 0'"
    )
    script = (
        "import sys, jax; from pathlib import Path; from cifar_jax import config\n"
        "from cifar_jax.training import distributed\n"
        "address, workdir, message = sys.argv[1:]\n"
        "c = config.TrainConfig(coordinator=address, num_processes=1, process_id=0)\n"
        "try:\n"
        "    with distributed.joined(c, Path(workdir)):\n"
        "        raise jax.errors.JaxRuntimeError(message)\n"
        "except distributed.CifarJaxError as error:\n"
        "    print(error.exit_code, error)"
    )
    told = [sys.executable, "-c", script, f"localhost:{free_port()}", str(tmp_path), message]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60)
    assert f"\n{int(ExitCode.ENVIRONMENT)} process 0 shares a GPU with" in done.stdout, done
    assert "JAX_LOCAL_DEVICE_IDS" in done.stdout
    assert "--resume" not in done.stdout


@pytest.mark.fault("A17", "B5")
def test_a_signal_to_one_stops_both_at_the_same_step(image_folder: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    processes = start_two(workdir, "--data", str(image_folder), "--epochs", "100000")
    wait_for_an_epoch(workdir, processes)
    locks = [lock.read_text() for lock in workdir.glob(".lock")]
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish(processes)
    assert (first[0], second[0]) == (143, 143), (first, second)
    assert locks == [f"process {processes[0].pid} on {socket.gethostname()}\n"]
    (stopped,) = {
        re.search(r"SIGTERM: step \d+ is saved", said)[0] for _, _, said in (first, second)
    }  # type: ignore[index]
    assert int(re.findall(r"\d+", stopped)[0]) == max(map(int, os.listdir(workdir / "checkpoints")))


@pytest.mark.fault("B5")
def test_a_signal_to_one_is_a_signal_to_all_between_epochs_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda x: np.stack([x, signal.SIGTERM])
    )
    assert distributed.agreed_signal(None) == signal.SIGTERM


@pytest.mark.fault("B2")
def test_when_the_first_process_dies_the_others_say_how_to_go_on(
    image_folder: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    processes = start_two(workdir, "--data", str(image_folder), "--epochs", "100000")
    wait_for_an_epoch(workdir, processes)
    processes[0].kill()
    killed_at = time.monotonic()
    _, second = finish(processes)
    assert time.monotonic() - killed_at < PATIENCE_SECONDS
    assert second[0] in (ExitCode.ENVIRONMENT, -6)
    assert f"--resume --workdir {workdir}" in second[2]


@pytest.mark.parametrize(
    ("cluster", "per_process"),
    [
        (
            {"OMPI_MCA_orte_hnp_uri": "{job}.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"},
            {"OMPI_COMM_WORLD_RANK": "{i}", "OMPI_COMM_WORLD_LOCAL_RANK": "{i}"},
        ),
        (
            {
                "SLURM_JOB_ID": "{job}",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            {"SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}"},
        ),
    ],
)
def test_clusters_are_detected(
    cluster: dict[str, str], per_process: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    job = str(free_port())  # the clusters' port follows from the number of the job
    options = ("--data", str(image_folder), "--workdir", str(tmp_path / "run"))
    processes = []
    for i in range(2):
        variables = {**cluster, **per_process}
        environment = {name: value.format(i=i, job=job) for name, value in variables.items()}
        processes.append(start(i, environment, *options, "--coordinator", "auto"))
    for code, _, error in finish(processes):
        assert code == 0, error
    assert json.loads((tmp_path / "run" / "report.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        (
            {
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_NUM_NODES": "1",
            },
            False,
        ),
        ({"CUDA_VISIBLE_DEVICES": "3"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "3", "JAX_LOCAL_DEVICE_IDS": "0"}, False),
        ({}, False),
    ],
)
def test_a_task_may_be_alone_with_its_gpus(environment: dict[str, str], alone: bool) -> None:
    assert distributed._has_all_gpus_it_sees(environment) == alone


@pytest.mark.parametrize(("nodes", "used"), [("1", "all"), ("2", "1")])
def test_a_task_that_is_alone_with_its_gpus_uses_all_of_them(nodes: str, used: str) -> None:
    """The task is number 1 on its machine, and JAX by itself would take GPU 1."""
    script = (
        "import jax; from cifar_jax import config; from cifar_jax.training import distributed;"
        "distributed._meet(config.TrainConfig(coordinator='auto'));"
        "print(jax.config.read('jax_cuda_visible_devices'))"
    )
    environment = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NUM_NODES": nodes,
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{used}\n"), done.stderr


@pytest.mark.fault("B3")
def test_no_cluster_is_said(tmp_path: Path) -> None:
    (found,) = finish([start(0, {}, "--workdir", str(tmp_path / "run"), "--coordinator", "auto")])
    assert found[0] == ExitCode.ENVIRONMENT
    assert "--coordinator auto: the processes cannot meet" in found[2]
    assert "srun" in found[2]
    assert found[2].count("\n") == 1


@pytest.mark.fault("B3")
def test_a_coordinator_that_does_not_answer_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "_MEETING_SECONDS", 0.3)
    with pytest.raises(CifarJaxError, match=r"no process 0 there after 0.3 s") as caught:
        distributed._wait_for_coordinator(f"localhost:{free_port()}")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.fault("B3")
def test_the_first_process_does_not_wait_long_for_the_others(tmp_path: Path) -> None:
    launch = LAUNCH.replace(f"_HEARTBEAT_SECONDS = {PATIENCE_SECONDS}", "_MEETING_SECONDS = 2")
    assert launch != LAUNCH
    address = f"localhost:{free_port()}"
    options = ("--workdir", str(tmp_path / "run"), "--coordinator", address)
    alone = start(0, {}, *options, "--num-processes", "2", "--process-id", "0", launch=launch)
    ((code, said, error),) = finish([alone])
    assert code == ExitCode.ENVIRONMENT, error
    assert said.endswith(f"waiting for the others at {address} ...\n")
    assert "not all processes came within 2 s; --num-processes is 2. Fix: start" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "here"}, "--coordinator here is not HOST:PORT"),
        ({"coordinator": "here:0"}, "is not HOST:PORT"),
        ({"coordinator": "here:80"}, "without --num-processes and --process-id"),
        ({"coordinator": "h:80", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
        ({"num_processes": 2}, "without the address of a --coordinator"),
        ({"coordinator": "auto", "process_id": 0}, "without the address of a --coordinator"),
        (
            {"coordinator": "h:80", "num_processes": 3, "process_id": 0, "devices": 2},
            "128 does not divide over 6 device.*126 or 132",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CifarJaxError, match=message):
        dataclasses.replace(TrainConfig(), **options)
