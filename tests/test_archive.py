"""Archives of image folders, CIFAR-10's own and its download: good, odd, damaged and hostile."""

from __future__ import annotations

import errno
import fcntl
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CIFAR10_NAMES, write_images

from cifar_jax.data import archive, cifar10_archive, listing, sources
from cifar_jax.data.dataset import Split
from cifar_jax.data.listing import list_images
from cifar_jax.data.sources import load_dataset
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.identify import identify, network_of, variables_of
from cifar_jax.state_dicts import check_numbers, read_state_dict, write_state_dict

# ---------------------------------------------------------------------------- writing archives


def member(name: str, content: bytes = b"x", **attributes: Any) -> bytes:
    """A header, made as the attributes of ``TarInfo`` say, and the content in whole blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(*records: tuple[str, bytes], kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b""
    for key, value in records:
        record = b" %b=%b\n" % (key.encode(), value)
        length = len(record) + 1
        length += len(str(length + len(str(length)))) - 1
        content += b"%d%b" % (length, record)
    return member("pax", content, type=kind)


def tgz(path: Path, *members: bytes, end: bytes = bytes(1024)) -> Path:
    path.write_bytes(gzip.compress(b"".join(members) + end))
    return path


def tgz_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return path


def refusal(path: Path) -> str:
    """The line with which extraction of ``path`` is refused, of which nothing is left."""
    into = path.parent / "into"
    before = {file for file in path.parent.rglob("*") if into not in (file, *file.parents)}
    with pytest.raises(CifarJaxError) as caught:
        archive.extract_once(path, into)
    assert caught.value.exit_code == ExitCode.DATA
    assert [file.name for file in into.iterdir()] == [".busy.lock"]
    assert {file for file in path.parent.rglob("*") if into not in (file, *file.parents)} == before
    assert "\n" not in str(caught.value)
    assert f"the archive {path} " in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {os.fsdecode(file.relative_to(folder)): file.read_bytes() for file in files}


# ------------------------------------------------------------------- archives of image folders


def test_an_archive_is_extracted_once(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tgz_of(image_folder, tmp_path / "images.tar.gz")
    data_dir = tmp_path / "data"
    put_on_the_disk: list[set[bytes]] = []
    monkeypatch.setattr(
        os, "sync", lambda: put_on_the_disk.append(set(contents(data_dir).values()))
    )
    dataset = load_dataset(str(path), data_dir=str(data_dir))
    assert dataset.name == "images.tar.gz"
    assert dataset.digest == load_dataset(str(image_folder)).digest
    (extracted,) = (data_dir / "extracted").glob("images-*")
    assert contents(extracted / image_folder.name) == contents(image_folder)
    before = {file: file.stat().st_mtime_ns for file in extracted.rglob("*")}
    load_dataset(str(path), data_dir=str(data_dir))
    assert {file: file.stat().st_mtime_ns for file in extracted.rglob("*")} == before
    (on_the_disk,) = put_on_the_disk
    assert on_the_disk >= set(contents(image_folder).values())
    tgz(path, member("a/1.png"))  # another one of the same name
    assert contents(archive.extract_once(path, data_dir / "extracted")) == {"a/1.png": b"x"}


def test_what_is_wrong_with_images_is_told_of_their_archive(tmp_path: Path) -> None:
    """What was extracted is not what a person can mend."""
    write_images(tmp_path / "photos", {"cat": 3})
    path = tgz_of(tmp_path / "photos", tmp_path / "photos.tar.gz")
    told = rf"{path}, extracted: .* holds 1 class folder.* Fix: in the archive, put the images"
    with pytest.raises(CifarJaxError, match=told):
        load_dataset(str(path), data_dir=str(tmp_path / "data"))


@pytest.mark.parametrize(
    "options",
    [
        {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "of all"}},
        {"format": tarfile.GNU_FORMAT},
        {"format": tarfile.USTAR_FORMAT},
    ],
)
@pytest.mark.fault("D1")
def test_odd_names_that_harm_nobody_work(tmp_path: Path, options: dict[str, Any]) -> None:
    odd = ["-rf", "a b\nc", "é", "...", " ", "\udcff\udcfe", "n" * 98, "~", "$(x)", "a:b", "%s"]
    if options["format"] != tarfile.USTAR_FORMAT:
        odd += ["n" * 255, "/".join(["d" * 100] * 9)]
        odd += [f"{'d' * 250}/{'e' * 250}"]  # with which GNU's extension fills its block
    files = {f"c/{name}/1.png": name.encode("utf-8", "surrogateescape") for name in odd}
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz", **options) as tar:
        root = tarfile.TarInfo(".")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(content), 0.5
            tar.addfile(info, io.BytesIO(content))
    assert contents(archive.extract_once(path, tmp_path / "into")) == files


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "/tmp/outside.png",
        "//tmp/outside.png",
        "a/../../outside.png",
        "a/..",
        "a\\..\\outside.png",
        "C:/outside.png",
        "c:outside.png",
        "a\0b",
        "a" * 256,
        "a" * 5000,
        "a/" * 2500 + "b",
        "a/" * 40 + "b",
        ("a" * 250 + "/") * 5 + "b",
        ".",
        "",
    ],
    ids=lambda name: name[:15],
)
@pytest.mark.fault("D1")
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    for extension in (
        pax(("path", name.encode())),
        member("long", name.encode() + b"\0", type=tarfile.GNUTYPE_LONGNAME),
    ):
        if "\0" in name and extension[156:157] != tarfile.XHDTYPE:
            continue  # there it ends the name
        path = tgz(tmp_path / "x.tgz", member("a/1.png"), extension, member("b/2.png"))
        said = refusal(path)
        assert f"holds {name[:100]!r:.100}" in said
        assert "an unsafe name" in said or "too long or too deep a name" in said
        assert len(said) < 400


@pytest.mark.parametrize(
    "members",
    [
        [member("l", b"", type=tarfile.SYMTYPE, linkname="/etc")],
        [member("h", b"", type=tarfile.LNKTYPE, linkname="a/1.png")],
        [member("l", b"", type=tarfile.SYMTYPE, linkname=".."), member("l/outside.png")],
        [
            member("long", b"l" * 300 + b"\0", type=tarfile.GNUTYPE_LONGLINK),
            member("l", b"", type=tarfile.SYMTYPE),
        ],
    ],
    ids=["symbolic", "hard", "write through", "long"],
)
@pytest.mark.fault("D2")
def test_links_are_refused(tmp_path: Path, members: list[bytes]) -> None:
    said = refusal(tgz(tmp_path / "x.tgz", member("a/1.png"), *members))
    assert "which is neither a plain file nor a folder" in said


@pytest.mark.parametrize(
    "members",
    [
        [member("s", b"", type=tarfile.FIFOTYPE)],
        [member("s", b"", type=tarfile.CHRTYPE)],
        [member("s", b"", type=tarfile.BLKTYPE)],
        [member("s", type=b"!")],
        [member("s", type=tarfile.GNUTYPE_SPARSE)],
        [pax(("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"9")), member("s")],
    ],
    ids=["pipe", "character", "block", "unknown", "sparse", "sparse by PAX"],
)
@pytest.mark.fault("D3")
def test_what_is_no_plain_file_is_refused(tmp_path: Path, members: list[bytes]) -> None:
    said = refusal(tgz(tmp_path / "x.tgz", member("a/1.png"), *members))
    assert "holds 's', which is neither a plain file nor a folder" in said


@pytest.mark.fault("D4")
def test_modes_and_owners_are_ours(tmp_path: Path) -> None:
    path = tgz(
        tmp_path / "x.tgz",
        member("a", b"", type=tarfile.DIRTYPE, mode=0o7777, uid=1, uname="daemon"),
        member("a/open", mode=0o6777, uid=1),
        member("a/shut", mode=0, gid=1),
        member("b", b"", type=tarfile.DIRTYPE, mode=0),
        member("b/1.png"),
    )
    previous = os.umask(0o022)
    try:
        folder = archive.extract_once(path, tmp_path / "into")
    finally:
        os.umask(previous)
    for file in (folder, *folder.rglob("*")):
        wanted = 0o755 if file.is_dir() else 0o644
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file
        assert (file.stat().st_uid, file.stat().st_gid) == (os.getuid(), os.getgid())
    assert len(list(folder.rglob("*"))) == 5


NOISE = random.Random(0).randbytes(2**20)


@pytest.mark.parametrize(
    ("members", "limit", "message"),
    [
        (
            [member(f"a/{i}", bytes(2**20)) for i in range(20)],
            None,
            r"unpacks to more than 16,777,216 bytes from \d\d,\d\d\d;?",
        ),
        (
            [member(f"a/{i}", NOISE) for i in range(3)],
            ("_MOST_UNPACKED", 2**21),
            "unpacks to more than 2,097,152 bytes",
        ),
        ([member("a/1", size=2**26 + 1)], None, r"'a/1' of 67,108,865 bytes; 67,108,864 is the"),
        (
            [member(f"a/{i}", b"") for i in range(51)],
            ("_MOST_HEADERS", 50),
            "more than 25 files",
        ),
        ([member("a/1"), bytes(512), bytes(20 * 2**20)], None, "unpacks to more than 16,777,216"),
    ],
    ids=["ratio", "bytes", "one file", "number", "after the end"],
)
@pytest.mark.fault("D5")
def test_bombs_stop_at_a_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: list[bytes],
    limit: tuple[str, int] | None,
    message: str,
) -> None:
    if limit:
        monkeypatch.setattr(archive, *limit)
    said = refusal(tgz(tmp_path / "x.tgz", *members))
    assert re.search(message, said)
    assert "if you trust it, unpack it with tar and give --data the folder" in said


@pytest.mark.parametrize(
    "names",
    [
        ("a/1.png", "a/1.png"),
        ("a/1.png", "./a//1.png"),
        ("a/1.png", "a/1.PNG"),
        ("a/1.png", "A/2.png"),
        ("a", "a/1.png"),
        ("a/1.png", "a"),
    ],
    ids=" ".join,
)
@pytest.mark.fault("D6")
def test_two_members_in_one_place_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    said = refusal(tgz(tmp_path / "x.tgz", *(member(name) for name in names)))
    assert re.search("holds 'a(/1.png)?' and '.*', which can be one place on a disk", said)


@pytest.mark.fault("D6")
def test_a_folder_may_come_twice(tmp_path: Path) -> None:
    folder = member("a", b"", type=tarfile.DIRTYPE)
    old = member("a/2.png", type=tarfile.AREGTYPE)  # as tar wrote it before POSIX
    path = tgz(tmp_path / "x.tgz", folder, member("a/1.png"), folder, old)
    assert set(contents(archive.extract_once(path, tmp_path / "into"))) == {"a/1.png", "a/2.png"}


@pytest.mark.fault("D7")
def test_a_cut_archive_leaves_no_half_folder(image_folder: Path, tmp_path: Path) -> None:
    path = tgz_of(image_folder, tmp_path / "images.tar.gz")
    whole = path.read_bytes()
    for size in (0, 1, 5, 10, 18, *range(100, len(whole), len(whole) // 12), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert re.search(
            "ends early|Not a gzipped file" if size == 1 else "ends early", refusal(path)
        )
    for damaged in (whole[:-5] + b"\0" + whole[-4:], whole[:50] + b"\0\0\0" + whole[53:]):
        path.write_bytes(damaged)
        assert re.search("cannot be read: (CRC|Error)", refusal(path))
    for other in (b"<html>Not found</html>", b"PK\3\4", bytes(100)):
        path.write_bytes(other)
        assert "cannot be read: Not a gzipped file" in refusal(path)


@pytest.mark.fault("D8")
def test_a_tar_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    path, members = tmp_path / "x.tar.gz", [member(f"a/{i}", bytes(600)) for i in range(4)]
    for n in range(4):
        assert "ends early" in refusal(tgz(path, *members[:n], end=b""))
    assert "ends early" in refusal(tgz(path, *members, end=bytes(511)))
    assert "goes on after its end" in refusal(tgz(path, *members[:2], bytes(1024), *members[2:]))
    parts = [tgz(path, *half).read_bytes() for half in (members[:2], members[2:])]
    path.write_bytes(b"".join(parts))
    assert "goes on after its end" in refusal(path)
    path.write_bytes(parts[0] + bytes(512))  # of tapes; gzip allows it
    assert len(contents(archive.extract_once(path, tmp_path / "into"))) == 2


def pax_content(content: bytes) -> bytes:
    return member("pax", content, type=tarfile.XHDTYPE)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        # By the first, tarfile before the fix of CVE-2025-8194 went round in a circle.
        ([member("a/1"), member("a/2", b"", size=-1024)], "gives 'a/2' a size of -1024"),
        ([member("a/1", b"", size=-512)], "gives 'a/1' a size of -512"),
        ([member("a", b"", size=-1, type=tarfile.GNUTYPE_LONGNAME)], "a size of -1"),
        ([member("a", b"", size=2**33, type=tarfile.GNUTYPE_LONGNAME)], "'a' of 8,589,934,592 b"),
        ([member("a", b"", size=2**33, type=tarfile.XHDTYPE)], "'a' of 8,589,934,592 bytes; 65,"),
        ([member("a", b"", size=2**62)], "'a' of 4,611,686,018,427,387,904 bytes"),
        ([pax_content(b"0 path=a\n"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"-9 path=a\n"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"99 path=a\n"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"7 path\n"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"9 path=ab"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"4 a\n7 b=cd\n"), member("a")], "is damaged: a PAX header"),
        ([pax_content(b"9" * 60000), member("a")], "is damaged: "),
        ([pax(("size", b"many")), member("a")], "is damaged: "),
        ([pax(("size", b"9" * 5000)), member("a")], "is damaged: "),
        ([pax(("size", b"-7")), member("a")], "gives 'a' a size of -7"),
        ([b"\xff" * 512], "is damaged: bad checksum"),
        ([b"\0" * 511 + b"\1"], "is damaged: "),
        ([member("x", bytes(512), type=tarfile.GNUTYPE_LONGNAME)], "has more than 25 files"),
    ],
)
@pytest.mark.fault("D9")
def test_headers_that_lie_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[bytes], message: str
) -> None:
    if "more than" in message:
        monkeypatch.setattr(archive, "_MOST_HEADERS", 50)
        members *= 60
    path = tgz(tmp_path / "x.tgz", *members)
    started = time.perf_counter()
    assert message in refusal(path)
    assert time.perf_counter() - started < 5


@pytest.mark.fault("D9")
def test_extensions_in_a_row_are_read_as_one(tmp_path: Path) -> None:
    """With ``tarfile``, each is a call deeper."""
    long = member("long", b"of no one\0", type=tarfile.GNUTYPE_LONGNAME)
    last = pax(("path", b"a/1.png"), ("size", b"3"))
    of_all = pax(("path", b"all"), kind=tarfile.XGLTYPE)
    path = tgz(tmp_path / "x.tgz", *[long] * 3000, last, of_all, member("b", b"abc", size=0))
    assert contents(archive.extract_once(path, tmp_path / "into")) == {"a/1.png": b"abc"}


# ------------------------------------------------- extraction that is killed, met by another, full


def start(program: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    program = f"""if True:
        import os, resource, signal, sys
        from pathlib import Path
        from cifar_jax import cli
        from cifar_jax.data import archive
        path, into = map(Path, sys.argv[1:3])
        {program}
        cli.run(lambda: print(archive.extract_once(path, into)))
    """
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


@pytest.mark.fault("D12")
def test_what_a_killed_extraction_leaves_is_removed(image_folder: Path, tmp_path: Path) -> None:
    path, into = tgz_of(image_folder, tmp_path / "images.tar.gz"), tmp_path / "into"
    # Killed with its lock held, 30 of 111 files on the disk.
    program = """
        class Killed(archive.TarGz):
            def content(self):
                if len(list(into.glob(".incomplete-*/*/*/*/*/*"))) == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().content()
        archive.TarGz = Killed"""
    process = start(program, path, into)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len([file for file in into.rglob("*.png") if file.is_file()]) == 30
    assert not list(into.glob("images-*"))
    folder = archive.extract_once(path, into)
    assert contents(folder / image_folder.name) == contents(image_folder)
    assert {file.name for file in into.iterdir()} == {".busy.lock", folder.name}


@pytest.mark.fault("D13")
def test_of_two_processes_one_extracts_and_the_other_waits(
    image_folder: Path, tmp_path: Path
) -> None:
    path, into = tgz_of(image_folder, tmp_path / "images.tar.gz"), tmp_path / "into"
    into.mkdir()
    program = """
        from cifar_jax.system import lock
        lock._QUIET_SECONDS = 0.1
        extract = archive._extract
        archive._extract = lambda *arguments: print("extracting") or extract(*arguments)"""
    with (into / ".busy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [start(program, path, into) for _ in range(2)]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("waiting for another process, which is ex")
        assert list(into.iterdir()) == [into / ".busy.lock"]
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert sorted(map(len, said)) == [1, 2]
    assert {lines[-1] for lines in said} == {str(next(into.glob("images-*")))}
    assert contents(Path(said[0][-1]) / image_folder.name) == contents(image_folder)


@pytest.mark.fault("D13")
def test_where_there_are_no_locks_each_extracts_and_the_first_stays(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, into = tgz_of(image_folder, tmp_path / "images.tar.gz"), tmp_path / "into"

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    extract = archive._extract

    def another_is_faster(members: Any, *rest: Any) -> None:
        (into / ".incomplete-of-another").mkdir()
        with archive.TarGz(path) as again:
            extract(again, *rest)
        extract(members, *rest)

    monkeypatch.setattr(archive, "_extract", another_is_faster)
    folder = archive.extract_once(path, into)
    assert contents(folder / image_folder.name) == contents(image_folder)
    assert {file.name for file in into.iterdir()} == {
        *(".busy.lock", ".incomplete-of-another", folder.name)
    }
    assert f"warning: no lock on {into}" in capsys.readouterr().out


@pytest.mark.fault("D14")
def test_a_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    files = [member(f"a/{i}", NOISE) for i in range(3)]
    path, into = tgz(tmp_path / "x.tgz", *files), tmp_path / "into"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    process = start(limit, path, into)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.ENVIRONMENT
    assert re.fullmatch(
        rf"cifar_jax: error: cannot write to --data-dir {into}: File too large; {path} needs "
        r"3\.0 MB, and [\d,]+\.\d MB are free\. Fix: free up space there, or .*\n",
        said,
    )
    assert [file.name for file in into.iterdir()] == [".busy.lock"]


@pytest.mark.fault("D14")
def test_a_data_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tgz(tmp_path / "x.tgz", member("a/1.png"))
    with pytest.raises(CifarJaxError, match=r"--data-dir .*x.tgz/into: Not a directory") as caught:
        archive.extract_once(path, path / "into")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


# ------------------------------------------------------------------------ CIFAR-10's own archives

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def official_batches(n: int) -> list[tuple[Any, list[int]]]:
    """Six batches of ``n`` records as CIFAR-10's archives hold them: pixels [n, 3072], labels."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, 10, n).tolist())
        for _ in BATCHES
    ]


