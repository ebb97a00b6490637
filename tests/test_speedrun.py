"""Each ingredient of the speedrun, in float32, against a plain form of it; and small runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from jax import lax

import speedrun
import speedrun_check
import speedrun_gains
from airbench import measure, run
from airbench.fused import FusedAirbench
from airbench.optimizer import make_optimizer
from airbench.recipe import RECIPES, Recipe
from airbench.run import (
    VIEW_WEIGHTS,
    Batch,
    Examples,
    Setting,
    crop_and_flip,
    cut_out,
    draw_batches,
    mean_logits,
    reflect_pad,
    score,
    train_and_score,
    train_step,
    train_whole,
    views,
)
from cifar_jax import layout, torch_reference
from cifar_jax.data import shapes
from cifar_jax.data.dataset import Split
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks import blocks
from cifar_jax.networks.airbench import Airbench, gelu
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.winograd import Padding
from cifar_jax.steps.train_step import TrainState, initial_train_state, normalize

SMALL = Recipe(widths=(4, 8), epochs=3, batch_size=20, whitening_epochs=2, dtype="float32")
DEEP = dataclasses.replace(SMALL, deep=True, whitening_epochs=3, crop=3, cutout=5)
SHAPE = (12, 12, 3)


@functools.cache
def small_split(n: int = 60) -> Split:
    """Shapes, a corner of each."""
    images, labels = shapes.draw(n, seed=0)
    return Split(np.ascontiguousarray(images[:, 8:20, 8:20]), labels)


@functools.cache
def small(recipe: Recipe = SMALL) -> tuple[Setting, TrainState, Examples]:
    split = small_split()
    setting = measure.make_setting(recipe, split, 10)
    make_state = functools.partial(initial_train_state, setting.model, setting.tx, SHAPE)
    examples = Examples(jnp.asarray(split.pixels), jnp.asarray(split.labels))
    return setting, jax.jit(make_state)(0), examples


# Compiled once for all tests, which would take seconds to compile their operations one by one.
drawn = jax.jit(draw_batches, static_argnums=3)


@functools.cache
def compiled_step(recipe: Recipe) -> Callable[..., tuple[TrainState, jax.Array]]:
    setting = measure.make_setting(recipe, small_split(), 10)
    return jax.jit(
        functools.partial(train_step, setting=setting), static_argnames="learn_whitening"
    )


@functools.partial(jax.jit, static_argnums=3)
def shown(padded: jax.Array, batch: Batch, statistics: Any, recipe: Recipe) -> jax.Array:
    """The images of a batch, as a network is given them."""
    images = normalize(crop_and_flip(padded, batch, recipe.crop), *statistics)
    return cut_out(images, batch.hole, recipe.cutout) if recipe.cutout else images


def test_two_epochs_show_each_image_both_ways() -> None:
    first_ways = jnp.asarray(np.random.default_rng(0).random(60) < 0.5)
    shown = []
    for epoch in range(4):
        batches = drawn(jax.random.key(epoch), first_ways, epoch, SMALL)
        ways = np.empty(60, bool)
        ways[batches.index.ravel()] = np.asarray(batches.mirrored).ravel()
        shown.append(ways)
    np.testing.assert_array_equal(shown[0], first_ways)
    np.testing.assert_array_equal(shown[1], ~shown[0])
    np.testing.assert_array_equal(shown[2], shown[0])
    np.testing.assert_array_equal(shown[3], shown[1])


def test_an_epoch_is_in_another_order_each_time_and_has_each_image_once() -> None:
    nothing = jnp.zeros(65, bool)
    a, b = (drawn(jax.random.key(seed), nothing, 0, SMALL) for seed in (0, 1))
    assert a.index.shape == (3, 20)  # what does not fill a batch is left out
    assert len(set(np.asarray(a.index).ravel().tolist())) == 60
    assert not np.array_equal(a.index, b.index)
    corners = np.asarray(a.corner).reshape(-1, 2)
    assert set(corners.ravel().tolist()) == set(range(2 * SMALL.crop + 1))


def test_a_batch_is_cut_from_the_padded_images() -> None:
    images = small_split().pixels
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    batch = Batch(
        jnp.array([5, 0, 7]), jnp.array([[0, 4], [2, 2], [3, 1]]), jnp.array([False, True, True])
    )
    shown = np.asarray(crop_and_flip(reflect_pad(jnp.asarray(images), 2), batch, 2))
    np.testing.assert_array_equal(shown[0], padded[5, 0:12, 4:16])
    np.testing.assert_array_equal(shown[1], images[0][:, ::-1])  # the middle is the image itself
    np.testing.assert_array_equal(shown[2], padded[7, 3:15, 1:13][:, ::-1])


def test_a_square_is_cut_out_anywhere_in_the_image() -> None:
    hole = jax.random.uniform(jax.random.key(0), (500, 2))
    cut = np.asarray(jax.jit(cut_out, static_argnums=2)(jnp.ones((500, 6, 8, 3)), hole, 4))
    corners = set()
    for image in cut:
        rows, columns = ((image == 0).any(axis).any(-1).nonzero()[0] for axis in (1, 0))
        assert len(rows) == len(columns) == 4
        assert (image == 0).sum() == 4 * 4 * 3
        assert np.ptp(rows) == np.ptp(columns) == 3
        corners.add((int(rows[0]), int(columns[0])))
    assert corners == {(row, column) for row in range(3) for column in range(5)}
    assert drawn(jax.random.key(0), jnp.zeros(60, bool), 0, SMALL).hole is None


def test_the_mean_answer_is_that_of_six_views() -> None:
    setting, state, examples = small()
    image = np.asarray(examples.images[:1])
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    apply = jax.jit(functools.partial(setting.model.apply, train=False))
    expected, weights = 0.0, 0.0
    for x, weight in ((image, 0.5), (padded[:, :12, :12], 0.25), (padded[:, 2:, 2:], 0.25)):
        for way in (x, x[:, :, ::-1]):
            normalised = normalize(jnp.asarray(way), setting.mean, setting.std)
            logits = apply(state.variables, normalised)
            expected, weights = expected + weight / 2 * logits, weights + weight / 2
    assert weights == sum(VIEW_WEIGHTS) == 1
    assert views(examples.images[:1]).shape == (6, 1, *SHAPE)
    found = jax.jit(lambda s, x: mean_logits(s, x, setting))(state, examples.images[:1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "in_batches_of"), [(60, 20), (53, 18)])
def test_the_score_counts_what_the_mean_answer_names_right(
    n: int, in_batches_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of nearly the recipe's 20, also for a prime number of images."""
    setting, state, examples = small()
    examples = jax.tree.map(lambda x: x[:n], examples)
    sizes = set()

    def told(state: TrainState, images: jax.Array, setting: Setting) -> jax.Array:
        sizes.add(len(images))
        return mean_logits(state, images, setting)

    monkeypatch.setattr(run, "mean_logits", told)

    @jax.jit
    def both(state: TrainState, examples: Examples) -> tuple[jax.Array, jax.Array]:
        right = mean_logits(state, examples.images, setting).argmax(-1) == examples.labels
        return score(state, examples, setting=setting), right.sum()

    # The second always answers 0, which what fills the last batch must not be counted for.
    head = {"kernel": jnp.zeros_like(state.params["Dense_0"]["kernel"])}
    for params in (state.params, {**state.params, "Dense_0": head}):
        scored, counted = both(state.replace(params=params), examples)
        assert scored == counted
        assert 0 < counted < n
    assert sizes == {in_batches_of}


