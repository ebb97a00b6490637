"""The tutorial's training in PyTorch: files, a DataLoader, the network, the optimizer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cifar_jax import torch_reference
from cifar_jax.config import PRESETS, ModelName, TrainConfig
from cifar_jax.data.dataset import Dataset, Split
from cifar_jax.data.images import decode
from cifar_jax.data.sources import load_dataset
from cifar_jax.networks.models import create_model


class Images(TorchDataset[Any]):
    """Files read by Pillow one at a time, as ``torchvision.datasets.ImageFolder`` reads them."""

    def __init__(self, split: Split, dataset: Dataset, *, augment: bool) -> None:
        self._images, self._labels, self._augment = split.images, split.labels, augment
        self._mean = torch.tensor(dataset.mean)[:, None, None]
        self._std = torch.tensor(dataset.std)[:, None, None]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if hasattr(self._images, "paths"):
            with Image.open(os.fsdecode(self._images.paths[i])) as file:
                pixels = np.asarray(file.convert("RGB"))
        else:
            pixels = self._images[i]
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        image = (image - self._mean) / self._std
        if self._augment:
            if torch.rand(()) < 0.5:
                image = image.flip(2)
            padded = F.pad(image[None], (2, 2, 2, 2), mode="reflect")[0]
            top, left = torch.randint(0, 5, (2,)).tolist()
            image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        return image, int(self._labels[i])


def main() -> None:
    arguments = _parse()
    dataset = load_dataset(
        arguments.data,
        data_dir=arguments.data_dir,
        max_train_examples=arguments.max_train_examples,
        cache_mb=0,
        decode=decode,  # without TensorFlow, which takes seconds to start
        seed=arguments.seed,
    )
    torch.manual_seed(arguments.seed)
    arguments.output.write_text(json.dumps(_train_and_score(dataset, arguments)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--max-train-examples", type=int)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tutorial", action="store_true", help="Adam at a constant 1e-3, no augmentation"
    )
    parser.add_argument(
        "--until",
        type=float,
        help="stop at the first epoch with this validation accuracy",
    )
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def recipe(model: ModelName, *, tutorial: bool) -> TrainConfig:
    """That of the tutorial, or else of ``cifar_jax.train``."""
    return dataclasses.replace(PRESETS["tutorial" if tutorial else "default"], model=model)


def _train_and_score(dataset: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and validation accuracy of each epoch, and the test accuracy."""
    workers = os.cpu_count() or 1
    config = recipe(arguments.model, tutorial=arguments.tutorial)
    batches = DataLoader(
        Images(dataset.train, dataset, augment=config.flip),
        config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )

    def accuracy(split: Split) -> float:
        scored = DataLoader(Images(split, dataset, augment=False), 256, num_workers=workers)
        network.eval()
        with torch.inference_mode():
            right = [(network(x).argmax(1) == y).float() for x, y in scored]
        return float(torch.cat(right).mean())

    model = create_model(config, len(dataset.class_names))
    network = torch_reference.make_twin(model, dataset.image_shape)
    network = network.to(memory_format=torch.channels_last)
    total_steps = arguments.epochs * len(batches)
    optimizer, schedule = torch_reference.make_optimizer(network, config, total_steps)
    seconds, accuracies = [], []
    for _ in range(arguments.epochs):
        started = time.perf_counter()
        network.train()
        for images, labels in batches:
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracies.append(accuracy(dataset.val))
        seconds.append(time.perf_counter() - started)
        print(f"epoch {len(seconds)}: {seconds[-1]:.1f} s, {accuracies[-1]:.4f}", flush=True)
        if arguments.until and accuracies[-1] >= arguments.until:
            break
    test_accuracy = accuracy(dataset.test)
    return {"epochs": seconds, "val_accuracy": accuracies, "test_accuracy": test_accuracy}


if __name__ == "__main__":
    main()
