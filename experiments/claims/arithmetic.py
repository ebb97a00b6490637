"""Sizes, shapes and counts: questions 2, 4, 5, 11, 13, 19, 28, 29, 36, 45, 55."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cifar_jax.networks import layers, models
from cifar_jax.networks.layer_table import layer_table
from cifar_jax.networks.pooling import max_pool
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, table
from claims.study import Study

_CLASSES = 10


def _shape_after(layer: nn.Module, *shape: int) -> tuple[int, ...]:
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    output, _ = jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x), images)
    return output.shape


def _parameters(layer: nn.Module, *shape: int) -> int:
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))


def _complains(run: Callable[[], Any], *errors: type[Exception]) -> bool:
    """Whether ``run`` raises one of ``errors``; any other exception is a bug of ours."""
    try:
        run()
    except errors:
        return True
    return False


def _zoo(batch_norm: bool = False) -> dict[str, nn.Module]:
    """The networks whose convolutions are ``conv_block``s; those of ``airbench`` are not."""
    zoo = {}
    for name in ("cnn", "cnn-wide", "cnn-gap", "resnet9"):
        options = {} if name == "resnet9" else {"batch_norm": batch_norm}
        zoo[name] = models.MODELS[name](num_classes=_CLASSES, **options)
    return zoo


def _layers(model: nn.Module) -> list[layers.Layer]:
    """Each layer of ``model`` with the shapes it has for a 32x32 RGB image."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.eval_shape(lambda v, x: layers.trace_layers(model, v, x), variables, images)


# Question 2


def measure_weight_sharing(study: Study) -> Measured:
    """Count the parameters of a convolution, a Dense layer and whole networks by image size.

    For RGB images of 32, 64, 128 and 256 pixels a side. The claim fails if the number of parameters
    of the convolution depends on the side, or that of the Dense layer does not. A caveat if the
    tutorial's own network, which flattens after its convolutions, grows nevertheless. Cost: a
    second.
    """
    sides = [32, 64, 128, 256]

    def count(make: Callable[[], nn.Module]) -> list[int]:
        return [_parameters(make(), 1, side, side, 3) for side in sides]

    flatten_then_dense = nn.Sequential([models.flatten, nn.Dense(16)])
    return Measured(
        {
            "sides_pixels": sides,
            "conv_3_to_16_parameters": count(lambda: nn.Conv(16, (3, 3), padding=1)),
            "dense_to_16_parameters": count(lambda: flatten_then_dense),
            "cnn_parameters": count(lambda: _zoo()["cnn"]),
            "cnn_gap_parameters": count(lambda: _zoo()["cnn-gap"]),
        },
        n=1,
    )


def judge_weight_sharing(values: Values) -> Verdict:
    counts = {
        "convolution, 3 to 16 channels": values["conv_3_to_16_parameters"],
        "Dense layer to 16 units": values["dense_to_16_parameters"],
        "`cnn`, which flattens": values["cnn_parameters"],
        "`cnn-gap`, with global average pooling": values["cnn_gap_parameters"],
    }
    conv, dense, cnn, _ = counts.values()
    evidence = table(
        (
            "parameters, by side of the image",
            *(f"{side} pixels" for side in values["sides_pixels"]),
        ),
        [(name, *(f"{n:,}" for n in by_side)) for name, by_side in counts.items()],
    )
    if len(set(conv)) > 1:
        return Verdict(FAILS, "A larger image needs a larger convolution.", evidence)
    if dense[-1] <= dense[0]:
        return Verdict(FAILS, "A Dense layer does not grow with the image either.", evidence)
    if cnn[-1] > 2 * cnn[0]:  # more than half of it then depends on the image size
        return Verdict(
            CAVEAT,
            "A convolution's parameters do not depend on the image size. But the tutorial's whole "
            f"network still grows from {cnn[0]:,} to {cnn[-1]:,} parameters, because it flattens; "
            "with global average pooling it does not.",
            evidence,
        )
    return Verdict(HOLDS, "A convolution's parameters do not depend on the image size.", evidence)


# Question 4


