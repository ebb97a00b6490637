"""PyTorch's state_dicts in files: untrusted ones read, and others written."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cifar_jax.errors import CheckpointError, CifarJaxError, ResourceError, UsageError
from cifar_jax.layout import StateDict

SAFETENSORS_ENDING = ".safetensors"
ENDINGS = (".pth", ".pt", SAFETENSORS_ENDING)

# Limits that files of networks stay below, unlike files that are made to keep us busy.
_MOST_TENSORS = 300
_LONGEST_NAME = 200
_LARGEST_HEADER = 2**20  # bytes, of a .safetensors: names, shapes and metadata


def read_state_dict(path: Path) -> tuple[StateDict, dict[str, str]]:
    """The tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file as float32, and its metadata.

    Names are normalised: a prefix that all of them share is removed, such as the ``module.`` of
    DataParallel or the ``_orig_mod.`` of torch.compile, and the numbers of an ``nn.Sequential`` get
    the tutorial's ``network.`` in front. Batch norm's ``num_batches_tracked`` is unused here, and
    left out.

    Raises:
        CheckpointError: the file is missing or damaged, or does not hold numbers.
        UsageError: it has another ending.
        ResourceError: a ``.pth`` needs torch, which is missing or has known vulnerabilities.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise UsageError(
            f"{path} is not a folder, and does not end in {', '.join(ENDINGS)}",
            fix="give a checkpoint's folder or such a file; rename it if it is one",
        )
    metadata: dict[str, str] = {}
    try:
        if not path.is_file():  # reading a pipe could block
            raise OSError("it is missing, or not a regular file")
        if ending == SAFETENSORS_ENDING:
            tensors, metadata = _read_safetensors(path)
        else:
            tensors = _read_pth(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}", fix="give another SOURCE") from error
    tensors = {n: a for n, a in tensors.items() if not n.endswith("num_batches_tracked")}
    if not tensors:
        raise CheckpointError(f"{path} has no tensors", fix="save the state_dict of a network")
    longest = max(map(len, tensors))
    if len(tensors) > _MOST_TENSORS or longest > _LONGEST_NAME:
        raise CheckpointError(
            f"{path} has {len(tensors):,} tensors, with names of up to {longest:,} characters",
            fix=f"save the state_dict of a network: up to {_MOST_TENSORS} tensors and "
            f"{_LONGEST_NAME} characters",
        )
    for name, array in tensors.items():
        if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
            raise CheckpointError(
                f"{name} in {path} is {array.dtype}{list(array.shape)}, which weights cannot be",
                fix="leave it out of the file, or convert the network before quantizing it",
            )
        with np.errstate(over="ignore"):  # float64 can overflow float32
            tensors[name] = array.astype(np.float32, order="C")
    return _own_names(tensors), metadata


def check_numbers(state_dict: StateDict, source: Path) -> None:
    """Raise ``CheckpointError`` if a value is not finite, or a variance is negative."""
    for name, array in state_dict.items():
        if bad := array.size - int(np.isfinite(array).sum()):
            raise CheckpointError(
                f"{name} in {source} has {bad:,} of {array.size:,} numbers that are NaN, infinite "
                "or too large for float32",
                fix="use a file from before the training diverged",
            )
        if name.endswith("running_var") and array.min() < 0:
            raise CheckpointError(
                f"{name} in {source} has {array.min():g}, which cannot be a variance",
                fix="use a file as PyTorch saved it",
            )


def write_state_dict(path: Path, state_dict: StateDict, metadata: dict[str, str]) -> None:
    """Write a ``.pth``, ``.pt`` or ``.safetensors`` file; only the last can hold ``metadata``.

    Raises:
        ResourceError: a ``.pth`` needs torch, which is missing.
        OSError: the file cannot be written.
    """
    # safetensors 0.8 writes an array's memory as it is, ignoring its strides.
    contiguous = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    if path.suffix.lower() == SAFETENSORS_ENDING:
        path.write_bytes(safetensors.numpy.save(contiguous, {"format": "pt", **metadata}))
    else:
        _write_pth(path, contiguous)


def _own_names(tensors: StateDict) -> StateDict:
    """Remove the prefix that all names share; put ``network.`` before the numbers of a sequence."""
    while True:
        heads = {name.split(".")[0] for name in tensors}
        rests = {name.partition(".")[2]: array for name, array in tensors.items()}
        if len(heads) > 1 or not all("." in rest for rest in rests):
            break  # only the layers are left; a linear model has one
        tensors = rests
    return {
        f"network.{n}" if n[:1].isdecimal() and f"network.{n}" not in tensors else n: array
        for n, array in tensors.items()
    }


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(size, _LARGEST_HEADER))
    try:
        if size > _LARGEST_HEADER:
            raise ValueError(f"a header of {size:,} bytes, where {_LARGEST_HEADER:,} is the most")
        with safetensors.safe_open(path, "np") as file:
            json.loads(header, object_pairs_hook=_check_unique)  # safetensors takes the last
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    # Raised, among others, for types that NumPy lacks.
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged, or not a {SAFETENSORS_ENDING} of numbers: {error!s:.200}",
            fix="use another copy, or save it again as float32",
        ) from error


def _check_unique(pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a name comes twice among {', '.join(names):.100}")


def _read_pth(path: Path) -> StateDict:
    try:
        from cifar_jax.torch_reference import read_pth
    except ImportError as error:
        raise _no_torch(error) from error
    return read_pth(path)


def _write_pth(path: Path, state_dict: StateDict) -> None:
    try:
        from cifar_jax.torch_reference import write_pth
    except ImportError as error:
        raise _no_torch(error) from error
    write_pth(path, state_dict)


def _no_torch(error: ImportError) -> CifarJaxError:
    return ResourceError(
        f"reading or writing a .pth needs PyTorch: {error}",
        fix="pip install torch==2.13.0, or use .safetensors",
    )
