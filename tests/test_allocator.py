from __future__ import annotations

import subprocess
import sys

import pytest

TWICE = """if True:
    import resource, sys
    from cifar_jax import cli
    from cifar_jax.train import TrainConfig, _prepare_runtime
    if sys.argv[1] == "a command":
        assert cli._run(lambda: None) == 0
    elif sys.argv[1] == "training":
        _prepare_runtime(TrainConfig())
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * 100_000_000
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_asked_for_again(how: str) -> int:
    command = [sys.executable, "-c", TWICE, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is told")
def test_memory_that_was_freed_is_used_again_without_asking_for_its_pages() -> None:
    assert pages_asked_for_again("a command") < 500
    assert pages_asked_for_again("training") < 500
    assert pages_asked_for_again("as it comes") > 20_000