def measure_conv_shape(study: Study) -> Measured:
    """Run a batch of 128 images through the convolution in both frameworks.

    The claim fails if PyTorch's output is not [128, 16, 32, 32], or Flax's is not the same with the
    channels last. Cost: an import of torch.
    """
    from cifar_jax.torch_reference import torch

    conv = torch.nn.Conv2d(3, 16, kernel_size=3, padding=1)
    with torch.inference_mode():
        theirs = conv(torch.zeros(128, 3, 32, 32)).shape
    return Measured(
        {
            "torch_nchw_shape": list(theirs),
            "flax_nhwc_shape": list(_shape_after(nn.Conv(16, (3, 3), padding=1), 128, 32, 32, 3)),
        },
        n=1,
    )


def judge_conv_shape(values: Values) -> Verdict:
    theirs, ours = values["torch_nchw_shape"], values["flax_nhwc_shape"]
    evidence = bullets(f"PyTorch [B, C, H, W]: {theirs}", f"Flax [B, H, W, C]: {ours}")
    if theirs != [128, 16, 32, 32] or ours != [128, 32, 32, 16]:
        return Verdict(FAILS, "The output is not 16 channels of 32x32 pixels.", evidence)
    return Verdict(
        HOLDS,
        "Both frameworks give 16 channels of 32x32 pixels. Flax has the channels last.",
        evidence,
    )


# Question 5


def measure_padding(study: Study) -> Measured:
    """Stack 3x3 convolutions on a 32x32 image, without and with padding, until nothing is left.

    The claim fails if the first one does not take 2 pixels off a side, or if padding 1 changes the
    size. A caveat if 10 layers leave something. Cost: milliseconds.
    """
    sides = [32]
    while sides[-1] >= 3:
        sides.append(_shape_after(nn.Conv(1, (3, 3), padding=0), 1, sides[-1], sides[-1], 1)[1])
    padded = _shape_after(nn.Conv(1, (3, 3), padding=1), 1, 32, 32, 1)[1]
    return Measured(
        {
            "side_after_one_layer_pixels": sides[1],
            "side_after_ten_layers_pixels": sides[10],
            "layers_until_nothing_fits": len(sides) - 1,
            "side_with_padding_1_pixels": padded,
        },
        n=1,
    )


def judge_padding(values: Values) -> Verdict:
    after_one, after_ten = (values[f"side_after_{n}_pixels"] for n in ("one_layer", "ten_layers"))
    padded, layers_to_end = (
        values["side_with_padding_1_pixels"],
        values["layers_until_nothing_fits"],
    )
    evidence = table(
        ("from 32x32 pixels", "side in pixels"),
        [
            ("one layer without padding", str(after_one)),
            ("ten layers without padding", str(after_ten)),
            ("one layer with padding 1", str(padded)),
        ],
    )
    if after_one != 30 or padded != 32:
        return Verdict(
            FAILS,
            "A 3x3 kernel does not take 2 pixels off a side, or padding 1 does not keep the size.",
            evidence,
        )
    if after_ten > 0:
        return Verdict(
            CAVEAT,
            f"Each layer takes 2 pixels off, but ten layers leave {after_ten}x{after_ten} pixels; "
            f"only after {layers_to_end} layers does no kernel fit any more.",
            evidence,
        )
    return Verdict(HOLDS, "Without padding nothing is left after ten layers.", evidence)


# Question 11


def measure_conv_against_dense(study: Study) -> Measured:
    """Count the parameters and operations of a convolution 3 -> 16 and a Dense layer 3072 -> 16.

    Also those of a Dense layer with as many outputs as the convolution. The claim fails if the
    counts are not 448 and 49,168, or their ratio is not about 100 (80 to 125). A caveat if fewer
    parameters do not mean fewer operations, or the two have different numbers of outputs. Cost: a
    second.
    """
    conv = nn.Conv(16, (3, 3), padding=1)
    outputs = math.prod(_shape_after(conv, 1, 32, 32, 3))
    return Measured(
        {
            "conv_parameters": _parameters(conv, 1, 32, 32, 3),
            "dense_parameters": _parameters(nn.Dense(16), 1, 3072),
            "dense_of_as_many_outputs_parameters": _parameters(nn.Dense(outputs), 1, 3072),
            "conv_outputs": outputs,
            "dense_outputs": math.prod(_shape_after(nn.Dense(16), 1, 3072)),
            # By the textbook: each weight at each of the 32x32 positions, or once.
            "conv_multiply_accumulates": 32 * 32 * 3 * 3 * 3 * 16,
            "dense_multiply_accumulates": 3072 * 16,
        },
        n=1,
    )


