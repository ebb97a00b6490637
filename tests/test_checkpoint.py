from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore

from cifar_jax.checkpoints import checkpoint
from cifar_jax.checkpoints.checkpoint import restore, restore_newest, save, tree_sha256
from cifar_jax.checkpoints.workdir import saved_steps
from cifar_jax.errors import CifarJaxError, ExitCode, Stopped
from cifar_jax.steps.train_step import TrainState
from cifar_jax.system.files import write_atomically


def make_state(step: int, width: int = 3) -> TrainState:
    params = {"Dense_0": {"kernel": np.arange(width, dtype=np.float32) + step}}
    opt_state = jax.device_get(optax.adam(1e-3).init(params))
    return TrainState(np.array(step, np.int32), params, {}, opt_state)


def save_steps(folder: Path, *steps: int, best: int = 0) -> None:
    for step in steps:
        save(folder, step, make_state(step), {"history": [step]}, best_step=best)


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    metadata = {"history": [{"loss": 0.1}], "mean": (0.5, 0.25), "sums": {"loss": 1 / 3}}
    path = save(tmp_path, 7, make_state(7), metadata, best_step=0)
    assert path == tmp_path / "7"
    restored = restore(path, like=make_state(0))
    assert_equal(restored.state, make_state(7))
    assert restored.metadata == {**metadata, "mean": [0.5, 0.25]}
    shapes = jax.eval_shape(lambda: make_state(0))
    assert_equal(restore(path, like=shapes).state, make_state(7))
    assert checkpoint.restore_metadata(path) == restored.metadata


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    save_steps(tmp_path, 30, 40, 50, best=20)
    assert saved_steps(tmp_path) == [20, 40, 50]


def test_an_old_one_that_cannot_be_deleted_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network disk keeps a deleted file that is open, in its folder."""
    save_steps(tmp_path, 10, 20)

    def busy(path: str, **options: int) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        save_steps(tmp_path, 30, 40)
    assert saved_steps(tmp_path) == [30, 40]
    save_steps(tmp_path, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["40", "50"]


@pytest.mark.fault("A20", "A21")
def test_steps_are_ordered_as_numbers_and_strangers_ignored(tmp_path: Path) -> None:
    save_steps(tmp_path, 9, 10)
    (tmp_path / "11").mkdir()  # empty: no checkpoint
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").write_text("x")
    newest, rejected = restore_newest(tmp_path, make_state(0))
    assert newest is not None
    assert newest.metadata["history"] == [10]
    assert rejected == []
    save_steps(tmp_path, 11, 12)  # over the empty folder and the leftover
    assert saved_steps(tmp_path) == [11, 12]
    assert_equal(restore(tmp_path / "12", make_state(0)).state, make_state(12))


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert restore_newest(tmp_path / "none", make_state(0)) == (None, [])


def data_files(step: Path) -> list[Path]:
    return [f for f in (step / "state").rglob("*") if f.is_file() and "/d/" in str(f)]


def flip_a_bit(step: Path) -> None:
    """In each data file, of which some hold the numbers."""
    for file in data_files(step):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def truncate(step: Path) -> None:
    for file in data_files(step):
        file.write_bytes(file.read_bytes()[:-5])


def drop_the_metadata(step: Path) -> None:
    shutil.rmtree(step / "metadata")


def damage_the_manifest(step: Path) -> None:
    (step / "manifest.json").write_text("{")


def be_of_other_software(step: Path) -> None:
    """Files that are those of the manifest, and nothing that Orbax reads."""
    (step / "metadata" / "metadata").write_text("no JSON")
    digests = checkpoint._file_digests(step)
    (step / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.fault("A7")
@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, truncate, drop_the_metadata, damage_the_manifest, be_of_other_software],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    save_steps(tmp_path, 10, 20)
    damage(tmp_path / "20")
    newest, rejected = restore_newest(tmp_path, make_state(0))
    assert newest is not None
    assert_equal(newest.state, make_state(10))
    (error,) = rejected
    assert str(tmp_path / "20") in str(error)
    assert "\n" not in str(error)
    # The run comes by again, and saves over the damage, which is kept aside.
    save_steps(tmp_path, 20)
    assert_equal(restore(tmp_path / "20", make_state(0)).state, make_state(20))
    assert (tmp_path / "20.damaged").is_dir()
    assert checkpoint.strangers(tmp_path) == []
    damage(tmp_path / "20")  # once more
    newest, _ = restore_newest(tmp_path, make_state(0))
    assert newest is not None
    assert newest.path == tmp_path / "10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20.damaged"]


@pytest.mark.fault("A7")
def test_no_file_can_change_or_go_unnoticed(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    for file in [f for f in (tmp_path / "10").rglob("*") if f.is_file() and f.stat().st_size]:
        content = file.read_bytes()
        file.write_bytes(bytes([content[0] ^ 4]) + content[1:])
        with pytest.raises(CifarJaxError, match=file.name):
            restore(tmp_path / "10", make_state(0))
        file.unlink()
        with pytest.raises(CifarJaxError, match=f"{file.name} (is not the file|cannot be read)"):
            restore(tmp_path / "10", make_state(0))
        file.write_bytes(content)
    restore(tmp_path / "10", make_state(0))


@pytest.mark.fault("A2")
def test_a_save_that_was_cut_short_before_its_manifest_is_none(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "manifest.json").unlink()
    newest, rejected = restore_newest(tmp_path, make_state(0))
    assert newest is not None
    assert newest.path == tmp_path / "10"
    assert rejected == []
    save_steps(tmp_path, 20)
    assert_equal(restore(tmp_path / "20", make_state(0)).state, make_state(20))


# Saves step 20 beside step 10, and on the way meets with an accident.
SAVE = """if True:
    import os, resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from test_checkpoint import make_state, save_steps
    from cifar_jax.checkpoints import checkpoint
    folder = Path(sys.argv[2])
    save_steps(folder, 5, 10)
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    def half(folder):
        next(file for file in folder.rglob("*") if "/d/" in str(file)).unlink()
        die()
    def after(function):
        return lambda *args, **kwargs: (function(*args, **kwargs), die())
    exec(sys.argv[3])
    save_steps(folder, 20)
