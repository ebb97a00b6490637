from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.steps.parallel import aligned, shard
from cifar_jax.steps.train_step import TrainState
from cifar_jax.training.start import start

TWICE = """if True:
    import resource, sys
    from concurrent.futures import ThreadPoolExecutor
    from cifar_jax import cli
    from cifar_jax.train import TrainConfig, _prepare_runtime
    if sys.argv[1] == "a command":
        assert cli._run(lambda: None) == 0
    elif sys.argv[1] == "training":
        _prepare_runtime(TrainConfig())
    def pages_asked_for_again(use):
        use()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        use()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(pages_asked_for_again(lambda: b"x" * 100_000_000))
    with ThreadPoolExecutor(1) as thread:  # blocks that do not fit together into 64 MB
        use = lambda: [b"x" * 24_000_000 for _ in range(4)]
        print(thread.submit(pages_asked_for_again, use).result())
"""


def pages_asked_for_again(how: str) -> tuple[int, int]:
    """Of the main thread, and of another."""
    command = [sys.executable, "-c", TWICE, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    main, another = map(int, done.stdout.split()[-2:])
    return main, another


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is told")
def test_memory_that_was_freed_is_used_again_without_asking_for_its_pages() -> None:
    assert max(pages_asked_for_again("a command")) < 500
    assert max(pages_asked_for_again("training")) < 500
    assert min(pages_asked_for_again("as it comes")) > 20_000


COMPILED = """if True:
    import sys
    import jax
    from cifar_jax.system.allocator import keep_freed_memory
    from cifar_jax.steps.parallel import compile_lowered
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    keep_freed_memory()
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    b"x" * 300_000_000  # as a compiler does, and frees it
    before = resident()
    compile_lowered(lowered, "cpu") if sys.argv[1] == "ours" else lowered.compile()
    print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is told")
@pytest.mark.parametrize(("how", "given_back"), [("ours", True), ("jax's", False)])
def test_what_a_compiler_leaves_is_given_back(how: str, given_back: bool) -> None:
    command = [sys.executable, "-c", COMPILED, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200_000_000) is given_back


def test_the_first_step_of_a_run_takes_over_the_memory_of_its_state(
    image_folder: Path, tmp_path: Path
) -> None:
    config = TrainConfig(data=str(image_folder), model="linear", batch_size=16, input="device")
    run, progress = start(config, tmp_path / "run")
    before = addresses(progress.state)
    state, _, _ = run.advance(progress.state, 0, 1, 0)
    assert addresses(state) == before


def addresses(state: TrainState) -> list[int]:
    return [x.addressable_data(0).unsafe_buffer_pointer() for x in jax.tree.leaves(state)]


IN_PLACE = """if True:
    import sys
    from pathlib import Path
    from cifar_jax.checkpoints import trained
    from cifar_jax.steps.parallel import aligned, select_devices
    if sys.argv[1] == "training":
        select_devices(1)
    elif sys.argv[1] == "a network":
        trained.load(Path(sys.argv[2]))
    import jax, numpy as np
    product = jax.jit(lambda x: x @ x @ x @ x)
    memory = np.ones(1500 * 1500 + 64, np.float32)
    odd = (-memory.ctypes.data % 64 + 16) // 4
    images = memory[odd : odd + 1500 * 1500].reshape(1500, 1500)
    product(images).block_until_ready()
    print(product(aligned(images)).is_ready())  # on return, not later by another thread
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


def test_only_an_array_at_another_address_is_copied() -> None:
    x = aligned(np.arange(24, dtype=np.int32).reshape(2, 3, 4))
    assert aligned(x) is x
    for other in (x[1:], x[..., ::2]):  # 48 bytes on; and not contiguous
        copy = aligned(other)
        np.testing.assert_array_equal(copy, other)
        assert copy.ctypes.data % 64 == 0
        assert copy.flags.c_contiguous
        assert not np.shares_memory(copy, other)
        assert shard({"x": other}, jax.devices()[:1])["x"].ctypes.data % 64 == 0