def python_files(n: int) -> dict[str, bytes]:
    files = {"batches.meta": pickle.dumps({"label_names": CIFAR10_NAMES}, protocol=2)}
    for name, (data, labels) in zip(BATCHES, official_batches(n), strict=True):
        files[name] = pickle.dumps({b"data": data, b"labels": labels}, protocol=2)
    return files


def binary_files(n: int) -> dict[str, bytes]:
    files = {"batches.meta.txt": "\n".join([*CIFAR10_NAMES, ""]).encode()}
    for name, (data, labels) in zip(BATCHES, official_batches(n), strict=True):
        records = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
        files[f"{name}.bin"] = records.tobytes()
    return files


def official(path: Path, files: dict[str, bytes], ending: str) -> Path:
    root = f"cifar-10-batches-{ending}"
    return tgz(path, *(member(f"{root}/{name}", content) for name, content in files.items()))


def trust(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10_archive, "_PYTHON_ARCHIVE_SHA256", digest)


@pytest.mark.parametrize("ending", ["py", "bin"])
@pytest.mark.fault("D16")
def test_the_official_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    files = python_files(20) if ending == "py" else binary_files(20)
    others = {"readme.html": b"x", f"old/{next(iter(files))}": b"of another time"}
    path = official(tmp_path / "cifar-10.tar.gz", files | others, ending)
    trust(monkeypatch, path)
    dataset = load_dataset(str(path))
    assert dataset.class_names == tuple(CIFAR10_NAMES)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (90, 10, 20)
    data, labels = official_batches(20)[5]
    # A record holds all reds, then all greens, then all blues, row by row.
    for row, column, channel in ((0, 0, 0), (3, 7, 1), (31, 30, 2)):
        expected = data[:, 1024 * channel + 32 * row + column]
        assert np.array_equal(dataset.test.pixels[:, row, column, channel], expected)
    assert dataset.test.labels.tolist() == labels
    label_of = {
        row.tobytes(): label
        for data, labels in official_batches(20)[:5]
        for row, label in zip(data, labels, strict=True)
    }
    for split in (dataset.train, dataset.val):
        for image, label in zip(split.pixels, split.labels, strict=True):
            assert label_of.pop(image.transpose(2, 0, 1).tobytes()) == label


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("payload_ran"),)


