r"""What do more devices gain, and what do micro-batches and bfloat16 cost?

    python experiments/scaling.py --output scaling.json    # minutes; on all devices there are
    python experiments/scaling.py --devices 4 --output four.json    # four parts of a CPU

Times the training step of the default network on 1, 2, 4, ... devices: with the same batch, and
with the same share of it for each device. Counts what the devices exchange, and predicts from both
how fast larger machines would be. Then splits a batch on one device into 1, 2, 4, 8 micro-batches:
time, and memory as XLA counts it. Writes a JSON and, beside it, a picture and a page (.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from cifar_jax import cli
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.networks.models import create_model
from cifar_jax.steps.optim import make_optimizer, make_schedule
from cifar_jax.steps.parallel import (
    AXIS_NAME,
    compile_step,
    empty_batch,
    replicate,
    select_devices,
)
from cifar_jax.steps.step_memory import step_memory
from cifar_jax.steps.train_step import create_train_state, make_train_step
from cifar_jax.system.files import write_atomically
from machine import environment
from output import check_output

SHAPE: ImageShape = (32, 32, 3)
BATCH = 512
MICRO_BATCHES = (1, 2, 4, 8)
ROUNDS = 7
STEPS_ON_A_GPU = 20  # timed together, as one alone would be mostly its start
# Bytes a second and seconds a message, from one device to the next: typical, not measured here.
NETWORKS = {
    "NVLink in one machine": (300e9, 5e-6),
    "100 Gbit/s between machines": (10e9, 20e-6),
    "10 Gbit/s between machines": (1e9, 50e-6),
}
PREDICTED_DEVICES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="split the CPU into so many devices")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the JSON to write; picture and page go beside it",
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    check_output(output)
    if arguments.devices:
        jax.config.update("jax_num_cpu_devices", arguments.devices)

    exchanged = exchanged_bytes()
    found: dict[str, Any] = {
        "environment": {
            **environment("jax", "jaxlib", "flax"),
            "devices": f"{jax.local_device_count()} {jax.devices()[0].device_kind}",
        },
        "network": "cnn",
    }
    parts: dict[str, Callable[[], Any]] = {
        "devices": measure_devices,
        "exchanged_bytes": lambda: exchanged,
        "predicted": lambda: predict(exchanged),
        "micro_batches": measure_micro_batches,
        "bfloat16": measure_bfloat16,
    }
    for name, measure in parts.items():
        found[name] = measure()
        write_atomically(output, json.dumps(found, indent=1) + "\n")
    draw(found).savefig(output.with_suffix(".png"), dpi=110)
    write_atomically(output.with_suffix(".md"), page(found, output))
    print(f"in {output}, {output.with_suffix('.png').name} and {output.with_suffix('.md').name}")


# --- what is timed --------------------------------------------------------------------------------


def make_step(
    accumulate: int = 1, dtype: Any = None, axis_name: str | None = None
) -> tuple[Callable[..., Any], Any]:
    """The step of the default network, and its first state."""
    config = TrainConfig(schedule="constant", accumulate=accumulate)
    model = create_model(config, 10, axis_name, dtype)
    tx = make_optimizer(config, make_schedule(config, 1000))
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    step = make_train_step(config, model, tx, mean, std, axis_name)
    return step, jax.device_get(create_train_state(model, tx, SHAPE, 0))


def make_program(
    batch_size: int, n_devices: int, accumulate: int = 1, dtype: Any = None
) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """That step compiled for ``n_devices``, the state on them, and a batch."""
    step, state = make_step(accumulate, dtype, AXIS_NAME)
    devices = select_devices(n_devices)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 256 if name == "image" else 10, x.shape).astype(x.dtype)
        for name, x in empty_batch(batch_size, SHAPE, devices).items()
    }
    compiled = compile_step(step, state, batch, devices, donate_state=False)
    if devices[0].platform != "cpu":  # which takes NumPy's arrays as they are
        mesh = jax.sharding.Mesh(np.array(devices), (AXIS_NAME,))
        divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME))
        batch = jax.device_put(batch, divided)
    return compiled, replicate(state, devices), batch


def milliseconds(programs: dict[Any, tuple[Callable[..., Any], Any, Any]]) -> dict[Any, Any]:
    """The median and the spread of each program's time; they take turns, round after round."""
    times: dict[Any, list[float]] = {name: [] for name in programs}
    steps = 1 if jax.default_backend() == "cpu" else STEPS_ON_A_GPU
    for round_ in range(ROUNDS + 1):
        for name, (step, state, batch) in programs.items():
            started = time.perf_counter()
            for _ in range(steps):
                result = step(state, batch)
            jax.block_until_ready(result)
            if round_:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - started) / steps)
    return {
        name: {
            "ms_median": statistics.median(each),
            "ms_min": min(each),
            "ms_max": max(each),
        }
        for name, each in times.items()
    }


