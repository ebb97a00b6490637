"""``cifar_jax.summary``, as a command, and what a training step takes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import jax
import optax
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.networks.models import create_model
from cifar_jax.steps import step_memory as module
from cifar_jax.steps.step_memory import largest_batch, step_memory
from cifar_jax.summary import SummaryOptions, describe, main, summarize

SHAPE = (8, 8, 3)


def test_json_has_the_layers_and_totals() -> None:
    code = (
        "import sys; from cifar_jax.summary import main; main(sys.argv[1:]);"
        "assert not {'tensorflow', 'torch', 'PIL'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "--json", "--image-size", "8", "--batch-size", "4"]
    found = subprocess.run(command, capture_output=True, check=True, timeout=120)
    summary = json.loads(found.stdout)
    assert summary["total_params"] == sum(layer["params"] for layer in summary["layers"])
    assert summary["total_macs"] == sum(layer["macs"] for layer in summary["layers"])
    assert summary["layers"][0] == {
        **{"name": "Conv_0", "kind": "conv", "output_shape": [4, 8, 8, 16], "params": 448},
        **{"arithmetic": "3*3*3*16 + 16", "macs": 8 * 8 * 16 * 27, "receptive_field": 3},
        **{"stride": 1, "start": -1, "activation_bytes": 4 * 4 * 8 * 8 * 16},
    }
    assert summary["largest_batch"] is None


def test_the_table_shows_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "cnn", "--image-size", "8", "--widths", "4,8", "--hidden", "16"])
    shown = capsys.readouterr().out
    assert "3*3*4*8 + 8 = 296" in shown
    total = 3 * 3 * 3 * 4 + 4 + 296 + 2 * 2 * 8 * 16 + 16 + 16 * 10 + 10
    assert f"{total:,}" in next(line for line in shown.splitlines() if line.startswith("total"))


def test_memory_counts_parameters_and_optimizer() -> None:
    config = TrainConfig(widths=(4, 8), hidden=(16,), batch_norm=True)
    model = create_model(config, 10)
    memory = step_memory(config, model, SHAPE, 16)
    images = jax.ShapeDtypeStruct((1, *SHAPE), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    adam = jax.eval_shape(optax.adam(1e-3).init, params)
    # Beside Adam's own, one step count of the schedule.
    assert memory.opt_state == sum(4 * x.size for x in jax.tree.leaves(adam)) + 4
    assert memory.params == sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory.batch_stats == 2 * (4 + 8) * 4
    held = memory.params + memory.batch_stats + memory.opt_state
    batch = 16 * (8 * 8 * 3 + 4)
    assert memory.xla_arguments == pytest.approx(held + 4 + batch, abs=64)
    assert memory.xla_total >= memory.xla_arguments + memory.xla_temporaries
    assert memory.xla_temporaries > memory.params  # the gradients are among them


def test_the_largest_batch_fits_and_twice_as_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    step_memory = functools.cache(module.step_memory)  # what the search compiled is asked again
    monkeypatch.setattr(module, "step_memory", step_memory)
    config = TrainConfig(widths=(4,), hidden=(8,))
    model = create_model(config, 10)
    known = step_memory(config, model, SHAPE, 16)
    limit = 1e6
    found = largest_batch(config, model, SHAPE, limit, known)
    assert found is not None
    assert found.xla_total <= limit
    assert step_memory(config, model, SHAPE, 2 * found.batch_size).xla_total > limit
    assert largest_batch(config, model, SHAPE, 100, known) is None


@pytest.mark.parametrize("guessed", [1.0, 1e-3, 1e3])
def test_a_wrong_guess_still_ends_at_the_largest_batch(
    guessed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(config: object, model: object, shape: object, n: int) -> module.StepMemory:
        return module.StepMemory(n, 100, 0, 0, 0, 0, 1000 + 10 * n)

    monkeypatch.setattr(module, "step_memory", memory)
    known = module.StepMemory(16, 100, 0, 0, 0, 0, int(1160 * guessed))
    found = largest_batch(TrainConfig(), None, SHAPE, 1000 + 10 * 64, known)  # type: ignore[arg-type]
    assert found is not None
    assert found.batch_size == 64


def test_a_batch_whose_compilation_runs_out_of_memory_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the compiler tries kernels out, with real arrays."""

    def memory(config: object, model: object, shape: object, n: int) -> module.StepMemory:
        if n > 64:
            raise jax.errors.JaxRuntimeError(message)
        return module.StepMemory(n, 100, 0, 0, 0, 0, 1000 + 10 * n)

    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
    monkeypatch.setattr(module, "step_memory", memory)
    for guess in (1160, 1160e-3, 1160e3):
        known = module.StepMemory(16, 100, 0, 0, 0, 0, int(guess))
        found = largest_batch(TrainConfig(), None, SHAPE, 1e6, known)  # type: ignore[arg-type]
        assert found is not None
        assert found.batch_size == 64
    message = "INTERNAL: a bug"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        largest_batch(TrainConfig(), None, SHAPE, 1e6, known)  # type: ignore[arg-type]


def test_what_does_not_fit_is_said() -> None:
    summary = summarize(SummaryOptions(model="linear", image_size=8, memory=1e-9))
    assert "none; the state alone takes" in describe(summary)


def test_images_too_small_for_the_pools_are_an_error() -> None:
    for model in ("cnn", "cnn-gap", "resnet9", "airbench"):
        with pytest.raises(CifarJaxError, match="1x1 pixels are left") as caught:
            main(["--model", model, "--image-size", "7"] if model == "cnn" else
                 ["--model", model, "--image-size", "4"])  # fmt: skip
        assert caught.value.exit_code == ExitCode.DATA


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(CifarJaxError, match="--widths with --model mlp"):
        main(["--model", "mlp", "--widths", "3"])
    with pytest.raises(CifarJaxError, match="--image-size 0"):
        main(["--image-size", "0"])
