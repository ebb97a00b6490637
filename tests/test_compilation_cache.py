"""Compiled programs are kept, in a folder that is nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cifar_jax.data.sources import check_source
from cifar_jax.errors import CifarJaxError
from cifar_jax.system import compilation_cache
from cifar_jax.system.compilation_cache import use_compilation_cache

SET_UP = (
    "from cifar_jax.system.compilation_cache import use_compilation_cache; use_compilation_cache()"
)
COMPUTE = "print(jax.jit(lambda x: 2 * x + 1)(20.5))"
PROGRAM = f"{SET_UP}; import jax; {COMPUTE}"
JAX_FIRST = f"import jax; {SET_UP}; {COMPUTE}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home where nothing is said of a folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # this process goes on
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run_program(program: str = PROGRAM) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.fault("B13")
@pytest.mark.parametrize("program", [PROGRAM, JAX_FIRST])
def test_programs_are_kept_for_the_next_command(
    program: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    assert run_program(program) == "42.0\n"
    (folder,) = (home / ".cache" / "cifar_jax").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (kept,) = folder.glob("jit__lambda*-cache")
    compiled = kept.read_bytes()
    kept.write_bytes(compiled[: len(compiled) // 2])  # as of a kill
    assert run_program(program) == "42.0\n"


SEVERAL_DEVICES = """if True:
    import numpy as np
    from cifar_jax.steps.parallel import AXIS_NAME, compile_step, select_devices
    import jax
    def step(state, batch):
        return jax.lax.pmean(state + batch["x"].mean(), AXIS_NAME)
    for n in (2, 1):
        batch = {"x": np.ones((n, 4), np.float32)}
        devices = select_devices(n)
        compiled = compile_step(step, np.float32(1), batch, devices, donate_state=False)
        assert float(compiled(np.float32(1), batch)) == 2
"""


def test_no_program_of_several_cpu_devices_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back, XLA mixes up the sums in its loops."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    run_program(f"{SET_UP}\n{SEVERAL_DEVICES}")
    assert len(list(home.rglob("jit__fun-*-cache"))) == 1, "that of one device"


def test_each_kind_of_processor_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home may be shared by several, and a program is made for one."""
    folders = set()
    for flags in ("avx2", "avx2 avx512f"):
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: f"flags\t: {flags}\n")
        folders.add(compilation_cache._own_folder())
    assert len(folders) == 2


def test_the_oldest_are_deleted_where_all_take_too_much(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilation_cache()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    for age in range(5):
        (folder / str(age)).write_bytes(bytes(10_000))
        os.utime(folder / str(age), (1e9 - age, 1e9 - age))
    of_a_gpu = folder / "xla_gpu_per_fusion_autotune_cache_dir"
    (of_a_gpu / "one").mkdir(parents=True)
    (of_a_gpu / "one" / "fusion").write_bytes(bytes(20_000))
    os.utime(of_a_gpu, (1e9 - 2.5, 1e9 - 2.5))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 45_000)
    use_compilation_cache()
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2"}
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder), "it is in use all the same"


def test_a_home_that_cannot_be_written_is_done_without(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").write_text("in the way")
    use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_without_a_home_it_is_done_without(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user of a container that is not in its list of users."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    with pytest.raises(CifarJaxError, match="--data ~nobody-of-that-name/x does not exist"):
        check_source("~nobody-of-that-name/x")


def test_a_folder_that_is_named_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "mine"))
    use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(home / "mine")
    assert [path.name for path in home.rglob("*")] == ["mine"]


def test_a_named_folder_that_others_have_filled_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "theirs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    program = (
        "import errno, os, sys; from cifar_jax.system import compilation_cache\n"
        "def refuse(folder): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))\n"
        "if sys.argv[1:]: compilation_cache.try_to_write = refuse\n"
        f"{SET_UP}\nimport jax\n"
        "jax.monitoring.register_event_listener(lambda event, **_: print(event.split('/')[-1]))\n"
        f"{COMPUTE}"
    )
    run = [sys.executable, "-c", program]
    first = subprocess.run(run, capture_output=True, text=True)
    assert "cache_misses" in first.stdout
    written = sorted(home.rglob("*"))
    second = subprocess.run([*run, "unwritable"], capture_output=True, text=True)
    assert "cache_hits" in second.stdout
    assert "cache_misses" not in second.stdout
    assert second.stderr == (
        f"warning: JAX_COMPILATION_CACHE_DIR {home}/theirs cannot be written: Permission denied; "
        "new programs are not cached\n"
    )
    assert sorted(home.rglob("*")) == written


@pytest.mark.fault("B13")
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(
    mode: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "open").mkdir()
    (home / "open").chmod(mode)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "open"))
    with pytest.raises(CifarJaxError, match=r"open can be written by others.* Fix: chmod go-w"):
        use_compilation_cache()


def test_no_folder_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(compilation_cache, "try_to_write", lambda folder: 1 / 0)
    use_compilation_cache()


@pytest.mark.fault("B13")
@pytest.mark.parametrize("program", [PROGRAM, JAX_FIRST])
def test_a_named_folder_that_cannot_be_written_is_done_without(
    program: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, where JAX would warn of each program that it reads or writes."""
    (home / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "file" / "mine"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "42.0\n"
    assert done.stderr == (
        f"warning: JAX_COMPILATION_CACHE_DIR {home}/file/mine cannot be written: Not a directory; "
        "each program is compiled anew\n"
    )
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("42.0\n", "")