def judge_conv_against_dense(values: Values) -> Verdict:
    conv, dense = values["conv_parameters"], values["dense_parameters"]
    ratio = dense / conv
    work = values["conv_multiply_accumulates"] / values["dense_multiply_accumulates"]
    equal = values["dense_of_as_many_outputs_parameters"]
    evidence = table(
        ("", "convolution", "Dense layer", "Dense layer with as many outputs"),
        [
            ("parameters", f"{conv:,}", f"{dense:,}", f"{equal:,}"),
            (
                "outputs",
                f"{values['conv_outputs']:,}",
                f"{values['dense_outputs']:,}",
                f"{values['conv_outputs']:,}",
            ),
            (
                "multiply-accumulates",
                f"{values['conv_multiply_accumulates']:,}",
                f"{values['dense_multiply_accumulates']:,}",
                "",
            ),
        ],
    )
    if (conv, dense) != (448, 49_168) or not 80 <= ratio <= 125:
        return Verdict(
            FAILS,
            f"They have {conv:,} and {dense:,} parameters, a factor of {ratio:.1f}.",
            evidence,
        )
    if work > 1 or values["conv_outputs"] != values["dense_outputs"]:
        return Verdict(
            CAVEAT,
            f"The convolution has {ratio:.0f} times fewer parameters, but it takes {work:.0f} "
            f"times the arithmetic, because it computes {values['conv_outputs']:,} outputs and the "
            f"Dense layer {values['dense_outputs']}. A Dense layer with as many outputs would have "
            f"{equal / conv:,.0f} times the convolution's parameters.",
            evidence,
        )
    return Verdict(HOLDS, f"The convolution has {ratio:.0f} times fewer parameters.", evidence)


# Question 13


def measure_pool_shape(study: Study) -> Measured:
    """Pool 16 channels of 32x32 in both frameworks; then raise one channel and see which change.

    The claim fails if the output is not 16x16x16, if the frameworks differ, or if the raised
    channel changes another one. Cost: milliseconds, and an import of torch.
    """
    from cifar_jax.torch_reference import torch

    images = np.random.default_rng(0).normal(size=(1, 32, 32, 16)).astype(np.float32)
    raised = images.copy()
    raised[..., 5] += 1
    ours, ours_raised = np.asarray(max_pool(images)), np.asarray(max_pool(raised))
    pooled = torch.nn.MaxPool2d(2, 2)(torch.tensor(images[0]).permute(2, 0, 1))
    theirs = pooled.permute(1, 2, 0).numpy()
    return Measured(
        {
            "torch_chw_shape": list(pooled.shape),
            "flax_hwc_shape": list(ours.shape[1:]),
            "largest_difference_of_frameworks": float(np.abs(ours[0] - theirs).max()),
            "channels_changed_by_one": int((ours != ours_raised).any(axis=(0, 1, 2)).sum()),
        },
        n=1,
    )


def judge_pool_shape(values: Values) -> Verdict:
    theirs, ours = values["torch_chw_shape"], values["flax_hwc_shape"]
    changed = values["channels_changed_by_one"]
    difference = values["largest_difference_of_frameworks"]
    evidence = bullets(
        f"PyTorch [C, H, W]: {theirs}",
        f"this project [H, W, C]: {ours}",
        f"largest difference of their values: {difference:g}",
        f"output channels that change with one input channel: {changed}",
    )
    if theirs == ours == [16, 16, 16] and difference == 0 and changed == 1:
        return Verdict(
            HOLDS, "Pooling halves both sides of each channel, and mixes no channels.", evidence
        )
    return Verdict(FAILS, "The output has another shape, or a channel changes others.", evidence)


# Question 19


