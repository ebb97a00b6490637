from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.system import lock
from cifar_jax.system.lock import alone_in, locked

HOLD = """if True:
    import sys, time
    from pathlib import Path
    from cifar_jax.system.lock import locked
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(100)
"""
COUNT = """if True:
    import sys
    from pathlib import Path
    from cifar_jax.errors import CifarJaxError
    from cifar_jax.system.lock import locked
    counter, left = Path(sys.argv[1]) / "counter", 50
    while left:
        try:
            with locked(counter.parent):
                counter.write_text(str(int(counter.read_text()) + 1))
                left -= 1
        except CifarJaxError:
            pass
"""


@pytest.mark.fault("A17")
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".lock").write_text(f"process 123456789 on {'a' * 99}\n")  # of one that was killed
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    started = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-m", "cifar_jax.train", "--data", "shapes", "--workdir", str(workdir)],
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - started < 20, "it does not wait"
    assert second.returncode == ExitCode.ENVIRONMENT
    holder = f"process {first.pid} on {socket.gethostname()}"
    assert f"--workdir {workdir} is locked by {holder}. Fix: " in second.stderr
    assert second.stderr.count("\n") == 1
    assert second.stdout == "", "before anything slow is started"
    first.kill()
    first.communicate()
    with locked(workdir):
        (workdir / "config.json").touch()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


@pytest.mark.fault("A17")
def test_the_lock_excludes_also_while_it_changes_hands(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "150"


def test_folders_in_which_nothing_came_about_are_taken_away_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with locked(runs / "a"):
        assert (runs / "a").is_dir()
        with locked(runs / "b"):
            pass
        assert [path.name for path in runs.iterdir()] == ["a"]
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("A18")
@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CifarJaxError, match=r"--workdir .*run cannot be written: ") as caught,
        locked(tmp_path / folder),
    ):
        pass
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def flock_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.fault("A17")
def test_where_the_file_system_has_no_locks_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flock_fails(monkeypatch, errno.ENOLCK)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    warning = f"warning: no lock on {tmp_path / 'run'}, whose file system has none\n"
    assert capsys.readouterr().out == warning


@pytest.mark.fault("A17")
def test_another_failure_to_lock_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock_fails(monkeypatch, errno.EIO)
    with pytest.raises(CifarJaxError, match="cannot be written: Input"), locked(tmp_path / "run"):
        pass


def test_an_empty_folder_is_left_to_whom_it_belongs(tmp_path: Path) -> None:
    with locked(tmp_path / "made"):
        pass
    (tmp_path / "own").mkdir()
    with locked(tmp_path / "own"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_name_that_no_checkpoint_can_have_is_refused_at_once(tmp_path: Path) -> None:
    workdir = tmp_path / os.fsdecode(b"w\xff") / "run"
    with pytest.raises(CifarJaxError, match=r"w.udcff/run .* not a UTF-8 path"), locked(workdir):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(20)  # in the main thread, where a wait for itself can be ended
def test_a_data_dir_may_be_the_workdir(tmp_path: Path) -> None:
    with locked(tmp_path), alone_in(tmp_path, "extracting") as alone:
        assert alone


def test_a_lock_file_that_was_taken_away_is_not_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert lock._is_file_of(file.fileno(), path)
        path.unlink()
        assert not lock._is_file_of(file.fileno(), path)
        path.touch()
        assert not lock._is_file_of(file.fileno(), path)