@functools.cache
def variables_of(model: Airbench) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))


@pytest.mark.parametrize("size", [10, 11, 12])
def test_the_trimmed_convolutions_give_what_the_full_ones_do(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients; with the rows that a pool leaves out, or without."""
    model = Airbench(10, widths=(4, 40))  # of 40 channels by Winograd's form, on a CPU
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, size, size, 3)), jnp.float32)
    variables = variables_of(model)

    def loss_fn(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum()

    trimmed = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    paddings = []

    def full(x: jax.Array, kernel: jax.Array, padding: Padding, paired: bool) -> jax.Array:
        paddings.append(padding)
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    monkeypatch.setattr(blocks, "conv3x3", full)
    in_full = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    assert ((1, 0), (1, 0)) in paddings  # so there was something to trim
    for ours, theirs in zip(jax.tree.leaves(trimmed), jax.tree.leaves(in_full), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_the_scan_is_a_loop_over_steps_and_is_decided_by_its_key() -> None:
    setting, state, examples = small()
    told = []
    setting = setting._replace(on_step=lambda: told.append(1))
    program = jax.jit(functools.partial(train_whole, setting=setting))
    key = jax.random.key(3)
    scanned, losses = program(state, key, examples)
    _, again = program(state, key, examples)
    _, other = program(state, jax.random.key(4), examples)
    jax.effects_barrier()
    assert len(told) == 3 * 9
    assert losses.shape == (9,)
    np.testing.assert_array_equal(losses, again)
    assert not np.array_equal(losses, other)
    # The same, step by step.
    from cifar_jax.networks.initializers import whiten

    images = normalize(examples.images, setting.mean, setting.std)
    start = state
    state = state.replace(params=whiten(state.params, images))
    padded = reflect_pad(examples.images, SMALL.crop)
    flip_key, epochs_key = jax.random.split(key)
    first_ways = jax.random.bernoulli(flip_key, shape=(60,))
    step = compiled_step(SMALL)
    expected = []
    for epoch in range(3):
        batches = drawn(jax.random.fold_in(epochs_key, epoch), first_ways, epoch, SMALL)
        for i in range(3):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            before = state.params["Whitening"]
            state, loss = step(padded, examples.labels, state, batch, learn_whitening=epoch < 2)
            expected.append(loss)
            after = state.params["Whitening"]
            np.testing.assert_array_equal(after["kernel"], before["kernel"])
            assert np.array_equal(after["bias"], before["bias"]) == (epoch == 2)
    np.testing.assert_allclose(losses[:3], expected[:3], rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-2)  # Muon enlarges what rounding differs
    for ours, theirs, begun in zip(
        *map(jax.tree.leaves, (scanned.params, state.params, start.params)), strict=True
    ):
        assert np.linalg.norm(ours - theirs) <= 0.02 * np.linalg.norm(theirs - begun)


def author_steps(
    twin: Any, batches: list[tuple[Any, Any]], recipe: Recipe, steps_per_epoch: int
) -> list[float]:
    """Its author's loop in PyTorch, ``airbench94_muon.py``, written out: trains ``twin``."""
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.4  # written 1 - 0.6 there
    total, of_whitening = recipe.epochs * steps_per_epoch, recipe.whitening_epochs * steps_per_epoch
    kernels = [p for p in twin.parameters() if p.ndim == 4 and p.requires_grad]
    biases = [p for n, p in twin.named_parameters() if "norm" in n and p.requires_grad]
    groups = [
        {"params": [twin.whiten.bias], "lr": recipe.bias_rate},
        {"params": biases, "lr": recipe.bias_rate},
        {"params": [twin.head.weight], "lr": recipe.head_rate},
    ]
    for group in groups:
        group["initial"], group["weight_decay"] = group["lr"], recipe.decay / group["lr"]
    sgd = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True)
    sums = [torch.zeros_like(p) for p in kernels]
    losses = []
    for step, (images, labels) in enumerate(batches):
        learn = step < of_whitening
        twin.train()
        twin.whiten.bias.requires_grad_(learn)
        loss = torch.nn.functional.cross_entropy(
            twin(images), labels, label_smoothing=recipe.label_smoothing, reduction="sum"
        )
        losses.append(loss.item() / len(labels))
        loss.backward()
        fall = 1 - step / total
        sgd.param_groups[0]["lr"] = recipe.bias_rate * max(1 - step / of_whitening, 0)
        sgd.param_groups[1]["lr"] = recipe.bias_rate * fall
        sgd.param_groups[2]["lr"] = recipe.head_rate * fall
        sgd.step()
        with torch.no_grad():
            for p, total_gradient in zip(kernels, sums, strict=True):
                total_gradient.mul_(recipe.kernel_momentum).add_(p.grad)
                g = p.grad.add(total_gradient, alpha=recipe.kernel_momentum)
                p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(
                    newton_schulz(g.reshape(len(g), -1)).view(g.shape),
                    alpha=-recipe.kernel_rate * fall,
                )
        twin.zero_grad(set_to_none=True)
    return losses


