"""What accuracy does a configuration reach, over several seeds?

    python experiments/accuracy.py --seeds 3 --data cifar10.tar.gz --output accuracy.json

Trains once per seed with `python -m cifar_jax.train` and any of its options. The epoch of each run
that is best by validation is scored once on the test set. Writes accuracies, mean and spread, with
data, versions and machine, to --output. Finished runs are not repeated: a study that was stopped
continues where it was. The default network takes one to five minutes a seed on two cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from cifar_jax import cli
from cifar_jax.errors import UsageError
from machine import environment
from output import check_output

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = cli.Parser(
        description=__doc__.split("\n\n")[0],
        epilog="All other options go to cifar_jax.train.",
        allow_abbrev=False,  # --seed is not --seeds
    )
    parser.add_argument("--seeds", type=int, default=3, help="train with the seeds 0 .. N-1")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument(
        "--workdirs", type=Path, default=ROOT / "runs" / "accuracy", help="where the runs are kept"
    )
    arguments, train_options = parser.parse_known_args()
    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds}", fix="give at least 1")
    for given in train_options:
        if (option := given.split("=")[0]) in ("--seed", "--workdir"):
            raise UsageError(f"{option} is another for each run", fix=f"give {option}s")
    check_output(arguments.output)
    reports = []
    for seed in range(arguments.seeds):
        workdir = arguments.workdirs / f"{arguments.output.stem}-seed{seed}"
        train = [sys.executable, "-m", "cifar_jax.train", *train_options]
        train += ["--seed", str(seed), "--workdir", str(workdir), "--resume"]
        if code := subprocess.run(train).returncode:
            raise SystemExit(code)  # it has said why
        reports.append(json.loads((workdir / "report.json").read_text()))

    config = json.loads((workdir / "config.json").read_text())
    for where in ("data", "data_dir", "seed"):  # where things were; the seeds are 0 .. n-1
        del config[where]
    accuracies = [report["test_accuracy"] for report in reports]
    first = reports[0]
    result = {
        "config": config,
        "data": first["data"],
        "n_params": first["n_params"],
        "n_train": first["n_train"],
        "n_test": first["n_test"],
        "n": len(accuracies),
        "test_accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "val_accuracies": [report["val_accuracy"] for report in reports],
        **environment(),
        "device": first["device_kind"],
        "versions": first["versions"],
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for seed, accuracy in enumerate(accuracies):
        print(f"seed {seed}: test accuracy {100 * accuracy:.2f} %")
    spread = f" +- {100 * result['std']:.2f}" if result["std"] is not None else ""
    print(f"mean {100 * result['mean']:.2f}{spread} %, n = {result['n']}, in {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