def measure_flatten(study: Study) -> Measured:
    """Leave out Flatten before the first Dense layer of the tutorial's network.

    The features are 64 maps of 4x4, and the layer has 512 outputs. In PyTorch: ``Linear(1024,
    512)``, as it should be, and ``Linear(4, 512)``, which happens to fit the last axis. In Flax,
    where a Dense layer takes its size from its input: the layer, and the loss of a network that
    ends so. The claim fails if PyTorch's Linear does not raise an error. A caveat if elsewhere
    something other than an error comes out. Cost: milliseconds, and an import of torch.
    """
    from cifar_jax.torch_reference import torch

    theirs = torch.zeros(2, 64, 4, 4)
    ours = jnp.zeros((2, 4, 4, 64))
    logits = jnp.zeros((2, 4, 4, _CLASSES))
    labels = jnp.zeros(2, jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return Measured(
        {
            "flattened_torch_shape": list(torch.nn.Flatten()(theirs).shape),
            "torch_linear_complains": _complains(
                lambda: torch.nn.Linear(1024, 512)(theirs), RuntimeError
            ),
            "torch_linear_that_fits_last_axis_shape": list(torch.nn.Linear(4, 512)(theirs).shape),
            "flax_dense_complains": _complains(
                lambda: _shape_after(nn.Dense(512), *ours.shape), ValueError, TypeError
            ),
            "flax_dense_shape": list(_shape_after(nn.Dense(512), *ours.shape)),
            "flax_dense_parameters": _parameters(nn.Dense(512), *ours.shape),
            "flax_dense_after_flatten_parameters": _parameters(
                nn.Dense(512), *models.flatten(ours).shape
            ),
            "optax_loss_complains": _complains(
                lambda: cross_entropy(logits, labels), ValueError, TypeError, AssertionError
            ),
        },
        n=1,
    )


def judge_flatten(values: Values) -> Verdict:
    fitting = values["torch_linear_that_fits_last_axis_shape"]
    wrong_shape, wrong_count = values["flax_dense_shape"], values["flax_dense_parameters"]
    right_count = values["flax_dense_after_flatten_parameters"]
    raised = {True: "an error", False: "no error"}
    evidence = table(
        ("without Flatten, on 64 maps of 4x4", "gives"),
        [
            ("PyTorch `Linear(1024, 512)`", raised[values["torch_linear_complains"]]),
            ("PyTorch `Linear(4, 512)`", f"{fitting}"),
            (
                "Flax `Dense(512)`",
                "an error"
                if values["flax_dense_complains"]
                else f"{wrong_shape}, with {wrong_count:,} parameters instead of {right_count:,}",
            ),
            ("then the loss", raised[values["optax_loss_complains"]]),
        ],
    )
    if values["flattened_torch_shape"] != [2, 1024]:
        found = values["flattened_torch_shape"]
        return Verdict(FAILS, f"64 maps of 4x4 are flattened to {found}.", evidence)
    if not values["torch_linear_complains"]:
        return Verdict(FAILS, "PyTorch's Linear(1024, 512) takes unflattened features.", evidence)
    if values["flax_dense_complains"]:
        return Verdict(HOLDS, "Without Flatten both frameworks raise an error.", evidence)
    return Verdict(
        CAVEAT,
        "PyTorch's Linear raises an error, but only because the last axis, on which it acts, has 4 "
        "entries instead of 1,024. If that axis fits, as it always does in Flax, the output "
        "silently has another shape.",
        evidence,
    )


# Question 28


def measure_depth(study: Study) -> Measured:
    """Count the layers with weights of the tutorial's network and of ``resnet9``.

    The claim fails if the first does not have 3 convolutions and 3 Dense layers. A caveat if a
    residual network has fewer than 50 layers. Cost: a second.
    """

    def count(name: str, kind: str) -> int:
        return sum(layer.kind == kind for layer in _layers(_zoo()[name]))

    return Measured(
        {
            "cnn_convolutions": count("cnn", "conv"),
            "cnn_dense_layers": count("cnn", "dense"),
            "cnn_layers_of_any_kind": len(_layers(_zoo()["cnn"])),
            "resnet9_layers_with_kernels": count("resnet9", "conv") + count("resnet9", "dense"),
        },
        n=1,
    )


def judge_depth(values: Values) -> Verdict:
    convs, dense = values["cnn_convolutions"], values["cnn_dense_layers"]
    residual = values["resnet9_layers_with_kernels"]
    evidence = bullets(
        f"`cnn`: {convs} convolutions and {dense} Dense layers, {values['cnn_layers_of_any_kind']} "
        "layers with ReLU, pooling and flatten",
        f"`resnet9`: {residual} layers with weights",
    )
    if (convs, dense) != (3, 3):
        return Verdict(
            FAILS, f"It has {convs} convolutions and {dense} Dense layers, not 3 and 3.", evidence
        )
    if residual < 50:
        return Verdict(
            CAVEAT,
            f"The network is {convs + dense} layers deep, as claimed. But a ResNet need not have "
            f"50 layers: `resnet9`, for the same images, has {residual}.",
            evidence,
        )
    return Verdict(HOLDS, f"The network is {convs + dense} layers deep.", evidence)


# Question 29


def measure_same_padding(study: Study) -> Measured:
    """Compare Out = (In - K + 2P)/S + 1 with the output sizes of convolutions in both frameworks.

    For In of 32 and 33, K of 1 to 7, P of 0 to 3 and S of 1 to 3. Also look for convolutions of
    cnn, cnn-wide, cnn-gap and resnet9 that change the image size (``airbench``'s first one does).
    The claim fails if another padding than 1 keeps the size for K = 3, or if the formula is wrong
    at stride 1. A caveat if it must be rounded elsewhere. Cost: seconds, and an import of torch.
    """
    from cifar_jax.torch_reference import torch

    cases = list(itertools.product((32, 33), range(1, 8), range(4), (1, 2, 3)))
    exact, floored, wrong_at_stride_1 = 0, 0, 0
    keeps: dict[int, list[int]] = {kernel: [] for kernel in range(1, 8)}
    meta = torch.device("meta")  # shapes alone
    for side, kernel, padding, stride in cases:
        conv = nn.Conv(1, (kernel, kernel), strides=stride, padding=padding)
        ours = _shape_after(conv, 1, side, side, 1)[1]
        module = torch.nn.Conv2d(1, 1, kernel, stride, padding, device=meta)
        theirs = module(torch.empty(1, 1, side, side, device=meta)).shape[-1]
        out = (side - kernel + 2 * padding) / stride + 1
        exact += ours == theirs == out
        floored += ours == theirs == math.floor(out)
        wrong_at_stride_1 += stride == 1 and not ours == theirs == out
        if stride == 1 and side == 32 == ours:
            keeps[kernel].append(padding)
    resizing = 0
    for model in _zoo().values():
        resizing += sum(
            layer.kind == "conv" and layer.input.shape[1:3] != layer.output.shape[1:3]
            for layer in _layers(model)
        )
    return Measured(
        {
            "cases": len(cases),
            "cases_where_formula_is_exact": exact,
            "cases_where_rounded_down_it_is_exact": floored,
            "cases_wrong_at_stride_1": wrong_at_stride_1,
            "paddings_that_keep_32_at_kernel_3": keeps[3],
            "paddings_that_keep_32_at_kernel_2": keeps[2],
            "convolutions_here_that_change_the_size": resizing,
        },
        n=1,
    )


def judge_same_padding(values: Values) -> Verdict:
    kept, wrong = values["paddings_that_keep_32_at_kernel_3"], values["cases_wrong_at_stride_1"]
    even = values["paddings_that_keep_32_at_kernel_2"]
    resizing = values["convolutions_here_that_change_the_size"]
    cases, exact = values["cases"], values["cases_where_formula_is_exact"]
    rounded = values["cases_where_rounded_down_it_is_exact"]
    evidence = bullets(
        f"{cases} combinations of size, kernel, padding and stride: the formula gives the size in "
        f"{exact}, rounded down in {rounded}; at stride 1 it is wrong in {wrong}",
        f"paddings that keep 32 pixels with a 3x3 kernel: {kept}; with a 2x2 kernel: "
        f"{even or 'none'}",
        f"convolutions of `cnn`, `cnn-wide`, `cnn-gap` and `resnet9` that change the size: "
        f"{resizing}",
    )
    if kept != [1] or wrong or resizing:
        return Verdict(
            FAILS,
            "The formula is wrong at stride 1, another padding keeps the size, or a convolution "
            "changes it.",
            evidence,
        )
    if exact < cases:
        return Verdict(
            CAVEAT,
            "The formula is exact at stride 1, where a 3x3 kernel needs padding 1 to keep the "
            "size. With larger strides it must be rounded down: as written, it is right in "
            f"{exact} of {cases} cases, and rounded down in {rounded}.",
            evidence,
        )
    return Verdict(
        HOLDS, "The formula is exact, and a 3x3 kernel needs padding 1 to keep the size.", evidence
    )


# Question 36

_BLOCK = re.compile(r"conv( batch_norm)? relu( pool)?")


def measure_conv_block(study: Study) -> Measured:
    """Cut cnn, cnn-wide, cnn-gap and resnet9 at their convolutions, and compare the pieces.

    A piece goes from one convolution to the next, without what follows the last pool or ReLU (the
    classifier, or the end of a residual block). The claim fails if the blocks of the tutorial's
    network differ, with or without batch norm, or if a piece of any network is not Conv, batch
    norm?, ReLU, pool?. Cost: a second.
    """
    patterns: dict[str, list[str]] = {}
    for batch_norm in (False, True):
        for name, model in _zoo(batch_norm).items():
            kinds = " ".join(layer.kind for layer in _layers(model))
            pieces = [f"conv{piece}" for piece in kinds.split("conv")[1:]]
            end = re.compile(r" (flatten|global_pool|add)\b.*")
            key = f"{name}{' with batch norm' * batch_norm}"
            patterns[key] = [end.sub("", piece).strip() for piece in pieces]
    plain = [block for key, blocks in patterns.items() if "with" not in key for block in blocks]
    source = textwrap.dedent(inspect.getsource(models.conv_block))
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(models)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "conv_block"
    ]
    return Measured(
        {
            "patterns_in_cnn": sorted(set(patterns["cnn"])),
            "patterns_in_cnn_with_batch_norm": sorted(set(patterns["cnn with batch norm"])),
            "convolutions_in_all_networks": len(plain),
            "of_them_without_pool": sum("pool" not in block for block in plain),
            "off_the_pattern": sum(
                not _BLOCK.fullmatch(block) for blocks in patterns.values() for block in blocks
            ),
            "lines_of_the_function": len(source.strip().splitlines()),
            "calls_in_the_source": len(calls),
        },
        n=1,
    )


