"""The same networks and the same training in PyTorch; the only module that imports torch.

Everything goes in and comes out as NumPy arrays in PyTorch's layout (NCHW, OIHW), and runs on the
CPU, so that torch never shares a GPU with JAX.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from cifar_jax.config import TrainConfig
from cifar_jax.dataset import ImageShape
from cifar_jax.models import ConvNet, ResNet9

StateDict = dict[str, NDArray[Any]]


class Network(nn.Module):
    """The tutorial's module: one ``nn.Sequential``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, xb: torch.Tensor) -> torch.Tensor:
        return self.network(xb)


def conv_block(in_channels: int, features: int, *, norm: bool, pool: bool) -> list[nn.Module]:
    """Conv 3x3 padding 1, batch norm if wanted, ReLU, MaxPool 2 if wanted."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, features, 3, padding=1, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(features))
    layers.append(nn.ReLU())
    if pool:
        layers.append(nn.MaxPool2d(2, 2))
    return layers


class ResidualNetwork(nn.Module):
    """``ResNet9``, under the names that PyTorch tutorials give its parts."""

    def __init__(self, channels: int, widths: tuple[int, ...], num_classes: int, dropout: float):
        super().__init__()

        def block(in_channels: int, features: int, pool: bool = False) -> nn.Sequential:
            return nn.Sequential(*conv_block(in_channels, features, norm=True, pool=pool))

        first, second, third, fourth = widths
        self.conv1 = block(channels, first)
        self.conv2 = block(first, second, pool=True)
        self.res1 = nn.Sequential(block(second, second), block(second, second))
        self.conv3 = block(second, third, pool=True)
        self.conv4 = block(third, fourth, pool=True)
        self.res2 = nn.Sequential(block(fourth, fourth), block(fourth, fourth))
        self.classifier = nn.Sequential(
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(fourth, num_classes, bias=False),
        )

    def forward(self, xb: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.conv1(xb))
        out = self.res1(out) + out
        out = self.conv4(self.conv3(out))
        out = self.res2(out) + out
        return 0.125 * self.classifier(out)


def make_twin(model: ConvNet | ResNet9, image_shape: ImageShape) -> nn.Module:
    """The network of ``model`` in PyTorch, with PyTorch's own initial weights.

    Args:
        image_shape: ``(H, W, C)``.
    """
    height, width, channels = image_shape
    if isinstance(model, ResNet9):
        return ResidualNetwork(channels, tuple(model.widths), model.num_classes, model.dropout)
    layers: list[nn.Module] = []
    for index, features in enumerate(model.widths, start=1):
        pool = index % model.convs_per_pool == 0
        layers += conv_block(channels, features, norm=model.batch_norm, pool=pool)
        channels = features
        if pool:
            height, width = height // 2, width // 2
    if model.global_pool:
        layers.append(nn.AdaptiveAvgPool2d(1))
        height = width = 1
    layers.append(nn.Flatten())
    units = channels * height * width
    for hidden in model.hidden:
        layers += [nn.Linear(units, hidden), nn.ReLU()]
        if model.dropout:
            layers.append(nn.Dropout(model.dropout))
        units = hidden
    layers.append(nn.Linear(units, model.num_classes))
    return Network(*layers)


def load(twin: nn.Module, state_dict: StateDict) -> None:
    """Copy ``state_dict`` into ``twin``, which takes its float type."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    floating = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    twin.to(floating).load_state_dict(tensors)


def state_dict_of(twin: nn.Module) -> StateDict:
    """A copy of the parameters and statistics."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in twin.state_dict().items()}


def logits(twin: nn.Module, images: NDArray[Any]) -> NDArray[Any]:
    """Images ``[B, C, H, W]`` -> logits ``[B, K]``, in evaluation mode."""
    with torch.inference_mode():
        return twin.eval()(torch.from_numpy(images)).numpy()


def activations(twin: nn.Module, images: NDArray[Any], *, train: bool) -> dict[str, NDArray[Any]]:
    """What each layer with parameters gives for images ``[B, C, H, W]``, by its name."""
    twin = copy.deepcopy(twin)  # training mode moves the running statistics
    found: dict[str, NDArray[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            found[name] = output.detach().clone().numpy()

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        twin.train(train)(torch.from_numpy(images))
    return found


def loss_and_gradients(
    twin: nn.Module, images: NDArray[Any], labels: NDArray[np.int32]
) -> tuple[float, StateDict]:
    """The mean cross-entropy in training mode, and its gradient by parameter name."""
    twin = copy.deepcopy(twin).train()
    loss = F.cross_entropy(twin(torch.from_numpy(images)), torch.from_numpy(labels).long())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in twin.named_parameters()}


def make_optimizer(
    twin: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What ``cifar_jax.optim`` makes of ``config``, in PyTorch's words."""
    kernels = [p for p in twin.parameters() if p.ndim > 1]
    others = [p for p in twin.parameters() if p.ndim == 1]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    peak = config.learning_rate
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=peak, momentum=config.momentum, nesterov=config.nesterov
        )
    elif config.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=peak)
    else:
        optimizer = torch.optim.AdamW(groups, lr=peak)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "onecycle":
        # PyTorch would move the momentum (Adam's first beta) against the learning rate as well.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=total_steps, cycle_momentum=False
        )
    elif config.schedule == "cosine":
        moves = max(total_steps - 1, 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, moves)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    return optimizer, schedule


def learning_rates(config: TrainConfig, total_steps: int) -> list[float]:
    """The learning rate at each step, by PyTorch's schedulers."""
    optimizer, schedule = make_optimizer(nn.Linear(1, 1), config, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def train(
    twin: nn.Module,
    config: TrainConfig,
    batches: Iterable[tuple[NDArray[Any], NDArray[np.int32]]],
    total_steps: int,
) -> Iterator[float]:
    """Train ``twin`` a step a batch of images ``[B, C, H, W]`` and labels ``[B]``.

    Yields the mean cross-entropy of each step, without label smoothing.
    """
    optimizer, schedule = make_optimizer(twin, config, total_steps)
    twin.train()
    for images, labels in batches:
        output, target = twin(torch.from_numpy(images)), torch.from_numpy(labels).long()
        loss = F.cross_entropy(output, target, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(twin.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        yield F.cross_entropy(output.detach(), target).item()