@pytest.mark.fault("D16")
def test_a_pickle_that_is_a_program_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in an archive with the right checksum."""
    monkeypatch.chdir(tmp_path)
    files = python_files(2) | {"data_batch_3": pickle.dumps(Payload())}
    path = official(tmp_path / "x.tar.gz", files, "py")
    trust(monkeypatch, path)
    with pytest.raises(CifarJaxError, match=r"pathlib.*which no image file needs") as caught:
        load_dataset(str(path))
    assert caught.value.exit_code == ExitCode.DATA
    assert not Path("payload_ran").exists()


@pytest.mark.fault("D16")
def test_no_pickle_of_another_archive_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(cifar10_archive, "_unpickle", None)
    path = official(tmp_path / "x.tar.gz", python_files(2), "py")
    with pytest.raises(CifarJaxError, match=r"SHA-256 is .*, not 6d958be07457.*") as caught:
        load_dataset(str(path))
    assert caught.value.exit_code == ExitCode.DATA
    assert "Fix: use the binary version, whose content needs no pickle, or i" in str(caught.value)


def of_other_size(files: dict[str, bytes]) -> None:
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]


def of_no_class(files: dict[str, bytes]) -> None:
    files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]


def without_images(files: dict[str, bytes]) -> None:
    files["test_batch.bin"] = b""


def without_a_batch(files: dict[str, bytes]) -> None:
    del files["data_batch_4.bin"]


def without_names(files: dict[str, bytes]) -> None:
    files["batches.meta.txt"] = b"\n"


def with_a_name_twice(files: dict[str, bytes]) -> None:
    files["batches.meta.txt"] = " ".join([*CIFAR10_NAMES[:9], "cat"]).encode()


def with_names_of_no_text(files: dict[str, bytes]) -> None:
    files["batches.meta.txt"] = b"\xff\xfe"


def with_too_many_images(files: dict[str, bytes]) -> None:
    files["data_batch_1.bin"] *= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_other_size, "cannot reshape"),
        (of_no_class, "label 10 has none of the class names"),
        (without_images, "a batch has 1 to 20 images of 3,073 bytes"),
        (without_a_batch, "it lacks data_batch_4.bin"),
        (without_names, "label . has none of the class names"),
        (with_a_name_twice, "label 9 has none of the class names"),
        (with_names_of_no_text, "UnicodeDecodeError"),
        (with_too_many_images, "a batch has 1 to 20 images of 3,073 bytes"),
    ],
)
@pytest.mark.fault("D16")
def test_a_binary_archive_must_be_of_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    monkeypatch.setattr(cifar10_archive, "_MOST_RECORDS", 20)
    files = binary_files(20)
    damage(files)
    path = official(tmp_path / "x.tar.gz", files, "bin")
    with pytest.raises(CifarJaxError, match=f"cannot be read as it: .*{message}") as caught:
        load_dataset(str(path))
    assert caught.value.exit_code == ExitCode.DATA


# ----------------------------------------------------------------------------------- downloads


class Answers(http.server.BaseHTTPRequestHandler):
    """``/KIND/name`` answers with ``archive``, as well as KIND allows."""

    archive = b""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        body = {"html": b"<html>Not here</html>"}.get(kind, self.archive)
        if kind == "absent":
            return self.send_error(404)
        if kind == "rubbish":
            self.wfile.write(b"\0\1\2\r\n\r\n")
            return None
        self.send_response(302 if kind == "elsewhere" else 200)
        self.send_header("Location", f"file://{__file__}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        return None

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def tfds_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A function of a KIND: from then on, tensorflow-datasets meets that where CIFAR-10 was."""
    from tensorflow_datasets.core import units
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import cifar

    path = official(tmp_path / "cifar-10-binary.tar.gz", binary_files(3), "bin")
    content = path.read_bytes()
    known = checksums.UrlInfo(
        units.Size(len(content)), hashlib.sha256(content).hexdigest(), path.name
    )
    handler = type("Handler", (Answers,), {"archive": content})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    info = cifar.Cifar10._cifar_info.fget

    def answer_with(kind: str) -> str:
        url = f"http://127.0.0.1:{server.server_port}/{kind}/{path.name}"
        monkeypatch.setattr(sources, "CIFAR10_URL", url)
        monkeypatch.setattr(
            cifar.Cifar10, "_cifar_info", property(lambda self: info(self)._replace(url=url))
        )
        monkeypatch.setattr(checksums, "get_all_url_infos", lambda: {url: known})
        return url

    yield answer_with
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("absent", ["HTTP code: 404"]),
        ("cut", ["Connection broken: IncompleteRead"]),
        ("elsewhere", ["No connection adapters were found for 'file://"]),
        ("html", ["has wrong checksum", "Expected: ", "Got: ", "/html/cifar-10-binary.tar.gz"]),
    ],
)
@pytest.mark.fault("D10", "D11")
def test_a_download_that_fails_is_told_in_one_line_and_can_be_tried_again(
    tmp_path: Path, tfds_from: Any, kind: str, reasons: list[str]
) -> None:
    from cifar_jax.data.input_pipeline import read_cifar10

    tfds_from(kind)
    with pytest.raises(CifarJaxError) as caught:
        read_cifar10(tmp_path / "data", download=True)
    assert caught.value.exit_code == ExitCode.DATA
    assert "\n" not in str(caught.value)
    assert all(reason in str(caught.value) for reason in reasons)
    assert not sources.is_here("cifar10", str(tmp_path / "data"))
    tfds_from("good")
    dataset = load_dataset("cifar10", data_dir=str(tmp_path / "data"))
    assert len(dataset.train) + len(dataset.val) == 15
    assert dataset.class_names == tuple(CIFAR10_NAMES)