def newton_schulz(g: Any) -> Any:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(3):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("recipe", [SMALL, DEEP], ids=["as it is", "deep"])
def test_it_trains_as_its_authors_loop_does(recipe: Recipe) -> None:
    check_training(recipe)


@pytest.mark.parametrize("recipe", [SMALL, DEEP], ids=["as it is", "deep"])
def test_it_does_so_with_kernels_too(recipe: Recipe) -> None:
    """Which an interpreter runs."""
    # Not optimized, XLA rounds the last activations in two ways, and finds no maximum among them.
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        check_training(dataclasses.replace(recipe, fused=True))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("deep", [False, True])
def test_the_fused_network_has_the_same_variables(deep: bool) -> None:
    """So its parameters are scored, and stored, as those of the other."""
    x = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    plain, fused = (network(10, (4, 8), deep) for network in (Airbench, FusedAirbench))
    expected = jax.eval_shape(plain.init, jax.random.key(0), x)
    for train in (False, True):
        assert expected == jax.eval_shape(
            functools.partial(fused.init, train=train), jax.random.key(0), x
        )


@pytest.mark.parametrize("train", [False, True])
def test_a_barrier_is_before_the_last_maximum_of_the_fused_network(train: bool) -> None:
    """What it prevents happens on a GPU alone."""
    init = functools.partial(FusedAirbench(10, (4,)).init, train=train)
    program = jax.make_jaxpr(init)(jax.random.key(0), jnp.zeros((2, *SHAPE)))
    operations = [equation.primitive.name for equation in program.eqns]
    assert operations[operations.index("reduce_max") - 1] == "optimization_barrier"