def judge_conv_block(values: Values) -> Verdict:
    one, normed = values["patterns_in_cnn"], values["patterns_in_cnn_with_batch_norm"]
    total, off = values["convolutions_in_all_networks"], values["off_the_pattern"]
    unpooled, lines = values["of_them_without_pool"], values["lines_of_the_function"]
    evidence = bullets(
        f"blocks of `cnn`: {', '.join(one)}; with batch norm: {', '.join(normed)}",
        f"the function has {lines} lines and is called in {values['calls_in_the_source']} places",
        f"convolutions of `cnn`, `cnn-wide`, `cnn-gap` and `resnet9`: {total}, of which {unpooled} "
        f"are not followed by a pool; blocks off the pattern: {off}",
    )
    if len(one) != 1 or len(normed) != 1 or off:
        return Verdict(FAILS, "The blocks of one network differ.", evidence)
    finding = (
        f"One function of {lines} lines makes all {total} convolutions of four networks, and the "
        "three blocks of the tutorial's network are alike."
    )
    if unpooled:
        finding += " Pooling has to be optional, as batch norm is."
    return Verdict(HOLDS, finding, evidence)


# Question 45


def measure_channels(study: Study) -> Measured:
    """Give networks made for RGB images other numbers of channels; make some for 1, 3 and 4.

    The claim fails if PyTorch's or Flax's first layer accepts another number of channels than it
    was made for. A caveat if the 3 need not be written down. Cost: a second or two, and an import
    of torch.
    """
    from cifar_jax.torch_reference import make_twin, torch

    model = models.MODELS["cnn"](num_classes=_CLASSES)
    rgb = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    made = jax.eval_shape(model.init, jax.random.key(0), rgb)

    def ours(channels: int) -> Any:
        images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
        return jax.eval_shape(model.apply, made, images)

    twin = make_twin(model, (32, 32, 3))
    shape_errors = (flax.errors.ScopeParamShapeError, TypeError, ValueError)
    others = [1, 2, 4, 6]
    return Measured(
        {
            "other_channels": others,
            "torch_refuses": [
                _complains(lambda n=n: twin(torch.zeros(1, n, 32, 32)), RuntimeError)
                for n in others
            ],
            "flax_refuses": [_complains(lambda n=n: ours(n), *shape_errors) for n in others],
            "both_take_3": not _complains(lambda: ours(3), *shape_errors)
            and not _complains(lambda: twin(torch.zeros(1, 3, 32, 32)), RuntimeError),
            "flax_first_layer_parameters_made_for_1_3_4_channels": [
                layer_table(model, (32, 32, n), 1)[0].params for n in (1, 3, 4)
            ],
        },
        n=1,
    )


