"""The parts of the study that its figures rest on."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERIMENTS
from test_layout import random_variables

import nhwc_vs_nchw
import paired_timing
from cifar_jax import layout, parity, torch_reference
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.models import create_model
from cifar_jax.steps.train_step import normalize
from layouts import models, nchw_program, timings, training
from layouts.figure import draw
from layouts.hlo import count_moves
from layouts.pitfalls import measure_pitfalls

SHAPE = (16, 16, 3)
CONFIGS = {
    "cnn": TrainConfig(model="cnn", widths=(4, 8), hidden=(16,)),
    "cnn-wide": TrainConfig(model="cnn-wide", widths=(4, 4, 8, 8), hidden=(16,)),
    "resnet9": TrainConfig(model="resnet9", widths=(4, 8, 8, 8)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_nchw_program_is_the_same_network(name: str, train: bool) -> None:
    config = CONFIGS[name]
    model = create_model(config, 10)
    variables = random_variables(config, SHAPE, "float32")
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    expected, updated = jax.jit(
        lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"])
    )(variables, images)
    tensors = layout.to_torch(variables, model.torch_layout(SHAPE))
    logits, statistics = jax.jit(lambda t, x: nchw_program.apply(model, t, x, train=train))(
        tensors, layout.nhwc_to_nchw(images)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    theirs = layout.to_torch(dict(updated), model.torch_layout(SHAPE))
    for tensor, value in statistics.items():
        np.testing.assert_allclose(value, theirs[tensor], rtol=1e-4, atol=1e-5)
    assert len(statistics) == 16 * (name == "resnet9") * train


@pytest.mark.parametrize("name", ["NHWC", "NCHW"])
def test_a_timed_forward_pass_gives_logits_alone(name: str) -> None:
    """Weights among its results would be copied, in each pass."""
    spec = {"framework": "jax", "model": "cnn", "layout": name, "batch_size": 2}
    infer, state, batch = timings.compile_jax_step(spec, "forward")
    assert [leaf.shape for leaf in jax.tree.leaves(infer(state, batch))] == [(2, 10)]
    programs, _ = timings.make_programs(spec)
    for run in [*programs.values()] * 2:  # a state that is given away is not used again
        run(2)


def test_the_pitfalls_and_the_figure_follow_from_the_other_sections(tmp_path: Path) -> None:
    stored = json.loads((EXPERIMENTS / "results" / "nhwc_vs_nchw.json").read_text())
    expected = stored["pitfalls"]["flatten_order"]
    assert expected["accuracy"] == expected["accuracy_converted"]  # so they are told apart here
    stored["training"]["flax_initial_weights"]["test_correct"]["jax_weights_in_torch"] = 7000
    found = measure_pitfalls(stored["training"])
    assert found["flatten_order"] == {**expected, "accuracy_converted": 0.7}
    assert found["permute_is_a_view"]["torch_same_memory"]
    assert not found["permute_is_a_view"]["jax_same_memory"]
    strided = found["same_padding_with_stride_2"]
    assert strided["difference_SAME_32x32"] > 0.1 > 1e-5 > strided["difference_padding_1_32x32"]
    assert found["imshow"]["share_of_values_misplaced_by_reshape"] > 0.9
    assert found["imshow"]["share_of_values_misplaced_by_transpose"] == 0
    for layer in found["initialisers"]["std"].values():
        assert layer["flax_kernel"] == pytest.approx(layer["fan_in"] ** -0.5, rel=0.1)
        assert layer["torch_kernel"] == pytest.approx((3 * layer["fan_in"]) ** -0.5, rel=0.1)
    norm = found["batch_norm_momentum"]
    assert norm["mean_difference_momentum_0.1"] > 1 > 1e-5 > norm["mean_difference_momentum_0.9"]
    assert (
        norm["variance_difference_as_it_is"] > 1e-3 > 1e-5 > norm["variance_difference_corrected"]
    )
    assert found["onecycle_momentum"]["torch_first_beta_min"] == pytest.approx(0.85)
    draw({**stored, "pitfalls": found}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_weights_are_scored_in_both_frameworks_and_without_the_permutation() -> None:
    """The labels are the answers of JAX's weights; PyTorch has others."""
    model = create_model(CONFIGS["cnn"], 10)
    pair = parity.Pair(model, random_variables(CONFIGS["cnn"], SHAPE, "float32"), SHAPE)
    weights = torch_reference.initial_state_dict(model, SHAPE, seed=0)
    torch_reference.load(pair.twin, weights)
    pixels = np.random.default_rng(0).integers(0, 256, (600, *SHAPE), dtype=np.uint8)
    mean, std = 3 * (0.5,), 3 * (0.25,)
    logits = jax.jit(model.apply)(pair.variables, normalize(jnp.asarray(pixels), mean, std))
    split = Split(pixels, np.asarray(logits.argmax(-1), np.int32))
    data = Dataset("noise", "", tuple("0123456789"), split, split, split, mean, std)
    found = training._cross_score(pair, pair.variables, data)
    assert found["jax_weights_in_jax"] == found["jax_weights_in_torch"] == 600
    assert found["jax_weights_in_torch_without_permutation"] < 500
    assert found["torch_weights_in_torch"] == found["torch_weights_in_jax"] < 500