@pytest.mark.parametrize(
    ("capability", "takes"),
    [({"compute_capability": "9.0"}, True), ({"compute_capability": "8.0"}, True)]
    + [({"compute_capability": older}, False) for older in ("7.5", "gfx942")]
    + [({}, False)],  # a CPU
)
def test_kernels_are_for_gpus_that_triton_is_for(
    capability: dict[str, str], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**capability)])
    assert measure.takes_kernels() is takes


def check_training(recipe: Recipe) -> None:
    """The same batches from the same start, in PyTorch and here: losses, parameters, averages."""
    # Kernels change neither variables nor batches.
    plain = dataclasses.replace(recipe, fused=False)
    setting, state, examples = small(plain)
    padded = reflect_pad(examples.images, recipe.crop)
    torch_layout = setting.model.torch_layout(SHAPE)
    twin = torch_reference.make_twin(setting.model, SHAPE)
    torch_reference.load(twin, layout.to_torch(jax.device_get(state.variables), torch_layout))
    step = compiled_step(recipe)
    batches, losses = [], []
    for epoch in range(3):
        of_epoch = drawn(jax.random.key(epoch), jnp.zeros(60, bool), epoch, plain)
        for i in range(3):
            batch = jax.tree.map(lambda x, i=i: x[i], of_epoch)
            images = shown(padded, batch, (setting.mean, setting.std), plain)
            labels = np.asarray(examples.labels)[np.asarray(batch.index)]
            nchw = layout.nhwc_to_nchw(np.asarray(images))
            batches.append((torch.from_numpy(nchw), torch.from_numpy(labels).long()))
            state, loss = step(
                padded,
                examples.labels,
                state,
                batch,
                learn_whitening=epoch < recipe.whitening_epochs,
            )
            losses.append(float(loss))
    start = torch_reference.state_dict_of(twin)
    np.testing.assert_allclose(losses, author_steps(twin, batches, recipe, 3), rtol=2e-3)
    theirs = torch_reference.state_dict_of(twin)
    ours = layout.to_torch(jax.device_get(state.variables), torch_layout)
    for name, value in theirs.items():
        if np.any(value != start[name]) and not name.endswith("num_batches_tracked"):
            moved = np.linalg.norm(value - start[name])
            assert np.linalg.norm(ours[name] - value) < 0.05 * moved, name