@pytest.mark.parametrize("writer", ["the download", "TensorFlow"])
@pytest.mark.fault("D14")
def test_a_disk_that_is_full_while_cifar10_is_prepared(
    writer: str, tmp_path: Path, tfds_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifar_jax.data.input_pipeline import read_cifar10, tf

    def full(*_: Any) -> None:  # as a real one raises
        raise tf.errors.ResourceExhaustedError(None, None, "x.tfrecord; No space left on device")

    tfds_from("good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if writer == "TensorFlow":
        monkeypatch.setattr(tf.io.TFRecordWriter, "write", full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(CifarJaxError, match="Fix: free up space there") as caught:
            read_cifar10(tmp_path / "data", download=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("good", None),
        ("absent", "Not Found"),
        ("elsewhere", "Redirection to url 'file://.*' is not allowed"),
        ("rubbish", "\0\1\2"),
    ],
)
@pytest.mark.fault("D11")
def test_before_a_download_its_host_is_asked(tfds_from: Any, kind: str, reason: str | None) -> None:
    tfds_from(kind)
    obstacle = sources._download_obstacle()
    assert obstacle == reason or re.search(str(reason), str(obstacle))


@pytest.mark.fault("D13")
def test_of_two_processes_one_prepares_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand for them: each opens the lock by itself."""
    info = tmp_path / "data" / "cifar10" / "3.0.2" / "dataset_info.json"
    split = Split(np.zeros((20, 32, 32, 3), np.uint8), np.arange(20, dtype=np.int32) % 10)
    downloads = []

    def read_cifar10(data_dir: Path, *, download: bool) -> Any:
        downloads.append(download)
        if download:
            time.sleep(0.2)
            info.parent.mkdir(parents=True)  # as tfds, whose renaming fails if it is there
            info.touch()
        return {"train": split, "test": split}, tuple(CIFAR10_NAMES)

    monkeypatch.setattr("cifar_jax.data.input_pipeline.read_cifar10", read_cifar10)
    monkeypatch.setattr(sources, "_download_obstacle", lambda: None)
    with ThreadPoolExecutor(2) as pool:
        load = functools.partial(load_dataset, "cifar10", data_dir=str(tmp_path / "data"))
        both = [pool.submit(load) for _ in range(2)]
        assert [len(each.result().train) for each in both] == [18, 18]
    assert sorted(downloads) == [False, True]


# ------------------------------------------------------------------------------ kept listings


def object_array() -> bytes:
    content = io.BytesIO()
    np.savez(content, folders=np.array([Payload()], dtype=object), allow_pickle=True)
    return content.getvalue()


def array_of_terabytes() -> bytes:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}".ljust(117)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as entries:
        entries.writestr("folders.npy", b"\x93NUMPY\1\0\x76\0" + header + b"\n")
    return content.getvalue()


@pytest.mark.fault("D19")
def test_a_kept_listing_runs_nothing_and_may_be_damaged(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing, "_WORTH_KEEPING_SECONDS", 0)
    root, kept = image_folder / "train", tmp_path / "kept"
    expected = list_images(root, kept)
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    rng = random.Random(0)
    for content in (
        object_array(),
        array_of_terabytes(),
        b"",
        *(mutated(whole, [(0, len(whole))], rng) for _ in range(50)),
    ):
        path.write_bytes(content)
        found = list_images(root, kept)
        assert found.paths.tolist() == expected.paths.tolist(), content
        path.unlink(missing_ok=True)
    assert not Path("payload_ran").exists()


# ----------------------------------------------------------------------------------- mutations


def mutated(data: bytes, places: list[tuple[int, int]], rng: random.Random) -> bytes:
    """``data`` with one to four of its bytes or stretches changed, mostly in ``places``."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start, stop = rng.choice(places) if rng.random() < 0.8 else (0, len(result) + 1)
        at = rng.randrange(start, stop)
        length = rng.choice([1, 2, 8, 100, 512, 5000])
        match rng.randrange(7):
            case 0:
                result[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                result[at : at + 1] = rng.choice([b"\0", b"\xff", b"/", b".", b"9", b"-", b"\x80"])
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = rng.randbytes(length)
            case 4:
                result[at:at] = result[start : start + length]
            case 5:
                result[at : at + length] = bytes(length)
            case 6 if rng.random() < 0.3:
                del result[at:]
    return bytes(result)


def mutated_archive(packed: bytes, rng: random.Random) -> bytes:
    """Mutated under sound checksums, mostly, as they would otherwise be all that is tested."""
    tar = gzip.decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        headers = [info.offset for info in members]
    tar = mutated(tar, [(at, at + 512) for at in headers], rng)
    if rng.random() < 0.7:
        for at in headers:
            block = bytearray(tar[at : at + 512])
            if len(block) == 512 and any(block):
                block[148:156] = b" " * 8
                block[148:156] = b"%06o\0 " % sum(block)
                tar = tar[:at] + block + tar[at + 512 :]
    packed = gzip.compress(tar, 1)
    return mutated(packed, [(0, 10)], rng) if rng.random() < 0.1 else packed


def mutated_pth(packed: bytes, rng: random.Random) -> bytes:
    """Mutated in its pickle, mostly, under sound checksums."""
    if rng.random() < 0.3:
        return mutated(packed, [(0, len(packed))], rng)
    repacked = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(packed)) as entries,
        zipfile.ZipFile(repacked, "w") as changed,
    ):
        for entry in entries.infolist():
            content = entries.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = mutated(content, [(0, len(content))], rng)
            changed.writestr(entry.filename, content)
    return repacked.getvalue()


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    changed = mutated(content, [(0, 8), (8, end)], rng)
    if rng.random() < 0.5:  # a length that fits what was added or taken away
        length = max(0, end - 8 + len(changed) - len(content))
        changed = length.to_bytes(8, "little") + changed[8:]
    return changed


def read_folder(path: Path) -> None:
    found = sources.load_splits(str(path), data_dir=str(path.parent / "data"))
    assert 2 <= len(found.class_names) <= 20
    assert found.train.images.paths[0].startswith(os.fsencode(path.parent / "data"))


def read_binary(path: Path) -> None:
    found = sources.load_splits(str(path), data_dir=str(path.parent / "data"))
    assert found.train.pixels.shape[1:] == (32, 32, 3)
    assert 0 <= found.train.labels.min() <= found.train.labels.max() < len(found.class_names)


def read_weights(path: Path) -> None:
    tensors, metadata = read_state_dict(path)
    check_numbers(tensors, path)
    if {name: array.shape for name, array in tensors.items()} != WEIGHTS:
        variables_of(tensors, identify(tensors), path)
    if "config" in metadata:
        network_of(path, tensors, metadata)


WEIGHTS = {"network.0.weight": (2, 3, 3, 3), "network.0.bias": (2,)}
WEIGHTS |= {"network.5.weight": (2, 2), "network.5.bias": (2,)}


def write_each_kind(folder: Path) -> dict[str, tuple[Path, Any, Any]]:
    """A small file of each kind, what mutates it, and what reads it."""
    write_images(folder / "images", {"a": 4, "b": 4})
    network = {name: np.ones(shape, np.float32) for name, shape in WEIGHTS.items()}
    metadata = {
        "config": json.dumps({"model": "cnn-gap", "widths": [2]}),
        "class_names": '["a", "b"]',
        "image_shape": "[8, 8, 3]",
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.5, 0.5, 0.5]",
    }
    for name in ("x.pth", "x.safetensors"):
        write_state_dict(folder / name, network, metadata)
    return {
        "folder": (tgz_of(folder / "images", folder / "f.tgz"), mutated_archive, read_folder),
        "binary": (
            official(folder / "b.tgz", binary_files(1), "bin"),
            mutated_archive,
            read_binary,
        ),
        "pth": (folder / "x.pth", mutated_pth, read_weights),
        "safetensors": (folder / "x.safetensors", mutated_safetensors, read_weights),
    }