"""


def save_with(accident: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAVE, str(Path(__file__).parent), str(folder), accident]
    # Where no file can be written, JAX would warn, and leave half a program to the other tests.
    alone = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.run(command, env=alone, capture_output=True, text=True, timeout=100)


@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    ("accident", "newest"),
    [
        ("checkpoint._file_digests = die", 10),
        ("checkpoint._flush = die", 10),
        ("checkpoint._flush = after(checkpoint._flush)", 10),
        ("Path.rename = after(Path.rename)", 20),
        ("checkpoint.shutil.rmtree = half", 20),
    ],
)
def test_a_kill_in_any_part_of_a_save_leaves_whole_checkpoints(
    tmp_path: Path, accident: str, newest: int
) -> None:
    done = save_with(accident, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found, rejected = restore_newest(tmp_path, make_state(0))
    assert rejected == []
    assert found is not None
    assert_equal(found.state, make_state(newest))
    for step in saved_steps(tmp_path):
        assert_equal(restore(tmp_path / str(step), make_state(0)).state, make_state(step))
    save_steps(tmp_path, 20, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"], "nothing is left"


@contextlib.contextmanager
def noted_fsyncs(monkeypatch: pytest.MonkeyPatch, note: Callable[[Path], None]) -> Iterator[None]:
    """``note`` is told of each file and folder that is put on the disk."""
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        note(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        yield


def test_a_checkpoint_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power may keep a name, and lose what it stands for."""
    unfinished, path = tmp_path / ".unfinished-10", tmp_path / "10"
    on_disk: dict[Path, bool] = {}  # and whether it had its name already
    with noted_fsyncs(monkeypatch, lambda file: on_disk.update({file: path.exists()})):
        save_steps(tmp_path, 10)
    files = {unfinished / file.relative_to(path) for file in path.rglob("*")}
    assert len(files) > 5
    assert {file for file, named in on_disk.items() if not named} >= {unfinished, *files}
    assert on_disk[tmp_path]


def test_a_text_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    found: list[tuple[str, str]] = []
    path.write_text("old")
    with noted_fsyncs(monkeypatch, lambda f: found.append((f.read_text(), path.read_text()))):
        write_atomically(path, "new")
    assert found == [("new", "old")]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    script = (
        "import sys; from pathlib import Path; from cifar_jax.system.files import write_atomically;"
        "write_atomically(Path(sys.argv[1]), '\\u00b1')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
    assert path.read_bytes() == "\u00b1".encode()


@pytest.mark.fault("A6")
@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_a_full_disk_leaves_the_older_checkpoints_and_says_what_is_needed(
    tmp_path: Path, limit: int
) -> None:
    full = """if True:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, resource.RLIM_INFINITY))
        from cifar_jax import cli
        large = make_state(20, width=10_000)
        cli.run(lambda: checkpoint.save(folder, 20, large, {}, best_step=0))
    """.replace("MOST", str(limit))
    done = save_with(full, tmp_path)
    assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
    assert re.search(
        rf"cannot save step 20 to {tmp_path}: .*File too large.* \(it takes some "
        r"[\d.]+ MB, and [\d,.]+ MB are free; the last that is saved is step 10\). Fix: free up",
        done.stderr,
    )
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]
    assert_equal(restore(tmp_path / "10", make_state(0)).state, make_state(10))


