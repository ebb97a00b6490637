"""How long a step takes: JAX in NHWC and NCHW, PyTorch contiguous and channels_last."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import paired_timing
from cifar_jax import layout
from cifar_jax.config import ModelName, TrainConfig
from cifar_jax.networks.models import create_model
from cifar_jax.steps.parallel import compile_lowered
from layouts import nchw_program
from layouts.networks import CLASSES, initial_variables

_EXPERIMENTS = Path(__file__).resolve().parents[1]
# In one turn: after a pause the first steps are slow.
_STEPS: dict[ModelName, int] = {"cnn": 20, "cnn-wide": 3, "resnet9": 5}

Programs = tuple[dict[str, paired_timing.RunSteps], paired_timing.Describe]


def time_all(quick: bool) -> list[dict[str, Any]]:
    """Rows of ``framework, layout, mode, pass, model, batch_size, step_ms_...``."""
    programs = [("jax", "NHWC", "compiled"), ("jax", "NCHW", "compiled")]
    for mode in ("eager",) if quick else ("eager", "compiled"):
        programs += [("torch", "contiguous", mode), ("torch", "channels_last", mode)]
    rows = []
    models: list[ModelName] = ["cnn"] if quick else list(_STEPS)
    for model in models:
        on_cpu = jax.default_backend() == "cpu"
        batch_size = 16 if model == "resnet9" and on_cpu else 128  # 128 take seconds there
        specs = [
            {
                "framework": framework,
                "layout": layout_name,
                "mode": mode,
                "model": model,
                "batch_size": batch_size,
            }
            for framework, layout_name, mode in programs
        ]
        command = [sys.executable, "-m", "layouts.timings"]
        rounds = 3 if quick else 11
        for timing in paired_timing.time_in_turn(
            command, specs, rounds=rounds, steps=_STEPS[model], cwd=_EXPERIMENTS
        ):
            row = timing.row()
            rows.append(row)
            print(
                f"  {model:9s} {row['pass']:8s} {row['framework']:6s} {row['layout']:14s} "
                f"{row['mode']:9s} {row['step_ms_median']:7.1f} ms "
                f"({row['step_ms_min']:.1f} to {row['step_ms_max']:.1f})",
                flush=True,
            )
    return rows


def make_programs(spec: dict[str, Any]) -> Programs:
    """The programs ``forward`` and ``train`` that a worker times."""
    make = make_jax_programs if spec["framework"] == "jax" else make_torch_programs
    return make(spec)


def jax_step(spec: dict[str, Any], pass_: str) -> tuple[Callable[..., Any], Any, tuple[Any, Any]]:
    """``forward`` or ``train`` in ``spec``'s layout, with its state and its batch.

    ``forward`` returns logits, ``train`` the next state and the loss. The two layouts share
    everything but the network: loss, gradient, Adam.
    """
    image_shape = (32, 32, 3)
    model = create_model(TrainConfig(model=spec["model"]), CLASSES)
    variables = initial_variables(model, image_shape)
    images, labels = timing_batch(spec["batch_size"])
    if spec["layout"] == "NHWC":
        params, statistics = variables["params"], variables["batch_stats"]

        def apply(params: Any, statistics: Any, images: Any, train: bool) -> tuple[Any, Any]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=train,
                mutable=["batch_stats"],
            )
            return logits, updated.get("batch_stats", {})

    else:
        images = layout.nhwc_to_nchw(images)
        tensors = layout.to_torch(variables, model.torch_layout(image_shape))
        tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
        statistics = {name: tensor for name, tensor in tensors.items() if "running" in name}
        params = {name: tensor for name, tensor in tensors.items() if "running" not in name}

        def apply(params: Any, statistics: Any, images: Any, train: bool) -> tuple[Any, Any]:
            return nchw_program.apply(model, {**params, **statistics}, images, train=train)

    if pass_ == "forward":

        def forward(state: Any, batch: Any) -> Any:  # not the state too: it would be copied
            params, statistics = state
            return apply(params, statistics, batch[0], False)[0]

        return forward, (params, statistics), (images, labels)

    tx = optax.adam(1e-3)

    def train(state: Any, batch: Any) -> tuple[Any, Any]:
        params, statistics, opt_state = state

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = apply(params, statistics, batch[0], True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return losses.mean(), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), updated, opt_state), loss

    return train, (params, statistics, tx.init(params)), (images, labels)


def compile_jax_step(spec: dict[str, Any], pass_: str) -> tuple[jax.stages.Compiled, Any, Any]:
    step, state, batch = jax_step(spec, pass_)
    donated = () if pass_ == "forward" else (0,)
    lowered = jax.jit(step, donate_argnums=donated).lower(state, batch)
    compiled = compile_lowered(lowered, jax.default_backend())
    return compiled, *jax.device_put((state, batch))


def make_jax_programs(spec: dict[str, Any]) -> Programs:
    infer, fixed_state, images = compile_jax_step(spec, "forward")
    step, state, batch = compile_jax_step(spec, "train")

    def forward(steps: int) -> None:
        for _ in range(steps):
            logits = infer(fixed_state, images)
        jax.block_until_ready(logits)

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    def describe() -> dict[str, Any]:
        device = jax.devices()[0]
        on_device = device.memory_stats()  # None on a CPU
        peak = {"device_peak_mb": on_device["peak_bytes_in_use"] >> 20} if on_device else {}
        return {"device": device.device_kind, **peak}

    return {"forward": forward, "train": train}, describe


def make_torch_programs(spec: dict[str, Any]) -> Programs:
    import torch  # in its own processes only: not in those that time JAX
    from torch.nn import functional as F

    from cifar_jax import torch_reference

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # products in TF32, as JAX has them; PyTorch's convolutions are so already
        torch.set_float32_matmul_precision("high")
    model = create_model(TrainConfig(model=spec["model"]), CLASSES)
    memory = torch.channels_last if spec["layout"] == "channels_last" else torch.contiguous_format
    twin = torch_reference.make_twin(model, (32, 32, 3)).to(device, memory_format=memory)
    images, labels = timing_batch(spec["batch_size"])
    x = torch.from_numpy(layout.nhwc_to_nchw(images)).to(device, memory_format=memory)
    y = torch.from_numpy(labels).long().to(device)
    network = torch.compile(twin) if spec["mode"] == "compiled" else twin
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)

    def forward(steps: int) -> None:
        twin.eval()
        with torch.inference_mode():
            for _ in range(steps):
                network(x)
        synchronize()

    def train(steps: int) -> None:
        twin.train()
        for _ in range(steps):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        synchronize()

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def describe() -> dict[str, Any]:
        if device == "cpu":
            return {"device": "cpu"}
        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() >> 20
        return {"device": name, "device_peak_mb": peak}

    return {"forward": forward, "train": train}, describe


def timing_batch(batch_size: int) -> tuple[Any, Any]:
    """Images ``[B, 32, 32, 3]`` of noise and labels ``[B]``, already normalized."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, batch_size).astype(np.int32)


if __name__ == "__main__":
    paired_timing.serve(json.loads(sys.argv[1]), make_programs)