def judge_channels(values: Values) -> Verdict:
    others = ", ".join(map(str, values["other_channels"]))
    theirs, ours = values["torch_refuses"], values["flax_refuses"]
    counts = values["flax_first_layer_parameters_made_for_1_3_4_channels"]
    one, three, four = (f"{count:,}" for count in counts)
    evidence = bullets(
        f"made for 3 channels and given {others}: PyTorch refuses {sum(theirs)} of {len(theirs)}, "
        f"Flax {sum(ours)} of {len(ours)}",
        f"parameters of Flax's first layer if it is first shown 1, 3 or 4 channels: {one}, {three} "
        f"or {four}",
    )
    if not values["both_take_3"] or not all([*theirs, *ours]):
        return Verdict(FAILS, "A network made for 3 channels takes another number.", evidence)
    if len(set(counts)) == len(counts):
        return Verdict(
            CAVEAT,
            "Both frameworks refuse other numbers of channels than the network was made for. But "
            "the 3 need not be written down: Flax takes it from the first images it is shown.",
            evidence,
        )
    return Verdict(HOLDS, "A network takes only the number of channels it is made for.", evidence)


# Question 55


def measure_relu(study: Study) -> Measured:
    """Count what ReLU keeps, as a function and as a class; compare its outputs with max(0, x).

    On 100,000 random numbers, called twice. Also counted: the parameters of PReLU, an activation
    that has some. The claim fails if ReLU has parameters or buffers, if a second call gives another
    answer, or if the function and the class differ. Cost: milliseconds, and an import of torch.
    """
    from cifar_jax.torch_reference import torch

    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    tensor = torch.tensor(x)
    module = torch.nn.ReLU()
    outputs = [
        np.asarray(nn.relu(x)),
        np.asarray(nn.relu(x)),  # again
        torch.nn.functional.relu(tensor).numpy(),
        module(tensor).numpy(),
        module(tensor).numpy(),
    ]
    kept = layer_table(models.MODELS["cnn"](num_classes=_CLASSES), (32, 32, 3), 1)
    return Measured(
        {
            "torch_relu_parameters_and_buffers": len([*module.parameters(), *module.buffers()]),
            "flax_relu_parameters_in_cnn": sum(row.params for row in kept if row.kind == "relu"),
            "torch_prelu_parameters": sum(p.numel() for p in torch.nn.PReLU().parameters()),
            "outputs_compared": len(outputs),
            "largest_difference_from_max_0_x": max(
                float(np.abs(output - np.maximum(x, 0)).max()) for output in outputs
            ),
        },
        n=1,
    )