@pytest.mark.fault("A20")
def test_a_folder_of_someone_else_in_the_way_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "thesis.txt").write_text("years of work")
    save_steps(tmp_path, 20)
    assert (tmp_path / "20.damaged" / "thesis.txt").exists()
    assert saved_steps(tmp_path) == [20]


def test_orbax_logs_nothing_at_any_time(caplog: pytest.LogCaptureFixture) -> None:
    """Its threads do so of errors that are told already, and asyncio of their tasks."""
    for name in ("absl", "asyncio"):
        for path in (ocp.__file__, __file__):
            pathname = path if name == "absl" else "base_events.py"
            said = f"a task of {path}" if name == "asyncio" else "a save"
            record = logging.LogRecord(name, logging.ERROR, pathname, 1, said, (), None)
            logging.getLogger(name).handle(record)
    assert [record.getMessage() for record in caplog.records] == [
        "a save",
        f"a task of {__file__}",
    ]


@pytest.mark.fault("A4")
def test_a_signal_while_a_checkpoint_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGTERM, "nothing was under way")

    save_steps(tmp_path, 10)
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", stopped)
    with pytest.raises(Stopped):
        restore_newest(tmp_path, make_state(0))
    assert saved_steps(tmp_path) == [10]


@pytest.mark.fault("A8")
def test_if_all_are_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    for step in (10, 20):
        truncate(tmp_path / str(step))
    with pytest.raises(CifarJaxError, match=r"none of the 2 checkpoint") as caught:
        restore_newest(tmp_path, make_state(0))
    assert str(caught.value).count("Fix:") == 1
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert saved_steps(tmp_path) == [10, 20], "the files are left as they are"


@pytest.mark.fault("A9")
def test_another_network_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    with pytest.raises(CifarJaxError, match=r"kernel.* is float32\[3\] there, float32\[4\]"):
        restore(tmp_path / "10", make_state(0, width=4))
    other = make_state(0)
    wide = {"Dense_0": {"kernel": other.params["Dense_0"]["kernel"].astype(np.float64)}}
    with pytest.raises(CifarJaxError, match=r"kernel is float32\[3\] there, float64\[3\] in"):
        restore(tmp_path / "10", other.replace(params=wide))
    with pytest.raises(
        CifarJaxError, match=r"params/Conv_0/bias is missing there, float32\[1\] in"
    ):
        restore(tmp_path / "10", other.replace(params={"Conv_0": {"bias": np.zeros(1, "f4")}}))


@pytest.mark.fault("D20")
@pytest.mark.parametrize("like", [make_state(0), jax.eval_shape(lambda: make_state(0))])
def test_no_array_is_read_that_is_larger_than_the_networks(
    tmp_path: Path, like: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros are small on the disk: Orbax reads into memory whatever size the files claim."""
    zeros = {"Dense_0": {"kernel": np.zeros(10**7, np.float32)}}
    save(tmp_path, 10, make_state(0).replace(params=zeros, opt_state=()), {}, best_step=10)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 10**6
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", None)
    with pytest.raises(CifarJaxError, match=r"is float32\[10000000\] there, float32\[3\] in this"):
        restore(tmp_path / "10", like.replace(opt_state=()))


@pytest.mark.fault("D20")
def test_no_chunk_is_read_that_is_larger_than_its_array(tmp_path: Path) -> None:
    """Of which a stranger can make a small file, too; a chunk is decoded as a whole."""
    save_steps(tmp_path, 10)
    step = tmp_path / "10"
    base = {"driver": "ocdbt", "base": f"file://{step}/state/", "path": "params.Dense_0.kernel/"}
    made = {"shape": [3], "chunks": [10**7], "dtype": "<f4", "compressor": {"id": "zstd"}}
    spec = {"driver": "zarr", "kvstore": base, "metadata": made}
    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    array.write(make_state(10).params["Dense_0"]["kernel"]).result()
    (step / "manifest.json").write_text(json.dumps(checkpoint._file_digests(step)))
    with pytest.raises(CifarJaxError, match=r"kernel is stored in chunks of \[10000000\]"):
        restore(step, make_state(0))


def test_the_digest_is_of_all_leaves_in_path_order() -> None:
    a, b, c = (np.float32([x, x + 1]) for x in (1, 3, 5))
    expected = hashlib.sha256(a.tobytes() + b.tobytes() + c.tobytes()).hexdigest()
    assert tree_sha256({"Dense_0": {"kernel": c, "bias": b}, "Conv_0": {"kernel": a}}) == expected
    c[0] = np.nextafter(c[0], 6)
    assert tree_sha256({"Dense_0": {"kernel": c, "bias": b}, "Conv_0": {"kernel": a}}) != expected