def test_gelu_is_near_the_exact_one() -> None:
    x = jnp.linspace(-6, 6, 2001)

    @jax.jit
    def all_of(x: jax.Array) -> Any:
        slopes = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (gelu, nn.gelu)]
        return gelu(x), nn.gelu(x, approximate=True), nn.gelu(x, approximate=False), slopes

    ours, tanh, exact, slopes = all_of(x)
    np.testing.assert_allclose(ours, tanh, atol=1e-6)
    np.testing.assert_allclose(ours, exact, atol=5e-4)
    np.testing.assert_allclose(*slopes, atol=1e-5)


def test_the_count_of_operations_is_that_of_the_table() -> None:
    """By hand: trimmed, as the program does it, and whole, as its author publishes it."""
    recipe = RECIPES["94"]
    assert recipe == Recipe()
    setting = Setting(recipe, Airbench(10), make_optimizer(recipe, 25), (0.5,) * 3, (0.25,) * 3)
    whitening = 31 * 31 * 24 * 2 * 2 * 3
    first = 30 * 30 * 64 * 9 * 24
    others = (15 * 15 * 64 * 9 * 64) + (14 * 14 * 256 * 9 * 64)
    others += (7 * 7 + 6 * 6 + 3 * 3) * 256 * 9 * 256 + 256 * 10
    training = 50_000 * (8 * (whitening + 3 * (first + others)) - 5 * first)
    test = 6 * 10_000 * (whitening + first + others)
    flop = measure.run_flop(setting, 50_000, 10_000, (32, 32, 3))
    assert sum(flop.values()) == 2 * (training + test)
    assert flop["convolutions: gradient of the kernel"] == 2 * 50_000 * 8 * (first + others)
    assert round((whitening + first + others) / 1e6, 1) == 105.4
    # With the rows and columns that the pools leave out: the published 118.1 and 290 TFLOP.
    rows = {row.name: row.macs for row in layer_table(setting.model, (32, 32, 3), 1)}
    whole = sum(
        macs * (n / (n - 1)) ** 2
        if (n := {"Conv_0": 31, "Conv_2": 15, "Conv_4": 7}.get(name, 0))
        else macs
        for name, macs in rows.items()
    )
    assert round(whole / 1e6, 1) == 118.1