def judge_relu(values: Values) -> Verdict:
    kept = values["torch_relu_parameters_and_buffers"] + values["flax_relu_parameters_in_cnn"]
    difference = values["largest_difference_from_max_0_x"]
    evidence = bullets(
        f"parameters and buffers of ReLU: {kept} (of PReLU, for comparison: "
        f"{values['torch_prelu_parameters']})",
        f"largest difference from max(0, x) in {values['outputs_compared']} calls, as a function "
        f"and as a class, in both frameworks: {difference:g}",
    )
    if kept or difference:
        return Verdict(FAILS, "ReLU keeps something, or is not max(0, x).", evidence)
    return Verdict(
        HOLDS, "ReLU keeps nothing, and is max(0, x) as a function and as a class.", evidence
    )


CLAIMS = [
    Claim(
        question=2,
        says="A convolution has as many parameters for a large image as for a small one, so "
        "sharing weights solves the parameter explosion of Dense layers.",
        measure=measure_weight_sharing,
        judge=judge_weight_sharing,
        refuted_by={
            "sides_pixels": [32, 64, 128, 256],
            "conv_3_to_16_parameters": [448, 1792, 7168, 28672],
            "dense_to_16_parameters": [49168, 196624, 786448, 3145744],
            "cnn_parameters": [682282, 682282, 682282, 682282],
            "cnn_gap_parameters": [94538, 94538, 94538, 94538],
        },
    ),
    Claim(
        question=4,
        says="Conv2d(3, 16, kernel_size=3, padding=1) turns [B, 3, 32, 32] into [B, 16, 32, 32].",
        measure=measure_conv_shape,
        judge=judge_conv_shape,
        refuted_by={
            "torch_nchw_shape": [128, 16, 30, 30],
            "flax_nhwc_shape": [128, 30, 30, 16],
        },
    ),
    Claim(
        question=5,
        says="Without padding each 3x3 convolution takes 2 pixels off a side, and after 10 layers "
        "a 32x32 image is gone; padding 1 keeps the size.",
        measure=measure_padding,
        judge=judge_padding,
        refuted_by={
            "side_after_one_layer_pixels": 32,
            "side_after_ten_layers_pixels": 0,
            "layers_until_nothing_fits": 10,
            "side_with_padding_1_pixels": 32,
        },
    ),
    Claim(
        question=11,
        says="A convolution 3 -> 16 has 448 parameters, a Dense layer 3072 -> 16 has 49,168: the "
        "convolution is 100 times more efficient.",
        measure=measure_conv_against_dense,
        judge=judge_conv_against_dense,
        refuted_by={
            "conv_parameters": 4480,
            "dense_parameters": 49168,
            "dense_of_as_many_outputs_parameters": 50348032,
            "conv_outputs": 16384,
            "dense_outputs": 16,
            "conv_multiply_accumulates": 442368,
            "dense_multiply_accumulates": 49152,
        },
    ),
    Claim(
        question=13,
        says="MaxPool2d(2, 2) turns 16x32x32 into 16x16x16, each channel on its own.",
        measure=measure_pool_shape,
        judge=judge_pool_shape,
        refuted_by={
            "torch_chw_shape": [16, 16, 16],
            "flax_hwc_shape": [16, 16, 16],
            "largest_difference_of_frameworks": 0.0,
            "channels_changed_by_one": 16,
        },
    ),
    Claim(
        question=19,
        says="Flatten turns [B, C, H, W] into [B, C*H*W]; without it the Dense layer would raise "
        "an error.",
        measure=measure_flatten,
        judge=judge_flatten,
        refuted_by={
            "flattened_torch_shape": [2, 1024],
            "torch_linear_complains": False,
            "torch_linear_that_fits_last_axis_shape": [2, 64, 4, 512],
            "flax_dense_complains": False,
            "flax_dense_shape": [2, 4, 4, 512],
            "flax_dense_parameters": 33280,
            "flax_dense_after_flatten_parameters": 524800,
            "optax_loss_complains": True,
        },
    ),
    Claim(
        question=28,
        says="The tutorial's network has 3 convolutional blocks and 3 linear layers, 6 layers "
        "deep: shallow, as ResNets have 50 or more.",
        measure=measure_depth,
        judge=judge_depth,
        refuted_by={
            "cnn_convolutions": 6,
            "cnn_dense_layers": 3,
            "cnn_layers_of_any_kind": 21,
            "resnet9_layers_with_kernels": 9,
        },
    ),
    Claim(
        question=29,
        says="Out = (In - K + 2P)/S + 1, so a 3x3 kernel takes padding 1 to keep the size, and "
        "only pooling shrinks the image.",
        measure=measure_same_padding,
        judge=judge_same_padding,
        refuted_by={
            "cases": 168,
            "cases_where_formula_is_exact": 103,
            "cases_where_rounded_down_it_is_exact": 168,
            "cases_wrong_at_stride_1": 0,
            "paddings_that_keep_32_at_kernel_3": [2],
            "paddings_that_keep_32_at_kernel_2": [],
            "convolutions_here_that_change_the_size": 0,
        },
    ),
    Claim(
        question=36,
        says="One reusable function makes every block (Conv, batch norm if wanted, ReLU, pool), "
        "so the network is short to write and all its blocks are alike.",
        measure=measure_conv_block,
        judge=judge_conv_block,
        refuted_by={
            "patterns_in_cnn": ["conv relu", "conv relu pool"],
            "patterns_in_cnn_with_batch_norm": ["conv batch_norm relu pool"],
            "convolutions_in_all_networks": 20,
            "of_them_without_pool": 8,
            "off_the_pattern": 0,
            "lines_of_the_function": 15,
            "calls_in_the_source": 2,
        },
    ),
    Claim(
        question=45,
        says="The 3 of the first convolution is hardcoded because it must match the channels of "
        "the data.",
        measure=measure_channels,
        judge=judge_channels,
        refuted_by={
            "other_channels": [1, 2, 4, 6],
            "torch_refuses": [False, True, True, True],
            "flax_refuses": [True, True, True, True],
            "both_take_3": True,
            "flax_first_layer_parameters_made_for_1_3_4_channels": [160, 448, 592],
        },
    ),
    Claim(
        question=55,
        says="F.relu is stateless: it learns nothing and need not be an object.",
        measure=measure_relu,
        judge=judge_relu,
        refuted_by={
            "torch_relu_parameters_and_buffers": 1,
            "flax_relu_parameters_in_cnn": 0,
            "torch_prelu_parameters": 1,
            "outputs_compared": 5,
            "largest_difference_from_max_0_x": 0.0,
        },
    ),
]
