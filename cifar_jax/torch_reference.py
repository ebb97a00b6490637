"""The same networks and the same training in PyTorch; the only module that imports torch.

All inputs and outputs are NumPy arrays in PyTorch's layout (NCHW, OIHW), and everything runs on the
CPU, so that torch never shares a GPU with JAX.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Otherwise torch's waiting threads would spin on the cores that JAX's need: ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.errors import CheckpointError, CifarJaxError, ResourceError, UsageError
from cifar_jax.layout import StateDict
from cifar_jax.networks.airbench import Airbench
from cifar_jax.networks.initializers import WHITENING_SIDE
from cifar_jax.networks.models import ConvNet, Model, ResNet9


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
    """``ResNet9``, with the names that PyTorch tutorials give its parts."""

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


class UnscaledBatchNorm(nn.BatchNorm2d):
    """Batch norm whose scale stays 1."""

    def __init__(self, features: int) -> None:
        momentum = 1 - Airbench.batch_norm_momentum
        super().__init__(features, eps=Airbench.batch_norm_epsilon, momentum=momentum)
        self.weight.requires_grad_(False)


class AirbenchGroup(nn.Module):
    """A stage of ``Airbench``."""

    def __init__(self, in_channels: int, features: int, deep: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, features, 3, padding=1, bias=False)
        self.norm1 = UnscaledBatchNorm(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = UnscaledBatchNorm(features)
        self.deep = deep
        if deep:
            self.conv3 = nn.Conv2d(features, features, 3, padding=1, bias=False)
            self.norm3 = UnscaledBatchNorm(features)

    def forward(self, xb: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(xb), 2)), approximate="tanh")
        out = self.norm2(self.conv2(x))
        if self.deep:
            out = x + self.norm3(self.conv3(F.gelu(out, approximate="tanh")))
        return F.gelu(out, approximate="tanh")


class AirbenchNetwork(nn.Module):
    """``Airbench``, with its author's names."""

    def __init__(
        self, channels: int, widths: tuple[int, ...], num_classes: int, deep: bool
    ) -> None:
        super().__init__()
        whitened = 2 * channels * WHITENING_SIDE**2
        self.whiten = nn.Conv2d(channels, whitened, WHITENING_SIDE)
        self.whiten.weight.requires_grad_(False)
        ends = itertools.pairwise((whitened, *widths))
        groups = (AirbenchGroup(before, features, deep) for before, features in ends)
        self.layers = nn.Sequential(nn.GELU(approximate="tanh"), *groups)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.layers(self.whiten(x)).amax((2, 3))
        return self.head(features) / features.shape[1]


def make_twin(model: Model, image_shape: ImageShape) -> nn.Module:
    """The network of ``model`` in PyTorch, with PyTorch's own initial weights.

    Args:
        image_shape: ``(H, W, C)``.

    Raises:
        UsageError: ``model`` is not one of the zoo, and has no twin.
    """
    height, width, channels = image_shape
    if isinstance(model, Airbench):
        return AirbenchNetwork(channels, tuple(model.widths), model.num_classes, model.deep)
    if isinstance(model, ResNet9):
        return ResidualNetwork(channels, tuple(model.widths), model.num_classes, model.dropout)
    if not isinstance(model, ConvNet):
        raise UsageError(
            f"{type(model).__name__} has no twin in PyTorch",
            fix="add one to torch_reference.py, or export --format stablehlo or safetensors",
        )
    layers: list[nn.Module] = []
    if model.patch_size > 1:
        layers.append(nn.PixelUnshuffle(model.patch_size))
        height, width = height // model.patch_size, width // model.patch_size
        channels *= model.patch_size**2
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


def initial_state_dict(model: Model, image_shape: ImageShape, seed: int) -> StateDict:
    """PyTorch's own initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return state_dict_of(make_twin(model, image_shape))


def load(twin: nn.Module, state_dict: StateDict) -> None:
    """Copy ``state_dict`` into ``twin``, which takes its float type."""
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    floating = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    twin.to(floating).load_state_dict(tensors)


def state_dict_of(twin: nn.Module) -> StateDict:
    """A copy of the parameters and statistics."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in twin.state_dict().items()}


def logits(twin: nn.Module, images: NDArray[Any]) -> NDArray[Any]:
    """Images ``[B, C, H, W]`` -> logits ``[B, K]``, in evaluation mode."""
    with torch.inference_mode():
        return twin.eval()(torch.tensor(images)).numpy()