@pytest.mark.parametrize(("name", "tflop"), [("95", 1216), ("96", 4563)])
def test_a_recipe_is_a_program_of_the_work_that_is_told(name: str, tflop: int) -> None:
    """As a GPU gets it, on all images; no more than traced, as here it would compute for hours."""
    recipe = RECIPES[name]
    model = FusedAirbench(10, recipe.widths, recipe.deep, dtype=jnp.float16)
    setting = Setting(recipe, model, make_optimizer(recipe, 25), (0.5,) * 3, (0.25,) * 3)
    flop = measure.run_flop(setting, 50_000, 10_000, (32, 32, 3))
    assert round(sum(flop.values()) / 1e12) == tflop
    state = jax.eval_shape(
        functools.partial(initial_train_state, setting.model, setting.tx, (32, 32, 3)), 0
    )
    train, test = (
        Examples(
            jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.uint8), jax.ShapeDtypeStruct((n,), jnp.int32)
        )
        for n in (50_000, 10_000)
    )
    program = functools.partial(train_and_score, setting=setting)
    result = jax.eval_shape(program, state, jax.random.key(0), train, test)
    assert result["loss"].shape == (recipe.epochs * 25,)
    assert result["correct"].shape == ()


def test_the_interval_is_students() -> None:
    runs = [{"accuracy": 0.94 + s / 1000, "seconds": float(s)} for s in range(4)]
    found = measure.summary(runs)
    assert found["mean_accuracy"] == pytest.approx(0.9415)
    assert found["seconds_mean"] == 1.5
    of_sample = (5 / 3) ** 0.5
    assert (found["std"], found["seconds_std"]) == pytest.approx((of_sample / 1000, of_sample))
    margin = 3.182 * found["std"] / 2  # 3 degrees of freedom
    np.testing.assert_allclose(found["interval_95"], [0.9415 - margin, 0.9415 + margin], rtol=1e-5)
    assert measure.summary(runs[:1])["interval_95"] is None


def test_a_run_is_timed_from_its_first_parameters_and_strictly_from_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = small_split()
    answers = {"correct": jnp.array(30), "loss": jnp.ones(9)}
    monkeypatch.setattr(measure, "_cold_and_warm", lambda compiling: (lambda *_: answers, {}))
    ticks = iter((0.0, 5.0, 7.0, 8.0))  # begun, parameters drawn, done, the accuracy fetched
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    timed, _ = measure.compile_run(measure.make_setting(SMALL, split, 10), split, split)
    found = timed(3)
    assert (found["seconds"], found["seconds_strict"]) == (2, 8)
    assert (found["seed"], found["accuracy"]) == (3, 0.5)


def test_the_ceiling_is_the_best_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((0, 9, 10, 13, 20, 29, 30, 39, 40, 49))  # three products in 3 seconds at best
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert measure.ceiling_flops("float32", 4) == 2 * 4**3


