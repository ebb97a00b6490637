"""``python -m cifar_jax``: list the commands."""

import cifar_jax
from cifar_jax import cli

COMMANDS = {
    "summary": "show a network layer by layer, and what training it takes",
    "check_data": "check a data set: bad files, duplicate images",
    "train": "train a network, keep its checkpoints, and score it on the test set",
    "evaluate": "score a trained network: per class, confusion, calibration, its worst mistakes",
    "predict": "classify images",
    "report": "show a run, or several beside each other, as one HTML page",
    "serve": "try a trained network in the browser",
    "export": "write a trained network for other programs: StableHLO, ONNX, safetensors, pth",
    "convert": "convert a trained network from PyTorch, or to it",
}


def main() -> None:
    print(f"cifar_jax {cifar_jax.__version__}: {cifar_jax.__doc__}\n")
    for name, purpose in COMMANDS.items():
        print(f"  python -m cifar_jax.{name:<10} {purpose}")
    print("\nEach explains its options with --help.")


if __name__ == "__main__":
    cli.run(main)