def measure_devices() -> list[dict[str, Any]]:
    """The step on 1, 2, 4, ... devices, with the same batch and with the same share of it each."""
    counts = [n for n in (1, 2, 4, 8, 16) if n <= jax.local_device_count()]
    rows = []
    for kept, batch_of in (("batch", lambda n: BATCH), ("share", lambda n: BATCH // 4 * n)):
        print(f"on {counts} devices, {kept} kept ...", flush=True)
        times = milliseconds({n: make_program(batch_of(n), n) for n in counts})
        for n in counts:
            speed = batch_of(n) / times[n]["ms_median"] * 1e3
            rows.append(
                {
                    "kept": kept,
                    "devices": n,
                    "batch_size": batch_of(n),
                    **times[n],
                    "images_per_second": speed,
                }
            )
    return rows


def measure_micro_batches() -> list[dict[str, Any]]:
    """A batch on one device in K micro-batches: time and memory."""
    print(f"in {MICRO_BATCHES} micro-batches ...", flush=True)
    model = create_model(TrainConfig(), 10)
    programs = {k: make_program(BATCH, 1, accumulate=k) for k in MICRO_BATCHES}
    times = milliseconds(programs)
    return [
        {
            "micro_batches": k,
            **times[k],
            "temporary_mb": step_memory(
                TrainConfig(accumulate=k), model, SHAPE, BATCH
            ).xla_temporaries
            / 2**20,
        }
        for k in MICRO_BATCHES
    ]


def measure_bfloat16() -> dict[str, Any]:
    """The step with float32 and with bfloat16 activations."""
    print("with bfloat16 activations ...", flush=True)
    return milliseconds(
        {
            "float32": make_program(BATCH, 1),
            "bfloat16": make_program(BATCH, 1, dtype=jnp.bfloat16),
        }
    )


# --- what follows from it -------------------------------------------------------------------------


def exchanged_bytes() -> int:
    """What a step averages over the devices: gradients, batch norm's statistics, and sums."""
    _, state = make_step()
    averaged = jax.tree.leaves((state.params, state.batch_stats))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in averaged) + 3 * 4


def sent_bytes(exchanged: int, devices: int) -> float:
    """What each device sends in a ring all-reduce: 2 (D-1)/D of the data.

    Patarasuk and Yuan (2009), "Bandwidth optimal all-reduce algorithms for
    clusters of workstations", doi:10.1016/j.jpdc.2008.09.002.
    """
    return 2 * (devices - 1) / devices * exchanged


def predict(exchanged: int) -> list[dict[str, Any]]:
    """``t(D) = a + b B/D + 2 (D-1)/D bytes/bandwidth + 2 (D-1) latency``, at the default batch.

    a and b are fitted to this device's time at batches of 32 to 512.
    """
    print("batches of 32 to 512 on one device ...", flush=True)
    sizes = [32, 64, 128, 256, 512]
    times = milliseconds({size: make_program(size, 1) for size in sizes})
    slope, start = np.polyfit(sizes, [times[size]["ms_median"] for size in sizes], 1)
    start = max(float(start), 0.0)
    rows = []
    for network, (bandwidth, latency) in NETWORKS.items():
        for devices in PREDICTED_DEVICES:
            exchange = sent_bytes(exchanged, devices) / bandwidth + 2 * (devices - 1) * latency
            ms = start + slope * BATCH / devices + 1e3 * exchange
            rows.append(
                {
                    "network": network,
                    "devices": devices,
                    "fixed_ms": start,
                    "ms_an_image": float(slope),
                    "exchange_ms": 1e3 * exchange,
                    "images_per_second": BATCH / ms * 1e3,
                    "efficiency": (start + slope * BATCH) / (devices * ms),
                }
            )
    return rows


def draw(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    figure.suptitle(found["environment"]["machine"])
    measured, predicted = figure.subplots(1, 2)
    for kept, marker in (("batch", "o-"), ("share", "s--")):
        rows = [row for row in found["devices"] if row["kept"] == kept]
        measured.plot(
            [row["devices"] for row in rows],
            [row["images_per_second"] for row in rows],
            marker,
            label=f"{kept} kept",
        )
    measured.set(
        title=f"measured: {found['environment']['devices']}",
        xlabel="devices",
        ylabel="images a second",
    )
    measured.set_xticks(sorted({row["devices"] for row in found["devices"]}))
    measured.set_ylim(0, 1.1 * max(row["images_per_second"] for row in found["devices"]))
    measured.legend()
    for network in NETWORKS:
        rows = [row for row in found["predicted"] if row["network"] == network]
        predicted.plot(
            [row["devices"] for row in rows],
            [100 * row["efficiency"] for row in rows],
            "o-",
            label=network,
        )
    predicted.set_xscale("log", base=2)
    predicted.set(
        title=f"predicted, batch of {BATCH} kept", xlabel="devices", ylabel="efficiency / %"
    )
    predicted.set_xticks(PREDICTED_DEVICES, map(str, PREDICTED_DEVICES))
    predicted.set_ylim(0, 105)
    predicted.legend(fontsize="small")
    return figure


def page(found: dict[str, Any], output: Path) -> str:
    """The results in words, as Markdown."""
    about = found["environment"]
    first = found["predicted"][0]
    lines = [
        "# What more devices give",
        "",
        f"Written by `experiments/scaling.py`; {about['devices']}, {about['machine']}, jax "
        f"{about['versions']['jax']}, {about['date']}. The default network, images of "
        f"{'x'.join(map(str, SHAPE))}, medians of {ROUNDS} rounds in turn.",
        "",
        f"![scaling]({output.with_suffix('.png').name})",
        "",
        "## Measured",
        "",
        "| kept | devices | batch | ms a step (fastest to slowest) | images a second |",
        "|---|---|---|---|---|",
    ]
    for row in found["devices"]:
        lines.append(
            f"| {row['kept']} | {row['devices']} | {row['batch_size']} | {_ms(row)} "
            f"| {row['images_per_second']:,.0f} |"
        )
    lines += [
        "",
        "Parts of one CPU share its cores: their times show what sharing costs, not a gain.",
        "",
        "## Exchanged and predicted",
        "",
        f"A step averages {found['exchanged_bytes'] / 1e6:.2f} MB over the devices; in a ring each "
        "of D devices sends 2 (D-1)/D of that. With a step of "
        f"{first['fixed_ms']:.3g} ms + {first['ms_an_image']:.3g} ms an image, fitted here, and "
        "t(D) = fixed + image B/D + 2 (D-1)/D bytes/bandwidth + 2 (D-1) latency:",
        "",
        "| network (assumed: bytes/s, s a message) | "
        + " | ".join(f"{n} devices" for n in PREDICTED_DEVICES)
        + " |",
        "|---" * (len(PREDICTED_DEVICES) + 1) + "|",
    ]
    for network, (bandwidth, latency) in NETWORKS.items():
        cells = [
            f"{100 * row['efficiency']:.0f} %"
            for row in found["predicted"]
            if row["network"] == network
        ]
        lines.append(f"| {network} ({bandwidth:.0e}, {latency:.0e}) | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Efficiency is the speed-up divided by D. It falls below 50 % roughly where a device's "
        f"share of the {BATCH} images takes less time than the fixed part and the exchange "
        "together. Faster devices compute their share in less time, but exchange as much: with "
        "devices F times as fast as this one, adding more stops paying F times earlier.",
        "",
        "## Micro-batches (`--accumulate`)",
        "",
        f"| micro-batches of {BATCH} images | XLA's temporaries | ms a step |",
        "|---|---|---|",
    ]
    for row in found["micro_batches"]:
        lines.append(f"| {row['micro_batches']} | {row['temporary_mb']:.0f} MB | {_ms(row)} |")
    times = found["bfloat16"]
    lines += [
        "",
        "## Activations in bfloat16 (`--dtype bfloat16`)",
        "",
        f"A step of {BATCH} images takes {_three_digits(times['float32']['ms_median'])} ms with "
        f"float32 and {_three_digits(times['bfloat16']['ms_median'])} ms with bfloat16.",
    ]
    return "\n".join(lines) + "\n"


def _ms(row: dict[str, Any]) -> str:
    median, least, most = (_three_digits(row[f"ms_{name}"]) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _three_digits(value: float) -> str:
    """A GPU's steps take less than a millisecond, and a CPU's hundreds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    cli.run(main)