def test_a_kernel_is_known_by_its_name() -> None:
    names = ["cudnn-conv-bw-input.3", "cudnn-conv-bw-filter", "cudnn-conv-fw.1", "nvjet_hsh", "add"]
    assert [measure._kind(name) for name in names] == [
        "convolutions: gradient of the input",
        "convolutions: gradient of the kernel",
        "convolutions: forward",
        "products of matrices",
        "all else",
    ]


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--runs", "0"], "--runs 0 is out of range. Fix: give 1 or more"),
        (["--output", f"{__file__}/x.json"], "cannot write --output .*: .* Fix: give another"),
        (["--output", "."], "--output . is a folder. Fix: name a file in it"),
        (["--beside", "none.py"], "--beside none.py is not a file. Fix: give airbench94_muon.py"),
        (["--data", "none"], "--data none does not exist. Fix: give a folder"),
        (["--beside", "x.py", "--recipe", "96"], "recipe 94, and another is asked for"),
        (["--beside", "x.py", "--smoke"], "recipe 94, and another is asked for"),
        (["--smoke", "--widths", "4,8,8"], "--smoke has a recipe, data and score of its own"),
    ],
)
def test_wrong_options_are_told_at_once(
    argv: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--output", str(tmp_path / "x.json"), *argv])
    with pytest.raises(CifarJaxError, match=what):
        speedrun.main()


@pytest.mark.parametrize("widths", ["16,64", "16,64,x", "16,0,64"])
def test_widths_are_three_numbers(widths: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{widths} is not of the form 16,64,64"):
        speedrun._widths(widths)


@pytest.mark.long
def test_steps_in_the_type_of_the_runs_are_near_those_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["check", "--smoke", "--output", str(output)])
    speedrun_check.main()
    exact, half = json.loads(output.read_text())["rows"]
    assert len(exact["steps"]) == len(half["steps"]) == 3
    assert exact["steps"][2]["params"] < 1e-6
    assert 0 < half["steps"][0]["loss"] < 1e-4


def test_a_device_that_computes_something_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "check.json"
    losses = iter((1.0, 1.01))
    monkeypatch.setattr(speedrun_check, "_steps", lambda *_: [{"loss": np.array(next(losses))}])
    monkeypatch.setattr(speedrun_check, "_first_state", lambda setting: {})
    monkeypatch.setattr(sys, "argv", ["check", "--smoke", "--output", str(output)])
    with pytest.raises(CifarJaxError, match=r"float32: the first loss on cpu is off by 1.0e-02"):
        speedrun_check.main()
    assert len(json.loads(output.read_text())["rows"]) == 1


def test_each_choice_taken_away_is_another_program_for_a_gpu() -> None:
    recipe = Recipe(widths=(4,), batch_size=20, fused=True)
    parts = {"": speedrun_gains.WITH_ALL, **speedrun_gains.PARTS}
    programs = {
        name: speedrun_gains.trace(recipe, part)[0].lower(lowering_platforms=("cuda",)).as_text()
        for name, part in parts.items()
    }
    assert len(set(programs.values())) == len(programs) > 5


def test_what_a_choice_gives_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gains.json"
    argv = ["speedrun_gains.py", "--smoke", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    ticks = iter((0.0, 0.2, 1.0, 1.1))  # an epoch of ten steps without it, and one with all
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(speedrun_gains, "time", clock)
    unfit = speedrun_gains._Part(recipe={"dtype": "float17"})
    monkeypatch.setattr(
        speedrun_gains, "PARTS", {"nothing": speedrun_gains.WITH_ALL, "unfit": unfit}
    )
    with pytest.raises(TypeError, match="float17"):
        speedrun_gains.main()
    (row,) = json.loads(output.read_text())["rows"]  # stored before the next one failed
    assert row["without"] == "nothing"
    assert (row["step_ms_min"], row["step_ms_median"]) == pytest.approx((20, 20))
    with_all = (row["with_all_step_ms_min"], row["with_all_step_ms_median"])
    assert with_all == pytest.approx((10, 10))


# Of the author's script what airbench/author.py calls, on a CPU: it counts what it is given.
SCRIPT = """
import sys
import torch

assert open(sys.argv[0]).read()

class CifarNet(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
    def cuda(self):
        return self
    def to(self, memory_format):
        return self
    def compile(self, mode):
        assert mode == "max-autotune"

def main(run, model):
    for split in ("train", "test"):
        data = torch.load(f"cifar10/{split}.pt")
        assert data["images"].shape == (60, 12, 12, 3) and data["images"].dtype == torch.uint8
        assert sorted(data["labels"].tolist()) == sorted(LABELS)
    if run == FAILS:
        sys.exit(3)
    print_training_details({"time_seconds": 2.0}, True)
    return 0.5
"""


@pytest.mark.parametrize(("fails", "n"), [("2", 2), ("'warmup'", 0)])
def test_the_authors_script_is_run_beside_and_what_it_found_is_kept(
    fails: str, n: int, tmp_path: Path
) -> None:
    """Also when it then fails."""
    split = small_split()
    script = tmp_path / "script.py"
    labels = str(split.labels.tolist())
    script.write_text(SCRIPT.replace("LABELS", labels).replace("FAILS", fails))
    found, output = {"seconds_mean": 0.5}, tmp_path / "x.json"
    with pytest.raises(CifarJaxError, match="ended with status 3, after what it says above"):
        speedrun.run_beside(script, split, split, 3, found, output)
    assert sorted(os.listdir(tmp_path)) == (["script.py", "x.json"] if n else ["script.py"])
    if n:
        found = json.loads(output.read_text())
        beside = found["beside"]
        assert beside["runs"] == n * [{"accuracy": 0.5, "seconds": 2.0}]
        assert (beside["n"], beside["seconds_mean"], beside["mean_accuracy"]) == (n, 2.0, 0.5)
        assert found["ratio"] == 4


def test_of_the_authors_script_what_it_found_is_kept_if_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, output = small_split(), tmp_path / "x.json"

    def stopped(command: list[str], **options: Any) -> None:
        run = {"accuracy": 0.5, "seconds": 2.0}
        Path(command[-1]).write_text(json.dumps({"torch": "2", "runs": [run, run]}))
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        speedrun.run_beside(Path("x.py"), split, split, 3, {"seconds_mean": 4.0}, output)
    found = json.loads(output.read_text())
    assert (found["ratio"], found["beside"]["n"]) == (0.5, 2)


def fake_run(seed: int) -> dict[str, Any]:
    loss = np.array([2.0, math.nan if seed == 2 else 1.0])
    return {"seed": seed, "accuracy": 0.9, "seconds": 2.0, "seconds_strict": 2.5, "loss": loss}


def test_each_run_is_stored_before_the_next_and_a_bad_one_ends_it(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    found = {"tflop": 3.0, "ceiling_tflops": 6.0}
    with pytest.raises(CifarJaxError, match=r"seed 2: the loss is nan.*runs before it are in .*x"):
        speedrun.run_seeds(fake_run, 4, found, output)
    stored = json.loads(output.read_text())
    assert [run["seed"] for run in stored["runs"]] == [0, 1]
    assert stored["runs"][0]["loss_first_and_last"] == [2.0, 1.0]
    assert (stored["n"], stored["mean_accuracy"], stored["std"]) == (2, 0.9, 0)
    assert (stored["seconds_mean"], stored["seconds_strict_mean"]) == (2, 2.5)
    assert (stored["tflops"], stored["share_of_ceiling"]) == (1.5, 0.25)


def test_a_result_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "x.json"
    output.write_text("200 runs")
    for program in (speedrun, speedrun_gains):
        monkeypatch.setattr(sys, "argv", ["program", "--smoke", "--output", str(output)])
        with pytest.raises(CifarJaxError, match=r"--output .*x.json exists, and is not overwrit"):
            program.main()
    assert output.read_text() == "200 runs"


def test_too_few_images_are_told(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["speedrun.py", "--output", "x.json", "--data", str(image_folder)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(CifarJaxError, match=r"has \d+ images to train on, and a step takes 2,000"):
        speedrun.main()


def test_the_command_trains_a_short_run_that_learns(tmp_path: Path) -> None:
    """As a person calls it, on a machine without a GPU: under three minutes, with every figure."""
    output = tmp_path / "smoke.json"
    command = [sys.executable, speedrun.__file__, "--smoke", "--output", str(output)]
    # It computes for longer than it compiles.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    finished = subprocess.run(
        [*command, "--runs", "1"],
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
        env=environment,
    )
    found = json.loads(output.read_text())
    assert found["n"] == len(found["runs"]) == 1
    assert found["mean_accuracy"] > 0.9  # 0.1 by chance
    at_first, at_last = found["runs"][0]["loss_first_and_last"]
    assert at_last < 0.5 * at_first
    assert found["compile_seconds"]["warm"] < found["compile_seconds"]["cold"]
    for name in ("seconds_mean", "seconds_strict_mean", "tflops", "share_of_ceiling"):
        assert found[name] > 0, name
    assert len(found["data_digest"]) == 64
    assert "2,000 images to train on" in finished.stdout
    assert finished.stderr == ""