def activations(twin: nn.Module, images: NDArray[Any], *, train: bool) -> dict[str, NDArray[Any]]:
    """``"logits"`` of images ``[B, C, H, W]``, and the output of each layer with parameters."""
    twin = copy.deepcopy(twin)  # training mode updates the running statistics
    found: dict[str, NDArray[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            found[name] = output.detach().clone().numpy()

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        found["logits"] = twin.train(train)(torch.tensor(images)).numpy()
    return found


def loss_and_gradients(
    twin: nn.Module, images: NDArray[Any], labels: NDArray[np.int32]
) -> tuple[float, StateDict]:
    """The mean cross-entropy in training mode, and its gradient by parameter name."""
    twin = copy.deepcopy(twin).train()
    loss = F.cross_entropy(twin(torch.tensor(images)), torch.tensor(labels).long())
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad  # None: not trained
        for name, p in twin.named_parameters()
    }
    return loss.item(), {name: gradient.numpy() for name, gradient in gradients.items()}


def make_optimizer(
    twin: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer of :mod:`cifar_jax.steps.optim` for ``config``, in PyTorch.

    Raises:
        ValueError: the optimizer is Muon, which has no twin here.
    """
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
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak)
    else:
        raise ValueError(f"no twin in PyTorch of the optimizer {config.optimizer}")
    schedule: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "onecycle":
        # By default PyTorch also cycles the momentum (Adam's first beta), opposite to the rate.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=total_steps, cycle_momentum=False
        )
    elif config.schedule == "cosine":
        moves = max(total_steps - 1, 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, moves)
    elif config.schedule == "linear":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    return optimizer, schedule


def learning_rates(config: TrainConfig, total_steps: int) -> list[float]:
    """The learning rate at each step, from PyTorch's schedulers."""
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
    """Train ``twin``, one step per batch of images ``[B, C, H, W]`` and labels ``[B]``.

    Yields the mean cross-entropy of each step, without label smoothing.
    """
    optimizer, schedule = make_optimizer(twin, config, total_steps)
    for images, labels in batches:
        twin.train()  # the caller may have evaluated it in between
        output, target = twin(torch.tensor(images)), torch.tensor(labels).long()
        loss = F.cross_entropy(output, target, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(twin.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        yield F.cross_entropy(output.detach(), target).item()


# CVE-2025-32434 (up to 2.5.1) and CVE-2026-24747 (before 2.10) run code despite weights_only=True.
_SAFE_TO_READ = (2, 10)

# Of a zip, and of a pickle; torch no longer reads its oldest files, which are tar archives.
_STARTS = (b"PK", b"\x80")

# Keys under which training scripts store the state_dict, beside the optimizer's and the epoch.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")


def read_pth(path: Path) -> StateDict:
    """The tensors of a state_dict that ``torch.save`` wrote, by name; no code in it is run.

    Half precision is converted to float32, as NumPy lacks some of torch's types.

    Raises:
        CheckpointError: the file is damaged, or holds no state_dict.
        ResourceError: this torch has known vulnerabilities.
        OSError: the file cannot be read.
    """
    if torch.__version__ < _SAFE_TO_READ:
        raise ResourceError(
            f"a .pth can make torch {torch.__version__} run code (CVE-2026-24747)",
            fix="pip install torch==2.13.0",
        )
    content = path.read_bytes()
    try:
        # Otherwise torch parses text as pickle instructions, and says that they are not allowed.
        if not content.startswith(_STARTS) and content[257:262] != b"ustar":
            raise ValueError(f"it begins with {content[:8]!r}")
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as records:
                unpacked = sum(record.file_size for record in records.infolist())
            if unpacked > len(content):  # torch.save does not compress, but torch.load inflates
                raise ValueError(f"its {len(content):,} bytes unpack to {unpacked:,}")
        with warnings.catch_warnings(action="ignore"):  # about formats that it then refuses
            payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) was not", str(error))
        more = f"{found[1]}, which loading would run" if found else "more than tensors"
        raise _no_state_dict(path, f"holds {more}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _no_state_dict(
            path,
            f"is damaged, or not from torch.save: {reason}",
            fix="use another copy, or save the weights again: torch.save(model.state_dict(), path)",
        ) from error
    if isinstance(payload, dict):
        payload = next((payload[key] for key in _STATE_DICT_KEYS if key in payload), payload)
    if not isinstance(payload, dict):
        raise _no_state_dict(path, f"holds a {type(payload).__name__}")
    for name, tensor in payload.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _no_state_dict(path, f"has {name!r:.200}, a {type(tensor).__name__}, in its dict")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise _no_state_dict(
                path, f"has {name:.200}, which is sparse, quantized or a meta tensor"
            )
    size = sum(tensor.nbytes for tensor in payload.values())
    if size > len(content):  # such as views of a single number, which a copy would expand
        raise _no_state_dict(path, f"has tensors of {size:,} bytes in {len(content):,}")
    try:
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)
            for name, tensor in payload.items()
        }
    except (RuntimeError, TypeError) as error:
        raise _no_state_dict(
            path, f"has numbers of a type that NumPy lacks: {error!s:.200}"
        ) from error


def write_pth(path: Path, state_dict: StateDict) -> None:
    """Write ``state_dict`` for ``model.load_state_dict(torch.load(path))``.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()  # on a full disk torch.save raises RuntimeError, as for bugs
    tensors = {name: torch.tensor(np.array(a, order="C")) for name, a in state_dict.items()}
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getvalue())


def write_onnx(
    path: Path,
    twin: nn.Module,
    image_shape: ImageShape,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    metadata: dict[str, str],
) -> None:
    """Write an ONNX classifier: ``images``, uint8 ``[N, H, W, C]`` for any N, to ``probabilities``,
    float32 ``[N, K]``.

    Args:
        image_shape: ``(H, W, C)``.
        mean, std: of each channel, in units of 0..1; the file includes normalising by them.
        metadata: for the file's ``metadata_props``.

    Raises:
        OSError: the file cannot be written.
    """
    example = torch.zeros((2, *image_shape), dtype=torch.uint8)
    # The exporter warns of deprecations within itself, and that torchvision is missing, whose
    # operators no network here uses.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        program = torch.onnx.export(
            _Classifier(twin, mean, std).eval(),
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,  # the other exporter is deprecated
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # Each node's origin in our source code: paths of this machine, and half the file.
    for part in (
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        del part.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


class _Classifier(nn.Module):
    """Images uint8 ``[N, H, W, C]`` -> probabilities ``[N, K]``."""

    def __init__(self, twin: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.twin = twin
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        # Contiguous: for a view, pooling is exported as arithmetic on strides.
        return torch.softmax(self.twin(x.permute(0, 3, 1, 2).contiguous()), dim=1)


def _no_state_dict(path: Path, reason: str, fix: str | None = None) -> CifarJaxError:
    return CheckpointError(
        f"{path} {reason}",
        fix=fix
        or "in PyTorch, load it if you trust it and save only the weights: "
        "torch.save(model.state_dict(), path)",
    )