def test_the_largest_difference_is_told_and_no_nan_is_lost() -> None:
    assert models._largest([1.0, 3.0, 2.0]) == 3
    assert math.isnan(models._largest([1.0, math.nan, 2.0]))


def test_the_moves_of_a_program_are_counted() -> None:
    hlo = """
      %fused (p: f32[2,3]) -> f32[3,2] {
        ROOT %t = f32[3,2]{1,0} transpose(%p), dimensions={1,0}
      }
      %copy.1 = f32[4]{0} copy(%x)
      %copy.2 = f32[]{:T(128)} copy(%y)
      %transpose_copy_fusion = f32[3,2]{1,0} fusion(%x), calls=%fused
    """
    assert count_moves(hlo) == {
        "transposes": 1,
        "elements_in_transposes": 6,
        "copies": 2,
        "elements_in_copies": 5,
    }


WORKER = """
    import json, sys, time
    import paired_timing

    def make(spec):
        if spec["ms"] < 0:
            raise ValueError("no such program")
        print("a library that prints")
        slow, fast = (lambda n, k=k: time.sleep(n * k * spec["ms"] / 1e3) for k in (3, 1))
        return {"slow": slow, "fast": fast}, lambda: {"device": "bed"}

    paired_timing.serve(json.loads(sys.argv[1]), make)
"""


def test_programs_are_timed_in_turn_and_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_timing.time, "sleep", lambda _: None)  # here, not in the workers
    command = _write_worker(tmp_path)
    specs = [{"ms": ms, "batch_size": 8} for ms in (1, 20)]
    timings = paired_timing.time_in_turn(command, specs, rounds=3, steps=2, cwd=EXPERIMENTS)
    rows = {(row["ms"], row["pass"]): row for row in (timing.row() for timing in timings)}
    assert set(rows) == {(1, "slow"), (1, "fast"), (20, "slow"), (20, "fast")}
    for (ms, pass_), row in rows.items():
        assert row["step_ms_min"] >= ms * (3 if pass_ == "slow" else 1)
        assert row["step_ms_min"] <= row["step_ms_median"] <= row["step_ms_max"]
        assert row["step_ms_min"] < 100  # of one step, of 60 ms at most
        assert row["images_per_second"] == pytest.approx(8000 / row["step_ms_median"])
        assert (row["rounds"], row["device"]) == (3, "bed")
        assert row["peak_memory_mb"] >= row["memory_before_mb"] > 0


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    command = _write_worker(tmp_path)
    specs = [{"ms": ms, "batch_size": 8} for ms in (1, -1)]
    with pytest.raises(CifarJaxError, match=r"ms': -1.* ended with 1: ValueError: no such program"):
        paired_timing.time_in_turn(command, specs, rounds=1, steps=1, cwd=EXPERIMENTS)


def test_a_worker_that_is_killed_between_two_turns_is_told() -> None:
    """As one is where memory is short; not by the silence of a pipe without a reader."""
    with paired_timing._Worker(["sh", "-c", "exec sleep 9"], {}, EXPERIMENTS) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(CifarJaxError, match="ended with -9: no last words"):
            worker.ask("forward 1")


def _write_worker(folder: Path) -> list[str]:
    script = folder / "worker.py"
    path = f"import sys\nsys.path.insert(0, {json.dumps(str(EXPERIMENTS))})\n"
    script.write_text(path + textwrap.dedent(WORKER))
    return [sys.executable, str(script)]


@pytest.mark.parametrize("other", ["machine", "backend", "versions", "data", None])
def test_a_study_is_continued_only_where_it_was_begun(other: str | None, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    begun = nhwc_vs_nchw.Study(path, {"quick": True, "data": "shapes"})
    begun.measure("models", lambda: "measured before")
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "date": "2001-02-03", **({other: "x"} if other else {})}))
    study = nhwc_vs_nchw.Study(path, {"quick": True, "data": "shapes"})
    study.measure("models", lambda: "measured anew")
    assert study.results["models"] == ("measured anew" if other else "measured before")
