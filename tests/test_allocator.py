from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


IN_PLACE = """if True:
    import sys
    from pathlib import Path
    from cifar_jax import trained
    from cifar_jax.parallel import select_devices
    if sys.argv[1] == "training":
        select_devices(1)
    elif sys.argv[1] == "a network":
        trained.load(Path(sys.argv[2]))
    import jax, jax.numpy as jnp
    product = jax.jit(lambda x: x @ x @ x @ x)
    x = jnp.ones((1500, 1500))
    product(x).block_until_ready()
    print(product(x).is_ready())  # on return, not later by another thread
"""


@pytest.mark.parametrize(
    ("how", "in_place"), [("training", "True"), ("a network", "True"), ("as it comes", "False")]
)
def test_programs_run_on_the_thread_whose_memory_is_kept(
    how: str, in_place: str, trained_run: Path
) -> None:
    command = [sys.executable, "-c", IN_PLACE, how, str(trained_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == in_place