def read_mutations(folder: Path, seeds: range) -> None:
    """Read each kind mutated by each seed; what it takes is printed as JSON. In a process of its
    own, whose peak of memory it is.
    """
    os.sync = lambda: None
    kinds = write_each_kind(folder)
    for path, _, read in kinds.values():
        read(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, lines, good = 0.0, 0, dict.fromkeys(kinds, 0)
    for kind, (path, mutate, read) in kinds.items():
        whole = path.read_bytes()
        for seed in seeds:
            print(f"{kind}, seed {seed}", file=sys.stderr, flush=True)
            path.write_bytes(mutate(whole, random.Random(f"{kind} {seed}")))
            started = time.perf_counter()
            try:
                read(path)
                good[kind] += 1
            except CifarJaxError as error:
                lines = max(lines, len(str(error).splitlines()))
            slowest = max(slowest, time.perf_counter() - started)
            shutil.rmtree(folder / "data", ignore_errors=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    figures = {"slowest": slowest, "lines": lines, "grown_mb": grown / 1024, "good": good}
    print(json.dumps(figures))


def check_mutations(tmp_path: Path, seeds: range) -> None:
    given, cwd = tmp_path / "given", tmp_path / "cwd"
    given.mkdir()
    cwd.mkdir()
    program = "import sys; from pathlib import Path; from test_archive import read_mutations; "
    program += f"read_mutations(Path(sys.argv[1]), {seeds!r})"
    done = subprocess.run(
        [sys.executable, "-c", program, str(given)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["slowest"] < 5, figures
    assert figures["lines"] == 1, figures
    assert figures["grown_mb"] < 500, figures
    assert 0 < sum(figures["good"].values()) < 4 * len(seeds), figures
    assert list(cwd.iterdir()) == []
    assert {file.name for file in tmp_path.iterdir()} == {"given", "cwd"}


@pytest.mark.fault("D1", "D5", "D7", "D9", "D15", "D17")
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(15))


@pytest.mark.long
@pytest.mark.fault("D1", "D5", "D7", "D9", "D15", "D17")
def test_mutated_files_by_the_thousand(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(1000, 1500))
